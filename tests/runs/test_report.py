"""Synthetic runs: what is read of them, what is computed, and what the page says and may not contain."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_jax.runs.drawing import spread
from moe_jax.runs.report import curve, expert_load_matrix, key_figures, layer_curves, load_run, report
from moe_jax.types import ConfigError

SUMMARY: dict[str, Any] = {
  'parameters': 24_812_032,
  'active_parameters': 9_871_360,
  'devices': 8,
  'platform': 'cpu',
  'mesh': {'data': 1, 'expert': 8, 'model': 1},
  'validation_bits_per_byte': 2.125,
  'unigram_bits_per_byte': 4.875,
  'zlib_bits_per_byte': 2.75,
  'sample': {'prompt': 'def f(x):', 'continuation': '<script>alert(1)</script> & more'},
}


def train_line(step: int, layers: dict[str, list[list[float]]], **overrides: Any) -> dict[str, Any]:
  """A train line; `layers` maps a layer's path to its loads, [repeats, E]."""
  line = {'step': step, 'split': 'train', 'loss': 5 - step / 100, 'bits_per_byte': 6 - step / 100}
  line |= {'step_seconds': 0.4, 'tokens_per_second': 20_000.0}
  for path, loads in layers.items():
    line |= {f'{path}/expert_load': loads, f'{path}/dropped_choices': [0.25] * len(loads)}
    line |= {f'{path}/router_entropy': [0.5] * len(loads)}
  return line | overrides


def write_run(folder: Path, lines: Sequence[dict | str], summary: dict | None = None, config: str = '') -> Path:
  """Writes a MODEL_DIR; a line given as text is written as it is."""
  folder.mkdir(parents=True)
  text = ''.join(line if isinstance(line, str) else json.dumps(line) + '\n' for line in lines)
  (folder / 'metrics.jsonl').write_text(text)
  if summary is not None:
    (folder / 'summary.json').write_text(json.dumps(summary))
  if config:
    (folder / 'config.gin').write_text(config)
  return folder


SPARSE = {'stack_0/moe': [[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]]}
ENCODER_DECODER = {'decoder/stack_0/moe': [[0.75, 0.25]], 'encoder/stack_0/moe': [[0.1, 0.2, 0.3, 0.4]]}


@pytest.fixture
def quickstart(tmp_path: Path) -> Path:
  lines = [train_line(step, SPARSE) for step in range(10, 210, 10)]
  loads = [[0.5, 0.5, 0, 0]] * 2
  lines.append({'step': 200, 'split': 'validation', 'bits_per_byte': 2.5, 'stack_0/moe/expert_load': loads})
  return write_run(tmp_path / 'quickstart', lines, SUMMARY, config='NUM_EXPERTS = 4\n')


def test_torn_lines_are_skipped_and_the_later_of_two_steps_wins(tmp_path: Path):
  lines: list[dict | str] = [train_line(20, {}, loss=2.0), train_line(10, {}, loss=3.0)]
  lines += ['{"step": 3', train_line(30, {}, loss=9.0)]
  lines += [train_line(20, {}, loss=1.0), '{"step": 40, "split": "train", "lo']
  run = load_run(write_run(tmp_path / 'run', lines))
  loss = curve(run, 'loss')
  np.testing.assert_array_equal(loss.steps, [10, 20])  # step 30 was glued to the torn line before it
  np.testing.assert_array_equal(loss.values, [3.0, 1.0])


def test_not_a_number_is_a_gap(tmp_path: Path):
  lines = [train_line(10, SPARSE, loss=4.0), train_line(20, SPARSE, loss=np.inf), train_line(30, SPARSE, loss=np.nan)]
  folder = write_run(tmp_path / 'run', [*lines, train_line(40, SPARSE, loss=None, bits_per_byte=np.nan)])
  loss = curve(load_run(folder), 'loss')
  np.testing.assert_array_equal(np.isfinite(loss.values), [True, False, False, False])
  assert loss.last == loss.median == 4.0
  assert 'the last training loss of run is not finite' in report([folder]).read_text()


def test_steps_of_another_shape_are_left_out(tmp_path: Path):
  lines = [train_line(10, SPARSE), train_line(20, {'stack_0/moe': [[0.5, 0.5]]})]
  (load,) = layer_curves(load_run(write_run(tmp_path / 'run', lines)), 'expert_load')
  np.testing.assert_array_equal(load.steps, [20])


def test_loads_are_multiples_of_the_uniform_share(tmp_path: Path):
  names, matrix = expert_load_matrix(load_run(write_run(tmp_path / 'run', [train_line(10, SPARSE)])))
  assert names == ['stack_0 · moe · 0', 'stack_0 · moe · 1']
  np.testing.assert_allclose(matrix, [[2.8, 0.4, 0.4, 0.4], [1, 1, 1, 1]])


def test_loads_of_validation_come_before_those_of_training(quickstart: Path):
  np.testing.assert_allclose(expert_load_matrix(load_run(quickstart))[1], [[2, 2, 0, 0]] * 2)


def test_encoder_and_decoder_may_differ_in_experts(tmp_path: Path):
  folder = write_run(tmp_path / 'run', [train_line(10, ENCODER_DECODER), train_line(20, ENCODER_DECODER)])
  names, matrix = expert_load_matrix(load_run(folder))
  assert names == ['encoder · stack_0 · moe · 0', 'decoder · stack_0 · moe · 0']
  np.testing.assert_allclose(matrix, [[0.4, 0.8, 1.2, 1.6], [1.5, 0.5, np.nan, np.nan]])
  assert 'encoder · stack_0 · moe · 0' in report([folder]).read_text()


def test_key_figures_prefer_the_summary(tmp_path: Path, quickstart: Path):
  figures = key_figures(load_run(quickstart))
  assert (figures['validation_bits_per_byte'], figures['step'], figures['dropped']) == (2.125, 200, 25.0)
  validation = {'step': 10, 'split': 'validation', 'bits_per_byte': 2.5}
  figures = key_figures(load_run(write_run(tmp_path / 'run', [train_line(10, {}), validation])))
  assert (figures['validation_bits_per_byte'], figures['busiest'], figures['dropped']) == (2.5, None, None)


def test_spread_labels_are_apart_and_far_ones_stay():
  np.testing.assert_allclose(np.diff(spread([1.0, 1.0, 1.0], 0.5)), 0.5)
  np.testing.assert_allclose(spread([1.0, 2.0, 4.0], 0.5), [1.0, 2.0, 4.0])
  assert spread([], 0.5).size == 0


def test_page_is_self_contained_and_tells_the_numbers(quickstart: Path):
  path = report([str(quickstart)])
  page = path.read_text()
  assert path == quickstart / 'report.html' and len(page) < 1_500_000
  assert not re.search(r'(src|href)\s*=\s*["\']?\s*(https?:|//)', page) and '@import' not in page
  assert not re.search(r'url\((?!#)', page)
  assert '#fe01' not in page and 'var(--run-0)' in page  # every placeholder colour became a variable
  for words in ('2.125', 'unigram 4.875', 'zlib -9 2.750', '24.8M', '9.9M active', '20k', '8 cpu', 'expert 8',
                'takes 2.0× its share', 'NUM_EXPERTS = 4', 'stack_0 · moe · 1'):  # fmt: skip
    assert words in page, words


def test_text_is_escaped(tmp_path: Path):
  layers = {'<b>&$x_1$/moe': [[0.6, 0.4]] * 2}
  lines = [train_line(10, layers), train_line(20, layers)]
  folder = write_run(tmp_path / 'a <i>run', lines, SUMMARY, config='<script>')
  page = report([folder]).read_text()
  assert not re.search('<(script|i|b)>', page)
  assert '&lt;script&gt;alert(1)&lt;/script&gt; &amp; more' in page
  assert '&lt;b&gt;&amp;$x_1$ · moe · 0' in page


def test_dense_run_has_no_routing(tmp_path: Path):
  page = report([write_run(tmp_path / 'dense', [train_line(10, {}), train_line(20, {})])]).read_text()
  assert '<h2>Learning' in page and '<h2>Routing' not in page


def test_one_logged_step_is_enough(tmp_path: Path):
  assert 'Busiest expert' in report([write_run(tmp_path / 'run', [train_line(10, SPARSE)])]).read_text()


def test_several_runs_are_compared(tmp_path: Path, quickstart: Path):
  dense = write_run(tmp_path / 'dense', [train_line(10, {}), train_line(20, {})], {'validation_bits_per_byte': 2.0})
  page = report([quickstart, dense], output=tmp_path / 'pages' / 'both.html').read_text()
  assert page.count('<svg') == 7  # loss, one heat map, three of routing, two of speed
  assert 'class="best">2.000' in page and '>2.125' in page
  assert report([quickstart, dense]) == tmp_path / 'report.html'


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path):
  folders = [write_run(tmp_path / parent / 'run', [train_line(10, {})]) for parent in 'ab']
  page = report(folders, output=tmp_path / 'both.html').read_text()
  assert all(str(folder) in page for folder in folders)


@pytest.mark.parametrize('content', [None, '', 'not json\n'])
def test_without_metrics_the_error_says_what_to_do(tmp_path: Path, content: str | None):
  if content is not None:
    (tmp_path / 'metrics.jsonl').write_text(content)
  with pytest.raises(ConfigError, match=r'metrics\.jsonl holds no metrics: train first'):
    report([tmp_path])
