"""What a router is: tokens in, a plan and something to report out. It knows nothing of experts or dispatchers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from moe_jax import sharding
from moe_jax.moe.routing_plan import DensePlan, RoutingPlan, assign_slots, expert_capacity
from moe_jax.types import Array, Aux, Dtype, Initializer

_KERNEL_INIT = nn.initializers.normal(0.02)


@struct.dataclass
class RoutingContext:
  """The layer's `Context`, regrouped.

  Attributes:
    valid: bool[G, S], real tokens; padding is never routed.
    token_count: float32[], real tokens of the whole batch.
    token_ids: int32[G, S] or None.
    task_ids: int32[G, S] or None, of tasks, languages or domains, from 1; 0 is padding.
    segment_ids: int32[G, S] or None; the segments of a row are different texts.
    row_length: tokens in a row of the batch; groups in a row make whole rows. None: a group is a row.
    train: static.
  """

  valid: Array
  token_count: Array
  token_ids: Array | None = None
  task_ids: Array | None = None
  segment_ids: Array | None = None
  row_length: int | None = struct.field(pytree_node=False, default=None)
  train: bool = struct.field(pytree_node=False, default=False)

  def rows(self, values: Array) -> Array:
    """[G, S, ...] -> [B, L, ...], groups as the rows of the batch that they were."""
    return values.reshape(-1, self.row_length or values.shape[1], *values.shape[2:])


class Router(nn.Module):
  """Base of all routers.

  Attributes:
    num_experts: E, given by the layer.
    capacity_factor: slots per expert in training are this times S / E, as `capacity_rule` counts them. None makes room
      for the worst case, so that nothing is dropped.
    eval_capacity_factor: the same outside training, where None also sees that no token is dropped for the sake of
      another, and results do not depend on what else is in the batch.
    capacity_rule: see `routing_plan.CAPACITY_RULES`.
  """

  num_experts: int
  capacity_factor: float | None = 2.0
  eval_capacity_factor: float | None = None
  capacity_rule: str = 'gshard'

  def __call__(self, tokens: Array, context: RoutingContext) -> tuple[DensePlan, Aux]:
    """tokens: float[G, S, M]."""
    raise NotImplementedError

  @property
  def choices_per_token(self) -> float:
    """Experts that run per token, for counting active parameters."""
    raise NotImplementedError

  @property
  def causal(self) -> bool:
    """Whether a token's way, but for drops in training, is settled by itself and what went before it."""
    return True

  def capacity(self, group_size: int, train: bool) -> int:
    """C, slots per expert per group."""
    factor = self.capacity_factor if train else self.eval_capacity_factor
    if factor is None:
      return group_size
    slots = expert_capacity(group_size, self.num_experts, factor, self.choices_per_token, self.capacity_rule)
    return min(group_size, slots)

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
    return self.linear('kernel', tokens, (self.num_experts,))

  def linear(self, name: str, x: Array, features: tuple[int, ...], init: Initializer = _KERNEL_INIT) -> Array:
    """float[..., M] -> float32[..., *features], without a bias."""
    kernel = self.param(name, sharding.partitioned(init, 'embed', *(None,) * len(features)), (x.shape[-1], *features))
    return jnp.tensordot(x.astype(jnp.float32), kernel, axes=1, precision=jax.lax.Precision.HIGHEST)

  def memory(self, name: str, shape: tuple[int, ...] = (), dtype: Dtype = 'float32') -> nn.Variable:
    """What the router remembers from step to step: zeros at first, without a gradient, saved with the parameters.

    It lives in the collection 'state' and is the same on every device, so count over the global batch.
    """
    return self.variable('state', name, jnp.zeros, shape, dtype)

  def remember(self, memory: nn.Variable, value: Array, context: RoutingContext) -> None:
    """Changes a memory, in training only."""
    if context.train and not self.is_initializing():
      memory.value = jax.lax.stop_gradient(value)

  def gathered(self, name: str, amount: Array, context: RoutingContext) -> tuple[Array, Array]:
    """Adds up an amount over the microbatches of a training step.

    Returns:
      The total since the step began, and bool[], whether this is all of it (never outside training).
    """
    total, seen = self.memory(name, amount.shape), self.memory(f'{name}_tokens')
    sum_, tokens = total.value + jax.lax.stop_gradient(amount), seen.value + jnp.sum(context.valid)
    whole = tokens >= context.token_count * (1 - 1e-6)  # float32 does not count beyond 2^24 one by one
    self.remember(total, jnp.where(whole, 0.0, sum_), context)
    self.remember(seen, jnp.where(whole, 0.0, tokens), context)
    return sum_, whole & context.train

  def steps_done(self, context: RoutingContext) -> Array:
    """How many whole steps this router was trained for before this one, float32[]."""
    steps = self.memory('steps')
    _, whole = self.gathered('step', jnp.float32(0), context)
    before = steps.value
    self.remember(steps, before + whole, context)
    return before
