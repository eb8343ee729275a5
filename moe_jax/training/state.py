"""What training carries from step to step, and where each piece of it lives."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax import sharding
from moe_jax.objectives import Objective
from moe_jax.types import Array, ConfigError, path_name

PyTree = Any
# An optimizer is told the logical axis names of each parameter: some treat layers and experts as separate matrices.
OptimizerFactory = Callable[[PyTree], optax.GradientTransformation]


@struct.dataclass
class TrainState:
  """Attributes: step int32[]; params and opt_state; variables, the model's other collections (routers' memories)."""

  step: Array
  params: PyTree
  opt_state: PyTree
  variables: PyTree


def abstract_variables(objective: Objective, batch_spec: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[PyTree, PyTree]:
  """Shapes of the model's variables, and their logical axis names as a tree of tuples; computes nothing."""

  def init(key: Array, batch: Mapping[str, Array]) -> PyTree:
    return objective.model.init(key, batch)

  boxed = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)), dict(batch_spec))
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
  shapes = jax.tree.map(lambda x: x.value if is_box(x) else x, boxed, is_leaf=is_box)
  names = jax.tree.map(lambda x: Names(x.names if is_box(x) else (None,) * x.ndim), boxed, is_leaf=is_box)
  return shapes, names


class Names(tuple):
  """Logical axis names of one array; a leaf of a tree, unlike a plain tuple."""


def init_state(
  objective: Objective,
  optimizer: OptimizerFactory,
  batch_spec: Mapping[str, jax.ShapeDtypeStruct],
  mesh: Mesh,
  seed: int = 0,
) -> tuple[Callable[[], TrainState], TrainState, optax.GradientTransformation]:
  """Prepares the first state. Call it inside `sharding.activate`.

  Args:
    objective: holds the model.
    optimizer: makes the gradient transformation from the parameters' axis names.
    batch_spec: shapes of a batch.
    mesh: where the state will live.
    seed: of the initial weights, which do not depend on the mesh.

  Returns:
    A function that makes the state in place on the mesh; the state's shapes and shardings; the gradient transformation.

  Raises:
    ConfigError: if an array does not divide over its mesh axes.
  """
  shapes, names = abstract_variables(objective, batch_spec)
  transform = optimizer(names['params'])

  def init() -> TrainState:
    key = jax.random.key(seed)
    batch = {name: jnp.zeros(s.shape, s.dtype) for name, s in batch_spec.items()}
    variables = dict(nn.unbox(objective.model.init(key, batch)))
    params = variables.pop('params')
    return TrainState(jnp.int32(0), params, transform.init(params), variables)

  params, variables = shapes['params'], {name: shape for name, shape in shapes.items() if name != 'params'}
  step = jax.ShapeDtypeStruct((), jnp.int32)
  abstract: Any = TrainState(step, params, jax.eval_shape(transform.init, params), variables)  # type: ignore[arg-type]
  param_shardings = _shardings(abstract.params, names['params'], mesh)
  shardings: Any = TrainState(
    step=NamedSharding(mesh, PartitionSpec()),  # type: ignore[arg-type]  # a state of shardings
    params=param_shardings,
    opt_state=follow_params(abstract.opt_state, abstract.params, param_shardings, mesh),
    variables=_shardings(abstract.variables, {k: v for k, v in names.items() if k != 'params'}, mesh),
  )
  state_spec = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
  return jax.jit(init, out_shardings=shardings), state_spec, transform


def _shardings(shapes: PyTree, names: PyTree, mesh: Mesh) -> PyTree:
  def place(path: Any, shape: jax.ShapeDtypeStruct, axes: Names) -> NamedSharding:
    placed = sharding.named_sharding(mesh, *axes)
    try:
      placed.shard_shape(shape.shape)
    except ValueError:
      _explain(path_name(path), shape.shape, axes, placed)
    return placed

  return jax.tree_util.tree_map_with_path(place, shapes, names)


def _explain(path: str, shape: tuple[int, ...], axes: Names, placed: NamedSharding) -> None:
  for size, axis, over in zip(shape, axes, placed.spec, strict=False):
    mesh_axes = () if over is None else (over,) if isinstance(over, str) else over
    ways = 1
    for mesh_axis in mesh_axes:
      ways *= placed.mesh.shape[mesh_axis]
    if size % ways:
      on = ' x '.join(mesh_axes)
      what = f'NUM_EXPERTS={size}' if axis == 'expert' else f'The {axis!r} axis of {path}, {size} wide,'
      raise ConfigError(
        f'{what} does not divide over the mesh axis {on} of {ways}: use a multiple of {ways}, or change MESH.'
      )


def follow_params(opt_state: PyTree, params: PyTree, param_shardings: PyTree, mesh: Mesh) -> PyTree:
  """Optimizer state lives where its parameter does, see `follow_specs`."""
  specs = follow_specs(opt_state, params, jax.tree.map(lambda placed: placed.spec, param_shardings))
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def follow_specs(opt_state: PyTree, params: PyTree, param_specs: PyTree) -> PyTree:
  """The PartitionSpecs of optimizer state; a factored second moment has lost one of the parameter's axes.

  Args:
    opt_state: shapes.
    params: shapes.
    param_specs: a PartitionSpec for each parameter, of mesh axes or of logical ones.
  """
  leaves = jax.tree_util.tree_leaves_with_path(params)
  table = {
    path: (leaf.shape, spec)
    for (path, leaf), spec in zip(leaves, jax.tree.leaves(param_specs, is_leaf=_is_spec), strict=True)
  }

  def place(path: Any, leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
    # Somewhere along the path to a piece of optimizer state lies the path of its parameter.
    for start, end in itertools.combinations(range(len(path) + 1), 2):
      if found := table.get(path[start:end]):
        shape, spec = found
        spec = (*spec, *(None,) * (len(shape) - len(spec)))
        if leaf.shape == shape:
          return PartitionSpec(*spec)
        for axis in range(len(shape)):
          if leaf.shape == shape[:axis] + shape[axis + 1 :]:
            return PartitionSpec(*spec[:axis], *spec[axis + 1 :])
    return PartitionSpec()

  return jax.tree_util.tree_map_with_path(place, opt_state)


def _is_spec(x: Any) -> bool:
  return isinstance(x, PartitionSpec)
