"""What a router is: tokens in, a plan and something to report out. It knows nothing of experts or dispatchers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from moe_jax import sharding
from moe_jax.moe import router_losses
from moe_jax.moe.routing_plan import Plan, RoutingPlan, assign_slots, expert_capacity
from moe_jax.types import Array, Aux, ConfigError, Dtype, Initializer

_KERNEL_INIT = nn.initializers.normal(0.02)


@struct.dataclass
class RoutingContext:
  """The layer's `Context`, regrouped.

  Attributes:
    valid: bool[G, S], real tokens; padding is never routed.
    token_count: float32[], real tokens of the whole batch.
    token_ids: int32[G, S] or None.
    task_ids: int32[G, S] or None, of tasks, languages or domains, from 1; 0 is padding.
    positions: int32[G, S] or None, of each token in its text.
    segment_ids: int32[G, S] or None; the segments of a row are different texts.
    row_length: tokens in a row of the batch; groups in a row make whole rows. None: a group is a row.
    train: static.
  """

  valid: Array
  token_count: Array
  token_ids: Array | None = None
  task_ids: Array | None = None
  positions: Array | None = None
  segment_ids: Array | None = None
  row_length: int | None = struct.field(pytree_node=False, default=None)
  train: bool = struct.field(pytree_node=False, default=False)

  def known(self, name: str) -> Array:
    """The ids or positions of that name.

    Raises:
      ConfigError: if the model does not pass them on.
    """
    values = getattr(self, name)
    if values is None:
      raise ConfigError(f'This router goes by {name}, which the model or its batch does not have.')
    return values

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
    slots: per expert and sequence, in training and outside it, in place of both factors (Hugging Face's Switch).
      Sequences that share a group, as single tokens do in decoding, pool theirs.
    capacity_rule: see `routing_plan.CAPACITY_RULES`.
  """

  num_experts: int
  capacity_factor: float | None = 2.0
  eval_capacity_factor: float | None = None
  slots: int | None = None
  capacity_rule: str = 'gshard'

  def __call__(self, tokens: Array, context: RoutingContext) -> tuple[Plan, Aux]:
    """tokens: float[G, S, M]."""
    raise NotImplementedError

  @property
  def choices_per_token(self) -> float:
    """Experts that run per token, for counting active parameters."""
    raise NotImplementedError

  @property
  def causal(self) -> bool:
    """Whether outside training a token's way is settled by itself and what went before: else it cannot generate."""
    return True

  def capacity(self, group_size: int, train: bool) -> int:
    """C, slots per expert per group."""
    if self.slots is not None:
      return min(group_size, self.slots)
    factor = self.capacity_factor if train else self.eval_capacity_factor
    if factor is None:
      return group_size
    slots = expert_capacity(group_size, self.num_experts, factor, self.choices_per_token, self.capacity_rule)
    return min(group_size, slots)

  def plan(
    self, expert_index: Array, gates: Array, context: RoutingContext, priority: Array | None = None
  ) -> RoutingPlan:
    """Gives slots to choices int32[G, S, K] as far as they go round; those keep their gates float32[G, S, K]."""
    size = expert_index.shape[1]
    capacity = self.capacity(size, context.train)
    if self.slots is not None:
      capacity = min(size, self.slots * max(1, size // (context.row_length or size)))
    slot_index = assign_slots(expert_index, self.num_experts, context.valid, priority)
    kept = jnp.where(slot_index < capacity, gates, 0.0)
    return RoutingPlan(expert_index, slot_index, kept, self.num_experts, capacity)

  def logits(self, tokens: Array) -> Array:
    """float[G, S, M] -> float32[G, S, E]; in float32 whatever the activations (Fedus et al. 2021, section 2.4)."""
    return self.linear('kernel', tokens, (self.num_experts,))

  def linear(self, name: str, x: Array, features: tuple[int, ...], init: Initializer = _KERNEL_INIT) -> Array:
    """float[..., M] -> float32[..., *features], without a bias."""
    axes = 'embed', *(None,) * len(features)
    return tensordot(x, self.param(name, sharding.partitioned(init, *axes), (x.shape[-1], *features)))

  def memory(self, name: str, shape: tuple[int, ...] = (), dtype: Dtype = 'float32') -> nn.Variable:
    """What the router remembers from step to step: zeros at first, without a gradient, saved with the parameters.

    It lives in the collection 'state' and is the same on every device, so count over the global batch.
    """
    return self.variable('state', name, jnp.zeros, shape, dtype)

  def remember(self, memory: nn.Variable, value: Array, context: RoutingContext) -> None:
    """Changes a memory, in training only."""
    if context.train and not self.is_initializing():
      memory.value = jax.lax.stop_gradient(value)

  @property
  def steps_done(self) -> Array:
    """Whole training steps before this one, float32[], of a router that calls `gathered`."""
    return self.get_variable('state', 'steps', jnp.float32(0))

  def gathered(self, context: RoutingContext, **amounts: Array) -> tuple[dict[str, Array], Array]:
    """Adds up amounts over the microbatches of a training step; to be called once.

    Returns:
      Their totals since the step began, and bool[], whether that is all of it (never outside training).
    """
    tokens, steps = self.memory('tokens'), self.memory('steps')
    seen = tokens.value + jnp.sum(context.valid)
    whole = (seen >= context.token_count * (1 - 1e-6)) & context.train  # float32 counts no tokens beyond 2^24
    totals = {}
    for name, amount in amounts.items():
      memory = self.memory(name, amount.shape)
      totals[name] = memory.value + jax.lax.stop_gradient(amount)
      self.remember(memory, jnp.where(whole, 0.0, totals[name]), context)
    self.remember(tokens, jnp.where(whole, 0.0, seen), context)
    self.remember(steps, steps.value + whole, context)
    return totals, whole


class FixedRouter(Router):
  """Base of routers that know the one expert of each token beforehand; the gate is 1."""

  @property
  def choices_per_token(self) -> float:
    return 1

  def choose(self, context: RoutingContext) -> Array:
    """The expert of each token, int32[G, S]."""
    raise NotImplementedError

  @nn.compact
  def __call__(self, tokens: Array, context: RoutingContext) -> tuple[RoutingPlan, Aux]:
    expert_index = self.choose(context)[..., None]
    plan = self.plan(expert_index, jnp.ones(expert_index.shape, jnp.float32), context)
    return plan, Aux(metrics=router_losses.plan_metrics(plan, context.valid, context.token_count))


def einsum(equation: str, *arrays: Array) -> Array:
  """In float32, which TPUs do only when asked to."""
  return jnp.einsum(equation, *(x.astype(jnp.float32) for x in arrays), precision=jax.lax.Precision.HIGHEST)


def tensordot(x: Array, kernel: Array) -> Array:
  """float[..., M], float[M, ...] -> float32[..., ...], in float32 as `einsum`."""
  return jnp.tensordot(x.astype(jnp.float32), kernel, axes=1, precision=jax.lax.Precision.HIGHEST)


def unit(x: Array, axis: int) -> Array:
  """x / |x| along an axis, 0 where x is."""
  return x * jax.lax.rsqrt(jnp.sum(x**2, axis=axis, keepdims=True) + 1e-12)


def normalised(gates: Array, total: Array | None = None) -> Array:
  """Divides float32[..., K] by their sum, or by that of others; 0 where all are."""
  total = jnp.sum(gates if total is None else total, axis=-1, keepdims=True)
  return gates / (total + 1e-20)
