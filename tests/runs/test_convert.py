"""To T5X's checkpoints and back, which takes no T5X. Hugging Face's are in tests/interop."""

import jax
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.runs.convert import convert
from moe_jax.runs.setup import Devices
from moe_jax.training.checkpoints import Checkpointer
from moe_jax.types import ConfigError
from tests.runs.test_initial import program, same, save

DEVICES = Devices({'data': 8}, sharding.replicated_rules())


def test_there_and_back_are_the_same_weights_memories_and_step(tmp_path, mesh):
  before = save(tmp_path / 'ours', mesh(1, 8, 1))
  convert(str(tmp_path / 'ours'), DEVICES, target='t5x', path=str(tmp_path / 't5x'))
  assert (tmp_path / 't5x' / 'checkpoint_7' / 'state').is_dir()
  for path in ('t5x', 't5x/checkpoint_7'):
    back = tmp_path / path.replace('/', '_')
    convert(str(back / 'run'), DEVICES, source='t5x', path=str(tmp_path / path))
    here = program(mesh(2, 4, 1))
    with here.activate(), Checkpointer(back / 'run', read_only=True) as checkpointer:
      state = checkpointer.restore(here.state_spec)
    same((state.params, state.variables), (before.params, before.variables))
    assert int(state.step) == 7 and state.opt_state is None
    assert all(np.any(jax.device_get(x) != 0) for x in jax.tree.leaves(state.params))


def test_what_is_not_there_or_already_is(tmp_path, mesh):
  with pytest.raises(ConfigError, match='No checkpoint of T5X in'):
    convert(str(tmp_path / 'ours'), DEVICES, source='t5x', path=str(tmp_path))
  save(tmp_path / 'ours', mesh())
  convert(str(tmp_path / 'ours'), DEVICES, target='t5x', path=str(tmp_path / 't5x'))
  with pytest.raises(ConfigError, match='has checkpoints already'):
    convert(str(tmp_path / 'ours'), DEVICES, source='t5x', path=str(tmp_path / 't5x'))
