"""One expert layer, forward and backward, and what it can at best cost: what benchmarks and tests compile."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.layers.context import Context
from moe_jax.layers.mlp import apply_activations
from moe_jax.moe.dispatchers.base import Dispatcher
from moe_jax.moe.experts import Experts
from moe_jax.moe.moe_layer import MoELayer
from moe_jax.moe.routers.top_k import TopKRouter
from moe_jax.moe.routing_plan import expert_capacity


@dataclasses.dataclass(frozen=True)
class Shape:
  """Of a layer and its batch; the capacity factor counts choices (k inside)."""

  experts: int
  choices: int
  width: int
  hidden: int
  batch: int
  length: int
  group: int
  capacity_factor: float = 1.25
  capacity_rule: str = 'tpu'
  activations: tuple[str, ...] = ('gelu',)
  dtype: str = 'bfloat16'

  @property
  def capacity(self) -> int:
    """C."""
    factor = self.capacity_factor
    return expert_capacity(self.group, self.experts, factor, self.choices, rule=self.capacity_rule)

  @property
  def slots(self) -> int:
    """Of one expert, in the whole batch."""
    return self.batch * self.length // self.group * self.capacity

  @property
  def flops(self) -> float:
    """Of the experts' matmuls on all slots, forward and backward."""
    return 6 * self.slots * self.experts * self.width * self.hidden * (len(self.activations) + 1)


@dataclasses.dataclass(frozen=True)
class Program:
  """A function, the shapes and shardings of its arguments, and those of its results."""

  function: Callable[..., Any]
  arguments: tuple[Any, ...]
  out_shardings: Any

  def compile(self, options: Mapping[str, str] | None = None) -> jax.stages.Compiled:
    """For the devices of the arguments' shardings."""
    return jax.jit(self.function, out_shardings=self.out_shardings).lower(*self.arguments).compile(options)


def square(y: jax.Array) -> jax.Array:
  """A loss that needs every output."""
  return jnp.sum(jnp.square(y.astype(jnp.float32)))


def layer(shape: Shape, dispatcher: Dispatcher) -> MoELayer:
  """Top-k with normalised gates, no auxiliary loss."""
  router = functools.partial(
    TopKRouter,
    num_selected=shape.choices,
    gates='renormalised' if shape.choices > 1 else 'raw',
    capacity_factor=shape.capacity_factor,
    capacity_rule=shape.capacity_rule,
  )
  experts = functools.partial(Experts, hidden_dim=shape.hidden, activations=shape.activations, dtype=shape.dtype)
  return MoELayer(
    num_experts=shape.experts, group_size=shape.group, router=router, experts=experts, dispatcher=dispatcher
  )


def layer_program(shape: Shape, dispatcher: Dispatcher) -> Program:
  """Gradients to all weights and the input, under the active mesh and rules."""
  module = layer(shape, dispatcher)

  def output(params: Any, x: jax.Array) -> jax.Array:
    ones = jnp.ones((shape.batch, shape.length), jnp.int32)
    return module.apply({'params': params}, x, Context(ones, ones, jnp.float32(ones.size), train=True))[0]

  x = struct((shape.batch, shape.length, shape.width), shape.dtype, 'batch', None, None)
  router = struct((shape.width, shape.experts), jnp.float32, 'embed', None)
  return _gradients(output, {'router': {'kernel': router}, 'experts': expert_weights(shape)}, x)


def bare_program(shape: Shape) -> Program:
  """The limit: the experts' matmuls alone, on buffers that are full and in place."""

  def output(weights: Any, slots: jax.Array) -> jax.Array:
    branches = [jnp.einsum('enm,emf->enf', slots, weights[f'wi_{i}']) for i in range(len(shape.activations))]
    return jnp.einsum('enf,efm->enm', apply_activations(branches, shape.activations), weights['wo'])

  slots = struct((shape.experts, shape.slots, shape.width), shape.dtype, 'expert', 'expert_group', None)
  return _gradients(output, expert_weights(shape), slots)


def dense_program(shape: Shape) -> Program:
  """The dense feed-forward layer of equal active FLOPs."""
  hidden = shape.hidden * shape.choices

  def output(weights: Any, x: jax.Array) -> jax.Array:
    branches = [x @ weights[f'wi_{i}'] for i in range(len(shape.activations))]
    return apply_activations(branches, shape.activations) @ weights['wo']

  wi = struct((shape.width, hidden), shape.dtype, 'embed', 'mlp')
  weights = {f'wi_{i}': wi for i in range(len(shape.activations))}
  weights['wo'] = struct((hidden, shape.width), shape.dtype, 'mlp', 'embed')
  return _gradients(output, weights, struct((shape.batch, shape.length, shape.width), shape.dtype, 'batch', None, None))


def expert_weights(shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
  """As `Experts` makes them."""
  wi = struct((shape.experts, shape.width, shape.hidden), shape.dtype, 'expert', 'embed', 'expert_mlp')
  wo = struct((shape.experts, shape.hidden, shape.width), shape.dtype, 'expert', 'expert_mlp', 'embed')
  return {f'wi_{i}': wi for i in range(len(shape.activations))} | {'wo': wo}


def struct(shape: Sequence[int], dtype: Any, *names: str | None) -> jax.ShapeDtypeStruct:
  """An array that lives where the active rules say."""
  mesh = jax.sharding.get_mesh()
  where = None if mesh.empty else sharding.named_sharding(mesh, *names)
  return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=where)


def _gradients(output: Callable[..., jax.Array], weights: Any, x: jax.ShapeDtypeStruct) -> Program:
  gradients = jax.grad(lambda weights, x: square(output(weights, x)), argnums=(0, 1))
  where = jax.tree.map(lambda s: s.sharding, (weights, x))  # else XLA is free to gather what it returns
  return Program(gradients, (weights, x), where)
