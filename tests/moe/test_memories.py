"""Routers that remember: what they keep from step to step, and when they change their ways."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.moe.routers.base import RoutingContext
from moe_jax.moe.routers.bias_balanced import BiasBalancedRouter
from moe_jax.moe.routers.dense import DenseRouter
from moe_jax.moe.routers.hashing import BalancedHashRouter, HashRouter, balanced_table, clustered_table, random_table
from moe_jax.moe.routers.stable import StableRouter

G, S, M, E, VOCAB = 4, 32, 8, 4, 16
RNG = np.random.default_rng(0)
TOKENS = RNG.normal(1, 1, (G, S, M)).astype(np.float32)
IDS = RNG.zipf(1.5, (G, S)).clip(1, VOCAB - 1).astype(np.int32)


def start(router):
  told = RoutingContext(jnp.ones((G, S), bool), jnp.float32(G * S), IDS)
  return nn.unbox(router.init(jax.random.key(0), TOKENS, told))


@functools.partial(jax.jit, static_argnums=(0, 4))
def call(router, variables, tokens, ids, train, count):
  told = RoutingContext(jnp.ones(tokens.shape[:2], bool), count, ids, train=train)
  (plan, aux), state = router.apply(variables, tokens, told, mutable=['state'], rngs={'router': jax.random.key(1)})
  return plan, aux, {**variables, **state}


def step(router, variables, pieces=1):
  """One training step in so many microbatches; the plans of its pieces, the losses, and the variables after."""
  plans, losses = [], 0.0
  for tokens, ids in zip(np.split(TOKENS, pieces), np.split(IDS, pieces), strict=True):
    plan, aux, variables = call(router, variables, tokens, ids, True, jnp.float32(G * S))
    plans.append(plan.expert_index)
    losses = jax.tree.map(jnp.add, losses, aux.losses) if losses else aux.losses
  return np.concatenate(plans), losses, variables


def test_microbatches_change_no_memory():
  routers = [BiasBalancedRouter, DenseRouter]
  routers += [
    functools.partial(BalancedHashRouter, vocab_size=VOCAB),
    functools.partial(StableRouter, vocab_size=VOCAB),
  ]
  for make in routers:
    router = make(num_experts=E)
    whole = parts = start(router)
    for _ in range(2):
      _, losses, whole = step(router, whole)
      _, sums, parts = step(router, parts, pieces=4)
      jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), sums, losses)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), parts['state'], whole['state'])


def test_biases_move_by_the_sign_of_the_missing_load_and_balance_a_skewed_batch():
  router = BiasBalancedRouter(num_experts=E, bias_rate=0.01)
  variables = start(router)
  variables['params']['kernel'] = jnp.linspace(0.5, 0, E)[None] * jnp.ones((M, 1))
  chosen, _, after = step(router, variables)
  load = np.bincount(chosen.ravel(), minlength=E)
  np.testing.assert_allclose(after['state']['bias'], 0.01 * np.sign(load.mean() - load), rtol=1e-6)
  for _ in range(100):
    chosen, _, after = step(router, after)
  evened = np.bincount(chosen.ravel(), minlength=E)
  assert load.max() > 1.9 * load.mean() and evened.max() < 1.3 * evened.mean()


def test_stable_moe_learns_then_keeps_to_the_distilled_table():
  router = StableRouter(num_experts=E, vocab_size=VOCAB, stage_1_steps=2)
  variables, frozen = start(router), None
  for done in range(4):
    chosen, losses, variables = step(router, variables)
    scores = TOKENS @ np.asarray(variables['params']['kernel'])
    table = np.argmax(np.asarray(variables['params']['embedding'] @ variables['params']['centroids']), -1)
    if done < 2:
      np.testing.assert_array_equal(chosen[..., 0], scores.argmax(-1))
      assert losses['distil'] > 0
    else:  # frozen: what the distilled weights have become since makes no difference
      np.testing.assert_array_equal(chosen[..., 0], frozen[IDS])
      assert losses['distil'] == losses['balance'] == 0
      variables['params']['embedding'] = -variables['params']['embedding']
    if done == 1:
      frozen = table
  plan, _, _ = call(router, variables, TOKENS, IDS, False, jnp.float32(G * S))
  np.testing.assert_array_equal(plan.expert_index[..., 0], frozen[IDS])


def test_hashes_are_balanced_by_what_was_counted():
  router = BalancedHashRouter(num_experts=E, vocab_size=VOCAB, counting_steps=2)
  variables = start(router)
  for _ in range(3):
    chosen, _, variables = step(router, variables)
  counts = np.bincount(IDS.ravel(), minlength=VOCAB)
  np.testing.assert_array_equal(variables['state']['counts'], 2 * counts)
  np.testing.assert_array_equal(chosen[..., 0], balanced_table(E, counts)[IDS])


def test_a_table_is_made_while_a_model_is_traced():
  counts = np.bincount(IDS.ravel(), minlength=VOCAB)
  router = HashRouter(num_experts=E, table=functools.partial(balanced_table, counts=counts))
  plan, _, _ = call(router, {}, TOKENS, IDS, True, jnp.float32(G * S))
  np.testing.assert_array_equal(plan.expert_index[..., 0], balanced_table(E, counts)[IDS])


def test_tables():
  counts = np.array([50, 30, 20, 10, 10, 5, 5])
  np.testing.assert_array_equal(balanced_table(2, counts), [0, 1, 1, 0, 1, 0, 1])  # loads 65 and 65
  sizes = np.bincount(random_table(4, 30), minlength=4)
  assert sizes.max() - sizes.min() <= 1 and np.any(random_table(4, 30) != random_table(4, 30, seed=1))
  blobs = np.repeat(np.eye(3), 5, axis=0) + RNG.normal(0, 0.01, (15, 3))
  table = clustered_table(3, blobs)
  assert len(set(table)) == 3 and all(len(set(table[i : i + 5])) == 1 for i in (0, 5, 10))


def test_the_constraint_of_2013_holds_back_who_has_had_too_much():
  router = DenseRouter(num_experts=E, balanced_steps=3, margin=0.1)
  variables = start(router)
  variables['params']['kernel'] = variables['params']['kernel'].at[:, 0].set(3.0)
  used = []
  for _ in range(5):
    chosen, _, variables = step(router, variables)
    used.append(np.any(chosen == 0))
  assert used[0] and not used[1], 'expert 0 took nearly all, and pauses'
  assert used[3] and used[4], 'then the constraint is off'


def test_an_expert_that_took_everything_can_be_held_back():
  """Its gates are exactly 1 and the others' 0, so that without it nothing would be left to divide by."""
  router = DenseRouter(num_experts=E)
  variables = start(router)
  variables['params']['kernel'] = variables['params']['kernel'].at[:, 0].set(1000.0)
  for _ in range(2):
    chosen, _, variables = step(router, variables)
  assert np.all(np.isfinite(jax.tree.leaves(variables['state'])[-1])) and not np.any(chosen == 0)
