"""Every dispatcher carries every plan alike, and says so in the right collectives."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.layers.context import Context
from moe_jax.moe.dispatchers.all_to_all import all_to_all
from moe_jax.moe.dispatchers.auto import auto, choose
from moe_jax.moe.dispatchers.einsum import einsum
from moe_jax.moe.dispatchers.gather import gather
from moe_jax.moe.dispatchers.ragged import ragged
from moe_jax.moe.experts import ExpertBank, Experts, expert_mlp, grouped_expert_mlp
from moe_jax.moe.moe_layer import MoELayer
from moe_jax.moe.routers.top_k import TopKRouter
from moe_jax.moe.routing_plan import RoutingPlan, assign_slots
from moe_jax.notices import notice

DISPATCHERS = {'einsum': einsum, 'gather': gather, 'all_to_all': all_to_all, 'ragged': ragged}
G, S, M, E, F, K, C = 8, 6, 12, 4, 10, 2, 2
WI, WO = ('expert', 'embed', 'expert_mlp'), ('expert', 'expert_mlp', 'embed')
AXES = {'wi_0': WI, 'wi_1': WI, 'wo': WO}


@pytest.fixture(scope='module')
def journey():
  """Weights, tokens, and a plan that drops some of them."""
  rng = np.random.default_rng(0)
  weights = {name: rng.normal(0, 0.5, (E, F, M) if name == 'wo' else (E, M, F)) for name in AXES}
  expert_index = np.argsort(rng.random((G, S, E)))[..., :K].astype(np.int32)
  slots = np.asarray(assign_slots(jnp.asarray(expert_index), E, jnp.asarray(rng.random((G, S)) < 0.8)))
  gates = np.where(slots < C, rng.random((G, S, K)), 0).astype(np.float32)
  as_float32 = functools.partial(np.asarray, dtype=np.float32)
  plan = RoutingPlan(expert_index, slots, gates, E, C)
  return jax.tree.map(as_float32, weights), as_float32(rng.normal(0, 1, (G, S, M))), plan


def carry(dispatcher, weights, tokens, plan):
  apply, grouped = (functools.partial(run, activations=('gelu', 'linear')) for run in (expert_mlp, grouped_expert_mlp))
  return dispatcher(ExpertBank(apply, weights, AXES, grouped), tokens, plan)[0]


def everywhere(weights, tokens, plan):
  """Every expert on every token, weighed by the choices that were kept: no slots, no buffers."""
  chosen = jax.nn.one_hot(plan.expert_index, E) * jnp.where(plan.kept, plan.combine_weight, 0)[..., None]
  gate, up = (jnp.einsum('gsm,emf->gsef', tokens, weights[name]) for name in ('wi_0', 'wi_1'))
  answers = jnp.einsum('gsef,efm->gsem', jax.nn.gelu(gate) * up, weights['wo'])
  return jnp.einsum('gske,gsem->gsm', chosen, answers)


def outcome(carry, weights, tokens, plan):
  """Outputs, and gradients to weights, tokens and gates."""

  def loss(weights, tokens, gates):
    y = carry(weights, tokens, plan.replace(combine_weight=gates))
    return jnp.sum(jnp.sin(y)), y

  gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
  (_, y), (to_weights, to_tokens, to_gates) = jax.jit(gradient)(weights, tokens, plan.combine_weight)
  return jax.device_get((y, to_weights, to_tokens, to_gates))


@pytest.fixture(scope='module')
def expected(journey):
  kept = journey[2].kept
  assert np.any(np.all(kept, -1)) and np.any(~np.any(kept, -1)) and np.any(np.sum(kept, -1) == 1)
  return outcome(everywhere, *journey)


@pytest.mark.parametrize('shape', [None, (1, 1, 1), (2, 4, 1), (8, 1, 1), (1, 4, 2), (2, 2, 2)])
@pytest.mark.parametrize('name', DISPATCHERS)
def test_tokens_go_where_the_plan_says(name, shape, journey, expected, mesh):
  run = functools.partial(outcome, functools.partial(carry, DISPATCHERS[name]), *journey)
  if shape is None:
    actual = run()
  else:
    with sharding.activate(mesh(*shape), sharding.replicated_rules()):
      actual = run()
  assert np.all(actual[0][~np.any(journey[2].kept, axis=-1)] == 0)
  for mine, its in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', DISPATCHERS)
def test_bfloat16_stays(name, journey, expected, mesh):
  weights, tokens, plan = jax.tree.map(lambda x: x.astype('bfloat16') if x.dtype == 'float32' else x, journey)
  plan = plan.replace(combine_weight=journey[2].combine_weight)
  with sharding.activate(mesh(2, 2, 2), sharding.replicated_rules()):
    y = jax.jit(functools.partial(carry, DISPATCHERS[name]))(weights, tokens, plan)
  assert y.dtype == 'bfloat16'
  error = np.linalg.norm(np.asarray(y, 'float32') - expected[0]) / np.linalg.norm(expected[0])
  assert error < 0.02


def collectives(dispatcher, mesh, backward, batch=16, group_size=32):
  """[(kind, shape)] of the collectives in the compiled expert layer; its sizes are all different."""
  length, width, experts, hidden = 16, 24, 8, 20
  layer = MoELayer(
    num_experts=experts,
    group_size=group_size,
    router=functools.partial(TopKRouter, capacity_factor=1.0),
    experts=functools.partial(Experts, hidden_dim=hidden),
    dispatcher=dispatcher,
  )

  def output(params, x):
    ones = jnp.ones((batch, length), jnp.int32)
    return layer.apply({'params': params}, x, Context(ones, ones, jnp.float32(ones.size), train=True))[0]

  def gradients(params, x):
    return jax.grad(lambda *args: jnp.sum(jnp.sin(output(*args))), argnums=(0, 1))(params, x)

  def struct(shape, *names):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.named_sharding(mesh, *names))

  with sharding.activate(mesh, sharding.replicated_rules()):
    params = {
      'router': {'kernel': struct((width, experts), 'embed', None)},
      'experts': {
        'wi_0': struct((experts, width, hidden), *WI),
        'wi_1': struct((experts, width, hidden), *WI),
        'wo': struct((experts, hidden, width), *WO),
      },
    }
    x = struct((batch, length, width), 'batch', 'length', None)
    layout = jax.tree.map(lambda s: s.sharding, (params, x))
    function, out = (gradients, layout) if backward else (output, layout[1])
    text = jax.jit(function, out_shardings=out).lower(params, x).compile().as_text()
  pattern = r'= \(?\w+\[([\d,]*)\].*? (all-[a-z-]+|reduce-scatter|collective-permute)(?:-start)?\((?!.*\{0\},\{1\})'
  found = re.findall(pattern, text)  # of groups of one, nothing is sent
  return [(kind, tuple(map(int, shape.split(',')))) for shape, kind in found if shape]


@pytest.mark.parametrize('backward', [False, True], ids=['forward', 'backward'])
@pytest.mark.parametrize('shape', [(2, 4, 1), (2, 2, 2)])
@pytest.mark.parametrize('name', DISPATCHERS)
def test_collectives(name, shape, backward, mesh):
  found = collectives(DISPATCHERS[name], mesh(*shape), backward)
  kinds = [kind for kind, _ in found]
  tokens = [shape for kind, shape in found if kind == 'all-to-all' and shape[-1] == 24]
  assert len(tokens) == (4 if backward else 2), found  # out and home, and the same way back
  # Besides rows: how many they are; and the weights that gradients will want.
  numbers = {'einsum': 0, 'ragged': 1, 'gather': backward, 'all_to_all': backward}[name]
  assert kinds.count('all-to-all') == len(tokens) + numbers, found
  assert set(kinds) <= {'all-to-all', 'all-gather', 'all-reduce'}, found
  # No tokens, buffers or weights are gathered. (XLA's top-k for CPUs gathers the router's probabilities [G, S, E]; its
  # top-k for TPUs is a sort, and does not.)
  assert {shape for kind, shape in found if kind == 'all-gather'} <= {(8, 32, 8)}, found


@pytest.mark.parametrize('name', ['all_to_all', 'ragged'])
def test_pieces_of_sequences_stay_where_they_are(name, mesh):
  """Where a device has a piece of one sequence, tokens go to experts, and nowhere else."""
  found = collectives(DISPATCHERS[name], mesh(data=2, expert=2, sequence=2), False, batch=4, group_size=8)
  moved = [kind for kind, shape in found if shape[-1] == 24]
  assert moved == ['all-to-all'] * 2, found


def test_auto_takes_what_is_cheapest(journey, mesh, caplog, monkeypatch):
  weights, tokens, plan = journey
  roomy = plan.replace(capacity=S)  # 4 experts x 6 slots for 6 x 2 choices
  buffers = ExpertBank(None, weights, AXES)
  rows = buffers._replace(grouped=grouped_expert_mlp)
  assert choose(rows, plan)[0] is all_to_all
  assert choose(rows, roomy)[0] is all_to_all, 'twice the room is not yet too much'
  assert choose(rows, roomy.replace(capacity=S + 1))[0] is ragged
  assert choose(buffers, roomy.replace(capacity=S + 1))[0] is all_to_all
  notice.cache_clear()  # another test may have made it say so already
  monkeypatch.setattr(logging.getLogger('moe_jax'), 'handlers', [caplog.handler])
  monkeypatch.setattr(logging.getLogger('moe_jax'), 'propagate', False)
  with caplog.at_level('INFO', 'moe_jax'), sharding.activate(mesh(2, 4, 1), sharding.replicated_rules()):
    for _ in range(2):
      jax.eval_shape(functools.partial(carry, auto), weights, tokens, plan)
  assert [r.message for r in caplog.records] == ['auto: all_to_all, since experts live on 4 devices']
