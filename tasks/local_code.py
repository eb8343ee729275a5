"""Downstream tasks made of Python code that is already on this machine: they need no download.

  local_docstring_name   'inputs' "name: (path, start=None) Return a relative version of path"   'targets' "relpath"
  local_text_source      'inputs' "package: def feed(self, data): ..."                           'targets' "email"
  local_next_text_score_eval   'inputs' the end of a function's first half   'targets' each of four ways to go on

The last is for models that were trained on `local_text_lm`, and to evaluate alone: the wrong ones are of other
functions of the same file, all are of one length, and there is no EOS before or behind them.

Functions are those of the files of `local_text`, folders named test aside. One file in twenty is for validation, and no
file is in both splits.
"""

import ast
import functools
import os
import random
import tokenize
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import seqio
import tensorflow as tf

from moe_jax.types import ConfigError
from tasks.local_text import split_files
from tasks.metrics import accuracy, exact_match, multiple_choice, word_f1
from tasks.multiple_choice import rank_choices
from tasks.postprocessors import choice_of_question
from tasks.preprocessors import TO_TOKENS, keep_end
from tasks.vocabularies import features, vocabulary

PACKAGES = ('asyncio', 'email', 'idlelib', 'importlib', 'multiprocessing', 'tkinter', 'unittest', 'xml')
FEWEST_LINES = 4  # of source by which a package is to be told

PIECE, CHOICES = 16, 4  # characters of a piece of text, and pieces to choose from
Example = Mapping[str, Any]  # inputs and targets; or inputs, choices and worth, see `rank_choices`


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
      yield {'inputs': f'name: ({function.arguments}) {function.docstring}', 'targets': function.name}


def packages_of_sources(path: str) -> Iterator[Example]:
  """A function, and the package it is from, one of eight."""
  package = next((package for package in PACKAGES if f'{os.sep}{package}{os.sep}' in path), None)
  if package:
    for function in functions_of(path):
      if function.source.count('\n') >= FEWEST_LINES - 1:
        yield {'inputs': f'package: {function.source}', 'targets': package}


def next_texts(path: str) -> Iterator[Example]:
  """A function up to its middle, and four pieces of text: how it goes on, and how others of the file do."""
  sources = [function.source for function in functions_of(path) if len(function.source) >= 4 * PIECE]
  pieces = [source[len(source) // 2 :][:PIECE] for source in sources]
  for source, right in zip(sources, pieces, strict=True):
    wrong = sorted({piece for piece in pieces if piece not in source})
    if len(wrong) >= CHOICES - 1:
      draw = random.Random(zlib.crc32(source.encode()))
      choices = draw.sample([right, *draw.sample(wrong, CHOICES - 1)], CHOICES)
      worth = [float(choice == right) for choice in choices]
      yield {'inputs': source[: len(source) // 2], 'choices': choices, 'worth': worth}


class LocalCode(seqio.DataSource):
  """What `examples_of` makes of each file, all in memory."""

  # As in `local_text.LocalFiles`; here examples are shared out, not files.
  supports_arbitrary_sharding = True

  def __init__(self, examples_of: Callable[[str], Iterator[Example]], splits: Sequence[str] = ('train', 'validation')):
    self._examples_of = examples_of
    super().__init__(splits=splits)

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
    examples = self.examples(split)
    columns = {name: [example[name] for example in examples] for name in examples[0]}
    dataset = tf.data.Dataset.from_tensor_slices(columns).shard(shard.num_shards, shard.index)
    return dataset.shuffle(len(examples), seed=seed) if shuffle else dataset

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
seqio.TaskRegistry.add(
  'local_next_text_score_eval',
  source=LocalCode(next_texts, ['validation']),
  preprocessors=[rank_choices, seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(), keep_end],
  output_features=dict.fromkeys(('inputs', 'targets'), seqio.Feature(vocabulary(), add_eos=False)),
  postprocess_fn=choice_of_question,
  metric_fns=[multiple_choice],
)
