"""What only some routers do: rewards, consistency, causality, tasks; and how little a new one takes."""

import dataclasses
import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.analysis.domains import domain_posterior, mixture_log_probs
from moe_jax.layers.context import Context
from moe_jax.moe import router_losses
from moe_jax.moe.experts import Experts
from moe_jax.moe.moe_layer import MoELayer
from moe_jax.moe.routers.base import Router, RoutingContext
from moe_jax.moe.routers.bias_balanced import BiasBalancedRouter
from moe_jax.moe.routers.expert_choice import ExpertChoiceRouter, MixtureOfDepthsRouter
from moe_jax.moe.routers.hashing import BalancedHashRouter, RandomRouter
from moe_jax.moe.routers.hierarchical import HierarchicalRouter
from moe_jax.moe.routers.noisy_top_k import NoisyTopKRouter
from moe_jax.moe.routers.reinforce import BernoulliRouter, ReinforceRouter
from moe_jax.moe.routers.soft import SoftRouter
from moe_jax.moe.routers.stable import StableRouter
from moe_jax.moe.routers.task import DomainRouter, SentenceRouter, TaskRouter
from moe_jax.moe.routers.top_k import ReroutingRouter, TopKRouter
from moe_jax.objectives import LanguageModeling
from moe_jax.training.state import TrainState
from moe_jax.training.step import train_step
from moe_jax.types import Aux, ConfigError
from tests import tiny

make = functools.partial


def gradients(router, key=0, **objective):
  """Loss, metrics and gradients of a tiny model with this router, and its parameters."""
  model = tiny.decoder_only(router=router, num_layers=1, expert_every=1, scan=False, remat='none')
  batch = jax.tree.map(jnp.asarray, tiny.batch(rows=8))
  task = LanguageModeling(model, **objective)
  variables = nn.unbox(jax.jit(lambda: model.init(jax.random.key(0), batch))())
  params = variables.pop('params')

  def loss(params):
    rngs = dict(zip(('dropout', 'router'), jax.random.split(jax.random.key(key)), strict=True))
    return task.loss({'params': params, **variables}, task.counted(batch), rngs, train=True)

  (value, (metrics, _)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  return value, metrics, grads, params


@pytest.mark.parametrize('learnt', [True, False])
def test_policy_gradient_is_that_of_the_expected_loss(learnt):
  """Averaged over many draws, the gradient of E[CE] by REINFORCE is the sum over experts of CE_e dpi_e."""
  losses = jnp.array([0.5, 2.0, 1.0])  # of a token, if it goes to expert e
  logits = jnp.array([0.3, -0.2, 0.1])
  router = ReinforceRouter(
    num_experts=3, learnt_baseline=learnt, policy_weight=1.0, baseline_weight=0.0, entropy_weight=0.0,
    balance_loss_weight=0.0, capacity_factor=None,
  )  # fmt: skip
  tokens, n = jnp.ones((1, 20_000, 1)), 20_000
  told = RoutingContext(jnp.ones((1, n), bool), jnp.float32(n), train=True)
  params = nn.unbox(router.init({'params': jax.random.key(0), 'router': jax.random.key(1)}, tokens, told))['params']

  def loss(kernel):
    key = {'router': jax.random.key(2)}
    plan, aux = router.apply({'params': {**params, 'kernel': kernel}}, tokens, told, rngs=key)
    ce = jax.lax.stop_gradient(losses[plan.expert_index[..., 0]])
    return sum(aux.losses.values()) + jnp.sum(aux.token_terms['reward'] * ce)

  expected = jax.grad(lambda logits: jax.nn.softmax(logits) @ losses)(logits)
  actual = jax.jit(jax.grad(loss))(logits[None])[0]
  np.testing.assert_allclose(actual, expected, atol=0.02)
  assert np.abs(expected).max() > 0.1


def test_the_baseline_learns_the_reward():
  """Its gradient is that of c (r - b)^2, r being minus the token's own loss, which no gradient reaches through it."""
  router = ReinforceRouter(num_experts=2, policy_weight=0.0, baseline_weight=0.5, entropy_weight=0.0,
                           balance_loss_weight=0.0)  # fmt: skip
  tokens = jax.random.normal(jax.random.key(0), (1, 8, 16))
  told = RoutingContext(jnp.ones((1, 8), bool), jnp.float32(8), train=True)
  rngs = {'params': jax.random.key(0), 'router': jax.random.key(1)}
  params, ce = nn.unbox(router.init(rngs, tokens, told))['params'], jnp.arange(8.0)[None]

  def ours(params):
    _, aux = router.apply({'params': params}, tokens, told, rngs=rngs)
    return sum(aux.losses.values()) + jnp.sum(aux.token_terms['reward'] * ce)

  def written(params):
    b = jax.nn.relu(tokens @ params['baseline_in']) @ params['baseline_out']
    return 0.5 * jnp.mean((-ce - b[..., 0]) ** 2)

  for mine, its in zip(*map(jax.tree.leaves, (jax.grad(ours)(params), jax.grad(written)(params))), strict=True):
    np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('router', [ReinforceRouter, BernoulliRouter])
def test_the_tokens_own_loss_is_the_reward(router):
  """Through a whole model: only by the reward does the router's kernel get a gradient from the task."""
  quiet = {'policy_weight': 1.0, 'balance_loss_weight': 0.0, 'entropy_weight': 0.0, 'learnt_baseline': False}
  if router is BernoulliRouter:
    quiet = {'policy_weight': 1.0, 'sparsity_weight': 0.0, 'token_sparsity_weight': 0.0, 'variance_weight': 0.0}
  for weight in (1.0, 0.0):
    _, _, grads, _ = gradients(make(router, **{**quiet, 'policy_weight': weight}))
    kernel = grads['stack_0']['blocks_0']['moe']['router']['kernel']
    assert np.any(kernel != 0) == (weight > 0)


def test_two_passes_of_thor_are_pulled_together():
  loss, metrics, _, _ = gradients(make(RandomRouter, share='batch'))
  both, apart, _, _ = gradients(make(RandomRouter, share='batch'), consistency=5.0)
  assert 'inconsistency' not in metrics and apart['inconsistency'] > 0
  assert apart['cross_entropy'] == metrics['cross_entropy']
  assert both > loss + 5.0 * apart['inconsistency']
  once, _, _, _ = gradients(make(TopKRouter, balance_loss_weight=0.0))
  twice, together, _, _ = gradients(make(TopKRouter, balance_loss_weight=0.0), consistency=5.0)
  assert together['inconsistency'] == 0, 'nothing is drawn: the passes are one'
  np.testing.assert_allclose(twice, 2 * once, rtol=1e-5)


def test_rerouting_counts_what_was_asked_for_and_what_was_lost():
  """Four tokens want expert 0 most and 1 next, and each has room for one: two are dropped; all had asked for 0."""
  router = ReroutingRouter(
    num_experts=4, num_selected=1, gates='raw', fallbacks=1, capacity_factor=1.0, capacity_rule='megablocks'
  )
  tokens = jnp.tile(jnp.array([3.0, 2.0, 1.0, 0.0]), (1, 4, 1))
  told = RoutingContext(jnp.ones((1, 4), bool), jnp.float32(4), train=True)
  plan, aux = router.apply({'params': {'kernel': jnp.eye(4)}}, tokens, told)
  np.testing.assert_array_equal(plan.expert_index[0], [[0, -1], [-1, 1], [-1, -1], [-1, -1]])
  assert aux.metrics['dropped'] == aux.metrics['dropped_choices'] == 0.5
  np.testing.assert_array_equal(aux.metrics['expert_load'], [1, 0, 0, 0])


@pytest.mark.parametrize('router', [ExpertChoiceRouter, SoftRouter, SentenceRouter, make(TopKRouter, priority='gate')])
def test_a_router_that_looks_ahead_warns_in_a_decoder(router):
  layer = MoELayer(num_experts=4, group_size=8, router=router, experts=make(Experts, hidden_dim=4))
  x, ones = jnp.ones((1, 8, 4)), jnp.ones((1, 8), jnp.int32)
  for causal in (True, False):
    told = Context(segment_ids=ones, positions=ones, token_count=jnp.float32(8), causal=causal)
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always')
      layer.init(jax.random.key(0), x, told)
    assert any('looks at later tokens' in str(warning.message) for warning in caught) == causal
  with pytest.raises(ConfigError, match='cannot generate'):
    layer.init(jax.random.key(0), x, dataclasses.replace(told, causal=True, cache_length=8))


def test_mixture_of_depths_goes_by_its_own_score_when_it_generates():
  """A token's way is the same with other tokens about; and the predictor's loss teaches the kernel, not the tokens."""
  router = MixtureOfDepthsRouter(num_experts=1, capacity_factor=0.25, predictor_loss_weight=1.0)
  tokens = jax.random.normal(jax.random.key(0), (2, 16, 4))
  told = RoutingContext(jnp.ones((2, 16), bool), jnp.float32(32))
  variables = {'params': {'kernel': jax.random.normal(jax.random.key(1), (4, 1))}}
  plan, aux = router.apply(variables, tokens, told)
  alone, _ = router.apply(variables, tokens[:, :1], RoutingContext(jnp.ones((2, 1), bool), jnp.float32(2)))
  np.testing.assert_array_equal(plan.kept[:, :1], alone.kept)
  assert 0 < aux.metrics['skipped'] < 1

  def predictor(kernel, tokens):
    training = RoutingContext(jnp.ones((2, 16), bool), jnp.float32(32), train=True)
    plan, aux = router.apply({'params': {'kernel': kernel}}, tokens, training)
    assert plan.capacity == 4
    return aux.losses['predictor']

  to_kernel, to_tokens = jax.grad(predictor, (0, 1))(variables['params']['kernel'], tokens)
  assert np.any(to_kernel != 0) and np.all(to_tokens == 0)


def test_tasks_of_a_batch_decide_and_prompts_have_a_default():
  ids = jnp.array([[1, 1, 2, 2], [3, 3, 0, 0]])
  told = RoutingContext(ids > 0, jnp.float32(6), task_ids=ids, train=True)
  tokens = jnp.zeros((2, 4, 3))
  plan, _ = DomainRouter(num_experts=4).apply({}, tokens, told)
  np.testing.assert_array_equal(plan.expert_index[..., 0], [[0, 0, 1, 1], [2, 2, 0, 0]])
  unnamed = RoutingContext(ids > 0, jnp.float32(6))
  plan, _ = DomainRouter(num_experts=4, default_task=3).apply({}, tokens, unnamed)
  assert np.all(plan.expert_index == 3)
  for router in (DomainRouter(num_experts=4), TaskRouter(num_experts=4)):
    with pytest.raises(ConfigError, match="'task_ids'"):
      router.init(jax.random.key(0), tokens, unnamed)
  with pytest.raises(ConfigError, match="'task_ids'"):  # a default is not learnt from
    training = RoutingContext(ids > 0, jnp.float32(6), train=True)
    DomainRouter(num_experts=4, default_task=3).apply({}, tokens, training)


def test_domains_are_told_by_what_came_before():
  """Two domains, one of which gives every token twice the probability of the other: Bayes by hand."""
  log_probs = jnp.log(jnp.array([[[0.4, 0.4, 0.4]], [[0.2, 0.2, 0.2]]]))
  posterior = domain_posterior(log_probs)
  np.testing.assert_allclose(posterior[:, 0].T, [[1 / 2, 1 / 2], [2 / 3, 1 / 3], [4 / 5, 1 / 5]], rtol=1e-5)
  mixed = mixture_log_probs(log_probs)
  np.testing.assert_allclose(jnp.exp(mixed[0]), [0.3, 1 / 3, 0.36], rtol=1e-5)
  certain = domain_posterior(log_probs, prior=jnp.array([0.0, 1.0]))
  np.testing.assert_allclose(certain[1], 1.0)


@pytest.mark.parametrize(
  ('router', 'hint'),
  [
    (make(TopKRouter, gates='sum'), "gates='sum': choose among 'raw', 'renormalised', 'softmax', 'sigmoid'"),
    (make(TopKRouter, num_selected=1, gates='sigmoid'), "set gates = 'raw'"),
    (make(NoisyTopKRouter, num_selected=1), 'num_selected >= 2'),
    (make(BiasBalancedRouter, num_selected=1), 'num_selected >= 2'),
    (MixtureOfDepthsRouter, 'NUM_EXPERTS=1'),
    (make(HierarchicalRouter, num_groups=2, groups_selected=1), 'at least 2'),
    (make(DomainRouter, num_tasks=5), '5 domains need as many experts'),
    (make(ReroutingRouter, priority='gate'), 'in token order'),
    (make(TopKRouter, balance_choices='frist'), "balance_choices='frist': choose among 'first', 'all'"),
    (BalancedHashRouter, 'set vocab_size'),
    (make(StableRouter, vocab_size=8, stage_1_steps=0), 'stage_1_steps >= 1'),
  ],
)
def test_what_teaches_a_router_nothing_is_refused(router, hint):
  with pytest.raises(ConfigError, match=hint):
    router(num_experts=4)


class NearestSlope(Router):
  """A router of one's own: the expert whose slope is nearest to the token's mean."""

  choices_per_token = 1

  @nn.compact
  def __call__(self, tokens, context):
    slopes = self.param('slopes', nn.initializers.normal(), (self.num_experts,))
    distance = (jnp.mean(tokens, -1, keepdims=True) - slopes[None, None]) ** 2
    gate, expert_index = jax.lax.top_k(jax.nn.softmax(-distance), 1)
    plan = self.plan(expert_index, gate, context)
    spread = router_losses.token_mean(jnp.min(distance, -1), context.valid, context.token_count)
    watched = router_losses.plan_metrics(plan, context.valid, context.token_count)
    return plan, Aux(losses={'spread': 0.01 * spread}, metrics=watched)


def test_a_new_router_takes_a_few_lines_and_trains():
  model = tiny.decoder_only(router=NearestSlope, num_layers=2, expert_every=1)
  objective, transform = LanguageModeling(model), optax.adam(1e-2)
  batch = jax.tree.map(jnp.asarray, tiny.batch(rows=8))
  params = nn.unbox(jax.jit(lambda: model.init(jax.random.key(0), batch))()['params'])
  state = TrainState(jnp.int32(0), params, transform.init(params), {})
  step = jax.jit(make(train_step, objective=objective, transform=transform))
  losses = []
  for _ in range(20):
    state, metrics = step(state, batch)
    losses.append(float(metrics['loss']))
  assert losses[-1] < 0.8 * losses[0]
  assert metrics['loss/decoder/stack_0/moe/spread'].shape == (2,)
