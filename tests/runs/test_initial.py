"""What a run begins with."""

import pathlib

import jax
import numpy as np
import optax
import pytest

from moe_jax import sharding
from moe_jax.interop import surgery
from moe_jax.moe.routers.bias_balanced import BiasBalancedRouter
from moe_jax.objectives import LanguageModeling
from moe_jax.runs.initial import Initial, find
from moe_jax.runs.setup import Program, locked
from moe_jax.training.checkpoints import Checkpointer
from moe_jax.training.state import init_state
from moe_jax.types import ConfigError
from tests import tiny
from tests.interop.test_surgery import sized

RULES = sharding.replicated_rules()


class Nothing:
  """The place in no data."""

  def save(self, path):
    pathlib.Path(path).touch()


def program(mesh, seed=0, **options):
  spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tiny.batch().items()}
  objective = LanguageModeling(tiny.decoder_only(router=BiasBalancedRouter, **options))
  with sharding.activate(mesh, RULES):
    made = init_state(objective, lambda axes: optax.adam(0.1), spec, mesh, seed)
  return Program(objective, mesh, RULES, spec, made[1], made[0], made[2], {})


def save(folder, mesh, **options):
  other = program(mesh, seed=1, **options)
  with other.activate(), Checkpointer(folder) as checkpointer:
    state = other.make_state()
    state = state.replace(step=np.int32(7), variables=jax.tree.map(lambda x: x + 0.5, state.variables))
    checkpointer.save(state)
  return jax.device_get(state)


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize('place', ['', 'checkpoints', 'checkpoints/7'])
def test_weights_and_memories_of_another_run_and_all_else_anew(tmp_path, mesh, place):
  other = save(tmp_path, mesh())
  here = program(mesh(2, 4, 1))
  with here.activate():
    fresh, state = here.make_state(), Initial(str(tmp_path / place)).state(here)
  same(state.params, other.params)
  same(state.variables, other.variables)
  same(state.opt_state, fresh.opt_state)
  assert int(state.step) == 0
  jax.tree.map(lambda x, spec: x.sharding.is_equivalent_to(spec.sharding, x.ndim), state, here.state_spec)


def test_a_transform_makes_them_fit(tmp_path, mesh):
  """Another number of layers, of which a model of its own begins afresh where the other has none."""
  other = save(tmp_path, mesh(), scan=False, num_layers=2)
  here = program(mesh(1, 8, 1), scan=False, num_layers=4)
  deeper = lambda saved, fresh: {**fresh, **saved, 'stack_0': {**fresh['stack_0'], **saved['stack_0']}}  # noqa: E731
  with here.activate():
    fresh, state = here.make_state(), Initial(str(tmp_path), deeper).state(here)
    with pytest.raises(ConfigError, match='is of another model'):
      Initial(str(tmp_path)).state(here)
  same(state.params['stack_0']['blocks_0'], other.params['stack_0']['blocks_0'])
  same(state.params['stack_0']['blocks_1'], fresh.params['stack_0']['blocks_1'])
  same(state.variables, fresh.variables)


def test_an_optimizer_s_state_is_made_into_another(tmp_path, mesh, monkeypatch):
  """A dense model's becomes an upcycled one's: each expert has the statistics of the dense layer."""
  sized(monkeypatch)
  other = program(mesh(), seed=1, expert_every=0)
  with other.activate(), Checkpointer(tmp_path / 'dense') as checkpointer:
    state = other.make_state()
    state = state.replace(step=np.int32(7), opt_state=jax.tree.map(lambda x: x + 3, state.opt_state))
    checkpointer.save(state, Nothing())
    checkpointer.save(state.replace(step=np.int32(8), opt_state=None))
  here = program(mesh(2, 4, 1))
  given = {'transform': surgery.upcycle, 'optimizer_transform': surgery.upcycle_optimizer}
  with here.activate():
    begun = Initial(str(tmp_path / 'dense' / 'checkpoints' / '7'), **given).state(here)
    with pytest.raises(ConfigError, match='has weights alone'):
      Initial(str(tmp_path / 'dense'), **given).state(here)
    with pytest.raises(ConfigError, match='names several'):
      Initial([str(tmp_path / 'dense')] * 2, **given).state(here)
  adam, blocks = jax.device_get(begun.opt_state)[0], lambda tree: tree['stack_0']['blocks']
  assert adam.count == 3 and int(begun.step) == 0
  np.testing.assert_array_equal(blocks(adam.mu)['moe']['experts']['wo'], 3)
  np.testing.assert_array_equal(blocks(adam.nu)['moe']['router']['kernel'], 0)
  dense = jax.device_get(blocks(state.params)['mlp']['wo'])
  np.testing.assert_array_equal(blocks(jax.device_get(begun.params))['moe']['experts']['wo'][0, 5], dense[1])


def test_where_nothing_is(tmp_path):
  with pytest.raises(ConfigError, match='holds no checkpoint'):
    find(str(tmp_path))
  (tmp_path / 'checkpoints' / '5').mkdir(parents=True)
  assert find(str(tmp_path / 'checkpoints' / '5')) == (tmp_path, 5) and find(str(tmp_path)) == (tmp_path, None)
  with pytest.raises(ConfigError, match=r"checkpoints/6' holds no"):
    find(str(tmp_path / 'checkpoints' / '6'))


def test_a_folder_has_one_writer(tmp_path):
  with locked(tmp_path), pytest.raises(ConfigError, match=r'Process \d+ is writing to MODEL_DIR'), locked(tmp_path):
    pass
  with locked(tmp_path):
    pass
