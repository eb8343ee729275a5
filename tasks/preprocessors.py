"""What text tasks do to tokens beyond seqio's own preprocessors: cut documents into chunks, and T5's span corruption.

Span corruption (https://arxiv.org/abs/1910.10683, section 3.1.4) with two spans of noise, <a> and <b> being sentinels:

  tokens     Thank you for inviting me to your party last week
  inputs     Thank you <a> me to your party <b> EOS
  targets    <a> for inviting <b> last week EOS
"""

from collections.abc import Mapping

import seqio
import tensorflow as tf

from moe_jax.types import ConfigError

NOISE_DENSITY = 0.15
MEAN_SPAN_LENGTH = 3.0

# Text of 'inputs' and 'targets' -> tokens, each text cut to its length and EOS behind it; as T5's downstream tasks.
TO_TOKENS = (
  seqio.preprocessors.tokenize,
  seqio.CacheDatasetPlaceholder(),
  seqio.preprocessors.append_eos_after_trim,
)


def keep_end(
  dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None, output_features: Mapping[str, seqio.Feature]
) -> tf.data.Dataset:
  """Cuts tokens of 'inputs' off their beginning, and leaves room for the EOS if one is to come."""
  if not sequence_length:
    return dataset
  room = sequence_length['inputs'] - output_features['inputs'].add_eos
  return dataset.map(lambda example: {**example, 'inputs': example['inputs'][-room:]})


def chunk_targets(dataset: tf.data.Dataset, sequence_length: Mapping[str, int]) -> tf.data.Dataset:
  """Cuts 'targets' to the length of the feature; put it after EOS, so that only the end of a document says stop."""
  return _chunk(dataset, sequence_length['targets'])


def corrupt_spans(
  dataset: tf.data.Dataset, sequence_length: Mapping[str, int], output_features: Mapping[str, seqio.Feature]
) -> tf.data.Dataset:
  """'targets', whole documents -> 'inputs' and 'targets', corrupted chunks; both have room for the EOS to be appended.

  Raises:
    ConfigError: if the targets are too short for the spans taken out of the inputs, or the sentinels run out.
  """
  vocabulary = output_features['targets'].vocabulary
  inputs_length, targets_length = sequence_length['inputs'], sequence_length['targets']
  longest = uncorrupted_length(inputs_length)
  needed = corrupted_lengths(longest)[1]
  if needed > targets_length:
    raise ConfigError(
      f'{inputs_length} corrupted inputs come with {needed} targets, more than {targets_length}:'
      " raise 'targets' or lower 'inputs' in TASK_FEATURE_LENGTHS."
    )
  if span_counts(longest)[1] > vocabulary.extra_ids:
    raise ConfigError(
      f'{inputs_length} inputs have {span_counts(longest)[1]} corrupted spans and the vocabulary only'
      f" {vocabulary.extra_ids} sentinels: lower 'inputs' in TASK_FEATURE_LENGTHS."
    )
  counts = tf.constant([span_counts(max(length, 2)) for length in range(longest + 1)])

  @seqio.map_over_dataset(num_seeds=2)
  def corrupt(example, seeds):
    tokens = example['targets']
    noise, spans = tf.unstack(counts[tf.size(tokens)])
    mask = noise_mask(tf.maximum(tf.size(tokens), 2), noise, spans, seeds)[: tf.size(tokens)]
    return {
      'inputs': sentinels_for_runs(tokens, mask, vocabulary.vocab_size),
      'targets': sentinels_for_runs(tokens, ~mask, vocabulary.vocab_size),
    }

  return corrupt(_chunk(dataset, longest))


def split_prefix(dataset: tf.data.Dataset, sequence_length: Mapping[str, int]) -> tf.data.Dataset:
  """'targets', whole documents -> chunks cut in two at random: 'inputs', which may be empty, and the rest as 'targets'.

  Both have room for the EOS to be appended. T5's prefix language modeling (https://arxiv.org/abs/1910.10683, 3.2.3).
  """

  @seqio.map_over_dataset(num_seeds=1)
  def split(example, seed):
    tokens = example['targets']
    place = tf.random.stateless_uniform([], seed, 0, tf.maximum(tf.size(tokens), 1), tf.int32)
    return {'inputs': tokens[:place], 'targets': tokens[place:]}

  return split(_chunk(dataset, min(sequence_length['inputs'] - 1, sequence_length['targets'] - 1)))


@seqio.map_over_dataset
def name_task(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
  """Gives every token of 'targets' the number in 'task', int32[] from 1, as 'task_ids'; put it last."""
  task = tf.cast(example['task'], tf.int32)
  return {'targets': example['targets'], 'task_ids': tf.fill(tf.shape(example['targets']), task)}


def span_counts(length: int) -> tuple[int, int]:
  """How many of `length` tokens are noise, and in how many spans."""
  noise = min(max(round(length * NOISE_DENSITY), 1), length - 1)
  return noise, max(round(noise / MEAN_SPAN_LENGTH), 1)


def corrupted_lengths(length: int) -> tuple[int, int]:
  """Lengths of inputs and targets, EOS included, made of `length` tokens: every span leaves a sentinel in both."""
  noise, spans = span_counts(length)
  return length - noise + spans + 1, noise + spans + 1


def uncorrupted_length(inputs_length: int) -> int:
  """How many tokens corrupt to `inputs_length` tokens of input: 568 for 512, with 114 targets."""
  length = inputs_length - 1
  while corrupted_lengths(length + 1)[0] <= inputs_length:
    length += 1
  return length


def noise_mask(length: tf.Tensor, noise: tf.Tensor, spans: tf.Tensor, seeds: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
  """bool[length], `noise` of it true, in `spans` runs of random lengths; a run of false comes first.

  Args:
    length, noise, spans: int32[], with 1 <= spans <= noise and spans <= length - noise.
    seeds: two of int32[2].
  """
  kept_lengths = _random_partition(length - noise, spans, seeds[0])
  noise_lengths = _random_partition(noise, spans, seeds[1])
  run_lengths = tf.reshape(tf.stack([kept_lengths, noise_lengths], axis=1), [-1])
  return tf.repeat(tf.range(2 * spans) % 2 == 1, run_lengths)


def sentinels_for_runs(tokens: tf.Tensor, mask: tf.Tensor, vocab_size: int) -> tf.Tensor:
  """Puts one sentinel in place of each run of masked tokens: vocab_size - 1, then - 2, ... tokens, mask: [length]."""
  begins = mask & ~tf.concat([[False], mask[:-1]], 0)
  sentinels = vocab_size - tf.cumsum(tf.cast(begins, tokens.dtype))
  return tf.boolean_mask(tf.where(begins, sentinels, tokens), begins | ~mask)


def _random_partition(total: tf.Tensor, parts: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
  """int32[parts] of positive numbers that add up to `total`, all such lists equally likely."""
  cuts = seqio.utils.stateless_shuffle(tf.range(1, total), seed)[: parts - 1]
  bounds = tf.concat([[0], tf.sort(cuts), [total]], 0)
  return bounds[1:] - bounds[:-1]


def _chunk(dataset: tf.data.Dataset, length: int) -> tf.data.Dataset:
  """Pieces of `length` tokens, the last of a document shorter."""

  def pieces(example):
    starts = tf.data.Dataset.range(0, tf.size(example['targets'], tf.int64), length)
    return starts.map(lambda start: {**example, 'targets': example['targets'][start : start + length]})

  return dataset.interleave(pieces, cycle_length=16)  # in turns, lest one long document fill the shuffle buffer
