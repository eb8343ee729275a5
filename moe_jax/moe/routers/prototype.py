"""Expert prototyping: k groups of experts, and the best of each (M6-T, Yang et al. 2021)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.moe import router_losses
from moe_jax.moe.routers.base import Router, RoutingContext
from moe_jax.moe.routing_plan import RoutingPlan
from moe_jax.types import Array, Aux, ConfigError


class PrototypeRouter(Router):
  """Splits the experts into k prototypes and routes top-1 in each: k different experts without an iterated top-k.

  Attributes:
    num_prototypes: k, a divisor of the number of experts.
    balance_loss_weight: of the load-balance losses, summed over prototypes.
  """

  num_prototypes: int = 2
  balance_loss_weight: float = 1e-2

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.num_prototypes < 1 or self.num_experts % self.num_prototypes:
      raise ConfigError(f'{self.num_experts} experts do not divide into {self.num_prototypes} prototypes.')

  @property
  def choices_per_token(self) -> float:
    return self.num_prototypes

  @nn.compact
  def __call__(self, tokens: Array, context: RoutingContext) -> tuple[RoutingPlan, Aux]:
    valid, count = context.valid, context.token_count
    each = self.num_experts // self.num_prototypes
    logits = self.logits(tokens)
    probs = jax.nn.softmax(logits.reshape(*logits.shape[:2], self.num_prototypes, each), axis=-1)
    best = jnp.argmax(probs, axis=-1)  # [G, S, k], within its prototype
    gates = jnp.max(probs, axis=-1)
    plan = self.plan(best + each * jnp.arange(self.num_prototypes)[None, None], gates, context)

    balance = sum(
      (
        router_losses.load_balance_loss(probs[:, :, z], best[:, :, z, None], valid, count)
        for z in range(self.num_prototypes)
      ),
      jnp.float32(0),
    )
    entropy = router_losses.router_entropy(probs.reshape(logits.shape) / self.num_prototypes, valid, count)
    metrics = {'balance': balance, 'router_entropy': entropy}
    losses = {'balance': self.balance_loss_weight * balance}
    return plan, Aux(losses, metrics | router_losses.plan_metrics(plan, valid, count))
