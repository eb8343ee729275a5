"""Twins of text tasks that look like span corruption (ST-MoE, section 4.5): the answer is what a sentinel stands for.

  super_glue_rte_v102            'inputs' "rte hypothesis: ... premise: ..."       'targets' "entailment"
  super_glue_rte_v102_sentinels  'inputs' "rte hypothesis: ... premise: ... <1>"   'targets' "<1> entailment"

Name this module after those of the tasks: TASK_MODULES = ['tasks.superglue', 'tasks.sentinels']. Every task with inputs
that has been registered by then gets a twin, and every mixture of such. ST-MoE learned faster so, and no better.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import seqio
import tensorflow as tf

from tasks.twins import add_mixtures

SUFFIX = '_sentinels'
_SENTINEL_TEXT = re.compile(r'^\s*(<extra_id_\d+>|⁇)\s*')  # where a vocabulary has any for it


def insert_sentinels(
  dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None, output_features: Mapping[str, seqio.Feature]
) -> tf.data.Dataset:
  """Tokens without EOS: the first sentinel ends 'inputs', cut to leave room for both, and begins 'targets'."""
  room = sequence_length['inputs'] - 2 if sequence_length else None
  first = output_features['targets'].vocabulary.vocab_size - 1

  def insert(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    sentinel = tf.constant([first], example['targets'].dtype)
    inputs, targets = tf.concat([example['inputs'][:room], sentinel], 0), tf.concat([sentinel, example['targets']], 0)
    return {**example, 'inputs': inputs, 'targets': targets}

  return dataset.map(insert, num_parallel_calls=tf.data.AUTOTUNE)


def without_sentinel(text: str, postprocess: Callable[..., Any], **context: Any) -> Any:
  """What a task makes of a text, which here begins with a sentinel."""
  return postprocess(_SENTINEL_TEXT.sub('', text), **context)


def add_twins() -> None:
  """Registers the twins of all tasks and mixtures that have none yet."""
  for name in sorted(seqio.TaskRegistry.names()):
    task = seqio.TaskRegistry.get(name)
    steps = list(task.preprocessors)
    kinds = [feature.vocabulary for feature in task.output_features.values()]
    if name.endswith(SUFFIX) or f'{name}{SUFFIX}' in seqio.TaskRegistry.names():
      continue
    if set(task.output_features) != {'inputs', 'targets'} or not all(kind.extra_ids for kind in kinds):
      continue
    if seqio.preprocessors.append_eos_after_trim not in steps:
      continue
    at = steps.index(seqio.preprocessors.append_eos_after_trim)
    seqio.TaskRegistry.add(
      f'{name}{SUFFIX}',
      source=task.source,
      preprocessors=[*steps[:at], insert_sentinels, *steps[at:]],
      output_features=task.output_features,
      postprocess_fn=functools.partial(without_sentinel, postprocess=task.postprocess_fn),
      metric_fns=task.metric_fns,
    )
  add_mixtures(SUFFIX)


add_twins()
