"""What V-MoE, flaxformer and MaxText expect in tests of their own, from the same inputs.

Golden arrays [G, S, E, C] are written as `kept`: the (expert, slot, weight)s of every token of every group; all else
is 0.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.moe import router_losses
from moe_jax.moe.dispatchers.all_to_all import all_to_all
from moe_jax.moe.dispatchers.einsum import einsum
from moe_jax.moe.experts import ExpertBank
from moe_jax.moe.routers.base import RoutingContext
from moe_jax.moe.routers.bias_balanced import BiasBalancedRouter
from moe_jax.moe.routers.expert_choice import ExpertChoiceRouter
from moe_jax.moe.routers.soft import SoftRouter
from moe_jax.moe.routers.top_k import TopKRouter
from moe_jax.moe.routing_plan import RoutingPlan, assign_slots, expert_capacity

DISPATCHERS = {'einsum': einsum, 'all_to_all': all_to_all}
balance_loss, z_loss = jax.jit(router_losses.load_balance_loss), jax.jit(router_losses.router_z_loss)


def whole(x, train=False):
  """The context of tokens that are all real."""
  return RoutingContext(np.ones(x.shape[:2], bool), np.float32(x.shape[0] * x.shape[1]), train=train)


def route(router, scores, capacity, context=None, **fields):
  """The plan of a router for given scores, float32[G, S, E], which are its gates too.

  Scores need not add up to 1, so half of each is the probability, and idle experts behind the others share the rest.
  Of equal scores the later is made a little smaller, since it is to lose: rounding alone could let it win.
  """
  scores = scores * (1 - 1e-5 * np.arange(scores.shape[1], dtype=np.float32)[None, :, None])
  idle = np.repeat(1 - scores.sum(-1, keepdims=True) / 2, 8, axis=-1) / 8
  logits = np.log(np.maximum(np.concatenate([scores / 2, idle], -1), 1e-9))
  experts = logits.shape[-1]
  factor = (capacity + 0.5) * experts / (scores.shape[1] * fields.get('num_selected', 1))
  router = router(num_experts=experts, capacity_rule='megablocks', capacity_factor=factor, **fields)
  variables = {'params': {'kernel': np.eye(experts, dtype=np.float32)}}
  plan, _ = jax.jit(router.apply)(variables, logits, context or whole(scores, train=True))
  assert plan.capacity == capacity
  return plan.replace(combine_weight=2 * plan.combine_weight)


def choose(scores, k, capacity, priority, context=None):
  """As `route`, of tokens that choose."""
  return route(TopKRouter, scores, capacity, context, num_selected=k, gates='raw', priority=priority)


def assert_kept(plan, kept):
  array = np.zeros((len(kept), len(kept[0]), plan.num_experts, plan.capacity), np.float32)
  for place in np.ndindex(array.shape[:2]):
    for expert, slot, weight in kept[place[0]][place[1]]:
      array[*place, expert, slot] = weight
  experts = 1 + max(expert for group in kept for token in group for expert, _, _ in token)  # without the idle ones
  np.testing.assert_array_equal(plan.dispatch_array('float32')[:, :, :experts], array[:, :, :experts] > 0)
  np.testing.assert_allclose(plan.combine_array('float32')[:, :, :experts], array[:, :, :experts], rtol=1e-4)


def assert_choices(plan, indices, weights):
  """(expert, slot) of every choice, those beyond the capacity too."""
  np.testing.assert_array_equal(np.stack([plan.expert_index, plan.slot_index], -1), indices)
  np.testing.assert_allclose(plan.combine_weight, weights, rtol=1e-4)
  np.testing.assert_array_equal(plan.kept, np.array(weights) > 0)


# V-MoE

GATES = np.array([[[0.4, 0.0, 0.2], [0.5, 0.1, 0.4], [0.3, 0.2, 0.6]]], np.float32)


def test_vmoe_capacity():
  """V-MoE 942a78b: vmoe/moe_test.py for either side that chooses, vmoe/projects/soft_moe/router_test.py for slots."""
  assert expert_capacity(32, 32, 1.0, choices=2, rule='vmoe') == 4
  assert expert_capacity(128, 32, 2.0, rule='vmoe') == 8
  tokens = jnp.ones((1, 8, 16))
  init = jax.jit(SoftRouter(num_experts=5, capacity_factor=1.0).init)
  params = init(jax.random.key(0), tokens, whole(tokens))['params']
  assert {name: leaf.shape for name, leaf in nn.unbox(params).items()} == {'kernel': (16, 5, 2), 'scale': ()}


@pytest.mark.parametrize(
  ('priority', 'indices', 'kept'),
  [
    ('position', [[[(0, 0), (2, 1)], [(0, 1), (2, 2)], [(2, 0), (0, 2)]]], [[[0.4, 0.2], [0.5, 0], [0.6, 0]]]),
    ('gate', [[[(0, 1), (2, 2)], [(0, 0), (2, 1)], [(2, 0), (0, 2)]]], [[[0.4, 0], [0.5, 0.4], [0.6, 0]]]),
  ],
)
def test_vmoe_top_experts_per_item(priority, indices, kept):
  """V-MoE 942a78b, vmoe/moe_test.py: without and with Batch Prioritized Routing."""
  assert_choices(choose(GATES, 2, 2, priority), indices, kept)


def test_vmoe_top_items_per_expert():
  """V-MoE 942a78b, vmoe/moe_test.py: experts that choose two items each."""
  kept = [[[(0, 1, 0.4)], [(0, 0, 0.5), (1, 1, 0.1), (2, 1, 0.4)], [(1, 0, 0.2), (2, 0, 0.6)]]]
  assert_kept(route(ExpertChoiceRouter, GATES, 2), kept)


def test_vmoe_balance_and_importance_losses():
  """V-MoE 942a78b, vmoe/nn/routing_test.py."""
  gates = np.array([[[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]]], np.float32)
  valid, first = np.ones((1, 4), bool), gates.argmax(-1)[..., None]
  assert balance_loss(gates, first, valid, 4) == pytest.approx(1.0875, rel=1e-6)
  assert jax.jit(router_losses.importance_loss)(gates, valid, 4) == pytest.approx(0.03874999, rel=1e-5)


def test_vmoe_load_loss():
  """V-MoE 942a78b, vmoe/nn/routing_test.py.

  It measures every expert against the k-th best logit, we against the k-th best of the others (Shazeer 2017, eq. 9).
  The two agree where the next best ties with the k-th, so here the third of three is raised to the second.
  """
  clean = np.array([[[0.9, 0.06, 0.04], [0.7, 0.18, 0.12], [0.85, 0.05, 0.1]]], np.float32)
  noise = [[[-0.037, 0.026, -0.018], [-0.074, 0.045, -0.015], [-0.067, -0.059, 0.073]]]
  noisy = clean + np.array(noise, np.float32)
  tied = np.maximum(noisy, np.sort(noisy)[..., 1:2])
  load_loss = jax.jit(router_losses.load_loss, static_argnums=3)
  loss = load_loss(clean, tied, np.full_like(clean, 0.1), 2, np.ones((1, 3), bool), 3)
  assert loss == pytest.approx(0.48573864536489236, rel=1e-5)


JOURNEYS = {  # (expert, slot) of every choice, 9 where there is none; the same array; what lies in each expert's slots
  '2 experts': (
    [[[(1, 0), (9, 9)], [(0, 0), (9, 9)], [(1, 1), (0, 1)]], [[(0, 0), (1, 1)], [(0, 1), (9, 9)], [(9, 9), (1, 0)]]],
    [
      [[(1, 0, 0.7)], [(0, 0, 0.7)], [(0, 1, 0.3), (1, 1, 0.7)]],
      [[(0, 0, 0.7), (1, 1, 0.3)], [(0, 1, 0.7)], [(1, 0, 0.3)]],
    ],
    [[2, 3, 4, 5], [1, 3, 6, 4]],
  ),
  '4 experts': (
    [[[(1, 0), (9, 9)], [(0, 0), (9, 9)], [(2, 0), (3, 0)]], [[(0, 0), (2, 0)], [(3, 0), (9, 9)], [(9, 9), (1, 0)]]],
    [
      [[(1, 0, 0.7)], [(0, 0, 0.7)], [(2, 0, 0.7), (3, 0, 0.3)]],
      [[(0, 0, 0.7), (2, 0, 0.3)], [(3, 0, 0.7)], [(1, 0, 0.3)]],
    ],
    [[2, 4], [1, 6], [3, 4], [3, 5]],
  ),
}


@pytest.mark.parametrize(('indices', 'kept', 'slots'), JOURNEYS.values(), ids=JOURNEYS)
@pytest.mark.parametrize('name', DISPATCHERS)
def test_vmoe_dispatchers(name, indices, kept, slots):
  """V-MoE 942a78b, vmoe/moe_test.py: indices and arrays make one plan; what idle experts see, and what comes home."""
  weight = np.tile(np.array([[[0.7, 0.3]]], np.float32), (2, 3, 1))
  plan = RoutingPlan(*np.moveaxis(np.array(indices), -1, 0), weight, len(slots), len(slots[0]) // 2)
  assert_kept(plan, kept)
  seen = []

  def idle(_, x):
    seen.append(x)
    return x

  tokens = jnp.tile(jnp.arange(1.0, 7.0).reshape(2, 3, 1), (1, 1, 4))
  y, _ = DISPATCHERS[name](ExpertBank(idle, {}, {}), tokens, plan)
  by_expert = seen[0].swapaxes(0, 1).reshape(len(slots), -1, 4)
  np.testing.assert_array_equal(by_expert, np.repeat(np.array(slots)[..., None], 4, axis=-1))
  home = np.array([[0.7, 2 * 0.7, 3], [4, 5 * 0.7, 6 * 0.3]], np.float32)
  np.testing.assert_allclose(y, np.repeat(home[..., None], 4, axis=-1), rtol=1e-6)


@pytest.mark.parametrize('shape', [(1, 2), (1, 4), (2, 4)])
@pytest.mark.parametrize('name', DISPATCHERS)
def test_vmoe_dispatchers_on_a_mesh(name, shape, mesh):
  """V-MoE 942a78b, vmoe/moe_test.py: 32 items in groups of 4, choosing in turn; each of 4 experts adds its number."""
  experts = np.arange(64).reshape(8, 4, 2) % 4
  slots = assign_slots(experts, 4, jnp.ones((8, 4), bool))
  plan = RoutingPlan(experts, slots, jnp.tile(jnp.array([[[0.7, 0.3]]]), (8, 4, 1)), 4, 2)

  @jax.jit
  def run(p, tokens, plan):
    bank = ExpertBank(lambda w, x: x + w['p'][None, :, None, None], {'p': p}, {'p': ('expert',)})
    return DISPATCHERS[name](bank, tokens, plan)[0]

  tokens = 10 * np.arange(1, 33, dtype=np.float32).reshape(8, 4, 1)
  with sharding.activate(mesh(*shape), sharding.replicated_rules()):
    y = run(jnp.arange(1.0, 5.0), tokens, plan)
  np.testing.assert_allclose(y, tokens + ((1 + experts) @ [0.7, 0.3])[..., None], rtol=1e-6)


# flaxformer


class RouterWeights(nn.Module):
  """Gives the kernel its name, and so its random key; logits are bfloat16."""

  num_experts: int

  @nn.compact
  def __call__(self, tokens):
    init = nn.initializers.normal(0.02)
    return nn.Dense(self.num_experts, dtype=jnp.bfloat16, kernel_init=init, name='w')(tokens)


class Flaxformer(nn.Module):
  """The logits of its routers."""

  num_experts: int
  jitter: float

  @nn.compact
  def __call__(self, tokens):
    low, high = 1 - self.jitter, 1 + self.jitter
    tokens *= jax.random.uniform(self.make_rng('jitter'), tokens.shape, minval=low, maxval=high)
    return RouterWeights(self.num_experts, name='router_weights')(tokens)


@functools.cache
def drawn(shape, num_experts, jitter=0.0, padding=False):
  """(logits, probs, valid) of its tests: float32[G, S, E] twice, and bool[G, S]."""
  with jax.threefry_partitionable(False):
    key = jax.random.PRNGKey(0)
    tokens, valid = jax.random.uniform(key, shape), jnp.ones(shape[:2], bool)
    if padding:
      valid = jax.random.randint(key, (*shape[:2], 1), 0, 2)[..., 0] > 0
    rngs = {'params': key, 'jitter': key}
    logits, _ = Flaxformer(num_experts, jitter).init_with_output(rngs, tokens * valid[..., None])
  return np.asarray(logits, np.float32), np.asarray(jax.nn.softmax(logits), np.float32), np.asarray(valid)


def assert_losses(logits, probs, k, balance, z):
  """Its balance loss, E^2 times a mean over experts, is our E times a sum, but all k choices count in full.

  Its z-loss is rounded to bfloat16 on the way.
  """
  valid, choices = np.ones(probs.shape[:2], bool), jax.lax.top_k(jnp.asarray(probs), k)[1]
  assert k * balance_loss(probs, choices, valid, valid.size) == pytest.approx(balance, rel=1e-6)
  assert z_loss(logits, valid, valid.size) == pytest.approx(z, rel=1e-2)


def test_flaxformer_losses():
  """flaxformer 399ea3a, architectures/moe/routing_test.py: loss functions by themselves, one choice a token."""
  with jax.threefry_partitionable(False):
    key = jax.random.PRNGKey(0)
    probs, choices = jax.random.uniform(key, (1, 5, 2)), jax.random.randint(key, (1, 5, 1), 0, 2)
    logits = jax.random.uniform(key, (2, 6, 4), minval=-5, maxval=5)
  balance = balance_loss(probs, choices, np.ones((1, 5), bool), 5)
  assert balance == pytest.approx(0.8741045, rel=1e-6)
  assert z_loss(logits, np.ones((2, 6), bool), 12) == pytest.approx(13.786719, rel=1e-6)


TOP_1 = [[[0.25390625], [0.2578125], [0.25585938], [0]], [[0.2578125], [0.25390625], [0.25585938], [0.25585938]]]
TOP_2 = [
  [[0.25390625, 0], [0.2578125, 0], [0.25585938, 0.25390625], [0, 0.25]],
  [[0.2578125, 0], [0.25390625, 0], [0.25585938, 0], [0.25585938, 0]],
]
SCATTER = [  # priority, (expert, slot) of every choice, their weights, balance loss
  ('gate', [[[(2, 1)], [(3, 0)], [(2, 0)], [(2, 2)]], [[(3, 0)], [(2, 1)], [(3, 1)], [(2, 0)]]], TOP_1, 1.0166016),
  ('position', [[[(2, 0)], [(3, 0)], [(2, 1)], [(2, 2)]], [[(3, 0)], [(2, 0)], [(3, 1)], [(2, 1)]]], TOP_1, 1.0166016),
  (
    'gate',
    [
      [[(2, 1), (3, 2)], [(3, 0), (2, 3)], [(2, 0), (3, 1)], [(2, 2), (0, 0)]],
      [[(3, 0), (2, 2)], [(2, 1), (3, 3)], [(3, 1), (2, 3)], [(2, 0), (3, 2)]],
    ],
    TOP_2,
    2.0289307,
  ),
]


@pytest.mark.parametrize(('priority', 'indices', 'weights', 'balance'), SCATTER)
def test_flaxformer_scatter_router(priority, indices, weights, balance):
  """flaxformer 399ea3a, architectures/moe/routing_test.py: TokensChooseScatterRouter."""
  logits, probs, _ = drawn((2, 4, 4), 4, jitter=0.01)
  k = np.shape(weights)[-1]
  assert_choices(choose(probs, k, 2, priority), indices, weights)
  assert_losses(logits, probs, k, balance, 1.8994141)


MASK_1 = [[[(0, 0, 0.5078125)], [(1, 0, 0.50390625)], []], [[(0, 0, 0.50390625)], [(1, 0, 0.5078125)], []]]
MASK_2 = [
  [[(0, 0, 0.33203125), (2, 0, 0.3359375)], [(1, 0, 0.3359375)], [], []],
  [[(0, 0, 0.33007812), (1, 0, 0.34179688)], [(2, 0, 0.3359375)], [], []],
]


@pytest.mark.parametrize(
  ('draw', 'k', 'priority', 'kept', 'balance', 'z'),
  [
    (((2, 3, 4), 2), 1, 'gate', MASK_1, 1.0006511, 0.47721353),
    (((2, 3, 4), 2), 1, 'position', MASK_1, 1.0006511, 0.47721353),
    (((2, 4, 3), 3, 0.01), 2, 'gate', MASK_2, 2.001709, 1.2714844),
  ],
)
def test_flaxformer_mask_router(draw, k, priority, kept, balance, z):
  """flaxformer 399ea3a, architectures/moe/routing_test.py: TokensChooseMaskedRouter."""
  logits, probs, _ = drawn(*draw)
  assert_kept(choose(probs, k, 1, priority), kept)
  assert_losses(logits, probs, k, balance, z)


def test_flaxformer_experts_choose():
  """flaxformer 399ea3a, architectures/moe/routing_test.py: ExpertsChooseMaskedRouter."""
  kept = [
    [[(0, 1, 0.49609375), (1, 0, 0.50390625)], [(1, 1, 0.50390625)], [(0, 0, 0.49804688)], []],
    [[(0, 0, 0.49804688)], [(0, 1, 0.49414062)], [(1, 0, 0.5078125)], [(1, 1, 0.5078125)]],
  ]
  logits, probs, valid = drawn((2, 4, 3), 2)
  assert_kept(route(ExpertChoiceRouter, probs, 2), kept)
  assert z_loss(logits, valid, valid.size) == pytest.approx(0.5041504, rel=1e-2)


def test_flaxformer_padding():
  """flaxformer 399ea3a, architectures/moe/routing_test.py: all three routers, though padding wants both experts most.

  It divides by all tokens, and padding has a z-loss of log(E)^2; we count real tokens alone. Its scatter router gives
  padding slots behind all others, and counts padding in the balance loss: of that router only real slots are compared.
  """
  logits, probs, valid = drawn((2, 6, 2), 2, padding=True)
  assert not valid.all()
  context = RoutingContext(valid, valid.sum(), train=True)
  scores = np.where(valid[..., None], probs, 0.6)
  plan = choose(scores, 2, 1, 'gate', context)
  both, other = [(0, 0, 0.50390625), (1, 0, 0.49804688)], [(0, 0, 0.50390625), (1, 0, 0.49414062)]
  assert_kept(plan, [[[], both, [], [], [], []], [[], other, [], [], [], []]])
  slots = np.array([[4, 0, 1, 5, 2, 3], [3, 0, 1, 4, 2, 5]])  # the same for either choice
  np.testing.assert_array_equal(plan.slot_index[valid], np.stack([slots, slots], -1)[valid])
  picked = [[[], both, [], [], [], []], [[], both[:1], both[1:], [], [], []]]
  assert_kept(route(ExpertChoiceRouter, scores, 1, context), picked)

  real, choices = valid.mean(1), jax.lax.top_k(jnp.asarray(probs), 2)[1]
  groups = [(probs[g : g + 1], choices[g : g + 1], valid[g : g + 1], valid[g].sum()) for g in range(2)]
  balance = np.mean([2 * balance_loss(*group) for group in groups] * real**2)
  assert balance == pytest.approx(0.6951497, rel=1e-6)
  z = z_loss(logits, valid, valid.sum())
  assert z * real.mean() + np.log(2) ** 2 * (1 - real.mean()) == pytest.approx(0.48541257, rel=1e-6)


# MaxText


def test_maxtext_masks():
  """MaxText e591f30, tests/unit/moe_test.py: TokenDroppingTest, and its capacity.

  It gives slots token by token, we to all first choices first: with every choice as a token of its own we do as it
  does. In our order groups 0, 1 and 3 come out the same; in group 2 two choices swap slots, and the same are dropped.
  """
  experts = '05041035 12415071 62234212 41075047'  # of groups of four tokens, two a token
  choices = jnp.array([list(map(int, group)) for group in experts.split()]).reshape(4, 4, 2)
  first = [[0.2, 0.68, 0.78, 0.32], [0.26, 0.21, 0.11, 0.89], [0.74, 0.88, 0.83, 0.35], [0.53, 0.36, 0.85, 0.18]]
  kept = [
    [[(0, 0, 0.2), (5, 0, 0.8)], [(0, 1, 0.68), (4, 0, 0.32)], [(1, 0, 0.78)], [(3, 0, 0.32), (5, 1, 0.68)]],
    [[(1, 0, 0.26), (2, 0, 0.74)], [(1, 1, 0.79), (4, 0, 0.21)], [(0, 0, 0.89), (5, 0, 0.11)], [(7, 0, 0.89)]],
    [[(2, 0, 0.26), (6, 0, 0.74)], [(2, 1, 0.88), (3, 0, 0.12)], [(4, 0, 0.83)], [(1, 0, 0.35)]],
    [
      [(1, 0, 0.47), (4, 0, 0.53)],
      [(0, 0, 0.36), (7, 0, 0.64)],
      [(0, 1, 0.15), (5, 0, 0.85)],
      [(4, 1, 0.18), (7, 1, 0.82)],
    ],
  ]
  gates = np.stack([first, 1 - np.array(first)], -1).astype(np.float32)
  slots = assign_slots(choices.reshape(4, 8, 1), 8, jnp.ones((4, 8), bool)).reshape(4, 4, 2)
  plan = RoutingPlan(choices, slots, gates, 8, expert_capacity(4, 8, 2.0, choices=2, rule='megablocks'))
  assert_kept(plan, kept)
  ours = plan.replace(slot_index=assign_slots(choices, 8, jnp.ones((4, 4), bool)))
  kept[2][:2] = [[(2, 1, 0.26), (6, 0, 0.74)], [(2, 0, 0.88), (3, 0, 0.12)]]
  assert_kept(ours, kept)


def balanced(logits, num_experts, bias=None, train=False, **fields):
  """(plan, bias afterwards) of a router that is balanced by a bias."""
  router, context = BiasBalancedRouter(num_experts=num_experts, **fields), whole(logits, train)
  state = jax.jit(router.init)(jax.random.key(0), logits, context)['state']
  state |= {} if bias is None else {'bias': bias}
  variables = {'params': {'kernel': np.eye(num_experts, dtype=np.float32)}, 'state': state}
  (plan, _), after = jax.jit(functools.partial(router.apply, mutable=['state']))(variables, logits, context)
  return plan, after['state']['bias']


def test_maxtext_group_limited_routing():
  """MaxText e591f30, tests/unit/moe_test.py: DeepSeekRoutingTest.

  Its gates are the scores before a bias of 0.5, of which some are negative. Ours are sigmoids, and normalised: here
  scores are raised by 0.6, and the bias is -0.1.
  """
  first = [0.20, 0.10, 0.05, 0.10, 0.10, 0.60, 0.30, 0.10, 0.80, 0.01, 0.01, 0.01, 0.05, 0.80, 0.20, 0.10]
  second = [0.68, 0.20, 0.06, 0.03, 0.32, 0.10, 0.05, 0.02, 0.65, 0.20, 0.04, 0.01, 0.32, 0.10, 0.05, 0.02]
  biased = np.array([[first, second]], np.float32)
  expected = np.array([[[13, 5, 6, 14], [0, 8, 1, 9]]])
  scores, bias = biased + 0.1, np.full(16, -0.1, np.float32)
  plan, _ = balanced(np.log(scores / (1 - scores)), 16, bias, num_selected=4, num_groups=4, groups_kept=2)
  np.testing.assert_array_equal(plan.expert_index, expected)
  gates = np.take_along_axis(scores, expected, axis=-1)
  np.testing.assert_allclose(plan.combine_weight, gates / gates.sum(-1, keepdims=True), rtol=1e-5)


def test_maxtext_bias_updates():
  """MaxText e591f30, tests/unit/moe_test.py: DeepSeekRoutingTest, loads of 5, 4, 3 and 4."""
  choices = np.array([[[0, 1], [3, 0], [3, 1], [1, 0]], [[0, 3], [2, 0], [1, 2], [2, 3]]])
  logits = np.zeros((2, 4, 4), np.float32)
  np.put_along_axis(logits, choices, np.array([[[2, 1]]], np.float32), axis=-1)
  plan, bias = balanced(logits, 4, train=True, num_selected=2, bias_rate=0.01)
  np.testing.assert_array_equal(plan.expert_index, choices)
  np.testing.assert_allclose(bias, [-0.01, 0, 0.01, 0], rtol=1e-6)
