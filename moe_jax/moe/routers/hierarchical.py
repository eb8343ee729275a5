"""Two levels: a group of experts, then an expert in it, by noisy top-k at both (Shazeer et al. 2017, appendix B)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.moe import router_losses
from moe_jax.moe.routers.base import Router, RoutingContext
from moe_jax.moe.routers.noisy_top_k import noisy_logits
from moe_jax.moe.routing_plan import RoutingPlan
from moe_jax.types import Array, Aux, ConfigError


class HierarchicalRouter(Router):
  """The gate of expert j of group i is the product of the group's gate and the expert's in the group.

  Choices are ordered by group, then by expert. Losses are squared coefficients of variation over all experts: of the
  importance, the summed gates; and of the load, Load_group(i) Load_i(j) / |X_i| over the tokens X_i that chose group i.

  Attributes:
    num_groups: of equally many experts that lie together.
    groups_selected: per token, at least 2 and fewer than there are (2 in the paper).
    experts_selected: per chosen group, at least 2 and fewer than it holds (2 in the paper).
    importance_loss_weight, load_loss_weight: as in `NoisyTopKRouter`.
  """

  num_groups: int = 4
  groups_selected: int = 2
  experts_selected: int = 2
  importance_loss_weight: float = 0.1
  load_loss_weight: float = 0.1

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.num_groups < 1 or self.num_experts % self.num_groups:
      raise ConfigError(f'{self.num_experts} experts do not divide into {self.num_groups} groups.')
    each = self.num_experts // self.num_groups
    if not (2 <= self.groups_selected < self.num_groups and 2 <= self.experts_selected < each):
      raise ConfigError(
        f'{self.groups_selected} of {self.num_groups} groups and {self.experts_selected} of their {each} experts:'
        ' a token picks fewer than there are at both levels, and at least 2, since a softmax over one teaches nothing.'
      )

  @property
  def choices_per_token(self) -> float:
    return self.groups_selected * self.experts_selected

  @nn.compact
  def __call__(self, tokens: Array, context: RoutingContext) -> tuple[RoutingPlan, Aux]:
    valid, count, train = context.valid, context.token_count, context.train
    groups, each = self.num_groups, self.num_experts // self.num_groups
    clean, noisy, scale = noisy_logits(self, '', tokens, (groups,), train)  # [G, S, groups]
    clean_in, noisy_in, scale_in = noisy_logits(self, 'expert_', tokens, (groups, each), train)  # [G, S, groups, each]

    best, group_index = jax.lax.top_k(noisy, self.groups_selected)
    best_in, index_in = jax.lax.top_k(noisy_in, self.experts_selected)
    of_groups = jnp.take_along_axis(jax.nn.softmax(best_in, axis=-1), group_index[..., None], axis=2)
    gates = jax.nn.softmax(best, axis=-1)[..., None] * of_groups
    expert_index = group_index[..., None] * each + jnp.take_along_axis(index_in, group_index[..., None], axis=2)
    flat = (*valid.shape, -1)
    plan = self.plan(expert_index.reshape(flat), gates.reshape(flat), context)

    experts = jax.nn.one_hot(expert_index.reshape(flat), self.num_experts)
    importance = jnp.einsum('gsk,gske->gse', gates.reshape(flat), experts)
    importance = router_losses.importance_loss(importance, valid, count)
    losses = {'importance': self.importance_loss_weight * importance}
    if train:
      chose = jnp.sum(jax.nn.one_hot(group_index, groups), axis=2) * valid[..., None]  # [G, S, groups]
      group_load = router_losses.load_probability(clean, noisy, scale, self.groups_selected)
      group_load = jnp.sum(jnp.where(valid[..., None], group_load, 0.0), axis=1)
      load_in = router_losses.load_probability(clean_in, noisy_in, scale_in, self.experts_selected)
      load_in = jnp.einsum('gsa,gsab->gab', chose, load_in) / jnp.maximum(jnp.sum(chose, axis=1), 1)[..., None]
      load = (group_load[..., None] * load_in).reshape(-1, self.num_experts)
      load = router_losses.over_groups(router_losses.squared_cv(load), valid, count)
      losses['load'] = self.load_loss_weight * load
    metrics = {
      'importance': importance,
      'router_entropy': router_losses.router_entropy(jax.nn.softmax(clean), valid, count),
    }
    return plan, Aux(losses, metrics | router_losses.plan_metrics(plan, valid, count))
