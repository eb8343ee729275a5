"""Twins of tasks with worked examples in front of each question, as GPT-3 has them: https://arxiv.org/abs/2005.14165.

  arc_easy_score_eval         'inputs' "question: Which ...? answer:"                           'targets' "magnetism"
  arc_easy_score_eval_1_shot  'inputs' "question: What ...? answer: ice\n\nquestion: Which ...? answer:"

SHOTS=1 in the environment says how many; without it there are no twins. Name this module after those of the tasks, as
gin/tasks/ does: every task of inputs and targets that has been registered by then gets a twin, and so does a mixture of
such.

Examples come from the training data, and where there are none from the other questions of the data at hand. Each
question draws its own by a hash of its text, so that all its choices have the same ones, and every run, host and
checkpoint. A text that asks what the question asks is never drawn. Of prompts that are too long the end is kept.
"""

import functools
import os
import re
from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from moe_jax.types import ConfigError
from tasks.preprocessors import TO_TOKENS, keep_end
from tasks.twins import add_mixtures

POOL = 1000  # the first so many questions are drawn from
SEPARATOR = '\n\n'
Example = Mapping[str, Any]


def worked_examples(task: seqio.Task) -> dict[bytes, bytes]:
  """Questions of a task and, of each, what stands in front of another: its inputs, right answer, and a separator.

  Of a question with choices the right answer is the one that is worth most. Examples may have an 'instruction', with
  which their inputs begin and which is said once in front of everything, and a 'separator'; strings both.
  """
  split = next(split for split in ('train', 'validation', *task.splits) if split in task.splits)
  found: dict[bytes, bytes] = {}
  best: dict[bytes, float] = {}
  for example in task.get_dataset(None, split, shuffle=False).as_numpy_iterator():
    inputs, answer = example['inputs_pretokenized'], example['targets_pretokenized']
    if len(found) == POOL and inputs not in found:
      break
    if (worth := float(example.get('worth', 1))) > best.get(inputs, 0):
      begin, gap = len(example.get('instruction', b'')), b'' if inputs[-1:].isspace() else b' '
      best[inputs] = worth
      found[inputs] = inputs[begin:] + gap + answer + example.get('separator', SEPARATOR.encode())
  return found


def add_examples(dataset: tf.data.Dataset, task: seqio.Task, shots: int) -> tf.data.Dataset:
  """Puts `shots` of a task's worked examples in front of 'inputs', string[].

  Raises:
    ConfigError: if the task has too few.
  """
  found = worked_examples(task)
  if len(found) <= shots:
    raise ConfigError(f'SHOTS={shots} wants more than the {len(found)} questions that {task.name} has: lower it.')
  questions, texts = tf.constant(list(found)), tf.constant(list(found.values()))

  def add(example: Example) -> dict[str, tf.Tensor]:
    inputs, instruction = example['inputs'], example.get('instruction', tf.constant(''))
    seed = tf.stack([tf.strings.to_hash_bucket_fast(inputs, 2**31 - 1), 0])
    order = seqio.utils.stateless_shuffle(tf.range(len(found)), seed)
    drawn = tf.boolean_mask(order, tf.gather(questions, order) != inputs)[:shots]
    begin = tf.strings.length(instruction)
    question = tf.strings.substr(inputs, begin, tf.strings.length(inputs) - begin)
    prompt = tf.concat([[instruction], tf.gather(texts, drawn), [question]], 0)
    return {**example, 'inputs': tf.strings.reduce_join(prompt)}

  return dataset.map(add, num_parallel_calls=tf.data.AUTOTUNE)


def add_twins(shots: int) -> None:
  """Registers the twins of all tasks and mixtures that have none yet, named task_3_shot."""
  suffix, names = f'_{shots}_shot', seqio.TaskRegistry.names()
  for name in sorted(names):
    task = seqio.TaskRegistry.get(name)
    text, to_tokens = task.preprocessors[: -len(TO_TOKENS)], task.preprocessors[-len(TO_TOKENS) :]
    if tuple(to_tokens) != TO_TOKENS or f'{name}{suffix}' in names:
      continue
    training = re.sub(r'_(score_)?eval$', '_train', name)
    teacher = seqio.TaskRegistry.get(training) if training in names else task
    ask = functools.partial(add_examples, task=teacher, shots=shots)
    seqio.TaskRegistry.add(
      f'{name}{suffix}',
      source=task.source,
      preprocessors=[*text, ask, *TO_TOKENS[:-1], keep_end, *TO_TOKENS[-1:]],
      output_features=task.output_features,
      postprocess_fn=task.postprocess_fn,
      metric_fns=task.metric_fns,
    )
  add_mixtures(suffix)


if _shots := os.environ.get('SHOTS'):
  if not _shots.isdecimal() or not int(_shots):
    raise ConfigError(f'SHOTS={_shots!r} is no number of worked examples: give one such as 3, or unset it.')
  add_twins(int(_shots))
