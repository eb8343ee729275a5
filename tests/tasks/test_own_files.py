"""Tasks made of the user's own files, and vocabularies trained on them."""

import json
import pathlib

import pytest
import seqio

from moe_jax.data import token_bytes
from moe_jax.types import ConfigError
from tasks import big_bench, json_lines, train_vocabulary, vocabularies
from tasks.metrics import Grouped

LENGTHS = {'inputs': 200, 'targets': 40}
ARITHMETIC = {
  **{'name': 'arithmetic', 'task_prefix': 'Add.\n', 'example_input_prefix': 'Sum: ', 'example_output_prefix': '\nIs: '},
  'examples': [{'input': '1 + 1', 'target_scores': {'1': 0, '2': 1}}, {'input': '2 + 1', 'target_scores': {'3': 0.5}}],
}
WRITING = {'examples': [{'input': 'Say hi.', 'target': ['hi', 'Hi!']}, {'input': 'Say no.', 'target': 'no'}]}


def _text(tokens):
  return bytes(int(token) - 3 for token in tokens if token > 1).decode()


def _examples(name, split='validation'):
  return list(seqio.TaskRegistry.get(name).get_dataset(LENGTHS, split, shuffle=False).as_numpy_iterator())


# ---- JSON lines ------------------------------------------------------------------------------------------------------
@pytest.fixture
def write(tmp_path, monkeypatch):
  """`write(*lines)` makes them the lines of a validation file."""

  def write(*lines, name='validation.jsonl'):
    (tmp_path / name).write_text('\n'.join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    monkeypatch.setenv('JSON_LINES_GLOB', f'{tmp_path}/*.jsonl')

  return write


def test_lines_of_every_kind_are_examples(write):
  instance = {
    **{'id': 'task1-2', 'Definition': ['Answer', 'briefly.'], 'Positive Examples': []},
    'Instance': {'id': '2', 'input': 'Why?', 'output': ['So.', 'Thus.']},
  }
  write({'inputs': 'a', 'targets': 'b'}, '', instance, {'definition': 'Do.', 'input': 'x', 'output': 'y'})
  found = [(_text(e['inputs']), _text(e['targets']), e['references'].tolist()) for e in _examples('json_lines')]
  asked = 'Definition: {}\n\nNow complete the following example -\nInput: {}\nOutput: '
  assert found == [
    ('a', 'b', [b'b']),
    (asked.format('Answer briefly.', 'Why?'), 'So.', [b'So.', b'Thus.']),
    (asked.format('Do.', 'x'), 'y', [b'y']),
  ]
  task = seqio.TaskRegistry.get('json_lines')
  example = _examples('json_lines')[1]
  assert task.postprocess_fn('So.', example=example, is_target=True) == ['So.', 'Thus.']
  assert task.postprocess_fn('Thus.', example=example, is_target=False) == 'Thus.'


def test_choices_are_ranked(write):
  write(
    {'inputs': 'a', 'targets': 'b', 'choices': ['c', 'b']}, {'inputs': 'd', 'targets': 'e', 'choices': ['e', 'f', 'g']}
  )
  task, examples = seqio.TaskRegistry.get('json_lines_score_eval'), _examples('json_lines_score_eval')
  assert [_text(example['targets']) for example in examples] == ['c', 'b', 'e', 'f', 'g']
  targets = [task.postprocess_fn('', example=example, is_target=True) for example in examples]
  assert [target.value for target in targets] == [0, 1, 1, 0, 0]
  questions = [target.question for target in targets]
  assert questions == [questions[0]] * 2 + [questions[2]] * 3 and questions[0] != questions[2]


def test_one_line_in_twenty_is_for_validation_unless_a_file_says_so(write):
  write(*({'inputs': str(number), 'targets': 'x'} for number in range(1000)), name='mine.jsonl')
  train, validation = json_lines.read('train'), json_lines.read('validation')
  assert len(train) + len(validation) == 1000 and 25 < len(validation) < 85
  write({'inputs': 'more', 'targets': 'x'}, name='my_validation.jsonl')
  assert len(json_lines.read('validation')) == len(validation) + 1


@pytest.mark.parametrize(
  ('line', 'task', 'message'),
  [
    ('{"inputs": ', 'json_lines', r'validation.jsonl, line 1, is neither \{"inputs", "targets"\} nor'),
    ({'inputs': 'a'}, 'json_lines', 'line 1, is neither'),
    ({'inputs': 'a', 'targets': 3}, 'json_lines', 'line 1, is neither'),
    ('[1]', 'json_lines', 'line 1, is neither'),
    ('', 'json_lines', 'has no line for validation'),
    ({'inputs': 'a', 'targets': 'b', 'choices': ['c']}, 'json_lines_score_eval', "No choice of 'a' is right"),
  ],
)
def test_bad_lines_are_refused_in_one_line(write, line, task, message):
  write(line)
  with pytest.raises(ConfigError, match=message) as error:
    _examples(task)
  assert '\n' not in str(error.value)


# ---- BIG-bench -------------------------------------------------------------------------------------------------------
def test_tasks_of_big_bench_are_what_their_files_say(tmp_path):
  for name, content in (('sums', ARITHMETIC), ('writing', WRITING)):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'task.json').write_text(json.dumps(content))
  seqio.MixtureRegistry.remove('bigbench')  # of another test
  assert big_bench.register_big_bench(f'{tmp_path}/*/task.json') == ['bigbench_sums', 'bigbench_writing']

  task, examples = seqio.TaskRegistry.get('bigbench_sums'), _examples('bigbench_sums')
  assert [(_text(example['inputs']), _text(example['targets'])) for example in examples] == [
    ('Add.\nSum: 1 + 1\n  choice: 1\n  choice: 2\nIs: ', '1'),
    ('Add.\nSum: 1 + 1\n  choice: 1\n  choice: 2\nIs: ', '2'),
    ('Add.\nSum: 2 + 1\n  choice: 3\nIs: ', '3'),
  ]
  targets = [task.postprocess_fn('', example=example, is_target=True) for example in examples]
  assert targets == [Grouped((0,), 0.0), Grouped((0,), 1.0), Grouped((1,), 0.5)]
  assert task.score_metric_fns and not task.predict_metric_fns

  task, examples = seqio.TaskRegistry.get('bigbench_writing'), _examples('bigbench_writing')
  assert [_text(example['inputs']) for example in examples] == ['\nQ: Say hi.\nA: ', '\nQ: Say no.\nA: ']
  assert task.postprocess_fn('', example=examples[0], is_target=True) == ['hi', 'Hi!']
  assert task.predict_metric_fns and not task.score_metric_fns
  assert {task.name for task in seqio.MixtureRegistry.get('bigbench').tasks} == {'bigbench_sums', 'bigbench_writing'}


def test_what_is_no_task_of_big_bench_is_refused(tmp_path):
  with pytest.raises(ConfigError, match='names no file'):
    big_bench.register_big_bench(f'{tmp_path}/*.json')
  for content in ('{"examples": []}', '[]', 'x'):
    (tmp_path / 'task.json').write_text(content)
    with pytest.raises(ConfigError, match=r'task\.json is no task of BIG-bench'):
      big_bench.register_big_bench(f'{tmp_path}/*.json')


# ---- Vocabularies ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def model(tmp_path_factory):
  """A SentencePiece of 500 pieces, trained on this repository's code."""
  folder, code = tmp_path_factory.mktemp('vocabulary'), pathlib.Path(__file__).parents[2] / 'moe_jax' / 'layers'
  assert train_vocabulary.main([f'--input={code}/*.py', f'--output={folder}/mine', '--size=500']) == 0
  return folder / 'mine.model'


def test_a_trained_vocabulary_suits_seqio_and_loses_nothing(model, monkeypatch):
  monkeypatch.setenv('VOCABULARY', str(model))
  vocabulary = vocabularies.vocabulary()
  assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
  assert vocabulary.vocab_size == 500 + vocabularies.SENTINELS
  text = 'self.attention(  x): naïve 漢字\t7\n'
  tokens = vocabulary.encode(text)
  assert vocabulary.decode(tokens) == text
  assert len(vocabulary.encode('attention')) < 5 and max(tokens) < 500
  assert vocabulary.encode_tf(text).numpy().tolist() == tokens
  assert vocabularies.features()['inputs'].vocabulary == vocabulary
  lengths = token_bytes(vocabulary)
  assert sum(lengths[token] for token in tokens) == len(text.encode()) + 1  # a blank is put in front
  assert len(lengths) == vocabulary.vocab_size and set(lengths[500:]) == {0} and lengths[:3] == (0, 0, 0)


def test_bytes_unless_a_file_is_named_that_is_there(monkeypatch, tmp_path):
  monkeypatch.delenv('VOCABULARY', raising=False)
  assert vocabularies.vocabulary().vocab_size == 359
  with pytest.raises(ConfigError, match='is no file: give a SentencePiece model'):
    vocabularies.vocabulary(str(tmp_path / 'nothing.model'))


def test_a_vocabulary_that_cannot_be_is_refused_in_one_line(tmp_path, capsys):
  (tmp_path / 'short.txt').write_text('a few words')
  for arguments, message in (
    (['--input=/nowhere/*.txt', '--output=x'], 'names no file'),
    ([f'--input={tmp_path}/*.txt', f'--output={tmp_path}/x', '--size=9000'], 'Vocabulary size too high'),
  ):
    assert train_vocabulary.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
