"""Filling buffers and reading them is two one-hot products, and their derivatives are those of the products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.moe.slots import fill, read, slot_map

M = 3


def random_map(rng, groups, tokens, choices, slots):
  """Choices to different slots of their group, some to none (as many as do not fit, and a fifth of the others)."""
  chosen = np.stack([rng.permutation(max(slots, tokens * choices))[: tokens * choices] for _ in range(groups)])
  chosen = np.where((chosen < slots) & (rng.random(chosen.shape) < 0.8), chosen, slots)
  return chosen.reshape(groups, tokens, choices).astype(np.int32)


def one_hot(chosen, slots):
  """float64[G, S, K, N]."""
  return (chosen[..., None] == np.arange(slots)).astype(np.float64)


def close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-5)


@settings(max_examples=10)  # each compiles anew
@given(
  groups=st.integers(1, 3), tokens=st.integers(1, 6), choices=st.integers(1, 4), slots=st.integers(1, 20),
  seed=st.integers(0, 2**16),
)  # fmt: skip
def test_like_one_hot_products(groups, tokens, choices, slots, seed):
  rng = np.random.default_rng(seed)
  chosen = random_map(rng, groups, tokens, choices, slots)
  x, y = rng.normal(size=(groups, tokens, M)), rng.normal(size=(groups, slots, M))
  weights = rng.random((groups, tokens, choices))
  to_slots, to_tokens = rng.normal(size=y.shape), rng.normal(size=x.shape)
  where, hot = slot_map(jnp.asarray(chosen), slots), one_hot(chosen, slots)
  taken = hot.any(axis=(1, 2))  # [G, N]
  to_slots *= taken[..., None]  # nobody reads an empty slot, so it has no gradient

  filled, pull = jax.vjp(lambda x: fill(x, where), jnp.asarray(x, jnp.float32))
  close(np.asarray(filled)[taken], np.einsum('gskn,gsm->gnm', hot, x)[taken])
  close(pull(jnp.asarray(to_slots, jnp.float32))[0], np.einsum('gskn,gnm->gsm', hot, to_slots))

  done, pull = jax.vjp(lambda y, w: read(y, w, where), *(jnp.asarray(a, jnp.float32) for a in (y, weights)))
  close(done, np.einsum('gskn,gsk,gnm->gsm', hot, weights, y))
  to_y, to_weights = pull(jnp.asarray(to_tokens, jnp.float32))
  close(to_y, np.einsum('gskn,gsk,gsm->gnm', hot, weights, to_tokens))
  close(to_weights, np.einsum('gskn,gsm,gnm->gsk', hot, to_tokens, y))


@pytest.mark.parametrize('crowded', [False, True])
def test_rows_are_scattered_only_where_slots_are_few(crowded):
  groups, tokens, choices, slots = 2, 8, 4, 8 if crowded else 40
  where = slot_map(jnp.asarray(random_map(np.random.default_rng(0), groups, tokens, choices, slots)), slots)
  assert where.crowded == crowded

  def loss(x, weights):
    return jnp.sum(read(2 * fill(x, where), weights, where) ** 2)

  args = jnp.ones((groups, tokens, M)), jnp.ones((groups, tokens, choices))
  text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*args))
  assert (f',{M}] = scatter' in text) == crowded  # what is scattered otherwise has no width
