"""Routing learnt by reinforcement: draw experts, and be rewarded by how well the token was predicted."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from moe_jax import sharding
from moe_jax.layers.initializers import fan_in
from moe_jax.moe import router_losses
from moe_jax.moe.routers.base import Router, RoutingContext, tensordot
from moe_jax.moe.routing_plan import RoutingPlan
from moe_jax.types import Array, Aux


class ReinforceRouter(Router):
  """Draws an expert from a policy, and is rewarded by how well the token was predicted; outside training the likeliest.

  The reward of a token is minus its own loss, r = -CE. With policy pi and baseline b(x), both the router's, the loss is
  -(r - b) log pi + c (r - b)^2 - h H(pi), averaged over tokens. The first two are linear in CE but for terms without
  a gradient, so they travel as token terms. The expert's output is not scaled by its probability.

  Attributes:
    learnt_baseline: whether there is a b(x) (RL-R, Clark et al. 2022) or none (REINFORCE, Williams 1992, on which the
      routers of Bengio et al. 2016 and Rosenbaum et al. 2017 rest).
    policy_weight: of the policy's term.
    baseline_weight: c.
    entropy_weight: h, which keeps the policy from settling too soon.
    balance_loss_weight: of the load-balance loss.
  """

  learnt_baseline: bool = True
  policy_weight: float = 1e-2
  baseline_weight: float = 1e-2
  entropy_weight: float = 1e-3
  balance_loss_weight: float = 1e-2

  @property
  def choices_per_token(self) -> float:
    return 1

  @nn.compact
  def __call__(self, tokens: Array, context: RoutingContext) -> tuple[RoutingPlan, Aux]:
    valid, count = context.valid, context.token_count
    logits = self.logits(tokens)
    log_policy = jax.nn.log_softmax(logits, axis=-1)
    drawn = jax.random.categorical(self.make_rng('router'), logits) if context.train else jnp.argmax(logits, -1)
    expert_index = drawn[..., None]
    plan = self.plan(expert_index, jnp.ones(expert_index.shape, jnp.float32), context)

    log_prob = jnp.take_along_axis(log_policy, expert_index, axis=-1)[..., 0]
    share = valid / jnp.maximum(count, 1)  # a token's part in the mean
    entropy = router_losses.router_entropy(jnp.exp(log_policy), valid, count)
    balance = router_losses.load_balance_loss(jnp.exp(log_policy), expert_index, valid, count)
    losses = {'entropy': -self.entropy_weight * entropy, 'balance': self.balance_loss_weight * balance}
    metrics = {'router_entropy': entropy, 'balance': balance, **router_losses.plan_metrics(plan, valid, count)}
    reward = self.policy_weight * log_prob
    if self.learnt_baseline:
      baseline = self.baseline(jax.lax.stop_gradient(tokens))
      losses['policy'] = self.policy_weight * jnp.sum(share * jax.lax.stop_gradient(baseline) * log_prob)
      losses['baseline'] = self.baseline_weight * jnp.sum(share * baseline**2)
      metrics['baseline'] = jnp.sum(share * baseline)
      reward += 2 * self.baseline_weight * baseline
    return plan, Aux(losses, metrics, token_terms={'reward': share * reward})

  def baseline(self, tokens: Array) -> Array:
    """b(x), the reward to expect: M -> M / 8 -> 1 without biases, float32[G, S]."""
    hidden = jax.nn.relu(self.linear('baseline_in', tokens, (max(1, tokens.shape[-1] // 8),), fan_in(0, 1)))
    out = self.param('baseline_out', sharding.partitioned(fan_in(0, 1), None, None), (hidden.shape[-1], 1))
    return tensordot(hidden, out)[..., 0]


class BernoulliRouter(Router):
  """Draws every expert by itself, on or off, so that tokens differ in how many they use (Bengio et al. 2016).

  pi(u | x) = prod_i p_i^u_i (1 - p_i)^(1 - u_i), p = sigmoid(x W + offset), rewarded as in `ReinforceRouter` without a
  baseline. Outside training the tau E likeliest are on. Three terms keep p near a share tau of the experts:
  sum_i (mean_x p_i - tau)^2, mean_x (mean_i p_i - tau)^2, and -sum_i var_x p_i, which asks p to depend on the token.
  Means over x are of a group.

  Attributes:
    share_on: tau; the offset starts p there.
    policy_weight: of the policy's term.
    sparsity_weight, token_sparsity_weight, variance_weight: of the three.
  """

  share_on: float = 0.25
  policy_weight: float = 1e-2
  sparsity_weight: float = 1e-1
  token_sparsity_weight: float = 1e-1
  variance_weight: float = 1e-2

  @property
  def choices_per_token(self) -> float:
    return self.share_on * self.num_experts

  @nn.compact
  def __call__(self, tokens: Array, context: RoutingContext) -> tuple[RoutingPlan, Aux]:
    valid, count, tau = context.valid, context.token_count, self.share_on
    logits = self.logits(tokens) + jax.scipy.special.logit(tau)
    probs = jax.nn.sigmoid(logits)
    if context.train:
      on = jax.random.bernoulli(self.make_rng('router'), probs)
    else:
      likeliest = jax.lax.top_k(probs, max(1, round(tau * self.num_experts)))[1]
      on = jnp.sum(jax.nn.one_hot(likeliest, self.num_experts), axis=2) > 0
    expert_index = jnp.where(on, jnp.arange(self.num_experts)[None, None], -1)
    plan = self.plan(expert_index, jnp.ones(probs.shape, jnp.float32), context)

    log_prob = -jnp.sum(optax.sigmoid_binary_cross_entropy(logits, on.astype(jnp.float32)), axis=-1)
    mean = router_losses.group_mean(probs, valid)  # [G, E]
    variance = router_losses.group_mean((probs - mean[:, None]) ** 2, valid)
    by_group = {'sparsity': jnp.sum((mean - tau) ** 2, axis=-1), 'variance': -jnp.sum(variance, axis=-1)}
    terms = {name: router_losses.over_groups(term, valid, count) for name, term in by_group.items()}
    terms['token_sparsity'] = router_losses.token_mean((jnp.mean(probs, axis=-1) - tau) ** 2, valid, count)
    return plan, Aux(
      losses={name: getattr(self, f'{name}_weight') * term for name, term in terms.items()},
      metrics=terms | router_losses.plan_metrics(plan, valid, count, self.choices_per_token),
      token_terms={'reward': self.policy_weight * log_prob * valid / jnp.maximum(count, 1)},
    )
