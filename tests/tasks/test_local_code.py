import numpy as np
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


def shelves(names):
  return '\n'.join(f'def {name}(self):\n  return self.shelf_{name}.find_the_last_book_of({name})\n' for name in names)


def test_how_a_function_goes_on_is_among_how_others_do(tmp_path):
  names = ['north', 'south', 'east', 'west', 'heaven']
  (tmp_path / 'shelf.py').write_text(shelves(names))
  questions = list(local_code.next_texts(str(tmp_path / 'shelf.py')))
  assert len(questions) == 5
  for name, question in zip(names, questions, strict=True):
    source = shelves([name]).rstrip()
    right = question['choices'][question['worth'].index(1)]
    assert source.startswith(question['inputs'] + right) and len(question['inputs']) == len(source) // 2
    wrong = set(question['choices']) - {right}
    assert len(wrong) == 3 and sum(question['worth']) == 1 and not any(piece in source for piece in wrong)
    assert all(len(piece) == local_code.PIECE and piece in shelves(names) for piece in wrong)


def test_nothing_stands_between_a_text_and_how_it_goes_on(tmp_path, monkeypatch):
  for number in range(40):
    (tmp_path / f'{number}.py').write_text(shelves(['north', 'south', 'east', 'west']))
  monkeypatch.setenv('LOCAL_TEXT_GLOB', f'{tmp_path}/*.py')
  task = seqio.TaskRegistry.get('local_next_text_score_eval')
  rows = list(task.get_dataset({'inputs': 8, 'targets': 64}, 'validation', shuffle=False).as_numpy_iterator())
  assert rows and all(1 not in row['inputs'] and 1 not in row['targets'] for row in rows)
  assert len(rows) == 4 * sum(row['worth'] for row in rows)
  for row in rows:
    if row['worth']:  # of what is before, the end
      text = bytes((np.concatenate([row['inputs'], row['targets']]) - 3).tolist()).decode()
      assert len(row['inputs']) == 8 and text in shelves(['north', 'south', 'east', 'west'])


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
  assert len(local_code.LocalCode(local_code.next_texts).examples('validation')) > 300
