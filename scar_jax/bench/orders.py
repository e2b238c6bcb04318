"""Steps and seconds per image of the three orders, at one model size and grid.

In: a decoder size, the side of the token grid, a batch. Out: a row for raster,
for the random order with each number of sets, and for scale, with VAR's scales
and with two of the grid's size, as the small recipes have. Weights are random
and the picture is not decoded: what is timed is the sampler, prefill and
guidance included. Width, layers, heads and codebook are the same for all; the
scale order has the block it needs (AdaLN), with a feed-forward as large.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax.bench.timing import Report, machine, measure
from scar_jax.config_values import read_value
from scar_jax.filters import SamplerConfig
from scar_jax.models.conditions import empty_conditions
from scar_jax.models.decoder import DecoderConfig, decoder_size
from scar_jax.models.prefill import PrefixConfig
from scar_jax.models.scar import Scar
from scar_jax.models.scar_config import ScarConfig
from scar_jax.models.text_embedder import TextCondition
from scar_jax.models.tokenizers.msvq import MSVQConfig, MSVQModel, accumulator
from scar_jax.orders.scale import scale_sides
from scar_jax.sampling import generate
from scar_jax.sampling_steps import sampling_order, split_scales
from scar_jax.sharding import unbox
from scar_jax.types import PyTree

_FEATURES = 64  # width of the condition's features; they cost next to nothing


def run(given: Any) -> Report:
  """Measures; `given` are the flags of `scar bench`.

  Raises:
    ValueError: an unknown size, or more sets than tokens.
  """
  decoder = decoder_size(given.size, dtype=given.dtype)
  sets = read_value('--sets', tuple[int, ...], given.sets)
  cases = {
    'raster': (_config('raster', decoder, given.grid), 0),
    **{
      f'random {k}': (_config('random', decoder, given.grid), k) for k in sets
    },
    **{
      f'scale {len(sides)}': (_config('scale', decoder, given.grid, sides), 0)
      for sides in (scale_sides(given.grid), (given.grid, given.grid))
    },
  }
  work, steps = {}, {}
  for name, (cfg, num_sets) in cases.items():
    sampler = SamplerConfig(guidance=given.guidance, num_sets=num_sets)
    work[name] = _sampling(cfg, sampler, given.batch)
    steps[name] = len(sampling_order(cfg, sampler).set_sizes)
  seconds = measure(work, given.repeats)
  raster = seconds['raster'][1]
  rows = [
    {
      'order': name.split()[0],
      'steps': steps[name],
      'seconds_per_image': later / given.batch,
      'speedup_vs_raster': raster / later,
      'compile_seconds': first - later,
    }
    for name, (first, later) in seconds.items()
  ]
  settings = {
    **machine(),
    **{k: given[k].value for k in ('size', 'grid', 'batch', 'repeats')},
    **{k: given[k].value for k in ('guidance', 'dtype')},
  }
  return Report(settings, rows, lambda row: f'{row["order"]}, {row["steps"]}')


def _config(
  order: str, decoder: DecoderConfig, side: int, sides: tuple[int, ...] = ()
) -> ScarConfig:
  """Class and prefix to tokens; the parts that differ are the order's own."""
  if order == 'scale':
    decoder = dataclasses.replace(decoder, block='adaln', mlp_hidden=0)
  return ScarConfig(
    decoder=decoder,
    prefix=PrefixConfig(
      k=2, grid=(side, side), width=_FEATURES, out=decoder.width
    ),
    text=TextCondition(kind='label', classes=10),
    order=order,
    grid=(side, side),
    num_sets=1,
    patch_nums=sides,
  )


def _sampling(cfg: ScarConfig, sampler: SamplerConfig, batch: int) -> Any:
  """A function that samples `batch` images."""
  model, add = Scar(cfg), None
  if cfg.order == 'scale':
    tokenizer = MSVQConfig(
      codes=cfg.decoder.vocab,
      code_dim=cfg.latent_dim,
      patch_nums=cfg.patch_nums,
      ch=32,
      ch_mult=(1,),
      res_blocks=1,
    )
    size = tokenizer.image_size
    images = jnp.zeros((1, size, size, 3))
    add = accumulator(tokenizer, _random(MSVQModel(tokenizer), images))
  cond = empty_conditions(cfg, batch)
  seeds = jnp.arange(batch, dtype=jnp.uint32)
  tokens = jnp.zeros((batch, cfg.make_order().num_targets), jnp.int32)
  params = _random(model, tokens, cond, accumulate=add)
  scales, settings = split_scales(sampler)

  @jax.jit
  def sample(params, cond, seeds, scales, add):
    # Arguments, all of them: nothing may be computed at compile time.
    made = generate(
      model, {'params': params}, cond, seeds, scales, settings, accumulate=add
    )
    return made.tokens, made.latent

  return functools.partial(sample, params, cond, seeds, scales, add)


def _random(module: Any, *args: Any, **kwargs: Any) -> PyTree:
  """Parameters of the shapes that `init` gives, drawn at once."""
  rngs = {'params': jax.random.key(0), 'order': jax.random.key(1)}
  shapes = jax.eval_shape(lambda: module.init(rngs, *args, **kwargs)['params'])
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape), x.dtype),
    unbox(shapes),
  )
