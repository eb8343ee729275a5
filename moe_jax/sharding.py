"""Where arrays live: the device mesh, and the rules from logical axis names to mesh axes.

Model code names logical axes ('expert', 'embed'); this file and `gin/meshes/` alone say which mesh axis holds them:

  replica  copies of everything; slices of a TPU that are linked by the data-centre network alone differ along it
  data     copies of everything, or shards of the weights (FSDP)
  expert   experts live along it; everywhere else it is more data parallelism, or by other rules more of the model's
  sequence pieces of each sequence, where one is too long for a device; attention gathers keys and values along it, and
           shards of the weights lie along it too (FSDP)
  model    tensor parallelism: heads, hidden widths, vocabulary
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.types import Array, ConfigError, Initializer

MESH_AXES = ('replica', 'data', 'expert', 'sequence', 'model')
AxisRules = Sequence[tuple[str, str | tuple[str, ...] | None]]

_ACTIVATIONS: AxisRules = (
  ('batch', ('replica', 'data', 'expert')),
  ('length', 'sequence'),
  ('group', ('replica', 'data', 'expert', 'sequence')),  # tokens that are routed together
  ('expert_group', ('replica', 'data', 'sequence')),  # groups as an expert sees them, after the all-to-all
)
_EXPERTS: AxisRules = (('expert', 'expert'), ('expert_mlp', 'model'))
_DENSE: AxisRules = (('vocab', 'model'), ('heads', 'model'), ('mlp', 'model'))
_WHOLE: AxisRules = (('layers', None), ('head_dim', None))


def replicated_rules() -> AxisRules:
  """Weights are whole on every data replica; experts, heads and hidden widths are split over their mesh axes."""
  return (*_ACTIVATIONS, *_EXPERTS, *_DENSE, *_WHOLE, ('embed', None))


def fsdp_rules() -> AxisRules:
  """As `replicated_rules`, and the 'embed' axis of every weight is split over the data-parallel devices (ZeRO-3)."""
  # Expert weights already use the expert axis, so theirs falls through to the second rule.
  split = (('embed', ('data', 'expert', 'sequence')), ('embed', ('data', 'sequence')))
  return (*_ACTIVATIONS, *_EXPERTS, *_DENSE, *_WHOLE, *split)


def tensor_over_experts_rules() -> AxisRules:
  """As `fsdp_rules`, but what is no expert layer takes the expert axis for tensor parallelism, not for more data.

  Its tokens then are whole along the expert axis, and are split over it on the way into an expert layer.
  """
  wide = tuple((name, ('expert', 'model')) for name, _ in _DENSE)
  tokens = (('batch', ('replica', 'data')), ('group', ('replica', 'data', 'sequence', 'expert')))
  return (*tokens, *_ACTIVATIONS, *_EXPERTS, *wide, *_WHOLE, ('embed', ('data', 'sequence')))


def data_model_rules() -> AxisRules:
  """On a mesh of 'data' and 'model' alone, such as T5X's own: experts live along the former, weights are replicated."""
  activations = (('batch', 'data'), ('length', None), ('group', 'data'), ('expert_group', None))
  return (*activations, ('expert', 'data'), ('expert_mlp', 'model'), *_DENSE, *_WHOLE, ('embed', None))


def mesh_shape(wish: Mapping[str, int], num_devices: int, num_experts: int = 0, num_slices: int = 1) -> dict[str, int]:
  """Fills in the -1s of a wished mesh shape.

  Args:
    wish: mesh axis -> size; a missing axis has size 1, and 'replica' that of the slices. 'expert': -1 takes the widest
      size that divides both the devices and the experts; 'data': -1 takes all devices that are left.
    num_devices: devices to use.
    num_experts: experts in a sparse layer; 0 for a dense model.
    num_slices: into which the devices fall; only replicas differ from slice to slice.

  Raises:
    ConfigError: if an axis is unknown, or the sizes do not multiply to the number of devices.
  """
  shape = {axis: wish.get(axis, 1) for axis in MESH_AXES} | {'replica': wish.get('replica', num_slices)}
  if unknown := sorted(set(wish) - set(MESH_AXES)):
    raise ConfigError(f'MESH has an unknown axis {unknown[0]!r}: choose among {", ".join(MESH_AXES)}.')
  if any(size < 1 and not (size == -1 and axis in ('data', 'expert')) for axis, size in shape.items()):
    raise ConfigError(f'MESH sizes are positive, or -1 on data or expert for "what fits", not {dict(wish)}.')
  if shape['expert'] == -1:
    free = max(1, num_devices // math.prod(size for size in shape.values() if size > 0))
    shape['expert'] = math.gcd(free, num_experts) if num_experts else 1
  if shape['data'] == -1:
    shape['data'] = max(1, num_devices // math.prod(size for size in shape.values() if size > 0))
  if math.prod(shape.values()) != num_devices:
    raise ConfigError(
      f'MESH {shape} needs {math.prod(shape.values())} devices and there are {num_devices}:'
      " change MESH (-1 on 'data' takes what is left), or FAKE_DEVICES on a CPU."
    )
  if shape['replica'] % num_slices:
    raise ConfigError(
      f"MESH has 'replica': {shape['replica']} and there are {num_slices} slices: use a multiple (only replicas may lie"
      ' in different slices, since the network between them is slow).'
    )
  return shape


def count_slices(devices: Sequence[jax.Device]) -> int:
  """Slices of a TPU: within each, chips are linked directly."""
  return len({getattr(device, 'slice_index', None) for device in devices}) if devices[0].platform == 'tpu' else 1


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Builds the mesh, placing neighbouring coordinates on neighbouring chips, and slices along the first axis."""
  if devices is None:
    devices = jax.devices()
  # Auto axes: `jax.make_mesh` now makes Explicit ones by default, under which constraints on activations are refused.
  types = (AxisType.Auto,) * len(MESH_AXES)
  sizes = tuple(shape.get(axis, 1) for axis in MESH_AXES)
  if devices[0].platform == 'cpu':  # no wiring to respect, and any subset of devices will do
    return Mesh(np.asarray(devices[: math.prod(sizes)]).reshape(sizes), MESH_AXES, axis_types=types)
  # Unlike `jax.make_mesh`, this also finds a place for axes that are no product of whole sides of the torus.
  if (slices := count_slices(devices)) > 1:
    within, across = (sizes[0] // slices, *sizes[1:]), (slices, *(1,) * len(sizes[1:]))
    placed = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
  else:
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return Mesh(placed, MESH_AXES, axis_types=types)


@contextlib.contextmanager
def activate(mesh: Mesh, rules: AxisRules) -> Iterator[None]:
  """The one way in: everything that initialises, traces or runs a model does so inside it."""
  # `jax.set_mesh`, not `with mesh:`; under the latter today's Flax drops logical constraints without a word.
  with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(rules)):
    yield


@contextlib.contextmanager
def whole_sequences() -> Iterator[None]:
  """Nothing is split along the sequence, such as where a text grows token by token: devices along it do the same."""
  rules = nn.get_logical_axis_rules()
  split = axes_of(dict(rules).get('length'))

  def where(name: str, axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    if name not in dict(_ACTIVATIONS):
      return axes
    return tuple(axis for axis in axes_of(axes) if axis not in split) or None

  with nn.logical_axis_rules(tuple((name, where(name, axes)) for name, axes in rules)):
    yield


def spec(*names: str | None) -> PartitionSpec:
  """The partition spec of an array whose axes have these logical names (None: not split) under the active rules."""
  rules = nn.get_logical_axis_rules()
  if unknown := [name for name in names if name is not None and name not in dict(rules)]:
    if rules:
      raise ConfigError(f'No rule says where the logical axis {unknown[0]!r} lives: add one to AXIS_RULES.')
    return PartitionSpec(*(None,) * len(names))
  return nn.logical_to_mesh_axes(names, rules) or PartitionSpec()


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """The mesh axes of one entry of a partition spec."""
  return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def named_sharding(mesh: Mesh, *names: str | None) -> NamedSharding:
  """As `spec`, on a mesh."""
  return NamedSharding(mesh, spec(*names))


def spread(mesh: Mesh, shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """An array of any model, its largest axis split over the whole mesh where that goes, lest a device hold it whole."""
  axis = max(range(len(shape.shape)), key=shape.shape.__getitem__, default=0)
  split = shape.shape and shape.shape[axis] % mesh.size == 0
  spec = PartitionSpec(*(None,) * axis, mesh.axis_names) if split else PartitionSpec()
  return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))


def constrain(x: Array, *names: str | None) -> Array:
  """Pins the layout of `x` by logical axis names; without an active mesh, does nothing."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(*names))


def shards(name: str) -> int:
  """Over how many devices the logical axis is split under the active mesh and rules; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return 1
  return math.prod(mesh.shape[axis] for axis in axes_of(spec(name)[0]))


def is_local() -> bool:
  """Whether arrays are what one device holds, here and now: without a mesh, and inside `shard_map`."""
  mesh = jax.sharding.get_abstract_mesh()
  return len(mesh.manual_axes) == len(mesh.axis_names)


def partitioned(initializer: Initializer, *names: str | None) -> Initializer:
  """An initializer whose parameter carries its logical axis names."""
  return nn.with_logical_partitioning(initializer, names)
