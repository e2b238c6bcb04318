"""Frechet distance of two sets of features, and statistics as files.

In: features `[n, D]`, all at once or batch by batch. Out: `Statistics`, and
their distance (FID where the features are Inception's pool). Called by
`inception.py` and `suites/fid.py`. Source: Heusel et al., GANs Trained by a Two
Time-Scale Update Rule; method 10.1.
"""

import dataclasses
import os
import pathlib

import numpy as np
from jaxtyping import Float

from scar_jax.eval.report import write_atomic


@dataclasses.dataclass(frozen=True)
class Statistics:
  """Mean and covariance of features.

  Attributes:
    mean: [D], float64.
    cov: [D, D], float64, divided by n - 1.
    n: samples; 0 where a file does not say.
  """

  mean: Float[np.ndarray, ' D']
  cov: Float[np.ndarray, 'D D']
  n: int


class Moments:
  """Statistics of features that come in batches, in float64."""

  def __init__(self):
    self.n = 0
    self._first = self._total = self._squares = np.zeros(())

  def add(self, features: Float[np.ndarray, 'n D']) -> None:
    """Takes a batch."""
    x = np.asarray(features, np.float64)
    if not self.n:
      # Sums of what differs from some sample lose no digits to the mean.
      self._first = x[0]
      self._total, self._squares = np.zeros_like(x[0]), x.T @ x * 0
    x = x - self._first
    self._total = self._total + x.sum(0)
    self._squares = self._squares + x.T @ x
    self.n += len(x)

  def statistics(self) -> Statistics:
    """Of all that was added.

    Raises:
      ValueError: fewer than two samples.
    """
    if self.n < 2:
      raise ValueError(f'statistics of {self.n} samples; accepted: 2 or more')
    mean = self._total / self.n
    cov = (self._squares - self.n * np.outer(mean, mean)) / (self.n - 1)
    return Statistics(mean + self._first, cov, self.n)


def statistics(features: Float[np.ndarray, 'n D']) -> Statistics:
  """Of one array; see `Moments`."""
  moments = Moments()
  moments.add(features)
  return moments.statistics()


def frechet_distance(a: Statistics, b: Statistics) -> float:
  """`|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))`.

  The trace of the root is the sum of the roots of the eigenvalues of
  `S^(1/2) S' S^(1/2)`, which is symmetric: no complex root of a product of two
  singular matrices has to be repaired.

  Raises:
    ValueError: features of two widths.
  """
  if a.mean.shape != b.mean.shape:
    raise ValueError(
      f'statistics of {a.mean.size} and {b.mean.size} features; accepted: two '
      'sets from one network'
    )
  values, vectors = np.linalg.eigh(a.cov)
  root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  inner = root @ b.cov @ root
  spectrum = np.linalg.eigvalsh((inner + inner.T) / 2)
  shared = np.sqrt(np.maximum(spectrum, 0)).sum()
  gap = a.mean - b.mean
  return float(gap @ gap + np.trace(a.cov) + np.trace(b.cov) - 2 * shared)


def read_statistics(path: str | os.PathLike) -> Statistics:
  """An .npz file with `mu` and `sigma`, as the ADM references and clean-fid's.

  Raises:
    ValueError: no such file, or other arrays in it.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f'--reference={str(path)!r}: no such file')
  try:
    with np.load(path) as file:
      names = file.files
      if 'mu' in names and 'sigma' in names:
        mean, cov = file['mu'], file['sigma']
        n = int(file['n']) if 'n' in names else 0
      else:
        raise ValueError(f'arrays {", ".join(names)}')
  except (ValueError, OSError) as error:
    raise ValueError(
      f'--reference={str(path)!r}: {error}; accepted: .npz with mu [D] and '
      'sigma [D, D]'
    ) from error
  if mean.ndim != 1 or cov.shape != (mean.size, mean.size):
    raise ValueError(
      f'--reference={str(path)!r}: mu {mean.shape}, sigma {cov.shape}; '
      'accepted: [D] and [D, D]'
    )
  return Statistics(mean.astype(np.float64), cov.astype(np.float64), n)


def write_statistics(path: str | os.PathLike, found: Statistics) -> None:
  """The file that `read_statistics` reads."""
  write_atomic(
    path,
    lambda file: np.savez(file, mu=found.mean, sigma=found.cov, n=found.n),
  )
