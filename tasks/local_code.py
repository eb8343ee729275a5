"""Two downstream tasks made of Python code that is already on this machine: they need no download.

  local_docstring_name   'inputs' "name: (path, start=None) Return a relative version of path"   'targets' "relpath"
  local_text_source      'inputs' "package: def feed(self, data): ..."                           'targets' "email"

Functions are those of the files of `local_text`, folders named test aside. One file in twenty is for validation, and no
file is in both splits.
"""

import ast
import functools
import os
import tokenize
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import seqio
import tensorflow as tf

from moe_jax.types import ConfigError
from tasks.local_text import split_files
from tasks.metrics import accuracy, exact_match, word_f1
from tasks.preprocessors import TO_TOKENS
from tasks.vocabularies import features

PACKAGES = ('asyncio', 'email', 'idlelib', 'importlib', 'multiprocessing', 'tkinter', 'unittest', 'xml')
FEWEST_LINES = 4  # of source by which a package is to be told

Example = tuple[str, str]  # inputs, targets


class Function(NamedTuple):
  """A function as it is written. Attributes: folder, the name of its file's; docstring, the first paragraph of it."""

  folder: str
  name: str
  arguments: str
  docstring: str
  source: str


@functools.cache
def functions_of(path: str) -> tuple[Function, ...]:
  """The functions and methods of a file, in the order of `ast.walk`; none where the file is no Python of today."""
  try:
    with tokenize.open(path) as file, warnings.catch_warnings():
      warnings.simplefilter('ignore')  # of escapes in strings that are not ours
      text = file.read()
      tree = ast.parse(text)
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return ()
  lines, folder = text.splitlines(), os.path.basename(os.path.dirname(path))
  found = []
  for node in ast.walk(tree):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      body = [line[node.col_offset :] for line in lines[node.lineno - 1 : node.end_lineno]]
      docstring = ' '.join((ast.get_docstring(node) or '').partition('\n\n')[0].split())
      found.append(Function(folder, node.name, ast.unparse(node.args), docstring, '\n'.join(body)))
  return tuple(found)


def names_of_docstrings(path: str) -> Iterator[Example]:
  """What a function takes and says of itself, and its name; of those that Python does not name."""
  for function in functions_of(path):
    if function.docstring and not function.name.startswith('__'):
      yield f'name: ({function.arguments}) {function.docstring}', function.name


def packages_of_sources(path: str) -> Iterator[Example]:
  """A function, and the package it is from, one of eight."""
  package = next((package for package in PACKAGES if f'{os.sep}{package}{os.sep}' in path), None)
  if package:
    for function in functions_of(path):
      if function.source.count('\n') >= FEWEST_LINES - 1:
        yield f'package: {function.source}', package


class LocalCode(seqio.DataSource):
  """What `examples_of` makes of each file, {'inputs': string[], 'targets': string[]}, all in memory."""

  # As in `local_text.LocalFiles`; here examples are shared out, not files.
  supports_arbitrary_sharding = True

  def __init__(self, examples_of: Callable[[str], Iterator[Example]]):
    self._examples_of = examples_of
    super().__init__(splits=('train', 'validation'))

  def list_shards(self, split: str) -> list[str]:
    return ['all']

  def examples(self, split: str) -> list[Example]:
    """All of a split, in the order of the files.

    Raises:
      ConfigError: if the files have none.
    """
    files = [path for path in split_files(split) if f'{os.sep}test{os.sep}' not in path]
    found = [example for path in files for example in self._examples_of(path)]
    if not found:
      raise ConfigError(f'No functions for {split} in these files: unset LOCAL_TEXT_GLOB, or name Python files.')
    return found

  def get_dataset(
    self,
    split: str = 'train',
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **unused: object,
  ) -> tf.data.Dataset:
    shard = shard_info or seqio.ShardInfo(index=0, num_shards=1)
    examples = self.examples(split)[shard.index :: shard.num_shards]
    pairs = tf.reshape(tf.constant(examples, tf.string), [-1, 2])
    dataset = tf.data.Dataset.from_tensor_slices({'inputs': pairs[:, 0], 'targets': pairs[:, 1]})
    return dataset.shuffle(max(len(examples), 1), seed=seed) if shuffle else dataset

  def num_input_examples(self, split: str) -> int:
    return len(self.examples(split))


def _add(name: str, examples_of: Callable[[str], Iterator[Example]], metrics: list[Callable[..., Mapping]]) -> None:
  seqio.TaskRegistry.add(
    name,
    source=LocalCode(examples_of),
    preprocessors=TO_TOKENS,
    output_features=features(),
    metric_fns=metrics,
  )


_add('local_docstring_name', names_of_docstrings, [exact_match, word_f1])
_add('local_text_source', packages_of_sources, [accuracy])
