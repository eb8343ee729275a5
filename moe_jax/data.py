"""Batches: seqio tasks packed, batched and laid out over the mesh. The one file of the library that meets TensorFlow.

What is in a batch, `moe_jax/batch.py` says.
"""

import collections
import difflib
import importlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from moe_jax.batch import batch_spec
from moe_jax.quiet import quiet_stderr
from moe_jax.types import Array, Batch, ConfigError

with quiet_stderr():
  import seqio
  import tensorflow as tf

  tf.config.set_visible_devices([], 'GPU')  # else TensorFlow takes the memory that JAX is about to use

# DecoderFeatureConverter is a plain language model for 'targets' alone, and a prefix one for 'inputs' and 'targets'.
_CONVERTERS = {'decoder_only': seqio.DecoderFeatureConverter, 'encoder_decoder': seqio.EncDecFeatureConverter}


class _NamesTasks(seqio.LMFeatureConverter):
  """A plain language model's features, and the task of each target token."""

  _IDS = seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)
  TASK_FEATURES = {**seqio.LMFeatureConverter.TASK_FEATURES, 'task_ids': _IDS}
  MODEL_FEATURES = {**seqio.LMFeatureConverter.MODEL_FEATURES, 'decoder_task_ids': _IDS}

  def _convert_example(self, features: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
    return {**super()._convert_example(features), 'decoder_task_ids': features['task_ids']}

  def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
    lengths = super().get_model_feature_lengths(task_feature_lengths)
    return {**lengths, 'decoder_task_ids': task_feature_lengths['task_ids']}


def vocabulary(task: str, modules: Sequence[str]) -> seqio.Vocabulary:
  """The vocabulary of the targets, to turn tokens into text and back."""
  return _provider(task, modules).output_features['targets'].vocabulary


def text_of(tokens: Sequence[int] | Array, vocabulary: seqio.Vocabulary) -> str:
  """The text of int32[L] tokens up to the first EOS; padding says nothing, and a sentinel shows as <1>, <2>, ..."""
  real = [int(token) for token in tokens if token]
  real = real[: real.index(vocabulary.eos_id)] if vocabulary.eos_id in real else real
  sentinels = range(vocabulary.vocab_size - vocabulary.extra_ids, vocabulary.vocab_size)
  runs = itertools.groupby(real, lambda token: vocabulary.vocab_size - token if token in sentinels else 0)
  return ''.join(f'<{number}>' if number else vocabulary.decode(list(run)) for number, run in runs)


def token_bytes(vocabulary: seqio.Vocabulary) -> tuple[int, ...]:
  """How many bytes of text each token id stands for; 0 for padding, EOS, sentinels and the like."""
  if isinstance(vocabulary, seqio.ByteVocabulary):
    first, extra = vocabulary.vocab_size - 256 - vocabulary.extra_ids, vocabulary.extra_ids
    return (0,) * first + (1,) * 256 + (0,) * extra
  return tuple(len(vocabulary.decode([token]).encode()) for token in range(vocabulary.vocab_size))


def bytes_of(tokens: np.ndarray, vocabulary: seqio.ByteVocabulary) -> bytes:
  """The bytes that int[...] tokens of a byte vocabulary stand for, in order; other tokens say nothing."""
  first = vocabulary.vocab_size - 256 - vocabulary.extra_ids
  values = tokens[(tokens >= first) & (tokens < first + 256)] - first
  return values.astype(np.uint8).tobytes()


class BatchIterator(Iterator[Batch]):
  """Global batches, and where in the data they are."""

  def __init__(
    self,
    dataset: tf.data.Dataset,
    spec: Mapping[str, jax.ShapeDtypeStruct],
    sharding: NamedSharding,
    finite: bool,
    origin: str,
  ):
    """Starts at the beginning.

    Args:
      dataset: batches of this host, the last of which may be short.
      spec: of the global batch.
      sharding: of the global batch.
      finite: the dataset ends, perhaps not after as many batches on every host.
      origin: which data these are; a place saved in others is not restored.
    """
    self._spec, self._sharding, self._finite, self._origin = spec, sharding, finite, origin
    self._hosts = _shard_info(sharding).num_shards
    self._iterator = iter(dataset)
    self._checkpoint = tf.train.Checkpoint(iterator=self._iterator, origin=tf.Variable(origin))

  def __next__(self) -> Batch:
    """A dict of global arrays [B, L]. A short batch is filled up with rows of zeros, which weigh nothing."""
    local: Any = next(self._iterator, None)
    here = local is not None
    if not (_on_any_host(here) if self._finite else here):
      raise StopIteration
    batch = {}
    for name, spec in self._spec.items():
      array = np.zeros((spec.shape[0] // self._hosts, *spec.shape[1:]), spec.dtype)
      if here:
        array[: len(local[name])] = local[name]
      batch[name] = jax.make_array_from_process_local_data(self._sharding, array, spec.shape)
    return batch

  def save(self, path: str) -> None:
    """Writes this host's place in the data, shuffle buffers included, to files whose names begin with `path`."""
    self._checkpoint.write(_host_path(path))

  def restore(self, path: str) -> None:
    """Goes to the place that `save` wrote: the batches that follow are the same to the bit.

    Raises:
      ConfigError: if the files are missing or damaged, or hold a place in other data.
    """
    path = _host_path(path)
    try:
      saved = tf.train.load_checkpoint(path).get_tensor('origin/.ATTRIBUTES/VARIABLE_VALUE').decode()
      if saved != self._origin:
        raise ConfigError(f'{path} is a place in other data: {saved}, not {self._origin}.')
      self._checkpoint.read(path).assert_consumed()
    except (tf.errors.OpError, AssertionError, LookupError, RuntimeError) as error:
      message = f'{path}, the place in the data to go on from, is missing or damaged: take an earlier checkpoint.'
      raise ConfigError(message) from error


def batches(
  task: str,
  lengths: Mapping[str, int],
  batch_size: int,
  split: str,
  *,
  converter: str,
  sharding: NamedSharding,
  modules: Sequence[str],
  vocab_size: int | None = None,
  seed: int = 0,
  shuffle: bool = True,
  num_epochs: int | None = None,
  pack: bool = True,
) -> BatchIterator:
  """Reads a seqio task as global batches; each host reads only the rows its devices hold.

  Args:
    task: the name of a seqio task or mixture.
    lengths: task feature -> tokens a row, such as {'targets': 256}.
    batch_size: rows of a global batch.
    split: 'train', 'validation', ...
    converter: 'decoder_only' or 'encoder_decoder'.
    sharding: how rows are split over devices.
    modules: imported for the tasks they register.
    vocab_size: of the model; None to leave it unchecked.
    seed: of the order and of everything drawn at random; the same seed gives the same batches.
    num_epochs: None for ever, each epoch in an order of its own.
    pack: puts several short examples in a row.

  Raises:
    ConfigError: as `check`, or from the task.
  """
  check(task, lengths, batch_size, split, converter, sharding, modules, vocab_size)
  shard = _shard_info(sharding)
  order = {'shuffle': shuffle, 'num_epochs': num_epochs, 'seed': seed}
  options = tf.data.Options()
  options.deterministic = True
  dataset = _examples(shard, task, lengths, split, converter, pack, **order)
  dataset = dataset.batch(batch_size // shard.num_shards).prefetch(2).with_options(options)
  origin = f'{split} of {task}, {converter}, {dict(lengths)}, {batch_size} a batch, pack={pack}, {order}'
  spec = batch_spec(lengths, batch_size, converter)
  return BatchIterator(dataset, spec, sharding, finite=num_epochs is not None, origin=origin)


def check(
  task: str,
  lengths: Mapping[str, int],
  batch_size: int,
  split: str,
  converter: str,
  sharding: NamedSharding,
  modules: Sequence[str],
  vocab_size: int | None = None,
) -> None:
  """Sees that `batches` could be made, reading no data.

  Raises:
    ConfigError: if there is no such task, split or converter; if the task lacks a feature; if its tokens exceed the
      model's vocabulary; if rows do not divide over devices.
  """
  provider = _provider(task, modules)
  if converter not in _CONVERTERS:
    raise ConfigError(f'No converter {converter!r}: choose among {", ".join(_CONVERTERS)}.')
  if split not in provider.splits:
    raise ConfigError(f'{task} has no split {split!r}: choose among {", ".join(sorted(provider.splits))}.')
  wanted = {'targets', *lengths} | ({'inputs'} if converter == 'encoder_decoder' else set())
  if wanted != set(lengths) or wanted - set(provider.output_features):
    have = ', '.join(provider.output_features)
    raise ConfigError(
      f'TASK_FEATURE_LENGTHS={dict(lengths)} do not suit a model that is {converter} and {task}, which has {have}.'
    )
  if 'task_ids' in lengths and (converter != 'decoder_only' or lengths['task_ids'] != lengths['targets']):
    raise ConfigError("'task_ids' go with 'targets' of the same length and a decoder-only model, for now.")
  needed = max(provider.output_features[name].vocabulary.vocab_size for name in lengths)
  if vocab_size is not None and vocab_size < needed:
    raise ConfigError(f'VOCAB_SIZE={vocab_size} is less than the {needed} token ids of {task}: raise it.')
  parts = sharding.num_devices // sharding.shard_shape((sharding.num_devices, 1))[0]
  if batch_size < 1 or batch_size % parts:
    raise ConfigError(f'BATCH_SIZE={batch_size} does not divide over {parts} devices: make it a multiple of {parts}.')


def _provider(task: str, modules: Sequence[str]) -> seqio.Task | seqio.Mixture:
  for module in modules:
    try:
      importlib.import_module(module)
    except ModuleNotFoundError as error:
      raise ConfigError(f'TASK_MODULES names {module!r}, which cannot be imported: {error}.') from error
  names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  if task not in names:
    nearest = difflib.get_close_matches(task, sorted(names), n=1, cutoff=0)
    raise ConfigError(f'No task {task!r} in {", ".join(modules)}: did you mean {"".join(nearest)!r}?')
  return seqio.get_mixture_or_task(task)


def _examples(
  shard: seqio.ShardInfo,
  task: str,
  lengths: Mapping[str, int],
  split: str,
  converter: str,
  pack: bool = True,
  **order: int | bool | None,
) -> tf.data.Dataset:
  """The rows of one shard, with at least the features of `batch_spec`. order: shuffle, num_epochs, seed."""
  convert = _NamesTasks if 'task_ids' in lengths else _CONVERTERS[converter]
  rows = seqio.get_dataset(task, dict(lengths), convert(pack=pack), split, shard_info=shard, verbose=False, **order)
  return rows if pack else rows.map(_as_one_segment)


def _as_one_segment(row: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
  """Adds the segments and positions that seqio leaves out of rows it did not pack."""
  added = {}
  # Not by the decoder's inputs: they begin with a 0 that is no padding.
  for side, tokens in (('decoder', 'decoder_target_tokens'), ('encoder', 'encoder_input_tokens')):
    if tokens in row:
      real = tf.not_equal(row[tokens], 0)
      added |= {f'{side}_segment_ids': tf.cast(real, tf.int32), f'{side}_positions': tf.range(tf.size(real))}
  return {**row, **added}


def _shard_info(sharding: NamedSharding) -> seqio.ShardInfo:
  """Which part of the rows this host's devices hold; hosts whose devices hold the same rows read the same files."""
  rows: dict[int, set[int]] = collections.defaultdict(set)
  device: Any
  for device, (index, _) in sharding.devices_indices_map((sharding.num_devices, 1)).items():
    rows[device.process_index].add(index.start or 0)
  parts = sorted({tuple(sorted(starts)) for starts in rows.values()})
  return seqio.ShardInfo(index=parts.index(tuple(sorted(rows[jax.process_index()]))), num_shards=len(parts))


def _on_any_host(here: bool) -> bool:
  """Whether it holds on some host: all must go on making batches while one has data, or the others wait for ever."""
  return here if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.array(here))))


def _host_path(path: str) -> str:
  return f'{path}-{jax.process_index():05d}-of-{jax.process_count():05d}'
