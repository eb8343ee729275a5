"""A run on two processes, then others; killed and preempted on the way: it is as if nothing had happened."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moe_jax.runs import hosts
from moe_jax.types import ConfigError
from tests.processes import free_port

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {
  **{'NUM_LAYERS': 2, 'EMBED_DIM': 32, 'MLP_DIM': 64, 'EXPERT_MLP_DIM': 64, 'NUM_HEADS': 2, 'HEAD_DIM': 16},
  **{'BATCH_SIZE': 8, 'GROUP_SIZE': 64, 'TASK_FEATURE_LENGTHS': {'targets': 64}, 'DATA_SHARDS': 4},
  **{
    'EVAL_STEPS': 1,
    'EVAL_PERIOD': 10**6,
    'CHECKPOINT_PERIOD': 20,
    'LOG_PERIOD': 1,
    'MAX_NEW_TOKENS': 2,
    'LEARNING_RATE': 0.001,
  },
}
FOREVER = 10**5


def start(folder, processes, steps, **more):
  """A run as so many processes, with eight devices in all, and more bindings."""
  address = f'localhost:{free_port()}'
  bindings = {**SMALL, 'MODEL_DIR': str(folder), 'TRAIN_STEPS': steps, 'FAKE_DEVICES': 8 // processes, **more}
  command = [sys.executable, 'run.py', '--gin_file=gin/experiments/quickstart.gin']
  command += [f'--gin.{name}={value!r}' for name, value in bindings.items()]
  command += ['--gin.STRATEGY=None']  # no sample at the end
  joined = [f'--coordinator_address={address}', f'--num_processes={processes}']
  return [
    subprocess.Popen(
      [*command, *([*joined, f'--process_id={i}'] if processes > 1 else [])],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env={**os.environ, 'LOCAL_TEXT_GLOB': str(folder.parent / 'corpus' / '*.py')},
    )
    for i in range(processes)
  ]


def write_corpus(folder):
  (folder / 'corpus').mkdir()
  for i in range(16):
    (folder / 'corpus' / f'{i}.py').write_text(f'def f{i}(x):\n  return x + {i}\n\n\n' * 200)


def losses(folder):
  """Step -> loss, of training."""
  path = folder / 'metrics.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  rows = [json.loads(line) for line in lines if line.endswith('}')]
  return {row['step']: row['loss'] for row in rows if row['split'] == 'train'}


def newest(folder):
  """The step of the newest checkpoint."""
  return max(int(path.name) for path in (folder / 'checkpoints').iterdir() if path.name.isdigit())


def wait_for(condition, processes, seconds=240):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'too slow'
    ended = [process for process in processes if process.poll() is not None]
    assert not ended, ended[0].communicate()[0][-3000:]
    time.sleep(0.05)


def finish(processes, code, seconds=240):
  """What the processes said, after they have ended as they should."""
  try:
    said = [process.communicate(timeout=seconds)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [code] * len(processes), '\n'.join(said)[-6000:]
  return said


@pytest.mark.parametrize('later', [[1], pytest.param([4, 1], marks=pytest.mark.slow)], ids=str)
def test_killed_moved_and_preempted_a_run_is_the_same(tmp_path, later):
  folder, whole = tmp_path / 'run', tmp_path / 'whole'
  write_corpus(tmp_path)

  # Two processes, and the second is killed: the first says so and stops.
  first, second = start(folder, 2, FOREVER)
  wait_for(lambda: (folder / 'checkpoints' / '20').exists(), [first, second])
  second.send_signal(signal.SIGKILL)
  killed = time.monotonic()
  (said,) = finish([first], 1, seconds=60)
  assert time.monotonic() - killed < 60
  assert said.splitlines()[-1] == hosts.LOST
  second.communicate()

  # Others go on, until one of them is told that its machine goes away: all save, and stop.
  for count in later:
    saved, reached = newest(folder), max(losses(folder))
    others = start(folder, count, FOREVER)
    wait_for(lambda reached=reached: max(losses(folder)) > reached, others)
    others[count // 2].send_signal(signal.SIGTERM)
    said = finish(others, 128 + signal.SIGTERM)
    last = newest(folder)
    assert f'Going on from step {saved} ' in said[0] and f'SIGTERM: saved at step {last} ' in said[0]

  # One that nobody disturbed saw the same.
  finish(start(whole, 1, last), 0)
  actual, expected = losses(folder), losses(whole)
  assert list(actual) == list(expected) == list(range(1, last + 1))
  np.testing.assert_allclose([*actual.values()], [*expected.values()], rtol=1e-4)
  rows = [json.loads(line) for line in (whole / 'metrics.jsonl').read_text().splitlines()]
  assert all(0 < row['goodput'] <= 1 for row in rows if row['split'] == 'train')


@pytest.mark.slow
def test_a_run_that_crashes_goes_on_from_the_disks_of_its_hosts_though_one_is_lost(tmp_path):
  """What it had computed by then, it computes again to the bit; there is no other checkpoint."""
  folder, disks = tmp_path / 'run', tmp_path / 'disks'
  write_corpus(tmp_path)
  more = {'LOCAL_CHECKPOINT_DIR': str(disks), 'LOCAL_CHECKPOINT_PERIOD': 2, 'CHECKPOINT_PERIOD': 10**6}
  more['MESH'] = {'replica': 2, 'expert': 4}

  def kept(host):
    return max((int(path.name) for path in disks.glob(f'*/process_{host}/[0-9]*')), default=0)

  both = start(folder, 2, FOREVER, **more)
  wait_for(lambda: min(kept(0), kept(1)) >= 4, both)
  time.sleep(random.random())
  both[1].send_signal(signal.SIGKILL)
  finish(both[:1], 1, seconds=60)
  both[1].communicate()
  before, (lost,) = losses(folder), disks.glob('*/process_1')
  shutil.rmtree(lost)
  saved = kept(0)

  others = start(folder, 2, FOREVER, **more)
  wait_for(lambda: max(losses(folder)) > max(before) and not before.keys() - losses(folder).keys(), others)
  others[1].send_signal(signal.SIGTERM)
  said = finish(others, 128 + signal.SIGTERM)
  assert f'Going on from step {saved} in {disks}' in said[0]
  assert before.items() <= losses(folder).items()


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    (('localhost:1', 2, None), '--process_id is missing'),
    ((None, 2, 0), '--coordinator_address is missing'),
    (('localhost:1', 2, 2), '--process_id=2 is not below --num_processes=2'),
  ],
)
def test_processes_that_cannot_be_joined(given, message):
  with pytest.raises(ConfigError, match=message):
    hosts.join(*given)
