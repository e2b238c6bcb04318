"""Task 'scar': one image from a condition image and a text.

In: batches with `target`, `condition`, `text`, `text_mask` or `label`, and
frozen networks: the tokenizer that makes target tokens, the encoder that makes
features, a T5 where the text is not trained here. Out: the joint loss
`CE + w_pres L_pres + w_align L_align` and its metrics (method 1.2, 7).
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from scar_jax import objectives
from scar_jax.config import SCAR_SECTIONS
from scar_jax.data.aspects import bucket_sizes
from scar_jax.data.manifest import job_of
from scar_jax.distributed import on_host
from scar_jax.flops import step_flops
from scar_jax.models.codebook_init import start_from_codebook
from scar_jax.models.conditions import empty_conditions
from scar_jax.models.scar import Scar
from scar_jax.models.stack import layers_apart, layers_stacked
from scar_jax.orders.scale import blank
from scar_jax.parts import (
  EditorConfig,
  Parts,
  TextSetup,
  parts_by_shape,
  sampler_config,
  to_uint8,
)
from scar_jax.sampling import generate
from scar_jax.sampling_steps import (
  check_guidance,
  check_smooth,
  sampling_order,
  split_scales,
)
from scar_jax.train.tasks.scar_model import model_config, needed
from scar_jax.types import Array, Batch, PyTree

SECTIONS = SCAR_SECTIONS
_PICTURES = 8


def make_task(config: Any, artifacts: Mapping[str, Any]) -> 'ScarTask':
  """The task of a checked `Config`.

  Args:
    config: see `scar_jax.config`.
    artifacts: 'tokenizer'; 'encoder' unless the prefix needs none; 'text' for
      a frozen T5.

  Raises:
    ValueError: a frozen network is missing, or sizes do not fit together.
  """
  model, data = model_config(config, artifacts), config.data
  editor = EditorConfig(
    model=model,
    sample=sampler_config(config.sample, config.order.name),
    text=TextSetup(
      kind=config.text.kind,
      length=config.text.length,
      vocab=config.text.vocab,
      pad=config.text.pad,
    ),
    image_size=data.image_size,
    shapes=bucket_sizes(data.aspects, data.image_size, data.aspect_step)
    if data.aspects
    else (),
    tokenizer=config.tokenizer.artifact,
    encoder=config.encoder.artifact,
    text_encoder=config.text.artifact,
    encoder_dtype=config.encoder.dtype,
    text_dtype=config.text.dtype,
    batch=config.sample.batch,
  )
  job = job_of(data)
  used = {
    name: editor.retyped(name, needed(artifacts, name)) for name in editor.needs
  }
  return ScarTask(
    editor,
    used,
    config.loss,
    config.align.stop_target_grad,
    config.model.codebook_init,
    job.made_with if job else (),
  )


def _values(codes: Any) -> np.ndarray:
  """Codes on this host; zeros of their shape where a plan has only that."""
  if isinstance(codes, jax.ShapeDtypeStruct):
    return np.zeros(codes.shape, codes.dtype)
  return on_host(codes)


class ScarTask:
  """Joint training of compressor, text and decoder; see `tasks.Task`."""

  name = 'scar'
  # What SCAR adds to a LlamaGen or a VAR, and the random order to a raster one.
  new = (
    *('prefix/', 'inject/', 'null_prefix', 'query'),
    *('scale/prefix_', 'scale/text_', 'scale/pooled'),
  )

  def __init__(
    self,
    editor: EditorConfig,
    artifacts: Mapping[str, Any],
    loss: Any,
    stop_target_grad: bool = False,
    codebook_init: bool = False,
    stored: Collection[str] = (),
  ):
    """From loaded networks.

    Args:
      editor: what is exported with the parameters.
      artifacts: the frozen networks.
      loss: config section.
      stop_target_grad: see `config.AlignConfig`.
      codebook_init: see `config.ScarModel`.
      stored: networks whose outputs the batches bring: they do not run.
    """
    self.editor = editor
    configs = {name: art.config for name, art in artifacts.items()}
    self._of_shape = parts_by_shape(editor, configs)
    self.parts = self._of_shape[editor.square]
    # The tokenizer stays: it draws pictures, and its codes are inputs.
    self.frozen = {
      name: art.params
      for name, art in artifacts.items()
      if name == 'tokenizer' or name not in stored
    }
    self.stored = stored
    self.model = Scar(editor.model)
    self.tokens = editor.model.make_order().num_targets
    self.weights = loss
    self.stop_target_grad = stop_target_grad
    # On this host: a compiled function may not close over arrays that lie on
    # several hosts.
    self.codes = (
      _values(self.parts.codes(self.frozen)) if codebook_init else None
    )
    # Before training, not at the first picture.
    check_guidance(editor.model, split_scales(editor.sample)[1].guidance_mode)
    check_smooth(editor.model, editor.sample)
    for parts in self._of_shape.values():
      sampling_order(parts.cfg.model, editor.sample)

  def init(self, rng: Array, batch: Batch) -> dict[str, PyTree]:
    """Fresh parameters; only shapes of the batch matter."""
    cfg, count = self.editor.model, next(iter(batch.values())).shape[0]
    cond = empty_conditions(cfg, count)
    tokens = jnp.zeros((count, cfg.make_order().num_targets), jnp.int32)
    params, order = jax.random.split(rng)
    fresh = self.model.init(
      {'params': params, 'order': order},
      tokens,
      cond,
      accumulate=blank(cfg.patch_nums, cfg.latent_dim),
    )
    start = fresh['params']
    if self.codes is not None:
      start = start_from_codebook(start, self.codes, jax.random.fold_in(rng, 1))
    return {**fresh, 'params': self.as_trained(start)}

  def as_trained(self, params: PyTree) -> PyTree:
    """Parameters of an artifact in the layout of this run.

    Those of another kind of model stay as they are, for `start_from` to refuse.
    """
    if self.editor.model.decoder.scan or 'decoder' not in params:
      return params
    return layers_apart(params)

  def networks(self, batch: Batch) -> tuple[Parts, Scar]:
    """The networks for pictures of the shape of a batch.

    Their parameters are those of any shape.
    """
    shape = batch['target'].shape[1:3] if 'target' in batch else ()
    parts = self._of_shape.get(shape)
    if parts is None:
      return self.parts, self.model
    return parts, Scar(parts.cfg.model)

  def loss(
    self,
    params: PyTree,
    extra: PyTree,
    frozen: Mapping[str, PyTree],
    batch: Batch,
    rng: Array,
    train: bool,
  ) -> tuple[Float[Array, ''], tuple[dict[str, Float[Array, '']], PyTree]]:
    """Joint loss of a batch; see `tasks.Task.loss`."""
    parts, model = self.networks(batch)
    cfg, weights = model.cfg, self.weights
    valid = batch.get('valid')
    tokens, seen = self._tokens(frozen, batch, rng, train)
    aligns = bool(weights.align) and cfg.aligns
    cond, target_features = parts.conditions(frozen, batch, aligns)
    streams = ('condition', 'dropout', 'order')
    rngs = dict(zip(streams, jax.random.split(rng, 3), strict=True))
    out = model.apply(
      {'params': params, **extra},
      tokens,
      cond,
      target_features,
      deterministic=not train,
      accumulate=parts.accumulate(frozen),
      seen=seen,
      with_logits=not weights.chunk,
      rngs=rngs,
    )
    if weights.chunk:
      tokenwise = objectives.chunked_token_losses(
        out.predictors,
        params['decoder']['head'],
        out.targets,
        weights.chunk,
        cfg.decoder.head_dtype,
      )
    else:
      tokenwise = objectives.token_losses(out.logits, out.targets)
    loss, metrics = objectives.mean_losses(tokenwise, valid)
    if cfg.order == 'scale':
      last = -(cfg.patch_nums[-1] ** 2)
      tail = jax.tree.map(lambda x: x[:, last:], tokenwise)
      _, tail = objectives.mean_losses(tail, valid)
      metrics |= {f'{k}_last': tail[k] for k in ('ce', 'accuracy')}
    if weights.pres and out.restored is not None:
      pres = objectives.preservation(out.restored, cond.features, valid)
      loss += weights.pres * pres
      metrics['pres'] = pres
    if aligns:
      align, more = objectives.alignment(
        out.hidden_prefix, out.align_target, self.stop_target_grad, valid
      )
      loss += weights.align * align
      metrics |= {'align': align, **more}
    return loss, (metrics, extra)

  def _tokens(
    self, frozen: Mapping[str, PyTree], batch: Batch, rng: Array, train: bool
  ) -> tuple[Array, Array | None]:
    """Tokens to predict, and those of the inputs where they are others."""
    cfg = self.editor.model
    if train and cfg.token_noise and cfg.order == 'scale':
      if 'target' not in batch:
        raise ValueError(
          f'model.token_noise={cfg.token_noise} in the scale order needs '
          'pictures and the batch has none; accepted with data.source=cache: 0 '
          '(set --config.model.token_noise=0)'
        )
      # A stream of its own: the model splits `rng` itself.
      return self.parts.noisy_tokens(
        frozen, batch['target'], jax.random.fold_in(rng, 1)
      )
    return self.known(frozen, batch), None

  def known(self, frozen: Mapping[str, PyTree], batch: Batch) -> Array:
    """Tokens of the targets: stored, or made of the pictures."""
    if 'tokens' in batch:
      return jnp.asarray(batch['tokens'])
    tokens = self.parts.tokens(frozen, batch['target'])
    return tokens.reshape(tokens.shape[0], -1)

  def labels(self, params: PyTree) -> PyTree:
    """'frozen' for null conditions that are constants of the checkpoint."""
    cfg = self.editor.model
    fixed = set()
    if cfg.text.null == 'fixed':
      fixed.add('null_text')
    if cfg.prefix.null == 'fixed':
      fixed.add('null_prefix')

    def label(path, _):
      return 'frozen' if str(path[-1].key) in fixed else 'main'

    return jax.tree_util.tree_map_with_path(label, params)

  def flops(self, batch: int) -> dict[str, float]:
    """FLOPs of a step of `batch` square images, by part; see `flops.py`.

    Other shapes have at most as many tokens.
    """
    return step_flops(
      self.editor.model,
      batch,
      {k: v for k, v in self.parts.configs.items() if k not in self.stored},
      self.editor.image_size,
      align=bool(self.weights.align),
      preserve=bool(self.weights.pres),
      stop_target_grad=self.stop_target_grad,
    )

  def artifact(
    self, params: PyTree, extra: PyTree
  ) -> tuple[str, EditorConfig, PyTree]:
    """What `Editor.load` reads."""
    return 'scar', self.editor, layers_stacked(params)

  def pictures(
    self,
    params: PyTree,
    extra: PyTree,
    frozen: Mapping[str, PyTree],
    batch: Batch,
    rng: Array,
  ) -> dict[str, Array]:
    """Condition, truth, the tokenizer's truth, and samples, uint8.

    Pure, so that the trainer may compile it. Undrawable logits are not an
    error here: a picture of a broken model still shows that it is broken.
    """
    batch = {k: v[:_PICTURES] for k, v in batch.items()}
    parts, model = self.networks(batch)
    cond, _ = parts.conditions(frozen, batch)
    known = self.known(frozen, batch)
    count = known.shape[0]
    scales, settings = split_scales(self.editor.sample)
    made = generate(
      model,
      {'params': layers_stacked(params)},
      cond,
      jax.random.bits(rng, (count,), jnp.uint32),
      scales,
      settings,
      accumulate=parts.accumulate(frozen),
    )
    out = {k: batch[k] for k in ('condition', 'target') if k in batch}
    out |= {
      'tokenizer': parts.images(frozen, known),
      'sampled': parts.images(frozen, made.tokens, made.latent),
    }
    return {k: to_uint8(v) for k, v in out.items()}
