"""Two hosts take the same checkpoint, whatever one of them cannot read."""

import pathlib

import jax
import numpy as np

from moe_jax import sharding
from moe_jax.training.checkpoints import Checkpointer
from moe_jax.types import ConfigError, Damaged
from tests.processes import join, run_two
from tests.training.test_checkpoints import RULES, Counter, prepare

LAST = 4


class Unreadable(Counter):
  """A place in the data that the second host cannot read, in the last checkpoint and in that before it."""

  def restore(self, path):
    super().restore(path)
    if jax.process_index() == 1 and self.at == LAST:
      raise OSError('a disk of this host')
    if jax.process_index() == 1 and self.at == LAST - 1:
      raise Damaged('a place in the data')


def main(port, process, folder):
  """What each of the two processes does."""
  join(port, process, devices=2)
  folder = pathlib.Path(folder)
  mesh = sharding.make_mesh({'data': 1, 'expert': 4, 'model': 1})
  make_state, spec = prepare(mesh)
  with sharding.activate(mesh, RULES), Checkpointer(folder, keep=9) as checkpointer:
    for step in range(1, LAST + 1):
      checkpointer.save(make_state().replace(step=np.int32(step)), Counter(step))
    checkpointer.wait()
    if process == '0':  # the last but two holds what nobody wrote
      for file in (folder / 'checkpoints' / str(LAST - 2) / 'state').rglob('d/*'):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    jax.experimental.multihost_utils.sync_global_devices('damaged')
    try:
      checkpointer.restore(spec, Unreadable(), step=LAST)
    except Damaged as error:
      print('SAID', error, flush=True)
    iterator = Unreadable()
    state = checkpointer.restore(spec, iterator)
    print('TOOK', int(state.step), iterator.at, checkpointer.all_steps(), flush=True)
    checkpointer.save(state.replace(step=np.int32(LAST)), Counter(LAST))  # its number is free again
    checkpointer.wait()
    print('HAS', checkpointer.all_steps(), flush=True)
    wrong = {'num_layers': 8} if process == '1' else {}
    try:
      checkpointer.restore(prepare(mesh, **wrong)[1], Counter())
    except ConfigError as error:
      print('REFUSED', type(error).__name__, error, flush=True)


def test_what_one_of_two_hosts_cannot_read_neither_takes(tmp_path):
  said = run_two('tests.training.test_checkpoints_of_hosts', tmp_path, str(tmp_path / 'run'))
  first, second = (
    [line for line in text.splitlines() if line.startswith(('SAID', 'TOOK', 'HAS', 'REF'))] for text in said
  )
  assert f'/{LAST} cannot be read on another host' in first[0] and 'a disk of this host' in second[0]
  assert first[1:3] == second[1:3] == ['TOOK 1 1 [1]', f'HAS [1, {LAST}]']
  assert len(list((tmp_path / 'run' / 'damaged_checkpoints').iterdir())) == 3
  assert f'REFUSED ConfigError The checkpoint {tmp_path}/run/checkpoints/{LAST} is refused on another host' in first[3]
  assert 'is of another model' in second[3]
