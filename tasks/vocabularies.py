"""The vocabulary that tasks share: bytes, or the SentencePiece model that the environment variable VOCABULARY names.

Bytes are 359 ids: 0 padding, 1 EOS, 2 unknown, 256 bytes, and a hundred sentinels last. T5's SentencePiece is 32,000
pieces and the same hundred sentinels, so --gin.VOCAB_SIZE=32128; `tasks/train_vocabulary.py` makes one of your text.
Models that were trained without sentinels, such as Mixtral of 32,000 ids, want VOCABULARY_SENTINELS=0.
"""

import os

import seqio

from moe_jax.types import ConfigError

SENTINELS = int(os.environ.get('VOCABULARY_SENTINELS', '100'))


def vocabulary(path: str | None = None) -> seqio.Vocabulary:
  """The SentencePiece model at `path`, or at $VOCABULARY; without either, bytes.

  Raises:
    ConfigError: if there is no such file.
  """
  path = os.path.expanduser(path or os.environ.get('VOCABULARY', ''))
  if not path:
    return seqio.ByteVocabulary(extra_ids=SENTINELS)
  if not os.path.isfile(path):
    raise ConfigError(f'VOCABULARY={path!r} is no file: give a SentencePiece model, or unset it to have bytes.')
  return seqio.SentencePieceVocabulary(path, extra_ids=SENTINELS)


def features(*names: str) -> dict[str, seqio.Feature]:
  """Output features of text, which end in EOS where nothing is cut off: 'inputs' and 'targets', or those named."""
  feature = seqio.Feature(vocabulary())
  return {name: feature for name in names or ('inputs', 'targets')}
