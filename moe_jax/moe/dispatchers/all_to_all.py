"""Explicit expert parallelism: `shard_map`, with one all-to-all over the expert axis out and one home.

Each device fills buffers for all experts from its own groups, sends each expert's buffers to the device that holds the
expert, and weighs the answers when they are back. The sharding cannot get lost, since it is written down.
"""

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from moe_jax.moe.experts import ExpertBank, Weights
from moe_jax.moe.routing_plan import Plan
from moe_jax.sharding import axes_of, spec
from moe_jax.types import Array


def all_to_all(experts: ExpertBank, tokens: Array, plan: Plan) -> Array:
  """See `Dispatcher`."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return _journey(experts.weights, tokens, plan, experts, expert_axis=None, hidden_axis=None)
  (expert_axis,), (hidden_axis,) = spec('expert'), spec('expert_mlp')
  weight_specs = {name: spec(*names) for name, names in experts.axes.items()}

  def local(weights: Weights, tokens: Array, plan: Plan) -> Array:
    weights = {name: _whole(weights[name], names, weight_specs[name], mesh) for name, names in experts.axes.items()}
    return _journey(weights, tokens, plan, experts, expert_axis, hidden_axis)

  by_group = spec('batch', None, None)
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(weight_specs, by_group, jax.tree.map(lambda _: by_group, plan)),
    out_specs=by_group,
  )(experts.weights, tokens, plan)


def _whole(weight: Array, names: tuple[str | None, ...], where: PartitionSpec, mesh: AbstractMesh) -> Array:
  """A device's experts whole: gathered where they are split for memory alone (FSDP), and their gradients scattered.

  Over mesh axes along which the weight is the same everywhere its gradient is summed. Both in the weight's dtype.
  """
  for axis, (name, entry) in enumerate(zip(names, where, strict=True)):
    if entry and name not in ('expert', 'expert_mlp'):
      weight = jax.lax.all_gather(weight, entry, axis=axis, tiled=True)
  split = [axis for entry in where for axis in axes_of(entry)]
  return jax.lax.pcast(weight, tuple(axis for axis in mesh.axis_names if axis not in split), to='varying')


def _journey(
  weights: Weights,
  tokens: Array,
  plan: Plan,
  experts: ExpertBank,
  expert_axis: str | None,
  hidden_axis: str | None,
) -> Array:
  """The journey of one device's groups; arrays are local shards, float[g, S, M]."""
  if hidden_axis:  # so that gradients, partial sums over hidden shards, are completed where they are smallest too
    tokens, plan = jax.tree.map(lambda x: jax.lax.pcast(x, hidden_axis, to='varying'), (tokens, plan))
  slots = plan.fill(tokens)
  if expert_axis:  # [g, E, C, M] -> [g * n, E / n, C, M]
    slots = jax.lax.all_to_all(slots, expert_axis, split_axis=1, concat_axis=0, tiled=True)
  slots = experts.apply(weights, slots)
  if expert_axis:
    slots = jax.lax.all_to_all(slots, expert_axis, split_axis=0, concat_axis=1, tiled=True)
  outputs = plan.read(slots)
  # Each shard of the hidden axis holds a partial sum. It is completed after combining, where it is smallest.
  return jax.lax.psum(outputs, hidden_axis) if hidden_axis else outputs
