"""Checkpoints: whole, moved to another mesh, refused where they do not fit."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.moe.routers.bias_balanced import BiasBalancedRouter
from moe_jax.objectives import LanguageModeling
from moe_jax.training import optimizers
from moe_jax.training.checkpoints import Checkpointer
from moe_jax.training.state import init_state
from moe_jax.types import ConfigError
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
