"""Twins of tasks with worked examples in front: what they say, and what they may not."""

import collections
import importlib
import json

import pytest
import seqio

from moe_jax.types import ConfigError
from tasks import big_bench, few_shot, json_lines, multiple_choice, upstream  # noqa: F401
from tasks.metrics import Grouped

LENGTHS = {'inputs': 1000, 'targets': 40}


@pytest.fixture
def lines(tmp_path, monkeypatch):
  """`lines(train=[...], validation=[...])` writes JSON lines."""

  def write(**splits):
    for split, found in splits.items():
      name = 'mine_validation.jsonl' if split == 'validation' else 'mine.jsonl'
      (tmp_path / name).write_text(''.join(json.dumps(line) + '\n' for line in found))
    monkeypatch.setenv('JSON_LINES_GLOB', f'{tmp_path}/*.jsonl')

  return write


def asked(name, split='validation', lengths=None, shuffle=False):
  """inputs and targets of a task, as text."""
  dataset = seqio.TaskRegistry.get(name).get_dataset(lengths or LENGTHS, split, shuffle=shuffle)
  texts = [[row[part] for part in ('inputs', 'targets')] for row in dataset.as_numpy_iterator()]
  return [tuple(bytes(int(t) - 3 for t in text if t > 1).decode() for text in pair) for pair in texts]


def questions(number, choices=('yes', 'no')):
  return [{'inputs': f'{i} is even?', 'targets': choices[i % 2], 'choices': list(choices)} for i in range(number)]


def test_a_prompt_is_what_a_person_would_write(lines):
  few_shot.add_twins(1)
  train = next(q for q in questions(50) if json_lines._split('mine.jsonl', q) == 'train')
  other = next(q for q in questions(50)[::-1] if json_lines._split('mine.jsonl', q) == 'train')
  lines(train=[train, other], validation=[{**other, 'inputs': 'Is 7 odd?\n', 'targets': 'yes'}, train])
  found = asked('json_lines_score_eval_1_shot')
  assert [targets for _, targets in found] == ['yes', 'no'] * 2
  assert len({inputs for inputs, _ in found[:2]}) == 1, 'all choices of a question are asked alike'
  worked = [f'{line["inputs"]} {line["targets"]}\n\n' for line in (train, other)]
  assert found[0][0] in [f'{text}Is 7 odd?\n' for text in worked]
  # The very question is in the training data, so there is one to draw; a blank comes before the answer.
  assert found[2][0] == f'{worked[1]}{train["inputs"]}'
  assert asked('json_lines_1_shot')[1] == (found[2][0], train['targets']), 'and so of answers that are written'


def test_questions_without_training_data_teach_each_other_and_never_themselves(lines):
  few_shot.add_twins(3)
  lines(validation=questions(12))
  found = asked('json_lines_score_eval_3_shot')
  right = {f'{q["inputs"]} {q["targets"]}' for q in questions(12)}
  used = collections.Counter()
  for (inputs, _), question in zip(found, [q for q in questions(12) for _ in q['choices']], strict=True):
    *worked, last = inputs.split('\n\n')
    assert last == question['inputs'] and len(set(worked)) == 3 and set(worked) <= right
    assert not any(text.startswith(last) for text in worked), 'no leak'
    used.update(worked)
  assert len(used) == 12, 'each question draws its own'
  # Whatever the order, the number of examples of a task, or the process.
  assert sorted(asked('json_lines_score_eval_3_shot', shuffle=True)) == sorted(found)


def test_more_examples_begin_with_the_fewer(lines):
  lines(validation=questions(9))
  for shots in (2, 4):
    few_shot.add_twins(shots)
  for (two, _), (four, _) in zip(asked('json_lines_2_shot'), asked('json_lines_4_shot'), strict=True):
    assert four.split('\n\n')[:2] == two.split('\n\n')[:2]


def test_of_a_long_prompt_the_end_is_kept(lines):
  few_shot.add_twins(2)
  lines(validation=questions(5))
  whole, cut = (asked('json_lines_2_shot', lengths={'inputs': n, 'targets': 8}) for n in (1000, 30))
  for (text, _), (end, _) in zip(whole, cut, strict=True):
    assert end == text[-29:], 'and one EOS'


def test_big_bench_says_its_instruction_once(tmp_path):
  """By hand: BIG-bench's form, with choices listed and its own separator."""
  content = {
    'task_prefix': 'Add.\n',
    'example_input_prefix': 'Sum: ',
    'example_output_prefix': '\nIs: ',
    'few_shot_example_separator': '\n--\n',
    'examples': [
      {'input': '1 + 1', 'target_scores': {'1': 0, '2': 1}},
      {'input': '2 + 1', 'target_scores': {'4': 0.25, '3': 0.75}},
    ],
  }
  (tmp_path / 'shots').mkdir()
  (tmp_path / 'shots' / 'task.json').write_text(json.dumps(content))
  if 'bigbench' in seqio.MixtureRegistry.names():
    seqio.MixtureRegistry.remove('bigbench')
  big_bench.register_big_bench(f'{tmp_path}/*/task.json')
  few_shot.add_twins(1)
  first = 'Add.\nSum: 2 + 1\n  choice: 4\n  choice: 3\nIs: 3\n--\nSum: 1 + 1\n  choice: 1\n  choice: 2\nIs: '
  second = 'Add.\nSum: 1 + 1\n  choice: 1\n  choice: 2\nIs: 2\n--\nSum: 2 + 1\n  choice: 4\n  choice: 3\nIs: '
  assert asked('bigbench_shots_1_shot') == [(first, '1'), (first, '2'), (second, '4'), (second, '3')]
  twin = seqio.TaskRegistry.get('bigbench_shots_1_shot')
  assert [metric.__name__ for metric in twin.score_metric_fns] == ['multiple_choice']
  rows = twin.get_dataset(LENGTHS, 'validation', shuffle=False).as_numpy_iterator()
  targets = [twin.postprocess_fn('', example=row, is_target=True) for row in rows]
  assert targets == [Grouped((0,), 0.0), Grouped((0,), 1.0), Grouped((1,), 0.25), Grouped((1,), 0.75)]
  assert 'bigbench_1_shot' in seqio.MixtureRegistry.names()


def test_who_has_twins_and_who_teaches():
  from tasks import sentinels  # noqa: F401

  few_shot.add_twins(1)
  names = seqio.TaskRegistry.names()
  assert not [name for name in names if name.endswith('_1_shot_1_shot') or name.endswith('sentinels_1_shot')]
  assert not [name for name in names if name.startswith(('c4', 'wikipedia')) and name.endswith('_shot')]
  twin = seqio.TaskRegistry.get('arc_easy_score_eval_1_shot')
  teacher = next(step.keywords['task'] for step in twin.preprocessors if 'task' in getattr(step, 'keywords', {}))
  assert teacher.name == 'arc_easy_train'
  tasks = {task.name for task in seqio.MixtureRegistry.get('arc_easy_1_shot').tasks}
  assert tasks == {'arc_easy_train_1_shot', 'arc_easy_score_eval_1_shot'}
  few_shot.add_twins(1)
  assert seqio.TaskRegistry.names() == names, 'once is enough'


def test_too_few_questions_and_what_is_no_number_are_refused(lines, monkeypatch):
  lines(validation=questions(4))
  few_shot.add_twins(4)
  with pytest.raises(ConfigError, match='SHOTS=4 wants more than the 4 questions that json_lines has: lower it'):
    asked('json_lines_4_shot')
  for bad in ('many', '0', '-1'):
    monkeypatch.setenv('SHOTS', bad)
    with pytest.raises(ConfigError, match='is no number of worked examples'):
      importlib.reload(few_shot)
  monkeypatch.setenv('SHOTS', '6')
  importlib.reload(few_shot)
  assert 'json_lines_6_shot' in seqio.TaskRegistry.names()
