"""What every work of `scar bench reference` shares: both sides of a comparison.

In: the directory of a checkout, a PyTorch model made from it, a task of ours.
Out: the reference's modules, its weights as arrays, a `Pair` of calls that do
the same work. Called by `reference.py` and the `reference_*.py` beside it.
"""

import dataclasses
import functools
import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scar_jax import compiler
from scar_jax.config import OptimConfig
from scar_jax.extras import require
from scar_jax.models.scar_config import ScarConfig
from scar_jax.train.optim import make_optimizer
from scar_jax.train.state import TrainState, abstract_variables
from scar_jax.train.step import make_step
from scar_jax.train.tasks import abstract
from scar_jax.types import PyTree

# Flag -> the public repository that its directory is a checkout of.
CHECKOUTS = {
  'llamagen': 'FoundationVision/LlamaGen',
  'var': 'FoundationVision/VAR',
  'dinov2': 'facebookresearch/dinov2',
}
_COMPARED = 3  # training steps whose losses are compared
_STEPS = 1000  # of the run that a step is said to be of; the rate is constant
_NOISE = 0.02  # standard deviation


@dataclasses.dataclass(frozen=True)
class Setting:
  """The same for all works of a run.

  Attributes:
    batch: images of a call.
    grid: tokens, or patches, per side.
    compile: also measure the reference under `torch.compile`.
    dropout: train with the dropouts of the recipes.
    dtype: of the products of both sides; tokenizers stay in float32.
  """

  batch: int = 1
  grid: int = 16
  compile: bool = False
  dropout: bool = False
  dtype: str = 'float32'

  @property
  def narrow(self) -> bool:
    """Products are of bfloat16."""
    return self.dtype == 'bfloat16'


@dataclasses.dataclass(frozen=True)
class Pair:
  """One work on both sides, with the same weights and inputs.

  Attributes:
    ours: does it once; its result is waited for.
    theirs: the same with the reference.
    differ: the largest absolute difference of the outputs, and what they are;
      None where dropout makes them differ.
    compiled: `theirs` with `torch.compile`, where that was asked for.
  """

  ours: Callable[[], Any]
  theirs: Callable[[], Any]
  differ: Callable[[], tuple[float | None, str]]
  compiled: Callable[[], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Checkout:
  """The code of a reference, as the user has it.

  Attributes:
    flag: a key of `CHECKOUTS`.
    path: its directory.
  """

  flag: str
  path: str

  def load(self, name: str) -> Any:
    """A module of it; the directory stays on the search path of this process.

    Raises:
      ValueError: no directory, a module that cannot be imported, or one of
        that name from elsewhere.
    """
    root = pathlib.Path(self.path).resolve()
    accepted = (
      f'accepted: a checkout of {CHECKOUTS[self.flag]} with the packages that '
      f'its models import (set --{self.flag})'
    )
    given = f'--{self.flag}={self.path!r}'
    if not root.is_dir():
      raise ValueError(f'{given}: no such directory; {accepted}')
    if str(root) not in sys.path:
      sys.path.insert(0, str(root))
    try:
      module = importlib.import_module(name)
    except Exception as error:  # whatever the code of others may raise
      raise ValueError(
        f'{given}: {name} cannot be imported: {type(error).__name__}: {error}; '
        f'{accepted}'
      ) from error
    file = pathlib.Path(module.__file__ or '').resolve()
    if not file.is_relative_to(root):
      raise ValueError(
        f'{given}: {name} was imported from {file}, not from there; {accepted}'
      )
    return module


def shaken(model: Any) -> Any:
  """Adds seeded noise to all parameters: what starts at zero would hide errors.

  Args:
    model: a PyTorch module, changed in place.
  """
  torch = require('torch', 'bench')
  source = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for p in model.parameters():
      p.add_(_NOISE * torch.randn(p.shape, generator=source))
  return model


def tensors(model: Any) -> dict[str, np.ndarray]:
  """The state dict of a PyTorch module, as views of its memory."""
  return {k: v.detach().numpy() for k, v in model.state_dict().items()}


def on_device(params: PyTree) -> PyTree:
  """Converted parameters in memory that a step may overwrite."""
  return jax.tree.map(jnp.array, params)


def to_torch(x: Any) -> Any:
  """An array as a tensor of its own; integers as the references index."""
  x = np.array(x, np.int64 if np.issubdtype(x.dtype, np.integer) else None)
  return require('torch', 'bench').from_numpy(x)


def to_numpy(tensor: Any) -> np.ndarray:
  """A tensor of the reference; bfloat16 becomes float32."""
  return tensor.float().numpy()


def gap(ours: Any, theirs: Any) -> float:
  """Largest absolute difference.

  Raises:
    ValueError: other shapes.
  """
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  if ours.shape != theirs.shape:
    raise ValueError(f'outputs of shapes {ours.shape} and {theirs.shape}')
  return float(np.max(np.abs(ours.astype(np.float64) - theirs)))


def same(ours: Any, theirs: Any, what: str) -> str:
  """'255 of 256 codes equal'."""
  equal = np.asarray(ours) == np.asarray(theirs)
  return f'{int(equal.sum())} of {equal.size} {what} equal'


def no_grad(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
  """A call of the reference that records nothing for gradients."""
  with require('torch', 'bench').inference_mode():
    return call(*args, **kwargs)


def in_dtype(call: Callable[..., Any], setting: Setting) -> Callable[..., Any]:
  """A call of the reference, its products in the setting's type."""
  torch = require('torch', 'bench')

  @functools.wraps(call)
  def run(*args: Any, **kwargs: Any) -> Any:
    with torch.autocast('cpu', torch.bfloat16, enabled=setting.narrow):
      return call(*args, **kwargs)

  return run


def forward_pair(
  run: Callable[[], Any],
  call: Callable[..., Any],
  args: tuple[Any, ...],
  differ: Callable[[], tuple[float | None, str]],
  setting: Setting,
) -> Pair:
  """Work without gradients: `run` of ours beside `call(*args)` of theirs."""
  compiled = None
  if setting.compile:
    program = require('torch', 'bench').compile(call)
    compiled = functools.partial(no_grad, program, *args)
  return Pair(run, functools.partial(no_grad, call, *args), differ, compiled)


def to_train(model: ScarConfig, setting: Setting) -> ScarConfig:
  """What is trained: without dropout of any kind unless that was asked for.

  Layers are written out, as in the recipes for CPUs: a loop copies what it
  keeps for the backward pass, and starts every gradient from zeros.
  """
  decoder = dataclasses.replace(model.decoder, scan=False)
  if setting.dropout:
    return dataclasses.replace(model, decoder=decoder)
  # Without it, two steps can be the same.
  decoder = dataclasses.replace(
    decoder, resid_dropout=0.0, ffn_dropout=0.0, drop_path=0.0
  )
  return dataclasses.replace(
    model, decoder=decoder, token_dropout=0.0, text_dropout=0.0
  )


def training_pair(
  task: Any,
  params: PyTree,
  batch: dict[str, Any],
  model: Any,
  loss: Callable[[Any], Any],
  setting: Setting,
) -> Pair:
  """Forward, backward, clipping and AdamW, one step after the other.

  Args:
    task: ours, a `train.tasks.Task`.
    params: the weights of `model`, converted; they are overwritten.
    batch: of `task`.
    model: the reference, in training mode.
    loss: `model -> loss` of the same batch.
    setting: see there.
  """
  torch = require('torch', 'bench')
  optim = OptimConfig()
  ours = _OurSteps(task, params, batch, optim)
  loss = in_dtype(loss, setting)
  weights = list(model.parameters())
  groups = [
    {
      'params': [p for p in weights if (p.ndim >= 2) == decays],
      'weight_decay': optim.weight_decay if decays else 0.0,
    }
    for decays in (True, False)
  ]
  optimizer = torch.optim.AdamW(
    groups, lr=optim.lr, betas=(optim.b1, optim.b2), eps=optim.eps, fused=True
  )

  def step(model: Any) -> Any:
    value = loss(model)
    value.backward()
    torch.nn.utils.clip_grad_norm_(weights, optim.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value.detach()

  theirs = functools.partial(step, model)

  def differ() -> tuple[float | None, str]:
    losses = [(float(ours()), float(theirs())) for _ in range(_COMPARED)]
    if setting.dropout:
      return None, 'nothing, for dropout'
    return gap(*np.transpose(losses)), f'loss of {_COMPARED} steps'

  compiled = None
  if setting.compile:
    compiled = functools.partial(step, torch.compile(model))
  return Pair(ours, theirs, differ, compiled)


class _OurSteps:
  """The trainer's own step, without its loop."""

  def __init__(
    self, task: Any, params: PyTree, batch: dict[str, Any], optim: OptimConfig
  ):
    boxed = abstract_variables(task, abstract(batch))
    params = task.as_trained(params)
    tx = make_optimizer(optim, _STEPS, boxed['params'])
    self._batch, self._frozen = batch, dict(task.frozen)
    self._step = jax.jit(
      make_step(task, tx, optim, _STEPS),
      donate_argnums=0,
      compiler_options=compiler.options(),
    )
    make: Any = TrainState
    self._state = make(
      step=jnp.int32(0),
      params=params,
      opt_state=jax.jit(tx.init)(params),
      ema={},
      extra={},
      seed=jnp.uint32(0),
      skipped=jnp.int32(0),
      bad_in_row=jnp.int32(0),
    )

  def __call__(self) -> Any:
    self._state, metrics = self._step(self._state, self._frozen, self._batch)
    # The loss is there before the update is.
    jax.block_until_ready(self._state)
    return metrics['loss']
