"""A router's decision, in a form every dispatcher can read, and the arithmetic of expert buffers.

Letters: G groups, S tokens a group, E experts, C capacity (slots per expert per group), K choices a token.
"""

import math
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct

from moe_jax.types import Array, Dtype


@struct.dataclass
class RoutingPlan:
  """Which experts see which tokens, and with what weight their answers come home.

  Attributes:
    expert_index: int32[G, S, K], which expert.
    slot_index: int32[G, S, K], place in its buffer; `capacity` or more where the choice is dropped.
    combine_weight: float32[G, S, K]; 0 where dropped.
    num_experts: E.
    capacity: C.
  """

  expert_index: Array
  slot_index: Array
  combine_weight: Array
  num_experts: int = struct.field(pytree_node=False)
  capacity: int = struct.field(pytree_node=False)

  @property
  def kept(self) -> Array:
    """bool[G, S, K], choices that got a slot."""
    return self.slot_index < self.capacity

  def dispatch_array(self, dtype: Dtype) -> Array:
    """0/1 [G, S, E, C]: token s of group g sits in slot c of expert e."""
    return self._placed(jnp.ones_like(self.combine_weight), dtype)

  def combine_array(self, dtype: Dtype) -> Array:
    """[G, S, E, C]: the dispatch array times the combine weights."""
    return self._placed(self.combine_weight, dtype)

  def _placed(self, weight: Array, dtype: Dtype) -> Array:
    expert = jax.nn.one_hot(self.expert_index, self.num_experts, dtype=dtype) * weight[..., None].astype(dtype)
    slot = jax.nn.one_hot(self.slot_index, self.capacity, dtype=dtype)  # all zero where dropped
    return jnp.einsum('gske,gskc->gsec', expert, slot)


def expert_capacity(choices: int, num_experts: int, factor: float, multiple_of: int = 4) -> int:
  """Slots per expert per group: ceil(factor * choices / E), rounded up to a multiple.

  Args:
    choices: what `factor` counts in a group: its tokens (k outside: GShard, Switch, ST-MoE, GLaM), or its tokens times
      K (k inside: V-MoE, MegaBlocks).
    num_experts: E.
    factor: the capacity factor.
    multiple_of: slots come in multiples of this, and are at least this many.
  """
  # The subtraction forgives float noise: 1.1 * 100 / 10 is 11 slots, not 12.
  slots = math.ceil(factor * choices / num_experts - 1e-6)
  return max(1, math.ceil(slots / multiple_of)) * multiple_of


@struct.dataclass
class SoftRoutingPlan:
  """A plan without choices: every slot holds a mixture of tokens, and every token gets a mixture of slots.

  Attributes:
    dispatch: float32[G, S, E, C], weight of token s in slot c of expert e.
    combine: float32[G, S, E, C], weight of that slot's output in the token's.
  """

  dispatch: Array
  combine: Array

  def dispatch_array(self, dtype: Dtype) -> Array:
    """As `RoutingPlan.dispatch_array`, with weights for ones."""
    return self.dispatch.astype(dtype)

  def combine_array(self, dtype: Dtype) -> Array:
    """As `RoutingPlan.combine_array`."""
    return self.combine.astype(dtype)


class DensePlan(Protocol):
  """What one-hot dispatchers need of a plan."""

  def dispatch_array(self, dtype: Dtype) -> Array: ...
  def combine_array(self, dtype: Dtype) -> Array: ...


def assign_slots(expert_index: Array, num_experts: int, valid: Array, priority: Array | None = None) -> Array:
  """Gives every choice the next free slot of its expert: first choices before second, then in token order.

  Args:
    expert_index: int32[G, S, K].
    num_experts: E.
    valid: bool[G, S]; padding takes no slot.
    priority: float32[G, S], to go by instead of token order, highest first (Batch Prioritized Routing, Riquelme et al.
      2021). Not causal: whether a token is dropped then depends on later ones.

  Returns:
    int32[G, S, K]. The caller's capacity decides which slots exist; padding gets S * K, which never does.
  """
  groups, tokens, choices = expert_index.shape
  if priority is not None:
    order = jnp.argsort(-priority, axis=1, stable=True)
    slots = assign_slots(
      jnp.take_along_axis(expert_index, order[..., None], axis=1),
      num_experts,
      jnp.take_along_axis(valid, order, axis=1),
    )
    return jnp.take_along_axis(slots, jnp.argsort(order, axis=1)[..., None], axis=1)
  one_hot = jax.nn.one_hot(expert_index, num_experts, dtype=jnp.int32) * valid[:, :, None, None]
  in_order = one_hot.swapaxes(1, 2).reshape(groups, choices * tokens, num_experts)
  before = jnp.cumsum(in_order, axis=1) - in_order
  slot = jnp.sum(before * in_order, axis=-1).reshape(groups, choices, tokens).swapaxes(1, 2)
  return jnp.where(valid[:, :, None], slot, tokens * choices)
