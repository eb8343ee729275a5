"""Tasks whose answer is free text, as T5 has them: https://arxiv.org/abs/1910.10683, appendix D.

  squad_v010_allanswers  'inputs' "question: What does ... ? context: The ..."        'targets' "the first answer"
  cnn_dailymail_v002     'inputs' "summarize: marouane fellaini and ..."              'targets' "highlights"
  xsum_v110              'inputs' "summarize: The full cost of damage in ..."         'targets' "one sentence"
  wmt_t2t_ende_v003      'inputs' "translate English to German: \"Luigi often ...\""  'targets' "\"Luigi sagte ...\""

and wmt14_ende, wmt14_enfr, wmt15_enfr, wmt16_enro, wmt19_ende, all _v003.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from tasks.metrics import bleu, rouge, squad
from tasks.postprocessors import references_of
from tasks.preprocessors import TO_TOKENS
from tasks.tfds_source import TfdsSource
from tasks.vocabularies import features

Example = Mapping[str, Any]
LANGUAGES = {'en': 'English', 'de': 'German', 'fr': 'French', 'ro': 'Romanian'}
SPLITS = ('train', 'validation', 'test')


def spaced(text: tf.Tensor) -> tf.Tensor:
  """Blanks around all that is no letter, accent, digit or underscore, and single blanks everywhere; string[...]."""
  text = tf.strings.regex_replace(text, r'([^_\s\p{N}\p{L}\p{M}])', r' \1 ')
  return tf.strings.regex_replace(text, r'\s+', ' ')


@seqio.map_over_dataset
def answer_question(example: Example) -> dict[str, tf.Tensor]:
  """SQuAD: the first answer is learned, and any is right ('references', string[n])."""
  question, context, answers = (
    spaced(x) for x in (example['question'], example['context'], example['answers']['text'])
  )
  inputs = tf.strings.join(['question:', question, 'context:', context], separator=' ')
  return {'inputs': inputs, 'targets': answers[0], 'references': answers}


@seqio.map_over_dataset
def summarize(example: Example, article: str, summary: str) -> dict[str, tf.Tensor]:
  """Features of these names -> "summarize: article" and the summary."""
  return {'inputs': tf.strings.join(['summarize:', example[article]], separator=' '), 'targets': example[summary]}


@seqio.map_over_dataset
def translate(example: Example, source: str, target: str) -> dict[str, tf.Tensor]:
  """Features named by two languages -> "translate English to German: ..." and the translation."""
  command = f'translate {LANGUAGES[source]} to {LANGUAGES[target]}:'
  return {'inputs': tf.strings.join([command, example[source]], separator=' '), 'targets': example[target]}


def _add(
  name: str,
  tfds_name: str,
  preprocessor: Callable[..., tf.data.Dataset],
  metric: Callable[..., Mapping],
  splits: Sequence[str] = SPLITS,
  postprocess: Callable[..., Any] | None = None,
) -> None:
  seqio.TaskRegistry.add(
    name,
    source=TfdsSource(tfds_name, splits=splits),
    preprocessors=[preprocessor, *TO_TOKENS],
    output_features=features(),
    postprocess_fn=postprocess,
    metric_fns=[metric],
  )


_add('squad_v010_allanswers', 'squad/v1.1:3.0.0', answer_question, squad, SPLITS[:2], references_of)
for _name, _tfds_name, _article, _summary in (
  ('cnn_dailymail_v002', 'cnn_dailymail:3.4.0', 'article', 'highlights'),
  ('xsum_v110', 'xsum:1.1.0', 'document', 'summary'),
):
  _add(_name, _tfds_name, functools.partial(summarize, article=_article, summary=_summary), rouge)
for _edition, _tfds_name, _target in (
  ('_t2t', 'wmt_t2t_translate/de-en:1.0.0', 'de'),
  ('14', 'wmt14_translate/de-en:1.0.0', 'de'),
  ('14', 'wmt14_translate/fr-en:1.0.0', 'fr'),
  ('15', 'wmt15_translate/fr-en:1.0.0', 'fr'),
  ('16', 'wmt16_translate/ro-en:1.0.0', 'ro'),
  ('19', 'wmt19_translate/de-en:1.0.0', 'de'),
):
  _splits = SPLITS[:2] if _edition == '19' else SPLITS
  _translate = functools.partial(translate, source='en', target=_target)
  _add(f'wmt{_edition}_en{_target}_v003', _tfds_name, _translate, bleu, _splits)
