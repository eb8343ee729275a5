"""Baselines that a language model of bytes must beat, measured on the same bytes."""

import zlib

import numpy as np


def unigram_bits_per_byte(train: bytes, test: bytes) -> float:
  """Cross-entropy of `test` in bits per byte under byte frequencies of `train`, each counted once more (Laplace)."""
  counts = np.bincount(np.frombuffer(train, np.uint8), minlength=256) + 1.0
  bits = -np.log2(counts / counts.sum())
  return float(bits[np.frombuffer(test, np.uint8)].mean())


def zlib_bits_per_byte(test: bytes) -> float:
  """Size of `test` after `zlib -9`, in bits per byte.

  It looks back 32 KiB, beyond a model's sequence; but pieces of shuffled texts repeat less than one text does.
  """
  return 8 * len(zlib.compress(test, 9)) / len(test)
