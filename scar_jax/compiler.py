"""What XLA is told of a program besides its code.

In: the platform. Out: options for `jax.jit(..., compiler_options=)`. Given to
programs with convolutions.
"""

import functools

import jax

# What XLA's CPU compiler hands to YNNPACK by default, less convolutions: those
# of Eigen are faster (VAR's decoder by 20 %, VQ-16 at 256 px by 3 %).
_KINDS = ('REDUCE', 'INDIVIDUAL_DOT')
_CPU = {
  'xla_cpu_experimental_ynn_fusion_type': ','.join(
    f'LIBRARY_FUSION_TYPE_{kind}' for kind in _KINDS
  )
}


def options(platform: str | None = None) -> dict[str, str] | None:
  """Options of the compiler for a platform, or None.

  Args:
    platform: 'tpu', 'gpu' or 'cpu'; by default that of new arrays.
  """
  if (platform or jax.default_backend()) != 'cpu':
    return None
  return dict(_CPU) if _known() else None


@functools.cache
def _known() -> bool:
  """Whether this jaxlib has the options, which are experimental."""
  try:
    with jax.default_device(jax.local_devices(backend='cpu')[0]):
      jax.jit(lambda: 0, compiler_options=_CPU).lower().compile()
  except jax.errors.JaxRuntimeError:
    return False
  return True
