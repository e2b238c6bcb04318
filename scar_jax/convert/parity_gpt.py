"""LlamaGen GPT, EditAR and SCAR against their fixtures.

In: a `Fixture` of `gpt_c2i`, `gpt_t2i`, `gpt_edit`, `scar_prefill` or
`scar_prefill_1th`. Out: teacher-forced logits, losses, hidden states and
gradients, then greedy tokens and logits through the cache, beside the
reference's. Used by `selftest.py`.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax import objectives
from scar_jax.convert import dinov2, editar, gpt_sizes, scar_official
from scar_jax.convert.common import disassemble
from scar_jax.convert.parity_vq import nhwc
from scar_jax.convert.selftest import Check, Fixture, gradient
from scar_jax.filters import SamplerConfig
from scar_jax.models import prefill
from scar_jax.models.conditions import Conditions
from scar_jax.models.encoders import semantic
from scar_jax.models.scar import Scar
from scar_jax.models.scar_config import ScarConfig
from scar_jax.sampling import Sampler
from scar_jax.types import PyTree

_LOGITS = 2e-4  # absolute, of the fixtures' README for the SCAR model
_KINDS = {
  'gpt_c2i': 'llamagen',
  'gpt_t2i': 'llamagen',
  'gpt_edit': 'editar',
  'scar_prefill': 'scar',
  'scar_prefill_1th': 'scar',
}
# Greedy runs: what changes in the text part, sampler settings, suffix.
_RUNS: dict[str, list[tuple[dict[str, Any], dict[str, Any], str]]] = {
  'gpt_c2i': [
    ({}, {'guidance': 2.0}, ''),
    ({}, {'guidance': 1.0}, '_cfg1'),
    ({}, {'guidance': 2.0, 'cfg_interval': 3}, '_interval3'),
  ],
  'gpt_t2i': [
    ({}, {'guidance': 2.0}, ''),
    ({}, {'guidance': 1.0}, '_cfg1'),
    ({'mask_pad': False}, {'guidance': 2.0}, '_nomask'),
  ],
  'gpt_edit': [
    ({}, {'guidance': 3.0}, ''),
    ({}, {'guidance': 1.0}, '_cfg1'),
  ],
  'scar_prefill': [({}, {'guidance': 3.0}, '')],
  'scar_prefill_1th': [({}, {'guidance': 3.0}, '')],
}
# Losses of the SCAR model other than the cross entropy, as it was trained.
_PRESERVATION, _ALIGNMENT = 0.1, 0.2


def outputs(fixture: Fixture) -> Iterator[Check]:
  """Every output of a fixture that the model has."""
  cfg, params = _model(fixture)
  yield from _forced(fixture, cfg, params)
  yield from {
    'gpt_c2i': _null_class,
    'gpt_t2i': _captions,
    'gpt_edit': _joint,
  }.get(fixture.name, _prefill)(fixture, cfg, params)
  if fixture.name != 'gpt_edit':  # whose loss has a term that ours lacks
    yield from _gradients(fixture, cfg, params)
  for changes, settings, suffix in _RUNS[fixture.name]:
    yield from _greedy(fixture, _text(cfg, **changes), params, settings, suffix)
  if fixture.name == 'gpt_edit':
    yield from _guided(fixture, cfg, params)


def _model(fixture: Fixture) -> tuple[ScarConfig, PyTree]:
  kind, heads = _KINDS[fixture.name], fixture.meta['n_head']
  side = int(_ids(fixture).shape[1] ** 0.5)
  cfg = gpt_sizes.detect_editor(
    fixture.tensors, kind, heads=heads, image_size=16 * side
  ).model
  if kind != 'scar':
    return cfg, editar.convert(cfg, fixture.tensors)
  # The encoder's grid is no part of the weights.
  grid = fixture.arrays['feat_source'].shape[2:]
  prefix = dataclasses.replace(cfg.prefix, grid=grid)
  cfg = dataclasses.replace(cfg, prefix=prefix)
  return cfg, scar_official.convert(cfg, fixture.tensors)


def _text(cfg: ScarConfig, **changes: Any) -> ScarConfig:
  text = dataclasses.replace(cfg.text, **changes)
  return dataclasses.replace(cfg, text=text)


@functools.lru_cache(maxsize=8)
def _apply(cfg: ScarConfig) -> Any:
  apply = functools.partial(Scar(cfg).apply, mutable=['intermediates'])
  return jax.jit(apply)


def _ids(fixture: Fixture) -> np.ndarray:
  a = fixture.arrays
  return a['target_ids' if fixture.name == 'gpt_edit' else 'ids']


_given: Any = Conditions  # its constructor is made at run time


def _conditions(fixture: Fixture) -> Any:
  a = fixture.arrays
  if fixture.name == 'gpt_c2i':
    return _given(label=jnp.asarray(a['labels']))
  if fixture.name == 'gpt_t2i':
    mask = jnp.asarray(a['emb_masks'] > 0)
    return _given(text=jnp.asarray(a['caption']), text_mask=mask)
  if fixture.name == 'gpt_edit':
    return _edits(a['text'], a['source_ids'])
  return _edits(a['text']).replace(features=jnp.asarray(nhwc(a['feat_source'])))


def _edits(text: np.ndarray, source: np.ndarray | None = None) -> Any:
  mask = jnp.ones(text.shape[:2], bool)
  cond = _given(text=jnp.asarray(text), text_mask=mask)
  if source is None:
    return cond
  side = int(source.shape[1] ** 0.5)
  return cond.replace(source_tokens=source.reshape(-1, side, side))


def _run(
  fixture: Fixture, cfg: ScarConfig, params: PyTree, cond: Any = None
) -> Any:
  return _traced(fixture, cfg, params, cond)[0]


def _traced(
  fixture: Fixture, cfg: ScarConfig, params: PyTree, cond: Any = None
) -> Any:
  """The model's output, and what its layers gave."""
  target = None
  if 'feat_target' in fixture.arrays:
    target = nhwc(fixture.arrays['feat_target'])
  cond = _conditions(fixture) if cond is None else cond
  return _apply(cfg)({'params': params}, _ids(fixture), cond, target)


def _loss(name: str, out: Any, want: Any, valid: Any = None) -> Check:
  loss, _ = objectives.cross_entropy(out.logits, out.targets, valid)
  return Check(name, loss, want, atol=0.0)


def _forced(
  fixture: Fixture, cfg: ScarConfig, params: PyTree
) -> Iterator[Check]:
  a, scar = fixture.arrays, _KINDS[fixture.name] == 'scar'
  out, state = _traced(fixture, cfg, params)
  atol = _LOGITS if scar else 1e-4
  yield Check('logits', out.logits, a['logits'], atol=atol)
  yield _loss('loss', out, a['loss_ce' if scar else 'loss'])
  if 'valid' in a:
    valid = jnp.asarray(a['valid'] > 0)
    yield _loss('loss_valid', out, a['loss_valid'], valid)
  for name in ('hidden', 'hidden_normed'):
    if name in a:
      yield Check(name, out.hidden, a[name])
  blocks = state['intermediates']['decoder']['layers']['block'][0]
  for i, block in enumerate(blocks):
    if f'hidden_layer{i}' in a:
      yield Check(f'hidden_layer{i}', block, a[f'hidden_layer{i}'])


def _null_class(
  fixture: Fixture, cfg: ScarConfig, params: PyTree
) -> Iterator[Check]:
  a = fixture.arrays
  cond = _conditions(fixture).replace(null_text=jnp.ones(2, bool))
  out = _run(fixture, cfg, params, cond)
  yield Check('logits_null', out.logits, a['logits_null'])
  by_id = _given(label=jnp.asarray(a['labels_null']))
  out = _run(fixture, cfg, params, by_id)
  yield Check('logits_null by its id', out.logits, a['logits_null'])


def _captions(
  fixture: Fixture, cfg: ScarConfig, params: PyTree
) -> Iterator[Check]:
  a, cond = fixture.arrays, _conditions(fixture)
  null = jnp.asarray(a['force_drop_ids'] > 0)
  bound = Scar(cfg).bind({'params': params})
  x, _ = bound.text.text(cond.text, cond.text_mask, null)
  yield Check('caption_embed_drop', x, a['caption_embed_drop'])
  out = _run(fixture, _text(cfg, mask_pad=False), params)
  yield Check('logits_nomask', out.logits, a['logits_nomask'])
  yield _loss('loss_nomask', out, a['loss_nomask'])


def _joint(
  fixture: Fixture, cfg: ScarConfig, params: PyTree
) -> Iterator[Check]:
  a = fixture.arrays
  cond = _edits(a['joint_text'], a['joint_source_ids'])
  draws = jnp.asarray(a['joint_draws'])
  out, _ = _apply(cfg)(
    {'params': params}, a['joint_target_ids'], cond, draws=draws
  )
  yield Check('joint_logits', out.logits, a['joint_logits'])
  yield _loss('joint_loss', out, a['joint_loss'])


def _prefill(
  fixture: Fixture, cfg: ScarConfig, params: PyTree
) -> Iterator[Check]:
  a, cond = fixture.arrays, _conditions(fixture)
  out = _run(fixture, cfg, params)
  length = cfg.prefix.length
  hidden = a['hidden'][:, :length]
  yield Check('up_out', out.restored, nhwc(a['up_out']))
  yield Check('align_target', out.align_target, a['align_target'])
  yield Check('hidden of the prefix', out.hidden_prefix, hidden)
  bound = Scar(cfg).bind({'params': params})
  resized = prefill.shrink(cond.features, 2)
  compressed = bound.prefix.compress(cond.features)
  yield Check('feat_resized', resized, nhwc(a['feat_resized']))
  yield Check('feat_conv', compressed - resized, nhwc(a['feat_conv']))
  yield Check('feat_compressed', compressed, nhwc(a['feat_compressed']))
  target = bound.prefix.compress(jnp.asarray(nhwc(a['feat_target'])))
  name = 'feat_target_compressed'
  yield Check(name, target, nhwc(a[name]))
  shuffled = prefill.pixel_shuffle(jnp.asarray(nhwc(a['up_conv1'])), 2)
  yield Check('up_shuffled', shuffled, nhwc(a['up_shuffled']), exact=True)
  yield Check('prefix', bound.prefix.project(compressed), a['prefix'])
  pres = objectives.preservation(out.restored, cond.features)
  align, _ = objectives.alignment(out.hidden_prefix, out.align_target)
  yield Check('loss_pres', pres, a['loss_pres'], atol=0.0)
  yield Check('loss_align', align, a['loss_align'], atol=0.0)
  total = _PRESERVATION * pres + _ALIGNMENT * align
  yield Check('loss_aux_weighted', total, a['loss_aux_weighted'], atol=0.0)
  yield from _encoder(fixture)


def _encoder(fixture: Fixture) -> Iterator[Check]:
  """The encoder inside the release, with its own resizing."""
  a = fixture.arrays
  size = a['dino_in_source'].shape[-1]
  heads = fixture.meta['dino']['num_heads']
  found = dinov2.detect(fixture.tensors, heads=heads, image_size=size)
  params = {'network': dinov2.convert(found, fixture.tensors)}
  seen = semantic.prepare(found, jnp.asarray(nhwc(a['source_image'])))
  yield Check('dino_in_source', seen, nhwc(a['dino_in_source']), 0.0, 1e-5)
  for features, name in (('last4', 'dino_mid4'), ('last', 'dino_last')):
    cfg = dataclasses.replace(found, features=features)
    apply = jax.jit(semantic.SemanticEncoder(cfg).apply)
    for side in ('source', 'target'):
      out = apply({'params': params}, nhwc(a[f'{side}_image']))
      want = a[f'{name}_{side}']
      yield Check(f'{name}_{side}', out.reshape(want.shape), want)


def _gradients(
  fixture: Fixture, cfg: ScarConfig, params: PyTree
) -> Iterator[Check]:
  cond = _conditions(fixture)

  def total(params: PyTree) -> Any:
    out = _run(fixture, cfg, params)
    loss, _ = objectives.cross_entropy(out.logits, out.targets)
    if out.align_target is not None:
      loss += _PRESERVATION * objectives.preservation(
        out.restored, cond.features
      )
      align, _ = objectives.alignment(out.hidden_prefix, out.align_target)
      loss += _ALIGNMENT * align
    return loss

  grads = jax.jit(jax.grad(total))(params)
  scar = _KINDS[fixture.name] == 'scar'
  table = scar_official.table(cfg) if scar else editar.table(cfg)
  ours = disassemble(table, grads)
  for name, want in fixture.grads.items():
    yield gradient(name, ours[name], want)
  for name, norm in fixture.meta.get('grad_l2', {}).items():
    yield gradient(f'{name} norm', np.linalg.norm(ours[name]), np.asarray(norm))


def _greedy(
  fixture: Fixture,
  cfg: ScarConfig,
  params: PyTree,
  settings: dict[str, Any],
  suffix: str,
) -> Iterator[Check]:
  a, cond = fixture.arrays, _conditions(fixture)
  if fixture.name == 'gpt_edit' and not suffix:
    kept = jnp.asarray(a['gen_input_mode'] > 0)
    cond = cond.replace(null_prefix=~kept)  # in the null branch as well
  sampler = Sampler(Scar(cfg), SamplerConfig(temperature=0.0, **settings))
  tokens = a[f'gen_tokens{suffix}']
  seeds: Any = np.arange(len(tokens))
  out: Any = sampler.run({'params': params}, cond, seeds, trace=True)
  yield Check(f'gen_tokens{suffix}', out.tokens, tokens, exact=True)
  name = f'gen_logits{suffix}'
  yield Check(name, out.guided, a[name])
  if not suffix:
    raw = np.concatenate(np.asarray(out.raw))
    yield Check('gen_raw_logits', raw, a['gen_raw_logits'])


def _guided(
  fixture: Fixture, cfg: ScarConfig, params: PyTree
) -> Iterator[Check]:
  """Guidance on image and text: three branches, and the first token's sum."""
  a, cond = fixture.arrays, _conditions(fixture)
  image, text = (float(s) for s in a['guid_scales_image_text'])
  settings = SamplerConfig(
    temperature=0.0,
    guidance_mode='image_text',
    guidance=text,
    guidance_image=image,
  )
  sampler = Sampler(Scar(cfg), settings)
  run: Any = functools.partial(sampler.run, {'params': params}, cond)
  out = run(np.arange(2), trace=True)
  yield Check('guid_dual', out.guided[:, 0], a['guid_dual'])
  branches = ('guid_image_text', 'guid_image_null', 'guid_null_null')
  for i, name in enumerate(branches):
    yield Check(name, out.raw[i][:, 0], a[name])
  out = run(np.arange(2), guidance_image=1.0, trace=True)
  yield Check('guid_text_only', out.guided[:, 0], a['guid_text_only'])
