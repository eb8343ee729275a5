"""Batches: seqio tasks packed, batched and laid out over the mesh. The one file that meets TensorFlow, but for T5X's.

What is in a batch, `moe_jax/batch.py` says.
"""

import collections
import contextlib
import difflib
import glob
import importlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from moe_jax.batch import batch_spec
from moe_jax.notices import notice
from moe_jax.quiet import quiet_stderr
from moe_jax.types import Array, Batch, ConfigError, Damaged

with quiet_stderr():
  import seqio
  import tensorflow as tf

  tf.config.set_visible_devices([], 'GPU')  # else TensorFlow takes the memory that JAX is about to use

# DecoderFeatureConverter is a plain language model for 'targets' alone, and a prefix one for 'inputs' and 'targets'.
CONVERTERS = {'decoder_only': seqio.DecoderFeatureConverter, 'encoder_decoder': seqio.EncDecFeatureConverter}


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
  return provider(task, modules).output_features['targets'].vocabulary


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
  if isinstance(vocabulary, seqio.SentencePieceVocabulary):
    return tuple(_piece_bytes(vocabulary, token) for token in range(vocabulary.vocab_size))
  return tuple(len(vocabulary.decode([token]).encode()) for token in range(vocabulary.vocab_size))


def token_texts(vocabulary: seqio.Vocabulary) -> tuple[str, ...]:
  """Each token id as text to look at: blanks kept, a byte of a longer letter as \\xc3, a sentinel as <1>, else <id>."""
  return tuple(_token_text(token, vocabulary) for token in range(vocabulary.vocab_size))


def _token_text(token: int, vocabulary: seqio.Vocabulary) -> str:
  if token >= vocabulary.vocab_size - vocabulary.extra_ids:
    return f'<{vocabulary.vocab_size - token}>'
  if isinstance(vocabulary, seqio.ByteVocabulary):
    byte = token - (vocabulary.vocab_size - 256 - vocabulary.extra_ids)
    return chr(byte) if 0 <= byte < 128 else f'\\x{byte:02x}' if byte >= 0 else f'<id {token}>'
  if isinstance(vocabulary, seqio.SentencePieceVocabulary):
    return vocabulary.tokenizer.IdToPiece(token).replace('▁', ' ')
  return vocabulary.decode([token]) or f'<id {token}>'


def _piece_bytes(vocabulary: seqio.SentencePieceVocabulary, token: int) -> int:
  """Bytes of one piece, the blank in front of a word included, which decoding it alone would lose."""
  model = vocabulary.tokenizer
  if token >= vocabulary.vocab_size - vocabulary.extra_ids or model.IsControl(token) or model.IsUnknown(token):
    return 0
  return 1 if model.IsByte(token) else len(model.IdToPiece(token).replace('▁', ' ').encode())


def bytes_of(tokens: np.ndarray, vocabulary: seqio.ByteVocabulary) -> bytes:
  """The bytes that int[...] tokens of a byte vocabulary stand for, in order; other tokens say nothing."""
  first = vocabulary.vocab_size - 256 - vocabulary.extra_ids
  values = tokens[(tokens >= first) & (tokens < first + 256)] - first
  return values.astype(np.uint8).tobytes()


class BatchIterator(Iterator[Batch]):
  """Global batches, and where in the data they are.

  The data fall into shards, each of which gives the same number of rows to every batch, in order. A host reads the
  shards whose rows its devices hold; so batches depend on the number of shards, and not on that of the hosts.
  """

  def __init__(
    self,
    shard: Callable[[seqio.ShardInfo], tf.data.Dataset],
    num_shards: int,
    spec: Mapping[str, jax.ShapeDtypeStruct],
    sharding: NamedSharding,
    finite: bool,
    origin: str,
  ):
    """Starts at the beginning.

    Args:
      shard: makes a shard's rows, a batch's at a time, the last of which may be fewer.
      num_shards: of the data.
      spec: of the global batch.
      sharding: of the global batch.
      finite: the data end, perhaps not after as many batches in every shard.
      origin: which data these are; a place saved in others is not restored.
    """
    self._shard, self._spec, self._sharding, self._finite, self._origin = shard, spec, sharding, finite, origin
    self._begin(num_shards)

  def _begin(self, num_shards: int) -> None:
    size = next(iter(self._spec.values())).shape[0]
    readers: dict[int, set[int]] = collections.defaultdict(set)  # shard -> hosts
    device: Any
    for device, (rows, _) in self._sharding.devices_indices_map((size, 1)).items():
      first, end, _ = rows.indices(size)
      for index in range(first * num_shards // size, -(-end * num_shards // size)):
        readers[index].add(device.process_index)
    here = [index for index in sorted(readers) if jax.process_index() in readers[index]]
    self._writes = [index for index in here if min(readers[index]) == jax.process_index()]
    self._num_shards, self._rows = num_shards, size // num_shards
    self._iterators = {index: iter(self._shard(seqio.ShardInfo(index, num_shards))) for index in here}
    origin = tf.Variable(self._origin)
    self._places = {i: tf.train.Checkpoint(iterator=x, origin=origin) for i, x in self._iterators.items()}

  def __next__(self) -> Batch:
    """A dict of global arrays [B, L]. What a shard lacks is filled up with rows of zeros, which weigh nothing."""
    read: dict[int, Any] = {index: next(iterator, None) for index, iterator in self._iterators.items()}
    here = any(rows is not None for rows in read.values())
    if not (_on_any_host(here) if self._finite else here):
      raise StopIteration
    batch = {}
    for name, spec in self._spec.items():
      local = np.zeros(spec.shape, spec.dtype)  # pages of it that are never written take no memory
      for index, rows in read.items():
        if rows is not None:
          start = index * self._rows
          local[start : start + len(rows[name])] = rows[name]
      batch[name] = jax.make_array_from_callback(spec.shape, self._sharding, local.__getitem__)
    return batch

  def save(self, path: str) -> None:
    """Writes the place in each shard, shuffle buffers included, to files whose names begin with `path`.

    Of the hosts that read a shard, the first writes.
    """
    for index in self._writes:
      self._places[index].write(_shard_path(path, index, self._num_shards))

  def restore(self, path: str) -> None:
    """Goes to the place that `save` wrote, by however many hosts: the batches that follow are the same to the bit.

    Raises:
      ConfigError: if the files are missing or damaged, or hold a place in other data.
    """
    saved = sorted(glob.glob(f'{glob.escape(path)}-00000-of-*.index'))
    number = int(saved[0].removesuffix('.index')[-5:]) if saved else self._num_shards
    if number != self._num_shards:
      self._check_origin(_shard_path(path, 0, number))
      notice(f'DATA_SHARDS={number}: so many places in the data were saved, and are gone on from')
      self._begin(number)
    for index in self._iterators:
      self._restore(index, _shard_path(path, index, number))

  def _restore(self, index: int, path: str) -> None:
    self._check_origin(path)
    with _readable(path):
      self._places[index].read(path).assert_consumed()

  def _check_origin(self, path: str) -> None:
    with _readable(path):
      saved = tf.train.load_checkpoint(path).get_tensor('origin/.ATTRIBUTES/VARIABLE_VALUE').decode()
    if saved != self._origin:
      raise ConfigError(f'{path} is a place in other data: {saved}, not {self._origin}.')


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
  try:
    yield
  except (tf.errors.OpError, AssertionError, LookupError, RuntimeError) as error:
    message = f'{path}, the place in the data to go on from, is missing or damaged: take an earlier checkpoint.'
    raise Damaged(message) from error


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
  num_shards: int | None = None,
  cache_dirs: Sequence[str] | None = None,
) -> BatchIterator:
  """Reads a seqio task as global batches; each host reads only the shards whose rows its devices hold.

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
    num_shards: into which the data are split; None is one for each host, or for hosts that hold the same rows.
    cache_dirs: folders that seqio's cache of the task is in; None reads its source.

  Raises:
    ConfigError: as `check`, from the task, if rows do not divide over shards, or if the task is not cached there.
  """
  check(task, lengths, batch_size, split, converter, sharding, modules, vocab_size)
  num_shards = num_shards or _parts(sharding)
  if batch_size % num_shards:
    raise ConfigError(f'BATCH_SIZE={batch_size} does not divide over DATA_SHARDS={num_shards}: use a multiple.')
  order = {'shuffle': shuffle, 'num_epochs': num_epochs, 'seed': seed}
  if cache_dirs is not None:
    find_cached(task, modules, cache_dirs)
    order['use_cached'] = True
  options = tf.data.Options()
  options.deterministic = True

  def shard(info: seqio.ShardInfo) -> tf.data.Dataset:
    rows = _examples(info, task, lengths, split, converter, pack, **order)
    return rows.batch(batch_size // info.num_shards).prefetch(2).with_options(options)

  origin = f'{split} of {task}, {converter}, {dict(lengths)}, {batch_size} a batch, pack={pack}, {order}'
  spec = batch_spec(lengths, batch_size, converter)
  return BatchIterator(shard, num_shards, spec, sharding, finite=num_epochs is not None, origin=origin)


def find_cached(task: str, modules: Sequence[str], cache_dirs: Sequence[str]) -> None:
  """Sees that a task, or each of a mixture that can be, is in one of the folders; tasks/README.md says who writes them.

  Raises:
    ConfigError: if one is not.
  """
  known = seqio.get_global_cache_dirs()
  folders = [os.path.expanduser(folder) for folder in cache_dirs]
  seqio.add_global_cache_dirs([folder for folder in folders if folder not in known])
  for part in seqio.get_subtasks(provider(task, modules)):
    if part.supports_caching and not part.cache_dir:
      raise ConfigError(f'USE_CACHED: {part.name} is not in {", ".join(folders) or "any CACHE_DIRS"}: cache it there.')


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
  tasks = provider(task, modules)
  if converter not in CONVERTERS:
    raise ConfigError(f'No converter {converter!r}: choose among {", ".join(CONVERTERS)}.')
  if split not in tasks.splits:
    raise ConfigError(f'{task} has no split {split!r}: choose among {", ".join(sorted(tasks.splits))}.')
  wanted = {'targets', *lengths} | ({'inputs'} if converter == 'encoder_decoder' else set())
  if wanted != set(lengths) or wanted - set(tasks.output_features):
    have = ', '.join(tasks.output_features)
    raise ConfigError(
      f'TASK_FEATURE_LENGTHS={dict(lengths)} do not suit a model that is {converter} and {task}, which has {have}.'
    )
  if 'task_ids' in lengths and (converter != 'decoder_only' or lengths['task_ids'] != lengths['targets']):
    raise ConfigError("'task_ids' go with 'targets' of the same length and a decoder-only model, for now.")
  needed = max(tasks.output_features[name].vocabulary.vocab_size for name in lengths)
  if vocab_size is not None and vocab_size < needed:
    raise ConfigError(f'VOCAB_SIZE={vocab_size} is less than the {needed} token ids of {task}: raise it.')
  parts = sharding.num_devices // sharding.shard_shape((sharding.num_devices, 1))[0]
  if batch_size < 1 or batch_size % parts:
    raise ConfigError(f'BATCH_SIZE={batch_size} does not divide over {parts} devices: make it a multiple of {parts}.')


def provider(task: str, modules: Sequence[str]) -> seqio.Task | seqio.Mixture:
  """The task or mixture of this name, once the modules are imported.

  Raises:
    ConfigError: if there is none.
  """
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
  """The rows of one shard, with at least the features of `batch_spec`. order: shuffle, num_epochs, seed, use_cached."""
  convert = feature_converter(lengths, converter, pack)
  rows = seqio.get_dataset(task, dict(lengths), convert, split, shard_info=shard, verbose=False, **order)
  return rows if pack else rows.map(as_one_segment)


def feature_converter(lengths: Mapping[str, int], converter: str, pack: bool) -> seqio.FeatureConverter:
  """What makes features of tasks those of batches."""
  return (_NamesTasks if 'task_ids' in lengths else CONVERTERS[converter])(pack=pack)


def as_one_segment(row: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
  """Adds the segments and positions that seqio leaves out of rows it did not pack."""
  added = {}
  # Not by the decoder's inputs: they begin with a 0 that is no padding.
  for side, tokens in (('decoder', 'decoder_target_tokens'), ('encoder', 'encoder_input_tokens')):
    if tokens in row:
      real = tf.not_equal(row[tokens], 0)
      added |= {f'{side}_segment_ids': tf.cast(real, tf.int32), f'{side}_positions': tf.range(tf.size(real))}
  return {**row, **added}


def _parts(sharding: NamedSharding) -> int:
  """Hosts whose devices hold different rows."""
  rows: dict[int, set[int]] = collections.defaultdict(set)
  device: Any
  for device, (index, _) in sharding.devices_indices_map((sharding.num_devices, 1)).items():
    rows[device.process_index].add(index.start or 0)
  return len({tuple(sorted(starts)) for starts in rows.values()})


def _on_any_host(here: bool) -> bool:
  """Whether it holds on some host: all must go on making batches while one has data, or the others wait for ever."""
  return here if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.array(here))))


def _shard_path(path: str, index: int, num_shards: int) -> str:
  return f'{path}-{index:05d}-of-{num_shards:05d}'
