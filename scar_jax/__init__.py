"""SCAR in JAX: image editing from compressed semantic prefixes.

`Editor` is the one public class; it is imported when first asked for, so that
`import scar_jax` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from scar_jax.editor import Editor

__version__ = '0.1.0'
__all__ = ['Editor', '__version__']


def __getattr__(name: str) -> Any:
  if name == 'Editor':
    return importlib.import_module('scar_jax.editor').Editor
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
