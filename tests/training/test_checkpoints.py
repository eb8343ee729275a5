"""Checkpoints: whole, moved to another mesh, refused where they do not fit."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.moe.routers.bias_balanced import BiasBalancedRouter
from moe_jax.notices import notice
from moe_jax.objectives import LanguageModeling
from moe_jax.training import optimizers
from moe_jax.training.checkpoints import Checkpointer
from moe_jax.training.state import init_state
from moe_jax.training.step import train_step
from moe_jax.types import ConfigError, Damaged
from tests import tiny

RULES = sharding.replicated_rules()
OPTIMIZER = functools.partial(optimizers.adafactor, learning_rate=lambda _: 0.1)


class Counter:
  """A data iterator that counts."""

  def __init__(self, at=0):
    self.at = at

  def save(self, path):
    pathlib.Path(path).write_text(json.dumps(self.at))

  def restore(self, path):
    self.at = json.loads(pathlib.Path(path).read_text())


def prepare(mesh, **options):
  spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tiny.batch().items()}
  with sharding.activate(mesh, RULES):
    make_state, state_spec, _ = init_state(
      LanguageModeling(tiny.decoder_only(router=BiasBalancedRouter, **options)), OPTIMIZER, spec, mesh
    )
  return make_state, state_spec


def saved(folder, mesh, step=5):
  make_state, _ = prepare(mesh)
  with sharding.activate(mesh, RULES), Checkpointer(folder) as checkpointer:
    state = make_state()
    assert jax.tree.leaves(state.variables), 'routers remember'
    state = state.replace(step=np.int32(step), variables=jax.tree.map(lambda x: x + 0.25, state.variables))
    checkpointer.save(state, Counter(at=41))
  return jax.device_get(state)


@pytest.mark.parametrize('shape', [(2, 4, 1), (1, 1, 1), (2, 2, 2)])
def test_state_and_data_come_back_on_any_mesh(tmp_path, mesh, shape):
  before = saved(tmp_path, mesh(1, 8, 1))
  _, spec = prepare(mesh(*shape))
  iterator = Counter()
  with sharding.activate(mesh(*shape), RULES), Checkpointer(tmp_path) as checkpointer:
    state = checkpointer.restore(spec, iterator)
  assert iterator.at == 41 and int(state.step) == 5
  for a, b, wanted in zip(jax.tree.leaves(before), jax.tree.leaves(state), jax.tree.leaves(spec), strict=True):
    np.testing.assert_array_equal(a, jax.device_get(b))
    assert b.sharding.is_equivalent_to(wanted.sharding, b.ndim)


def test_parameters_come_back_without_the_optimizer(tmp_path, mesh):
  before = saved(tmp_path, mesh(1, 8, 1))
  _, spec = prepare(mesh(1, 8, 1))
  with Checkpointer(tmp_path, read_only=True) as checkpointer:
    state = checkpointer.restore(spec.replace(opt_state=None))
  assert state.opt_state is None
  jax.tree.map(np.testing.assert_array_equal, before.params, jax.device_get(state.params))
  jax.tree.map(np.testing.assert_array_equal, before.variables, jax.device_get(state.variables))


def test_only_the_newest_are_kept(tmp_path, mesh):
  make_state, _ = prepare(mesh())
  with sharding.activate(mesh(), RULES), Checkpointer(tmp_path, keep=2) as checkpointer:
    for step in (1, 2, 3):
      checkpointer.save(make_state().replace(step=np.int32(step)), Counter())
    checkpointer.wait()
    assert checkpointer.all_steps() == [2, 3]
  assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['2', '3']


def test_on_a_slow_file_system_a_save_returns_before_it_is_written_and_loses_nothing(tmp_path, mesh, monkeypatch):
  """Training may go on in the place of the arrays that are being saved."""
  make_state, spec = prepare(mesh())
  names = {name: getattr(os, name) for name in ('rename', 'replace')}
  for name, move in names.items():
    monkeypatch.setattr(os, name, lambda *args, move=move, **options: (time.sleep(0.2), move(*args, **options))[1])
  before = {}
  with sharding.activate(mesh(), RULES), Checkpointer(tmp_path, keep=2) as checkpointer:
    for step in (1, 2, 3):
      params = jax.tree.map(lambda x, step=step: x + step, make_state().params)
      state = make_state().replace(step=np.int32(step), params=params)
      before[step] = jax.device_get(params)
      checkpointer.save(state, Counter(step))
      assert not (tmp_path / 'checkpoints' / str(step)).exists(), 'it did not wait'
      jax.tree.map(lambda x: x.delete(), params)
  with sharding.activate(mesh(), RULES), Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.all_steps() == [2, 3]
    for step in (2, 3):
      iterator = Counter()
      restored = checkpointer.restore(spec, iterator, step=step)
      assert iterator.at == step
      jax.tree.map(np.testing.assert_array_equal, before[step], jax.device_get(restored.params))


def test_what_is_half_removed_is_not_seen(tmp_path, mesh, monkeypatch):
  """As if the process were killed in the middle of it: whatever removes files stops at once."""
  make_state, _ = prepare(mesh())
  for module in (shutil, os):
    for name in ('rmtree', 'unlink', 'remove', 'rmdir'):
      if hasattr(module, name):
        monkeypatch.setattr(module, name, lambda *_, **__: None)
  with sharding.activate(mesh(), RULES), Checkpointer(tmp_path, keep=1) as checkpointer:
    for step in (1, 2):
      checkpointer.save(make_state().replace(step=np.int32(step)), Counter())
    checkpointer.wait()
    assert checkpointer.all_steps() == [2]
  monkeypatch.undo()
  assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['.deleted', '2']
  with Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.all_steps() == [2]


def test_another_model_is_refused_by_name(tmp_path, mesh):
  saved(tmp_path, mesh())
  _, spec = prepare(mesh(), num_layers=8)
  with (
    Checkpointer(tmp_path) as checkpointer,
    pytest.raises(ConfigError, match=r'is of another model: .*blocks.*') as error,
  ):
    checkpointer.restore(spec)
  assert '\n' not in str(error.value)


def test_a_shallower_model_is_refused_too(tmp_path, mesh):
  """Though all it wants is there."""
  make_state, _ = prepare(mesh(), scan=False)
  with sharding.activate(mesh(), RULES), Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(make_state().replace(step=np.int32(5)), Counter())
  _, spec = prepare(mesh(), scan=False, num_layers=2)
  with (
    Checkpointer(tmp_path) as checkpointer,
    pytest.raises(ConfigError, match=r'blocks_1.* there and is missing here'),
  ):
    checkpointer.restore(spec)


def test_a_damaged_checkpoint_is_named(tmp_path, mesh):
  saved(tmp_path, mesh())
  for file in (tmp_path / 'checkpoints' / '5' / 'state').rglob('d/*'):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  _, spec = prepare(mesh())
  with Checkpointer(tmp_path) as checkpointer, pytest.raises(ConfigError, match=r'5 cannot be read') as error:
    checkpointer.restore(spec)
  assert '\n' not in str(error.value)


def test_no_checkpoints_to_read(tmp_path):
  with pytest.raises(ConfigError, match='No checkpoints in'):
    Checkpointer(tmp_path, read_only=True)


def flip(file, rng):
  data = bytearray(file.read_bytes())
  data[rng.integers(len(data))] ^= 1 << rng.integers(8)
  file.write_bytes(bytes(data))


def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path, mesh):
  """Or it is in nothing that matters: what comes back is then what was saved, to the bit."""
  before = saved(tmp_path / 'good', mesh())
  _, spec = prepare(mesh())
  rng, noticed = np.random.default_rng(0), 0
  files = [f.relative_to(tmp_path) for f in (tmp_path / 'good').rglob('*') if f.is_file() and f.stat().st_size]
  assert len(files) > 5
  for file in [*files, *(f for f in files if '/d/' in str(f))]:
    shutil.copytree(tmp_path / 'good', tmp_path / 'bad')
    flip(tmp_path / 'bad' / file.relative_to('good'), rng)
    with Checkpointer(tmp_path / 'bad') as checkpointer:
      if 5 not in checkpointer.all_steps():
        noticed += 1
      else:
        try:
          after = checkpointer.restore(spec, Counter())
          jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(after))
        except Damaged as error:
          assert '/checkpoints/5 ' in str(error) and '\n' not in str(error)
          noticed += 1
    shutil.rmtree(tmp_path / 'bad')
  assert noticed >= 3


def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path, mesh, caplog):
  before = saved(tmp_path, mesh(), step=5)
  saved(tmp_path, mesh(), step=7)
  for file in (tmp_path / 'checkpoints' / '7' / 'state').rglob('d/*'):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  _, spec = prepare(mesh())
  notice.cache_clear()
  with Checkpointer(tmp_path, read_only=True) as checkpointer:
    assert int(checkpointer.restore(spec).step) == 5
    with pytest.raises(Damaged, match='/7 cannot be read'):
      checkpointer.restore(spec, step=7)
  iterator = Counter()
  with caplog.at_level('INFO', 'moe_jax'), Checkpointer(tmp_path) as checkpointer:
    notice.cache_clear()
    state = checkpointer.restore(spec, iterator)
    assert '/7 cannot be read' in caplog.text and 'Going on from the one before' in caplog.text
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))
    assert iterator.at == 41
    # Its number is free again, and what was damaged is still there for who wants to look.
    assert checkpointer.all_steps() == [5] and len(list((tmp_path / 'damaged_checkpoints').iterdir())) == 1
    checkpointer.save(state.replace(step=np.int32(7)), iterator)
    checkpointer.wait()
    assert checkpointer.all_steps() == [5, 7]


def test_weights_alone_can_be_saved(tmp_path, mesh):
  make_state, spec = prepare(mesh())
  with sharding.activate(mesh(), RULES), Checkpointer(tmp_path) as checkpointer:
    before = make_state()
    checkpointer.save(before.replace(opt_state=None))
  iterator = Counter(at=3)
  with Checkpointer(tmp_path) as checkpointer:
    state = checkpointer.restore(spec, iterator)
  assert state.opt_state is None and iterator.at == 3
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(before.params), jax.device_get(state.params))


def test_a_disk_that_is_full_is_said_and_the_checkpoint_before_stays_whole(tmp_path):
  script = f"""
import resource, signal, sys
import jax
from tests.training.test_checkpoints import *
jax.config.update('jax_num_cpu_devices', 1)
mesh = sharding.make_mesh({{'data': 1, 'expert': 1, 'model': 1}})
make_state, spec = prepare(mesh)
with sharding.activate(mesh, RULES):
  checkpointer = Checkpointer({str(tmp_path)!r})
  state = make_state()
  checkpointer.save(state, Counter())
  checkpointer.wait()
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # as if there were so little room
  try:
    checkpointer.save(state.replace(step=np.int32(9)), Counter())
    checkpointer.wait()
  except ConfigError as error:
    print('SAID', error)
"""
  ended = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=120)
  said = [line for line in ended.stdout.splitlines() if line.startswith('SAID')]
  assert said and 'cannot be written' in said[0] and 'that of step 0 is whole' in said[0], ended
  with Checkpointer(tmp_path, read_only=True) as checkpointer:
    assert checkpointer.all_steps() == [0]


def test_a_resume_on_another_mesh_has_the_same_next_losses(tmp_path, mesh):
  objective = LanguageModeling(tiny.decoder_only(router=BiasBalancedRouter))
  spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tiny.batch().items()}

  def losses(mesh, restored, steps):
    with sharding.activate(mesh, RULES), Checkpointer(tmp_path) as checkpointer:
      make_state, state_spec, transform = init_state(objective, OPTIMIZER, spec, mesh)
      state = checkpointer.restore(state_spec) if restored else make_state()
      step = jax.jit(functools.partial(train_step, objective=objective, transform=transform))
      for at in steps:
        if at == 2 and not restored:
          checkpointer.save(state, Counter())
        batch = jax.device_put(tiny.batch(seed=at), sharding.named_sharding(mesh, 'batch', None))
        state, metrics = step(state, batch)
        yield float(metrics['loss'])

  expected = list(losses(mesh(1, 4, 1), False, range(4)))[2:]
  for shape in [(1, 1, 1), (2, 2, 1), (1, 8, 1)]:
    assert list(losses(mesh(*shape), True, [2, 3])) == pytest.approx(expected, rel=1e-6)
