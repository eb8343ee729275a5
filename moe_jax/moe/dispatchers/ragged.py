"""Dropless dispatch: every expert runs on as many rows as it is asked for, with no buffer of a fixed size for each.

Rows are sorted by expert and multiplied in blocks (MegaBlocks, Gale et al. 2022; see `grouped_matmul`). With expert
parallelism the rows from one device to another travel in a buffer whose size is fixed, as XLA wants it: as large as the
worst case asks, or bounded, and then what does not fit is counted. Where the network can, its empty rows stay at home.
"""

import math

import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.moe.dispatchers.base import Journey
from moe_jax.moe.dispatchers.by_device import Device, by_device
from moe_jax.moe.experts import ExpertBank, Weights
from moe_jax.moe.routing_plan import Plan, RoutingPlan
from moe_jax.moe.slots import fill, read, slot_map
from moe_jax.notices import notice
from moe_jax.types import Array, ConfigError, Metrics


def ragged(
  experts: ExpertBank, tokens: Array, plan: Plan, bound: float | None = None, block: int | None = None
) -> tuple[Array, Journey]:
  """See `Dispatcher`.

  Args:
    experts, tokens, plan: as for every dispatcher. What the plan drops stays dropped.
    bound: room between two devices, in multiples of the rows it would take if all experts were asked equally often.
      None is room for the worst case, in which nothing overflows.
    block: rows multiplied at once; None goes by how many an expert gets on average.

  Raises:
    ConfigError: if the plan makes no choices, or the experts run on buffers only.
  """
  chosen, run = plan.choices(), experts.grouped
  if run is None:
    raise ConfigError('These experts run on buffers only: their DISPATCHER is einsum, gather or all_to_all.')
  ways, choices = sharding.shards('expert'), chosen.expert_index.shape[2]
  here = chosen.num_experts // ways  # experts of a device
  asked = len(tokens) // sharding.shards('group') * tokens.shape[1] * choices  # by the tokens of a device
  room = asked // choices * min(choices, here)
  if bound is not None:
    room = min(room, _up(math.ceil(bound * asked / ways), 8))
  arriving = ways * room if ways > 1 else asked
  block = block or block_size(asked // here)
  padded = _up(arriving + here * (block - 1), block)

  if ways > 1:
    told = 'room for the worst case' if bound is None else f'{bound:g} times the even share'
    notice(f'ragged: a buffer of {room:,} rows from each device to each of {ways}, {told}')

  def run_here(weights: Weights, rows: Array, slot: Array, sizes: Array, weight: Array) -> Array:
    """Rows float[1, N, M] to the experts and back: slot int32[1, N, k], sizes int32[E], weight float32[1, N, k]."""
    where = slot_map(slot, padded)
    answers = run(weights, fill(rows, where)[0], -(-sizes // block), block)
    return read(answers[None], weight, where)

  def journey(device: Device, weights: Weights, tokens: Array, plan: Plan) -> tuple[Array, Metrics]:
    mine = plan.choices()
    expert, place, sizes = _as_one_group(mine)
    rows, weight = tokens.reshape(1, -1, tokens.shape[-1]), mine.combine_weight.reshape(1, -1, choices)
    if ways == 1:
      slot = jnp.where(expert < here, _starts(sizes, block)[expert] + place, padded)
      return run_here(weights, rows, slot, sizes, weight).reshape(tokens.shape), {}

    # Out. A device's buffer holds what its experts are asked for one after another.
    sizes = sizes.reshape(ways, here)
    spot = (jnp.cumsum(sizes, axis=1) - sizes).reshape(-1)[expert] + place
    made = expert < chosen.num_experts
    fits = made & (spot < room)
    where = slot_map(jnp.where(fits, expert // here * room + spot, arriving), arriving)
    sizes = jnp.diff(jnp.minimum(jnp.cumsum(sizes, axis=1), room), axis=1, prepend=0)
    sent = jnp.sum(sizes, axis=1)
    sizes = device.exchange(sizes, 0, 0)  # int32[n, E / n], which device asks how often for which expert
    ends, asked_of = jnp.cumsum(sizes, axis=1), jnp.sum(sizes, axis=0)
    rows = device.whole_rows(device.exchange_rows(fill(rows, where), sent, ends[:, -1]))

    # There. What an expert is asked for comes together, that from the first device first.
    shift = _starts(asked_of, block)[None] + jnp.cumsum(sizes, axis=0) - ends  # from a buffer's order to the experts'
    spot = jnp.arange(room)[None]
    slot = jnp.where(spot < ends[:, -1:], spot + _by_row(shift, ends - sizes, room), padded).reshape(1, arriving, 1)
    rows = run_here(weights, rows, slot, asked_of, jnp.ones_like(rows, jnp.float32, shape=slot.shape))

    # Home.
    rows = device.exchange_rows(device.share_rows(rows), ends[:, -1], sent)
    lost = jnp.sum(made & ~fits).astype(jnp.float32)
    return read(rows, weight, where).reshape(tokens.shape), {'overflow': jnp.full(len(tokens), lost / len(tokens))}

  y, counts = by_device(journey, experts, tokens, chosen)
  rows = padded + (arriving if ways > 1 else 0)
  return y, Journey(rows, jnp.sum(counts['overflow']) if counts else None)


def block_size(average: int) -> int:
  """Rows of a block, a power of two, for experts with so many rows on average: few are padding, none is a sliver."""
  return 2 ** min(max(int(average).bit_length() - 2, 4), 9)


def _as_one_group(plan: RoutingPlan) -> tuple[Array, Array, Array]:
  """The choices of several groups [g, S, K] as of one.

  Returns:
    int32[1, g S, K], the expert, E where dropped or not made; int32[1, g S, K], how many choices of that expert come
    before; int32[E], choices by expert.
  """
  groups, _, choices = plan.expert_index.shape
  expert = jnp.where(plan.kept, plan.expert_index, plan.num_experts)
  group = jnp.arange(groups)[:, None, None]
  sizes = jnp.zeros((groups, plan.num_experts), jnp.int32).at[group, expert].max(plan.slot_index + 1, mode='drop')
  place = plan.slot_index
  if groups > 1:
    place += (jnp.cumsum(sizes, axis=0) - sizes)[group, expert]
  return expert.reshape(1, -1, choices), place.reshape(1, -1, choices), jnp.sum(sizes, axis=0)


def _starts(sizes: Array, block: int) -> Array:
  """Where each expert's blocks begin, int32[E], given the rows of each."""
  padded = -(-sizes // block) * block
  return jnp.cumsum(padded) - padded


def _by_row(values: Array, starts: Array, rows: int) -> Array:
  """Spreads values int[n, e] over rows, each from its start on: int[n, rows]. Starts ascend; 0 is the first."""
  steps = jnp.diff(values, axis=1, prepend=0)
  spread = jnp.zeros((len(values), rows), values.dtype)
  spread = spread.at[jnp.arange(len(values))[:, None], starts].add(steps, mode='drop')
  return jnp.cumsum(spread, axis=1)


def _up(number: int, multiple: int) -> int:
  return -(-number // multiple) * multiple
