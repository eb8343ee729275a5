import itertools
import os
import sysconfig

import pytest
import seqio

from moe_jax.types import ConfigError
from tasks import local_text


@pytest.fixture
def corpus(tmp_path, monkeypatch):
  """`corpus(contents)` writes each to a file of its own and makes these the corpus: name -> bytes."""

  def write(contents):
    for number, content in enumerate(contents):
      (tmp_path / f'{number:03}.txt').write_bytes(content)
    monkeypatch.setenv('LOCAL_TEXT_GLOB', f'{tmp_path}/**/*.txt')
    return tmp_path

  return write


def _texts(split, shard=None, length=8):
  """The documents of a split as bytes, and how many chunks held them."""
  task = seqio.TaskRegistry.get('local_text_lm')
  dataset = task.get_dataset({'targets': length}, split, shuffle=False, shard_info=shard)
  chunks = [example['targets'].tolist() for example in dataset.as_numpy_iterator()]
  assert all(1 not in chunk[:-1] for chunk in chunks)
  return sorted(bytes(token - 3 for token in chunk if token != 1) for chunk in chunks if chunk != [1]), chunks


def test_default_is_the_standard_library(monkeypatch):
  monkeypatch.delenv('LOCAL_TEXT_GLOB', raising=False)
  train, validation = local_text.split_files('train'), local_text.split_files('validation')
  assert sysconfig.get_paths()['stdlib'] + '/os.py' in train + validation
  assert not [path for path in train + validation if 'site-packages' in path or not path.endswith('.py')]
  assert not set(train) & set(validation)
  assert 0.03 < len(validation) / len(train) < 0.08


def test_splits_stay_when_files_come_and_when_the_folder_moves(corpus, tmp_path, monkeypatch):
  corpus([b'text'] * 60)
  before = {split: set(local_text.split_files(split)) for split in ('train', 'validation')}
  corpus([b'text'] * 200)
  after = {split: set(local_text.split_files(split)) for split in ('train', 'validation')}
  assert before['validation'] and before['validation'] < after['validation'] and before['train'] < after['train']
  moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + '_moved'))
  monkeypatch.setenv('LOCAL_TEXT_GLOB', f'{moved}/*.txt')
  names = {os.path.basename(path) for path in local_text.split_files('validation')}
  assert names == {os.path.basename(path) for path in after['validation']}


def test_any_bytes_are_text_and_empty_files_are_none(corpus):
  documents = [bytes([255, 0, 128]), 'é'.encode('latin-1'), b'plain', bytes(range(248, 256))]
  folder = corpus([*documents, b''])
  (folder / 'gone.txt').symlink_to(folder / 'nowhere')
  (folder / 'folder.txt').mkdir()
  texts = _texts('train')[0] + _texts('validation')[0]
  assert sorted(texts) == sorted(documents)


def test_end_of_text_ends_documents_not_chunks(corpus):
  corpus([b'abcdefghij'] * 2)
  assert _texts('train', length=4)[1] == [list(b'defg'), list(b'hijk'), [*b'lm', 1]]  # byte + 3
  assert _texts('train', length=10)[1] == [list(b'defghijklm'), [1]]


def test_a_source_may_have_files_of_its_own(corpus, tmp_path):
  corpus([b'of the corpus'] * 4)
  (tmp_path / 'books').mkdir()
  for number in range(4):
    (tmp_path / 'books' / f'{number}').write_bytes(b'a book')
  source = local_text.LocalFiles(f'{tmp_path}/books/**')
  assert {example['text'] for example in source.get_dataset('train').as_numpy_iterator()} == {b'a book'}


def test_a_home_is_found(corpus, monkeypatch):
  monkeypatch.setenv('HOME', str(corpus([b'abc', b'defg'])))
  monkeypatch.setenv('LOCAL_TEXT_GLOB', '~/*.txt')
  assert len(local_text.split_files('train')) == len(local_text.split_files('validation')) == 1


@pytest.mark.parametrize(
  ('contents', 'message'),
  [
    ([], 'has no text to read: set LOCAL_TEXT_GLOB'),
    ([b'one'], 'is the only file, none is left to validate on'),
  ],
)
def test_too_few_files_are_refused_in_one_line(corpus, contents, message):
  corpus(contents)
  with pytest.raises(ConfigError, match=message) as error:
    _texts('train')
  assert '\n' not in str(error.value)


def test_hosts_read_different_files_and_together_all(corpus):
  documents = sorted(b'document %d' % number for number in range(12))
  corpus(documents)
  train, _ = _texts('train', length=32)
  shards = [_texts('train', seqio.ShardInfo(index, 3), length=32)[0] for index in range(3)]
  assert all(shards)
  assert sorted(itertools.chain(*shards)) == train
  with pytest.raises(ConfigError, match='1 validation files do not go round 2 hosts'):
    _texts('validation', seqio.ShardInfo(0, 2))


def test_every_epoch_has_an_order_of_its_own_and_a_seed_repeats_them(corpus):
  corpus([b'document %d' % number for number in range(20)])

  def epochs(seed):
    files = local_text.LocalFiles().get_dataset('train', shuffle=True, seed=seed).repeat(2)
    texts = [example['text'] for example in files.as_numpy_iterator()]
    return texts[: len(texts) // 2], texts[len(texts) // 2 :]

  first, second = epochs(0)
  assert first != second
  assert sorted(first) == sorted(second)
  assert epochs(0) == (first, second)
  assert epochs(1) != (first, second)
