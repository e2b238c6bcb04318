"""Packages that only some uses need, imported where they are used.

In: the name of a package and of the extra of setup.py that brings it. Out: the
module, or an error that says what to install.
"""

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
  """Imports a package of an extra.

  Args:
    module: what to import.
    extra: of setup.py, that installs it.

  Raises:
    ValueError: it is not installed; names the extra.
  """
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    # A broken installation of the package itself is another matter.
    if error.name != module.split('.', maxsplit=1)[0]:
      raise
    raise ValueError(
      f'the package {error.name} is not installed; '
      f"pip install 'scar_jax[{extra}]' brings it"
    ) from error
