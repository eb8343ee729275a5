"""Points from tables and sweeps, and what is said of those that no law can be fitted to."""

import json

import numpy as np
import pytest

from moe_jax.analysis.scaling_fits import fit
from moe_jax.analysis.scaling_laws import CLARK_SEPARABLE, ONE_SIZE
from moe_jax.analysis.scaling_points import read_points, select
from moe_jax.types import ConfigError


def run(experts, loss, every=2, status='done', **more):
  return {
    **{'overrides': {'NUM_EXPERTS': experts, 'EXPERT_EVERY': every, 'SEED': 0}, 'status': status},
    **{'parameters': 1000 * (experts + 1), 'active_parameters': 2000, 'tokens': 10**6, 'loss': loss + 1},
    **{'eval_loss': loss, 'step_seconds': None, 'model_dir': f'runs/{experts}'},
    **more,
  }


def write(path, runs):
  path.write_text('\n'.join(map(json.dumps, runs)) + '\n\n')
  return path


def test_a_sweep(tmp_path):
  runs = [
    run(2, 3.0),
    run(4, 2.8),
    run(4, 0, status='planned', eval_loss=None),
    run(8, 0, status='failed', eval_loss=float('nan')),
    run(8, 3.2, every=0, parameters=2000),
  ]
  points = read_points(write(tmp_path / 'sweep.jsonl', runs), dense_parameters='active_parameters')
  np.testing.assert_array_equal(points['loss'], [3.0, 2.8, 3.2])  # that of evaluation
  np.testing.assert_array_equal(points['experts'], [2, 4, 1])  # the dense twin has one
  np.testing.assert_array_equal(points['ratio'], [1.5, 2.5, 1.0])
  np.testing.assert_array_equal(points['dense_parameters'], [2000] * 3)
  np.testing.assert_array_equal(points['expert_every'], [2, 2, 0])
  assert list(points['model_dir']) == ['runs/2', 'runs/4', 'runs/8'] and np.isnan(points['step_seconds']).all()
  chosen = select(points, experts=[1, 4], seed=0)
  np.testing.assert_array_equal(chosen['loss'], [2.8, 3.2])
  np.testing.assert_array_equal(select(points, model_dir='runs/2')['loss'], [3.0])


def test_losses_of_training_where_nothing_was_evaluated(tmp_path):
  runs = [run(2, 3.0, eval_loss=None), run(4, 2.8, eval_loss=None)]
  np.testing.assert_array_equal(read_points(write(tmp_path / 'sweep.jsonl', runs))['loss'], [4.0, 3.8])
  with pytest.raises(ConfigError, match='point 2 has no eval_loss, and others have'):
    read_points(write(tmp_path / 'sweep.jsonl', [run(2, 3.0), runs[1]]))


def test_a_table(tmp_path):
  path = tmp_path / 'points.csv'
  path.write_text('# of two routers\nrouter,experts,loss\nhash,1,3.5\nhash,8,\n"top, one",8,3.25\n')
  points = read_points(path)
  assert list(points['router']) == ['hash', 'hash', 'top, one'] and points['experts'].dtype == np.float64
  np.testing.assert_array_equal(points['loss'], [3.5, np.nan, 3.25])


def test_a_sweep_over_experts_alone(tmp_path):
  runs = [run(experts, 3.0 * experts**-0.1) for experts in (1, 2, 4, 8)]
  points = read_points(write(tmp_path / 'sweep.jsonl', runs), dense_parameters='active_parameters')
  fitted = fit(ONE_SIZE, points)
  assert fitted.constants == pytest.approx({'b': -0.1, 'd': np.log10(3)})
  assert fitted.source == 'fitted to 4 points' and fitted.ranges == {'experts': (1, 8)}
  with pytest.raises(ConfigError, match='dense_parameters has to vary: it is 2000 at all points'):
    fit(CLARK_SEPARABLE, points)


@pytest.mark.parametrize(
  'name, text, message',
  [
    ('points.txt', 'loss\n1\n', 'read from a .csv or a .jsonl file'),
    ('points.csv', 'experts,loss\n', 'has no run that is done'),
    ('sweep.jsonl', '{"loss": 1}\n{"loss"', 'line 2 is not a run of a sweep'),
    ('sweep.jsonl', '[1, 2]\n', 'line 1 is not a run of a sweep'),
    ('sweep.jsonl', '{"loss": 1, "status": "failed"}\n', 'has no run that is done'),
    ('points.csv', 'size,loss\n1,2\n', 'no column active_parameters to stand for dense_parameters: it has size, loss'),
  ],
)
def test_files_that_hold_no_points(tmp_path, name, text, message):
  (tmp_path / name).write_text(text)
  with pytest.raises(ConfigError, match=message) as error:
    read_points(tmp_path / name, dense_parameters='active_parameters')
  assert '\n' not in str(error.value)


def test_no_file(tmp_path):
  with pytest.raises(ConfigError, match=r'sweep\.jsonl is not there'):
    read_points(tmp_path / 'sweep.jsonl')


GOOD = {'dense_parameters': [1e6, 1e6, 1e7, 1e7], 'experts': [1, 8, 1, 8], 'loss': [3.0, 2.8, 2.6, 2.5]}


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'loss': None}, 'need the column loss, measured. They have dense_parameters, experts'),
    ({'experts': None}, r'need the column experts; another column may stand in: read_points\(path, experts=...\)'),
    ({'loss': [3.0, np.nan, np.inf, 2.5]}, 'loss has to be finite and positive: at point 2 of 4 it is nan'),
    ({'loss': [3.0, 2.8, -np.inf, 2.5]}, 'loss has to be finite and positive: at point 3 of 4 it is -inf'),
    ({'experts': [1, 8, 1, 0]}, 'experts has to be finite and positive: at point 4 of 4 it is 0'),
    ({'experts': ['one', 'two', 'one', 'two']}, "experts has to be numbers: at point 1 it is 'one'"),
    ({'experts': [8, 8, 8, 8]}, 'experts has to vary: it is 8 at all points'),
    ({'experts': [1, 8, 1]}, 'of one length: dense_parameters 4, experts 3, loss 4'),
    ({name: values[:3] for name, values in GOOD.items()}, 'takes 4 points at 3 places .* there are 3 at 3'),
    ({'dense_parameters': [1e6, 1e6, 1e7, 1e7], 'experts': [1, 1, 8, 8]}, 'and there are 4 at 2'),
    ({name: [] for name in GOOD}, 'There are no points'),
  ],
)
def test_points_that_no_law_can_be_fitted_to(changes, message):
  points = {name: values for name, values in (GOOD | changes).items() if values is not None}
  with pytest.raises(ConfigError, match=message) as error:
    fit(CLARK_SEPARABLE, points)
  assert '\n' not in str(error.value)


def test_as_many_points_as_it_takes():
  assert len(fit(CLARK_SEPARABLE, GOOD).residuals) == 4
