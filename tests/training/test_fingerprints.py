"""Fingerprints: every flipped bit shows, and no mesh does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.training.fingerprints import fingerprint, fingerprints

DTYPES = ['float32', 'bfloat16', 'float16', 'int32', 'uint8', 'int8']
mark = jax.jit(fingerprint)


@given(st.sampled_from(DTYPES), st.integers(0, 2**32 - 1), st.data())
def test_any_flipped_bit_shows(dtype, seed, data):
  shape = (3, 5, 2)
  width = jnp.dtype(dtype).itemsize
  raw = np.random.default_rng(seed).integers(0, 256, 30 * width, np.uint8)
  before = raw.view(jnp.dtype(dtype)).reshape(shape)
  bit = data.draw(st.integers(0, 8 * raw.size - 1))
  flipped = raw.copy()
  flipped[bit // 8] ^= 1 << (bit % 8)
  assert mark(before) == mark(before.copy())
  assert mark(before) != mark(flipped.view(jnp.dtype(dtype)).reshape(shape))


def test_elements_that_change_places_show():
  x = np.arange(24.0, dtype=np.float32).reshape(4, 6)
  swapped = x.copy()
  swapped[0, 0], swapped[3, 1] = x[3, 1], x[0, 0]
  assert mark(x) != mark(swapped) and mark(x) != mark(x.reshape(6, 4).T.reshape(4, 6))
  assert mark(np.array([True, False])) != mark(np.array([False, True]))


@pytest.mark.parametrize('axes', [('data', None), (None, 'expert'), (('data', 'expert'), None)])
def test_no_mesh_shows(axes, mesh):
  x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
  laid = jax.device_put(x, NamedSharding(mesh(2, 4, 1), PartitionSpec(*axes)))
  assert jax.jit(fingerprints)({'a': {'b': laid}}) == {'a/b': mark(x)}
