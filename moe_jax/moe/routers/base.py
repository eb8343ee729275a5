"""What a router is: tokens in, a plan and something to report out. It knows nothing of experts or dispatchers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from moe_jax import sharding
from moe_jax.moe.routing_plan import RoutingPlan, assign_slots, expert_capacity
from moe_jax.types import Array, Aux


@struct.dataclass
class RoutingContext:
  """The layer's `Context`, regrouped.

  Attributes:
    valid: bool[G, S], real tokens; padding is never routed.
    token_count: float32[], real tokens of the whole batch.
    token_ids: int32[G, S] or None.
    train: static.
  """

  valid: Array
  token_count: Array
  token_ids: Array | None = None
  train: bool = struct.field(pytree_node=False, default=False)


class Router(nn.Module):
  """Base of all routers.

  Attributes:
    num_experts: E, given by the layer.
    capacity_factor: slots per expert in training are this times S / E, as GShard, Switch, ST-MoE and GLaM count it.
    eval_capacity_factor: the same outside training. None makes room for the worst case, so that no token is ever
      dropped for the sake of another and results do not depend on what else is in the batch.
  """

  num_experts: int
  capacity_factor: float = 2.0
  eval_capacity_factor: float | None = None

  def __call__(self, tokens: Array, context: RoutingContext) -> tuple[RoutingPlan, Aux]:
    """tokens: float[G, S, M]."""
    raise NotImplementedError

  @property
  def choices_per_token(self) -> float:
    """Experts that run per token, for counting active parameters."""
    raise NotImplementedError

  def capacity(self, group_size: int, train: bool) -> int:
    """C, slots per expert per group."""
    factor = self.capacity_factor if train else self.eval_capacity_factor
    if factor is None:
      return group_size
    return min(group_size, expert_capacity(group_size, self.num_experts, factor))

  def plan(
    self, expert_index: Array, gates: Array, context: RoutingContext, priority: Array | None = None
  ) -> RoutingPlan:
    """Gives slots to choices int32[G, S, K] as far as they go round; those keep their gates float32[G, S, K]."""
    capacity = self.capacity(expert_index.shape[1], context.train)
    slot_index = assign_slots(expert_index, self.num_experts, context.valid, priority)
    kept = jnp.where(slot_index < capacity, gates, 0.0)
    return RoutingPlan(expert_index, slot_index, kept, self.num_experts, capacity)

  def logits(self, tokens: Array) -> Array:
    """float[G, S, M] -> float32[G, S, E]; in float32 whatever the activations (Fedus et al. 2021, section 2.4)."""
    init = sharding.partitioned(nn.initializers.normal(0.02), 'embed', None)
    kernel = self.param('kernel', init, (tokens.shape[-1], self.num_experts))
    return jnp.einsum('gsm,me->gse', tokens.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
