"""Checkpoints on each host's own disk: whole over all hosts, or passed over by all."""

import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import sharding
from moe_jax.training.emergency import LocalCheckpoints, forget_local_checkpoints
from moe_jax.training.state import TrainState
from moe_jax.types import ConfigError
from tests.processes import join, run_two
from tests.training.test_checkpoints import Counter, flip


def state_at(step, mesh):
  """Split, whole everywhere, and both; a float that is no number and a zero with a sign are kept to the bit."""
  rng = np.random.default_rng(step)
  values = {
    'split': (rng.normal(size=(8, 3)).astype(jnp.bfloat16), PartitionSpec(('data', 'expert'))),
    'both': (np.where(rng.random((4, 2)) < 0.5, np.float32(-0.0), np.float32(np.nan)), PartitionSpec('expert')),
    'whole': (rng.random(5) < 0.5, PartitionSpec()),
  }
  place = lambda x, spec: jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])  # noqa: E731
  params = {name: place(*value) for name, value in values.items()}
  return TrainState(place(np.array(step, np.int32), PartitionSpec()), params, {}, {})


def same(state, step, mesh):
  def bits(x):
    return [np.asarray(shard.data).tobytes() for shard in x.addressable_shards]

  return jax.tree.map(bits, state) == jax.tree.map(bits, state_at(step, mesh))


def spec_of(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save(folder, mesh, *steps):
  local = LocalCheckpoints(str(folder / 'disk'), folder / 'run')
  for step in steps:
    local.save(state_at(step, mesh), Counter(10 * step))
  local._writer.shutdown()
  return local.directory


def restored(folder, mesh, after=None):
  """The step gone on from, or None."""
  local = LocalCheckpoints(str(folder / 'disk'), folder / 'run')
  found = local.restore(spec_of(state_at(0, mesh)), Counter, after)
  if found is None:
    return None
  state, iterator = found
  step = int(state.step)
  assert same(state, step, mesh) and iterator.at == 10 * step
  return step


def test_the_newest_is_gone_on_from(tmp_path, mesh):
  mesh = mesh(data=2, expert=4)
  disk = save(tmp_path, mesh, 1, 2, 3)
  assert sorted(path.name for path in disk.iterdir()) == ['2', '3']
  assert restored(tmp_path, mesh) == restored(tmp_path, mesh, after=2) == 3
  assert restored(tmp_path, mesh, after=3) is None


@pytest.mark.parametrize('harm', ['half', 'bit', 'marks', 'place', 'unfinished'])
def test_a_damaged_one_is_passed_over(tmp_path, mesh, harm):
  mesh = mesh(data=2, expert=4)
  disk = save(tmp_path, mesh, 1, 2)
  file = disk / '2' / ('fingerprints.json' if harm == 'marks' else 'pieces.npz')
  if harm == 'half':
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  elif harm == 'bit':
    data = bytearray(file.read_bytes())
    at = data.index(np.asarray(state_at(2, mesh).params['split'].addressable_shards[0].data).tobytes())
    data[at] ^= 1
    file.write_bytes(data)
  elif harm == 'marks':  # as of another run
    file.write_text(json.dumps({name: 1 for name in json.loads(file.read_text())}))
  elif harm == 'place':
    shutil.rmtree(tmp_path / 'run' / 'places' / '2')
  else:
    (disk / '2').rename(disk / '.unfinished')
  assert restored(tmp_path, mesh) == 1
  save(tmp_path, mesh, 2)
  assert restored(tmp_path, mesh) == 2


def test_another_model_or_mesh_or_run_is_passed_over(tmp_path, mesh):
  save(tmp_path, mesh(data=2, expert=4), 1)
  shutil.copytree(tmp_path, tmp_path / 'copy')
  assert restored(tmp_path / 'copy', mesh(data=2, expert=4)) is None, 'another MODEL_DIR'
  assert restored(tmp_path, mesh(data=2, expert=2)) is None
  assert restored(tmp_path, mesh(data=2, expert=4)) == 1, 'whoever asks in vain harms nothing'
  forget_local_checkpoints(tmp_path / 'run')
  assert restored(tmp_path, mesh(data=2, expert=4)) is None, 'the run has gone on without them'


def test_a_run_that_ends_well_leaves_none(tmp_path, mesh):
  with LocalCheckpoints(str(tmp_path / 'disk'), tmp_path / 'run') as local:
    local.save(state_at(1, mesh()), Counter())
  assert not [path for path in tmp_path.rglob('*') if path.is_file()]
  with pytest.raises(RuntimeError), LocalCheckpoints(str(tmp_path / 'disk'), tmp_path / 'run') as local:
    local.save(state_at(1, mesh()), Counter(10))
    raise RuntimeError
  local._written.result()
  assert restored(tmp_path, mesh()) == 1


def test_a_disk_that_is_full_is_said(tmp_path, mesh, monkeypatch):
  local = LocalCheckpoints(str(tmp_path / 'disk'), tmp_path / 'run')
  monkeypatch.setattr(os, 'fsync', lambda _: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
  local.save(state_at(1, mesh()), Counter())
  with pytest.raises(ConfigError, match=r'cannot be written to .*No space left on device'):
    local.save(state_at(2, mesh()), Counter())
  assert restored(tmp_path, mesh()) is None


def test_where_it_cannot_be(tmp_path):
  (tmp_path / 'file').write_text('')
  for place in (str(tmp_path / 'file'), 'gs://bucket'):
    with pytest.raises(ConfigError, match='LOCAL_CHECKPOINT_DIR='):
      LocalCheckpoints(place, tmp_path / 'run')


def main(port, process, folder):
  """What each of two processes does."""
  join(port, process, devices=4)
  slices = sharding.make_mesh({'replica': 2, 'data': 1, 'expert': 4})
  split = sharding.make_mesh({'data': 2, 'expert': 4})
  lose = {
    'nothing': lambda disk: None,
    'the second': lambda disk: process == '1' and shutil.rmtree(disk),
    'the first': lambda disk: process == '0' and shutil.rmtree(disk),
    'a bit': lambda disk: process == '1' and flip_all(disk / '2'),
    'half': lambda disk: process == '1' and (disk / '2').rename(disk / '.unfinished'),
  }
  found = {}
  for name, mesh in {'slices': slices, 'split': split}.items():
    for what, harm in lose.items():
      where = pathlib.Path(folder) / name / what.replace(' ', '_')
      harm(save(where, mesh, 1, 2))
      found[f'{name}, {what} lost'] = restored(where, mesh)
  print('FOUND', json.dumps(found))


def flip_all(folder):
  rng = np.random.default_rng(0)
  for _ in range(20):
    flip(folder / 'pieces.npz', rng)


def test_two_hosts_agree(tmp_path):
  said = run_two('tests.training.test_emergency', tmp_path, str(tmp_path))
  for text in said:
    lines = [line for line in text.splitlines() if line.startswith('FOUND')]
    assert lines, '\n'.join(said)[-4000:]
    assert json.loads(lines[0].removeprefix('FOUND')) == {
      **{f'slices, {what} lost': 2 for what in ('nothing', 'the second', 'the first', 'a bit', 'half')},
      **{'split, nothing lost': 2, 'split, the second lost': None, 'split, the first lost': None},
      **{'split, a bit lost': 1, 'split, half lost': 1},
    }
