"""Sweeps: what is run, what it may spend, what an interruption costs, and what is told of it."""

import contextlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import textwrap
import time

import gin
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import run
from moe_jax.runs import sweep, sweep_page, sweep_results
from moe_jax.runs.sweep_grid import dense_twin, files_axis, grid, name_of, parse_axis
from moe_jax.runs.sweep_results import Cell, Learning
from moe_jax.types import ConfigError

ROOT = pathlib.Path(__file__).parents[2]

# ---- What is run ----------------------------------------------------------------------------------------------------


def test_every_combination_is_run_and_its_dense_twin_first():
  found = grid([('NUM_EXPERTS', [4, 8]), ('EXPERT_EVERY', [1, 2])])
  assert found[0] == {'EXPERT_EVERY': 0}
  pairs = [(4, 1), (4, 2), (8, 1), (8, 2)]
  assert found[1:] == [{'NUM_EXPERTS': experts, 'EXPERT_EVERY': every} for experts, every in pairs]


def test_a_dense_model_has_no_experts_to_sweep():
  found = grid([('EXPERT_EVERY', [0, 2]), ('NUM_EXPERTS', [4, 8]), ('CAPACITY_FACTOR', [1.0, 2.0])])
  assert sum(one['EXPERT_EVERY'] == 0 for one in found) == 1 and len(found) == 1 + 4


def test_every_seed_and_every_size_has_a_twin_of_its_own():
  found = grid([('SEED', [0, 1]), ('EMBED_DIM', [64, 128]), ('NUM_EXPERTS', [4])])
  twins = [one for one in found if one.get('EXPERT_EVERY') == 0]
  assert twins == [{'SEED': s, 'EMBED_DIM': d, 'EXPERT_EVERY': 0} for s in (0, 1) for d in (64, 128)]
  assert all(dense_twin(one) in twins for one in found)


def test_gin_files_are_an_axis(monkeypatch):
  monkeypatch.chdir(ROOT)
  routers = files_axis('gin/routers/[st]*.gin')
  assert 'gin/routers/switch.gin' in routers[1]
  assert len(grid([routers])) == 1 + len(routers[1])  # a dense model has no router
  optimizers = files_axis('gin/optimizers/*.gin')
  assert len(grid([optimizers])) == 2 * len(optimizers[1])
  names = [name_of(one) for one in grid([routers])]
  assert len(set(names)) == len(names) and all('/' not in name for name in names)


@pytest.mark.parametrize('text', ['NUM_EXPERTS', 'NUM_EXPERTS=', 'NUM_EXPERTS=4', 'NUM_EXPERTS=[]', 'A B=[1]', 'X=[y]'])
def test_an_axis_that_cannot_be_read(text):
  with pytest.raises(ConfigError, match='is not like'):
    parse_axis(text)


def test_numbers_and_texts_have_names_of_their_own():
  assert name_of({'SEED': 1}) != name_of({'SEED': '1'}) and name_of({'X': None}) != name_of({'X': 'None'})


def test_axes_that_make_no_sense():
  with pytest.raises(ConfigError, match='TRAIN_STEPS is what a sweep sets by itself'):
    grid([('TRAIN_STEPS', [1, 2])])
  with pytest.raises(ConfigError, match='matches no file'):
    files_axis('gin/nothing/*.gin')
  with pytest.raises(ConfigError, match='swept twice'):
    grid([('SEED', [0]), ('SEED', [1])])
  with pytest.raises(ConfigError, match='needs --sweep'):
    grid([])


VALUES = st.one_of(st.integers(-5, 5), st.floats(-2, 2), st.text(max_size=4), st.booleans(), st.tuples(st.integers()))
OVERRIDES = st.dictionaries(st.sampled_from(['NUM_EXPERTS', 'MESH', 'SEED', 'gin_file']), VALUES, min_size=1)


@given(OVERRIDES, OVERRIDES)
def test_names_tell_runs_apart_whatever_the_order(one, other):
  one, other = ({k: str(v) if k == 'gin_file' else v for k, v in some.items()} for some in (one, other))
  same = sorted(map(repr, one.items())) == sorted(map(repr, other.items()))
  if not same and name_of(one) == name_of(other):
    assert one == other  # 1 and True, 0.0 and -0.0
  assert name_of(dict(reversed(list(one.items())))) == name_of(one)


# ---- What it may spend ----------------------------------------------------------------------------------------------


def size(overrides):
  """Of made-up models: 500 parameters, and 25 for each hidden unit of an expert, or of the 160 of the dense layer."""
  experts, dense = overrides.get('NUM_EXPERTS', 1), overrides.get('EXPERT_EVERY') == 0
  width = 160 if dense else overrides.get('EXPERT_MLP_DIM', 160)
  total = 500 + 25 * width * (1 if dense else experts)
  active = 500 + 25 * width + (0 if dense else 10 * experts)
  return {
    'parameters': total,
    'active_parameters': active,
    'forward_flops_per_token': {'active': 2.0 * active, 'total': 3.0 * active},
    'exchanged_bytes_per_token': 0.0,
    'tokens_per_step': 100,
    'train_steps': 500,
  }


def plan(overrides, hold):
  return sweep.planned(overrides, size({'EXPERT_EVERY': 0}), size, hold)


@pytest.mark.parametrize('experts', [2, 8, 32])
def test_equal_flops_are_equal_to_half_a_step(experts):
  reference, row = size({'EXPERT_EVERY': 0}), plan({'NUM_EXPERTS': experts}, 'flops')
  budget = 3 * 2 * 4500 * 100 * 500
  assert row['flops'] == pytest.approx(budget, abs=sweep.training_flops(size({'NUM_EXPERTS': experts})) / 2)
  assert row['flops'] == row['flops_per_token'] * row['tokens'] and row['tokens'] == 100 * row['steps']
  assert plan({'EXPERT_EVERY': 0}, 'flops')['steps'] == reference['train_steps']
  assert plan({'NUM_EXPERTS': experts}, 'steps')['steps'] == 500


@pytest.mark.parametrize('experts', [2, 5])
def test_equal_parameters_are_found_by_the_width_of_experts(experts):
  row = plan({'NUM_EXPERTS': experts}, 'parameters')
  assert row['held'] == {'TRAIN_STEPS': 500, 'EXPERT_MLP_DIM': 160 // experts}
  assert row['parameters'] == 4500


def test_parameters_that_cannot_be_equal_are_refused():
  with pytest.raises(ConfigError, match='cannot have the 4,500 parameters'):
    plan({'NUM_EXPERTS': 30}, 'parameters')
  with pytest.raises(ConfigError, match='cannot be swept'):
    plan({'EXPERT_MLP_DIM': 8, 'NUM_EXPERTS': 2}, 'parameters')


def test_sizes_that_experts_cannot_make_up_for_are_refused():
  with pytest.raises(ConfigError, match='no experts to make up for its size'):
    sweep.with_parameters(9000, {'EXPERT_EVERY': 0, 'EMBED_DIM': 8}, size)


# ---- Running --------------------------------------------------------------------------------------------------------

RUN = """
import fcntl, json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
time.sleep(float(sys.argv[3]) / 4)  # as long as a run takes until it has its lock
lock = (folder / '.lock').open('a+')
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
with (folder / 'starts').open('a') as file:
  file.write('x')
if (folder.parent / 'broken').exists() and 'num_experts=4' in folder.name:
  sys.exit('out of luck')
time.sleep(float(sys.argv[3]))
step = int(sys.argv[2])
slow = 0.1 if 'expert_every=0' in folder.name else 0.2  # seconds a step
log = [(number, split) for number in (1, step) for split in ('train', 'validation')]
lines = [{'step': at, 'split': split, 'cross_entropy': 2.0, 'step_seconds': slow} for at, split in log]
(folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + chr(10) for line in lines))
(folder / 'summary.json').write_text('{}')
with (folder / 'ends').open('a') as file:
  file.write('x')
"""


def call(folder, jobs=1, seconds=0.0, config='same', hold='flops'):
  """A sweep of four models and their twin whose training is RUN."""

  def command(bound):
    return [sys.executable, '-c', RUN, bound['MODEL_DIR'], str(bound['TRAIN_STEPS']), str(seconds)]

  axes = ['NUM_EXPERTS=[2,4]', 'EXPERT_EVERY=[1,2]']
  return sweep.sweep(str(folder), axes, [], contextlib.nullcontext(size), command, config, hold=hold, jobs=jobs)


def rows_of(folder):
  return [json.loads(line) for line in (folder / 'sweep.jsonl').read_text().splitlines()]


def test_finished_runs_are_kept_and_broken_ones_named_and_tried_again(tmp_path, capsys):
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / 'broken').touch()
  with pytest.raises(ConfigError, match=r'2 of 5 runs failed.*num_experts=4 \(out of luck\)'):
    call(tmp_path, jobs=2)
  statuses = {row['name']: row['status'] for row in rows_of(tmp_path)}
  assert [status for name, status in statuses.items() if 'num_experts=4' in name] == ['failed', 'failed']
  assert sum(status == 'done' for status in statuses.values()) == 3
  (tmp_path / 'runs' / 'broken').unlink()
  rows = call(tmp_path)
  assert [row['status'] for row in rows] == ['done'] * 5 and rows == rows_of(tmp_path)
  starts = {row['name']: len((pathlib.Path(row['model_dir']) / 'starts').read_text()) for row in rows}
  assert all(n == (sweep.TRIES + 1 if 'num_experts=4' in name else 1) for name, n in starts.items())
  wanted = {'overrides', 'status', 'parameters', 'active_parameters', 'flops_per_token', 'steps', 'loss', 'eval_loss'}
  assert wanted | {'step_seconds', 'model_dir'} <= set(rows[0])
  assert 'report.html' in capsys.readouterr().out and (tmp_path / 'report.html').exists()


def test_equal_time_is_by_measured_steps(tmp_path):
  """Twice as slow, half the steps; each model is timed once, whatever its seeds."""
  rows = call(tmp_path, hold='time')
  assert [row['steps'] for row in rows] == [500] + [250] * 4
  assert all((place / 'ends').read_text() == 'x' for place in (tmp_path / 'timing').iterdir())


def test_what_an_array_job_did_is_found_and_a_sweep_may_be_moved(tmp_path):
  rows = call(tmp_path / 'here')
  journal = tmp_path / 'here' / 'sweep.jsonl'
  journal.write_text(journal.read_text().replace('"done"', '"planned"'))
  (tmp_path / 'here').rename(tmp_path / 'there')
  assert sweep_page.sweep_report(tmp_path / 'there').exists()
  assert [row['status'] for row in rows_of(tmp_path / 'there')] == ['done'] * 5
  again = call(tmp_path / 'there')
  assert [row['eval_loss'] for row in again] == [row['eval_loss'] for row in rows]
  assert all((pathlib.Path(row['model_dir']) / 'starts').read_text() == 'x' for row in again)


def test_a_folder_has_one_sweep(tmp_path):
  call(tmp_path, config="MODEL_DIR = 'here'\nsame")
  call(tmp_path, config="MODEL_DIR = 'there'\nsame")
  with pytest.raises(ConfigError, match='holds a sweep of other configuration'):
    call(tmp_path, config='other')
  assert len(rows_of(tmp_path)) == 5


KILLED = """
import sys
sys.path.insert(0, {root!r})
import pathlib
from tests.runs.test_sweep import call
call(pathlib.Path({folder!r}), jobs=2, seconds=0.5)
"""


@pytest.mark.parametrize('kills', [2, pytest.param(8, marks=pytest.mark.slow)])
def test_an_interruption_loses_and_repeats_nothing_that_was_finished(tmp_path, kills):
  """Killed again and again, at whatever moment: what ended is never started again, and in the end all is there."""
  code = textwrap.dedent(KILLED).format(root=str(ROOT), folder=str(tmp_path))
  rng = np.random.default_rng(0)
  for i in range(kills):
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal, begun = tmp_path / 'sweep.jsonl', time.monotonic()
    was = journal.stat().st_mtime_ns if journal.exists() else 0
    while time.monotonic() < begun + 60 and not (journal.exists() and journal.stat().st_mtime_ns > was):
      time.sleep(0.02)  # until it is at work
    time.sleep(rng.uniform(0, 1.0))
    process.send_signal(signal.SIGKILL if i % 2 else signal.SIGTERM)
    process.wait()
    assert all(row['status'] in ('planned', 'running', 'done') for row in rows_of(tmp_path))  # whole, and no failure
    if process.returncode == 0:
      break
  rows = call(tmp_path)
  assert [row['status'] for row in rows] == ['done'] * 5
  assert all((pathlib.Path(row['model_dir']) / 'ends').read_text() == 'x' for row in rows)


def test_cores_are_shared_out(monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 1, 2, 3, 8}, raising=False)
  assert sweep.core_shares(2) == [{0, 1}, {2, 3, 8}]
  assert sweep.core_shares(1) == [None] and sweep.core_shares(6) == [None] * 6


# ---- From the command line ------------------------------------------------------------------------------------------

TOY = [
  *('--run_mode=sweep', '--gin_file=gin/experiments/sweep_tiny.gin', '--gin.NUM_LAYERS=2', '--gin.EMBED_DIM=32'),
  *('--gin.MLP_DIM=96', '--gin.EXPERT_MLP_DIM=96', '--gin.NUM_HEADS=2', '--gin.NUM_KV_HEADS=2'),
  *('--gin.HEAD_DIM=16', '--gin.STRATEGY=None'),
  *("--gin.TASK_FEATURE_LENGTHS={'targets': 64}", '--gin.GROUP_SIZE=64', '--gin.TRAIN_STEPS=4', '--gin.EVAL_STEPS=1'),
]


@pytest.mark.usefixtures('fresh_gin')
def test_commands_can_be_had_instead(tmp_path):
  """A file for an array job, sizes beforehand, and a token that costs the same but for the router."""
  folder, commands = tmp_path / 'sweep', tmp_path / 'commands'
  more = [
    f"--gin.MODEL_DIR='{folder}'",
    '--sweep=NUM_EXPERTS=[4]',
    '--sweep=EXPERT_EVERY=[1]',
    f'--commands={commands}',
  ]
  assert run.main(['--debug', *TOY, *more]) == 0
  dense, sparse = map(shlex.split, commands.read_text().splitlines())
  assert sparse[0] == 'python' and sparse[1].endswith('run.py')
  assert '--gin.NUM_EXPERTS=4' in sparse and '--gin.EXPERT_EVERY=0' in dense
  rows = rows_of(folder)
  assert [row['status'] for row in rows] == ['planned'] * 2 and not (folder / 'runs').exists()
  router = 3 * 2 * (2 * 32 * 4)  # forward and backward, layers, products with [32, 4]
  assert rows[1]['flops_per_token'] - rows[0]['flops_per_token'] == pytest.approx(router, rel=0.1)
  assert rows[1]['parameters'] == rows[0]['parameters'] + 2 * (
    3 * 3 * 32 * 96 + 32 * 4
  )  # three gated MLPs more, and a router


@pytest.mark.usefixtures('fresh_gin')
def test_a_sweep_that_trains(tmp_path, monkeypatch, capsys):
  corpus = tmp_path / 'corpus'
  corpus.mkdir()
  for i in range(4):
    (corpus / f'{i}.py').write_text(f'def f{i}(x):\n  return x + {i}\n\n\n' * 200)
  monkeypatch.setenv('LOCAL_TEXT_GLOB', str(corpus / '*.py'))
  folder = tmp_path / 'sweep'
  assert run.main(['--debug', *TOY, f"--gin.MODEL_DIR='{folder}'", '--sweep=EXPERT_EVERY=[0]']) == 0
  (row,) = rows_of(folder)
  assert row['status'] == 'done' and 0 < row['eval_loss'] < 10 and row['step_seconds'] > 0 and row['steps'] == 4
  assert 'expert_every=0: done' in capsys.readouterr().out
  assert run.main(['--run_mode=report', '--model_dirs', str(folder)]) == 0
  assert run.main(['--run_mode=report', '--model_dirs', str(folder), str(folder)]) == 1
  assert 'a page of its own' in capsys.readouterr().err
  for flags, message in [
    ([*TOY, '--sweep=SEED=[1]', '--dry_run'], '--dry_run says nothing'),
    ([*TOY[1:], '--jobs=2'], '--jobs goes with --run_mode=sweep'),
    ([*TOY, '--sweep=SEED=[1]', '--jobs=0'], 'jobs=0'),
    ([*TOY, '--sweep=SEED=[1]', '--hold=money'], '--hold=money is none of'),
    ([*TOY, '--sweep=NUM_KV_HEADS=[3]'], 'must be a multiple of key/value heads'),
  ]:
    gin.clear_config()
    assert run.main([*flags, f"--gin.MODEL_DIR='{tmp_path}/other'"]) == 1
    assert message in capsys.readouterr().err


# ---- What is told ---------------------------------------------------------------------------------------------------


def test_what_lies_below_dense_is_taken_seed_by_seed_and_at_equal_time():
  rows = [
    {'name': name_of(o), 'overrides': o, 'eval_loss': loss}
    for o, loss in [
      ({'EXPERT_EVERY': 0, 'SEED': 0}, 3.0),
      ({'EXPERT_EVERY': 0, 'SEED': 1}, 3.4),
      ({'EXPERT_EVERY': 1, 'SEED': 0}, 2.9),
      ({'EXPERT_EVERY': 1, 'SEED': 1}, 3.2),
    ]
  ]
  steps = np.array([10.0, 100.0])
  quick = Learning(steps, steps * 1.0, np.array([4.0, 3.0]))
  slow = Learning(steps, steps * 10**0.5, np.array([3.9, 2.9]))  # half a decade behind, and a decade is worth 1
  learning = {row['name']: slow if row['overrides']['EXPERT_EVERY'] else quick for row in rows}
  dense, sparse = sweep_results.cells(rows, learning)
  assert dense.gains.size == 0 and sparse.overrides == {'EXPERT_EVERY': 1} and len(sparse.rows) == 2
  np.testing.assert_allclose(sparse.gains, [0.1, 0.2])
  np.testing.assert_allclose(sparse.losses, [2.9 + 0.2, 3.2 - 0.2])  # twins are at 3.2 on average
  np.testing.assert_allclose(dense.losses, [3.2, 3.2])
  np.testing.assert_allclose(sparse.gains_in_time, [0.1 - 0.5] * 2)  # after 100 seconds
  # Seeds: 0.2 either way of 3.2, 0.15 of 3.05; their difference 0.05 either way of 0.15.
  assert sweep_results.noise([dense, sparse]) == pytest.approx(np.sqrt((2 * 0.2**2 + 2 * 0.15**2) / 2))
  assert sweep_results.gain_noise([dense, sparse]) == pytest.approx(np.sqrt(2 * 0.05**2))
  assert np.isnan(sweep_results.noise([Cell({}, rows[:1], *[np.array([])] * 3)]))


def planted(folder, b=-0.03, noise=0.002, seed=0, hold='flops'):
  """A sweep whose losses fall by a law, as finished runs leave it."""
  rng, rows = np.random.default_rng(seed), []
  for overrides in grid([('NUM_EXPERTS', [4, 8, 16, 32]), ('EXPERT_EVERY', [1, 2]), ('SEED', [0, 1])]):
    name = name_of(overrides)
    experts = overrides.get('NUM_EXPERTS', 1)
    loss = 10 ** (0.2 + b * np.log10(experts)) * np.exp(noise * rng.normal())
    place = folder / 'runs' / name
    place.mkdir(parents=True)
    log = [
      {'step': step, 'split': split, 'cross_entropy': loss + 1 - step / 100, 'step_seconds': 0.1}
      for step in (50, 100)
      for split in ('train', 'validation')
    ]
    (place / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in log))
    (place / 'summary.json').write_text(json.dumps({'validation_bits_per_byte': 2.0}))
    row = sweep.planned(overrides, size({'EXPERT_EVERY': 0}), size, 'steps') | {'steps': 100}
    row |= {'model_dir': str(place), 'parameters': 1000 * (1 + experts)}
    assert sweep_results.collect(row) and row['eval_loss'] == pytest.approx(loss)
    rows.append(row)
  sweep.begin(folder, {'hold': hold, 'reference': {}}, 'NOTHING = 1')
  sweep_results.write_rows(folder, rows)
  return rows


def test_planted_laws_are_found_within_their_intervals(tmp_path):
  planted(tmp_path)
  laws = sweep_results.fits(tmp_path)
  assert [law['which'] for law in laws] == ['EXPERT_EVERY=1', 'EXPERT_EVERY=2', 'all runs']
  for law in laws[:2]:
    low, high = law['intervals']['b']
    assert low < -0.03 < high and high - low < 0.005
    assert law['doubling'] == pytest.approx(2**-0.03 - 1, abs=0.003) and law['points'] == 2 + 8


def test_the_page_of_a_sweep(tmp_path):
  rows = planted(tmp_path)
  rows.append({**rows[-1], 'name': 'lost', 'status': 'failed', 'error': 'out of <memory>', 'eval_loss': None})
  sweep_results.write_rows(tmp_path, rows)
  page = sweep_page.sweep_report(tmp_path).read_text()
  assert '32 experts, every 2' in page and page.count('<svg') >= 5
  assert 'lost failed: out of &lt;memory&gt;' in page
  assert 'nan' not in page.lower().replace('nanm', '')
  only = [row for row in rows if row['overrides']['EXPERT_EVERY']]  # as when the dense twins have failed
  sweep_results.write_rows(tmp_path, only)
  assert 'Loss against time' in sweep_page.sweep_report(tmp_path).read_text()
  sweep_results.write_rows(tmp_path, [{**row, 'name': 'elsewhere', 'status': 'planned'} for row in rows])
  with pytest.raises(ConfigError, match='no run of the sweep is finished'):
    sweep_page.sweep_report(tmp_path)


def test_unlike_models_are_not_fitted_together(tmp_path):
  rows = planted(tmp_path / 'steps', hold='steps')
  assert sweep_results.fits(tmp_path / 'steps') == []
  planted(tmp_path / 'flops')
  rows = rows_of(tmp_path / 'flops')
  rows[-1]['overrides']['LEARNING_RATE'] = 1.0
  sweep_results.write_rows(tmp_path / 'flops', rows)
  assert sweep_results.fits(tmp_path / 'flops') == []
