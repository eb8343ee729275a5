import functools
import os
import pathlib
import types

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import data
from moe_jax.types import ConfigError
from tasks import local_text

TASKS = {
  'local_text_lm': ('decoder_only', {'targets': 32}),
  'local_text_span_corruption': ('encoder_decoder', {'inputs': 32, 'targets': 16}),
}

MODULES = ('tasks.local_text',)


@pytest.fixture(autouse=True)
def documents(tmp_path, monkeypatch):
  """Forty documents of 1 to 79 bytes."""
  (tmp_path / 'text').mkdir()
  texts = [bytes([65 + number]) * (2 * number + 1) for number in range(40)]
  for number, text in enumerate(texts):
    (tmp_path / 'text' / f'{number}').write_bytes(text)
  monkeypatch.setenv('LOCAL_TEXT_GLOB', f'{tmp_path}/text/*')
  return texts


@pytest.fixture
def rows(mesh):
  return NamedSharding(mesh(data=2, expert=4), PartitionSpec(('data', 'expert')))


@pytest.fixture
def batches(rows):
  def make(task='local_text_lm', batch_size=8, split='train', **choices):
    converter, lengths = TASKS[task]
    return data.batches(
      task, lengths, batch_size, split, converter=converter, sharding=rows, **{'modules': MODULES, **choices}
    )

  return make


def _take(iterator, count):
  return [jax.device_get(next(iterator)) for _ in range(count)]


def _spec(batch):
  return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}


def _equal(a, b):
  return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize('pack', [True, False])
@pytest.mark.parametrize('task', TASKS)
def test_batches_are_as_specified_and_consistent(batches, rows, task, pack):
  batch = next(batches(task, batch_size=64, pack=pack))
  converter, lengths = TASKS[task]
  assert _spec(batch) == data.batch_spec(lengths, 64, converter)
  assert all(x.sharding == rows and x.addressable_data(0).shape[0] == 8 for x in batch.values())
  batch = jax.device_get(batch)
  sides = {'decoder': 'decoder_target_tokens', 'encoder': 'encoder_input_tokens'}
  for side, real in ((side, batch[tokens] > 0) for side, tokens in sides.items() if tokens in batch):
    segments, positions = batch[f'{side}_segment_ids'], batch[f'{side}_positions']
    np.testing.assert_array_equal(segments > 0, real)
    begins = np.diff(segments, axis=1, prepend=0) > 0
    for row in range(64):
      np.testing.assert_array_equal((positions[row] == 0)[real[row]], begins[row][real[row]])
      np.testing.assert_array_equal(np.diff(positions[row])[real[row, 1:] & ~begins[row, 1:]], 1)
    assert (segments.max() > 1) == pack
  real = batch['decoder_target_tokens'] > 0
  np.testing.assert_array_equal(batch['decoder_loss_weights'], real)
  shifted = np.roll(batch['decoder_target_tokens'], 1, axis=1) * (batch['decoder_positions'] > 0)
  np.testing.assert_array_equal(batch['decoder_input_tokens'][real], shifted[real])


def test_a_prefix_is_read_and_only_targets_are_learned(rows):
  lengths = {'inputs': 32, 'targets': 16}
  batch = next(
    data.batches(
      'local_text_span_corruption', lengths, 8, 'train', converter='decoder_only', sharding=rows, modules=MODULES
    )
  )
  assert _spec(batch) == data.batch_spec(lengths, 8, 'decoder_only')
  assert 0 < np.sum(batch['decoder_loss_weights']) < np.sum(batch['decoder_segment_ids'] > 0)


@pytest.mark.parametrize('pack', [True, False])
def test_every_token_names_the_domain_of_its_file(rows, tmp_path, monkeypatch, pack):
  """Folders hold texts of one letter each; the files of a folder have the same domain."""
  expected = {}
  for number in range(12):
    path = tmp_path / 'domains' / f'folder_{number}' / 'text'
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes([65 + number]) * 40)
    expected[65 + number + 3] = local_text.domain(os.fsencode(path))
  monkeypatch.setenv('LOCAL_TEXT_GLOB', f'{tmp_path}/domains/*/text')
  lengths = {'targets': 32, 'task_ids': 32}
  read = functools.partial(data.batches, 'local_text_domains', converter='decoder_only', modules=MODULES, sharding=rows)
  batch = jax.device_get(next(read(lengths, 8, 'train', pack=pack)))
  assert _spec(batch) == data.batch_spec(lengths, 8, 'decoder_only')
  tokens, tasks = batch['decoder_target_tokens'], batch['decoder_task_ids']
  np.testing.assert_array_equal(tasks > 0, tokens > 0)
  for token, task in expected.items():
    assert np.all(tasks[tokens == token] == task)
  assert len(set(expected.values())) > 1
  with pytest.raises(ConfigError, match='of the same length'):
    read({'targets': 32, 'task_ids': 16}, 8, 'train')


def test_a_seed_decides_the_batches(batches):
  first, again, other = (_take(batches('local_text_span_corruption', seed=seed), 3) for seed in (0, 0, 1))
  assert _equal(first, again)
  assert not _equal(first, other)


def test_restored_batches_go_on_to_the_bit(batches, tmp_path):
  iterator = batches('local_text_span_corruption', seed=3)
  _take(iterator, 2)
  iterator.save(str(tmp_path / 'place'))
  expected = _take(iterator, 3)
  iterator.restore(str(tmp_path / 'place'))
  assert _equal(_take(iterator, 3), expected)
  fresh = batches('local_text_span_corruption', seed=3)
  fresh.restore(str(tmp_path / 'place'))
  assert _equal(_take(fresh, 3), expected)


def test_a_place_that_is_missing_damaged_or_elsewhere_is_refused(batches, tmp_path):
  place = str(tmp_path / 'place')
  iterator = batches()
  with pytest.raises(ConfigError, match='is missing or damaged'):
    iterator.restore(place)
  iterator.save(place)
  with pytest.raises(ConfigError, match='a place in other data: train of local_text_lm'):
    batches(seed=1).restore(place)
  (file,) = tmp_path.glob('place*data*')
  pathlib.Path(file).write_bytes(file.read_bytes()[:100])
  with pytest.raises(ConfigError, match='is missing or damaged'):
    iterator.restore(place)


def test_one_epoch_has_every_token_once_and_is_filled_up(batches, documents):
  tokens = []
  for split in ('train', 'validation'):
    for batch in batches(split=split, num_epochs=1):
      assert batch['decoder_target_tokens'].shape == (8, 32)
      tokens += batch['decoder_target_tokens'][batch['decoder_loss_weights'] > 0].tolist()
  assert sorted(tokens) == sorted([byte + 3 for byte in b''.join(documents)] + [1] * len(documents))


def test_a_host_without_data_goes_on_while_another_has_some(batches, monkeypatch):
  more = iter([True, True, False])
  monkeypatch.setattr(data, '_on_any_host', lambda here: next(more))
  full, empty = list(batches(split='validation', batch_size=32, num_epochs=1))
  assert np.sum(full['decoder_loss_weights']) > 0
  assert not any(np.any(x) for x in empty.values())


def test_shards_have_different_rows_and_together_all(documents):
  def tokens(index, count):
    shard = seqio.ShardInfo(index, count)
    order = {'shuffle': True, 'num_epochs': 1, 'seed': 0}
    rows = data._examples(shard, 'local_text_lm', {'targets': 32}, 'train', 'decoder_only', **order)
    return {token for row in rows.as_numpy_iterator() for token in row['decoder_target_tokens'].tolist() if token > 1}

  first, second = tokens(0, 2), tokens(1, 2)  # each document is one letter, repeated
  assert first and second and not first & second
  assert first | second == tokens(0, 1)


@pytest.mark.parametrize(
  ('held', 'parts', 'read', 'written'),  # of each host: the quarters of the rows that its devices hold, from and to
  [
    ([[(0, 1), (1, 2)], [(2, 3), (3, 4)]], 2, [[0], [1]], [[0], [1]]),
    ([[(0, 1), (2, 3)], [(1, 2), (3, 4)]], 2, [[0, 1], [0, 1]], [[0, 1], []]),  # both need both, and the first writes
    ([[(0, 2)], [(2, 4)], [(0, 2)], [(2, 4)]], 2, [[0], [1], [0], [1]], [[0], [1], [], []]),  # 0 and 2 share rows
    ([[(0, 4)], [(0, 4)]], 1, [[0], [0]], [[0], []]),  # no device splits rows
  ],
)
def test_hosts_read_the_shards_whose_rows_they_hold(monkeypatch, held, parts, read, written):
  class Device:
    def __init__(self, host):
      self.process_index = host

  devices = [(Device(host), quarters) for host, of_host in enumerate(held) for quarters in of_host]

  def rows_of(shape):
    return {device: (slice(*(q * shape[0] // 4 for q in quarters)), slice(None)) for device, quarters in devices}

  sharding = types.SimpleNamespace(num_devices=len(devices), devices_indices_map=rows_of)
  assert data._parts(sharding) == parts
  spec = {'x': jax.ShapeDtypeStruct((8, 1), 'int32')}
  for host, (reads, writes) in enumerate(zip(read, written, strict=True)):
    monkeypatch.setattr(jax, 'process_index', lambda host=host: host)
    batches = data.BatchIterator(lambda info: tf.data.Dataset.range(1), parts, spec, sharding, finite=False, origin='')
    assert (sorted(batches._iterators), batches._writes) == (reads, writes)


def test_as_many_shards_give_the_same_batches_and_places_whatever_reads_them(rows, tmp_path):
  """Here one host reads what two would: two shards, each the rows of half a batch, as each would have them alone."""
  wish = {
    'task': 'local_text_lm', 'lengths': {'targets': 32}, 'batch_size': 16, 'split': 'train',
    'converter': 'decoder_only', 'sharding': rows, 'vocab_size': 384, 'modules': MODULES,
  }  # fmt: skip
  both = data.batches(**wish, num_shards=2)
  first = [jax.device_get(next(both)) for _ in range(3)]
  both.save(str(tmp_path / 'place'))
  expected = [jax.device_get(next(both)) for _ in range(3)]
  for index in range(2):
    info = seqio.ShardInfo(index, 2)
    order = {'shuffle': True, 'num_epochs': None, 'seed': 0}
    shard = data._examples(info, 'local_text_lm', {'targets': 32}, 'train', 'decoder_only', **order).batch(8)
    for batch, alone in zip(first, shard.as_numpy_iterator()):
      np.testing.assert_array_equal(
        batch['decoder_target_tokens'][8 * index : 8 * index + 8], alone['decoder_target_tokens']
      )
  other = data.batches(**wish)  # of one shard, until it finds a place in two
  other.restore(str(tmp_path / 'place'))
  for batch in expected:
    actual = jax.device_get(next(other))
    assert actual.keys() == batch.keys()
    for name in batch:
      np.testing.assert_array_equal(actual[name], batch[name])
  with pytest.raises(ConfigError, match='does not divide over DATA_SHARDS=3'):
    data.batches(**wish, num_shards=3)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'task': 'local_txt_lm'}, "No task 'local_txt_lm' in tasks.local_text: did you mean 'local_text_lm'?"),
    ({'modules': ('tasks.nowhere',)}, "TASK_MODULES names 'tasks.nowhere', which cannot be imported"),
    ({'split': 'test'}, "local_text_lm has no split 'test': choose among train, validation"),
    ({'converter': 'encoder'}, "No converter 'encoder': choose among decoder_only, encoder_decoder"),
    ({'converter': 'encoder_decoder'}, 'do not suit a model that is encoder_decoder'),
    ({'lengths': {'inputs': 32, 'targets': 32}}, 'do not suit .* local_text_lm, which has targets'),
    ({'lengths': {}}, 'do not suit'),
    ({'vocab_size': 256}, 'VOCAB_SIZE=256 is less than the 359 token ids of local_text_lm'),
    ({'batch_size': 12}, 'BATCH_SIZE=12 does not divide over 8 devices: make it a multiple of 8'),
  ],
)
def test_wishes_that_cannot_be_met_are_refused_in_one_line(rows, change, message):
  wish = {
    'task': 'local_text_lm', 'lengths': {'targets': 32}, 'batch_size': 8, 'split': 'train', 'converter': 'decoder_only',
    'sharding': rows, 'vocab_size': 384, 'modules': MODULES,
  }  # fmt: skip
  data.check(**wish)
  with pytest.raises(ConfigError, match=message) as error:
    data.batches(**wish | change)
  assert '\n' not in str(error.value)


def test_tokens_become_text_and_padding_none():
  vocabulary = data.vocabulary('local_text_span_corruption', MODULES)
  assert vocabulary.vocab_size == 359
  assert data.text_of([*vocabulary.encode('naïve'), 358, 1, 100, 0], vocabulary) == 'naïve<1>'


def test_tokens_as_text_to_look_at():
  vocabulary = seqio.ByteVocabulary(extra_ids=2)
  texts = data.token_texts(vocabulary)
  assert len(texts) == vocabulary.vocab_size and texts[:3] == ('<id 0>', '<id 1>', '<id 2>')
  assert (texts[3 + ord('a')], texts[3 + ord(' ')], texts[3 + 0xC3], texts[-2:]) == ('a', ' ', '\\xc3', ('<2>', '<1>'))
