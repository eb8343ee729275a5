"""Trains a SentencePiece vocabulary on text files.

  python -m tasks.train_vocabulary --input='~/notes/**/*.txt' --output=mine --size=8000

Writes mine.model and mine.vocab. Ids are as seqio and T5 have them: 0 padding, 1 EOS, 2 unknown; a character that was
not seen is its bytes. Tasks take it by VOCABULARY=mine.model, and add a hundred sentinels: --gin.VOCAB_SIZE is N + 100,
rounded up to a multiple of 128.
"""

import argparse
import glob
import os
import sys
from collections.abc import Iterator, Sequence

import sentencepiece

from moe_jax.types import ConfigError

LONGEST = 1000  # letters that are looked at as a whole; SentencePiece skips what has more than 4192 bytes


def train(pattern: str, output: str, size: int, kind: str = 'unigram', sentences: int = 1_000_000) -> str:
  """Writes OUTPUT.model and OUTPUT.vocab of `size` pieces; returns the path of the model.

  Args:
    pattern: of the files, such as '~/notes/**/*.txt'.
    kind: 'unigram' or 'bpe'.
    sentences: how many lines are looked at, drawn at random.

  Raises:
    ConfigError: if there is no text, or too little for so many pieces.
  """
  paths = sorted(path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path))
  if not paths:
    raise ConfigError(f"--input={pattern!r} names no file: give one such as '~/notes/**/*.txt'.")
  output = os.path.expanduser(output)
  try:
    sentencepiece.SentencePieceTrainer.Train(
      sentence_iterator=_lines(paths),
      model_prefix=output,
      vocab_size=size,
      model_type=kind,
      byte_fallback=True,
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      character_coverage=0.9995,
      input_sentence_size=sentences,
      shuffle_input_sentence=True,
      normalization_rule_name='identity',  # nothing of the text is lost
      remove_extra_whitespaces=False,
      split_digits=True,
      minloglevel=2,
    )
  except (RuntimeError, OSError) as error:
    reason = str(error).strip().splitlines()[0].rpartition('] ')[2]
    raise ConfigError(f'No vocabulary of --size={size} comes of {len(paths)} files: {reason}') from error
  return f'{output}.model'


def _lines(paths: Sequence[str]) -> Iterator[str]:
  for path in paths:
    with open(path, encoding='utf-8', errors='ignore') as file:
      for line in file:
        line = line.rstrip('\n')
        yield from (line[start : start + LONGEST] for start in range(0, len(line), LONGEST))


def main(arguments: Sequence[str]) -> int:
  """Returns the exit code; bad input gets one line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--input', required=True, help='a pattern of text files')
  parser.add_argument('--output', required=True, help='path of what is written, without .model')
  parser.add_argument('--size', type=int, default=32_000, help='pieces, without sentinels')
  parser.add_argument('--kind', choices=('unigram', 'bpe'), default='unigram')
  flags = parser.parse_args(arguments)
  try:
    path = train(flags.input, flags.output, flags.size, flags.kind)
  except ConfigError as error:
    print(error, file=sys.stderr)
    return 1
  print(f'{path}: use it with VOCABULARY={path} and --gin.VOCAB_SIZE={-(-(flags.size + 100) // 128) * 128}')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
