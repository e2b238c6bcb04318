"""Token choice: guidance formulas, temperature, top-k, top-p, the draw.

In: logits of one set, `[B, n, V]` or `[..., V]`. Out: filtered logits, or token
ids with a flag for rows that no draw is possible from. Pure functions used by
`sampling.py`; the config below states what every value of a setting means.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

RULES = ('llamagen', 'var')
GUIDANCE_MODES = ('none', 'text', 'image', 'image_text')
RAMPS = ('constant', 'sets', 'tokens')
SCHEDULES = ('random', 'confidence')
# Below this, dividing adds nothing but overflow (FoundationVision/LlamaGen).
MIN_TEMPERATURE = 1e-5


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """How tokens are drawn.

  Attributes:
    temperature: >= 0. Exactly 0 takes the arg-max (lowest id among equals) and
      draws nothing; values in (0, 1e-5) count as 1e-5.
    top_k: >= 0. Keeps every logit not below the k-th largest, equal ones
      included; 0, or more than the vocabulary, keeps all.
    top_p: in [0, 1]. Rule llamagen: 1 keeps all, less keeps the smallest head
      of the sorted tokens whose probability exceeds p, at least one token (so
      0 keeps exactly one). Rule var: drops the tail whose ascending cumulative
      probability is at most 1 - p, at least one token stays; 0 turns it off.
    rule: 'llamagen' or 'var': which of the two top-p rules.
    guidance_mode: 'none'; 'text' = `u + s (c - u)` with the null text in u;
      'image' = the same with the null image; 'image_text' = three branches
      `l00 + s_I (lI0 - l00) + s_T (lIT - lI0)`.
    guidance: s, or s_T; 1 is the conditional distribution.
    guidance_image: s_I of 'image_text'.
    cfg_interval: -1 guides every set; n >= 0 guides the first n + 2 sets only
      (n counts decode steps from 0, as in LlamaGen).
    ramp: 'constant'; 'sets' = strength grows linearly with the set index, 0 to
      1 (VAR); 'tokens' = with the share of tokens known before the set.
    smooth: scale order: in place of one code each position adds a mixture of
      codes to the latent (VAR's `more_smooth`; for show, not for scores).
    mean_code: the other orders: the picture is decoded from the mean of the
      codes under the guided, filtered distribution of each token (a temperature
      of 0 counts as 1 there); the tokens are drawn as ever. Less noise where
      several codes look alike, and soft where they do not.
    num_sets: steps of the random order; 0 is as trained.
    schedule: of the random order: 'random' places, or 'confidence': before each
      step the model looks at all places that are left, and those whose best
      code has the highest guided probability come first (as MaskGIT, but drawn
      afresh, see `sampling.generate`).
    schedule_noise: Gumbel noise on the log-probabilities of 'confidence',
      times the share of tokens left.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  rule: str = 'llamagen'
  guidance_mode: str = 'text'
  guidance: float = 3.0
  guidance_image: float = 1.0
  cfg_interval: int = -1
  ramp: str = 'constant'
  smooth: bool = False
  mean_code: bool = False
  num_sets: int = 0
  schedule: str = 'random'
  schedule_noise: float = 1.0

  def __post_init__(self):
    _accept(self, 'temperature', _number(self.temperature, 0), 'a number >= 0')
    _accept(self, 'top_k', _integer(self.top_k, 0), 'an integer >= 0, 0 = all')
    _accept(self, 'top_p', _number(self.top_p, 0, 1), 'a number in [0, 1]')
    _accept(self, 'rule', self.rule in RULES, RULES)
    mode = self.guidance_mode
    _accept(self, 'guidance_mode', mode in GUIDANCE_MODES, GUIDANCE_MODES)
    _accept(self, 'guidance', _number(self.guidance), 'a finite number')
    _accept(
      self, 'guidance_image', _number(self.guidance_image), 'a finite number'
    )
    interval = _integer(self.cfg_interval, -1)
    _accept(self, 'cfg_interval', interval, 'an integer >= -1, -1 = always')
    _accept(self, 'ramp', self.ramp in RAMPS, RAMPS)
    drawn = not self.smooth or self.temperature > 0
    _accept(self, 'smooth', drawn, 'True with a temperature above 0, or False')
    sets = _integer(self.num_sets, 0)
    _accept(self, 'num_sets', sets, 'an integer >= 0, 0 = as trained')
    _accept(self, 'schedule', self.schedule in SCHEDULES, SCHEDULES)
    noise = _number(self.schedule_noise, 0)
    _accept(self, 'schedule_noise', noise, 'a number >= 0')


def _number(value, low: float = -math.inf, high: float = math.inf) -> bool:
  good = isinstance(value, int | float) and not isinstance(value, bool)
  return good and math.isfinite(value) and low <= value <= high


def _integer(value, low: int) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _accept(cfg: SamplerConfig, name: str, good: bool, accepted) -> None:
  if not good:
    raise ValueError(
      f'sample.{name}={getattr(cfg, name)!r}; accepted: {accepted} '
      f'(set --config.sample.{name})'
    )


def filter_logits(
  logits: Float[Array, '... V'], cfg: SamplerConfig
) -> Float[Array, '... V']:
  """Temperature, then top-k, then top-p; dropped entries become -inf."""
  logits = logits.astype(jnp.float32)
  logits = logits / max(cfg.temperature, MIN_TEMPERATURE)
  vocab = logits.shape[-1]
  if 0 < cfg.top_k < vocab:
    kth = jax.lax.top_k(logits, cfg.top_k)[0][..., -1:]
    logits = jnp.where(logits >= kth, logits, -jnp.inf)
  if cfg.rule == 'llamagen':
    if cfg.top_p < 1:
      logits = jnp.where(_head(logits, cfg.top_p), logits, -jnp.inf)
  elif 0 < cfg.top_p < 1:
    logits = jnp.where(_without_tail(logits, cfg.top_p), logits, -jnp.inf)
  return logits


def _unsort(values: jax.Array, order: jax.Array) -> jax.Array:
  return jnp.take_along_axis(values, jnp.argsort(order, axis=-1), axis=-1)


def _head(logits: jax.Array, top_p: float) -> jax.Array:
  """Kept entries of LlamaGen's top-p: the token that crosses p stays."""
  order = jnp.argsort(-logits, axis=-1, stable=True)
  ranked = jnp.take_along_axis(logits, order, axis=-1)
  cumulative = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
  crossed = cumulative > top_p
  first = jnp.zeros_like(crossed[..., :1])
  removed = jnp.concatenate([first, crossed[..., :-1]], axis=-1)
  return _unsort(~removed, order)


def _without_tail(logits: jax.Array, top_p: float) -> jax.Array:
  """Kept entries of VAR's top-p: an ascending tail of mass 1 - p goes."""
  order = jnp.argsort(logits, axis=-1, stable=True)
  ranked = jnp.take_along_axis(logits, order, axis=-1)
  cumulative = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
  kept = (cumulative > 1 - top_p).at[..., -1].set(True)
  return _unsort(kept, order)


def probabilities(
  logits: Float[Array, '... V'], cfg: SamplerConfig
) -> Float[Array, '... V']:
  """Distribution after all filters (temperature 0 counts as 1e-5 here)."""
  return jax.nn.softmax(filter_logits(logits, cfg), axis=-1)


def undrawable(logits: Float[Array, 'B *n V']) -> Bool[Array, ' B']:
  """Samples with a row that has a NaN, a +inf, or nothing but -inf."""
  top = jnp.max(logits, axis=-1)  # a NaN anywhere in the row wins
  axes = tuple(range(1, top.ndim))
  return jnp.any(~jnp.isfinite(top), axis=axes)


def draw(
  logits: Float[Array, 'B n V'], keys: Key[Array, ' B'], cfg: SamplerConfig
) -> tuple[Int[Array, 'B n'], Bool[Array, ' B']]:
  """Draws the tokens of one set, every sample with its own key.

  Args:
    logits: guided logits.
    keys: one typed PRNG key per sample, so a draw does not depend on its
      neighbours in the batch.
    cfg: filters.

  Returns:
    Token ids, and the samples that no draw is possible from; raise on those
    with `check_drawable` outside of jit.
  """
  logits = logits.astype(jnp.float32)
  bad = undrawable(logits)
  if cfg.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), bad
  count = logits.shape[1:-1]
  uniform = jax.vmap(lambda key: jax.random.uniform(key, count))(keys)
  return _categorical(filter_logits(logits, cfg), uniform), bad


def _categorical(
  logits: Float[Array, '... V'], uniform: Float[Array, '...']
) -> Int[Array, '...']:
  """Draws ids by the inverse of the cumulative distribution.

  One random number for each draw; `jax.random.categorical` takes V of them, and
  30 times as long on a CPU (256 draws of 16,384 ids). Running sums are over
  blocks first, then inside of one: two short ones in place of one over V.

  Args:
    logits: float32; -inf is never drawn.
    uniform: in [0, 1).
  """
  top = jnp.max(logits, axis=-1, keepdims=True)
  weights = jnp.exp(logits - top)
  size = math.ceil(math.sqrt(logits.shape[-1]))
  rest = -logits.shape[-1] % size
  weights = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, rest)])
  weights = weights.reshape(*weights.shape[:-1], -1, size)
  sums = jnp.sum(weights, axis=-1)
  block, share = _reached(sums, uniform)
  inside = jnp.take_along_axis(weights, block[..., None, None], axis=-2)
  place, _ = _reached(inside[..., 0, :], share)
  return (block * size + place).astype(jnp.int32)


def _reached(
  weights: Float[Array, '... n'], share: Float[Array, '...']
) -> tuple[Int[Array, '...'], Float[Array, '...']]:
  """Where the running sum passes a share of the whole.

  Weights of 0 are passed over, also where rounding leaves no sum above.

  Returns:
    The first weight beyond, and the share of it that is left.
  """
  ids = jnp.arange(weights.shape[-1])
  target = share * jnp.sum(weights, axis=-1)
  ends = jnp.cumsum(weights, axis=-1)
  some = weights > 0
  above = some & (ends > target[..., None])
  last = jnp.max(jnp.where(some, ids, 0), axis=-1)
  first = jnp.min(jnp.where(above, ids, last[..., None]), axis=-1)
  end, own = (
    jnp.take_along_axis(t, first[..., None], axis=-1)[..., 0]
    for t in (ends, weights)
  )
  return first, jnp.clip((target - (end - own)) / own, 0, 1)


def mixture(
  logits: Float[Array, 'B n V'],
  keys: Key[Array, ' B'],
  cfg: SamplerConfig,
  progress: float,
) -> Float[Array, 'B n V']:
  """Weights of a soft draw: Gumbel softmax, sharper from set to set.

  Args:
    logits: guided logits.
    keys: see `draw`.
    cfg: filters.
    progress: of the set, 0 for the first and 1 for the last.

  Source: `more_smooth` of FoundationVision/VAR.
  """
  filtered = filter_logits(logits, cfg)
  noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
  softness = max(0.27 * (1 - 0.95 * progress), 0.005)
  return jax.nn.softmax((filtered * (1 + progress) + noise) / softness, axis=-1)


def check_drawable(bad) -> None:
  """Raises for samples whose logits held a NaN, a +inf or only -inf.

  Raises:
    ValueError: lists the rows of the batch.
  """
  rows = [i for i, flag in enumerate(jax.device_get(bad)) if flag]
  if rows:
    raise ValueError(
      f'samples {rows} have logits with NaN or without a finite maximum; '
      'accepted: at least one finite logit in every row and no NaN (check '
      'the weights and inputs; compute in float32 with --config.model.dtype)'
    )


def guide(
  branches: Float[Array, 'G B n V'],
  mode: str,
  text: float | Float[Array, ''],
  image: float | Float[Array, ''] = 1.0,
) -> Float[Array, 'B n V']:
  """Combines the logits of the guidance branches.

  Args:
    branches: the conditional logits first, then the null ones: text or image
      guidance [c, u]; image_text [(I, T), (I, -), (-, -)].
    mode: a value of GUIDANCE_MODES.
    text: s or s_T; exactly 1 returns the conditional logits bit for bit.
    image: s_I, for image_text only.

  Source: FoundationVision/LlamaGen (u + s (c - u)); the InstructPix2Pix form.
  """
  branches = branches.astype(jnp.float32)
  if mode == 'none':
    return branches[0]
  if mode == 'image_text':
    full, no_text, nothing = branches
    guided = nothing + image * (no_text - nothing) + text * (full - no_text)
    off = jnp.logical_and(jnp.equal(text, 1.0), jnp.equal(image, 1.0))
  else:
    full, nothing = branches
    guided = nothing + text * (full - nothing)
    off = jnp.equal(text, 1.0)
  return jnp.where(off, full, guided)


def ramp_weights(
  set_sizes: tuple[int, ...], cfg: SamplerConfig
) -> tuple[float, ...]:
  """Share of the guidance strength (s - 1) that each set gets, in [0, 1]."""
  count, total = len(set_sizes), sum(set_sizes)
  if cfg.ramp == 'sets':
    weights = [k / max(count - 1, 1) for k in range(count)]
  elif cfg.ramp == 'tokens':
    weights = [sum(set_sizes[:k]) / total for k in range(count)]
  else:
    weights = [1.0] * count
  if cfg.cfg_interval >= 0:
    weights = [
      w if k <= cfg.cfg_interval + 1 else 0.0 for k, w in enumerate(weights)
    ]
  return tuple(weights)
