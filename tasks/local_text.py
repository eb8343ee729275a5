"""Text that is already on this machine, as bytes: tasks that need no download.

  local_text_lm                'targets': documents in chunks of the sequence length, EOS where a document ends
  local_text_span_corruption   'inputs', 'targets': T5's span corruption
  local_text_domains           as local_text_lm, and 'task_ids': a domain from 1 to 8 by the file's folder

The text is Python's own standard library, or the files named by the environment variable LOCAL_TEXT_GLOB. One file is
one document; bytes need not be UTF-8. About one file in twenty, chosen by a hash of its name, is for validation.
"""

import bisect
import glob
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator, Mapping

import seqio
import tensorflow as tf

from moe_jax.types import ConfigError
from tasks.preprocessors import chunk_targets, corrupt_spans, name_task

BYTE_OFFSET = 3  # of seqio.ByteVocabulary: 0 is padding, 1 EOS, 2 unknown
VALIDATION_SHARE = 1 / 20
DOMAINS = 8


def split_files(split: str, pattern: str | None = None) -> list[str]:
  """The files of 'train' or 'validation', sorted: of those that match the pattern, or of the corpus.

  Raises:
    ConfigError: if there are no files, or only one, which cannot be both.
  """
  root, paths = _corpus(os.environ.get('LOCAL_TEXT_GLOB', '') if pattern is None else pattern)
  if len(paths) < 2:
    raise ConfigError(f'{paths[0]} is the only file, none is left to validate on: split it, or widen LOCAL_TEXT_GLOB.')
  by_hash = sorted((zlib.crc32(os.fsencode(os.path.relpath(path, root))), path) for path in paths)
  validation = bisect.bisect(by_hash, (VALIDATION_SHARE * 2**32,))
  validation = min(max(validation, 1), len(paths) - 1)  # of few files, at least one each
  chosen = by_hash[:validation] if split == 'validation' else by_hash[validation:]
  return sorted(path for _, path in chosen)


def _corpus(pattern: str) -> tuple[str, list[str]]:
  """The folder that file names are relative to, and the files that can be read and hold something, sorted."""
  pattern = os.path.expanduser(pattern)
  root = os.path.dirname(re.split(r'[*?[]', pattern)[0]) or '.' if pattern else sysconfig.get_paths()['stdlib']
  found = glob.iglob(pattern, recursive=True) if pattern else _python_files(root)
  paths = sorted(path for path in found if os.path.isfile(path) and os.access(path, os.R_OK) and os.path.getsize(path))
  if not paths:
    where = f'LOCAL_TEXT_GLOB={pattern!r}' if pattern else f'The standard library under {root}'
    raise ConfigError(f"{where} has no text to read: set LOCAL_TEXT_GLOB to your files, such as '~/notes/**/*.txt'.")
  return root, paths


def _python_files(root: str) -> Iterator[str]:
  for folder, subfolders, names in os.walk(root):
    subfolders[:] = set(subfolders) - {'site-packages', 'dist-packages', '__pycache__'}
    yield from (os.path.join(folder, name) for name in names if name.endswith('.py'))


class LocalFiles(seqio.DataSource):
  """One example a file, {'text': string[], 'task': int32[]}; every host reads files of its own."""

  # So that seqio leaves sharding to us: were files fewer than hosts, it would leave some hosts none, and they wait.
  supports_arbitrary_sharding = True

  def __init__(self, pattern: str | None = None):
    self._pattern = pattern
    super().__init__(splits=('train', 'validation'))

  def list_shards(self, split: str) -> list[str]:
    return split_files(split, self._pattern)

  def get_dataset(
    self,
    split: str = 'train',
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **unused: object,
  ) -> tf.data.Dataset:
    shard = shard_info or seqio.ShardInfo(index=0, num_shards=1)
    paths = [os.fsencode(path) for path in self.list_shards(split)]
    if len(paths) < shard.num_shards:
      raise ConfigError(f'{len(paths)} {split} files do not go round {shard.num_shards} hosts: widen LOCAL_TEXT_GLOB.')
    paths = paths[shard.index :: shard.num_shards]
    files = tf.data.Dataset.from_tensor_slices({'text': paths, 'task': [domain(path) for path in paths]})
    if shuffle:
      files = files.shuffle(len(paths), seed=seed)
    return files.map(lambda file: {**file, 'text': tf.io.read_file(file['text'])}, num_parallel_calls=2)


def domain(path: bytes) -> int:
  """The domain of a file, from 1: the files of a folder have the same."""
  return zlib.crc32(os.path.basename(os.path.dirname(path))) % DOMAINS + 1


def _bytes(text: tf.Tensor) -> tf.Tensor:
  """string[] -> int32[bytes], whatever the bytes are."""
  return tf.cast(tf.io.decode_raw(text, tf.uint8), tf.int32) + BYTE_OFFSET


@seqio.map_over_dataset
def to_bytes(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
  """{'text': string[], ...} -> {'targets': int32[bytes]}."""
  return {'targets': _bytes(example['text'])}


@seqio.map_over_dataset
def to_bytes_and_task(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
  """{'text': string[], 'task': int32[]} -> {'targets': int32[bytes], 'task': int32[]}; see `name_task`."""
  return {'targets': _bytes(example['text']), 'task': example['task']}


_BYTES = seqio.Feature(seqio.ByteVocabulary(extra_ids=100))  # 359 ids, the hundred sentinels last

seqio.TaskRegistry.add(
  'local_text_lm',
  source=LocalFiles(),
  preprocessors=[to_bytes, seqio.preprocessors.append_eos, chunk_targets],
  output_features={'targets': _BYTES},
)
seqio.TaskRegistry.add(
  'local_text_span_corruption',
  source=LocalFiles(),
  preprocessors=[to_bytes, corrupt_spans, seqio.preprocessors.append_eos],
  output_features={'inputs': _BYTES, 'targets': _BYTES},
)
seqio.TaskRegistry.add(
  'local_text_domains',
  source=LocalFiles(),
  preprocessors=[to_bytes_and_task, seqio.preprocessors.append_eos, chunk_targets, name_task],
  output_features={
    'targets': _BYTES,
    'task_ids': seqio.Feature(seqio.PassThroughVocabulary(DOMAINS + 1), add_eos=False),
  },
)
