"""Attention against its equation, and who may look at whom."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.attention import CrossAttention, SelfAttention, segment_mask
from moe_jax.layers.context import Context
from moe_jax.layers.positions import RelativeTable, relative_buckets, rotate
from moe_jax.types import Aux

B, L, M, H, D = 2, 8, 6, 4, 4
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 0, 0, 0]], np.int32)
POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 0, 0, 0]], np.int32)
X = np.random.default_rng(0).normal(size=(B, L, M)).astype(np.float32)
REAL = SEGMENTS > 0


def context(segments=SEGMENTS, positions=POSITIONS, **facts):
  return Context(jnp.asarray(segments), jnp.asarray(positions), jnp.float32(REAL.sum()), **facts)


def weights(kv_heads=H, seed=1):
  rng = np.random.default_rng(seed)
  shapes = {'query': (M, H, D), 'key': (M, kv_heads, D), 'value': (M, kv_heads, D), 'out': (H, D, M)}
  return {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


@functools.partial(jax.jit, static_argnums=0)
def apply(layer, params, x, context):
  y, aux = layer.apply({'params': params}, x, context)
  assert aux == Aux()
  return y


def by_loop(params, x, memory, visible, scale=D**-0.5, bias=None, turn=np.asarray):
  """softmax(q k / sqrt(D) + bias) v, one query and head at a time, over the keys it may see."""
  query, key, value = (
    np.einsum('blm,mhd->blhd', source, params[name])
    for name, source in [('query', x), ('key', memory), ('value', memory)]
  )
  query, key, y = np.asarray(turn(query)), np.asarray(turn(key)), np.zeros_like(x)
  for b, q, h in np.ndindex(*x.shape[:2], H):
    seen = visible[b, q].nonzero()[0]
    if seen.size:
      kv = h * key.shape[2] // H
      logits = scale * key[b, seen, kv] @ query[b, q, h]
      logits += 0 if bias is None else bias[h, q, seen]
      shares = np.exp(logits) / np.exp(logits).sum()
      y[b, q] += shares @ value[b, seen, kv] @ params['out'][h]
  return y


SAME = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) & REAL[:, :, None]


def test_segment_mask():
  np.testing.assert_array_equal(segment_mask(jnp.asarray(SEGMENTS), jnp.asarray(SEGMENTS))[:, 0], SAME)


CASES = [(True, H, None, None), (False, H, 1.0, None), (True, 2, None, None), (True, 1, None, 100.0)]


@pytest.mark.parametrize(('causal', 'kv_heads', 'scale', 'rotary_base'), CASES)
def test_equation(causal, kv_heads, scale, rotary_base):
  layer = SelfAttention(H, D, num_kv_heads=kv_heads, query_scale=scale, rotary_base=rotary_base)
  y = apply(layer, weights(kv_heads), X, context(causal=causal))
  visible = SAME & np.tri(L, dtype=bool) if causal else SAME
  turn = functools.partial(rotate, positions=jnp.asarray(POSITIONS), base=rotary_base) if rotary_base else np.asarray
  expected = by_loop(weights(kv_heads), X, X, visible, scale or D**-0.5, turn=turn)
  np.testing.assert_allclose(y[REAL], expected[REAL], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', ['head', 'whole'])
def test_queries_and_keys_of_mean_square_one(kind):
  """Before the learned scale, each head by itself (Qwen3), or all heads together (OLMoE); values are as ever."""
  scale = np.random.default_rng(2).uniform(0.5, 2, D if kind == 'head' else (H, D)).astype(np.float32)
  over = -1 if kind == 'head' else (-2, -1)

  def turn(x):
    return x / np.sqrt(np.mean(x**2, axis=over, keepdims=True) + 1e-6) * scale

  params = {**weights(), 'query_norm': {'scale': scale}, 'key_norm': {'scale': scale}}
  y = apply(SelfAttention(H, D, query_key_norm=kind), params, X, context(causal=True))
  expected = by_loop(weights(), X, X, SAME & np.tri(L, dtype=bool), turn=turn)
  np.testing.assert_allclose(y[REAL], expected[REAL], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('causal', [True, False])
def test_who_sees_whom(causal):
  """A change of one token is felt by those of its segment that may look at it, and by no other."""
  layer = SelfAttention(H, D, rotary_base=10_000.0)
  run = functools.partial(apply, layer, weights(), context=context(causal=causal))
  before = np.asarray(run(X))
  for b, t in [(0, 0), (0, 2), (0, 3), (0, 5), (0, 7), (1, 4), (1, 6)]:
    changed = X.copy()
    changed[b, t] += 1
    felt = np.any(run(changed) != before, axis=-1)
    sees = np.zeros_like(REAL)
    sees[b] = SAME[b, :, t] & (np.arange(L) >= t if causal else True)
    np.testing.assert_array_equal(felt & REAL, sees, err_msg=f'{b=} {t=}')


def test_packed_sequences_are_as_alone():
  """The second segment of row 0 gives what it gives in a row of its own."""
  layer = SelfAttention(H, D, rotary_base=100.0)
  packed = apply(layer, weights(), X, context())
  alone = apply(layer, weights(), X[:1, 3:7], context(SEGMENTS[:1, 3:7], POSITIONS[:1, 3:7]))
  np.testing.assert_allclose(packed[:1, 3:7], alone, rtol=1e-4, atol=1e-5)


def test_padding_is_finite_in_and_out():
  """A query that may see nothing divides by nothing, in the gradient too."""

  def loss(params, x):
    return jnp.sum(apply(SelfAttention(H, D), params, x, context())[REAL] ** 2)

  gradients = jax.grad(loss, argnums=(0, 1))(weights(), X)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
  assert np.all(gradients[1][~REAL] == 0)


def test_grouped_queries_share_repeated_heads():
  params = weights(kv_heads=2)
  repeated = params | {name: np.repeat(params[name], H // 2, axis=1) for name in ('key', 'value')}
  grouped = apply(SelfAttention(H, D, num_kv_heads=2), params, X, context())
  np.testing.assert_allclose(grouped, apply(SelfAttention(H, D), repeated, X, context()), rtol=1e-5, atol=1e-6)


def test_relative_table_of_the_layer_or_of_the_stack():
  table = np.random.default_rng(2).normal(size=(32, H)).astype(np.float32)
  own = SelfAttention(H, D, relative_table=functools.partial(RelativeTable, num_heads=H))
  mine = apply(own, {**weights(), 'relative': {'table': table}}, X, context(causal=False))
  shared = apply(SelfAttention(H, D), weights(), X, context(causal=False, relative_table=jnp.asarray(table)))
  np.testing.assert_array_equal(mine, shared)
  distance = np.arange(L)[None, :] - np.arange(L)[:, None]
  bias = np.moveaxis(table[np.asarray(relative_buckets(jnp.asarray(distance), bidirectional=True))], -1, 0)
  np.testing.assert_allclose(mine[REAL], by_loop(weights(), X, X, SAME, bias=bias)[REAL], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kv_heads', [H, 1])
def test_cross_attention_sees_the_segment_of_the_same_number(kv_heads):
  memory = np.random.default_rng(3).normal(size=(B, 5, M)).astype(np.float32)
  memory_segments = np.array([[1, 2, 2, 0, 0], [1, 1, 1, 1, 0]], np.int32)
  facts = {'encoded': jnp.asarray(memory), 'encoded_segment_ids': jnp.asarray(memory_segments)}
  y = apply(CrossAttention(H, D, num_kv_heads=kv_heads), weights(kv_heads), X, context(**facts))
  visible = (SEGMENTS[:, :, None] == memory_segments[:, None, :]) & REAL[:, :, None]
  np.testing.assert_allclose(y[REAL], by_loop(weights(kv_heads), X, memory, visible)[REAL], rtol=1e-4, atol=1e-5)


def test_cache_continues_where_it_stopped():
  """Five tokens at once and three one by one give what eight at once give."""
  segments, positions = np.ones((B, L), np.int32), np.tile(np.arange(L, dtype=np.int32), (B, 1))
  layer = SelfAttention(H, D, num_kv_heads=2, rotary_base=100.0)
  params = weights(kv_heads=2)
  whole = apply(layer, params, X, context(segments, positions))

  @jax.jit
  def step(cache, x, segments, positions):
    facts = context(segments, positions, cache_length=L)
    (y, _), cache = layer.apply({'params': params, **cache}, x, facts, mutable=['cache'])
    return y, nn.unbox(cache)

  ys, cache = [], {}
  for begin, end in [(0, 5), (5, 6), (6, 7), (7, 8)]:
    y, cache = step(cache, X[:, begin:end], segments[:, begin:end], positions[:, begin:end])
    ys.append(y)
  np.testing.assert_allclose(np.concatenate(ys, axis=1), whole, rtol=1e-4, atol=1e-5)
  assert cache['cache']['key'].shape == (B, L, 2, D) and cache['cache']['filled'] == L


def test_bfloat16_keeps_float32_weights():
  layer = SelfAttention(H, D, rotary_base=100.0, dtype='bfloat16')
  params = nn.unbox(layer.init(jax.random.key(0), X, context()))['params']
  assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype('float32')}
  y = apply(layer, weights(), X, context())
  assert y.dtype == 'bfloat16'
  expected = apply(SelfAttention(H, D, rotary_base=100.0), weights(), X, context())
  np.testing.assert_allclose(y.astype('float32')[REAL], expected[REAL], atol=0.05)


def test_logits_begin_alike_whatever_the_query_scale(getkey):
  """T5 multiplies by 1 and starts with queries that are smaller by 1/sqrt(D)."""
  x = jax.random.normal(getkey(), (1, 4, 64))
  context = Context(jnp.ones((1, 4), jnp.int32), jnp.arange(4, dtype=jnp.int32)[None], jnp.float32(4))
  plain, t5 = (SelfAttention(num_heads=2, head_dim=16, query_scale=scale) for scale in (None, 1.0))
  outputs = [layer.apply(nn.unbox(layer.init(jax.random.key(0), x, context)), x, context)[0] for layer in (plain, t5)]
  np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)
