"""GLUE as T5 has it: https://arxiv.org/abs/1910.10683, appendix D. Every feature is named in front of its text.

  glue_cola_v002    'inputs' "cola sentence: John made Bill master of himself."    'targets' "acceptable"

and likewise sst2, mrpc, qqp, stsb, mnli (with mnli_matched and mnli_mismatched, its validation), qnli, rte, wnli.
Their mixture by size, glue_v002_proportional, leaves WNLI out. `superglue.py` has the same formats and uses these.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from tasks.metrics import accuracy, binary_f1, correlations, matthews_correlation
from tasks.postprocessors import class_of, rating_of
from tasks.preprocessors import TO_TOKENS
from tasks.tfds_source import TfdsSource
from tasks.vocabularies import features

Example = Mapping[str, Any]
NO_LABEL = '<unk>'  # the target where the label is secret
SPLITS = ('train', 'validation', 'test')


@seqio.map_over_dataset
def classify(
  example: Example, benchmark: str, classes: Sequence[str], fields: Sequence[str], kept: Sequence[str] = ()
) -> dict[str, tf.Tensor]:
  """Texts and a label -> "benchmark field: text field: text" and the name of the class.

  Args:
    example: `fields`, string[], and 'label', int[], -1 where it is secret.
    kept: parts of 'idx' to go along as 'idx/part'.
  """
  words = [benchmark]
  for field in fields:
    words += [f'{field}:', example[field]]
  label = tf.cast(example['label'], tf.int32)
  return {
    'inputs': tf.strings.join(words, separator=' '),
    'targets': tf.gather(tf.constant([NO_LABEL, *classes]), label + 1),
    **{f'idx/{part}': example['idx'][part] for part in kept},
  }


@seqio.map_over_dataset
def rate_similarity(example: Example) -> dict[str, tf.Tensor]:
  """STS-B: the target is the rating, from 0 to 5, rounded to a fifth."""
  texts = ['stsb sentence1:', example['sentence1'], 'sentence2:', example['sentence2']]
  rating = tf.as_string(tf.round(example['label'] * 5) / 5, precision=1)
  return {'inputs': tf.strings.join(texts, separator=' '), 'targets': rating}


def add_classification(
  name: str,
  tfds_name: str,
  fields: Sequence[str],
  classes: Sequence[str],
  metrics: Sequence[Callable[..., Mapping]],
  splits: Sequence[str] = SPLITS,
  benchmark: str | None = None,
) -> None:
  """Registers the task of naming a class of 'label'; `benchmark` is the config of `tfds_name` unless given."""
  benchmark = benchmark or tfds_name.partition('/')[2].partition(':')[0]
  seqio.TaskRegistry.add(
    name,
    source=TfdsSource(tfds_name, splits=splits),
    preprocessors=[functools.partial(classify, benchmark=benchmark, classes=classes, fields=fields), *TO_TOKENS],
    output_features=features(),
    postprocess_fn=functools.partial(class_of, classes=classes),
    metric_fns=metrics,
  )


_PAIR = ('sentence1', 'sentence2')
_MNLI = (('hypothesis', 'premise'), ('entailment', 'neutral', 'contradiction'), (accuracy,))
_MNLI_SPLITS = ('train', 'validation_matched', 'validation_mismatched', 'test_matched', 'test_mismatched')
_TASKS = {  # config -> (fields, classes, metrics)
  'cola': (('sentence',), ('unacceptable', 'acceptable'), (matthews_correlation,)),
  'sst2': (('sentence',), ('negative', 'positive'), (accuracy,)),
  'mrpc': (_PAIR, ('not_equivalent', 'equivalent'), (binary_f1, accuracy)),
  'qqp': (('question1', 'question2'), ('not_duplicate', 'duplicate'), (binary_f1, accuracy)),
  'mnli': _MNLI,
  'mnli_matched': _MNLI,
  'mnli_mismatched': _MNLI,
  'qnli': (('question', 'sentence'), ('entailment', 'not_entailment'), (accuracy,)),
  'rte': (_PAIR, ('entailment', 'not_entailment'), (accuracy,)),
  'wnli': (_PAIR, ('not_entailment', 'entailment'), (accuracy,)),
}
_SIZES = {  # examples for training, by which the mixture is weighted
  **{'cola': 8551, 'sst2': 67349, 'mrpc': 3668, 'qqp': 363849, 'stsb': 5749, 'mnli': 392702, 'qnli': 104743},
  **{'rte': 2490, 'mnli_matched': 9815, 'mnli_mismatched': 9832},  # the last two for validation: they have no others
}

for _config, (_fields, _classes, _metrics) in _TASKS.items():
  _splits = {'mnli': _MNLI_SPLITS, 'mnli_matched': SPLITS[1:], 'mnli_mismatched': SPLITS[1:]}.get(_config, SPLITS)
  _benchmark = _config.partition('_')[0]  # all of MNLI says "mnli"
  add_classification(f'glue_{_config}_v002', f'glue/{_config}:2.0.0', _fields, _classes, _metrics, _splits, _benchmark)
seqio.TaskRegistry.add(
  'glue_stsb_v002',
  source=TfdsSource('glue/stsb:2.0.0', splits=SPLITS),
  preprocessors=[rate_similarity, *TO_TOKENS],
  output_features=features(),
  postprocess_fn=rating_of,
  metric_fns=[correlations],
)
seqio.MixtureRegistry.add('glue_v002_proportional', [(f'glue_{config}_v002', size) for config, size in _SIZES.items()])
