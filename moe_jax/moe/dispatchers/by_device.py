"""Journeys written down device by device, in `shard_map`: what is exchanged, when, and over which mesh axis.

The sharding cannot get lost, since nothing is left to be inferred.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_jax.moe.experts import ExpertBank, Weights
from moe_jax.moe.routing_plan import Plan
from moe_jax.sharding import axes_of, spec
from moe_jax.types import Array, ConfigError, Metrics


@dataclasses.dataclass(frozen=True)
class Device:
  """The exchanges of one device with the others. Each is the identity where there is nobody to exchange with.

  Attributes:
    expert_axis: the mesh axis that experts are split over, or None.
    hidden_axis: the mesh axis that the hidden widths of experts are split over, or None.
    experts: along how many devices the experts are split.
    split_rows: whether, between their home and their experts, rows are split over the hidden axis too.
  """

  expert_axis: str | None = None
  hidden_axis: str | None = None
  experts: int = 1
  split_rows: bool = False

  def exchange(self, x: Array, split_axis: int, concat_axis: int) -> Array:
    """The all-to-all: an n-th of one axis to each of the n devices along the expert axis, and theirs on another."""
    if not self.expert_axis:
      return x
    return jax.lax.all_to_all(x, self.expert_axis, split_axis=split_axis, concat_axis=concat_axis, tiled=True)

  def exchange_rows(self, x: Array, sent: Array, received: Array) -> Array:
    """As `exchange` of one buffer for each device after another; where the network can, filled rows alone travel.

    Args:
      x: float[1, n N, M], N rows for each of the n devices.
      sent: int32[n], how many of them are filled, from each buffer's start.
      received: int32[n], how many of those that arrive are. Where `only_filled_rows_travel` the others are 0.
    """
    if not (self.expert_axis and only_filled_rows_travel()):
      return self.exchange(x, 1, 1)
    buffers = jnp.arange(self.experts) * (x.shape[1] // self.experts)
    mine = jnp.full_like(buffers, buffers[jax.lax.axis_index(self.expert_axis)])
    y = jnp.zeros_like(x[0])
    return jax.lax.ragged_all_to_all(x[0], y, buffers, sent, mine, received, axis_name=self.expert_axis)[None]

  def whole_rows(self, x: Array) -> Array:
    """[..., M / m] -> [..., M], before the experts."""
    if not self.split_rows:
      return x
    return jax.lax.all_gather(x, self.hidden_axis, axis=x.ndim - 1, tiled=True)

  def share_rows(self, x: Array) -> Array:
    """Partial sums [..., M] of hidden shards -> [..., M / m], after the experts."""
    if not self.split_rows:
      return x
    return jax.lax.psum_scatter(x, self.hidden_axis, scatter_dimension=x.ndim - 1, tiled=True)

  def complete(self, y: Array) -> Array:
    """The sum over hidden shards where that has been put off: after combining it is smallest."""
    return y if self.split_rows or not self.hidden_axis else jax.lax.psum(y, self.hidden_axis)


def only_filled_rows_travel() -> bool:
  """Whether the mesh is of a kind that is known to have a ragged all-to-all: on a whole pod of v5e it is refused."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device is not None and device.device_kind in ('TPU v5', 'TPU v6 lite')


LocalJourney = Callable[[Device, Weights, Array, Plan], tuple[Array, Metrics]]


def by_device(journey: LocalJourney, experts: ExpertBank, tokens: Array, plan: Plan) -> tuple[Array, Metrics]:
  """Runs a journey on every device's own groups, float[g, S, M], and experts, [E / n, ...].

  Args:
    journey: (device, weights, tokens, plan) -> outputs float[g, S, M], and counts by group, [g] each.
    experts: all of them.
    tokens: float[G, S, M].
    plan: of all groups.

  Returns:
    float[G, S, M], and the counts [G].

  Raises:
    ConfigError: if M does not divide over the devices that it has to be split over.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return journey(Device(), experts.weights, tokens, plan)
  (expert_axis,), (hidden_axis,) = spec('expert'), spec('expert_mlp')
  if not any('expert_mlp' in names for names in experts.axes.values()):
    hidden_axis = None  # these experts have no hidden widths to split: every device along that axis does the same
  expert_ways, hidden_ways = (mesh.shape[axis] if axis else 1 for axis in (expert_axis, hidden_axis))
  # Devices that share the hidden widths of the same experts could all fetch the same rows whole, and sum partial
  # answers at home. Where rows go far it is better for each to carry a part of every row: on a ring of n devices an
  # all-to-all takes n / 4 times as long as its bytes, and the all-gather that then makes rows whole does not.
  split_rows = expert_ways > 2 and hidden_ways > 1
  if split_rows and tokens.shape[-1] % hidden_ways:
    raise ConfigError(
      f'EMBED_DIM={tokens.shape[-1]} does not divide over the mesh axis model of {hidden_ways}: use a multiple of it.'
    )
  device = Device(expert_axis, hidden_axis, expert_ways, split_rows)
  weight_specs = {name: spec(*names) for name, names in experts.axes.items()}
  differing = (*axes_of(spec('group')[0]), *axes_of(hidden_axis))
  by_group, by_row = spec('group'), PartitionSpec(*spec('group', None), hidden_axis if split_rows else None)

  def local(weights: Weights, tokens: Array, plan: Plan) -> tuple[Array, Metrics]:
    weights = {
      name: _whole(weights[name], names, weight_specs[name], differing) for name, names in experts.axes.items()
    }
    if hidden_axis:  # so that gradients, partial sums over hidden shards, are completed where they are smallest too
      tokens = tokens if split_rows else jax.lax.pcast(tokens, hidden_axis, to='varying')
      plan = jax.tree.map(lambda x: jax.lax.pcast(x, hidden_axis, to='varying') if x.dtype.kind == 'f' else x, plan)
    y, counts = journey(device, weights, tokens, plan)
    return device.complete(y), counts

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(weight_specs, by_row, by_group),
    out_specs=(by_row, by_group),
  )(experts.weights, tokens, plan)


def _whole(weight: Array, names: tuple[str | None, ...], where: PartitionSpec, differing: tuple[str, ...]) -> Array:
  """A device's experts whole: gathered where they are split for memory alone (FSDP), and their gradients scattered.

  Over mesh axes along which the devices differ in what they do, and not in the weight, its gradient is summed. Both in
  the weight's dtype.
  """
  for axis, (name, entry) in enumerate(zip(names, where, strict=True)):
    if entry and name not in ('expert', 'expert_mlp'):
      # The TPU compiler makes no reduce-scatter along the last axis with parts narrower than 256: it would sum the
      # whole gradient on every device.
      weight = jax.lax.all_gather(weight.swapaxes(axis, 1), entry, axis=1, tiled=True).swapaxes(axis, 1)
  split = [axis for entry in where for axis in axes_of(entry)]
  return jax.lax.pcast(weight, tuple(axis for axis in differing if axis not in split), to='varying')
