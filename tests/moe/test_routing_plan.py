"""Capacity, slots and the two views of a plan, against plain loops."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_jax.moe.routing_plan import CAPACITY_RULES, RoutingPlan, assign_slots, expert_capacity, reroute
from moe_jax.types import ConfigError

G, S, E, K, C = 2, 8, 4, 2, 3
CHOICES = hnp.arrays(np.int32, (G, S, K), elements=st.integers(0, E - 1))
VALID = hnp.arrays(bool, (G, S))


@pytest.mark.parametrize(
  ('rule', 'expected'),
  [  # slots for (tokens, experts, factor, k) = (64, 8, 1.25, 1), (100, 8, 1.25, 2), (8, 64, 1, 2), (100, 10, 1.1, 1)
    ('gshard', (12, 16, 4, 12)),
    ('mesh', (10, 15, 4, 11)),
    ('flaxformer', (10, 16, 4, 11)),
    ('vmoe', (12, 32, 4, 12)),
    ('megablocks', (10, 31, 1, 11)),
    ('deepspeed', (10, 16, 4, 11)),
  ],
)
def test_capacity_rules(rule, expected):
  """100 * 1.25 / 8 is 15.625; 1.1 * 100 / 10 is 11.000000000000002 in floating point, and 11 slots all the same."""
  wishes = [(64, 8, 1.25, 1), (100, 8, 1.25, 2), (8, 64, 1.0, 2), (100, 10, 1.1, 1)]
  assert tuple(expert_capacity(*wish, rule=rule) for wish in wishes) == expected


def test_an_unknown_rule_is_refused():
  with pytest.raises(ConfigError, match="No capacity rule 'lingvo': choose among gshard, mesh"):
    expert_capacity(8, 2, 1.0, rule='lingvo')


@given(st.integers(1, 5000), st.integers(1, 512), st.integers(1, 400), st.sampled_from(sorted(CAPACITY_RULES)))
def test_capacity_is_a_rounding_of_the_share(tokens, num_experts, percent, rule):
  per_choice, _, least, multiple_of = CAPACITY_RULES[rule]
  slots = expert_capacity(tokens, num_experts, percent / 100, 2, rule)
  share = percent * tokens * (1 + per_choice) / (100 * num_experts)
  assert slots % multiple_of == 0 and slots >= max(least, 1)
  assert slots <= max(math.ceil(share), least) + multiple_of - 1
  assert slots >= math.floor(share + 1e-9)


def test_a_choice_that_is_not_made_takes_no_slot():
  choices = jnp.array([[[0, 1], [0, -1], [-1, 1], [0, 1]]])
  slots = assign_slots(choices, 2, jnp.ones((1, 4), bool))
  np.testing.assert_array_equal(slots[0], [[0, 0], [1, 8], [8, 1], [2, 2]])
  plan = RoutingPlan(choices, slots, jnp.ones((1, 4, 2)), 2, 3)
  assert not np.any(plan.kept[choices < 0]) and plan.dispatch_array('float32').sum() == 6


def test_who_finds_an_expert_full_asks_the_next():
  """Three tokens want expert 0, which has room for one: the second gets its next choice, the third its last."""
  preferences = jnp.array([[[0, 1, 2], [0, 1, 2], [0, 1, 2], [2, 0, 1]]])
  given_ = reroute(preferences, 3, jnp.ones((1, 4), bool), capacity=1, wanted=1)
  np.testing.assert_array_equal(given_[0], [[0, -1, -1], [-1, 1, -1], [-1, -1, -1], [2, -1, -1]])
  slots = assign_slots(given_, 3, jnp.ones((1, 4), bool))
  np.testing.assert_array_equal(slots[0] < 1, np.asarray(given_[0]) >= 0)


@given(hnp.arrays(np.float32, (G, S, E), elements=st.floats(0, 1, width=32), unique=True), VALID, st.integers(1, 4))
def test_rerouting_never_overfills_and_drops_only_the_hopeless(scores, valid, capacity):
  preferences = np.argsort(-scores, axis=-1).astype(np.int32)
  given_ = np.asarray(reroute(jnp.asarray(preferences), E, jnp.asarray(valid), capacity, wanted=1))
  held = np.sum(given_ >= 0, axis=-1)
  load = np.stack([[np.sum(row == e) for e in range(E)] for row in given_])
  assert np.all(load <= capacity) and np.all(held <= valid)
  for g in range(G):  # a token is left only when every expert is full
    assert np.all(held[g][valid[g]] == 1) or np.all(load[g] == capacity)


def slots_by_loop(expert_index, valid):
  slots = np.full(expert_index.shape, S * K)
  for g in range(G):
    taken = collections.Counter()
    for k in range(K):
      for s in range(S):
        if valid[g, s]:
          expert = expert_index[g, s, k]
          slots[g, s, k] = taken[expert]
          taken[expert] += 1
  return slots


@given(CHOICES, VALID)
def test_slots_go_to_first_choices_then_second_in_token_order(expert_index, valid):
  slots = np.asarray(jax.jit(assign_slots, static_argnums=1)(expert_index, E, valid))
  assert slots.dtype == np.int32
  np.testing.assert_array_equal(slots, slots_by_loop(expert_index, valid))


@given(CHOICES, VALID)
def test_slots_of_an_expert_are_used_once_and_without_gaps(expert_index, valid):
  slots = np.asarray(jax.jit(assign_slots, static_argnums=1)(expert_index, E, valid))
  for g in range(G):
    for expert in range(E):
      used = slots[g][(expert_index[g] == expert) & valid[g][:, None]]
      assert sorted(used) == list(range(len(used)))
  assert np.all(slots[~valid] >= S * K)  # no capacity reaches as far


@given(CHOICES, VALID, hnp.arrays(np.float32, (G, S, K), elements=st.floats(0, 1, width=16)))
def test_views_equal_loops(expert_index, valid, weight):
  slots = slots_by_loop(expert_index, valid)

  @jax.jit
  def views(expert_index, slots, weight):
    plan = RoutingPlan(expert_index, slots, weight, E, C)
    return plan.dispatch_array('float32'), plan.combine_array('float32'), plan.kept

  dispatch, combine, kept = map(np.asarray, views(expert_index, slots, weight))
  expected_dispatch, expected_combine = np.zeros((2, G, S, E, C), np.float32)
  for g, s, k in np.ndindex(G, S, K):
    if slots[g, s, k] < C:
      place = g, s, expert_index[g, s, k], slots[g, s, k]
      expected_dispatch[place] += 1
      expected_combine[place] += weight[g, s, k]
  np.testing.assert_array_equal(dispatch, expected_dispatch)
  np.testing.assert_array_equal(combine, expected_combine)
  np.testing.assert_array_equal(kept, slots < C)
  assert dispatch.sum(axis=1).max() <= 1  # one token a slot
  assert np.all(combine[dispatch == 0] == 0)
  assert dispatch.sum() == kept.sum()


def test_views_have_the_tokens_dtype():
  expert_index = jnp.zeros((1, 300, 1), jnp.int32)
  slots = assign_slots(expert_index, 1, jnp.ones((1, 300), bool))
  dispatch = RoutingPlan(expert_index, slots, jnp.full((1, 300, 1), 0.5), 1, 300).dispatch_array('bfloat16')
  assert dispatch.dtype == 'bfloat16'
  # The count of slots is exact however many there are; in bfloat16 it would stop at 256.
  np.testing.assert_array_equal(dispatch[0, :, 0].astype('float32'), np.eye(300))
