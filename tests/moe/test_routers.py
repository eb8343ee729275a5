"""What every router must do. A new one joins by a line in the table."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.moe.dispatchers.einsum import einsum
from moe_jax.moe.experts import ExpertBank
from moe_jax.moe.routers.base import RoutingContext
from moe_jax.moe.routers.top_k import TopKRouter
from moe_jax.moe.routing_plan import RoutingPlan
from moe_jax.types import Aux

make = functools.partial


@dataclasses.dataclass(frozen=True)
class Case:
  """A router, and what is true of it.

  Attributes:
    router: makes it, given num_experts.
    gate_sum: what a token's gates add up to where none is dropped; None where they do not add up to a constant.
    learns: the task's loss, through the gates, gives its weights a gradient.
    soft: its plan mixes tokens instead of choosing.
  """

  router: Callable[..., Any]
  gate_sum: float | None = None
  learns: bool = True
  soft: bool = False


CASES = {
  'top_2': Case(make(TopKRouter), gate_sum=1.0),
  'switch': Case(make(TopKRouter, num_selected=1, gates='raw', jitter=0.01)),
  'st_moe': Case(make(TopKRouter, z_loss_weight=1e-3, capacity_factor=1.25), gate_sum=1.0),
}

G, S, E, M = 4, 16, 4, 8


@pytest.fixture(params=CASES)
def case(request):
  return CASES[request.param]


@functools.cache
def tokens_and_valid():
  """Tokens of a lopsided distribution, so that some are dropped; a group with padding, and a group of nothing else."""
  tokens = jax.random.normal(jax.random.key(3), (G, S, M)) + 1.0
  valid = np.ones((G, S), bool)
  valid[1, S // 2 :] = False
  valid[2] = False
  return tokens, jnp.asarray(valid)


def context(valid, train=True):
  ids = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32) % 7 + 1, valid.shape)
  return RoutingContext(valid, jnp.sum(valid).astype(jnp.float32), ids, train)


@functools.cache
def variables(router):
  tokens, valid = tokens_and_valid()
  keys = {'params': jax.random.key(0), 'router': jax.random.key(1)}
  made = nn.unbox(router(num_experts=E).init(keys, tokens, context(valid)))
  return jax.tree_util.tree_map_with_path(lambda path, x: x * 30 if 'kernel' in str(path) else x, made)  # has opinions


def route(case, tokens, valid, train=True, params=None, key=7):
  variables_ = variables(case.router) if params is None else {**variables(case.router), 'params': params}
  (plan, aux), _ = case.router(num_experts=E).apply(
    variables_, tokens, context(valid, train), rngs={'router': jax.random.key(key)}, mutable=['state']
  )
  return plan, aux


def arrays(plan):
  return plan.dispatch_array(jnp.float32), plan.combine_array(jnp.float32)


def layer_output(plan, tokens):
  """What comes home when expert e multiplies by e + 1."""
  weights = {'scale': jnp.arange(1.0, E + 1)}
  bank = ExpertBank(lambda w, slots: slots * w['scale'][None, :, None, None], weights, {'scale': ('expert',)})
  return einsum(bank, tokens, plan)


def test_shapes_and_numbers(case):
  tokens, valid = tokens_and_valid()
  plan, aux = route(case, tokens, valid)
  dispatch, combine = arrays(plan)
  assert dispatch.shape == combine.shape and dispatch.shape[:3] == (G, S, E)
  assert np.all(np.isfinite(dispatch)) and np.all(np.isfinite(combine))
  assert isinstance(aux, Aux)
  for value in (*aux.losses.values(), *aux.metrics.values(), *aux.token_terms.values()):
    assert value.dtype == jnp.float32 and np.all(np.isfinite(value))
  assert all(value.shape == () for value in aux.losses.values())
  if 'expert_load' in aux.metrics:
    assert aux.metrics['expert_load'].shape == (E,)
    np.testing.assert_allclose(aux.metrics['expert_load'].sum(), 1.0, rtol=1e-5)


def test_a_slot_holds_one_token_and_a_token_one_slot_an_expert(case):
  if case.soft:
    return
  plan, _ = route(case, *tokens_and_valid())
  assert isinstance(plan, RoutingPlan)
  dispatch, combine = arrays(plan)
  assert set(np.unique(dispatch)) <= {0.0, 1.0}
  assert np.max(np.sum(dispatch, axis=1)) <= 1, 'a slot holds one token'
  assert np.max(np.sum(dispatch, axis=3)) <= 1, 'a token has one slot an expert'
  assert np.all(np.asarray(combine)[np.asarray(dispatch) == 0] == 0)


def test_gates_keep_their_convention(case):
  if case.gate_sum is None:
    return
  tokens, valid = tokens_and_valid()
  plan, _ = route(case, tokens, valid, train=False)  # nothing is dropped
  sums = np.sum(arrays(plan)[1], axis=(2, 3))
  np.testing.assert_allclose(sums[np.asarray(valid)], case.gate_sum, rtol=1e-5)


def test_padding_goes_nowhere_and_what_it_holds_changes_nothing(case):
  tokens, valid = tokens_and_valid()
  garbage = jnp.where(valid[..., None], tokens, 100 * jax.random.normal(jax.random.key(9), tokens.shape))
  (plan, aux), (other, other_aux) = route(case, tokens, valid), route(case, garbage, valid)
  for ours, theirs in zip(arrays(plan), arrays(other), strict=True):
    assert np.all(np.asarray(ours)[~np.asarray(valid)] == 0)
    np.testing.assert_array_equal(ours, theirs)
  for name in aux.losses:
    np.testing.assert_array_equal(aux.losses[name], other_aux.losses[name])
  for name in aux.metrics:
    np.testing.assert_array_equal(aux.metrics[name], other_aux.metrics[name])


def test_groups_do_not_see_each_other(case):
  tokens, valid = tokens_and_valid()
  changed = tokens.at[3].set(-tokens[3])
  for ours, theirs in zip(arrays(route(case, tokens, valid)[0]), arrays(route(case, changed, valid)[0]), strict=True):
    np.testing.assert_array_equal(ours[:3], theirs[:3])


def test_a_dropped_token_comes_home_as_nothing(case):
  tokens, valid = tokens_and_valid()
  plan, _ = route(case, tokens, valid)
  nowhere = np.all(np.asarray(arrays(plan)[0]) == 0, axis=(2, 3))
  assert np.all(np.asarray(layer_output(plan, tokens))[nowhere] == 0)


def test_in_evaluation_no_token_is_dropped_for_another(case):
  if case.soft:
    return
  tokens, valid = tokens_and_valid()
  whole = layer_output(route(case, tokens, valid, train=False)[0], tokens)
  alone = jnp.zeros_like(valid).at[0, 5].set(True)
  np.testing.assert_array_equal(whole[0, 5], layer_output(route(case, tokens, alone, train=False)[0], tokens)[0, 5])


def test_gradients_are_finite_and_reach_what_learns(case):
  tokens, valid = tokens_and_valid()

  def loss(params, tokens):
    plan, aux = route(case, tokens, valid, params=params)
    return jnp.sum(layer_output(plan, tokens) ** 2), aux

  params = variables(case.router).get('params', {})
  grads, token_grads = jax.grad(lambda p, t: loss(p, t)[0], argnums=(0, 1))(params, tokens)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((grads, token_grads)))
  assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(grads)) == case.learns


def test_jit_and_eight_devices_change_nothing(case, mesh):
  tokens, valid = tokens_and_valid()
  expected = [*arrays(route(case, tokens, valid)[0]), *route(case, tokens, valid)[1].losses.values()]

  def run(tokens, valid):
    plan, aux = route(case, tokens, valid)
    return [*arrays(plan), *aux.losses.values()]

  the_mesh = mesh(data=2, expert=2, model=2)
  with sharding.activate(the_mesh, sharding.replicated_rules()):
    placed = jax.device_put(tokens, sharding.named_sharding(the_mesh, 'batch', None, None))
    actual = jax.jit(run)(placed, valid)
  for ours, theirs in zip(actual, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
