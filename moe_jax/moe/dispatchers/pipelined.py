"""Expert parallelism in pieces: while the experts of one piece compute, the rows of the next are on their way.

As `all_to_all`, with a part of each device's experts at a time, and every exchange made of collective permutes, one for
each distance around the expert axis: TPUs run these beside computation, and make all-to-alls wait. Pieces are of
experts, so that each weight is still read once.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.moe.dispatchers.all_to_all import all_to_all
from moe_jax.moe.dispatchers.base import Journey, full_buffers
from moe_jax.moe.dispatchers.by_device import Device, by_device
from moe_jax.moe.experts import ExpertBank, Weights
from moe_jax.moe.routing_plan import Plan
from moe_jax.notices import notice
from moe_jax.sharding import shards
from moe_jax.types import Array, Metrics

Pull = Callable[[Array], tuple[Weights, Array]]


def pipelined(experts: ExpertBank, tokens: Array, plan: Plan, pieces: int = 2) -> tuple[Array, Journey]:
  """See `Dispatcher`.

  Args:
    experts, tokens, plan: as for every dispatcher.
    pieces: in how many the experts of a device are taken, or as many as divide them evenly.

  Raises:
    ConfigError: if the plan makes no choices.
  """
  chosen, ways = plan.choices(), shards('expert')
  if ways == 1:
    return all_to_all(experts, tokens, plan)
  here = chosen.num_experts // ways  # experts of a device
  taken = math.gcd(pieces, here)
  if taken < pieces:
    notice(f'pipelined: {here} experts a device are taken in {taken} pieces, not {pieces}')
  each = here // taken

  def journey(device: Device, weights: Weights, tokens: Array, plan: Plan) -> tuple[Array, Metrics]:
    mine = plan.choices().merged()
    home, expert = jnp.divmod(mine.expert_index, here)
    away = (home - jax.lax.axis_index(device.expert_axis)) % ways  # how far around the axis the expert lives
    order = (expert // each * ways + away) * each + expert % each  # pieces first, then devices from this one on
    mine = dataclasses.replace(mine, expert_index=jnp.where(mine.expert_index < 0, -1, order))
    slots = mine.fill(tokens.reshape(1, -1, tokens.shape[-1]))
    slots = _pipeline(device, experts)(weights, slots.reshape(taken, ways, each, *slots.shape[2:]))
    return mine.read(slots.reshape(1, -1, *slots.shape[3:])).reshape(tokens.shape), {}

  y, _ = by_device(journey, experts, tokens, plan)
  return y, full_buffers(tokens, plan)


def _pipeline(device: Device, experts: ExpertBank) -> Callable[[Weights, Array], Array]:
  """(weights, float[pieces, n, e, C, M]) -> the same shape: rows for the device 0, 1, ... after this one, and answers.

  With its derivative written out, for the sake of the weights': each piece's gradients are put where they belong. JAX
  would pad them to the whole and add them up.
  """

  def out(rows: Array) -> Array:
    return jnp.stack([device.shift(part, i) for i, part in enumerate(rows)])

  def home(rows: Array) -> Array:
    return jnp.stack([device.shift(part, -i) for i, part in enumerate(rows)])

  def apply(weights: Weights, rows: Array) -> Array:
    return device.share_rows(experts.apply(weights, device.whole_rows(rows)))

  def forward(weights: Weights, slots: Array) -> tuple[Array, list[Pull]]:
    each, answers, pulls = slots.shape[2], [], []
    for i, rows in enumerate(slots):
      piece = {name: w[i * each : (i + 1) * each] for name, w in weights.items()}
      answer, pull = jax.vjp(apply, piece, out(rows))
      answers.append(home(answer))
      pulls.append(pull)
    return jnp.stack(answers), pulls

  def backward(pulls: list[Pull], gradient: Array) -> tuple[Weights, Array]:
    to_weights: Weights = {}
    to_slots = []
    for i, (pull, rows) in enumerate(zip(pulls, gradient, strict=True)):
      piece, answer = pull(out(rows))
      to_slots.append(home(answer))
      for name, part in piece.items():
        whole = to_weights.get(name, jax.lax.empty((len(pulls) * len(part), *part.shape[1:]), part.dtype))
        to_weights[name] = jax.lax.dynamic_update_slice_in_dim(whole, part, i * len(part), axis=0)
    return to_weights, jnp.stack(to_slots)

  run = jax.custom_vjp(lambda weights, slots: forward(weights, slots)[0])
  run.defvjp(forward, backward)
  return run
