"""Rotary angles turn with distance alone; relative positions fall into T5's buckets."""

import bisect

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.positions import relative_bias, relative_buckets, rotate

B, L, H, D = 1, 6, 2, 8


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), 'float32')


def test_rotation_is_that_of_complex_numbers():
  """x[j] + i x[j + D/2] is multiplied by exp(i position base^(-2j/D)) (Su et al. 2021, eq. 14)."""
  x, positions = normal(0, B, L, H, D), jnp.asarray([[0, 1, 2, 7, 100, 1000]])
  turned = np.asarray(rotate(x, positions, base=500.0), np.float64)
  angle = np.asarray(positions)[..., None, None] * 500.0 ** (-2 * np.arange(D // 2) / D)
  x = np.asarray(x, np.float64)
  expected = (x[..., : D // 2] + 1j * x[..., D // 2 :]) * np.exp(1j * angle)
  np.testing.assert_allclose(turned[..., : D // 2] + 1j * turned[..., D // 2 :], expected, atol=1e-3)
  np.testing.assert_array_equal(turned[:, 0], x[:, 0])
  np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


def test_rotated_products_depend_on_distance_alone():
  query, key = (jnp.broadcast_to(normal(seed, D), (1, L, 1, D)) for seed in (1, 2))
  positions = jnp.arange(L)[None]
  products = [
    np.einsum('qd,kd->qk', rotate(query, positions + shift)[0, :, 0], rotate(key, positions + shift)[0, :, 0])
    for shift in (0, 37)
  ]
  np.testing.assert_allclose(products[0], products[1], atol=1e-4)
  for distance in range(1 - L, L):
    diagonal = np.diagonal(products[0], distance)
    np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
  assert np.ptp(products[0][0]) > 0.1


def test_rotation_keeps_bfloat16_and_turns_in_float32():
  x, positions = normal(3, B, L, H, D).astype('bfloat16'), jnp.asarray([[0, 1, 300, 301, 5000, 5001]])
  turned = rotate(x, positions)
  assert turned.dtype == 'bfloat16'  # in which 300 and 301, and 5000 and 5001, are the same position
  np.testing.assert_array_equal(turned, rotate(x.astype('float32'), positions).astype('bfloat16'))


def bucket(distance, bidirectional, num_buckets, max_distance):
  """By the definition: one bucket a distance to the middle, then edges in geometric progression up to the maximum."""
  offset = 0
  if bidirectional:
    num_buckets //= 2
    offset, distance = num_buckets * (distance > 0), abs(distance)
  else:
    distance = max(-distance, 0)
  exact = num_buckets // 2
  steps = num_buckets - exact
  edges = [*range(1, exact + 1)]
  edges += [exact * (max_distance / exact) ** (i / steps) * (1 - 1e-9) for i in range(1, steps)]
  return offset + bisect.bisect_right(edges, distance)


@pytest.mark.parametrize(('num_buckets', 'max_distance'), [(32, 128), (8, 20), (16, 1000)])
@pytest.mark.parametrize('bidirectional', [False, True])
def test_buckets(bidirectional, num_buckets, max_distance):
  distances = np.arange(-1200, 1201)
  actual = relative_buckets(jnp.asarray(distances), bidirectional, num_buckets, max_distance)
  expected = [bucket(d, bidirectional, num_buckets, max_distance) for d in distances]
  np.testing.assert_array_equal(actual, expected)


def test_known_buckets():
  """Those of T5: 32 buckets, the last from 128 on."""
  behind = -np.array([0, 1, 7, 8, 15, 16, 127, 128, 5000])
  assert relative_buckets(jnp.asarray(behind), False).tolist() == [0, 1, 7, 8, 15, 16, 31, 31, 31]
  assert relative_buckets(jnp.asarray(-behind), False).tolist() == [0] * 9  # ahead: masked anyway
  assert relative_buckets(jnp.asarray(behind), True).tolist() == [0, 1, 7, 8, 9, 10, 15, 15, 15]
  assert relative_buckets(jnp.asarray(-behind), True).tolist() == [0, 17, 23, 24, 25, 26, 31, 31, 31]


def test_bias_is_the_table_read_at_the_buckets():
  table = normal(4, 32, H)
  bias = relative_bias(table, 3 + jnp.arange(2), jnp.arange(5), bidirectional=True)  # the cache holds three tokens
  assert bias.shape == (1, H, 2, 5) and bias.dtype == 'float32'
  for q, k in np.ndindex(2, 5):
    np.testing.assert_array_equal(bias[0, :, q, k], table[bucket(k - 3 - q, True, 32, 128)])
