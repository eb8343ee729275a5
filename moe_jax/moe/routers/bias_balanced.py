"""Balance by a bias on the choice instead of a loss, choices limited to a few groups of experts (DeepSeek-V3)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.moe import router_losses
from moe_jax.moe.routers.base import Router, RoutingContext, normalised
from moe_jax.moe.routing_plan import RoutingPlan
from moe_jax.types import Array, Aux, ConfigError


class BiasBalancedRouter(Router):
  """Scores are sigmoids. The k best of score + bias are chosen, and weighed by their scores alone, normalised.

  After each training step the bias of every expert moves by `bias_rate`, up where the expert got less than the mean
  load of the whole step and down where it got more. No gradient reaches it. It lives in the collection 'state', is
  saved with the parameters, and is the same on every device, since loads are counted over the global batch.

  Attributes:
    num_selected: k.
    route_scale: the gates of a token sum to this; 2.5 in DeepSeek-V3.
    bias_rate: gamma; 0.001 in DeepSeek-V3 until late in training.
    num_groups: of experts that lie together. A group's score is the sum of its two best.
    groups_kept: a token chooses among the experts of so many best groups.
    balance_loss_weight: of the load-balance loss over all choices within each row of the batch; 1e-4 in DeepSeek-V3.
  """

  num_selected: int = 2
  route_scale: float = 1.0
  bias_rate: float = 1e-3
  num_groups: int = 1
  groups_kept: int = 1
  balance_loss_weight: float = 1e-4

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.num_experts % self.num_groups or not 1 <= self.groups_kept <= self.num_groups:
      raise ConfigError(f'{self.num_experts} experts, {self.num_groups} groups, {self.groups_kept} kept: do not fit.')
    if not 1 <= self.num_selected <= self.num_experts // self.num_groups * self.groups_kept:
      raise ConfigError(f'{self.groups_kept} of {self.num_groups} groups hold fewer than {self.num_selected} experts.')
    if self.num_selected == 1:
      raise ConfigError('A normalised top-1 gate is constant and teaches the router nothing: set num_selected >= 2.')

  @property
  def choices_per_token(self) -> float:
    return self.num_selected

  @nn.compact
  def __call__(self, tokens: Array, context: RoutingContext) -> tuple[RoutingPlan, Aux]:
    valid, count = context.valid, context.token_count
    scores = jax.nn.sigmoid(self.logits(tokens))
    bias = self.memory('bias', (self.num_experts,))
    expert_index = jax.lax.top_k(self.group_limited(scores + bias.value[None, None]), self.num_selected)[1]
    gates = jnp.take_along_axis(scores, expert_index, axis=-1)
    gates = self.route_scale * normalised(gates)
    plan = self.plan(expert_index, gates, context)

    load = jnp.sum(router_losses.choice_counts(expert_index, self.num_experts, valid), axis=0)
    totals, step_ends = self.gathered(context, load=load)
    missing = jnp.mean(totals['load']) - totals['load']
    self.remember(bias, bias.value + jnp.where(step_ends, self.bias_rate * jnp.sign(missing), 0.0), context)

    probs = normalised(scores)
    probs_, choices, real = map(context.rows, (probs, expert_index, valid))
    balance = router_losses.load_balance_loss(probs_, choices, real, count)
    entropy = router_losses.router_entropy(probs, valid, count)
    return plan, Aux(
      losses={'balance': self.balance_loss_weight * balance},
      metrics={
        'balance': balance,
        'router_entropy': entropy,
        **router_losses.plan_metrics(plan, valid, count),
      },
    )

  def group_limited(self, scores: Array) -> Array:
    """Puts -inf in place of the experts outside a token's best groups: float32[G, S, E]."""
    if self.num_groups == 1:
      return scores
    grouped = scores.reshape(*scores.shape[:2], self.num_groups, -1)
    worth = jnp.sum(jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0], axis=-1)
    kept = jax.nn.one_hot(jax.lax.top_k(worth, self.groups_kept)[1], self.num_groups).sum(axis=2) > 0
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(scores.shape)
