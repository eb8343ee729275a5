import pytest
import seqio

from moe_jax.types import ConfigError
from tasks import local_code
from tasks.local_code import functions_of

SOURCE = '''
class Shelf:
  def put_back(self, book, *, quietly=False):
    """Puts a book
    back.

    No matter whose.
    """
    return self

  def __len__(self):
    """Books."""

async def closeAll(): pass
'''


def _text(tokens):
  assert tokens[-1] == 1
  return bytes(token - 3 for token in tokens[:-1]).decode()


@pytest.fixture
def library(tmp_path, monkeypatch):
  """Two packages of thirty modules each."""
  for package in ('email', 'xml'):
    (tmp_path / package).mkdir()
    for number in range(30):
      (tmp_path / package / f'{number}.py').write_text(f'{SOURCE}\ndef {package}_{number}():\n  """Of {package}."""\n')
  monkeypatch.setenv('LOCAL_TEXT_GLOB', f'{tmp_path}/**/*.py')


def test_functions_are_found_as_they_are_written(tmp_path):
  (tmp_path / 'shelf.py').write_text(SOURCE)
  (tmp_path / 'broken.py').write_text('print "hello"')
  (tmp_path / 'latin.py').write_bytes(b'x = "\xff"')
  functions = {function.name: function for function in functions_of(str(tmp_path / 'shelf.py'))}
  assert set(functions) == {'put_back', '__len__', 'closeAll'}
  put_back = functions['put_back']
  assert put_back.arguments == 'self, book, *, quietly=False'
  assert put_back.docstring == 'Puts a book back.'
  assert put_back.source.startswith('def put_back(') and put_back.source.endswith('\n  return self')
  assert functions_of(str(tmp_path / 'broken.py')) == functions_of(str(tmp_path / 'latin.py')) == ()


def test_a_docstring_is_to_be_named(library):
  task = seqio.TaskRegistry.get('local_docstring_name')
  dataset = task.get_dataset({'inputs': 80, 'targets': 16}, 'train', shuffle=False)
  pairs = {(_text(example['inputs']), _text(example['targets'])) for example in dataset.as_numpy_iterator()}
  assert ('name: (self, book, *, quietly=False) Puts a book back.', 'put_back') in pairs
  assert ('name: () Of xml.', 'xml_3') in pairs
  assert {target.partition('_')[0] for _, target in pairs} == {'put', 'xml', 'email'}


def test_a_source_tells_its_package(library):
  dataset = seqio.TaskRegistry.get('local_text_source').get_dataset({'inputs': 400, 'targets': 16}, 'train')
  pairs = {(_text(example['inputs']), _text(example['targets'])) for example in dataset.as_numpy_iterator()}
  assert len(pairs) == 2 and {target for _, target in pairs} == {'email', 'xml'}
  assert all(source.startswith('package: def put_back(self') for source, _ in pairs)


NEXT = """
def one(shelf):
  first = shelf.lowest()
  return first.books()

def two(shelf):
  if shelf is None:
    raise ValueError(shelf)
  return sorted(shelf.everything)

def three(shelf):
  last_of_all = shelf.uppermost
  return last_of_all
"""


def test_the_next_line_is_among_others_of_its_kind(tmp_path):
  (tmp_path / 'shelf.py').write_text(NEXT)
  questions = {question['inputs']: question for question in local_code.next_lines(str(tmp_path / 'shelf.py'))}
  one = questions['def one(shelf):\n']
  right = one['choices'][one['worth'].index(1)]
  assert right == '  first = shelf.lowest()' and sum(one['worth']) == 1 and len(set(one['choices'])) == 4
  own = {'  first = shelf.lowest()', '  return first.books()'}
  assert all(line.startswith('  ') and line[2] != ' ' for line in one['choices'])
  assert set(one['choices']) & own == {right}


def test_nothing_stands_between_a_text_and_its_next_line(tmp_path, monkeypatch):
  for number in range(40):
    (tmp_path / f'{number}.py').write_text(NEXT)
  monkeypatch.setenv('LOCAL_TEXT_GLOB', f'{tmp_path}/*.py')
  task = seqio.TaskRegistry.get('local_next_line_score_eval')
  dataset = task.get_dataset({'inputs': 160, 'targets': 96}, 'validation', shuffle=False)
  rows = list(dataset.as_numpy_iterator())
  assert rows and all(1 not in row['inputs'] and 1 not in row['targets'] for row in rows)
  assert len(rows) == 4 * sum(row['worth'] for row in rows)


def test_hosts_share_examples_out(library):
  source = local_code.LocalCode(local_code.names_of_docstrings)
  whole = [str(example) for example in source.get_dataset('train', shuffle=False).as_numpy_iterator()]
  shards = [source.get_dataset('train', False, None, seqio.ShardInfo(i, 3)).as_numpy_iterator() for i in range(3)]
  assert sorted(str(example) for shard in shards for example in shard) == sorted(whole)
  assert len(whole) == source.num_input_examples('train')


def test_text_without_functions_is_refused_in_one_line(tmp_path, monkeypatch):
  for number in range(2):
    (tmp_path / f'{number}.txt').write_text('No code here.')
  monkeypatch.setenv('LOCAL_TEXT_GLOB', f'{tmp_path}/*.txt')
  with pytest.raises(ConfigError, match='No functions for train in these files: unset LOCAL_TEXT_GLOB'):
    seqio.TaskRegistry.get('local_docstring_name').get_dataset({'inputs': 8, 'targets': 8}, 'train')


def test_the_standard_library_has_examples_of_every_kind(monkeypatch):
  monkeypatch.delenv('LOCAL_TEXT_GLOB', raising=False)
  for split, at_least in (('train', 2000), ('validation', 100)):
    assert len(local_code.LocalCode(local_code.names_of_docstrings).examples(split)) > at_least
    sources = local_code.LocalCode(local_code.packages_of_sources).examples(split)
    assert len({example['targets'] for example in sources}) >= (7 if split == 'train' else 4)
  assert len(local_code.LocalCode(local_code.next_lines).examples('validation')) > 300
