"""Kinds of experts: with dropout, of any token-wise module, and as the projections of attention."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.layers.attention import SelfAttention
from moe_jax.moe.dispatchers.all_to_all import all_to_all
from moe_jax.moe.dispatchers.einsum import einsum
from moe_jax.moe.dispatchers.gather import gather
from moe_jax.moe.dispatchers.ragged import ragged
from moe_jax.moe.experts import Experts, ModuleExperts
from moe_jax.moe.moe_layer import MoELayer
from moe_jax.moe.routers.top_k import TopKRouter
from moe_jax.types import ConfigError
from tests.moe.test_moe_layer import B, E, F, L, M, X, context, gelu

KEY = jax.random.key(0)
DISPATCHERS = [einsum, gather, all_to_all, ragged]


def init(module, *args):
  return nn.unbox(module.init({'params': KEY, 'dropout': KEY, 'router': KEY}, *args))['params']


def layer(experts, dispatcher=einsum, num_experts=E, **router):
  return MoELayer(num_experts, L, functools.partial(TopKRouter, **router), experts, dispatcher)


# ---- Dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('train', [False, True])
def test_dropped_units_are_missing_and_the_others_louder(train):
  module = Experts(E, M, hidden_dim=F, dropout_rate=0.25)
  params = init(module)
  slots = np.random.default_rng(0).normal(size=(2, E, 3, M)).astype('float32')
  bank = module.apply({'params': params}, train, rngs={'dropout': KEY})
  y = bank.apply(bank.weights, slots)
  kept = np.any(np.asarray(bank.weights['wo']) != 0, axis=-1)  # [E, F]
  assert 0.5 < kept.mean() < 0.95 if train else kept.all()
  assert not train or len({tuple(row) for row in kept}) == E, 'experts drop different units'
  hidden = gelu(np.einsum('gecm,emf->gecf', slots, params['wi_0'])) * np.einsum('gecm,emf->gecf', slots, params['wi_1'])
  hidden *= kept[None, :, None] / (0.75 if train else 1)
  np.testing.assert_allclose(y, np.einsum('gecf,efm->gecm', hidden, params['wo']), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('dispatcher', DISPATCHERS[1:])
@pytest.mark.parametrize('shape', [{}, {'data': 2, 'expert': 2, 'model': 2}])
def test_every_mesh_and_dispatcher_drops_the_same(dispatcher, shape, mesh):
  experts = functools.partial(Experts, hidden_dim=F, dropout_rate=0.5)
  params = init(layer(experts), X, context())

  def run(dispatcher, train=True):
    apply = functools.partial(layer(experts, dispatcher).apply, rngs={'dropout': KEY, 'router': KEY})
    return jax.jit(lambda params, x: apply({'params': params}, x, context(train=train))[0])(params, X)

  expected = run(einsum)
  assert not np.allclose(run(einsum, train=False), expected, atol=1e-3)
  with sharding.activate(mesh(**shape), sharding.replicated_rules()):
    np.testing.assert_allclose(run(dispatcher), expected, rtol=1e-4, atol=1e-5)


# ---- Any module -----------------------------------------------------------------------------------------------------


class TwoMaps(nn.Module):
  """Nested parameters, some of which say where they live."""

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', sharding.partitioned(nn.initializers.normal(1.0), 'embed'), (x.shape[-1],))
    return nn.Dense(x.shape[-1], name='out')(jnp.tanh(nn.Dense(7, name='in')(x * jnp.broadcast_to(scale, x.shape))))


@pytest.mark.parametrize('rules', [sharding.replicated_rules, sharding.fsdp_rules])
@pytest.mark.parametrize('shape', [{}, {'data': 2, 'expert': 2, 'model': 2}])
@pytest.mark.parametrize('dispatcher', DISPATCHERS[:3])
def test_any_module_is_an_expert(dispatcher, shape, rules, mesh):
  """Output and gradients are those of a loop over experts, on every mesh."""
  module = layer(functools.partial(ModuleExperts, expert=TwoMaps), dispatcher, num_selected=2)
  params = init(module, X, context())
  assert params['experts']['each']['in']['kernel'].shape == (E, M, 7)
  assert not np.allclose(*params['experts']['each']['in']['kernel'][:2]), 'each has its own weights'

  def by_loop(params, x):
    probs = jax.nn.softmax(x @ params['router']['kernel'])
    best, index = jax.lax.top_k(probs, 2)
    share = jnp.sum(jax.nn.one_hot(index, E) * (best / best.sum(-1, keepdims=True))[..., None], axis=2)
    one = [jax.tree.map(lambda w, e=e: w[e], params['experts']['each']) for e in range(E)]
    return sum(share[..., e, None] * TwoMaps().apply({'params': one[e]}, x) for e in range(E))

  def outcome(run):
    return jax.jit(jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(run(*args))), (0, 1)))(params, jnp.asarray(X))

  ones = np.ones((B, L), np.int32)
  expected = outcome(by_loop)
  with sharding.activate(mesh(**shape), rules()):
    actual = outcome(lambda params, x: module.apply({'params': params}, x, context(ones))[0])
  for mine, its in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-5)


def test_an_expert_gives_as_many_features_as_it_takes():
  with pytest.raises(ConfigError, match=f'Dense as an expert turns {M} features into 5'):
    init(ModuleExperts(E, M, functools.partial(nn.Dense, 5)))


@pytest.mark.parametrize('activations', [('gelu',), ('silu', 'linear')])
def test_gradients_of_answers_are_weighed_and_answers_are_not(activations):
  """Gradients to weights and slots are those of the weighed answers, and the weights have none."""
  bank = Experts(E, M, F, activations)
  params, rng = init(bank), np.random.default_rng(0)
  run = bank.apply({'params': params}).answer
  slots, to_answers = rng.normal(size=(2, 2, E, 3, M)).astype('float32')
  weight = np.where(rng.random((2, E, 3)) < 0.3, 0, rng.random((2, E, 3))).astype('float32')
  y, pull = jax.vjp(run, params, slots, weight)
  expected, pull_expected = jax.vjp(lambda params, slots: run(params, slots, None), params, slots)
  np.testing.assert_array_equal(y, expected)
  to_params, to_slots, to_weight = pull(to_answers)
  assert not np.any(to_weight)
  for actual, its in zip(
    jax.tree.leaves((to_params, to_slots)), jax.tree.leaves(pull_expected(weight[..., None] * to_answers)), strict=True
  ):
    np.testing.assert_allclose(actual, its, rtol=1e-4, atol=1e-5)


# ---- Attention ------------------------------------------------------------------------------------------------------


def attention(**options):
  return SelfAttention(num_heads=2, head_dim=M // 2, **options)


def projection(num_experts, **router):
  experts = functools.partial(ModuleExperts, expert=functools.partial(nn.Dense, M, use_bias=False))
  return functools.partial(MoELayer, num_experts, L, functools.partial(TopKRouter, **router), experts)


@pytest.mark.parametrize('names', [['query'], ['key', 'value'], ['query', 'key', 'value']])
def test_one_expert_as_projection_is_plain_attention(names):
  plain, one = attention(), projection(1, num_selected=1, gates='raw')
  sparse = attention(experts={name: one for name in names})
  ones = context(np.ones((B, L), np.int32))
  params = init(plain, X, ones)
  told = {k: v for k, v in params.items() if k not in names}
  for name in names:
    kernel = params[name].reshape(1, M, M)
    told[f'{name}_experts'] = {
      'router': {'kernel': np.zeros((M, 1), 'float32')},
      'experts': {'each': {'kernel': kernel}},
    }
  y, aux = sparse.apply({'params': told}, X, ones, rngs={'router': KEY})
  np.testing.assert_allclose(y, plain.apply({'params': params}, X, ones)[0], rtol=1e-4, atol=1e-5)
  assert {key.split('/')[0] for key in aux.metrics} == set(names)


def test_attention_of_experts_decodes_as_it_trains():
  module = attention(experts={'query': projection(E), 'value': projection(E)})
  ones = np.ones((B, L), np.int32)
  params = init(module, X, context(ones))
  whole, _ = module.apply({'params': params}, X, context(ones))
  cache, steps = {}, []
  for t in range(L):
    (y, _), cache = module.apply(
      {'params': params, **cache}, X[:, t : t + 1], context(ones[:, :1], cache_length=L), mutable=['cache']
    )
    steps.append(y)
  np.testing.assert_allclose(np.concatenate(steps, 1), whole, rtol=1e-4, atol=1e-5)


def test_wrong_projections_are_named():
  with pytest.raises(ConfigError, match="'out' is no projection"):
    init(attention(experts={'out': projection(E)}), X, context())
  with pytest.raises(ConfigError, match='Experts as the key projection need'):
    init(attention(num_kv_heads=1, experts={'key': projection(E)}), X, context())
