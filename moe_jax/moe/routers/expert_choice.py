"""Expert-choice: every expert picks the tokens that score it highest (Zhou et al. 2022). Balanced by construction."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from moe_jax.moe import router_losses
from moe_jax.moe.routers.base import Router, RoutingContext
from moe_jax.moe.routing_plan import RoutingPlan, expert_capacity
from moe_jax.types import Array, Aux, ConfigError


class ExpertChoiceRouter(Router):
  """Softmax over the experts; then each expert takes its C best tokens of the group, and the gate is the probability.

  Here `capacity_factor` is the mean number of experts a token gets (c = 2 in the paper). **Not causal**: whether a
  token is picked depends on later ones in its group, and on the rest of the batch, in training and outside.
  """

  @property
  def choices_per_token(self) -> float:
    return min(self.capacity_factor or self.num_experts, self.num_experts)

  @property
  def causal(self) -> bool:
    return False

  def capacity(self, group_size: int, train: bool) -> int:
    """C; outside training that of training, where no other factor is given: worst-case room would pick every token."""
    factor = self.capacity_factor if train or self.eval_capacity_factor is None else self.eval_capacity_factor
    if factor is None:
      raise ConfigError('Experts that choose need a number to choose: set CAPACITY_FACTOR, experts a token on average.')
    return min(group_size, expert_capacity(group_size, self.num_experts, factor, 1, self.capacity_rule))

  @nn.compact
  def __call__(self, tokens: Array, context: RoutingContext) -> tuple[RoutingPlan, Aux]:
    valid, count = context.valid, context.token_count
    probs = jax.nn.softmax(self.logits(tokens), axis=-1)
    plan = experts_pick(probs, probs, valid, self.capacity(tokens.shape[1], context.train))
    metrics = {
      'router_entropy': router_losses.router_entropy(probs, valid, count),
      'experts_per_token': router_losses.token_mean(jnp.sum(plan.kept, axis=-1), valid, count),
      **router_losses.plan_metrics(plan, valid, count, self.choices_per_token),
    }
    return plan, Aux(metrics=metrics)


class MixtureOfDepthsRouter(ExpertChoiceRouter):
  """One expert, and a residual path for the tokens it does not pick (Raposo et al. 2024).

  In training the `capacity_factor` of each group's tokens that score highest (12.5 % in the paper) are computed, and
  the gate is the score. Whether a token is among them depends on later ones, so a loss teaches sigmoid(score) to tell,
  without a gradient to the tokens; outside training each token goes by its own score > 0, and that is causal. The paper
  skips attention along with the feed-forward; here a layer skips what its expert does.

  Attributes:
    predictor_loss_weight: of the cross-entropy between sigmoid(score) and having been picked.
  """

  capacity_factor: float | None = 0.125
  predictor_loss_weight: float = 1e-2

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.num_experts != 1:
      raise ConfigError(f'Mixture of Depths has one expert and a skip, not {self.num_experts}: set NUM_EXPERTS=1.')

  @property
  def causal(self) -> bool:
    return True

  def capacity(self, group_size: int, train: bool) -> int:
    """C, tokens that are computed; outside training there is room for all who score above 0."""
    return super().capacity(group_size, train) if train else Router.capacity(self, group_size, train)

  @nn.compact
  def __call__(self, tokens: Array, context: RoutingContext) -> tuple[RoutingPlan, Aux]:
    valid, count = context.valid, context.token_count
    both = jnp.concatenate([tokens, jax.lax.stop_gradient(tokens)], axis=1)
    scores, predicted = jnp.split(self.logits(both), 2, axis=1)
    if context.train:
      plan = experts_pick(scores, scores, valid, self.capacity(tokens.shape[1], True))
    else:
      plan = self.plan(jnp.where(scores > 0, 0, -1), scores, context)
    picked = plan.kept[..., 0].astype(jnp.float32)
    surprise = optax.sigmoid_binary_cross_entropy(predicted[..., 0], picked)
    predictor = router_losses.token_mean(surprise, valid, count)
    return plan, Aux(
      losses={'predictor': self.predictor_loss_weight * predictor},
      metrics={'predictor': predictor, 'skipped': router_losses.dropped_tokens(plan.kept, valid, count)},
    )


def experts_pick(scores: Array, gates: Array, valid: Array, capacity: int) -> RoutingPlan:
  """Each expert's `capacity` best tokens of each group, as a token's view: choice e of a token is expert e or none.

  Args:
    scores: float32[G, S, E]. Of equal tokens the earlier is taken.
    gates: float32[G, S, E].
    valid: bool[G, S]; padding is never picked.
    capacity: C.
  """
  _, size, num_experts = scores.shape
  order = jnp.argsort(jnp.where(valid[..., None], -scores, jnp.inf), axis=1, stable=True)
  rank = jnp.argsort(order, axis=1)
  picked = valid[..., None] & (rank < capacity)
  return RoutingPlan(
    expert_index=jnp.where(picked, jnp.arange(num_experts)[None, None], -1),
    slot_index=jnp.where(picked, rank, size * num_experts),
    combine_weight=jnp.where(picked, gates, 0.0),
    num_experts=num_experts,
    capacity=capacity,
  )
