"""Fingerprints of arrays: whether what is read is what was written, bit by bit, on whatever mesh."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.types import Array, path_name

PyTree = Any
_ODD = 2654435769  # 2^32 over the golden ratio: neighbouring places get unlike weights


def fingerprints(tree: PyTree) -> dict[str, Array]:
  """Path -> uint32[] of each array: the sum of its words, each times an odd number that its place gives, modulo 2^32.

  One flipped bit changes a word by a power of two, and an odd number times that is never 0 modulo 2^32, so it always
  shows; other damage does but once in four billion times. Sums modulo 2^32 come out alike in any order, so every mesh
  gives the same. Call it under `jax.jit`.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_name(path): fingerprint(leaf) for path, leaf in leaves}


def fingerprint(x: Array) -> Array:
  """Of one array, see `fingerprints`."""
  words = _words(x).astype(jnp.uint32)
  place = jnp.uint32(0)
  for axis in range(words.ndim):
    stride = np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
    place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * stride
  return jnp.sum(words * (place * jnp.uint32(_ODD) | jnp.uint32(1)), dtype=jnp.uint32)


def _words(x: Array) -> Array:
  """The bits of each element as an unsigned integer of its width."""
  if jnp.issubdtype(x.dtype, jnp.bool_):
    return x.astype(jnp.uint8)
  return jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * x.dtype.itemsize}'))
