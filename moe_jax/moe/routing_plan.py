"""A router's decision, in a form every dispatcher can read, and the arithmetic of expert buffers.

Letters: G groups, S tokens a group, E experts, C capacity (slots per expert per group), K choices a token.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from moe_jax.moe.slots import SlotMap, fill, read_deferred, slot_map, slot_weights
from moe_jax.types import Array, ConfigError, Dtype


@struct.dataclass
class RoutingPlan:
  """Which experts see which tokens, and with what weight their answers come home.

  Attributes:
    expert_index: int32[G, S, K], which expert; -1 where the choice is not made.
    slot_index: int32[G, S, K], place in its buffer; `capacity` or more where the choice is dropped or not made.
    combine_weight: float32[G, S, K]; 0 where dropped or not made.
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

  @property
  def groups(self) -> int:
    """G."""
    return len(self.slot_index)

  @property
  def slots(self) -> int:
    """E * C, the slots of a group."""
    return self.num_experts * self.capacity

  @property
  def slots_per_choice(self) -> float:
    """Above 1 some slots must stay empty."""
    return self.slots / (self.slot_index.shape[1] * self.slot_index.shape[2])

  def merged(self) -> 'RoutingPlan':
    """The same as of one group, [1, G S, K]: in its buffers those of the groups stand side by side, G C slots each."""
    groups, _, choices = self.expert_index.shape
    place = self.slot_index + self.capacity * jnp.arange(groups, dtype=jnp.int32)[:, None, None]
    return RoutingPlan(
      self.expert_index.reshape(1, -1, choices),
      jnp.where(self.kept, place, groups * self.capacity).reshape(1, -1, choices),
      self.combine_weight.reshape(1, -1, choices),
      self.num_experts,
      groups * self.capacity,
    )

  def choices(self) -> 'RoutingPlan':
    """The plan itself, for a dispatcher that carries choices one by one."""
    return self

  def dispatch_array(self, dtype: Dtype) -> Array:
    """0/1 [G, S, E, C]: token s of group g sits in slot c of expert e."""
    return self._placed(jnp.ones_like(self.combine_weight), dtype)

  def combine_array(self, dtype: Dtype) -> Array:
    """[G, S, E, C]: the dispatch array times the combine weights."""
    return self._placed(self.combine_weight, dtype)

  def fill(self, tokens: Array) -> Array:
    """The buffers of all experts, by gathers: float[G, S, M] -> float[G, E, C, M]; an empty slot holds some token."""
    slots = fill(tokens, self._map)
    return slots.reshape(len(slots), self.num_experts, self.capacity, -1)

  def read(self, slots: Array) -> Array:
    """What comes home, by gathers: float[G, E, C, M] -> float[G, S, M], the choices of each token by weight.

    Gradients go back without `gradient_weight`, which is left to who computed the answers.
    """
    return read_deferred(slots.reshape(len(slots), -1, slots.shape[-1]), self.combine_weight, self._map)

  def gradient_weight(self, dtype: Dtype) -> Array:
    """[G, E, C], the combine weight of the choice in each slot; 0 where it is empty."""
    weights = slot_weights(self.combine_weight, self._map).astype(dtype)
    return weights.reshape(-1, self.num_experts, self.capacity)

  @property
  def _map(self) -> SlotMap:
    slot = jnp.where(self.kept, self.expert_index * self.capacity + self.slot_index, self.slots)
    return slot_map(slot, self.slots)

  def _placed(self, weight: Array, dtype: Dtype) -> Array:
    expert = jax.nn.one_hot(self.expert_index, self.num_experts, dtype=dtype) * weight[..., None].astype(dtype)
    slot = jax.nn.one_hot(self.slot_index, self.capacity, dtype=dtype)  # all zero where dropped
    return jnp.einsum('gske,gskc->gsec', expert, slot)


class CapacityRule(NamedTuple):
  """How a capacity factor becomes slots per expert per group.

  Attributes:
    per_choice: the factor counts choices, K a token (k inside), and not tokens (k outside).
    rounding: of slots that are not whole.
    least: slots, at the fewest.
    multiple_of: slots come in multiples of this.
  """

  per_choice: bool = False
  rounding: Callable[[float], int] = math.floor
  least: int = 1
  multiple_of: int = 1


# The same factor means different slots in different codebases, and their published numbers go with their rules.
CAPACITY_RULES = {
  'gshard': CapacityRule(multiple_of=4),  # Lingvo: GShard, GLaM
  'mesh': CapacityRule(least=4),  # Mesh TensorFlow: Switch, ST-MoE
  'flaxformer': CapacityRule(rounding=round, least=4),
  'vmoe': CapacityRule(per_choice=True, rounding=math.ceil, multiple_of=4),
  'megablocks': CapacityRule(per_choice=True),
  'deepspeed': CapacityRule(rounding=math.ceil, least=4),
  'tpu': CapacityRule(per_choice=True, rounding=math.ceil, multiple_of=8),  # whole tiles: else buffers are copied
}


def expert_capacity(tokens: int, num_experts: int, factor: float, choices: float = 1, rule: str = 'gshard') -> int:
  """Slots per expert per group: factor * tokens / E, made whole as the rule says.

  Args:
    tokens: S, of a group.
    num_experts: E.
    factor: the capacity factor.
    choices: K, choices a token, which only the rules with k inside count.
    rule: one of `CAPACITY_RULES`.

  Raises:
    ConfigError: if there is no such rule.
  """
  if rule not in CAPACITY_RULES:
    raise ConfigError(f'No capacity rule {rule!r}: choose among {", ".join(CAPACITY_RULES)}.')
  per_choice, rounding, least, multiple_of = CAPACITY_RULES[rule]
  slots = factor * tokens * (choices if per_choice else 1) / num_experts
  # What float noise adds or takes is forgiven: 1.1 * 100 / 10 is 11 slots, neither 10 nor 12.
  whole = max(rounding(round(slots, 6)), least)
  return math.ceil(whole / multiple_of) * multiple_of


@struct.dataclass
class SoftRoutingPlan:
  """A plan without choices: every slot holds a mixture of tokens, and every token gets a mixture of slots.

  Attributes:
    dispatch: float32[G, S, E, C], weight of token s in slot c of expert e.
    combine: float32[G, S, E, C], weight of that slot's output in the token's.
  """

  dispatch: Array
  combine: Array

  @property
  def groups(self) -> int:
    """G."""
    return len(self.dispatch)

  @property
  def slots(self) -> int:
    """As `RoutingPlan.slots`."""
    return self.dispatch.shape[2] * self.dispatch.shape[3]

  @property
  def slots_per_choice(self) -> float:
    """Every slot is full."""
    return 1.0

  def merged(self) -> 'SoftRoutingPlan':
    """The plan itself: its groups cannot be."""
    return self

  def choices(self) -> RoutingPlan:
    """There are none.

    Raises:
      ConfigError: always.
    """
    raise ConfigError('Soft routing mixes tokens and chooses none: its DISPATCHER is einsum, gather or all_to_all.')

  def dispatch_array(self, dtype: Dtype) -> Array:
    """As `RoutingPlan.dispatch_array`, with weights for ones."""
    return self.dispatch.astype(dtype)

  def combine_array(self, dtype: Dtype) -> Array:
    """As `RoutingPlan.combine_array`."""
    return self.combine.astype(dtype)

  def fill(self, tokens: Array) -> Array:
    """As `RoutingPlan.fill`, by an einsum."""
    return jnp.einsum('gsec,gsm->gecm', self.dispatch_array(tokens.dtype), tokens)

  def read(self, slots: Array) -> Array:
    """As `RoutingPlan.read`, by an einsum."""
    return jnp.einsum('gsec,gecm->gsm', self.combine_array(slots.dtype), slots)

  def gradient_weight(self, dtype: Dtype) -> None:
    """`read` leaves nothing to weigh."""
    del dtype


class Plan(Protocol):
  """What dispatchers need of a plan: to fill buffers and to read them, either way as it likes or by one-hot arrays.

  A dispatcher that uses `read` runs its experts by `ExpertBank.answer`, with `gradient_weight` sent the way of the
  tokens: else gradients lack the combine weights.
  """

  @property
  def groups(self) -> int: ...
  @property
  def slots(self) -> int: ...
  @property
  def slots_per_choice(self) -> float: ...
  def merged(self) -> 'Plan': ...
  def choices(self) -> RoutingPlan: ...
  def dispatch_array(self, dtype: Dtype) -> Array: ...
  def combine_array(self, dtype: Dtype) -> Array: ...
  def fill(self, tokens: Array) -> Array: ...
  def read(self, slots: Array) -> Array: ...
  def gradient_weight(self, dtype: Dtype) -> Array | None: ...


def assign_slots(expert_index: Array, num_experts: int, valid: Array, priority: Array | None = None) -> Array:
  """Gives every choice the next free slot of its expert: first choices before second, then in token order.

  Args:
    expert_index: int32[G, S, K]; -1 where a choice is not made, and takes no slot.
    num_experts: E.
    valid: bool[G, S]; padding takes no slot.
    priority: float32[G, S], to go by instead of token order, highest first (Batch Prioritized Routing, Riquelme et al.
      2021). Not causal: whether a token is dropped then depends on later ones.

  Returns:
    int32[G, S, K]. The caller's capacity decides which slots exist; who takes none gets S * K, which never does.
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
  made = valid[:, :, None] & (expert_index >= 0)
  asked = jnp.where(made, expert_index, num_experts).swapaxes(1, 2).reshape(groups, choices * tokens)
  place = jnp.broadcast_to(jnp.arange(tokens * choices, dtype=jnp.int32), asked.shape)
  expert, order = jax.lax.sort((asked, place), num_keys=1, is_stable=True)
  starts = jnp.concatenate([jnp.ones_like(expert[:, :1], bool), expert[:, 1:] != expert[:, :-1]], axis=1)
  rank = place - jax.lax.cummax(jnp.where(starts, place, 0), axis=1)
  slot = jax.vmap(lambda order, rank: jnp.zeros_like(rank).at[order].set(rank, unique_indices=True))(order, rank)
  return jnp.where(made, slot.reshape(groups, choices, tokens).swapaxes(1, 2), tokens * choices)


def reroute(preferences: Array, num_experts: int, valid: Array, capacity: int, wanted: int) -> Array:
  """Who finds an expert full asks the next it prefers, until it holds `wanted` (Fedus et al. 2021, appendix B).

  In rounds: in round p every token that holds too few asks for its p-th preference, in token order.

  Args:
    preferences: int32[G, S, P], different experts, best first.
    num_experts: E.
    valid: bool[G, S].
    capacity: C.
    wanted: experts a token is to hold.

  Returns:
    The preferences, int32[G, S, P], with -1 for those that were not asked for, or were full.
  """
  held = jnp.zeros(valid.shape, jnp.int32)
  taken = jnp.zeros((valid.shape[0], num_experts), jnp.int32)
  given = []
  for choice in jnp.moveaxis(preferences, -1, 0):
    asked = jax.nn.one_hot(choice, num_experts, dtype=jnp.int32) * (valid & (held < wanted))[..., None]
    place = taken[:, None] + jnp.cumsum(asked, axis=1)  # counted from 1
    got = asked * (place <= capacity)
    taken += jnp.sum(got, axis=1)
    held += jnp.sum(got, axis=-1)
    given.append(jnp.where(jnp.sum(got, axis=-1) > 0, choice, -1))
  return jnp.stack(given, axis=-1)
