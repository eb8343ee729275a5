"""The way to the vocabulary."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.embeddings import TokenEmbedding


@pytest.mark.parametrize('tied', [True, False])
def test_logits_are_float32_under_bfloat16(getkey, tied):
  """Computed so, not rounded first."""
  layer = TokenEmbedding(vocab_size=32, embed_dim=64, tied=tied, dtype='bfloat16')
  x = jax.random.normal(getkey(), (2, 3, 64), jnp.bfloat16)
  variables = nn.unbox(layer.init(getkey(), x, method='decode'))
  logits = layer.apply(variables, x, method='decode')
  assert logits.dtype == jnp.float32
  assert np.any(logits != logits.astype(jnp.bfloat16).astype(jnp.float32))


def test_tied_logits_by_hand(getkey):
  layer = TokenEmbedding(vocab_size=32, embed_dim=64)
  x = jax.random.normal(getkey(), (2, 3, 64))
  variables = nn.unbox(layer.init(getkey(), x, method='decode'))
  expected = np.asarray(x) @ np.asarray(variables['params']['table']).T / 8
  np.testing.assert_allclose(layer.apply(variables, x, method='decode'), expected, rtol=1e-5, atol=1e-5)
  token = layer.apply(variables, jnp.array([[7]]), method='encode')
  np.testing.assert_array_equal(token[0, 0], variables['params']['table'][7])
