"""The page of `scar demo`: a picture in, an instruction, pictures out.

In: an `Editor`, examples, limits. Out: Gradio blocks, and how to serve them.
Pictures are shown while they grow. All that the page stores lies in one folder,
and nothing outside of it can be read. Called by `commands/demo.py`.
"""

import os
import pathlib
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from scar_jax.data.controls import FROM_PHOTO
from scar_jax.demo.limits import Guard, Limits
from scar_jax.editor import Editor
from scar_jax.extras import require

Example = tuple[np.ndarray, str]
_NO_CONTROL = 'the picture itself'
_CSS = """
.gradio-container {width: 100%; max-width: 1100px !important; margin: 0 auto}
#picture img {width: 100%; height: 100%; object-fit: contain}
footer {display: none !important}
"""


class Page:
  """Blocks around one editor.

  Attributes:
    blocks: what Gradio serves.
  """

  def __init__(
    self,
    editor: Editor,
    workdir: str,
    folder: pathlib.Path,
    examples: Sequence[Example] = (),
    limits: Limits | None = None,
  ):
    """Builds the page.

    Args:
      editor: the model.
      workdir: how the command that is shown calls the model.
      folder: for uploads and results; everything in it may be read.
      examples: pictures and instructions to start from.
      limits: what a visitor may ask for.

    Raises:
      ValueError: Gradio is not installed.
    """
    # Read once, when Gradio is imported.
    os.environ['GRADIO_TEMP_DIR'] = str(folder)
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
    self._gr = require('gradio', 'demo')
    self._editor, self._workdir, self._folder = editor, workdir, folder
    self._examples, self._limits = list(examples), limits or Limits()
    model = editor.cfg.model
    self._draws = model.order == 'random'  # parts of a picture anew
    self._takes = model.prefix.compress != 'off'
    self._text = model.text.kind
    self.blocks = self._build()

  def serve(self, host: str, port: int, block: bool = True) -> str:
    """Serves the page; returns its address once it is up.

    Args:
      host: address to listen on; 127.0.0.1 is this machine only.
      port: 0 takes a free one.
      block: until the process is interrupted.
    """
    from starlette.middleware import Middleware

    queue = self.blocks.queue(
      max_size=self._limits.queue, default_concurrency_limit=1
    )
    fonts = ('system-ui', 'sans-serif')
    theme = self._gr.themes.Default(font=fonts, font_mono=('monospace',))
    _, address, _ = queue.launch(
      server_name=host,
      server_port=port or None,
      prevent_thread_lock=not block,
      share=False,
      show_error=False,
      quiet=True,
      max_file_size=f'{self._limits.megabytes:g}mb',
      allowed_paths=[],
      blocked_paths=[],
      app_kwargs={'middleware': [Middleware(Guard)]},
      footer_links=[],
      ssr_mode=False,
      enable_monitoring=False,
      mcp_server=False,
      pwa=False,
      theme=theme,
      css=_CSS,
    )
    return address

  def _build(self) -> Any:
    gr, sample = self._gr, self._editor.cfg.sample
    with gr.Blocks(
      title='SCAR', analytics_enabled=False, delete_cache=(600, 3600)
    ) as blocks:
      gr.Markdown('## Edit a picture')
      with gr.Row():
        with gr.Column(min_width=300):
          picture = self._picture_input()
          prompt = gr.Textbox(
            label='Class' if self._text == 'label' else 'Instruction',
            lines=2,
            max_length=self._limits.letters,
            visible=self._text != 'none',
            elem_id='prompt',
          )
          control = gr.Dropdown(
            [_NO_CONTROL, *FROM_PHOTO],
            value=_NO_CONTROL,
            label='The model sees',
            visible=self._takes and not self._draws,
          )
          with gr.Accordion('Settings', open=False):
            guidance = gr.Slider(
              1, 10, sample.guidance, step=0.1, label='Guidance'
            )
            temperature = gr.Slider(
              0, 2, sample.temperature, step=0.05, label='Temperature'
            )
            # Each value is a program of its own, so there are few.
            choices = sorted({0, 1, 10, 50, 100, 300, sample.top_k})
            top_k = gr.Dropdown(
              choices, value=sample.top_k, label='Top-k (0 is all)'
            )
            most = (
              self._editor.cfg.model.grid[0] * self._editor.cfg.model.grid[1]
            )
            steps = gr.Slider(
              0, most, sample.num_sets, step=1, visible=self._draws,
              label='Steps (0 is as trained)',
            )  # fmt: skip
            count = gr.Slider(
              1, self._limits.images, 1, step=1, label='Pictures'
            )
            seed = gr.Number(0, precision=0, label='Seed', minimum=0)
          with gr.Row():
            go = gr.Button('Make', variant='primary', elem_id='make')
            stop = gr.Button('Stop', elem_id='stop')
        with gr.Column(min_width=300):
          gallery = gr.Gallery(
            label='Results', columns=2, fit_columns=False, object_fit='contain',
            format='png', elem_id='gallery', height=360,
          )  # fmt: skip
          status = gr.Markdown(elem_id='status')
          compare = gr.ImageSlider(
            label='Before and after', visible=self._takes, format='png',
            interactive=False, max_height=360,
          )  # fmt: skip
          download = gr.DownloadButton('Download', elem_id='download')
          command = gr.Textbox(
            label='The same on the command line', lines=2, buttons=['copy'],
            interactive=False, elem_id='command',
          )  # fmt: skip
      if self._examples:
        gr.Examples(
          self._example_files(), [picture, prompt], cache_examples=False,
          label='Examples',
        )  # fmt: skip
      given = [
        picture, prompt, control, guidance, temperature, top_k, steps, count,
        seed,
      ]  # fmt: skip
      shown = [gallery, status, compare, download, command]
      run = go.click(
        self.make, given, shown, api_name='make', show_progress_on=[gallery]
      )
      stop.click(None, cancels=[run])
    return blocks

  def _picture_input(self) -> Any:
    gr = self._gr
    if not self._draws:
      found = gr.Image(
        label='Picture', type='filepath', image_mode=None, height=320,
        sources=['upload', 'clipboard'], visible=self._takes,
        elem_id='picture',
      )  # fmt: skip
      # Gradio would decode the file before anyone has looked at its size.
      found.preprocess = self._uploaded
      return found
    found = gr.ImageEditor(
      label='Picture; paint what is to be drawn anew', type='pil',
      sources=('upload', 'clipboard'), transforms=(), layers=False,
      brush=gr.Brush(colors=['#ffffff'], color_mode='fixed'),
      elem_id='picture',
    )  # fmt: skip
    inner = found.preprocess

    def preprocess(payload: Any) -> Any:
      self._uploaded(getattr(payload, 'background', None))
      try:
        return inner(payload)
      except Exception as error:
        raise gr.Error('the picture cannot be read') from error

    found.preprocess = preprocess
    return found

  def _uploaded(self, file: Any) -> Any:
    """The picture of an upload, judged; an error is told to the visitor."""
    if file is None or not getattr(file, 'path', None):
      return None
    try:
      return self._limits.picture(file.path, file.orig_name or '')
    except (ValueError, OSError) as error:
      raise self._gr.Error(str(error)) from error

  def make(
    self,
    picture: Any,
    prompt: str,
    control: str,
    guidance: float,
    temperature: float,
    top_k: float,
    steps: float,
    count: float,
    seed: float,
  ) -> Iterator[tuple[Any, ...]]:
    """Gallery, status, comparison, download and command, again and again."""
    gr = self._gr
    try:
      source, mask = _parts(picture)
      if self._takes and source is None:
        raise ValueError('no picture; upload one, or take an example')
      settings: dict[str, Any] = {
        'guidance': float(guidance),
        'temperature': float(temperature),
        'top_k': int(top_k),
      }
      if self._draws:
        settings['num_sets'] = int(steps)
      kind = None if control == _NO_CONTROL else control
      count, seed = int(count), int(seed or 0)
      if not 1 <= count <= self._limits.images:
        raise ValueError(
          f'{count} pictures; accepted: 1 to {self._limits.images}'
        )
      text = self._limits.prompt(prompt)
      told = self._command(text, kind, mask, seed, settings)
      for growth in self._editor.stream(
        None if source is None else [source] * count,
        [text] * count if self._text != 'label' else None,
        labels=_label(text) if self._text == 'label' else None,
        masks=None if mask is None else [mask] * count,
        control=kind,
        seed=seed,
        **settings,
      ):
        done = growth.done == growth.total
        share = f'{growth.done} of {growth.total} tokens'
        last = growth.images[0]
        yield (
          growth.images,
          'Done.' if done else share,
          (Image.fromarray(source), last)
          if done and source is not None
          else gr.skip(),
          self._kept(last, seed) if done else gr.skip(),
          told,
        )
    except ValueError as error:
      raise gr.Error(str(error)) from error

  def _command(
    self,
    prompt: str,
    control: str | None,
    mask: Any,
    seed: int,
    settings: dict[str, Any],
  ) -> str:
    """What gives the first picture on the command line."""
    words = ['scar', 'edit', f'--workdir={self._workdir}']
    words += ['--image=in.png'] * self._takes
    if self._text == 'label':
      words.append(f'--label={prompt}')
    elif self._text != 'none':
      words.append(f'--prompt={prompt}')
    words += [] if control is None else [f'--control={control}']
    words += [] if mask is None else ['--mask=mask.png']
    words += [f'--{name}={value}' for name, value in settings.items()]
    return shlex.join([*words, f'--seed={seed}', '--out=out.png'])

  def _kept(self, image: Image.Image, seed: int) -> str:
    """A file of the last picture, below the page's folder."""
    import tempfile

    home = pathlib.Path(tempfile.mkdtemp(dir=self._folder))
    image.save(home / f'scar-{seed}.png')
    return str(home / f'scar-{seed}.png')

  def _example_files(self) -> list[list[Any]]:
    rows = []
    for i, (picture, prompt) in enumerate(self._examples):
      path = self._folder / f'example{i}.png'
      Image.fromarray(picture).save(path)
      rows.append([str(path), prompt])
    return rows


def _label(text: str) -> int:
  if not text.strip().isdigit():
    raise ValueError(f'class {text!r:.60}; accepted: a whole number')
  return int(text)


def _parts(picture: Any) -> tuple[np.ndarray | None, np.ndarray | None]:
  """Picture and mask of what the inputs give; without paint all is new."""
  if not isinstance(picture, dict):
    return picture, None
  if picture['background'] is None:
    return None, None
  source = np.asarray(picture['background'].convert('RGB'))
  painted = np.zeros(source.shape[:2], bool)
  for layer in picture['layers'] or ():
    painted |= np.asarray(layer.convert('RGBA'))[..., 3] > 127
  return source, painted if painted.any() else None
