"""Global assignment against the optimum, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from moe_jax.moe.routers.base_layers import auction_of_group, balanced_assignment
from moe_jax.moe.routers.sinkhorn import sinkhorn

G, S, E = 3, 128, 8


def optimum(scores):
  """The greatest sum that an even assignment can have: float64[S, E] -> float."""
  places = np.repeat(scores, -(-len(scores) // scores.shape[1]), axis=1)
  return places[linear_sum_assignment(-places)].sum()


def by_auction(scores, valid):
  return balanced_assignment(scores, valid)


def by_sinkhorn(scores, valid):
  price = -0.1 * sinkhorn(scores / 0.1, valid, 30)
  return balanced_assignment(scores, valid, prices=price)


@pytest.mark.parametrize('assign', [by_auction, by_sinkhorn])
@pytest.mark.parametrize('kind', ['normal', 'uniform', 'skewed', 'alike'])
def test_within_a_percent_of_the_optimum_and_exactly_even(assign, kind):
  rng = np.random.default_rng(0)
  scores = {
    'normal': rng.normal(size=(G, S, E)),
    'uniform': rng.random((G, S, E)),
    'skewed': rng.random((G, S, E)) + np.linspace(3, 0, E),  # all want the first expert most
    'alike': np.repeat(rng.random((G, S // 4, E)), 4, axis=1),  # as words that come again
  }[kind].astype(np.float32)
  experts = np.asarray(jax.jit(assign)(scores, np.ones((G, S), bool)))
  for g in range(G):
    np.testing.assert_array_equal(np.bincount(experts[g], minlength=E), S // E)
    total = np.take_along_axis(scores[g], experts[g][:, None], axis=1).sum()
    assert total >= 0.99 * optimum(scores[g].astype(np.float64))


@pytest.mark.parametrize('temperature', [0.1, 1.0])
@pytest.mark.parametrize(('tokens', 'experts'), [(100, 8), (66, 64), (33, 32), (3, 2)])
def test_first_prices_do_no_harm_where_tokens_do_not_divide(tokens, experts, temperature):
  """Places that stay empty must not keep a price that was only a guess."""
  scores = np.random.default_rng(4).normal(size=(1, tokens, experts)).astype(np.float32)
  valid = np.ones((1, tokens), bool)
  price = -temperature * sinkhorn(scores / temperature, valid, 30)
  chosen = np.asarray(jax.jit(balanced_assignment)(scores, valid, 0.02, price))
  assert np.bincount(chosen[0], minlength=experts).max() <= -(-tokens // experts)
  total = np.take_along_axis(scores[0], chosen[0][:, None], axis=1).sum()
  assert total >= 0.99 * optimum(scores[0].astype(np.float64))


@pytest.mark.parametrize(
  ('experts', 'skew', 'rounds', 'from_sinkhorn'), [(8, 0, 60, 20), (8, 3, 200, 25), (64, 0, 300, 120), (64, 3, 400, 80)]
)
def test_rounds_are_few(experts, skew, rounds, from_sinkhorn):
  """How many rounds the slowest of eight groups of 128 tokens takes; `skew`: all want the first expert most."""
  scores = jax.random.normal(jax.random.key(2), (8, 128, experts)) + jnp.linspace(skew, 0, experts)[None, None]
  valid = jnp.ones((8, 128), bool)
  count = jax.jit(jax.vmap(lambda *group: auction_of_group(*group, tolerance=0.02, max_rounds=2000)[1]))
  assert 0 < count(scores, valid, jnp.zeros((8, experts))).max() < rounds
  assert 0 < count(scores, valid, -0.1 * sinkhorn(scores / 0.1, valid, 30)).max() < from_sinkhorn


def test_padding_has_no_part_and_a_rest_is_spread():
  """100 real tokens: no expert gets more than 13; what padding holds, infinities included, changes nothing."""
  scores = np.random.default_rng(1).normal(size=(1, S, E)).astype(np.float32)
  valid = np.arange(S)[None] < 100
  garbage = np.where(valid[..., None], scores, np.inf).astype(np.float32)
  experts, others = (np.asarray(jax.jit(balanced_assignment)(x, valid)) for x in (scores, garbage))
  np.testing.assert_array_equal(experts, others)
  assert np.bincount(experts[valid], minlength=E).max() <= 13
  total = np.take_along_axis(scores[0, :100], experts[0, :100, None], axis=1).sum()
  assert total >= 0.99 * optimum(scores[0, :100].astype(np.float64))


def test_even_when_the_rounds_run_out():
  scores = np.random.default_rng(2).normal(size=(G, S, E)).astype(np.float32)
  experts = balanced_assignment(scores, np.ones((G, S), bool), max_rounds=1)
  for row in np.asarray(experts):
    np.testing.assert_array_equal(np.bincount(row, minlength=E), S // E)


def test_sinkhorn_balances_the_plan():
  """Rows sum to 1/n, columns to 1/E; the argmax of the plan is nearly even, where that of the scores is not."""
  scores = (np.random.default_rng(3).normal(size=(1, S, E)) + np.linspace(2, 0, E)).astype(np.float32)
  valid = np.ones((1, S), bool)
  column = np.asarray(jax.jit(lambda s, v: sinkhorn(s, v, 50))(scores, valid))
  plan = np.exp(scores + column[:, None] - np.log(S))
  plan = plan / plan.sum(-1, keepdims=True) / S
  np.testing.assert_allclose(plan.sum(1), 1 / E, rtol=1e-3)
  even, greedy = (np.bincount(x.argmax(-1)[0], minlength=E).max() * E / S for x in (plan, scores))
  assert even < 1.3 < 2.5 < greedy


def test_an_auction_round_costs_little():
  """Compiled FLOPs of one round, with all else: fewer than of one expert's matrix product at width 64."""
  spec = jax.ShapeDtypeStruct((1, S, E), jnp.float32), jax.ShapeDtypeStruct((1, S), bool)
  costs = jax.jit(balanced_assignment).lower(*spec).compile().cost_analysis()
  assert 0 < costs['flops'] < 2 * S * 64 * 64
