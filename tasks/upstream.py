"""Text to pretrain on: C4, mC4, Wikipedia, and GLaM's mixture, each for three objectives.

  c4_v220_span_corruption                        'inputs', 'targets'   T5's
  c4_v220_prefix_lm                              'inputs', 'targets'   a text cut in two; for prefix language models too
  c4_v220_autoregressive_language_modeling       'targets'             for decoder-only models

and likewise c4_v310, wikipedia_20230601.en_v100 (and 20190301, T5's), mc4.de and all other languages of mC4, bg-Latn as
bg_Latn, and the mixtures mc4 (languages by their sizes to the power 0.3, as mT5) and glam. Documents are cut into
chunks and never joined: several are packed into a row.

GLaM's corpus (https://arxiv.org/abs/2112.06905, table 1) is not public. C4 stands for its web pages; conversations,
forums, books and news are the folders of these names in $GLAM_TEXT, one document a file, and what is missing there is
left out: the rest keep their weights to each other.
"""

import functools
import os
from collections.abc import Sequence

import seqio
import tensorflow as tf
from tensorflow_datasets.text.c4 import MC4_LANGUAGES

from tasks.local_text import LocalFiles
from tasks.preprocessors import chunk_targets, corrupt_spans, split_prefix
from tasks.tfds_source import TfdsSource
from tasks.vocabularies import features

WIKIPEDIA = 'wikipedia_20230601.en_v100'
GLAM_WEIGHTS = {'web': 0.42, 'wikipedia': 0.06, 'conversations': 0.28, 'forums': 0.02, 'books': 0.20, 'news': 0.02}
MT5_TEMPERATURE = 1 / 0.3

_append_eos = seqio.preprocessors.append_eos
_OBJECTIVES = {  # name -> (what is done to tokens of documents, features)
  'span_corruption': ((corrupt_spans, _append_eos), ('inputs', 'targets')),
  'prefix_lm': ((split_prefix, _append_eos), ('inputs', 'targets')),
  'autoregressive_language_modeling': ((_append_eos, chunk_targets), ('targets',)),
}


@seqio.map_over_dataset
def text_as_targets(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
  """{'text': string[], ...} -> {'targets': string[]}."""
  return {'targets': example['text']}


def add_corpus(name: str, source: seqio.DataSource) -> None:
  """Registers a source of documents, 'text' string[], for each objective."""
  for objective, (steps, names) in _OBJECTIVES.items():
    seqio.TaskRegistry.add(
      f'{name}_{objective}',
      source=source,
      preprocessors=[
        text_as_targets,
        functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
        seqio.CacheDatasetPlaceholder(),
        *steps,
      ],
      output_features=features(*names),
    )


def add_mixture(name: str, corpora: Sequence[tuple[str, object]]) -> None:
  """Registers a mixture of corpora, each with its rate, for each objective."""
  for objective in _OBJECTIVES:
    tasks = [(f'{corpus}_{objective}', rate) for corpus, rate in corpora]
    seqio.MixtureRegistry.add(f'{name}_{objective}', tasks)


for _version in ('2.2.0', '3.1.0'):
  _source = TfdsSource(f'c4/en:{_version}', splits=('train', 'validation'))
  add_corpus(f'c4_v{_version.replace(".", "")}', _source)

for _date in ('20230601', '20190301'):
  # Wikipedia has no validation of its own.
  _splits = {'train': 'train[:99%]', 'validation': 'train[99%:]'}
  add_corpus(f'wikipedia_{_date}.en_v100', TfdsSource(f'wikipedia/{_date}.en:1.0.0', splits=_splits))


def _mc4(language: str) -> str:
  return f'mc4.{language.replace("-", "_")}'


for _language in MC4_LANGUAGES:
  _splits = {'train': _language, 'validation': f'{_language}-validation'}
  add_corpus(_mc4(_language), TfdsSource('c4/multilingual:3.1.0', splits=_splits))
_by_size = functools.partial(seqio.mixing_rate_num_examples, temperature=MT5_TEMPERATURE)
add_mixture('mc4', [(_mc4(language), _by_size) for language in MC4_LANGUAGES])

_glam = {'web': 'c4_v310', 'wikipedia': WIKIPEDIA}
for _part in ('conversations', 'forums', 'books', 'news'):
  _folder = os.path.join(os.path.expanduser(os.environ.get('GLAM_TEXT', '')), _part)
  if os.environ.get('GLAM_TEXT') and os.path.isdir(_folder):
    _glam[_part] = f'glam_{_part}'
    add_corpus(_glam[_part], LocalFiles(os.path.join(_folder, '**')))
add_mixture('glam', [(corpus, GLAM_WEIGHTS[part]) for part, corpus in _glam.items()])
