"""Options of the compiler: which programs get them, and what they do."""

import jax
import jax.numpy as jnp
import pytest

from scar_jax import compiler


@pytest.fixture
def asked_again():
  compiler._known.cache_clear()
  yield
  compiler._known.cache_clear()


def test_convolutions_are_left_to_eigen():
  def conv(x, kernel):
    names = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), 'SAME', dimension_numbers=names
    )

  args = jnp.ones((1, 64, 64, 32)), jnp.ones((3, 3, 32, 32))
  texts = [
    jax.jit(conv, compiler_options=options).lower(*args).compile().as_text()
    for options in (None, compiler.options())
  ]
  assert ['ynn_fusion' in text for text in texts] == [True, False]
  assert 'convolution(' in texts[1]


@pytest.mark.parametrize('platform', ['tpu', 'gpu'])
def test_accelerators_have_none(platform):
  assert compiler.options(platform) is None


@pytest.mark.usefixtures('asked_again')
def test_what_a_jaxlib_does_not_know_is_not_asked_for(monkeypatch):
  monkeypatch.setattr(compiler, '_CPU', {'xla_cpu_no_such_option': 'true'})
  assert compiler.options('cpu') is None
