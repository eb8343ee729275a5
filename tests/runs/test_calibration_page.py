"""The section on calibration, of runs whose answers are planted, and of one that was evaluated."""

import json
from functools import partial

import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.analysis.calibration import calibration
from moe_jax.layers.attention import SelfAttention
from moe_jax.layers.embeddings import TokenEmbedding
from moe_jax.models.decoder_only import DecoderOnly
from moe_jax.models.stack import Stack
from moe_jax.moe.experts import Experts
from moe_jax.moe.moe_layer import MoELayer
from moe_jax.objectives import LanguageModeling
from moe_jax.runs import calibration_page
from moe_jax.runs.evaluate import evaluate
from moe_jax.runs.report import report
from moe_jax.runs.setup import Data, Devices, build
from moe_jax.training import optimizers
from moe_jax.training.checkpoints import Checkpointer


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


def test_an_evaluation_of_choices_is_reported(tmp_path, monkeypatch):
  """From a file of questions to the page, with two worked examples in front of each."""
  choices = [{'inputs': f'{i} is even?', 'targets': ('yes', 'no')[i % 2], 'choices': ['yes', 'no']} for i in range(9)]
  (tmp_path / 'validation.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in choices))
  monkeypatch.setenv('JSON_LINES_GLOB', f'{tmp_path}/*.jsonl')
  from tasks import few_shot, json_lines  # noqa: F401

  few_shot.add_twins(2)
  task = 'json_lines_score_eval_2_shot'
  lengths = {'inputs': 56, 'targets': 8}
  data = Data(task, ('tasks.json_lines', 'tasks.few_shot'), lengths, 8, converter='decoder_only', vocab_size=384)
  moe = partial(MoELayer, num_experts=2, group_size=8, experts=partial(Experts, hidden_dim=8))
  layers = {'attention': partial(SelfAttention, num_heads=2, head_dim=4), 'moe': moe}
  model = DecoderOnly(partial(TokenEmbedding, vocab_size=384, embed_dim=8), [partial(Stack, layers, repeats=1)])
  objective = LanguageModeling(model)
  devices = Devices({'data': 4, 'expert': 2}, sharding.replicated_rules(), num_experts=2)
  adafactor = partial(optimizers.adafactor, learning_rate=optimizers.inverse_sqrt())
  program = build(data.tell_bytes(objective), adafactor, data, devices)
  with program.activate(), Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(program.make_state(), data.batches(program.mesh, 'validation'))
  (result,) = evaluate(str(tmp_path), objective, data, devices, eval_steps=1)
  measured = calibration_page.load(tmp_path)[task]
  assert measured['questions'] == 9 and measured['brier'] == result[f'{task}/brier']
  # A model that knows nothing is about as sure of 'yes' as of 'no', but for their lengths.
  confidence, _, questions = calibration_page.columns(measured)
  assert np.nansum(confidence * questions) / 9 > 0.5 and measured['accuracy'] in [i / 9 for i in range(10)]
  (tmp_path / 'metrics.jsonl').write_text('{"step": 0, "split": "train", "loss": 3.0}\n')
  page = report([tmp_path]).read_text()
  assert f'<h3>{task}</h3>' in page and f'{measured["ece"]:.3f}' in page
