"""`Editor`: from a trained model's directory to pictures on request.

In: a work directory or artifact of task 'scar'; any pictures and prompts. Out:
pictures of the same sizes, at once or as they grow; drawn in the nearest of the
shapes that the model was trained in. Requests are padded to few
batch sizes, so that a process compiles few programs. The only public class; the
commands `edit` and `sample`, the scores and the demo go through it.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from scar_jax import compiler, editor_inputs, precision
from scar_jax.artifacts import find_part, load_artifact
from scar_jax.data.text import make_text
from scar_jax.data.transforms import ImageLike
from scar_jax.editor_inputs import arrays, pad
from scar_jax.editor_outputs import (
  Growth,
  as_output,
  check_call,
  covered,
  framed,
)
from scar_jax.filters import SamplerConfig, check_drawable
from scar_jax.models.encoders.semantic import encoder_params
from scar_jax.orders.random import Known
from scar_jax.parts import EditorConfig, Parts, parts_by_shape, to_uint8
from scar_jax.programs import Programs
from scar_jax.sampling import make_sampler
from scar_jax.sampling_steps import (
  check_guidance,
  check_smooth,
  sampling_order,
  split_scales,
)
from scar_jax.sharding import batch_sharding, batch_ways, replicated
from scar_jax.types import Batch, PyTree


class Editor:
  """Edits or generates pictures with one trained model.

  Attributes:
    cfg: the model and its defaults.
    fingerprint: of the model's artifact; '' if it was made from pieces.
    programs: what was compiled.
  """

  def __init__(
    self,
    cfg: EditorConfig,
    params: PyTree,
    configs: Mapping[str, Any],
    frozen: Mapping[str, PyTree],
    *,
    mesh: Mesh | None = None,
    cache: str | os.PathLike[str] | None = None,
    buckets: Sequence[int] | None = None,
    fingerprint: str = '',
  ):
    """From loaded pieces; `Editor.load` reads them from disk.

    Args:
      cfg: of the model.
      params: of the model.
      configs: configs of 'tokenizer', 'encoder' and 'text', as far as used.
      frozen: their parameters.
      mesh: see `load`.
      cache: see `load`.
      buckets: see `load`.
      fingerprint: of the model's artifact.
    """
    self.cfg, self.fingerprint = cfg, fingerprint
    self._params, self._frozen = params, dict(frozen)
    self._parts = parts_by_shape(cfg, configs)
    self._mesh = mesh
    ways = 1 if mesh is None else batch_ways(mesh)
    sizes = buckets or editor_inputs.buckets(cfg.batch, ways)
    wrong = [n for n in sizes if n < 1 or n % ways]
    if wrong:
      raise ValueError(
        f'buckets={tuple(sizes)}; accepted: multiples of {ways}, over which '
        'the mesh splits a batch'
      )
    self.buckets = tuple(sorted(sizes))
    # What is exported for a mesh fits that mesh alone.
    self.programs = Programs(None if mesh else cache)
    self._conditions = jax.jit(
      lambda parts, *args: parts.conditions(*args)[0], static_argnums=0
    )
    options = compiler.options()
    self._decode = jax.jit(
      lambda parts, *args: to_uint8(parts.images(*args)),
      static_argnums=0,
      compiler_options=options,
    )
    self._tokens = jax.jit(
      Parts.tokens, static_argnums=0, compiler_options=options
    )
    kind = cfg.model.text.kind
    self._text = make_text(cfg.text) if kind in ('byte', 't5') else None

  @classmethod
  def load(
    cls,
    path: str | os.PathLike[str],
    tokenizer: str | None = None,
    encoder: str | None = None,
    text: str | None = None,
    batch: int | None = None,
    *,
    dtype: str | None = None,
    weights: str = '',
    mesh: Mesh | None = None,
    cache: str | os.PathLike[str] | None = None,
    buckets: Sequence[int] | None = None,
  ) -> 'Editor':
    """Reads a model and the frozen networks it was trained with.

    Args:
      path: work directory of a run of task 'scar', or its artifact.
      tokenizer: directory to use in place of the recorded one.
      encoder: the same for the semantic encoder.
      text: the same for a frozen T5.
      batch: most pictures made together; the run's own number by default.
      dtype: of matrix products and cache: 'float32', 'bfloat16', or '' as in
        training; bfloat16 on accelerators and '' on CPUs by default.
      weights: 'int8' keeps the model's kernels in 8 bits; CPUs then round
        what they multiply with them to 8 bits too.
      mesh: devices that share a batch; large parameters are split over it.
      cache: folder for traced programs, so that the next process starts
        without tracing; not with a mesh.
      buckets: batch sizes that are compiled; a request takes the smallest that
        holds it. Doublings up to `batch` by default; the last bits of a result
        may depend on its bucket.

    Raises:
      ValueError: a directory is missing or holds something else, or a name is
        not accepted.
    """
    dtype = precision.default_dtype() if dtype is None else dtype
    precision.check(dtype, weights)
    model = load_artifact(path, kind='scar', mesh=mesh)
    cfg: EditorConfig = model.config
    if batch is not None:
      cfg = dataclasses.replace(cfg, batch=batch)
    cfg = precision.with_dtype(cfg, dtype)
    configs, frozen = {}, {}
    recorded = {
      'tokenizer': (tokenizer, cfg.tokenizer),
      'encoder': (encoder, cfg.encoder),
      'text': (text, cfg.text_encoder),
    }
    for name in cfg.needs:
      chosen, known = recorded[name]
      place = chosen or find_part(known, model.path)
      part = cfg.retyped(name, load_artifact(place, kind=name, mesh=mesh))
      configs[name], frozen[name] = part.config, part.params
      if name == 'encoder':
        frozen[name] = encoder_params(part.params)
    params = precision.for_sampling(cfg.model, model.params, weights)
    return cls(
      cfg,
      params,
      configs,
      frozen,
      mesh=mesh,
      cache=cache,
      buckets=buckets,
      fingerprint=model.fingerprint,
    )

  def __call__(
    self,
    images: ImageLike | Sequence[ImageLike] | None = None,
    prompts: str | Sequence[str | None] | None = None,
    *,
    labels: int | Sequence[int] | None = None,
    masks: ImageLike | Sequence[ImageLike] | None = None,
    control: str | None = None,
    control_weights: str | None = None,
    num_images: int = 1,
    seed: int | Sequence[int] = 0,
    output: str = 'pil',
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
  ) -> list[Any]:
    """Makes one picture, or `num_images`, for each request.

    Args:
      images: condition pictures of any size and mode; the result has the same
        size. None for a model without a prefix.
      prompts: one for each picture, or one for all; '' or None is the null
        text. None for a model without text.
      labels: class ids, one for each picture or one for all, of a model with
        classes; a number alone is that class.
      masks: for inpainting with the random order, one for each picture or one
        for all, of its size: white is drawn anew, black is kept exactly.
      control: `images` are photos, of which this map is made first, a value of
        `data.controls.FROM_PHOTO`; None takes them as they are.
      control_weights: of the network that draws it.
      num_images: pictures for each request, with seeds of their own; they come
        next to each other.
      seed: picture i of the result gets `seed + i`; a sequence gives every
        picture its own, and then neither its place nor its company changes the
        result.
      output: 'pil', or 'array' for uint8 [H, W, 3].
      progress: called with pictures made and pictures in all.
      **settings: fields of `filters.SamplerConfig` in place of the model's own:
        guidance, guidance_image (strengths on text and condition image; 1 is
        off), temperature, top_k, top_p, smooth, mean_code, ramp, num_sets,
        schedule, schedule_noise.

    Raises:
      ValueError: unreadable picture, mask or prompt, lists of different
        lengths, a setting out of range.
    """
    check_call(output, num_images)
    cfg = self._settings(settings, masks is not None)
    scales, static = split_scales(cfg)
    requests = editor_inputs.read(
      self.cfg, images, prompts, labels, masks, control, control_weights
    )
    total = requests.count * num_images
    seeds = editor_inputs.read_seeds(seed, total)
    most = self.buckets[-1]
    copies = min(num_images, most)
    made: dict[int, np.ndarray] = {}
    for rows, given in editor_inputs.batches(requests, most // copies):
      size = next(n for n in self.buckets if n >= len(rows))
      batch, sources = arrays(requests, rows, size, self._text)
      parts = self._parts[requests.shapes[rows[0]]]
      padded = pad(rows, size)
      for first in range(0, num_images, copies):
        # Of the last round some copies may be more than was asked for.
        turn = [min(first + c, num_images - 1) for c in range(copies)]
        some = [seeds[i * num_images + c] for i in padded for c in turn]
        out, bad = self._run(parts, batch, some, scales, static, copies, given)
        check_drawable(bad[: len(rows) * copies])
        for at, i in enumerate(rows):
          for c, number in enumerate(turn):
            made[i * num_images + number] = framed(
              out[at * copies + c], sources[at], *requests.frame(i)
            )
        if progress is not None:
          progress(len(made), total)
    return [as_output(output, made[i]) for i in range(total)]

  def stream(
    self,
    images: ImageLike | Sequence[ImageLike] | None = None,
    prompts: str | Sequence[str | None] | None = None,
    *,
    labels: int | Sequence[int] | None = None,
    masks: ImageLike | Sequence[ImageLike] | None = None,
    control: str | None = None,
    control_weights: str | None = None,
    seed: int | Sequence[int] = 0,
    output: str = 'pil',
    **settings: Any,
  ) -> Iterator[Growth]:
    """The same pictures as they grow: after each row, scale or set.

    What is not drawn yet shows the condition picture. The last `Growth` holds
    what a call returns. Arguments are those of a call.

    Raises:
      ValueError: see there; or more requests than one batch.
    """
    check_call(output, 1)
    cfg = self._settings(settings, masks is not None)
    requests = editor_inputs.read(
      self.cfg, images, prompts, labels, masks, control, control_weights
    )
    seeds = editor_inputs.read_seeds(seed, requests.count)
    groups = editor_inputs.batches(requests, self.buckets[-1])
    if len(groups) > 1:
      raise ValueError(
        f'{requests.count} requests to stream; accepted: what one batch of '
        f'{self.buckets[-1]} holds, of one shape, with masks of like size'
      )
    [(rows, given)] = groups
    size = next(n for n in self.buckets if n >= len(rows))
    batch, sources = arrays(requests, rows, size, self._text)
    parts = self._parts[requests.shapes[rows[0]]]
    padded = pad(rows, size)
    known = None
    if 'keep' in batch:
      tokens = self._tokens(parts, self._frozen, batch['condition'])
      keep = batch.pop('keep')
      known = Known(tokens.reshape(keep.shape), keep, given)
    # Strengths are arguments of the compiled sampler, not part of its key.
    key = dataclasses.replace(
      split_scales(cfg)[1], guidance_mode=cfg.guidance_mode
    )
    grid, below = parts.cfg.model.grid, batch.get('condition')
    for out in make_sampler(parts.cfg.model, key).stream(
      {'params': self._params},
      self._conditions(parts, self._frozen, batch),
      jnp.asarray([seeds[i] for i in padded], jnp.uint32),
      cfg.guidance,
      cfg.guidance_image,
      parts.accumulate(self._frozen),
      known,
      cfg.temperature,
    ):
      seen = np.asarray(
        self._decode(parts, self._frozen, out.tokens, out.latent)
      )
      assert out.done is not None
      done = np.asarray(out.done)
      scales = parts.cfg.model.order == 'scale'
      if not scales:
        seen = covered(seen, done.reshape(-1, *grid), below)
      yield Growth(
        int(done[0].sum()),
        done.shape[1] if scales else grid[0] * grid[1],
        [
          as_output(output, framed(seen[at], sources[at], *requests.frame(i)))
          for at, i in enumerate(rows)
        ],
      )

  @property
  def networks(self) -> tuple[Parts, PyTree, Mapping[str, PyTree]]:
    """The frozen networks, the model's variables, and their parameters.

    They are those for square pictures, as `inputs` makes them.
    """
    square = self._parts[self.cfg.square]
    return square, {'params': self._params}, self._frozen

  def inputs(
    self, image: ImageLike, prompt: str = '', label: int | None = None
  ) -> Batch:
    """What the model sees of one request: one row of a training batch."""
    text = None if self._text is None else prompt
    square = dataclasses.replace(self.cfg, shapes=())
    requests = editor_inputs.read(square, image, text, label, None)
    return arrays(requests, [0], 1, self._text)[0]

  def _settings(self, given: Mapping[str, Any], masked: bool) -> SamplerConfig:
    known = {f.name for f in dataclasses.fields(SamplerConfig)}
    wrong = sorted(set(given) - known)
    if wrong:
      raise ValueError(
        f'{", ".join(wrong)}: no setting of the sampler; accepted: '
        f'{", ".join(sorted(known))}'
      )
    cfg = dataclasses.replace(
      self.cfg.sample, **{k: v for k, v in given.items() if v is not None}
    )
    if cfg.guidance_image != 1 and cfg.guidance_mode == 'text':
      cfg = dataclasses.replace(cfg, guidance_mode='image_text')
    check_guidance(self.cfg.model, split_scales(cfg)[1].guidance_mode)
    check_smooth(self.cfg.model, cfg)
    sampling_order(self.cfg.model, cfg, 0 if masked else None)
    return cfg

  def _run(self, parts, batch, seeds, scales, static, copies, given):
    seeds = np.asarray(seeds, np.uint32)
    args = parts, self._params, self._frozen
    if self._mesh is None:
      out, bad = self.programs(
        *args, batch, seeds, scales, static, copies, given
      )
      return np.asarray(out), bad
    rows = batch_sharding(self._mesh)
    with jax.set_mesh(self._mesh):
      out, bad = self.programs(
        *args,
        jax.device_put(batch, rows),
        jax.device_put(seeds, rows),
        jax.device_put(scales, replicated(self._mesh)),
        static,
        copies,
        given,
      )
    return np.asarray(out), bad
