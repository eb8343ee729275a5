"""Every router's plan, by every dispatcher, on every mesh, comes to the same: outputs, gradients, and what is counted.

The plans are made once, by the routers as `test_routers` tests them against the papers, and stacked into one; so a way
to carry them is compiled once for all routers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import sharding
from moe_jax.moe.dispatchers import by_device
from moe_jax.moe.dispatchers.all_to_all import all_to_all
from moe_jax.moe.dispatchers.auto import auto
from moe_jax.moe.dispatchers.einsum import einsum
from moe_jax.moe.dispatchers.gather import gather
from moe_jax.moe.dispatchers.ragged import ragged
from moe_jax.moe.experts import ExpertBank, expert_mlp, grouped_expert_mlp
from moe_jax.moe.routing_plan import RoutingPlan, SoftRoutingPlan, assign_slots
from moe_jax.types import ConfigError
from tests.moe.test_routers import CASES, M, context, tokens_and_valid, variables

DISPATCHERS = {'einsum': einsum, 'gather': gather, 'all_to_all': all_to_all, 'ragged': ragged, 'auto': auto}
MESHES = [(1, 1, 1), (2, 4, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)]
F = 16
WI, WO = ('expert', 'embed', 'expert_mlp'), ('expert', 'expert_mlp', 'embed')
AXES = {'wi_0': WI, 'wi_1': WI, 'wo': WO}
ACTIVATIONS = ('gelu', 'linear')


def bank(weights):
  apply, grouped = (functools.partial(run, activations=ACTIVATIONS) for run in (expert_mlp, grouped_expert_mlp))
  return ExpertBank(apply, weights, AXES, grouped, weighed=apply)


def experts(num_experts, dtype='float32'):
  rng = np.random.default_rng(num_experts)
  shapes = {name: (num_experts, F, M) if name == 'wo' else (num_experts, M, F) for name in AXES}
  return {name: jnp.asarray(rng.normal(0, 0.25, shape), dtype) for name, shape in shapes.items()}


@functools.cache
def plans(num_experts):
  """{router: plan} in training, each of 8 groups."""
  tokens, valid = tokens_and_valid()
  made = {}
  for name, case in CASES.items():
    if case.num_experts == num_experts:
      router = case.router(num_experts=num_experts)
      run = functools.partial(router.apply, rngs={'router': jax.random.key(7)}, mutable=['state'])
      (plan, _), _ = jax.jit(lambda variables, run=run: run(variables, tokens, context(valid)))(variables(name))
      made[name] = jax.tree.map(lambda x: np.concatenate([x, x]), jax.device_get(plan))
  return made


@functools.cache
def stacked(num_experts):
  """The plans that make choices, as one of many groups, with room for the most choices and slots that any has."""
  chosen = [plan for plan in plans(num_experts).values() if isinstance(plan, RoutingPlan)]
  most = max(plan.expert_index.shape[2] for plan in chosen)
  capacity = max(plan.capacity for plan in chosen)

  def padded(field, fill):
    parts = []
    for plan in chosen:
      values = np.where(plan.kept, getattr(plan, field), fill)
      parts.append(np.pad(values, ((0, 0), (0, 0), (0, most - values.shape[2])), constant_values=fill))
    return np.concatenate(parts)

  weights = padded('combine_weight', 0).astype(np.float32)
  return RoutingPlan(padded('expert_index', -1), padded('slot_index', 10**6), weights, num_experts, capacity)


def stacked_tokens(groups):
  tokens = np.concatenate([np.asarray(tokens_and_valid()[0])] * 2)
  return np.concatenate([tokens] * (groups // len(tokens)))


def outcome(carry, weights, tokens, plan):
  """Outputs, and the gradients of a sum over them to weights, tokens and the plan's weights."""

  def loss(weights, tokens, plan):
    y = carry(weights, tokens, plan)
    return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

  gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True, allow_int=True)
  (_, y), (to_weights, to_tokens, to_plan) = jax.jit(gradient)(weights, tokens, plan)
  return jax.device_get((y, to_weights, to_tokens, [x for x in jax.tree.leaves(to_plan) if x.dtype == 'float32']))


def everywhere(weights, tokens, plan):
  """Every expert on every token, in dense products: no slots, no buffers."""
  gate, up = (jnp.einsum('gsm,emf->gsef', tokens, weights[name]) for name in ('wi_0', 'wi_1'))
  answers = jnp.einsum('gsef,efm->gsem', jax.nn.gelu(gate) * up, weights['wo'])
  kept = jnp.where(plan.kept, plan.combine_weight, 0)
  return jnp.einsum('gske,gsk,gsem->gsm', jax.nn.one_hot(plan.expert_index, plan.num_experts), kept, answers)


def mixtures(weights, tokens, plan):
  """A soft plan, in dense products."""
  slots = jnp.einsum('gsec,gsm->gecm', plan.dispatch, tokens)
  gate, up = (jnp.einsum('gecm,emf->gecf', slots, weights[name]) for name in ('wi_0', 'wi_1'))
  return jnp.einsum('gsec,gecf,efm->gsm', plan.combine, jax.nn.gelu(gate) * up, weights['wo'])


@functools.cache
def expected(num_experts, soft=False):
  plan = plans(num_experts)['soft'] if soft else stacked(num_experts)
  return outcome(mixtures if soft else everywhere, experts(num_experts), stacked_tokens(plan.groups), plan)


def carried(dispatcher, shape, mesh, weights, tokens, plan):
  def carry(weights, tokens, plan):
    return dispatcher(bank(weights), tokens, plan)[0]

  with sharding.activate(mesh(*shape), sharding.replicated_rules()):
    return outcome(carry, weights, tokens, plan)


def assert_close(actual, expected, error):
  for mine, its in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    mine, its = np.asarray(mine, np.float64), np.asarray(its, np.float64)
    assert np.linalg.norm(mine - its) <= error * np.linalg.norm(its)


def ids(shape):
  return 'x'.join(map(str, shape))


@pytest.mark.parametrize('num_experts', sorted({case.num_experts for case in CASES.values()}))
@pytest.mark.parametrize('shape', MESHES, ids=ids)
@pytest.mark.parametrize('name', ['einsum', 'gather', 'all_to_all', 'ragged'])
def test_every_router(name, shape, num_experts, mesh):
  if num_experts % shape[1]:
    pytest.skip('these experts do not divide over this mesh')
  plan = stacked(num_experts)
  actual = carried(DISPATCHERS[name], shape, mesh, experts(num_experts), stacked_tokens(plan.groups), plan)
  assert_close(actual, expected(num_experts), 1e-5)
  assert np.all(actual[0][~np.any(plan.kept, axis=-1)] == 0)


@pytest.mark.parametrize('shape', MESHES, ids=ids)
@pytest.mark.parametrize('name', ['einsum', 'gather', 'all_to_all', 'auto'])
def test_soft(name, shape, mesh):
  plan = plans(8)['soft']
  actual = carried(DISPATCHERS[name], shape, mesh, experts(8), stacked_tokens(plan.groups), plan)
  assert_close(actual, expected(8, soft=True), 1e-5)


@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 4, 1), (1, 4, 2)], ids=ids)
@pytest.mark.parametrize('name', ['gather', 'all_to_all'])
def test_crowded(name, shape, mesh):
  """Every expert counts as a choice of every token, and few have a slot."""
  plan = plans(8)['expert_choice']
  assert plan.expert_index[0].size > 2 * plan.slots
  weights, tokens = experts(8), stacked_tokens(plan.groups)
  assert_close(
    carried(DISPATCHERS[name], shape, mesh, weights, tokens, plan), outcome(everywhere, weights, tokens, plan), 1e-5
  )


def test_soft_makes_no_choices():
  plan = plans(8)['soft']
  assert isinstance(plan, SoftRoutingPlan)
  with pytest.raises(ConfigError, match='einsum, gather or all_to_all'):
    ragged(bank(experts(8)), stacked_tokens(plan.groups), plan)


@pytest.mark.parametrize('name', DISPATCHERS)
def test_bfloat16(name, mesh):
  plan = stacked(8)
  weights, tokens = experts(8, 'bfloat16'), jnp.asarray(stacked_tokens(plan.groups), 'bfloat16')
  actual = carried(DISPATCHERS[name], (2, 2, 2), mesh, weights, tokens, plan)
  assert {leaf.dtype for leaf in jax.tree.leaves(actual[:3])} == {jnp.dtype('bfloat16')}
  assert_close(actual, expected(8), 2e-2)


# ---- Dropless -------------------------------------------------------------------------------------------------------


def plan_of(rng, groups, size, num_experts, choices, skew):
  """Different experts a token, the first ones asked the more often the larger the skew; nothing is dropped."""
  wish = rng.gumbel(size=(groups, size, num_experts)) - skew * np.arange(num_experts)
  index = jnp.asarray(np.argsort(-wish)[..., :choices].astype(np.int32))
  slots = assign_slots(index, num_experts, jnp.asarray(rng.random((groups, size)) < 0.9))
  weights = jnp.where(slots < size, jnp.asarray(rng.random(index.shape), jnp.float32), 0)
  return RoutingPlan(index, slots, weights, num_experts, size)


def visits(dispatcher, plan, **options):
  """Which expert answers which token, exactly: expert e sets bit e, and every answer comes home by its sum."""
  groups, size, _ = plan.expert_index.shape

  def of_rows(weights, rows, blocks, block):
    ends = jnp.cumsum(blocks) * block
    expert = jnp.sum(jnp.arange(len(rows))[:, None] >= ends[None], axis=1)
    bits = jnp.sum(weights['bit'].T * jax.nn.one_hot(expert, len(blocks)), axis=1)
    return jnp.concatenate([jnp.ones_like(rows[:, :1]) * bits[:, None], rows[:, 1:]], axis=1)

  def of_slots(weights, slots):
    bits = jnp.broadcast_to(weights['bit'][None, :, :, None], (*slots.shape[:3], 1))
    return jnp.concatenate([bits, slots[..., 1:]], axis=-1)

  weights = {'bit': 2.0 ** jnp.arange(plan.num_experts)[:, None]}
  tokens = jnp.arange(1.0, groups * size + 1).reshape(groups, size, 1) * jnp.array([0.0, 1.0])[None, None]
  ones = jnp.where(plan.kept, 1.0, 0.0)
  experts = ExpertBank(of_slots, weights, {'bit': ('expert', None)}, of_rows)
  carry = jax.jit(lambda tokens, plan: dispatcher(experts, tokens, plan, **options))
  return jax.device_get(carry(tokens, plan.replace(combine_weight=ones)))


@settings(max_examples=8)
@given(
  groups=st.sampled_from([8, 16]), size=st.sampled_from([1, 7]), choices=st.sampled_from([1, 3]),
  skew=st.sampled_from([0.0, 0.5, 5.0]), block=st.sampled_from([None, 4]), seed=st.integers(0, 99),
)  # fmt: skip
@pytest.mark.parametrize('shape', [(8, 1, 1), (2, 4, 1)], ids=ids)
def test_dropless_is_a_capacity_large_enough(shape, mesh, groups, size, choices, skew, block, seed):
  """The same experts see the same tokens, to the bit."""
  plan = plan_of(np.random.default_rng(seed), groups, size, 8, choices, skew)
  with sharding.activate(mesh(*shape), sharding.replicated_rules()):
    rows, journey = visits(ragged, plan, block=block)
    slots, _ = visits(all_to_all, plan)
  np.testing.assert_array_equal(rows, slots)
  bits = np.sum(np.where(plan.kept, 2**plan.expert_index, 0), axis=-1)
  np.testing.assert_array_equal(rows[..., 0], bits)
  assert not journey.overflow


def test_what_overflows_is_counted_and_nothing_else_changes(mesh):
  groups, size, ways = 8, 16, 4
  plan = plan_of(np.random.default_rng(0), groups, size, 8, 2, skew=0.6)
  tokens = np.random.default_rng(1).normal(size=(groups, size, M)).astype(np.float32)
  room = 16  # of 32 choices a device: twice the even share
  kept = np.asarray(plan.kept).copy()
  for group in range(groups):  # one a device
    for device in range(ways):  # experts 2 d and 2 d + 1, in this order, then by slot
      mine = [
        (int(plan.expert_index[group, s, k]), int(plan.slot_index[group, s, k]), s, k)
        for s, k in np.ndindex(size, 2)
        if kept[group, s, k] and plan.expert_index[group, s, k] // 2 == device
      ]
      for _, _, s, k in sorted(mine)[room:]:
        kept[group, s, k] = False
  lost = int(np.sum(np.asarray(plan.kept) & ~kept))
  assert lost > 5
  with sharding.activate(mesh(2, 4, 1), sharding.replicated_rules()):
    carry = jax.jit(lambda tokens, plan: ragged(bank(experts(8)), tokens, plan, bound=2.0))
    y, journey = carry(tokens, plan)
  assert journey.overflow == lost
  its = everywhere(experts(8), tokens, plan.replace(combine_weight=jnp.where(kept, plan.combine_weight, 0)))
  np.testing.assert_allclose(y, its, rtol=1e-5, atol=1e-5)


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
  """What JAX documents of its own, which CPUs lack; NaN where a device is sent another number than it is told."""
  operands = jax.lax.all_gather(operand, axis_name)
  starts, sizes, ends = (jax.lax.all_gather(x, axis_name) for x in (input_offsets, send_sizes, output_offsets))
  me, spot = jax.lax.axis_index(axis_name), jnp.arange(len(output))
  for source in range(len(operands)):
    begin, size = ends[source, me], sizes[source, me]
    rows = operands[source][jnp.clip(starts[source, me] + spot - begin, 0, len(operand) - 1)]
    rows = jnp.where(size == recv_sizes[source], rows, jnp.nan)
    output = jnp.where(((spot >= begin) & (spot < begin + size))[:, None], rows, output)
  return output


@pytest.mark.parametrize('bound', [None, 1.0])
@pytest.mark.parametrize('shape', [(2, 4, 1), (1, 4, 2)], ids=ids)
def test_filled_rows_alone_need_to_travel(shape, bound, mesh, monkeypatch):
  """Outputs and gradients are the same where the network has a ragged all-to-all."""
  plan, tokens = stacked(8), stacked_tokens(stacked(8).groups)
  carry = functools.partial(ragged, bound=bound)
  its = carried(carry, shape, mesh, experts(8), tokens, plan)
  called = []
  monkeypatch.setattr(by_device, 'only_filled_rows_travel', lambda: True)
  monkeypatch.setattr(jax.lax, 'ragged_all_to_all', lambda *a, **k: called.append(0) or ragged_all_to_all(*a, **k))
  assert_close(carried(carry, shape, mesh, experts(8), tokens, plan), its, 1e-6)
  assert len(called) >= 2
