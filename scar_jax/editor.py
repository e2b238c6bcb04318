"""`Editor`: from a trained model's directory to pictures on request.

In: a work directory or artifact of task 'scar'; any pictures and prompts. Out:
PIL images of the same sizes. Requests are padded to one batch size, so that a
process compiles once. The only public class; the commands `edit` and `sample`,
the scores and the demo go through it.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from PIL import Image

from scar_jax.artifacts import load_artifact
from scar_jax.data.geometry import letterbox_box
from scar_jax.data.masks import composite, decode_mask, known_cells
from scar_jax.data.text import make_text
from scar_jax.data.transforms import (
  ImageLike,
  decode,
  letterbox,
  to_float,
  to_uint8,
  unletterbox,
)
from scar_jax.filters import SamplerConfig
from scar_jax.orders.random import Known, given_tokens
from scar_jax.parts import EditorConfig, Parts
from scar_jax.sampling import Sampler, make_sampler
from scar_jax.sampling_steps import sampling_order
from scar_jax.types import Batch, PyTree

_SINGLE = (str, bytes, os.PathLike, Image.Image, np.ndarray)


def find_part(given: str, home: str | os.PathLike[str]) -> str:
  """The directory of a frozen network that a run has used.

  A moved run is still found: the path is tried as it was given, then inside
  and beside the model's own work directory.

  Args:
    given: path recorded in training, relative or absolute.
    home: directory of the model's artifact.

  Raises:
    ValueError: it is in none of these places.
  """
  home, wanted = pathlib.Path(home).absolute(), pathlib.Path(given)
  work = home.parent if home.name == 'artifact' else home
  places = [wanted, home / wanted, work / wanted, work.parent / wanted]
  # runs/q/tokenizer/artifact, asked for from a copy of runs/q/scar.
  for tail in (wanted.name, os.path.join(*wanted.parts[-2:])):
    places += [work / tail, work.parent / tail]
  for place in places:
    if place.is_dir():
      return str(place)
  raise ValueError(
    f'frozen network {given!r} not found; tried '
    f'{", ".join(dict.fromkeys(map(str, places)))}; accepted: its artifact '
    'directory (pass it to Editor.load as tokenizer=, encoder= or text=)'
  )


class Editor:
  """Edits or generates pictures with one trained model.

  Attributes:
    cfg: the model and its defaults.
  """

  def __init__(
    self,
    cfg: EditorConfig,
    params: PyTree,
    configs: Mapping[str, Any],
    frozen: Mapping[str, PyTree],
  ):
    """From loaded pieces; `Editor.load` reads them from disk.

    Args:
      cfg: of the model.
      params: of the model.
      configs: configs of 'tokenizer', 'encoder' and 'text', as far as used.
      frozen: their parameters.
    """
    self.cfg = cfg
    self._params = {'params': params}
    self._frozen = dict(frozen)
    self._parts = Parts(cfg, configs)
    self._conditions = jax.jit(
      lambda frozen, batch: self._parts.conditions(frozen, batch)[0]
    )
    self._images = jax.jit(self._parts.images)
    self._tokens = jax.jit(self._parts.tokens)
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
  ) -> 'Editor':
    """Reads a model and the frozen networks it was trained with.

    Args:
      path: work directory of a run of task 'scar', or its artifact.
      tokenizer: directory to use in place of the recorded one.
      encoder: the same for the semantic encoder.
      text: the same for a frozen T5.
      batch: pictures made together; the run's own number by default.

    Raises:
      ValueError: a directory is missing or holds something else.
    """
    model = load_artifact(path, kind='scar')
    cfg: EditorConfig = model.config
    if batch is not None:
      cfg = dataclasses.replace(cfg, batch=batch)
    configs, frozen = {}, {}
    recorded = {
      'tokenizer': (tokenizer, cfg.tokenizer),
      'encoder': (encoder, cfg.encoder),
      'text': (text, cfg.text_encoder),
    }
    for name in cfg.needs:
      chosen, known = recorded[name]
      part = load_artifact(chosen or find_part(known, model.path), kind=name)
      part = cfg.retyped(name, part)
      configs[name], frozen[name] = part.config, part.params
    return cls(cfg, model.params, configs, frozen)

  def __call__(
    self,
    images: ImageLike | Sequence[ImageLike] | None = None,
    prompts: str | Sequence[str | None] | None = None,
    *,
    labels: int | Sequence[int] | None = None,
    masks: ImageLike | Sequence[ImageLike] | None = None,
    guidance: float | None = None,
    guidance_image: float | None = None,
    seed: int | Sequence[int] = 0,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    smooth: bool | None = None,
    ramp: str | None = None,
    num_sets: int | None = None,
    schedule: str | None = None,
    schedule_noise: float | None = None,
  ) -> list[Image.Image]:
    """Makes one picture for each request.

    Args:
      images: condition pictures of any size and mode; the result has the same
        size. None for a model without a prefix.
      prompts: one for each picture, or one for all; '' or None is the null
        text. None for a model without text.
      labels: class ids, one for each picture or one for all, of a model with
        classes; a number alone is that class.
      masks: for inpainting with the random order, one for each picture or one
        for all, of its size: white is drawn anew, black is kept exactly.
      guidance: strength on text; 1 is off.
      guidance_image: strength on the condition image; 1 is off.
      seed: picture i gets `seed + i`; a sequence gives every picture its own,
        and then neither its place nor its company changes the result.
      temperature: see `filters.SamplerConfig`, as all that follow.
      top_k: see there.
      top_p: see there.
      ramp: see there.
      num_sets: see there.
      schedule: see there.
      schedule_noise: see there.
      smooth: see there.

    Raises:
      ValueError: unreadable picture, mask or prompt, lists of different
        lengths, a setting out of range.
    """
    pictures = _listed(images, _SINGLE)
    texts = _listed(prompts, (str,))
    numbers = _listed(labels, (int, np.integer))
    count = max(len(pictures), len(texts), len(numbers))
    pictures = self._spread('images', pictures, count)
    texts = self._spread('prompts', texts, count)
    classes = self._spread('labels', numbers, count)
    self._check_labels(classes)
    seeds = _seeds(seed, count)
    run, cfg = self._sampler(
      guidance=guidance,
      guidance_image=guidance_image,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      smooth=smooth,
      ramp=ramp,
      num_sets=num_sets,
      schedule=schedule,
      schedule_noise=schedule_noise,
    )
    sampling_order(self.cfg.model, cfg, None if masks is None else 0)
    cuts = None
    if masks is not None:
      listed = self._spread('masks', _listed(masks, _SINGLE), count)
      pictures, cuts = self._cuts(pictures, listed)
    made: dict[int, Image.Image] = {}
    for rows, given in _batches(cuts or [_WHOLE] * count, self.cfg.batch):
      batch, boxes = self._batch(rows, pictures, texts, classes)
      padded = _pad(rows, self.cfg.batch)
      known = None
      if cuts:
        keep = np.stack([cuts[i].keep for i in padded])
        tokens = self._tokens(self._frozen, batch['condition'])
        known = Known(tokens.reshape(keep.shape), jnp.asarray(keep), given)
      out = run.run(
        self._params,
        self._conditions(self._frozen, batch),
        jnp.asarray([seeds[i] for i in padded], jnp.uint32),
        cfg.guidance,
        cfg.guidance_image,
        accumulate=self._parts.accumulate(self._frozen),
        known=known,
      )
      images = to_uint8(self._images(self._frozen, out.tokens, out.latent))
      for i, box, image in zip(rows, boxes, images, strict=False):
        image = image if box is None else unletterbox(image, box)
        if cuts:
          image = composite(image, pictures[i], cuts[i].mask)
        made[i] = Image.fromarray(image)
    return [made[i] for i in range(count)]

  def inputs(
    self, image: ImageLike, prompt: str = '', label: int | None = None
  ) -> Batch:
    """What the model sees of one request: one row of a training batch.

    Raises:
      ValueError: see a call.
    """
    classes = self._spread('labels', [] if label is None else [label], 1)
    self._check_labels(classes)
    batch, _ = self._batch([0], [image], [prompt], classes)
    return {name: rows[:1] for name, rows in batch.items()}

  @property
  def networks(self) -> tuple[Parts, PyTree, Mapping[str, PyTree]]:
    """The frozen networks, the model's variables, and their parameters."""
    return self._parts, self._params, self._frozen

  def _sampler(self, **given: Any) -> tuple[Sampler, SamplerConfig]:
    cfg = dataclasses.replace(
      self.cfg.sample, **{k: v for k, v in given.items() if v is not None}
    )
    if cfg.guidance_image != 1 and cfg.guidance_mode == 'text':
      cfg = dataclasses.replace(cfg, guidance_mode='image_text')
    # Strengths are arguments of the compiled sampler, not part of its key.
    key = dataclasses.replace(cfg, guidance=1.0, guidance_image=1.0)
    return make_sampler(self.cfg.model, key), cfg

  def _cuts(self, pictures: list, masks: list) -> tuple[list, list['_Cut']]:
    """Decoded pictures, and what to keep of each."""
    if not pictures:
      raise ValueError('masks without images; accepted: one image for each')
    arrays = [decode(p, _name(p, i)) for i, p in enumerate(pictures)]
    grid, cuts = self.cfg.model.grid, []
    for i, (array, mask) in enumerate(zip(arrays, masks, strict=True)):
      new = decode_mask(mask, array.shape[:2], _name(mask, i, 'mask'))
      box = letterbox_box(array.shape[:2], self.cfg.image_size)
      cuts.append(_Cut(new, known_cells(new, box, grid).reshape(-1)))
    return arrays, cuts

  def _batch(self, rows, pictures, texts, classes):
    """Arrays of one padded batch, and the box of every picture."""
    batch, boxes = {}, [None] * len(rows)
    padded = _pad(range(len(rows)), self.cfg.batch)
    size = self.cfg.image_size
    if pictures:
      fitted = [
        letterbox(decode(pictures[i], _name(pictures[i], i)), size)
        for i in rows
      ]
      boxes = [box for _, box in fitted]
      batch['condition'] = np.stack([to_float(fitted[i][0]) for i in padded])
    if self._text is not None:
      pairs = [self._text.encode(texts[i], f'prompt {i}') for i in rows]
      batch['text'] = np.stack([pairs[i][0] for i in padded])
      batch['text_mask'] = np.stack([pairs[i][1] for i in padded])
    if classes:
      numbers = [classes[i] for i in rows]
      batch['label'] = np.asarray([numbers[i] for i in padded], np.int32)
    return jax.tree.map(jnp.asarray, batch), boxes

  def _check_labels(self, classes: Sequence[Any]) -> None:
    most = self.cfg.model.text.classes
    for i, label in enumerate(classes):
      whole = isinstance(label, int | np.integer) and label is not True
      if not whole or not 0 <= label < most:
        raise ValueError(
          f'label {i} is {label!r}; accepted: whole numbers from 0 to '
          f'{most - 1}, the classes of the model'
        )

  def _spread(self, name: str, values: list, count: int) -> list:
    """One value for each request; none where the model takes none."""
    model = self.cfg.model
    wanted = {
      'images': model.prefix.compress != 'off',
      'prompts': self._text is not None,
      'labels': model.text.kind == 'label',
      'masks': True,
    }[name]
    if not wanted and (name != 'images' or not values):
      return []  # without a prefix, a picture still gives the size
    if len(values) == 1:
      return values * count
    if name == 'prompts' and not values:
      return [''] * count
    if len(values) != count or not count:
      raise ValueError(
        f'{len(values)} {name} for {count} requests; accepted: 1 or '
        f'{count or "more"} (give every request its own, or one for all)'
      )
    return values


def _listed(values: Any, single: tuple[type, ...]) -> list:
  if values is None:
    return []
  return [values] if isinstance(values, single) else list(values)


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
  if isinstance(seed, int | np.integer):
    return [(int(seed) + i) % 2**32 for i in range(count)]
  seeds = [int(s) % 2**32 for s in seed]
  if len(seeds) != count:
    raise ValueError(
      f'{len(seeds)} seeds for {count} requests; accepted: one number, or '
      f'{count} (argument seed)'
    )
  return seeds


class _Cut(NamedTuple):
  """What a mask says: pixels drawn anew, tokens kept."""

  mask: Bool[np.ndarray, 'H W']
  keep: Bool[np.ndarray, ' N']


_WHOLE = _Cut(np.ones((1, 1), bool), np.zeros(1, bool))


def _batches(cuts: list[_Cut], size: int) -> list[tuple[list[int], int]]:
  """Rows made together, and how many known tokens they start with.

  Requests share a batch only if they start alike: so none depends on another.
  """
  groups: dict[int, list[int]] = {}
  for i, cut in enumerate(cuts):
    given = given_tokens(int(cut.keep.sum()), len(cut.keep))
    groups.setdefault(given, []).append(i)
  return [
    (rows[start : start + size], given)
    for given, rows in groups.items()
    for start in range(0, len(rows), size)
  ]


def _name(picture: Any, i: int, kind: str = 'image') -> str:
  """How an error names picture i of a request: its path, if it has one."""
  named = isinstance(picture, str | os.PathLike)
  return os.fspath(picture) if named else f'{kind} {i}'


def _pad(rows: Sequence[int], size: int) -> list[int]:
  """The rows, the last one repeated up to `size`."""
  return [rows[min(i, len(rows) - 1)] for i in range(size)]
