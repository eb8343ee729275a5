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

from moe_jax.moe.routing_plan import RoutingPlan, assign_slots, expert_capacity

G, S, E, K, C = 2, 8, 4, 2, 3
CHOICES = hnp.arrays(np.int32, (G, S, K), elements=st.integers(0, E - 1))
VALID = hnp.arrays(bool, (G, S))


@pytest.mark.parametrize(
  ('choices', 'num_experts', 'factor', 'multiple_of', 'slots'),
  [
    (64, 8, 1.0, 4, 8),
    (64, 8, 1.25, 1, 10),
    (64, 8, 1.25, 4, 12),
    (65, 8, 1.0, 1, 9),
    (100, 10, 1.1, 1, 11),  # 1.1 * 100 / 10 is 11.000000000000002 in floating point
    (120, 10, 1.0, 4, 12),
    (8, 64, 1.0, 1, 1),
    (8, 64, 1.0, 4, 4),
    (8, 64, 0.0, 4, 4),
    (4096, 128, 2.0, 4, 64),
  ],
)
def test_capacity(choices, num_experts, factor, multiple_of, slots):
  assert expert_capacity(choices, num_experts, factor, multiple_of) == slots


@given(st.integers(1, 5000), st.integers(1, 512), st.integers(1, 400), st.sampled_from([1, 4, 8]))
def test_capacity_is_the_smallest_that_fits(choices, num_experts, percent, multiple_of):
  slots = expert_capacity(choices, num_experts, percent / 100, multiple_of)
  exact = math.ceil(percent * choices / (100 * num_experts))  # integers: no noise but that of one division
  assert slots % multiple_of == 0
  assert max(exact, 1) <= slots < max(exact, 1) + multiple_of


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
