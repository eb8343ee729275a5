"""BIG-bench (https://arxiv.org/abs/2206.04615), from the task.json files that $BIG_BENCH_GLOB names.

Each makes a task, bigbench_NAME, and `bigbench` is their mixture. There is nothing to train on, but 'validation' to
evaluate: by the target scores of the likeliest choice where a task has choices, and by exact match otherwise. The text
is that of BIG-bench with no examples in front, which `few_shot` adds; where choices are listed in it, they are in the
file's order.
"""

import functools
import glob
import json
import os
from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from moe_jax.types import ConfigError
from tasks.metrics import exact_match, multiple_choice
from tasks.postprocessors import choice_of_question, references_of
from tasks.preprocessors import TO_TOKENS
from tasks.vocabularies import features


class BigBenchFile(seqio.DataSource):
  """The examples of a task.json as 'validation': of each question its choices, or its one text."""

  supports_arbitrary_sharding = False

  def __init__(self, path: str):
    self._path = path
    super().__init__(splits=('validation',))

  @functools.cached_property
  def content(self) -> dict[str, Any]:
    """What the file says.

    Raises:
      ConfigError: if that is no task of BIG-bench.
    """
    try:
      with open(self._path) as file:
        content = json.load(file)
      content['examples'][0]['input']
    except (OSError, ValueError, LookupError, TypeError) as error:
      raise ConfigError(f'{self._path} is no task of BIG-bench with examples: mend it, or BIG_BENCH_GLOB.') from error
    return content

  @property
  def has_choices(self) -> bool:
    return all('target_scores' in example for example in self.content['examples'])

  def list_shards(self, split: str) -> list[str]:
    return [self._path]

  def get_dataset(
    self,
    split: str = 'validation',
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **unused: object,
  ) -> tf.data.Dataset:
    examples = [
      example for question, item in enumerate(self.content['examples']) for example in self._of(question, item)
    ]
    columns = {name: [example[name] for example in examples] for name in examples[0]}
    if 'references' in columns:
      columns['references'] = tf.ragged.constant(columns['references'])
    dataset = tf.data.Dataset.from_tensor_slices(columns)
    return dataset.shuffle(len(examples), seed=seed) if shuffle else dataset

  def num_input_examples(self, split: str) -> int:
    return len(self.content['examples'])

  def _of(self, question: int, item: Mapping[str, Any]) -> list[dict[str, Any]]:
    content, scores = self.content, item.get('target_scores', {})
    instruction = content.get('task_prefix', '')
    inputs = instruction + content.get('example_input_prefix', '\nQ: ') + item['input']
    if scores and content.get('append_choices_to_input', True):
      inputs += ''.join(content.get('choice_prefix', '\n  choice: ') + choice for choice in scores)
    inputs += content.get('example_output_prefix', '\nA: ')
    separator = content.get('few_shot_example_separator', '\n')
    shared = {'inputs': inputs, 'instruction': instruction, 'separator': separator}
    if not self.has_choices:
      targets = [item['target']] if isinstance(item['target'], str) else item['target']
      return [{**shared, 'targets': targets[0], 'references': targets}]
    return [
      {**shared, 'targets': choice, 'worth': float(worth), 'question': question} for choice, worth in scores.items()
    ]


def register_big_bench(pattern: str) -> list[str]:
  """Registers a task for each file, and their mixture `bigbench`; returns the names of the tasks.

  Raises:
    ConfigError: if there is no file, or one is no task of BIG-bench.
  """
  paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
  if not paths:
    raise ConfigError(f"BIG_BENCH_GLOB={pattern!r} names no file: give one such as '~/BIG-bench/**/task.json'.")
  names = []
  for path in paths:
    source = BigBenchFile(path)
    name = f'bigbench_{os.path.basename(os.path.dirname(os.path.abspath(path)))}'
    seqio.TaskRegistry.add(
      name,
      source=source,
      preprocessors=TO_TOKENS,
      output_features=features(),
      postprocess_fn=choice_of_question if source.has_choices else references_of,
      metric_fns=[multiple_choice if source.has_choices else exact_match],
    )
    names.append(name)
  seqio.MixtureRegistry.add('bigbench', names, default_rate=1.0)
  return names


if os.environ.get('BIG_BENCH_GLOB'):
  register_big_bench(os.environ['BIG_BENCH_GLOB'])
