"""What every router must do. A new one joins by a line in the table."""

import dataclasses
import functools
import pathlib
import re
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import run
from moe_jax import sharding
from moe_jax.moe.dispatchers.einsum import einsum
from moe_jax.moe.experts import ExpertBank
from moe_jax.moe.moe_layer import MoELayer
from moe_jax.moe.routers import hashing
from moe_jax.moe.routers.base import RoutingContext
from moe_jax.moe.routers.base_layers import BaseLayersRouter
from moe_jax.moe.routers.bias_balanced import BiasBalancedRouter
from moe_jax.moe.routers.cosine import CosineRouter
from moe_jax.moe.routers.dense import DenseRouter, DSelectKRouter
from moe_jax.moe.routers.expert_choice import ExpertChoiceRouter, MixtureOfDepthsRouter
from moe_jax.moe.routers.hashing import BalancedHashRouter, HashRouter, RandomRouter, RoundRobinRouter
from moe_jax.moe.routers.hierarchical import HierarchicalRouter
from moe_jax.moe.routers.noisy_top_k import NoisyTopKRouter
from moe_jax.moe.routers.prototype import PrototypeRouter
from moe_jax.moe.routers.reinforce import BernoulliRouter, ReinforceRouter
from moe_jax.moe.routers.sinkhorn import SinkhornRouter
from moe_jax.moe.routers.soft import SoftRouter
from moe_jax.moe.routers.stable import StableRouter
from moe_jax.moe.routers.task import DomainRouter, SentenceRouter, TaskRouter
from moe_jax.moe.routers.top_k import ReroutingRouter, TopKRouter
from moe_jax.types import Aux
from tests.moe import references

ROOT = pathlib.Path(__file__).parents[2]
G, S, E, M, VOCAB, TASKS = 4, 16, 8, 8, 32, 3
make = functools.partial


@dataclasses.dataclass(frozen=True)
class Case:
  """A router, and what is true of it.

  Attributes:
    router: makes it, given num_experts.
    reference: the same in NumPy, see `references`.
    gate_sum: what a token's gates add up to where none is dropped; None where they do not add up to a constant.
    learns: the task's loss, through the gates, gives its weights a gradient.
    mixes: its plan mixes tokens instead of choosing.
    alone: outside training a token's way does not depend on what else is in its group.
    num_experts: E.
    modes: of the reference.
  """

  router: Callable[..., Any]
  reference: Callable[..., Any]
  gate_sum: float | None = None
  learns: bool = True
  mixes: bool = False
  alone: bool = True
  num_experts: int = E
  modes: tuple[bool, ...] = (True, False)


SCATTERED = [(i * 2654435761 % 2**32 >> 16) % E for i in range(VOCAB)]
TABLE = make(hashing.random_table, vocab_size=VOCAB)

CASES = {
  'top_2': Case(TopKRouter, references.top_k, gate_sum=1.0),
  'gshard': Case(
    make(TopKRouter, second_policy='random', second_threshold=0.5),
    make(references.top_k, others='random', threshold=0.5),
    1.0,
  ),
  'threshold': Case(make(TopKRouter, second_policy='threshold'), make(references.top_k, others='threshold')),
  'st_moe': Case(
    make(TopKRouter, z_loss_weight=1e-3, capacity_factor=1.25, second_policy='random', capacity_rule='mesh'),
    make(references.top_k, factor=1.25, others='random', least=4, multiple=1),
    gate_sum=1.0,
  ),
  'switch': Case(
    make(TopKRouter, num_selected=1, gates='raw', jitter=0.01, capacity_rule='mesh'),
    make(references.top_k, k=1, gates='raw', jitter=0.01, least=4, multiple=1),
  ),
  'switch_reroute': Case(
    make(ReroutingRouter, num_selected=1, gates='raw', capacity_factor=1.0, capacity_rule='mesh'),
    make(references.top_k, k=1, gates='raw', fallbacks=3, factor=1.0, least=4, multiple=1),
  ),
  'top_2_reroute': Case(
    make(ReroutingRouter, fallbacks=2, capacity_factor=1.0),
    make(references.top_k, fallbacks=2, factor=1.0),
    gate_sum=1.0,
  ),
  'batch_priority': Case(
    make(TopKRouter, gates='raw', priority='gate', capacity_factor=0.5, capacity_rule='vmoe'),
    make(references.top_k, gates='raw', priority='gate', factor=0.5, per_choice=True, up=True),
  ),
  'random_priority': Case(
    make(TopKRouter, num_selected=1, gates='raw', priority='random', capacity_factor=1.0, capacity_rule='deepspeed'),
    make(references.top_k, k=1, gates='raw', priority='random', factor=1.0, least=4, multiple=1, up=True),
  ),
  'mixtral': Case(
    make(TopKRouter, gates='softmax', capacity_factor=None, balance_choices='all', balance_loss_weight=4e-2),
    make(references.top_k, gates='softmax', factor=None),
    gate_sum=1.0,
  ),
  'olmoe': Case(
    make(TopKRouter, gates='raw', capacity_factor=None, z_loss_weight=1e-3, balance_choices='all'),
    make(references.top_k, gates='raw', factor=None),
  ),
  'qwen3_moe': Case(
    make(TopKRouter, capacity_factor=None, balance_choices='all', balance_loss_weight=2e-3),
    make(references.top_k, factor=None),
    gate_sum=1.0,
  ),
  'sigmoid': Case(
    make(TopKRouter, gates='sigmoid', balance_choices='all'), make(references.top_k, gates='sigmoid'), gate_sum=1.0
  ),
  'cosine': Case(CosineRouter, references.cosine, gate_sum=1.0),
  'noisy_top_2': Case(NoisyTopKRouter, references.noisy_top_k, gate_sum=1.0),
  'hierarchical': Case(HierarchicalRouter, references.hierarchical, gate_sum=1.0, num_experts=16),
  'top_2_of_6': Case(TopKRouter, references.top_k, gate_sum=1.0, num_experts=6),
  'prototype': Case(make(PrototypeRouter, capacity_factor=1.0), make(references.prototype, factor=1.0)),
  'stable_moe': Case(make(StableRouter, vocab_size=VOCAB), references.stable),
  'deepseek_v3': Case(
    make(BiasBalancedRouter, route_scale=2.5, num_groups=4, groups_kept=2, capacity_factor=None),
    make(references.bias_balanced, groups=4, kept=2, scale=2.5, factor=None),
    gate_sum=2.5,
  ),
  'bias_balanced': Case(BiasBalancedRouter, references.bias_balanced, gate_sum=1.0),
  'expert_choice': Case(ExpertChoiceRouter, references.expert_choice, alone=False),
  'mixture_of_depths': Case(
    make(MixtureOfDepthsRouter, capacity_factor=0.5), references.mixture_of_depths, num_experts=1
  ),
  'base_layers': Case(make(BaseLayersRouter, tolerance=1e-4), references.base),
  'sinkhorn': Case(make(SinkhornRouter, capacity_factor=1.0), references.sinkhorn),
  'reinforce_baseline': Case(ReinforceRouter, references.drawn, gate_sum=1.0, learns=False),
  'reinforce': Case(make(ReinforceRouter, learnt_baseline=False), references.drawn, gate_sum=1.0, learns=False),
  'bernoulli': Case(BernoulliRouter, references.bernoulli, learns=False),
  'hash': Case(
    make(HashRouter, table=TABLE), lambda g: references.hashed(g, hashing.random_table(E, VOCAB)), 1.0, learns=False
  ),
  'hash_scattered': Case(HashRouter, make(references.hashed, table=SCATTERED), gate_sum=1.0, learns=False),
  'hash_balanced': Case(
    make(BalancedHashRouter, vocab_size=VOCAB),
    make(references.hashed, table=SCATTERED),
    1.0,
    learns=False,
    modes=(True,),
  ),
  'thor': Case(make(RandomRouter, share='batch'), references.thor, gate_sum=1.0, learns=False),
  'random': Case(RandomRouter, references.randomly, gate_sum=1.0, learns=False),
  'round_robin': Case(RoundRobinRouter, references.by_place, gate_sum=1.0, learns=False),
  'task': Case(
    make(TaskRouter, num_tasks=TASKS, capacity_factor=None), make(references.task, factor=None), gate_sum=1.0
  ),
  'sentence': Case(
    make(SentenceRouter, capacity_factor=None), make(references.sentence, factor=None), gate_sum=1.0, alone=False
  ),
  'demix': Case(make(DomainRouter, num_tasks=TASKS), references.domain, gate_sum=1.0, learns=False),
  'soft': Case(make(SoftRouter, capacity_factor=1.0), references.soft, gate_sum=1.0, mixes=True, alone=False),
  'dense_2013': Case(DenseRouter, references.dense, gate_sum=1.0),
  'dselect_k': Case(DSelectKRouter, references.dselect_k, gate_sum=1.0),
  'dselect_k_of_6': Case(DSelectKRouter, references.dselect_k, num_experts=6),
}


@pytest.fixture(params=CASES)
def name(request):
  return request.param


@functools.cache
def tokens_and_valid():
  """Tokens of a lopsided distribution, so that some are dropped; a group with padding, and a group of nothing else."""
  tokens = jax.random.normal(jax.random.key(3), (G, S, M)) + 0.7
  valid = np.ones((G, S), bool)
  valid[1, S // 2 :] = False
  valid[2] = False
  return tokens, jnp.asarray(valid)


def context(valid, train=True):
  ids = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32) * 5 % 7 + 1, valid.shape)
  tasks = jnp.broadcast_to(jnp.arange(valid.shape[0], dtype=jnp.int32)[:, None] % TASKS + 1, valid.shape)
  positions = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), valid.shape)
  return RoutingContext(
    valid, jnp.sum(valid).astype(jnp.float32), ids, tasks, positions, valid.astype(jnp.int32), row_length=S, train=train
  )


@functools.cache
def variables(name):
  """Weights with opinions, and memories with something in them."""
  case, (tokens, valid) = CASES[name], tokens_and_valid()
  made = nn.unbox(case.router(num_experts=case.num_experts).init(jax.random.key(0), tokens, context(valid, False)))

  def opinionated(path, x):
    path = jax.tree_util.keystr(path)
    noise = jax.random.normal(jax.random.key(zlib.crc32(path.encode())), x.shape)
    scale = {'noise': 0.1, 'kernel': 0.6, 'code': 0.2, 'mix': 0.5, 'bias': 0.2}
    return next((noise * by for word, by in scale.items() if word in path), x)

  return {'params': {}, 'state': {}} | jax.tree_util.tree_map_with_path(opinionated, made)


def layer_output(plan, tokens):
  """What comes home when expert e multiplies by e + 1."""
  experts = plan.dispatch_array(jnp.float32).shape[2]
  weights = {'scale': jnp.arange(1.0, experts + 1)}
  bank = ExpertBank(lambda w, slots: slots * w['scale'][None, :, None, None], weights, {'scale': ('expert',)})
  return einsum(bank, tokens, plan)[0]


@dataclasses.dataclass
class Result:
  """What a router answered, and what came of it."""

  dispatch: Any
  combine: Any
  aux: Aux
  output: Any
  gradients: Any  # of the sum of squares of the output: to params, and to tokens
  state: Any


jax.tree_util.register_dataclass(Result)


def routed(name, train, params, tokens, valid, key):
  case = CASES[name]

  def loss(params, tokens):
    (plan, aux), state = case.router(num_experts=case.num_experts).apply(
      {**variables(name), 'params': params}, tokens, context(valid, train), rngs={'router': key}, mutable=['state']
    )
    y = layer_output(plan, tokens)
    arrays = plan.dispatch_array(jnp.float32), plan.combine_array(jnp.float32)
    return jnp.sum(y**2), (*arrays, aux, y, state)

  (_, (dispatch, combine, aux, y, state)), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, tokens)
  return Result(dispatch, combine, aux, y, gradients, state)


@functools.cache
def compiled(name, train):
  return jax.jit(functools.partial(routed, name, train))


def route(name, tokens=None, valid=None, train=True, key=7):
  ours, real = tokens_and_valid()
  tokens, valid = ours if tokens is None else tokens, real if valid is None else valid
  return compiled(name, train)(variables(name)['params'], tokens, valid, jax.random.key(key))


def assert_trees(actual, expected, error=0.0):
  """Every leaf of one is that of the other, up to a share of its norm."""
  for (path, mine), its in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
    mine, its = np.asarray(mine, np.float64), np.asarray(its, np.float64)
    apart = np.linalg.norm(mine - its)
    assert apart <= error * max(np.linalg.norm(its), 1e-3), f'{jax.tree_util.keystr(path)}: {apart}'


def test_shapes_and_numbers(name):
  result = route(name)
  case = CASES[name]
  assert result.dispatch.shape == result.combine.shape and result.dispatch.shape[:3] == (G, S, case.num_experts)
  assert np.all(np.isfinite(result.dispatch)) and np.all(np.isfinite(result.combine))
  for value in (*result.aux.losses.values(), *result.aux.metrics.values(), *result.aux.token_terms.values()):
    assert value.dtype == jnp.float32 and np.all(np.isfinite(value))
  assert all(value.shape == () for value in result.aux.losses.values())
  assert all(value.shape == (G, S) for value in result.aux.token_terms.values())
  if 'expert_load' in result.aux.metrics:
    assert result.aux.metrics['expert_load'].shape == (case.num_experts,)
    if name not in ('expert_choice', 'bernoulli', 'dselect_k_of_6'):  # these choose, or weigh, as much as they will
      np.testing.assert_allclose(result.aux.metrics['expert_load'].sum(), 1.0, rtol=1e-5)


def test_a_slot_holds_one_token_and_a_token_one_slot_an_expert(name):
  if CASES[name].mixes:
    return
  result = route(name)
  assert set(np.unique(result.dispatch)) <= {0.0, 1.0}
  assert np.max(np.sum(result.dispatch, axis=1)) == 1, 'a slot holds one token'
  assert np.max(np.sum(result.dispatch, axis=3)) == 1, 'a token has one slot an expert'
  assert np.all(np.asarray(result.combine)[np.asarray(result.dispatch) == 0] == 0)


def test_gates_keep_their_convention(name):
  if CASES[name].gate_sum is None:
    return
  sums = np.sum(route(name, train=False).combine, axis=(2, 3))  # nothing is dropped
  np.testing.assert_allclose(sums[np.asarray(tokens_and_valid()[1])], CASES[name].gate_sum, rtol=1e-5)


@pytest.mark.parametrize('train', [True, False])
def test_output_and_gradient_are_the_papers(name, train):
  """Against NumPy in float64; its gradient is a difference quotient in a random direction."""
  case, (tokens, _) = CASES[name], tokens_and_valid()
  if train not in case.modes:
    return
  result = route(name, train=train)
  params, x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (variables(name)['params'], tokens))

  def output(params, x):
    outputs, times = [], np.arange(1, case.num_experts + 1)
    for group in groups(name, train, params, x):
      if case.mixes:
        dispatch, combine = case.reference(group)
        slots = np.einsum('sec,sm->ecm', dispatch, group.x) * times[:, None, None]
        outputs.append(np.einsum('sec,ecm->sm', combine, slots))
      else:
        outputs.append((case.reference(group) @ times)[:, None] * group.x)
    return np.stack(outputs)

  np.testing.assert_allclose(result.output, output(params, x), rtol=2e-5, atol=2e-5)
  rng = np.random.default_rng(5)
  direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), (params, x))
  there, back = (
    output(*jax.tree.map(lambda leaf, d, by=by: leaf + by * d, (params, x), direction)) for by in (1e-6, -1e-6)
  )
  expected = (np.sum(there**2) - np.sum(back**2)) / 2e-6
  actual = sum(np.sum(d * g) for d, g in zip(*map(jax.tree.leaves, (direction, result.gradients)), strict=True))
  np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-3)


def groups(name, train, params, x):
  """What the reference is told of each group."""
  told, draws = context(tokens_and_valid()[1], train), jax.jit(_Draws().apply)({}, rngs={'router': jax.random.key(7)})
  ids, tasks, valid = (np.asarray(v) for v in (told.token_ids, told.task_ids, told.valid))
  experts, state = CASES[name].num_experts, variables(name)['state']
  return [
    references.Group(params, x[g], valid[g], ids[g], tasks[g], experts, train, g, (G, S), draws, state)
    for g in range(G)
  ]


class _Draws(nn.Module):
  """The keys of the random draws that a router makes, first to last."""

  @nn.compact
  def __call__(self):
    return [self.make_rng('router') for _ in range(2)]


def test_losses_of_two_levels():
  """Importance_H and Load_H (Shazeer 2017, appendix B): squared coefficients of variation over all experts."""
  given = variables('hierarchical')['params'], tokens_and_valid()[0]
  params, x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), given)
  loose = functools.partial(references.hierarchical, factor=None)  # importance is before capacity
  real = [group for group in groups('hierarchical', True, params, x) if group.valid.any()]
  weigh = functools.partial(np.average, weights=[group.valid.sum() for group in real])

  def squared_cv(amounts):
    return (amounts.std() / amounts.mean()) ** 2

  importance = weigh([squared_cv(loose(group).sum(0)) for group in real])
  load = weigh([squared_cv(references.hierarchical_load(group)) for group in real])
  losses = route('hierarchical').aux.losses
  np.testing.assert_allclose(losses['importance'], 0.1 * importance, rtol=1e-4)
  np.testing.assert_allclose(losses['load'], 0.1 * load, rtol=1e-4)


def test_padding_goes_nowhere_and_what_it_holds_changes_nothing(name):
  tokens, valid = tokens_and_valid()
  garbage = jnp.where(valid[..., None], tokens, 100 * jax.random.normal(jax.random.key(9), tokens.shape))
  ours, theirs = route(name), route(name, tokens=garbage)
  for result in (ours, theirs):
    assert np.all(np.asarray(result.dispatch)[~np.asarray(valid)] == 0)
    assert np.all(np.asarray(result.output)[~np.asarray(valid)] == 0)
  np.testing.assert_array_equal(ours.dispatch, theirs.dispatch)
  np.testing.assert_array_equal(ours.combine, theirs.combine)
  assert_trees(theirs.aux, ours.aux)
  assert_trees(theirs.state, ours.state)


def test_groups_do_not_see_each_other_and_have_no_order(name):
  tokens, valid = tokens_and_valid()
  ours, changed = route(name, train=False), route(name, tokens=tokens.at[3].set(-tokens[3]), train=False)
  np.testing.assert_array_equal(ours.combine[:3], changed.combine[:3])
  if name in ('task', 'demix'):
    return  # the task of a group stays with its place here
  order = np.array([2, 0, 3, 1])
  turned = route(name, tokens=tokens[order], valid=valid[order], train=False)
  np.testing.assert_array_equal(turned.dispatch, ours.dispatch[order])
  np.testing.assert_array_equal(turned.combine, ours.combine[order])


def test_a_dropped_token_comes_home_as_nothing(name):
  result = route(name)
  nowhere = np.all(np.asarray(result.dispatch) == 0, axis=(2, 3))
  assert np.all(np.asarray(result.output)[nowhere] == 0)


def test_in_evaluation_no_token_is_dropped_for_another(name):
  if not CASES[name].alone:
    return
  whole = route(name, train=False).output
  alone = jnp.zeros((G, S), bool).at[0, 5].set(True)
  np.testing.assert_allclose(whole[0, 5], route(name, valid=alone, train=False).output[0, 5], rtol=1e-6)


def test_gradients_are_finite_and_reach_what_learns(name):
  params, tokens = route(name).gradients
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((params, tokens)))
  assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(params)) == CASES[name].learns
  assert np.any(tokens != 0) and np.all(np.asarray(tokens)[~np.asarray(tokens_and_valid()[1])] == 0)


def test_it_remembers_in_training_only(name):
  before = variables(name)['state']
  assert_trees(route(name, train=False).state.get('state', {}), before)
  if before:
    after = route(name).state['state']
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True))


def test_vmap_scan_and_remat_change_nothing(name):
  tokens, valid = tokens_and_valid()
  params, key = variables(name)['params'], jax.random.key(7)
  both = jnp.stack([tokens, tokens[::-1]]), jnp.stack([valid, valid[::-1]])

  @jax.jit
  def run(params):
    one = jax.checkpoint(lambda tokens, valid: routed(name, True, params, tokens, valid, key))
    twice = tuple(jnp.stack([x, x]) for x in both)
    return jax.lax.scan(lambda _, batch: (None, jax.vmap(one)(*batch)), None, twice)[1]

  expected = [route(name), route(name, tokens=tokens[::-1], valid=valid[::-1])]
  expected = jax.tree.map(lambda *leaves: np.stack([np.stack(leaves)] * 2), *expected)
  assert_trees(run(params), expected, error=1e-5)


def test_eight_devices_change_nothing(name, mesh):
  tokens, valid = tokens_and_valid()
  the_mesh = mesh(data=2, expert=2, model=2)
  with sharding.activate(the_mesh, sharding.replicated_rules()):
    placed = [
      jax.device_put(x, sharding.named_sharding(the_mesh, 'batch', *(None,) * (x.ndim - 1))) for x in (tokens, valid)
    ]
    actual = jax.jit(functools.partial(routed, name, True))(variables(name)['params'], *placed, jax.random.key(7))
  assert_trees(actual, route(name), error=1e-5)


MENU = sorted((ROOT / 'gin' / 'routers').glob('*.gin'))
SIZES = {'capacity_factor', 'vocab_size', 'num_tasks', 'default_task', 'table', 'tolerance'}
SIZES |= {'stage_1_steps', 'balanced_steps'}


@pytest.mark.parametrize('path', MENU, ids=lambda path: path.stem)
def test_the_menu_is_what_is_tried_here(path, monkeypatch):
  """Every file of gin/routers/ makes the router of its name in the table above, sizes aside."""
  monkeypatch.chdir(ROOT)
  gin.clear_config()
  run.parse_gin('train', ['gin/experiments/quickstart.gin', str(path)], [], ['.'])
  experts = 1 if path.stem == 'mixture_of_depths' else 16
  ours = CASES[path.stem].router(num_experts=experts)
  made = gin.get_configurable(MoELayer)(parent=None).router(num_experts=experts)
  gin.clear_config()
  assert type(made) is type(ours)
  fields = {field.name for field in dataclasses.fields(made)} - SIZES - {'parent', 'name'}
  assert {field: getattr(made, field) for field in fields} == {field: getattr(ours, field) for field in fields}


def test_the_menu_is_described():
  readme = (ROOT / 'moe_jax' / 'moe' / 'routers' / 'README.md').read_text()
  assert {path.stem for path in MENU} == set(re.findall(r'^\| `(\w+)` ', readme, re.MULTILINE))


def test_every_router_class_is_in_the_table():
  classes = {
    found
    for path in (ROOT / 'moe_jax' / 'moe' / 'routers').glob('*.py')
    for found in re.findall(r'^class (\w+Router)\(', path.read_text(), re.MULTILINE)
  }
  tried = {type(case.router(num_experts=case.num_experts)).__name__ for case in CASES.values()}
  assert classes - tried == {'FixedRouter', 'AllExpertsRouter'}  # bases, with no gin file
