"""Router losses and metrics against their equations; what padding, groups and microbatches may not change."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from moe_jax.moe import router_losses
from moe_jax.moe.routing_plan import RoutingPlan

G, S, E, K = 4, 6, 4, 2


class Routing(NamedTuple):
  """What a router knows of some tokens, groups first."""

  logits: np.ndarray
  probs: np.ndarray
  expert_index: np.ndarray
  kept: np.ndarray
  valid: np.ndarray

  def padded(self, groups=0, tokens=0):
    """The same real tokens with garbage behind each group, and whole groups of it."""
    rng = np.random.default_rng(1)

    def pad(x):
      shape = (x.shape[0] + groups, x.shape[1] + tokens, *x.shape[2:])
      garbage = rng.normal(0, 9, shape) if x.dtype == np.float32 else rng.integers(0, 2, shape)
      garbage[: x.shape[0], : x.shape[1]] = x
      return garbage.astype(x.dtype)

    valid = np.pad(self.valid, ((0, groups), (0, tokens)))
    return Routing(*map(pad, self))._replace(valid=valid)


@pytest.fixture(scope='module')
def routing():
  """Groups with 6, 3, 1 and no real tokens."""
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 2, (G, S, E)).astype(np.float32)
  probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  expert_index = np.argsort(-logits)[..., :K].astype(np.int32)
  valid = np.arange(S) < np.array([6, 3, 1, 0])[:, None]
  return Routing(logits, probs, expert_index, rng.random((G, S, K)) < 0.6, valid)


@jax.jit
def measure(r, token_count):
  return {
    'balance': router_losses.load_balance_loss(r.probs, r.expert_index[..., :1], r.valid, token_count),
    'balance of all choices': router_losses.load_balance_loss(r.probs, r.expert_index, r.valid, token_count),
    'z': router_losses.router_z_loss(r.logits, r.valid, token_count),
    'entropy': router_losses.router_entropy(r.probs, r.valid, token_count),
    'load': router_losses.expert_load(r.expert_index, E, r.valid, token_count),
    'dropped tokens': router_losses.dropped_tokens(r.kept, r.valid, token_count),
    'dropped choices': router_losses.dropped_choices(r.kept, r.valid, token_count),
    'importance': router_losses.importance_loss(r.probs, r.valid, token_count),
    'smooth load': router_losses.load_loss(r.logits, r.logits + r.probs, 1 + r.probs, K, r.valid, token_count),
    'excess load': router_losses.excess_load_loss(r.probs[..., 0], r.expert_index[..., 0], E, r.valid, token_count),
    'mean importance': router_losses.mean_importance_loss(r.probs, r.valid, token_count),
    'sparsity': router_losses.sparsity_l1_loss(r.probs, r.valid, token_count),
    'global entropy': router_losses.global_entropy_loss(r.probs, r.valid, token_count, min_experts=E),
  }


def assert_same(actual, expected, rtol=1e-6):
  assert actual.keys() == expected.keys()
  for name in actual:
    np.testing.assert_allclose(actual[name], expected[name], rtol=rtol, err_msg=name)


def balance_by_loop(r, choices):
  total = 0.0
  for g in range(G):
    real = r.valid[g].nonzero()[0]
    if real.size:
      f = [np.mean(r.expert_index[g, real, :choices] == i) for i in range(E)]
      p = [np.mean(r.probs[g, real, i]) for i in range(E)]
      total += E * sum(fi * pi for fi, pi in zip(f, p, strict=True)) * real.size
  return total / r.valid.sum()


def over_groups(r, of_group):
  """The mean of a group's quantity over groups, by their real tokens; `of_group` sees one group's."""
  real = [np.flatnonzero(valid) for valid in r.valid]
  return sum(len(s) * of_group(g, s) for g, s in enumerate(real) if s.size) / r.valid.sum()


def squared_cv(amounts):
  return (np.std(amounts) / np.mean(amounts)) ** 2


def smooth_load(r, g, real):
  """Load_i = sum_x Phi((clean_i - k-th largest of the others' noisy logits) / noise_i)."""
  load = np.zeros(E)
  for s in real:
    noisy = r.logits[g, s] + r.probs[g, s]
    for i in range(E):
      threshold = np.sort(np.delete(noisy, i))[-K]
      load[i] += norm.cdf((r.logits[g, s, i] - threshold) / (1 + r.probs[g, s, i]))
  return load


def excess_load(r, g, real):
  chosen = r.expert_index[g, real, 0]
  n = np.bincount(chosen, minlength=E)
  return np.mean((n[chosen] - n.mean()) / n.mean() * r.probs[g, real, 0])


EQUATIONS = {
  'importance': lambda r: over_groups(r, lambda g, s: squared_cv(r.probs[g, s].sum(0))),
  'smooth load': lambda r: over_groups(r, lambda g, s: squared_cv(smooth_load(r, g, s))),
  'excess load': lambda r: over_groups(r, lambda g, s: excess_load(r, g, s)),
  'mean importance': lambda r: over_groups(r, lambda g, s: E * np.sum(r.probs[g, s].mean(0) ** 2)),
  'sparsity': lambda r: np.mean([np.sum(p / np.linalg.norm(p)) for p in r.probs[r.valid]]),
  'global entropy': lambda r: over_groups(
    r, lambda g, s: max(0.0, np.log(E) + np.sum(r.probs[g, s].mean(0) * np.log(r.probs[g, s].mean(0))))
  ),
  'balance': lambda r: balance_by_loop(r, 1),
  'balance of all choices': lambda r: balance_by_loop(r, K),
  'z': lambda r: np.mean(np.log(np.exp(r.logits[r.valid]).sum(-1)) ** 2),
  'entropy': lambda r: np.mean(-np.sum(r.probs[r.valid] * np.log(r.probs[r.valid]), axis=-1)),
  'load': lambda r: np.bincount(r.expert_index[r.valid].ravel(), minlength=E) / (K * r.valid.sum()),
  'dropped tokens': lambda r: np.mean([not any(kept) for kept in r.kept[r.valid]]),
  'dropped choices': lambda r: np.mean(~r.kept[r.valid]),
}


def test_equations(routing):
  expected = {name: equation(routing) for name, equation in EQUATIONS.items()}
  assert_same(measure(routing, routing.valid.sum()), expected, rtol=1e-5)


@pytest.mark.parametrize('padding', [{'tokens': 1}, {'tokens': 7}, {'groups': 3}, {'groups': 1, 'tokens': 2}])
def test_padding_neither_counts_nor_scales(padding, routing):
  more, count = routing.padded(**padding), routing.valid.sum()
  assert more.valid.sum() == count and more.valid.size > routing.valid.size
  assert_same(measure(more, count), measure(routing, count))


def test_microbatches_add_up(routing):
  count = routing.valid.sum()  # of the whole batch
  parts = [measure(Routing(*(x[g : g + 1] for x in routing)), count) for g in range(G)]
  assert_same(jax.tree.map(lambda *leaves: sum(leaves), *parts), measure(routing, count))


def test_nothing_but_padding_is_nothing(routing):
  nothing = measure(routing._replace(valid=np.zeros_like(routing.valid)), 0)
  assert all(np.all(value == 0) for value in nothing.values())


@pytest.mark.parametrize('choices', [1, 2])
def test_balance_is_one_when_balanced_and_e_when_collapsed(choices):
  valid, count = jnp.ones((G, E), bool), G * E
  uniform = jnp.full((G, E, E), 1 / E)
  in_turn = jnp.tile(jnp.arange(E)[:, None], (G, 1, 1)) + jnp.arange(choices)[None, None, :]
  balance = jax.jit(router_losses.load_balance_loss)
  assert balance(uniform, in_turn % E, valid, count) == pytest.approx(1)
  collapsed = jnp.zeros((G, E, choices), jnp.int32)
  certain = jax.nn.one_hot(jnp.zeros((G, E), int), E)
  assert balance(certain, collapsed, valid, count) == pytest.approx(E)


def test_balance_of_each_group_counts_and_not_that_of_their_mean():
  """Two groups that collapse onto different experts are no balanced whole."""
  expert = jnp.repeat(jnp.arange(2), S).reshape(2, S)
  balance = jax.jit(router_losses.load_balance_loss)
  loss = balance(jax.nn.one_hot(expert, 2), expert[..., None], jnp.ones((2, S), bool), 2 * S)
  assert loss == pytest.approx(2)


def test_balance_learns_through_the_probabilities_alone(routing):
  """The share of choices is a constant: E f_i / T is the whole gradient, in the router's logits too."""
  r, count = routing, routing.valid.sum()

  def loss(logits):
    probs = jax.nn.softmax(logits)
    return router_losses.load_balance_loss(probs, jax.lax.top_k(probs, 1)[1], r.valid, count)

  choices = r.expert_index[..., :1]
  gradient = jax.jit(jax.grad(router_losses.load_balance_loss))(jnp.asarray(r.probs), choices, r.valid, count)
  f = np.stack([np.sum((choices[..., 0] == i) & r.valid, axis=1) for i in range(E)], -1)
  f = f / np.maximum(r.valid.sum(1, keepdims=True), 1)
  expected = np.where(r.valid[..., None], E * f[:, None, :] / count, 0)
  np.testing.assert_allclose(gradient, expected, rtol=1e-6)
  through_softmax = r.probs * (expected - np.sum(expected * r.probs, axis=-1, keepdims=True))
  np.testing.assert_allclose(jax.jit(jax.grad(loss))(r.logits), through_softmax, rtol=1e-4, atol=1e-8)


def test_limits(routing):
  """An undecided router has z-loss (log E)^2 and entropy log E; a certain one has entropy 0."""
  undecided = routing._replace(expert_index=np.tile(np.arange(E)[:K], (G, S, 1)).astype(np.int32))
  undecided = undecided._replace(logits=np.zeros((G, S, E), np.float32), probs=np.full((G, S, E), 1 / E, np.float32))
  certain = routing._replace(probs=np.eye(E, dtype=np.float32)[routing.expert_index[..., 0]])
  collapsed = certain._replace(probs=np.eye(E, dtype=np.float32)[np.zeros((G, S), int)])
  undecided, certain, collapsed = (measure(r, routing.valid.sum()) for r in (undecided, certain, collapsed))
  assert undecided['importance'] == pytest.approx(0, abs=1e-9) and collapsed['importance'] == pytest.approx(E - 1)
  assert undecided['mean importance'] == pytest.approx(1) and collapsed['mean importance'] == pytest.approx(E)
  assert undecided['sparsity'] == pytest.approx(np.sqrt(E)) and certain['sparsity'] == pytest.approx(1)
  assert undecided['global entropy'] == pytest.approx(0, abs=1e-6)
  assert collapsed['global entropy'] == pytest.approx(np.log(E))
  assert undecided['z'] == pytest.approx(np.log(E) ** 2)
  assert undecided['entropy'] == pytest.approx(np.log(E)) and certain['entropy'] == 0


def test_excess_load_is_nothing_at_perfect_balance():
  """E tokens, one to each expert; and with all on one expert it is (E - 1) times the gate."""
  gates, valid = jnp.full((1, E), 0.7), jnp.ones((1, E), bool)
  assert router_losses.excess_load_loss(gates, jnp.arange(E)[None], E, valid, E) == pytest.approx(0, abs=1e-6)
  all_on_one = router_losses.excess_load_loss(gates, jnp.zeros((1, E), int), E, valid, E)
  assert all_on_one == pytest.approx(0.7 * (E - 1))


def test_gradients_are_numbers_where_nothing_is():
  """An empty group, and a probability of exactly 0."""
  assert np.all(jax.grad(router_losses.squared_cv)(jnp.zeros(E)) == 0)
  assert np.all(np.isfinite(jax.grad(router_losses.entropy)(jnp.eye(E)[0])))


def test_z_loss_gives_padding_no_gradient(routing):
  gradient = jax.jit(jax.grad(router_losses.router_z_loss))(routing.logits, routing.valid, routing.valid.sum())
  assert np.all(gradient[~routing.valid] == 0) and np.all(gradient[routing.valid] != 0)


def test_plan_metrics(routing):
  """Loads sum to 1 before capacity; a token is dropped when none of its choices was kept."""
  slots = np.where(routing.kept, 0, 1)
  plan = RoutingPlan(routing.expert_index, jnp.asarray(slots), jnp.ones((G, S, K)), E, capacity=1)
  metrics = router_losses.plan_metrics(plan, routing.valid, routing.valid.sum())
  assert np.sum(metrics['expert_load']) == pytest.approx(1)
  assert metrics['dropped'] == pytest.approx(EQUATIONS['dropped tokens'](routing))
  assert metrics['dropped_choices'] == pytest.approx(EQUATIONS['dropped choices'](routing))
  assert 0 < metrics['dropped'] < metrics['dropped_choices']
