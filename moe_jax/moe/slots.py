"""Filling the experts' buffers and reading them, by gathers alone, forward and backward.

A slot knows its choice and a choice its slot, so either side can fetch from the other. The transpose of fetching one
way is fetching the other way: no rows of activations are ever added up by a scatter, which is slow on TPUs and
unordered on GPUs. Only the map itself, of integers, is made by one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.types import Array


class SlotMap(NamedTuple):
  """Who sits where.

  Attributes:
    choice_of_slot: int32[G, E * C], token * K + choice; S * K where the slot is empty.
    slot_of_choice: int32[G, S, K], expert * C + place; E * C where the choice is dropped or not made.
  """

  choice_of_slot: Array
  slot_of_choice: Array


def slot_map(expert_index: Array, slot_index: Array, num_experts: int, capacity: int) -> SlotMap:
  """The map of a plan's choices, int32[G, S, K] both; see `RoutingPlan`."""
  groups, tokens, choices = expert_index.shape
  total = num_experts * capacity
  slot = jnp.where(slot_index < capacity, expert_index * capacity + slot_index, total)
  choice = jnp.broadcast_to(jnp.arange(tokens * choices, dtype=jnp.int32), (groups, tokens * choices))
  empty = jnp.full((groups, total), tokens * choices, jnp.int32)
  seat = jax.vmap(lambda taken, where, who: taken.at[where].set(who, mode='drop'))
  return SlotMap(seat(empty, slot.reshape(groups, -1), choice), slot)


@jax.custom_vjp
def fill(tokens: Array, where: SlotMap) -> Array:
  """float[G, S, M] -> float[G, E * C, M], the token of each slot; 0 where it is empty."""
  return _rows(tokens, where.choice_of_slot // where.slot_of_choice.shape[-1])


def _fill_forward(tokens: Array, where: SlotMap) -> tuple[Array, SlotMap]:
  return fill(tokens, where), where


def _fill_backward(where: SlotMap, gradient: Array) -> tuple[Array, None]:
  return jnp.sum(_by_choice(gradient, where), axis=2), None


@jax.custom_vjp
def read(slots: Array, weights: Array, where: SlotMap) -> Array:
  """The sum of a token's choices by weight: float[G, E * C, M], float32[G, S, K] -> float[G, S, M]."""
  return jnp.einsum('gskm,gsk->gsm', _by_choice(slots, where), weights.astype(slots.dtype))


def _read_forward(slots: Array, weights: Array, where: SlotMap) -> tuple[Array, tuple[Array, Array, SlotMap]]:
  return read(slots, weights, where), (slots, weights, where)


def _read_backward(saved: tuple[Array, Array, SlotMap], gradient: Array) -> tuple[Array, Array, None]:
  slots, weights, where = saved
  per_token = weights.shape[-1]
  flat = weights.reshape(weights.shape[0], -1)
  weight = jnp.take_along_axis(flat, where.choice_of_slot, axis=1, mode='fill', fill_value=0).astype(gradient.dtype)
  to_slots = weight[..., None] * _rows(gradient, where.choice_of_slot // per_token)
  to_weights = jnp.einsum('gsm,gskm->gsk', gradient, _by_choice(slots, where), preferred_element_type=jnp.float32)
  return to_slots, to_weights.astype(weights.dtype), None


fill.defvjp(_fill_forward, _fill_backward)
read.defvjp(_read_forward, _read_backward)


def _rows(x: Array, index: Array) -> Array:
  """x[g, index[g, n]]: float[G, N, M], int32[G, n] -> float[G, n, M]; 0 where the index is N or more."""
  return jnp.take_along_axis(x, index[..., None], axis=1, mode='fill', fill_value=0)


def _by_choice(slots: Array, where: SlotMap) -> Array:
  """The slots of each token's choices, float[G, S, K, M]."""
  groups, tokens, choices = where.slot_of_choice.shape
  return _rows(slots, where.slot_of_choice.reshape(groups, -1)).reshape(groups, tokens, choices, slots.shape[-1])
