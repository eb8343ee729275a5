"""The section on calibration, of runs whose answers are planted, and of one that was evaluated."""

import json

import numpy as np
import pytest

from moe_jax.analysis.calibration import calibration
from moe_jax.runs import calibration_page
from moe_jax.runs.report import report
from moe_jax.runs.setup import Data
from moe_jax.runs.task_metrics import calibrations, evaluator_of


def evaluated(folder, **chances):
  """A MODEL_DIR; of each task the probabilities of questions' choices, of which the first is right."""
  folder.mkdir()
  (folder / 'metrics.jsonl').write_text('{"step": 10, "split": "train", "loss": 3.0}\n')
  found = {}
  for task, rows in chances.items():
    worth = np.zeros_like(rows)
    worth[:, 0] = 1
    found[task] = {'step': 10, 'split': 'validation', **calibration(np.log(rows), worth)}
  if found:
    (folder / 'calibration.json').write_text(json.dumps(found))
  return folder


@pytest.fixture
def runs(tmp_path):
  """Two that answered `both`, the first of which one task more, and one that had no choices."""
  sure, unsure = np.array([[0.95, 0.05], [0.15, 0.85]]), np.array([[0.65, 0.35], [0.65, 0.35], [0.45, 0.55]])
  sparse = evaluated(tmp_path / 'sparse', both=unsure, alone=sure)
  return sparse, evaluated(tmp_path / 'dense', both=sure), evaluated(tmp_path / 'language')


def test_a_panel_has_a_curve_a_run_and_a_row_tells_the_numbers(runs):
  found = calibration_page.section(['sparse', 'dense', 'language'], runs)
  assert [panel['task'] for panel in found['panels']] == ['alone', 'both']
  alone, both = found['panels']
  assert [run['run'] for run in alone['runs']] == ['sparse'] and [run['run'] for run in both['runs']] == [
    'sparse',
    'dense',
  ]
  assert [run['sure'] for run in both['runs']] == pytest.approx([(0.65 * 2 + 0.55) / 3, 0.9])
  assert [run['right'] for run in both['runs']] == pytest.approx([2 / 3, 0.5])
  assert [(row['task'], row['run']) for row in found['rows']] == [
    ('alone', 'sparse'), ('both', 'sparse'), ('both', 'dense')]  # fmt: skip
  assert found['rows'][1]['ece'] == pytest.approx((2 * 0.35 + 0.55) / 3)


def test_means_are_over_tasks_that_all_have(tmp_path):
  rows = np.array([[0.75, 0.25]]), np.array([[0.65, 0.35], [0.65, 0.35]])
  folders = [
    evaluated(tmp_path / 'a', x=rows[0], y=rows[1], z=rows[1]),
    evaluated(tmp_path / 'b', x=rows[1], y=rows[1]),
  ]
  *_, first, second = calibration_page.section(['a', 'b'], folders)['rows']
  assert first['task'] == second['task'] == 'mean of 2 tasks'
  assert (first['ece'], second['ece']) == pytest.approx((0.3, 0.35))
  assert (first['questions'], second['questions']) == (3, 4)


def test_the_page_compares_runs_and_leaves_out_what_is_not_there(runs):
  page = report(runs).read_text()
  section = page[page.index('<h2>Calibration') :]
  assert section.count('<svg') == 2 and '#fe01' not in page
  assert 'var(--run-0)' in section and 'var(--run-1)' in section
  for words in ('both', 'ECE', 'Brier', '0.417', '90% sure of its answers on average, and 50% of them are right'):
    assert words in section, words
  assert '<h2>Calibration' not in report(runs[2:]).read_text()
  assert 'It is\n90% sure' in report(runs[1:2]).read_text(), 'one run needs no name'


def test_a_file_of_questions_with_worked_examples_becomes_a_panel(tmp_path, monkeypatch):
  """All the way but for the model, in whose place a stub is 3/4 sure of 'yes'; test_task_metrics has a model."""
  choices = [{'inputs': f'{i} is even?', 'targets': ('yes', 'no')[i % 2], 'choices': ['yes', 'no']} for i in range(9)]
  (tmp_path / 'validation.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in choices))
  monkeypatch.setenv('JSON_LINES_GLOB', f'{tmp_path}/*.jsonl')
  from tasks import few_shot, json_lines  # noqa: F401

  few_shot.add_twins(2)
  task = 'json_lines_score_eval_2_shot'
  data = Data(task, ('tasks.json_lines',), {'inputs': 56, 'targets': 8}, 8, converter='decoder_only', vocab_size=384)

  def score(dataset):
    for number, row in dataset.as_numpy_iterator():
      first = row['decoder_target_tokens'][row['decoder_loss_weights'] > 0][0]
      yield int(number), np.log(0.75 if first == b'y'[0] + 3 else 0.25)

  evaluator = evaluator_of(data, 'validation', None)
  _, outputs = evaluator.evaluate(compute_metrics=True, score_fn=lambda dataset: list(score(dataset)))
  measured = calibrations(evaluator, outputs)
  assert measured[task]['accuracy'] == pytest.approx(5 / 9)
  assert measured[task]['ece'] == pytest.approx(3 / 4 - 5 / 9)
  (tmp_path / 'calibration.json').write_text(json.dumps({task: {'step': 0, 'split': 'validation', **measured[task]}}))
  (tmp_path / 'metrics.jsonl').write_text('{"step": 0, "split": "train", "loss": 3.0}\n')
  page = report([tmp_path]).read_text()
  assert f'<h3>{task}</h3>' in page and '75% sure of its answers on average, and 56% of them are right' in page
