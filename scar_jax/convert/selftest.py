"""Parity with reference models: fixtures in, errors out.

In: a directory of fixtures as `tests/golden` has them: `NAME.safetensors` (the
reference's weights), `NAME.npz` (inputs and outputs), `NAME.json` (config).
Out: one `Result` for each. `scar convert --selftest` prints them and the tests
assert them. The `parity_*.py` beside this file run the models.
"""

import dataclasses
import importlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from scar_jax.config_values import nearest

# Fixture -> (family, module of `scar_jax.convert` that runs it). A module has
# `outputs(fixture)`, which yields `Check`s. A new family adds its rows here.
FIXTURES: Mapping[str, tuple[str, str]] = {
  'vq16': ('llamagen-vq', 'parity_vq'),
  'vq8': ('llamagen-vq', 'parity_vq'),
  'gpt_c2i': ('llamagen-gpt', 'parity_gpt'),
  'gpt_t2i': ('llamagen-gpt', 'parity_gpt'),
  'gpt_edit': ('editar', 'parity_gpt'),
  'scar_prefill': ('scar', 'parity_gpt'),
  'scar_prefill_1th': ('scar', 'parity_gpt'),
  'var_vqvae': ('var-vqvae', 'parity_var'),
  'var': ('var', 'parity_var'),
  'var_shared_aln': ('var', 'parity_var'),
  'var_noqknorm': ('var', 'parity_var'),
  'dinov2': ('dinov2', 'parity_encoders'),
  'dinov2_reg': ('dinov2', 'parity_encoders'),
  'dinov2_swiglu': ('dinov2', 'parity_encoders'),
  'dinov2_hf': ('dinov2', 'parity_encoders'),
  't5': ('t5', 'parity_encoders'),
  'vit': ('vit', 'parity_vision'),
  'clip': ('clip', 'parity_vision'),
  'sam': ('sam', 'parity_vision'),
}
# Of the fixtures' README: relative, and absolute on values of order 1.
RTOL = ATOL = 1e-4
GRAD_TOL = 1e-3  # of the largest entry of a gradient


@dataclasses.dataclass(frozen=True)
class Fixture:
  """A reference model with its inputs and outputs.

  Attributes:
    name: of its files.
    tensors: weights under the reference's names.
    arrays: inputs and outputs, in the reference's layout.
    meta: its config; empty without a JSON file.
    grads: gradient of the loss for each tensor; empty without a file.
    parts: fixtures of frozen networks that it runs with: 'vae'.
  """

  name: str
  tensors: Mapping[str, np.ndarray]
  arrays: Mapping[str, np.ndarray]
  meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  grads: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  parts: Mapping[str, 'Fixture'] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Check:
  """One output beside the reference's.

  Attributes:
    name: of the output.
    ours: in the reference's layout.
    want: the reference's.
    rtol: relative tolerance.
    atol: absolute tolerance.
    exact: tokens and the like, which must be equal.
  """

  name: str
  ours: Any
  want: Any
  rtol: float = RTOL
  atol: float = ATOL
  exact: bool = False

  def errors(self) -> tuple[float, float, bool]:
    """Largest absolute error, the same over the largest value, and passed."""
    ours = np.asarray(self.ours, np.float64)
    want = np.asarray(self.want, np.float64)
    if ours.shape != want.shape:
      return np.inf, np.inf, False
    if not ours.size:
      return 0.0, 0.0, True
    gap = np.abs(ours - want)
    largest = float(gap.max())
    relative = largest / max(float(np.abs(want).max()), 1e-30)
    limit = 0.0 if self.exact else self.atol + self.rtol * np.abs(want)
    # A NaN compares false, so that it fails.
    return largest, relative, bool((gap <= limit).all())


def gradient(name: str, ours: Any, want: np.ndarray) -> Check:
  """A check of a gradient, whose tolerance goes by its largest entry."""
  scale = float(np.abs(want).max())
  return Check(f'grad {name}', ours, want, GRAD_TOL, GRAD_TOL * scale)


@dataclasses.dataclass(frozen=True)
class Result:
  """What became of a fixture.

  Attributes:
    fixture: its name.
    family: of `families.FAMILIES`.
    tensors: how many its file holds.
    outputs: how many were compared.
    max_abs: largest absolute error of any output that is no gradient.
    max_rel: the same over the output's largest value.
    failed: outputs outside of their tolerance, with their errors.
  """

  fixture: str
  family: str
  tensors: int
  outputs: int
  max_abs: float
  max_rel: float
  failed: Mapping[str, tuple[float, float]]

  @property
  def passed(self) -> bool:
    """Something was compared, and all of it is within tolerance."""
    return bool(self.outputs) and not self.failed

  def reason(self) -> str:
    """The first outputs that failed, for a message."""
    some = [f'{k} off by {v[0]:.1e}' for k, v in self.failed.items()]
    return ', '.join(some[:3]) or 'nothing was compared'

  def row(self) -> dict[str, Any]:
    """The columns of the table, after the name."""
    return {
      'family': self.family,
      'tensors': self.tensors,
      'outputs': self.outputs,
      'max_abs': f'{self.max_abs:.1e}',
      'max_rel': f'{self.max_rel:.1e}',
      'pass': 'yes' if self.passed else f'NO: {self.reason()}',
    }

  def as_dict(self) -> dict[str, Any]:
    """Everything, JSON-able."""
    return dataclasses.asdict(self) | {'passed': self.passed}


def load(folder: str | os.PathLike[str], name: str) -> Fixture:
  """Reads the files of one fixture.

  Raises:
    ValueError: its weights or its arrays are missing, or it is unknown.
  """
  folder = pathlib.Path(folder)
  if name not in FIXTURES:
    raise ValueError(
      f'fixture {name!r}.{nearest(name, FIXTURES)} accepted: '
      f'{", ".join(FIXTURES)}'
    )
  weights, arrays, grads, meta = (
    folder / f'{name}{end}'
    for end in ('.safetensors', '.npz', '_grads.safetensors', '.json')
  )
  absent = [str(p) for p in (weights, arrays) if not p.is_file()]
  if absent:
    raise ValueError(f'fixture {name!r} has no {", ".join(absent)}')
  with np.load(arrays) as file:
    values = dict(file)
  config = json.loads(meta.read_text()) if meta.is_file() else {}
  parts = {key: load(folder, config[key]) for key in ('vae',) if key in config}
  return Fixture(
    name,
    load_file(weights),
    values,
    config,
    load_file(grads) if grads.is_file() else {},
    parts,
  )


def compare(fixture: Fixture) -> Result:
  """Runs one fixture."""
  family, module = FIXTURES[fixture.name]
  runner: Any = importlib.import_module(f'scar_jax.convert.{module}')
  checks: Iterator[Check] = runner.outputs(fixture)
  outputs, max_abs, max_rel, failed = 0, 0.0, 0.0, {}
  for check in checks:
    outputs += 1
    absolute, relative, passed = check.errors()
    if not passed:
      failed[check.name] = (absolute, relative)
    if not check.name.startswith('grad '):
      max_abs, max_rel = max(max_abs, absolute), max(max_rel, relative)
  return Result(
    fixture.name,
    family,
    len(fixture.tensors),
    outputs,
    max_abs,
    max_rel,
    failed,
  )


def run(
  folder: str | os.PathLike[str],
  progress: Callable[[str], Any] = lambda _: None,
) -> list[Result]:
  """Runs every known fixture of a directory.

  Args:
    folder: of the fixtures.
    progress: called with the name of each before it runs.

  Raises:
    ValueError: none are there.
  """
  folder = pathlib.Path(folder)
  names = [n for n in FIXTURES if (folder / f'{n}.safetensors').is_file()]
  if not names:
    raise ValueError(
      f'--selftest={str(folder)!r} holds no fixtures; accepted: a directory '
      f'with NAME.safetensors and NAME.npz for {", ".join(FIXTURES)}'
    )
  results = []
  for name in names:
    progress(f'comparing {name}')
    results.append(compare(load(folder, name)))
  return results
