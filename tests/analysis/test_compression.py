"""Baselines by hand."""

import zlib

import pytest

from moe_jax.analysis.compression import unigram_bits_per_byte, zlib_bits_per_byte


def test_unigrams():
  # 'a' was counted 255 + 1 times and every other byte once, of 511: log2 of what that makes of 'a' and of 'b'.
  assert unigram_bits_per_byte(b'a' * 255, b'a') == pytest.approx(0.99718, abs=1e-5)
  assert unigram_bits_per_byte(b'a' * 255, b'ab') == pytest.approx((0.99718 + 8.99718) / 2, abs=1e-5)
  assert unigram_bits_per_byte(b'', bytes(range(256))) == 8.0


def test_zlib():
  text = b'to be or not to be' * 100
  assert zlib_bits_per_byte(text) == 8 * len(zlib.compress(text, 9)) / 1800 < 1
