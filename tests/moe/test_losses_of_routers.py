"""Every auxiliary loss of every router against its paper's equation, in NumPy and float64; and the objective's share.

A loss is that of a group, averaged over groups by their real tokens. So an equation here is of one group's real tokens.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_softmax, logsumexp, softmax
from scipy.stats import norm

from moe_jax import objectives
from moe_jax.moe.routers.base import RoutingContext
from moe_jax.moe.routers.bias_balanced import BiasBalancedRouter
from moe_jax.moe.routers.expert_choice import MixtureOfDepthsRouter
from moe_jax.moe.routers.hashing import RandomRouter, RoundRobinRouter
from moe_jax.moe.routers.reinforce import BernoulliRouter, ReinforceRouter
from moe_jax.moe.routers.task import SentenceRouter
from moe_jax.types import Aux
from tests import tiny
from tests.moe import references
from tests.moe.test_routers import CASES, G, S, context, groups, route, tokens_and_valid, variables

make = functools.partial


def balance(p, chosen):
  """E sum_i f_i P_i of float64[n, E] probabilities and int[n, k] choices (Switch, eq. 4)."""
  f = np.bincount(np.ravel(chosen), minlength=p.shape[-1]) / np.size(chosen)
  return p.shape[-1] * np.sum(f * p.mean(0))


def normalised(scores):
  return scores / scores.sum(-1, keepdims=True)


def squared_cv(amounts):
  return (amounts.std() / amounts.mean()) ** 2


def entropy(p):
  """In nats, over the last axis."""
  return -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)


def top_k(group, logits=lambda g: g.x @ g.params['kernel'], probs=make(softmax, axis=-1), counted=1):
  """And the mean of logsumexp(h)^2 (ST-MoE, eq. 5), by the logits that route."""
  h = logits(group)[group.valid]
  chosen = [references.best(row, counted) for row in h]
  return {'balance': balance(probs(h), chosen), 'z': logsumexp(h, axis=-1) ** 2}


def jittered(group):
  return group.x * group.draw('uniform', group.x.shape[-1], minval=0.99, maxval=1.01) @ group.params['kernel']


def cosine(group):
  p, projected = group.params, group.x @ group.params['projection']
  cosines = projected @ p['centroids'] / np.linalg.norm(p['centroids'], axis=0)
  return cosines / np.linalg.norm(projected, axis=-1, keepdims=True) / p['temperature']


def task(group):
  return group.params['tasks'][group.tasks - 1] @ group.params['kernel']


def sentence(group):
  return np.broadcast_to(group.x[group.valid].mean(0), group.x.shape) @ group.params['kernel']


def noisy_top_k(group):
  """CV^2 of importance and load, P(x, i) = Phi((clean_i - kth_excluding(H, k, i)) / scale_i) (Shazeer, eq. 6-11)."""
  importance = {'importance': squared_cv(references.noisy_top_k(group, factor=None)[group.valid].sum(0))}
  if not group.train:
    return importance
  clean, scale = references.noisy(group, group.params['kernel'], group.params['noise_kernel'], group.x)
  noisy, load = clean + scale * group.draw('normal', group.experts), np.zeros(group.experts)
  for s, i in itertools.product(np.flatnonzero(group.valid), range(group.experts)):
    load[i] += norm.cdf((clean[s, i] - np.sort(np.delete(noisy[s], i))[-2]) / scale[s, i])
  return {**importance, 'load': squared_cv(load)}


def prototype(group):
  """The sum over prototypes, each with its own E / k experts and its own softmax (M6-T)."""
  halves = np.split((group.x @ group.params['kernel'])[group.valid], 2, axis=-1)
  return {'balance': sum(balance(softmax(h, axis=-1), h.argmax(-1)) for h in halves)}


def sequence_wise(group, **limits):
  """f counts all choices, which are by s + bias; P is the mean of s / sum s (DeepSeek-V3). A group is a row here."""
  chosen = [np.flatnonzero(row) for row in references.bias_balanced(group, factor=None, **limits)[group.valid]]
  return {'balance': balance(normalised(expit(group.x @ group.params['kernel']))[group.valid], chosen)}


def stable(group):
  """(n_i - n) / n sigmoid(s_i), and the light router's cross-entropy to the argmax (Dai et al. 2022)."""
  p = group.params
  scores, lights = group.x @ p['kernel'], p['embedding'][group.ids] @ p['centroids']
  chosen, real = scores.argmax(-1)[group.valid], np.arange(group.valid.sum())
  n = np.bincount(chosen, minlength=group.experts)
  excess = (n - n.mean())[chosen] / n.mean() * expit(scores[group.valid][real, chosen])
  return {'balance': excess, 'distil': -log_softmax(lights[group.valid], axis=-1)[real, chosen]}


def mixture_of_depths(group):
  """-(y log q + (1 - y) log(1 - q)), with q = sigmoid(r), and y whether picked; and its gradient."""
  q = expit((group.x @ group.params['kernel'])[group.valid, 0])
  y = references.mixture_of_depths(group)[group.valid, 0] != 0
  return {'predictor': -np.log(np.where(y, q, 1 - q))}, (q - y) @ group.x[group.valid]


def reinforce(group):
  """-w (r - b) log pi + c (r - b)^2 - h H + balance: what of it is linear in -r = CE is the reward's term."""
  x, p = group.x[group.valid], group.params
  log_pi, chosen = log_softmax(x @ p['kernel'], axis=-1), references.drawn(group, factor=None)[group.valid].argmax(-1)
  log_prob = log_pi[np.arange(len(x)), chosen]
  values = {'entropy': -entropy(np.exp(log_pi)), 'balance': balance(np.exp(log_pi), chosen)}
  if 'baseline_in' not in p:
    return {**values, 'reward': 1e-2 * log_prob}
  b = (np.maximum(x @ p['baseline_in'], 0) @ p['baseline_out'])[:, 0]
  return {**values, 'policy': b * log_prob, 'baseline': b**2, 'reward': 1e-2 * log_prob + 1e-2 * 2 * b}


def bernoulli(group, tau=0.25):
  """sum_i (mean_x p_i - tau)^2, mean_x (mean_i p_i - tau)^2, -sum_i var_x p_i, and log pi of what was drawn."""
  p = expit(group.x @ group.params['kernel'] + np.log(tau / (1 - tau)))[group.valid]
  on = references.bernoulli(group, factor=None)[group.valid] != 0
  sparsity, token_sparsity = np.sum((p.mean(0) - tau) ** 2), (p.mean(-1) - tau) ** 2
  values = {'sparsity': sparsity, 'token_sparsity': token_sparsity, 'variance': -p.var(0).sum()}
  return {**values, 'reward': 1e-2 * np.log(np.where(on, p, 1 - p)).sum(-1)}


def dselect_k(group):
  """Each selector's entropy; of 6 experts, also the sum over selectors of 1 / (1 - weight on 11x, codes of none)."""
  z = np.clip(np.einsum('sm,mkb->skb', group.x, group.params['code'])[group.valid], -0.5, 0.5)
  step = -2 * z**3 + 1.5 * z + 0.5
  digits = np.array([*itertools.product((0, 1), repeat=3)])[: group.experts]
  selectors = np.prod(np.where(digits == 1, step[:, :, None], 1 - step[:, :, None]), axis=-1)
  reach = np.sum(1 / np.maximum(1 - step[..., 0] * step[..., 1], 1e-6), axis=-1)
  return {'entropy': entropy(selectors).mean(-1), **({'reach': reach} if group.experts == 6 else {})}


USUAL, CV = {'balance': 1e-2, 'z': 0.0}, {'importance': 0.1, 'load': 0.1}
SPARSE = {'sparsity': 0.1, 'token_sparsity': 0.1, 'variance': 1e-2}
POLICY = {'entropy': 1e-3, 'balance': 1e-2, 'policy': 1e-2, 'baseline': 1e-2}
EQUATIONS = {  # of one group's real tokens, and the weights of its losses
  'top_2': (top_k, USUAL),
  'st_moe': (top_k, {'balance': 1e-2, 'z': 1e-3}),
  'switch': (make(top_k, logits=jittered), USUAL),
  'switch_reroute': (top_k, USUAL),
  'mixtral': (make(top_k, counted=2), {'balance': 4e-2, 'z': 0.0}),
  'sigmoid': (make(top_k, probs=lambda h: normalised(expit(h)), counted=2), USUAL),
  'cosine': (make(top_k, logits=cosine), USUAL),
  'task': (make(top_k, logits=task), USUAL),
  'sentence': (make(top_k, logits=sentence), USUAL),
  'noisy_top_2': (noisy_top_k, CV),
  'prototype': (prototype, {'balance': 1e-2}),
  'deepseek_v3': (make(sequence_wise, groups=4, kept=2), {'balance': 1e-4}),
  'bias_balanced': (sequence_wise, {'balance': 1e-4}),
  'stable_moe': (stable, {'balance': 0.3, 'distil': 0.3}),
  'mixture_of_depths': (lambda group: mixture_of_depths(group)[0], {'predictor': 1e-2}),
  'reinforce': (reinforce, POLICY),
  'reinforce_baseline': (reinforce, POLICY),
  'bernoulli': (bernoulli, SPARSE),
  'dselect_k': (dselect_k, {'entropy': 1e-6}),
  'dselect_k_of_6': (dselect_k, {'entropy': 1e-6, 'reach': 1e-6}),
}


def real_groups(name, train=True):
  """What references are told of each group that has real tokens, and how many those are."""
  given = variables(name)['params'], tokens_and_valid()[0]
  told = groups(name, train, *jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), given))
  return [group for group in told if group.valid.any()], [group.valid.sum() for group in told if group.valid.any()]


@pytest.mark.parametrize(('name', 'train'), [*((name, True) for name in EQUATIONS), ('noisy_top_2', False)])
def test_losses_are_the_papers(name, train):
  """All of them and no others, averaged over groups by their real tokens; and the term of every token."""
  (of_group, weights), (real, sizes), aux = EQUATIONS[name], real_groups(name, train), route(name, train=train).aux
  values, rewards = [of_group(group) for group in real], np.zeros((G, S))
  for group, value in zip(real, values, strict=True):
    rewards[group.index, group.valid] = value.pop('reward', 0.0) / sum(sizes)
  assert aux.losses.keys() == values[0].keys()
  for loss in aux.losses:
    expected = np.average([np.mean(value[loss]) for value in values], weights=sizes)
    np.testing.assert_allclose(aux.losses[loss], weights[loss] * expected, rtol=2e-5, err_msg=loss)
    if loss in ('balance', 'z'):
      np.testing.assert_allclose(aux.metrics[loss], expected, rtol=2e-5, err_msg=loss)
  for terms in (aux.token_terms or {'reward': np.zeros((G, S))}).values():
    np.testing.assert_allclose(terms, rewards, rtol=2e-5, atol=1e-9)


def test_every_router_with_a_loss_is_here():
  (tokens, valid), rngs = tokens_and_valid(), {'params': jax.random.key(0), 'router': jax.random.key(1)}
  routers = {name: case.router(num_experts=case.num_experts) for name, case in CASES.items()}
  tried = {type(routers[name]) for name in EQUATIONS} | {type(routers['hierarchical'])}  # see test_routers.py
  for router in routers.values():
    (_, aux), _ = jax.eval_shape(make(router.init_with_output, rngs), tokens, context(valid))
    assert type(router) in tried or not (aux.losses or aux.token_terms), router


def test_the_predictor_of_mixture_of_depths_descends_towards_what_was_picked():
  router = MixtureOfDepthsRouter(num_experts=1, capacity_factor=0.5, predictor_loss_weight=1.0)
  (tokens, valid), (real, sizes) = tokens_and_valid(), real_groups('mixture_of_depths')

  def loss(params):
    return router.apply({'params': params}, tokens, context(valid))[1].losses['predictor']

  gradient = jax.jit(jax.grad(loss))(variables('mixture_of_depths')['params'])['kernel'][:, 0]
  expected = sum(mixture_of_depths(group)[1] for group in real) / sum(sizes)
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('group_size', [4, 8, 16])
def test_sequences_are_rows_whatever_the_groups(group_size):
  """Groups of half a row, a row and two rows: the loss is that of rows of 8."""
  router = BiasBalancedRouter(num_experts=4, balance_loss_weight=1.0)
  rng = np.random.default_rng(0)
  x, kernel, bias = rng.normal(0.5, 1, (4, 8, 3)), rng.normal(0, 1, (3, 4)), rng.normal(0, 0.2, 4)
  valid = np.arange(8) < np.array([8, 5, 0, 7])[:, None]
  x[1], x[3] = x[1] + 2, x[3] - 2  # rows want different experts

  given = {'params': {'kernel': jnp.float32(kernel)}, 'state': {'bias': jnp.float32(bias)}}
  told = RoutingContext(valid.reshape(-1, group_size), jnp.float32(valid.sum()), row_length=8, train=True)
  _, aux = router.apply(given, jnp.float32(x).reshape(-1, group_size, 3), told, mutable=['state'])[0]

  def average(size):
    total = 0.0
    for row, real in zip(x.reshape(-1, size, 3), valid.reshape(-1, size), strict=True):
      scores = row[real] @ kernel
      chosen = [references.best(s, 2) for s in expit(scores) + bias]
      total += len(chosen) * balance(normalised(expit(scores)), chosen) if chosen else 0.0
    return total / valid.sum()

  np.testing.assert_allclose(aux.losses['balance'], average(8), rtol=1e-5)
  assert min(abs(average(8) - average(4)), abs(average(8) - average(16))) > 1e-3, 'or this would show nothing'


@pytest.mark.parametrize('learnt', [True, False])
def test_the_gradient_of_reinforce_is_that_of_its_objective(learnt):
  """With a constant r - b in the policy's term, and a baseline that teaches the tokens nothing."""
  weights = {'policy_weight': 0.7, 'baseline_weight': 0.3, 'entropy_weight': 0.2, 'balance_loss_weight': 0.5}
  router = ReinforceRouter(num_experts=4, learnt_baseline=learnt, capacity_factor=None, **weights)
  (tokens, valid), told = tokens_and_valid(), context(tokens_and_valid()[1])
  rngs, ce = {'params': jax.random.key(4), 'router': jax.random.key(1)}, jax.random.uniform(jax.random.key(2), (G, S))
  params = jax.tree.map(lambda leaf: 5 * leaf, nn.unbox(router.init(rngs, tokens, told))['params'])

  def ours(params, tokens):
    plan, aux = router.apply({'params': params}, tokens, told, rngs=rngs)
    return sum(aux.losses.values()) + jnp.sum(aux.token_terms['reward'] * ce), plan.expert_index

  (_, taken), mine = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(params, tokens)
  counts = [np.bincount(row[real, 0], minlength=4) for row, real in zip(taken, valid, strict=True)]
  f = jnp.array([n / max(n.sum(), 1) for n in counts])[:, None]

  def written(params, tokens):
    stop, r, b = jax.lax.stop_gradient, -ce, jnp.zeros_like(ce)
    log_pi = jax.nn.log_softmax(tokens @ params['kernel'])
    if learnt:
      b = (jax.nn.relu(stop(tokens) @ params['baseline_in']) @ params['baseline_out'])[..., 0]
    policy = -stop(r - b) * jnp.take_along_axis(log_pi, taken, axis=-1)[..., 0]
    h, balanced = -jnp.sum(jnp.exp(log_pi) * log_pi, axis=-1), 4 * jnp.sum(f * jnp.exp(log_pi), axis=-1)
    return jnp.mean((0.7 * policy + 0.3 * (r - b) ** 2 - 0.2 * h + 0.5 * balanced)[valid])

  its = jax.grad(written, (0, 1))(params, tokens)
  for actual, expected in zip(*map(jax.tree.leaves, (mine, its)), strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    assert np.abs(expected).max() > 1e-3


def test_policy_gradient_of_bernoulli_is_that_of_the_expected_loss():
  """Averaged over many draws, the gradient is sum over subsets u of CE_u dpi(u)."""
  subsets, n = jnp.array([*itertools.product((0, 1), repeat=3)]), 20_000
  losses = jnp.array([2.0, 2.4, 1.0, 1.9, 0.5, 1.2, 0.1, 0.9])  # of a token, if it goes to that subset
  logits, offset = jnp.array([0.3, -0.2, 0.9]), np.log(0.4 / 0.6)
  quiet = {'sparsity_weight': 0.0, 'token_sparsity_weight': 0.0, 'variance_weight': 0.0}
  router = BernoulliRouter(num_experts=3, share_on=0.4, policy_weight=1.0, capacity_factor=None, **quiet)
  tokens, told = jnp.ones((1, n, 1)), RoutingContext(jnp.ones((1, n), bool), jnp.float32(n), train=True)

  def loss(kernel):
    plan, aux = router.apply({'params': {'kernel': kernel}}, tokens, told, rngs={'router': jax.random.key(2)})
    ce = losses[jnp.sum((plan.expert_index >= 0) * jnp.array([4, 2, 1])[None, None], axis=-1)]
    return sum(aux.losses.values()) + jnp.sum(aux.token_terms['reward'] * ce)

  def expected(logits):
    p = jax.nn.sigmoid(logits + offset)[None]
    return jnp.prod(jnp.where(subsets == 1, p, 1 - p), axis=-1) @ losses

  written = jax.grad(expected)(logits)
  np.testing.assert_allclose(jax.jit(jax.grad(loss))(logits[None])[0], written, atol=0.02)
  assert np.abs(written).max() > 0.1


@pytest.mark.parametrize('group_size', [4, 8, 16])
def test_sentences_are_segments_whatever_the_groups(group_size):
  """A token of the first segment goes by the mean of the first, and of the second by that of the second."""
  segments = np.array([[1] * 5 + [2] * 3, [1] * 2 + [2] * 4 + [0] * 2])
  x, expected = np.random.default_rng(0).normal(size=(2, 8, 3)), np.zeros((2, 8, 3))
  for row, segment in [(0, 1), (0, 2), (1, 1), (1, 2)]:
    expected[row, segments[row] == segment] = x[row, segments[row] == segment].mean(0)
  valid, segments = segments > 0, segments.reshape(-1, group_size)
  told = RoutingContext(segments > 0, jnp.float32(14), segment_ids=segments, row_length=8)
  tokens = jnp.float32(x).reshape(-1, group_size, 3)
  seen = SentenceRouter(num_experts=4).apply({}, tokens, told, method='router_input')
  np.testing.assert_allclose(np.reshape(seen, x.shape)[valid], expected[valid], rtol=1e-5, atol=1e-6)


def test_token_terms_are_paid_by_the_loss():
  """Each term times its token's cross-entropy, where it has a loss; on the encoder's side its row's mean of those."""
  ce, weights = (
    np.array([[1.0, 2.0, 4.0], [3.0, 5.0, 7.0], [9.0, 9.0, 9.0]]),
    np.array([[1, 0.5, 0], [1, 1, 1], [0] * 3]),
  )
  own, layers = np.arange(9.0).reshape(3, 3) - 2, np.arange(18.0).reshape(2, 3, 3)
  encoder = np.array([[1.0, -3.0], [5.0, 2.0], [4.0, 4.0]])
  expected = {
    'decoder/own': -2 * 1 - 1 * 2 + 1 * 3 + 2 * 5 + 3 * 7,
    'layers': 9 * 1 + 11 * 2 + 15 * 3 + 17 * 5 + 19 * 7,
    'encoder/far': -2 * 1.5 + 7 * 5.0,
  }
  for names in [*expected, tuple(expected)]:
    names = (names,) if isinstance(names, str) else names
    terms = dict(zip(expected, (own, layers, encoder), strict=True))
    aux = Aux(losses={'z': jnp.float32(100)}, token_terms={name: jnp.float32(terms[name]) for name in names})
    paid = objectives._reinforced(aux, jnp.float32(ce), jnp.float32(weights))
    np.testing.assert_allclose(paid, sum(expected[name] for name in names), rtol=1e-6)


class Shares(RoundRobinRouter):
  """Every token's term is its share of the mean."""

  def __call__(self, tokens, told):
    return super().__call__(tokens, told)[0], Aux(token_terms={'share': told.valid / told.token_count})


def small(build, router, encoder, **task):
  """An objective on a model of one layer, its variables, a batch with counts, random keys, and a compiled pass."""
  model = build(router=router, num_layers=1, expert_every=1, scan=False, remat='none')
  objective = objectives.LanguageModeling(model, **task)
  batch = tiny.batch(rows=8, encoder=encoder)
  batch['decoder_loss_weights'][:, :3] = 0  # a prompt
  batch = objective.counted(jax.tree.map(jnp.asarray, batch))
  rngs = {name: jax.random.key(i) for i, name in enumerate(('params', 'dropout', 'router'))}
  given = nn.unbox(jax.jit(lambda: model.init(rngs, batch))())
  given = jax.tree.map(lambda leaf: 3 * leaf, given)  # predictions that differ
  apply = jax.jit(lambda rngs: model.apply(given, batch, train=True, rngs=rngs, mutable=['state'])[0])
  del rngs['params']
  loss = jax.jit(lambda rngs: objective.loss(given, batch, rngs, train=True))
  return batch, rngs, apply, loss


def cross_entropy(logits, batch):
  """Of every token, float64[B, L]."""
  targets = np.asarray(batch['decoder_target_tokens'])
  return -np.take_along_axis(log_softmax(np.asarray(logits, np.float64), axis=-1), targets[..., None], -1)[..., 0]


def test_the_objective_pays_token_terms():
  """Through a whole model: the mean of the tokens' losses, and of the rows' mean losses over the encoder's tokens."""
  batch, rngs, apply, loss = small(tiny.encoder_decoder, Shares, encoder=True)
  value, (metrics, _) = loss(rngs)
  ce, has_loss = cross_entropy(apply(rngs)[0], batch), np.asarray(batch['decoder_loss_weights']) > 0
  inside, outside = (np.asarray(batch[f'{side}_segment_ids']) > 0 for side in ('decoder', 'encoder'))
  rows = (ce * has_loss).sum(-1) / np.maximum(has_loss.sum(-1), 1)
  expected = (ce * has_loss).sum() / inside.sum() + (rows * outside.sum(-1)).sum() / outside.sum()
  np.testing.assert_allclose(metrics['aux_loss'], expected, rtol=1e-5)
  np.testing.assert_allclose(value, ce[has_loss].mean() + expected, rtol=1e-5)


@pytest.mark.parametrize('router', [make(RandomRouter, share='batch'), ReinforceRouter], ids=['thor', 'reinforce'])
def test_consistency(router):
  """CE_1 + CE_2 + c (KL(p, q) + KL(q, p)) / 2 (THOR), both smoothed, and the auxiliary losses of the first pass."""
  batch, rngs, apply, loss = small(
    tiny.decoder_only, router, encoder=False, consistency=5.0, label_smoothing=0.1, z_loss=1e-2
  )
  value, (metrics, _) = loss(rngs)
  (first, aux), (second, _) = apply(rngs), apply({name: jax.random.fold_in(key, 1) for name, key in rngs.items()})
  has_loss = np.asarray(batch['decoder_loss_weights']) > 0

  def smoothed(logits):
    logits = np.asarray(logits, np.float64)
    spread = -log_softmax(logits, axis=-1).mean(-1)
    return 0.9 * cross_entropy(logits, batch) + 0.1 * spread + 1e-2 * logsumexp(logits, axis=-1) ** 2

  log_p, log_q = (log_softmax(np.asarray(logits, np.float64), axis=-1) for logits in (first, second))
  kl = [np.sum(np.exp(a) * (a - b), axis=-1) for a, b in [(log_p, log_q), (log_q, log_p)]]
  apart = np.mean((kl[0] + kl[1])[has_loss]) / 2
  losses, terms = (jax.tree.leaves(jax.device_get(part)) for part in (aux.losses, aux.token_terms))
  auxiliary = sum(map(np.sum, losses)) + sum(np.sum(term * cross_entropy(first, batch) * has_loss) for term in terms)
  expected = smoothed(first)[has_loss].mean() + smoothed(second)[has_loss].mean() + 5.0 * apart + auxiliary
  assert apart > 1e-3
  np.testing.assert_allclose(metrics['inconsistency'], apart, rtol=1e-4)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
