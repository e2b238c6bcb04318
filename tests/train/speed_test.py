"""Rates, shares of time, traces and recompilations that a run reports."""

import time

import jax
import jax.numpy as jnp
import pytest

from scar_jax.train import speed as speed_lib
from scar_jax.train.compilations import Compilations
from scar_jax.train.profile import Profiler, read_window
from scar_jax.train.speed import Speed


def test_the_parts_of_a_step_add_up(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(speed_lib.time, 'monotonic', lambda: now[0])
  speed = Speed(64, tokens=256, flops=8e12, peak=2e12, devices=4)
  for _ in range(2):
    with speed.spend('data'):
      now[0] += 1.0
    now[0] += 2.0
    speed.step()
  with speed.spend('checkpoint'):
    now[0] += 4.0
  found = speed.take()
  parts = ('data_seconds', 'step_seconds', 'checkpoint_seconds')
  assert [found[name] for name in parts] == [1.0, 2.0, 2.0]
  assert found['steps_per_second'] == 0.2
  assert found['images_per_second'] == pytest.approx(12.8)
  assert found['images_per_second_per_chip'] == pytest.approx(3.2)
  assert found['tokens_per_second_per_chip'] == pytest.approx(3.2 * 256)
  assert found['tflops_per_second_per_chip'] == pytest.approx(0.4)
  assert found['mfu'] == pytest.approx(0.2)
  now[0] += 1.0
  speed.step()
  again = speed.take()
  assert (again['data_seconds'], again['step_seconds']) == (0.0, 1.0)


def test_what_is_not_known_is_not_reported():
  found = Speed(64).take()
  assert not {'mfu', 'tokens_per_second_per_chip'} & {*found}


@pytest.mark.parametrize(
  ('kind', 'peak'),
  [
    ('TPU v5 lite', 1.97e14),
    ('TPU v5p', 4.59e14),
    ('NVIDIA H100 80GB HBM3', 9.89e14),
    ('cpu', 0.0),
  ],
)
def test_peak_of_a_chip_by_its_longest_name(kind, peak):
  assert speed_lib.peak_flops(kind) == peak


def test_memory_of_the_fullest_device(monkeypatch):
  class Device:
    def __init__(self, stats):
      self.memory_stats = lambda: stats

  stats = [
    {'peak_bytes_in_use': 2**30, 'bytes_limit': 2**34},
    {'peak_bytes_in_use': 2**31, 'bytes_limit': 2**34},
  ]
  monkeypatch.setattr(jax, 'local_devices', lambda: [Device(s) for s in stats])
  assert speed_lib.memory() == {'memory_peak_gib': 2, 'memory_limit_gib': 16}
  monkeypatch.setattr(jax, 'local_devices', lambda: [Device(None)])
  assert speed_lib.memory() == {}


def test_a_recompilation_names_function_and_argument(caplog):
  @jax.jit
  def drawn(pictures, scale):
    return pictures * scale

  with Compilations() as compiled:
    drawn(jnp.ones((5, 3)), 2.0)
    drawn(jnp.ones((2, 3)), 2.0)
    compiled.warm = True
    drawn(jnp.ones((2, 3)), 3.0)
    assert (compiled.of('drawn'), compiled.again) == (2, [])
    drawn(jnp.ones((4, 3)), 3.0)
  assert compiled.of('drawn') == 3
  (line,) = compiled.again
  for word in ('drawn', 'pictures', '[2,3]', '[4,3]'):
    assert word in line
  assert [r.getMessage() for r in caplog.records] == [f'compiled again: {line}']
  assert not jax.config.jax_explain_cache_misses


@pytest.mark.parametrize('text', ['10', '3:2', '0:4', 'a:b', '1:2:3'])
def test_a_window_of_steps_that_cannot_be(text):
  with pytest.raises(ValueError, match=r'accepted: FIRST:LAST'):
    read_window(text)


def test_steps_of_the_window_are_traced(tmp_path, caplog):
  assert read_window('') is None
  profiler = Profiler(read_window('2:3'), tmp_path)
  for step in range(1, 5):
    profiler.before(step)
    profiler.after(step, jnp.ones(4) * step)
    time.sleep(0.01)
    assert profiler.tracing == (step == 2)
  profiler.close()
  assert 'no trace' not in caplog.text
  assert len(list(tmp_path.rglob('*.xplane.pb'))) == 1
  late = Profiler((9, 9), tmp_path)
  late.before(10)
  late.close()
  assert 'no trace: step 9 was not taken' in caplog.text
