"""How attention learns where tokens stand: rotary angles, or T5's relative position buckets."""

import math

import flax.linen as nn
import jax.numpy as jnp

from moe_jax.sharding import partitioned
from moe_jax.types import Array


def rotate(x: Array, positions: Array, base: float = 10_000.0) -> Array:
  """Rotary position embedding (Su et al. 2021), halves rotated against each other.

  Args:
    x: float[B, L, H, D], queries or keys; D is even.
    positions: int32[B, L].
    base: the longest wavelength is 2 pi base.

  Returns:
    float[B, L, H, D] of the same dtype; the rotation is done in float32.
  """
  half = x.shape[-1] // 2
  frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
  sin, cos = jnp.sin(angles), jnp.cos(angles)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def relative_buckets(distance: Array, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128) -> Array:
  """T5's buckets of key position minus query position: exact when near, logarithmic when far (Raffel et al. 2020).

  Args:
    distance: int32[...], key position - query position.
    bidirectional: keys after the query get half of the buckets; else they share bucket 0 (the mask hides them).
    num_buckets: buckets in all.
    max_distance: from here on everything shares the last bucket.

  Returns:
    int32[...] in [0, num_buckets).
  """
  offset = jnp.zeros_like(distance)
  if bidirectional:
    num_buckets //= 2
    offset = jnp.where(distance > 0, num_buckets, 0)
    distance = jnp.abs(distance)
  else:
    distance = jnp.maximum(-distance, 0)
  exact = num_buckets // 2
  scale = (num_buckets - exact) / math.log(max_distance / exact)
  log = exact + (jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) * scale).astype(jnp.int32)
  return offset + jnp.where(distance < exact, distance, jnp.minimum(log, num_buckets - 1))


def relative_bias(table: Array, query_index: Array, key_index: Array, bidirectional: bool) -> Array:
  """Attention bias float32[1, H, Lq, Lk] from a table float[buckets, H] and the places int32[Lq], int32[Lk]."""
  distance = key_index[None, :] - query_index[:, None]
  bias = table[relative_buckets(distance, bidirectional, num_buckets=table.shape[0])]
  return jnp.moveaxis(bias, -1, 0)[None].astype(jnp.float32)


class RelativeTable(nn.Module):
  """T5's learned bias per bucket and head: () -> float32[buckets, H]. One per layer, or one shared by a stack."""

  num_heads: int
  num_buckets: int = 32

  @nn.compact
  def __call__(self) -> Array:
    init = nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform')
    return self.param('table', partitioned(init, None, 'heads'), (self.num_buckets, self.num_heads))
