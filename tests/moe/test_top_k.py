"""The token-choice router: gates, capacity, jitter, precision, padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe.routers.base import RoutingContext
from moe_jax.moe.routers.top_k import TopKRouter
from moe_jax.types import ConfigError

G, S, M, E = 2, 16, 8, 4
KERNEL = np.random.default_rng(0).normal(0, 1, (M, E)).astype(np.float32)
TOKENS = np.random.default_rng(1).normal(0, 1, (G, S, M)).astype(np.float32)
PROBS = np.exp(TOKENS @ KERNEL) / np.exp(TOKENS @ KERNEL).sum(-1, keepdims=True)


@functools.partial(jax.jit, static_argnums=(0, 1))
def apply(router, train, kernel, tokens, valid, key):
  context = RoutingContext(valid=valid, token_count=jnp.sum(valid), train=train)
  return router.apply({'params': {'kernel': kernel}}, tokens, context, rngs={'router': key})


def route(tokens=TOKENS, valid=None, train=False, key=0, kernel=KERNEL, **fields):
  """(plan, aux) of a router with the given kernel and fields."""
  valid = np.ones(tokens.shape[:2], bool) if valid is None else valid
  return apply(TopKRouter(num_experts=kernel.shape[1], **fields), train, kernel, tokens, valid, jax.random.key(key))


def assert_same_plan(actual, expected, where=np.s_[:]):
  assert (actual.num_experts, actual.capacity) == (expected.num_experts, expected.capacity)
  for field in ('expert_index', 'slot_index', 'combine_weight'):
    np.testing.assert_array_equal(getattr(actual, field)[where], getattr(expected, field)[where])


@pytest.mark.parametrize(('gates', 'k'), [('raw', 1), ('raw', 2), ('renormalised', 2), ('renormalised', 3), ('raw', E)])
def test_gates(gates, k):
  plan, _ = route(num_selected=k, gates=gates)
  best = np.argsort(-PROBS, axis=-1)[..., :k]
  expected = np.take_along_axis(PROBS, best, axis=-1)
  if gates == 'renormalised':
    expected /= expected.sum(-1, keepdims=True)
  np.testing.assert_array_equal(plan.expert_index, best)
  np.testing.assert_allclose(plan.combine_weight, expected, rtol=1e-5)


@pytest.mark.parametrize(
  ('fields', 'hint'),
  [
    ({'num_selected': 1}, 'raw'),
    ({'num_selected': E + 1}, f'{E + 1} of {E} experts'),
    ({'num_selected': 0}, f'0 of {E} experts'),
  ],
)
def test_refusals(fields, hint):
  with pytest.raises(ConfigError, match=hint):
    TopKRouter(num_experts=E, **fields)


@pytest.mark.parametrize(('gates', 'k'), [('raw', 1), ('renormalised', 2)])
def test_the_output_teaches_the_router(gates, k):
  def output(kernel):
    plan, _ = route(kernel=kernel, num_selected=k, gates=gates)
    return jnp.sum(plan.combine_weight * (1 + plan.expert_index))

  assert np.all(jax.grad(output)(jnp.asarray(KERNEL)) != 0)


@pytest.mark.parametrize('k', [1, 2])
def test_the_worst_case_drops_nothing_outside_training(k):
  """All tokens alike, so all want the same experts."""
  tokens = np.broadcast_to(TOKENS[:1, :1], TOKENS.shape)
  plan, aux = route(tokens, num_selected=k, gates='raw')
  assert plan.capacity == S and np.all(plan.kept)
  assert aux.metrics['dropped'] == aux.metrics['dropped_choices'] == 0
  plan, aux = route(tokens, num_selected=k, gates='raw', eval_capacity_factor=1.0)
  assert plan.capacity == 4 and np.all(plan.kept.sum(1) == 4)
  assert aux.metrics['dropped'] == 0.75


@pytest.mark.parametrize(('factor', 'capacity'), [(1.0, 4), (1.25, 8), (2.0, 8), (9.0, S)])
def test_training_capacity_counts_tokens_and_not_choices(factor, capacity):
  plan, _ = route(train=True, num_selected=2, capacity_factor=factor)
  assert plan.capacity == capacity
  seated = np.asarray(plan.dispatch_array('float32')).sum(axis=(1, 3))
  wanted = np.asarray(jax.nn.one_hot(plan.expert_index, E)).sum(axis=(1, 2))
  np.testing.assert_array_equal(seated, np.minimum(wanted, capacity))


def test_gates_are_renormalised_before_drops():
  """A token that loses one of two experts keeps the other at its weight."""
  whole, _ = route(num_selected=2)
  plan, _ = route(num_selected=2, train=True, capacity_factor=1.0)
  kept = np.asarray(plan.kept)
  assert np.any(kept.sum(-1) == 1)
  np.testing.assert_array_equal(plan.combine_weight, np.where(kept, whole.combine_weight, 0))


def test_jitter_is_for_training():
  calm, _ = route()
  assert_same_plan(route(jitter=0.5)[0], calm)
  plans = [route(train=True, key=key, jitter=0.5, capacity_factor=9.0)[0] for key in (0, 0, 1)]
  assert_same_plan(plans[0], plans[1])
  assert np.any(plans[0].combine_weight != plans[2].combine_weight)
  assert np.any(plans[0].expert_index != calm.expert_index)


def test_jitter_multiplies_within_its_bounds():
  """A router of one weight lays the noise bare: logits (noise, 0)."""
  ones, kernel = np.ones((8, 512, 1), np.float32), np.array([[1.0, 0.0]], np.float32)
  plan, _ = route(ones, train=True, kernel=kernel, num_selected=2, gates='raw', jitter=0.1, capacity_factor=9.0)
  first, second = np.moveaxis(np.asarray(plan.combine_weight), -1, 0)
  noise = np.log(first / second)
  assert 0.9 - 1e-4 <= noise.min() < 0.901 and 1.099 < noise.max() <= 1.1 + 1e-4
  assert abs(noise.mean() - 1) < 0.005


@pytest.mark.parametrize('jitter', [0.0, 0.01])
def test_bfloat16_tokens_are_routed_in_float32(jitter):
  tokens = jnp.asarray(TOKENS, 'bfloat16')
  plan, aux = route(tokens, train=True, jitter=jitter)
  expected, expected_aux = route(tokens.astype('float32'), train=True, jitter=jitter)
  assert plan.combine_weight.dtype == 'float32'
  assert_same_plan(plan, expected)
  for name, value in (aux.losses | aux.metrics).items():
    assert value.dtype == 'float32'
    np.testing.assert_array_equal(value, (expected_aux.losses | expected_aux.metrics)[name])


@pytest.mark.parametrize('train', [False, True])
def test_padding_is_never_routed_and_changes_nothing(train):
  valid = np.random.default_rng(2).random((G, S)) < 0.6
  garbage = np.where(valid[..., None], TOKENS, 100 * TOKENS[::-1])
  plan, aux = route(valid=valid, train=train, capacity_factor=1.0)
  other, other_aux = route(garbage, valid=valid, train=train, capacity_factor=1.0)
  assert_same_plan(other, plan, where=valid)
  for mine, its in zip(jax.tree.leaves(aux), jax.tree.leaves(other_aux), strict=True):
    np.testing.assert_array_equal(mine, its)
  for view in (plan.kept, plan.combine_weight, plan.dispatch_array('float32')):
    assert not np.any(view[~valid]) and np.any(view[valid])


def test_losses_carry_their_weights():
  _, aux = route(balance_loss_weight=0.5, z_loss_weight=0.25)
  assert aux.losses.keys() == {'balance', 'z'}
  assert aux.losses['balance'] == 0.5 * aux.metrics['balance']
  assert aux.losses['z'] == 0.25 * aux.metrics['z']


def test_balance_is_over_first_choices_before_capacity():
  tight, loose = (route(train=True, num_selected=2, capacity_factor=f)[1].metrics for f in (1.0, 9.0))
  assert tight['dropped_choices'] > loose['dropped_choices'] == 0
  assert tight['balance'] == loose['balance']
  f = [np.mean(PROBS.argmax(-1) == i, axis=1) for i in range(E)]
  expected = np.mean([E * sum(f[i][g] * PROBS[g, :, i].mean() for i in range(E)) for g in range(G)])
  np.testing.assert_allclose(loose['balance'], expected, rtol=1e-5)
