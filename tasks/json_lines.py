"""Examples of your own: JSON lines in the files that the environment variable JSON_LINES_GLOB names.

  json_lines                     to train, and to evaluate by exact match and ROUGE
  json_lines_score_eval          of lines with choices, to evaluate by the likeliest

A line is {"inputs": ..., "targets": ...}, or an instance of natural instructions (https://arxiv.org/abs/2204.07705):
{"definition": ..., "input": ..., "output": ...}, with capitals and "Instance": {...} as that project writes them or
without. Of several outputs the first is learned, and any is right. "choices": [...] are what `json_lines_score_eval`
ranks. About one line in twenty, chosen by a hash of its inputs, is for validation, and all of files named *validation*.
"""

import glob
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import seqio
import tensorflow as tf

from moe_jax.types import ConfigError
from tasks.metrics import exact_match, multiple_choice, rouge
from tasks.multiple_choice import rank_choices
from tasks.postprocessors import choice_of_question, references_of
from tasks.preprocessors import TO_TOKENS
from tasks.vocabularies import features

VALIDATION_SHARE = 1 / 20
Example = dict[str, Any]


def read(split: str) -> list[Example]:
  """The examples of 'train' or 'validation': inputs, references, and choices, which may be none.

  Raises:
    ConfigError: if there are none, or a line is not as it should be.
  """
  examples = _all().get(split, [])
  if not examples:
    pattern = os.environ.get('JSON_LINES_GLOB', '')
    raise ConfigError(f"JSON_LINES_GLOB={pattern!r} has no line for {split}: name files such as '~/mine/*.jsonl'.")
  return examples


def _all() -> dict[str, list[Example]]:
  """The examples of each split that has any."""
  pattern = os.environ.get('JSON_LINES_GLOB', '')
  found: dict[str, list[Example]] = {}
  for path in sorted(glob.glob(os.path.expanduser(pattern), recursive=True)):
    for example in _file(path):
      found.setdefault(_split(path, example), []).append(example)
  return found


def _file(path: str) -> Iterator[Example]:
  with open(path, encoding='utf-8') as file:
    for number, line in enumerate(file, 1):
      if line.strip():
        try:
          yield example_of(json.loads(line))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
          message = 'is neither {"inputs", "targets"} nor {"definition", "input", "output"} in JSON: mend it'
          raise ConfigError(f'{path}, line {number}, {message}.') from error


def _split(path: str, example: Example) -> str:
  if 'validation' in os.path.basename(path):
    return 'validation'
  return 'validation' if zlib.crc32(example['inputs'].encode()) < VALIDATION_SHARE * 2**32 else 'train'


def example_of(line: Mapping[str, Any]) -> Example:
  """A line's inputs, references and choices.

  Raises:
    LookupError, TypeError, AttributeError: if it is no example.
  """
  line = {name.lower(): value for name, value in line.items()}
  line |= {name.lower(): value for name, value in line.pop('instance', {}).items()}
  if 'inputs' in line:
    inputs, references = line['inputs'], line['targets']
  else:
    definition = ' '.join(_texts(line['definition']))
    inputs = f'Definition: {definition}\n\nNow complete the following example -\nInput: {line["input"]}\nOutput: '
    references = line['output']
  return {'inputs': ''.join(_texts(inputs)), 'references': _texts(references), 'choices': line.get('choices', [])}


def _texts(value: str | list[str]) -> list[str]:
  texts = [value] if isinstance(value, str) else value
  if not all(isinstance(text, str) for text in texts):
    raise TypeError('text is wanted')
  return texts[:]


class JsonLines(seqio.DataSource):
  """What `to_columns` makes of the lines, all in memory."""

  supports_arbitrary_sharding = False  # hosts share examples out, not files

  def __init__(self, to_columns: Callable[[list[Example]], dict[str, Any]]):
    self._to_columns = to_columns
    super().__init__(splits=('train', 'validation'))

  @property
  def splits(self) -> tuple[str, ...]:
    """'validation' alone where all lines are for it."""
    return ('validation',) if _all().keys() == {'validation'} else self._splits

  def list_shards(self, split: str) -> list[str]:
    return ['all']

  def get_dataset(
    self,
    split: str = 'train',
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **unused: object,
  ) -> tf.data.Dataset:
    examples = read(split)
    dataset = tf.data.Dataset.from_tensor_slices(self._to_columns(examples))
    return dataset.shuffle(len(examples), seed=seed) if shuffle else dataset

  def num_input_examples(self, split: str) -> int:
    return len(read(split))


def with_references(examples: list[Example]) -> dict[str, Any]:
  """'inputs', 'targets' string[n], 'references' string[n, ?]."""
  return {
    'inputs': [example['inputs'] for example in examples],
    'targets': [example['references'][0] for example in examples],
    'references': tf.ragged.constant([example['references'] for example in examples]),
  }


def with_choices(examples: list[Example]) -> dict[str, Any]:
  """'inputs' string[n], 'choices' string[n, ?] and 'worth' float32[n, ?], for `rank_choices`.

  Raises:
    ConfigError: if a line has none, or all are wrong.
  """
  for example in examples:
    if not set(example['choices']) & set(example['references']):
      raise ConfigError(f'No choice of {example["inputs"][:40]!r} is right: give "choices" with the output among them.')
  worth = [[float(choice in example['references']) for choice in example['choices']] for example in examples]
  return {
    'inputs': [example['inputs'] for example in examples],
    'choices': tf.ragged.constant([example['choices'] for example in examples]),
    'worth': tf.ragged.constant(worth),
  }


seqio.TaskRegistry.add(
  'json_lines',
  source=JsonLines(with_references),
  preprocessors=TO_TOKENS,
  output_features=features(),
  postprocess_fn=references_of,
  metric_fns=[exact_match, rouge],
)
seqio.TaskRegistry.add(
  'json_lines_score_eval',
  source=JsonLines(with_choices),
  preprocessors=[rank_choices, *TO_TOKENS],
  output_features=features(),
  postprocess_fn=choice_of_question,
  metric_fns=[multiple_choice],
)
