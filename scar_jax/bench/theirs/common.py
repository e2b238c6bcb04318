"""What the works of all references share: their code, weights and calls.

In: the directory of a checkout, a PyTorch model made from it. Out: a `Made`.
"""

import dataclasses
import functools
import importlib
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from scar_jax.extras import require

# Flag -> the public repository that its directory is a checkout of.
CHECKOUTS = {
  'llamagen': 'FoundationVision/LlamaGen',
  'var': 'FoundationVision/VAR',
  'dinov2': 'facebookresearch/dinov2',
}
CLASSES = 1000  # of ImageNet
_NOISE = 0.02  # standard deviation
_COMPARED = 3  # training steps whose losses are compared


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW after a clip of the gradient's norm; vectors do not decay.

  The defaults are those of `config.OptimConfig`, which would load JAX here.
  """

  lr: float = 1e-4
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.05
  clip: float = 1.0


@dataclasses.dataclass(frozen=True)
class Setting:
  """The same for both sides and all works of a run.

  Attributes:
    batch: images of a call.
    grid: tokens, or patches, per side.
    compile: also measure the reference under `torch.compile`.
    dropout: train with the dropouts of the recipes.
    dtype: of the products of both sides; tokenizers stay in float32.
    sides: of VAR's scales, up to `grid`.
    optimizer: of training steps.
  """

  batch: int = 1
  grid: int = 16
  compile: bool = False
  dropout: bool = False
  dtype: str = 'float32'
  sides: tuple[int, ...] = ()
  optimizer: Optimizer = Optimizer()

  @property
  def narrow(self) -> bool:
    """Products are of bfloat16."""
    return self.dtype == 'bfloat16'


@dataclasses.dataclass(frozen=True)
class Given:
  """What our side gets of a work.

  Attributes:
    weights: name of a network -> its state dict.
    inputs: what both sides are given, by name.
    compiles: there is a `Made.compiled`.
  """

  weights: Mapping[str, Mapping[str, np.ndarray]]
  inputs: Mapping[str, np.ndarray]
  compiles: bool = False


@dataclasses.dataclass(frozen=True)
class Made:
  """One work with the reference.

  Attributes:
    weights: as in `Given`.
    inputs: as in `Given`.
    call: does it once.
    outputs: does it, and returns what is compared, by name. Training moves
      the weights: it must be called once, before `call`.
    compiled: `call` with `torch.compile`, where that was asked for.
  """

  weights: Mapping[str, Mapping[str, np.ndarray]]
  inputs: Mapping[str, np.ndarray]
  call: Callable[[], Any]
  outputs: Callable[[], dict[str, np.ndarray]]
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


def to_torch(x: Any) -> Any:
  """An array as a tensor of its own; integers as the references index."""
  x = np.array(x, np.int64 if np.issubdtype(x.dtype, np.integer) else None)
  return require('torch', 'bench').from_numpy(x)


def to_numpy(tensor: Any) -> np.ndarray:
  """A tensor of the reference; bfloat16 becomes float32."""
  tensor = tensor.detach()
  return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def classes_and_tokens(
  setting: Setting, vocab: int, count: int
) -> dict[str, np.ndarray]:
  """Random: label [B] and tokens [B, count], int32."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, vocab, (setting.batch, count), np.int32)
  label = rng.integers(0, CLASSES, setting.batch, np.int32)
  return {'label': label, 'tokens': tokens}


def no_grad(call: Callable[..., Any]) -> Callable[..., Any]:
  """A call that records nothing for gradients."""
  return require('torch', 'bench').inference_mode()(call)


def in_dtype(call: Callable[..., Any], setting: Setting) -> Callable[..., Any]:
  """A call whose products are in the setting's type."""
  torch = require('torch', 'bench')

  @functools.wraps(call)
  def run(*args: Any, **kwargs: Any) -> Any:
    with torch.autocast('cpu', torch.bfloat16, enabled=setting.narrow):
      return call(*args, **kwargs)

  return run


def compiled(
  what: Any, use: Callable[[Any], Callable[[], Any]], setting: Setting
) -> Callable[[], Any] | None:
  """`use` of a module or call under `torch.compile`; None if not asked for."""
  if not setting.compile:
    return None
  return use(require('torch', 'bench').compile(what))


def forward(
  call: Callable[..., Any], args: tuple[Any, ...], setting: Setting
) -> dict[str, Callable[[], Any] | None]:
  """`call(*args)` without gradients: fields `call` and `compiled` of `Made`."""

  def use(call: Callable[..., Any]) -> Callable[[], Any]:
    return functools.partial(no_grad(call), *args)

  return {'call': use(call), 'compiled': compiled(call, use, setting)}


def trainer(
  model: Any, loss: Callable[[Any], Any], setting: Setting
) -> dict[str, Callable[[], Any] | None]:
  """Forward, backward, clipping and AdamW, one step after the other.

  Args:
    model: the reference, in training mode.
    loss: `model -> loss` of the same batch.
    setting: see there.

  Returns:
    The fields `call`, `outputs` (losses [3]) and `compiled` of a `Made`.
  """
  torch = require('torch', 'bench')
  by, loss = setting.optimizer, in_dtype(loss, setting)
  weights = list(model.parameters())
  groups = [
    {
      'params': [p for p in weights if (p.ndim >= 2) == decays],
      'weight_decay': by.weight_decay if decays else 0.0,
    }
    for decays in (True, False)
  ]
  optimizer = torch.optim.AdamW(
    groups, lr=by.lr, betas=(by.b1, by.b2), eps=by.eps, fused=True
  )

  def step(model: Any) -> Any:
    value = loss(model)
    value.backward()
    torch.nn.utils.clip_grad_norm_(weights, by.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value.detach()

  def losses() -> dict[str, np.ndarray]:
    return {'losses': np.array([float(step(model)) for _ in range(_COMPARED)])}

  def use(model: Any) -> Callable[[], Any]:
    return functools.partial(step, model)

  return {
    'call': use(model),
    'outputs': losses,
    'compiled': compiled(model, use, setting),
  }
