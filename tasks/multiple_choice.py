"""Multiple choice by rank classification: each choice is an example, and the likeliest is the answer.

  arc_easy, arc_challenge   'inputs' "question: Which ...? answer:"   'targets' "magnetism"   AI2's reasoning challenge

The right choices are trained on (arc_easy_train), and all are scored (arc_easy_score_eval); arc_easy and arc_challenge
mix both, so that one name does for training and evaluation.
"""

import functools
from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from tasks.metrics import multiple_choice
from tasks.postprocessors import choice_of_question
from tasks.preprocessors import TO_TOKENS
from tasks.tfds_source import TfdsSource
from tasks.vocabularies import features

Example = Mapping[str, Any]


# ---- Rank classification ---------------------------------------------------------------------------------------------
def rank_choices(dataset: tf.data.Dataset, correct_only: bool = False) -> tf.data.Dataset:
  """Each choice of a question as an example, or with `correct_only` those that are worth something.

  Args:
    dataset: 'inputs' string[], 'choices' string[n], and 'worth' float32[n], 1 where a choice is right.

  Returns:
    'inputs' and 'targets' string[], 'worth' float32[], and 'question', int64[], the same for all choices of one.
  """

  def choices(example: Example) -> dict[str, tf.Tensor]:
    count = tf.size(example['choices'])
    # A hash and no running number: caches are written shard by shard.
    text = tf.strings.reduce_join(tf.concat([[example['inputs']], example['choices']], 0), separator='\n')
    shared = {'question': tf.strings.to_hash_bucket_fast(text, 2**62), 'inputs': example['inputs']}
    repeated = {name: tf.fill([count], value) for name, value in shared.items()}
    return {**repeated, 'targets': example['choices'], 'worth': example['worth']}

  dataset = dataset.map(choices, num_parallel_calls=tf.data.AUTOTUNE).unbatch()
  return dataset.filter(lambda example: example['worth'] > 0) if correct_only else dataset


# ---- ARC -------------------------------------------------------------------------------------------------------------
@seqio.map_over_dataset
def ask_arc(example: Example) -> dict[str, tf.Tensor]:
  """A question of ARC for `rank_choices`."""
  inputs = tf.strings.join(['question:', example['question'], 'answer:'], separator=' ')
  worth = tf.cast(tf.equal(example['choices']['label'], example['answerKey']), tf.float32)
  return {'inputs': inputs, 'choices': example['choices']['text'], 'worth': worth}


for _name, _config in (('arc_easy', 'ARC-Easy'), ('arc_challenge', 'ARC-Challenge')):
  for _part, _splits in (('train', ('train',)), ('score_eval', ('validation', 'test'))):
    seqio.TaskRegistry.add(
      f'{_name}_{_part}',
      source=TfdsSource(f'ai2_arc/{_config}:1.0.0', splits=_splits),
      preprocessors=[ask_arc, functools.partial(rank_choices, correct_only=_part == 'train'), *TO_TOKENS],
      output_features=features(),
      postprocess_fn=choice_of_question,
      metric_fns=[] if _part == 'train' else [multiple_choice],
    )
  seqio.MixtureRegistry.add(_name, [f'{_name}_train', f'{_name}_score_eval'], default_rate=1.0)
