"""Filling the experts' buffers and reading them, by gathers alone, forward and backward.

A slot knows its token and a choice its slot, so either side can fetch from the other. The transpose of fetching one way
is fetching the other way: no rows of activations are ever added up by a scatter, which is slow on TPUs and unordered on
GPUs. Only the map itself, of integers, is made by one. (The exception is a plan in which every expert counts as a
choice of every token, as in expert choice: there the few slots are scattered, not the many choices fetched.)

Nothing is masked that need not be: an empty slot holds some token, whose answer nobody reads and whose gradient has
weight 0.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.types import Array


class SlotMap(NamedTuple):
  """Who sits where.

  Attributes:
    token_of_slot: int32[G, N] of N slots, in a plan E * C; some token where the slot is empty.
    slot_of_choice: int32[G, S, K]; N where the choice is dropped or not made.
  """

  token_of_slot: Array
  slot_of_choice: Array

  @property
  def seated(self) -> Array:
    """bool[G, S, K], choices that have a slot."""
    return self.slot_of_choice < self.token_of_slot.shape[1]

  @property
  def crowded(self) -> bool:
    """Whether tokens have many more choices than there are slots."""
    return self.slot_of_choice.size > 2 * self.token_of_slot.size


def slot_map(slot_of_choice: Array, total: int) -> SlotMap:
  """The map of choices int32[G, S, K] to as many slots; `total` where a choice has none."""
  token = jnp.broadcast_to(jnp.arange(slot_of_choice.shape[1], dtype=jnp.int32)[:, None], slot_of_choice.shape)
  return SlotMap(_scattered(token, slot_of_choice, total), slot_of_choice)


@jax.custom_vjp
def fill(tokens: Array, where: SlotMap) -> Array:
  """The token of each slot: float[G, S, M] -> float[G, N, M]."""
  return _rows(tokens, where.token_of_slot)


def _fill_forward(tokens: Array, where: SlotMap) -> tuple[Array, SlotMap]:
  return fill(tokens, where), where


def _fill_backward(where: SlotMap, gradient: Array) -> tuple[Array, None]:
  return _weighed(_by_choice(gradient, where), where.seated.astype(jnp.float32), where), None


def read(slots: Array, weights: Array, where: SlotMap) -> Array:
  """The sum of a token's choices by weight: float[G, N, M], float32[G, S, K] -> float[G, S, M]."""
  return read_deferred(weigh_gradient(slots, slot_weights(weights, where)), weights, where)


@jax.custom_vjp
def read_deferred(slots: Array, weights: Array, where: SlotMap) -> Array:
  """As `read`, but gradients come to the slots without weights, and an empty slot gets some token's.

  Who computed what is in the slots has to multiply them by `slot_weights`, 0 where empty: matmuls do it on the way, and
  TPUs are spared a pass over all rows.
  """
  return _read_forward(slots, weights, where)[0]


def _read_forward(slots: Array, weights: Array, where: SlotMap) -> tuple[Array, tuple[Array, SlotMap]]:
  rows = _by_choice(slots, where)
  return _weighed(rows, jnp.where(where.seated, weights, 0), where), (rows, where)


def _read_backward(saved: tuple[Array, SlotMap], gradient: Array) -> tuple[Array, Array, None]:
  rows, where = saved
  to_slots = _rows(gradient, where.token_of_slot)
  if where.crowded:
    dots = _dots('gnm,gnm->gn', to_slots, rows)
    dots = jnp.take_along_axis(dots[:, None], where.slot_of_choice, axis=2, mode='clip')
  else:
    dots = jnp.stack([_dots('gsm,gsm->gs', gradient, rows[:, k]) for k in range(rows.shape[1])], -1)
  return to_slots, jnp.where(where.seated, dots, 0), None


def slot_weights(weights: Array, where: SlotMap) -> Array:
  """Of each slot's choice: float32[G, S, K] -> float32[G, N]; 0 where the slot is empty.

  Constants: second derivatives of `read` lack a term, and nothing says so.
  """
  return _seat(jax.lax.stop_gradient(weights), where)


@jax.custom_vjp
def weigh_gradient(rows: Array, weights: Array) -> Array:
  """The rows float[..., M] as they are; their gradients are multiplied by weights float[...], which have none."""
  del weights
  return rows


def _weigh_backward(weights: Array, gradient: Array) -> tuple[Array, None]:
  return weights[..., None].astype(gradient.dtype) * gradient, None


fill.defvjp(_fill_forward, _fill_backward)
read_deferred.defvjp(_read_forward, _read_backward)
weigh_gradient.defvjp(lambda rows, weights: (rows, weights), _weigh_backward)


def _by_choice(slots: Array, where: SlotMap) -> Array:
  """The slots of all choices, float[G, K, S, M]; of which TPUs would pad S, K to S, 8. If it is crowded, the slots."""
  if where.crowded:
    return slots
  groups, tokens, choices = where.slot_of_choice.shape
  there = jnp.minimum(jnp.moveaxis(where.slot_of_choice, 2, 1), slots.shape[1] - 1).reshape(groups, -1)
  return _rows(slots, there).reshape(groups, choices, tokens, -1)


def _weighed(rows: Array, weights: Array, where: SlotMap) -> Array:
  """The sum of what `_by_choice` gives by weights float32[G, S, K], float[G, S, M]; accumulated in float32."""
  if where.crowded:
    shares = _seat(weights, where)[..., None] * rows.astype(jnp.float32)
    total = jnp.zeros((*weights.shape[:2], rows.shape[-1]), jnp.float32)
    add = jax.vmap(lambda total, token, share: total.at[token].add(share))
    total = add(total, where.token_of_slot, shares)
  else:
    by_choice = jnp.moveaxis(weights, 2, 1)[..., None]  # a sum over an axis of K would cost TPUs twice as much
    parts = (by_choice[:, k] * rows[:, k].astype(jnp.float32) for k in range(rows.shape[1]))
    total = functools.reduce(jnp.add, parts)
  return total.astype(rows.dtype)


def _rows(x: Array, index: Array) -> Array:
  """x[g, index[g, n]]: float[G, N, M], int32[G, n] -> float[G, n, M]."""

  def get(x: Array, index: Array) -> Array:
    return jnp.asarray(x).at[index].get(mode='promise_in_bounds')

  return get(x[0], index[0])[None] if len(x) == 1 else jax.vmap(get)(x, index)


def _seat(values: Array, where: SlotMap) -> Array:
  """Of each slot's choice: [G, S, K] -> [G, N]; 0 where the slot is empty."""
  return _scattered(values, where.slot_of_choice, where.token_of_slot.shape[1])


def _scattered(values: Array, slot: Array, total: int) -> Array:
  groups = len(values)
  seat = jax.vmap(lambda slot, value: jnp.zeros(total, values.dtype).at[slot].set(value, mode='drop'))
  return seat(slot.reshape(groups, -1), values.reshape(groups, -1))


def _dots(equation: str, a: Array, b: Array) -> Array:
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
