"""The dense feed-forward sublayer against its equations (Shazeer 2020)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.context import Context
from moe_jax.layers.mlp import ACTIVATIONS, Mlp, apply_activations
from moe_jax.types import Aux

B, L, M, F = 2, 3, 4, 6
X = np.random.default_rng(0).normal(size=(B, L, M)).astype(np.float32)


def context(train=False):
  ones = jnp.ones((B, L), jnp.int32)
  return Context(ones, ones, jnp.float32(B * L), train=train)


def gelu(x):
  return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


BY_HAND = {
  'linear': lambda x: x,
  'relu': lambda x: np.maximum(x, 0),
  'gelu': gelu,
  'silu': lambda x: x / (1 + np.exp(-x)),
}


@pytest.mark.parametrize('activations', [('relu',), ('gelu', 'linear'), ('silu', 'linear'), ('relu', 'gelu', 'linear')])
def test_equation(activations):
  """GEGLU is (gelu(x V) * (x W)) U, and so on."""
  layer = Mlp(F, activations)
  params = nn.unbox(layer.init(jax.random.key(0), X, context()))['params']
  names = [f'wi_{i}' for i in range(len(activations))]
  assert {name: p.shape for name, p in params.items()} == dict.fromkeys(names, (M, F)) | {'wo': (F, M)}
  y, aux = layer.apply({'params': params}, X, context())
  hidden = np.prod(
    [BY_HAND[a](X @ np.asarray(params[name])) for a, name in zip(activations, names, strict=True)], axis=0
  )
  np.testing.assert_allclose(y, hidden @ np.asarray(params['wo']), rtol=1e-4, atol=1e-6)
  assert aux == Aux()


def test_activations():
  x = np.linspace(-4, 4, 9, dtype=np.float32)
  assert ACTIVATIONS.keys() == BY_HAND.keys()
  for name, by_hand in BY_HAND.items():
    np.testing.assert_allclose(apply_activations([jnp.asarray(x)], (name,)), by_hand(x), rtol=1e-4, atol=1e-5)


def test_dropout_is_for_training():
  layer = Mlp(512, ('linear',), dropout_rate=0.5)
  params = {'wi_0': jnp.ones((M, 512)), 'wo': jnp.ones((512, M))}
  x, rngs = jnp.ones((B, L, M)), {'dropout': jax.random.key(0)}
  calm, _ = layer.apply({'params': params}, x, context(), rngs=rngs)
  np.testing.assert_array_equal(calm, np.full((B, L, M), 512 * M))
  noisy, _ = layer.apply({'params': params}, x, context(train=True), rngs=rngs)
  kept = np.asarray(noisy) / (2 * 512 * M)  # what is kept is doubled
  assert np.all(np.abs(kept - 0.5) < 0.15) and len(np.unique(kept)) > 1


def test_bfloat16_keeps_float32_weights():
  layer = Mlp(F, dtype='bfloat16')
  params = nn.unbox(layer.init(jax.random.key(0), X, context()))['params']
  y, _ = layer.apply({'params': params}, X, context())
  expected, _ = Mlp(F).apply({'params': params}, X, context())
  assert y.dtype == 'bfloat16' and params['wi_0'].dtype == params['wo'].dtype == 'float32'
  np.testing.assert_allclose(y.astype('float32'), expected, atol=0.05)
