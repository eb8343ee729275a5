"""SuperGLUE as T5 has it (https://arxiv.org/abs/1910.10683, appendix D), with its official metrics.

  super_glue_boolq_v102    'inputs' "boolq passage: Persian is ... question: do iran and ..."     'targets' "True"
  super_glue_record_v102   'inputs' "record query: @placeholder ... entities: A, B passage: ..."  'targets' "B"
  super_glue_wsc_v102_...  'inputs' "wsc: The stable was roomy ... and made *it* pleasant"        'targets' "The stable"

and likewise cb, copa, multirc, rte, wic. WSC is trained on the referents that are right (..._simple_train), and judged
by whether the model's own is the one in question (..._simple_eval). super_glue_v102_proportional mixes all by size.
"""

import functools
from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from tasks.glue import NO_LABEL, SPLITS, Example, add_classification, classify
from tasks.metrics import Grouped, accuracy, macro_f1, multirc, record
from tasks.postprocessors import class_of
from tasks.preprocessors import TO_TOKENS
from tasks.tfds_source import TfdsSource
from tasks.vocabularies import features

BOOLEAN = ('False', 'True')
# Words that a noun phrase may have or lack and still be the same.
DETERMINERS = frozenset(
  {
    *('a', 'an', 'few', 'her', 'his', 'each', 'every', 'many', 'much', 'my', 'our', 'some', 'that', 'the', 'their'),
    *('these', 'this', 'those', 'which', 'whose', 'your'),
  }
)


# ---- MultiRC ---------------------------------------------------------------------------------------------------------
@seqio.map_over_dataset
def without_markup(example: Example) -> dict[str, tf.Tensor]:
  """Line breaks become blanks, and bold letters plain."""
  inputs = tf.strings.regex_replace(example['inputs'], '<br>', ' ')
  return {**example, 'inputs': tf.strings.regex_replace(inputs, '</?b>', '')}


def answer_of_question(text: str, example: Mapping[str, Any], is_target: bool) -> Grouped | int:
  """Whether an answer is right, and as a target, to which question."""
  label = class_of(text, BOOLEAN)
  if not is_target:
    return label
  return Grouped((int(example['idx/paragraph']), int(example['idx/question'])), label)


# ---- ReCoRD ----------------------------------------------------------------------------------------------------------
def fill_placeholder(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """A query with entities and answers -> an example for each answer, all of which know all answers."""

  def text(example: Example) -> dict[str, tf.Tensor]:
    # Highlights become sentences, those that lack a full stop included.
    passage = tf.strings.regex_replace(example['passage'], r'([.?!"\'])\n@highlight\n', r'\1 ')
    passage = tf.strings.regex_replace(passage, r'\n@highlight\n', '. ')
    entities = tf.strings.reduce_join(example['entities'], separator=', ')
    words = ['record query:', example['query'], 'entities:', entities, 'passage:', passage]
    answers = example['answers']
    targets = tf.cond(tf.size(answers) > 0, lambda: answers, lambda: tf.constant([NO_LABEL]))
    shared = {
      'inputs': tf.strings.join(words, separator=' '),
      'idx/passage': example['idx']['passage'],
      'idx/query': example['idx']['query'],
    }
    count = tf.size(targets)
    return {
      'targets': targets,
      'answers': tf.tile(answers[None], [count, 1]),
      **{name: tf.fill([count], value) for name, value in shared.items()},
    }

  return dataset.map(text, num_parallel_calls=tf.data.AUTOTUNE).unbatch()


def answers_of_query(text: str, example: Mapping[str, Any], is_target: bool) -> Grouped | str:
  """As a target, all answers, and to which query."""
  if not is_target:
    return text
  answers = [answer.decode() for answer in example['answers']]
  return Grouped((int(example['idx/passage']), int(example['idx/query'])), answers)


# ---- WSC -------------------------------------------------------------------------------------------------------------
def star_pronoun(dataset: tf.data.Dataset, correct_only: bool) -> tf.data.Dataset:
  """A sentence -> with stars around the pronoun, and the noun that it may refer to, or with `correct_only` does."""
  if correct_only:
    dataset = dataset.filter(lambda example: tf.equal(example['label'], 1))

  def star(example: Example) -> dict[str, tf.Tensor]:
    words = tf.strings.split(example['text'], sep=' ')
    pattern = tf.strings.join([r'\b', example['span2_text'], r'\b'])
    starred = tf.strings.join(['*', example['span2_text'], '*'])
    changed = tf.strings.regex_replace(words, pattern, starred, replace_global=False)
    # Where the index of a word is wrong, as that of a few is, the nearest word that has the pronoun in it.
    distance = tf.abs(tf.range(tf.size(words)) - tf.cast(example['span2_index'], tf.int32))
    place = tf.argmin(tf.where(tf.equal(words, changed), tf.int32.max, distance), output_type=tf.int32)
    words = tf.where(tf.range(tf.size(words)) == place, changed, words)
    return {
      'inputs': tf.strings.join(['wsc: ', tf.strings.reduce_join(words, separator=' ')]),
      'targets': example['span1_text'],
      'label': tf.cast(example['label'], tf.int32),
    }

  return dataset.map(star, num_parallel_calls=tf.data.AUTOTUNE)


def is_referent(text: str, example: Mapping[str, Any], is_target: bool) -> int:
  """1 if the noun that the model gives is the one in question, or as a target, if that is right; otherwise 0."""
  if is_target:
    return int(example['label'])
  given, asked = (_without_determiners(noun) for noun in (text, example['targets_pretokenized'].decode()))
  if not given or ("'" in ''.join(given)) != ("'" in ''.join(asked)):  # an owner is not what is owned
    return 0
  return int(given <= asked or asked <= given)  # 'rabbit' is 'the brown rabbit'


def _without_determiners(noun: str) -> set[str]:
  return set(noun.strip().lower().split()) - DETERMINERS


# ---- Tasks -----------------------------------------------------------------------------------------------------------
_INFERENCE = ('hypothesis', 'premise')
_TASKS = {  # config -> (fields, classes, metrics)
  'boolq': (('passage', 'question'), BOOLEAN, (accuracy,)),
  'cb': (_INFERENCE, ('entailment', 'contradiction', 'neutral'), (macro_f1, accuracy)),
  'copa': (('choice1', 'choice2', 'premise', 'question'), ('choice1', 'choice2'), (accuracy,)),
  'rte': (_INFERENCE, ('entailment', 'not_entailment'), (accuracy,)),
  'wic': (('sentence1', 'sentence2', 'word'), BOOLEAN, (accuracy,)),
}
_SIZES = {  # examples for training; of ReCoRD, answers
  **{'boolq': 9427, 'cb': 250, 'copa': 400, 'multirc': 27243, 'record': 138854, 'rte': 2490, 'wic': 5428},
}
_WSC_RIGHT, _WSC_VALIDATION = 259, 104

for _config, (_fields, _classes, _metrics) in _TASKS.items():
  add_classification(f'super_glue_{_config}_v102', f'super_glue/{_config}:1.0.2', _fields, _classes, _metrics)

_classify_answers = functools.partial(
  classify,
  benchmark='multirc',
  classes=BOOLEAN,
  fields=('question', 'answer', 'paragraph'),
  kept=('paragraph', 'question'),
)
for _config, _preprocessors, _postprocess, _metric in (
  ('multirc', (_classify_answers, without_markup), answer_of_question, multirc),
  ('record', (fill_placeholder,), answers_of_query, record),
):
  seqio.TaskRegistry.add(
    f'super_glue_{_config}_v102',
    source=TfdsSource(f'super_glue/{_config}:1.0.2', splits=SPLITS),
    preprocessors=[*_preprocessors, *TO_TOKENS],
    output_features=features(),
    postprocess_fn=_postprocess,
    metric_fns=[_metric],
  )

for _name, _splits, _metrics in (('train', SPLITS[:1], ()), ('eval', SPLITS[1:], (accuracy,))):
  seqio.TaskRegistry.add(
    f'super_glue_wsc_v102_simple_{_name}',
    source=TfdsSource('super_glue/wsc.fixed:1.0.2', splits=_splits),
    preprocessors=[functools.partial(star_pronoun, correct_only=_name == 'train'), *TO_TOKENS],
    output_features=features(),
    postprocess_fn=is_referent,
    metric_fns=_metrics,
  )

seqio.MixtureRegistry.add(
  'super_glue_v102_proportional',
  [
    *((f'super_glue_{config}_v102', size) for config, size in _SIZES.items()),
    ('super_glue_wsc_v102_simple_train', _WSC_RIGHT),
    ('super_glue_wsc_v102_simple_eval', _WSC_VALIDATION),
  ],
)
