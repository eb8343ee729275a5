import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import seqio
import tensorflow as tf

from moe_jax.types import ConfigError
from tasks import preprocessors

SIZE = 359
_SEED = tf.TensorSpec([2], tf.int32)
FEATURES = {name: seqio.Feature(seqio.ByteVocabulary(extra_ids=100)) for name in ('inputs', 'targets')}


def _documents(*documents):
  dataset = tf.data.Dataset.from_generator(lambda: documents, output_signature=tf.TensorSpec([None], tf.int32))
  return dataset.map(lambda tokens: {'targets': tokens})


def _corrupted(documents, inputs=64, targets=64, seed=0):
  with seqio.map_seed_manager(seed):
    dataset = preprocessors.corrupt_spans(_documents(*documents), {'inputs': inputs, 'targets': targets}, FEATURES)
  return list(dataset.as_numpy_iterator())


def _uncorrupt(inputs, targets):
  """Puts each span of the targets back where its sentinel stands in the inputs."""
  spans, tokens = {}, []
  for token in targets:
    if token >= SIZE - 100:
      span = spans[token] = []
    else:
      span.append(token)
  for token in inputs:
    tokens += spans.pop(token) if token in spans else [token]
  return tokens


def test_chunks_of_a_document_end_in_a_short_one():
  chunks = preprocessors.chunk_targets(_documents(range(1, 11), range(20, 24)), {'targets': 4})
  chunks = sorted(chunk['targets'].tolist() for chunk in chunks.as_numpy_iterator())
  assert chunks == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10], [20, 21, 22, 23]]


def test_lengths_are_those_of_t5():
  assert preprocessors.uncorrupted_length(512) == 568
  assert preprocessors.corrupted_lengths(568) == (512, 114)


@pytest.mark.parametrize('inputs_length', [8, 32, 100, 256, 511, 1024])
def test_a_full_chunk_fills_the_inputs(inputs_length):
  assert preprocessors.corrupted_lengths(preprocessors.uncorrupted_length(inputs_length))[0] == inputs_length


def test_sentinels_count_down_from_the_top():
  tokens = tf.constant([10, 11, 12, 13, 14, 15, 16])
  mask = tf.constant([0, 0, 1, 1, 0, 0, 1]) == 1
  inputs = preprocessors.sentinels_for_runs(tokens, mask, SIZE)
  targets = preprocessors.sentinels_for_runs(tokens, ~mask, SIZE)
  assert inputs.numpy().tolist() == [10, 11, 358, 14, 15, 357]
  assert targets.numpy().tolist() == [358, 12, 13, 357, 16]


_noise_mask = tf.function(
  preprocessors.noise_mask, input_signature=[tf.TensorSpec([], tf.int32)] * 3 + [(_SEED, _SEED)]
)


@hypothesis.given(st.integers(2, 400), st.integers(0, 2**31 - 1))
def test_noise_is_as_much_and_in_as_many_spans_as_it_should(length, seed):
  noise, spans = preprocessors.span_counts(length)
  mask = _noise_mask(length, noise, spans, ([seed, 1], [seed, 2])).numpy()
  assert len(mask) == length
  assert mask.sum() == noise
  assert not mask[0]
  assert (mask[1:] & ~mask[:-1]).sum() == spans
  assert noise == 1 or abs(noise - 0.15 * length) <= 0.51
  assert spans == 1 or abs(spans - noise / 3) <= 0.51


def test_every_partition_is_equally_likely():
  seeds = tf.data.Dataset.range(3000).map(lambda i: preprocessors._random_partition(5, 3, tf.stack([i, 7])))
  partitions, counts = np.unique(list(seeds.as_numpy_iterator()), axis=0, return_counts=True)
  assert partitions.tolist() == [[1, 1, 3], [1, 2, 2], [1, 3, 1], [2, 1, 2], [2, 2, 1], [3, 1, 1]]
  assert abs(counts - 500).max() < 100


def test_inputs_and_targets_make_the_document_again():
  document = np.random.default_rng(0).integers(3, 259, 1000).astype(np.int32)
  pairs = _corrupted([document], inputs=63, targets=20)
  assert [len(pair['inputs']) for pair in pairs[:-1]] == [62] * (len(pairs) - 1)  # and one for EOS
  assert max(len(pair['targets']) for pair in pairs) < 20
  assert [token for pair in pairs for token in _uncorrupt(**pair)] == document.tolist()
  noise = sum((pair['targets'] < SIZE - 100).sum() for pair in pairs)
  assert abs(noise / 1000 - 0.15) < 0.01


def test_seeds_draw_the_spans():
  document = np.arange(3, 203, dtype=np.int32)
  first, again, other = (_corrupted([document], seed=seed) for seed in (0, 0, 7))
  np.testing.assert_equal(first, again)
  assert any(len(a['inputs']) != len(b['inputs']) or (a['inputs'] != b['inputs']).any() for a, b in zip(first, other))
  assert not np.array_equal(first[0]['inputs'] >= 259, first[1]['inputs'] >= 259)  # nor are chunks corrupted alike


def test_a_document_of_one_token_survives():
  (pair,) = _corrupted([np.array([42], np.int32)])
  assert _uncorrupt(**pair) == [42]


def test_lengths_that_cannot_be_are_refused():
  with pytest.raises(ConfigError, match="come with 114 targets, more than 100: raise 'targets'"):
    _corrupted([], inputs=512, targets=100)
  with pytest.raises(ConfigError, match='114 corrupted spans and the vocabulary only 100 sentinels'):
    _corrupted([], inputs=2048, targets=1024)
