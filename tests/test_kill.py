"""A training run killed again and again, at any moment, becomes what it would have been."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import orbax.checkpoint as ocp
import pytest

from moe_jax.training.fingerprints import fingerprints
from tests.test_run import ROOT, SMALL

TIMING = ('step_seconds', 'tokens_per_second', 'goodput')


def start(folder, corpus, steps):
  """With all optimizations, as users run it, on eight pretended devices; it saves every other step."""
  more = [f'--gin.TRAIN_STEPS={steps}', '--gin.CHECKPOINT_PERIOD=2', '--gin.CHECKPOINTS_TO_KEEP=3']
  more += ['--gin.EVAL_PERIOD=1000', '--gin.STRATEGY=None', f"--gin.MODEL_DIR='{folder}'"]
  command = [sys.executable, 'run.py', '--gin_file=gin/experiments/quickstart.gin', *SMALL, *more]
  compiler = {'JAX_DISABLE_MOST_OPTIMIZATIONS': 'false', 'XLA_FLAGS': ''}
  environment = {**os.environ, **compiler, 'LOCAL_TEXT_GLOB': str(corpus / '*.py')}
  output = (folder.parent / f'{folder.name}.log').open('a')
  return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)


def steps_in(folder):
  """Of the checkpoints that can be seen."""
  return sorted(int(path.name) for path in (folder / 'checkpoints').glob('*') if path.name.isdigit())


def check_whole(folder):
  """Every checkpoint that can be seen holds what was saved in it. The last one's step, or 0."""
  steps = steps_in(folder)
  for step in steps:
    place = folder / 'checkpoints' / str(step)
    state = ocp.PyTreeCheckpointer().restore(place / 'state')
    saved = json.loads((place / 'fingerprints' / 'metadata').read_text())
    marks = jax.device_get(jax.jit(fingerprints)(state)).values()
    assert sorted(map(int, marks)) == sorted(saved.values())
    assert list((place / 'data').glob('iterator*'))
  return max(steps, default=0)


def lines(folder):
  rows = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def final_marks(folder, steps):
  return json.loads((folder / 'checkpoints' / str(steps) / 'fingerprints' / 'metadata').read_text())


@pytest.mark.parametrize('kills', [2, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_goes_on_bit_by_bit(tmp_path, kills):
  corpus = tmp_path / 'corpus'
  corpus.mkdir()
  for i in range(8):
    (corpus / f'{i}.py').write_text(f'def f{i}(x):\n  return x + {i}\n\n\n' * 200)
  steps, rng = 8 + 10 * kills, random.Random(kills)
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  assert start(whole, corpus, steps).wait(600) == 0, (tmp_path / 'whole.log').read_text()
  resumed = []
  for i in range(kills):
    process, last = start(killed, corpus, steps), (resumed or [0])[-1]
    # Mostly some steps later, when it is training and saving; sometimes while it starts.
    goal, deadline = last + (0 if i % 4 == 1 else rng.choice([1, 2, 3, 4])), time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline and max(steps_in(killed), default=0) < goal:
      time.sleep(0.005)
    time.sleep(rng.random() * (10.0 if goal == last else 0.3))
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed.append(check_whole(killed))
    assert resumed[-1] >= goal
  assert resumed == sorted(resumed)
  assert start(killed, corpus, steps).wait(600) == 0, (tmp_path / 'killed.log').read_text()[-2000:]
  print(f'killed {kills} times, and left with checkpoints of steps {resumed}')
  assert lines(killed) == lines(whole)
  assert final_marks(killed, steps) == final_marks(whole, steps)
