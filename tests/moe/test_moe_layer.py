"""The expert layer against a loop over tokens and experts, and how it makes its groups."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax import sharding
from moe_jax.layers.context import Context
from moe_jax.layers.mlp import Mlp
from moe_jax.moe.dispatchers.all_to_all import all_to_all
from moe_jax.moe.dispatchers.base import Journey
from moe_jax.moe.dispatchers.einsum import einsum
from moe_jax.moe.experts import Experts
from moe_jax.moe.moe_layer import MoELayer, rows_per_group
from moe_jax.moe.routers.hashing import RandomRouter, RoundRobinRouter
from moe_jax.moe.routers.top_k import TopKRouter
from moe_jax.types import ConfigError

B, L, M, E, F, S = 4, 8, 6, 4, 10, 16
RNG = np.random.default_rng(0)
X = RNG.normal(0, 1, (B, L, M)).astype(np.float32)
SEGMENTS = np.ones((B, L), np.int32)
SEGMENTS[1, 5:] = SEGMENTS[3] = 0


def layer(num_experts=E, group_size=S, dispatcher=None, **router):
  options = {} if dispatcher is None else {'dispatcher': dispatcher}
  experts = functools.partial(Experts, hidden_dim=F)
  return MoELayer(num_experts, group_size, functools.partial(TopKRouter, **router), experts, **options)


def weights(num_experts=E, seed=1):
  rng = np.random.default_rng(seed)
  shapes = {
    'router': {'kernel': (M, num_experts)},
    'experts': {'wi_0': (num_experts, M, F), 'wi_1': (num_experts, M, F), 'wo': (num_experts, F, M)},
  }
  is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
  return jax.tree.map(lambda shape: rng.normal(0, 0.7, shape).astype(np.float32), shapes, is_leaf=is_shape)


def context(segments=SEGMENTS, **facts):
  segments = jnp.asarray(segments)
  return Context(segments, jnp.zeros_like(segments), token_count=jnp.sum(segments > 0).astype('float32'), **facts)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, x, context):
  y, aux = module.apply({'params': params}, x, context, rngs={'router': jax.random.key(0)})
  return y, aux


def gelu(x):
  return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def by_loop(params, x, valid, k, renormalise, capacity):
  """First choices before second: a choice that finds a slot adds gate * expert(token). Also bool[G, S, K], who did."""
  tokens, valid = x.reshape(-1, S, M), valid.reshape(-1, S)
  logits = tokens @ params['router']['kernel']
  probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  best = np.argsort(-probs, axis=-1)[..., :k]
  y, kept = np.zeros_like(tokens), np.zeros(best.shape, bool)
  for g in range(len(tokens)):
    free = [capacity] * probs.shape[-1]
    for j in range(k):
      for s in range(S):
        expert = best[g, s, j]
        if valid[g, s] and free[expert]:
          free[expert] -= 1
          kept[g, s, j] = True
          gate = probs[g, s, expert] / (probs[g, s, best[g, s]].sum() if renormalise else 1)
          wi_0, wi_1, wo = (params['experts'][name][expert] for name in ('wi_0', 'wi_1', 'wo'))
          y[g, s] += gate * (gelu(tokens[g, s] @ wi_0) * (tokens[g, s] @ wi_1)) @ wo
  return y.reshape(x.shape), kept


CASES = {  # router fields, train -> capacity
  'switch': ({'num_selected': 1, 'gates': 'raw', 'capacity_factor': 1.0}, True, 4),
  'top-2': ({'num_selected': 2, 'capacity_factor': 1.0}, True, 4),
  'top-2 without drops': ({'num_selected': 2}, False, S),
}


@pytest.mark.parametrize('case', CASES)
def test_equals_the_loop(case):
  fields, train, capacity = CASES[case]
  params = weights()
  y, aux = apply(layer(**fields), params, X, context(train=train))
  renormalise = fields.get('gates') != 'raw'
  expected, kept = by_loop(params, X, SEGMENTS > 0, fields['num_selected'], renormalise, capacity)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  # What no expert had room for comes back as exactly nothing, and so does padding.
  absent = ~kept.any(-1).reshape(B, L)
  assert np.all(y[absent] == 0) and np.all(np.any(y[~absent] != 0, axis=-1))
  dropped = (absent & (SEGMENTS > 0)).sum() / (SEGMENTS > 0).sum()
  assert aux.metrics['dropped'] == pytest.approx(dropped)
  assert (dropped > 0) == train


@pytest.mark.parametrize('case', CASES)
def test_gradients_equal_those_of_every_expert_on_every_token(case):
  fields, train, capacity = CASES[case]
  params = weights()
  k, renormalise = fields['num_selected'], fields.get('gates') != 'raw'
  kept = jnp.asarray(by_loop(params, X, SEGMENTS > 0, k, renormalise, capacity)[1])

  def dense(params, x):
    tokens = x.reshape(-1, S, M)
    probs = jax.nn.softmax(tokens @ params['router']['kernel'])
    best = jnp.argsort(-probs)[..., :k]
    gates = jnp.take_along_axis(probs, best, -1)
    gates = gates / gates.sum(-1, keepdims=True) if renormalise else gates
    share = jnp.sum(jnp.where(kept, gates, 0)[..., None] * jax.nn.one_hot(best, E), axis=2)
    gate, up = (jnp.einsum('gsm,emf->gsef', tokens, params['experts'][name]) for name in ('wi_0', 'wi_1'))
    hidden = jax.nn.gelu(gate) * up
    return jnp.einsum('gse,gsef,efm->gsm', share, hidden, params['experts']['wo']).reshape(x.shape)

  def gradients(output):
    return jax.jit(jax.grad(lambda *args: jnp.sum(jnp.sin(output(*args))), argnums=(0, 1)))(params, jnp.asarray(X))

  actual = gradients(lambda params, x: apply(layer(**fields), params, x, context(train=train))[0])
  for mine, its in zip(jax.tree.leaves(actual), jax.tree.leaves(gradients(dense)), strict=True):
    np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-5)


def test_one_expert_is_a_dense_layer():
  params = weights(num_experts=1)
  y, aux = apply(layer(num_experts=1, num_selected=1, gates='raw'), params, X, context(np.ones_like(SEGMENTS)))
  dense = {name: weight[0] for name, weight in params['experts'].items()}
  expected, _ = apply(Mlp(F), dense, X, context())
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
  assert aux.metrics['balance'] == 1


def test_experts_have_no_order():
  params, order = weights(), np.array([2, 0, 3, 1])
  shuffled = {
    'router': {'kernel': params['router']['kernel'][:, order]},
    'experts': {name: weight[order] for name, weight in params['experts'].items()},
  }
  y, aux = apply(layer(capacity_factor=1.0), params, X, context(train=True))
  other, other_aux = apply(layer(capacity_factor=1.0), shuffled, X, context(train=True))
  np.testing.assert_allclose(other, y, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(other_aux.metrics['expert_load'], aux.metrics['expert_load'][order], rtol=1e-6)


@pytest.mark.parametrize(('fields', 'train'), [({'num_selected': 1, 'gates': 'raw'}, True), ({}, False)])
def test_the_past_does_not_know_the_future(fields, train):
  """Top-1 routes left to right; outside training nothing is dropped. (In training a second choice is not causal.)"""
  later = np.where(np.arange(L)[None, :, None] < 5, X, X[::-1])
  module = layer(**fields, group_size=L, capacity_factor=1.0)
  y, other = (apply(module, weights(), x, context(train=train))[0] for x in (X, later))
  np.testing.assert_allclose(other[:, :5], y[:, :5], rtol=1e-5, atol=1e-6)


def test_jitter_is_for_the_router_alone():
  def pass_by(bank, tokens, plan):
    return tokens, Journey(rows=0)

  y, _ = apply(layer(dispatcher=pass_by, jitter=0.5), weights(), X, context(train=True))
  np.testing.assert_array_equal(y, X)


@pytest.mark.parametrize('group_size', [2, L, B * L])
def test_groups_make_no_difference_where_nothing_is_dropped(group_size):
  y, aux = apply(layer(group_size=group_size), weights(), X, context())
  expected, expected_aux = apply(layer(), weights(), X, context())
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
  for name in ('z', 'router_entropy', 'expert_load', 'dropped'):
    np.testing.assert_allclose(aux.metrics[name], expected_aux.metrics[name], rtol=1e-5)


def test_decoding_one_token_at_a_time_equals_the_whole():
  """A step has one token of each sequence, whatever the group size."""
  whole, _ = apply(layer(), weights(), X, context())
  for t in (0, L - 1):
    y, _ = apply(layer(), weights(), X[:, t : t + 1], context(SEGMENTS[:, t : t + 1], cache_length=L))
    np.testing.assert_allclose(y, whole[:, t : t + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('router', [RoundRobinRouter, RandomRouter, functools.partial(RandomRouter, share='batch')])
def test_experts_in_turn_go_by_position_and_not_by_place_in_the_batch(router):
  """A token alone, in whatever row of a decoding step, has the expert that it has in its text."""
  module = dataclasses.replace(layer(), router=router)
  segments, positions = jnp.ones((B, L), jnp.int32), jnp.broadcast_to(jnp.arange(L), (B, L))
  told = Context(segments, positions, jnp.float32(B * L))
  params = {'experts': weights()['experts']}
  whole, _ = apply(module, params, X, told)
  for t in (0, 3, L - 1):
    step = Context(segments[:, :1], positions[:, t : t + 1], jnp.float32(B), cache_length=L)
    y, _ = apply(module, params, X[:, t : t + 1], step)
    np.testing.assert_allclose(y, whole[:, t : t + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ('batch', 'length', 'group_size', 'decoding', 'rows'),
  [
    (4, 8, 2, False, None),
    (4, 8, 8, False, 1),
    (4, 8, 16, False, 2),
    (4, 8, 32, False, 4),
    (4, 1, 3, True, 4),
    (4, 1, 4096, True, 4),
  ],
)
def test_rows_per_group(batch, length, group_size, decoding, rows):
  assert rows_per_group(batch, length, group_size, decoding) == rows


@given(st.integers(1, 12), st.integers(1, 24), st.integers(-1, 400))
def test_a_group_size_fits_or_the_error_names_one_that_does(batch, length, group_size):
  try:
    rows = rows_per_group(batch, length, group_size, decoding=False)
  except ConfigError as error:
    match = re.search(r': (?:GROUP_SIZE=(\d+) does|(?:(\d+) and )?(\d+) would)', str(error))
    sizes = [int(size) for size in match.groups() if size]
    assert sizes and all(rows_per_group(batch, length, size, decoding=False) != 0 for size in sizes)
  else:
    assert length % group_size == 0 if rows is None else rows * length == group_size and batch % rows == 0


def test_groups_never_cross_devices(mesh):
  """Eight sequences on four devices: two rows at most. The mesh decides whether a size fits, never what it is."""
  with sharding.activate(mesh(data=2, expert=2, model=2), sharding.replicated_rules()):
    assert rows_per_group(8, L, 2 * L, decoding=False) == 2
    assert rows_per_group(8, 1, 4096, decoding=True) == 2
    with pytest.raises(ConfigError, match=rf'GROUP_SIZE={4 * L} does not tile the 2 sequences .*={2 * L} does'):
      rows_per_group(8, L, 4 * L, decoding=False)
    with pytest.raises(ConfigError, match=r'BATCH_SIZE=6 .* use a multiple of 4'):
      rows_per_group(6, L, L, decoding=False)


def test_groups_are_parts_of_a_piece(mesh):
  with sharding.activate(mesh(data=2, sequence=2), sharding.replicated_rules()):
    assert rows_per_group(4, L, L // 2, decoding=False) is None
    for size in (None, L, 3, 0):
      with pytest.raises(ConfigError, match=f'GROUP_SIZE={size} does not divide the 4 tokens .*: GROUP_SIZE=4 does'):
        rows_per_group(4, L, size, decoding=False)


def test_a_shared_expert_sees_every_token():
  """Padding too, as any dense sublayer; what it says is added."""
  plain, params = layer(), weights()
  shared = plain.clone(shared=functools.partial(Mlp, hidden_dim=5))
  rng = np.random.default_rng(2)
  mlp = {
    name: rng.normal(size=shape).astype('float32')
    for name, shape in [('wi_0', (M, 5)), ('wi_1', (M, 5)), ('wo', (5, M))]
  }
  y, aux = apply(shared, {**params, 'shared': mlp}, X, context())
  routed, its = apply(plain, params, X, context())
  np.testing.assert_allclose(y - routed, (gelu(X @ mlp['wi_0']) * (X @ mlp['wi_1'])) @ mlp['wo'], rtol=1e-4, atol=1e-4)
  assert aux.metrics.keys() == its.metrics.keys()


@pytest.mark.parametrize('gradient_dtype', [None, 'float32'])
@pytest.mark.parametrize('dispatcher', [einsum, all_to_all])
def test_gradients_are_summed_in_the_dtype_asked_for(dispatcher, gradient_dtype, mesh):
  """Over the slots of a device and over devices; the weights' own gradients are float32 either way."""
  experts = functools.partial(Experts, hidden_dim=F, dtype='bfloat16', gradient_dtype=gradient_dtype)
  module = MoELayer(E, L, functools.partial(TopKRouter, eval_capacity_factor=None), experts, dispatcher)

  def loss(params, x):
    return jnp.sum(module.apply({'params': params}, x, context())[0].astype('float32') ** 2)

  with sharding.activate(mesh(data=4), sharding.replicated_rules()):
    gradient = jax.jit(jax.grad(loss))
    grads = gradient(weights(), jnp.asarray(X, 'bfloat16'))
  assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype('float32')}
  # Whether products are rounded before they are summed over devices shows in what their last bits are.
  rounded = [bool(np.all(leaf == leaf.astype('bfloat16'))) for leaf in jax.tree.leaves(grads['experts'])]
  assert rounded == [gradient_dtype is None] * 3
