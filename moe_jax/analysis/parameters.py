"""How many parameters a model has, how many work on a token, and how many bytes each device holds."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from moe_jax.moe.moe_layer import MoELayer

PyTree = Any


class ParameterCount(NamedTuple):
  """Attributes: total, all parameters; active, those that work on one token (of E experts only the chosen)."""

  total: int
  active: int


def count_parameters(model: nn.Module, batch_spec: Mapping[str, jax.ShapeDtypeStruct]) -> ParameterCount:
  """Counts from shapes alone. Every expert layer is asked how many experts it runs per token."""
  totals, actives = zip(*parameter_sizes(model, batch_spec).values())
  return ParameterCount(sum(totals), round(sum(actives)))


def parameter_sizes(
  model: nn.Module, batch_spec: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[tuple[str, ...], tuple[int, float]]:
  """As `count_parameters`, of every array by its path."""
  shares: dict[tuple[str, ...], float] = {}

  def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    layer = context.module
    if isinstance(layer, MoELayer) and context.method_name == '__call__':
      router = layer.router(num_experts=layer.num_experts, parent=None)
      shares[(*layer.path, 'experts')] = router.choices_per_token / layer.num_experts
    return call(*args, **kwargs)

  def init(key: jax.Array, batch: Any) -> PyTree:
    with nn.intercept_methods(watch):
      return nn.unbox(model.init(key, batch))['params']

  key = jax.eval_shape(lambda: jax.random.key(0))
  shapes = jax.eval_shape(init, key, dict(batch_spec))
  sizes = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    names = tuple(entry.key for entry in path)
    size = math.prod(leaf.shape)
    share = next((share for prefix, share in shares.items() if names[: len(prefix)] == prefix), 1.0)
    sizes[names] = (size, size * share)
  return sizes


def dispatch_bytes(model: nn.Module, batch_spec: Mapping[str, jax.ShapeDtypeStruct]) -> int:
  """Of the rows that a device holds on the way to the experts and on the way home, in the layer that has the most.

  Static shapes make this the worst case too. Call it inside `sharding.activate`, in whose mesh the layers are.
  """
  most = [0]

  def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    result = call(*args, **kwargs)
    if isinstance(context.module, MoELayer) and context.method_name == 'dispatch':
      y, journey = result
      most.append(2 * journey.rows * y.shape[-1] * y.dtype.itemsize)
    return result

  def init(key: jax.Array, batch: Any) -> PyTree:
    with nn.intercept_methods(watch):
      return nn.unbox(model.init(key, batch, train=True))

  key = jax.eval_shape(lambda: jax.random.key(0))
  jax.eval_shape(init, {'params': key, 'dropout': key, 'router': key}, dict(batch_spec))
  return max(most)


def bytes_per_device(spec: PyTree) -> int:
  """Bytes of a tree of `ShapeDtypeStruct`s with shardings that the fullest device holds."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(spec)
  )
