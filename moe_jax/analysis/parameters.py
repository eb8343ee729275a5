"""How many parameters a model has, how many work on a token, and how many bytes each device holds."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from moe_jax import sharding
from moe_jax.models.stack import Stack
from moe_jax.moe.moe_layer import MoELayer

PyTree = Any


class ParameterCount(NamedTuple):
  """Attributes: total, all parameters; active, those that work on one token (of E experts only the chosen)."""

  total: int
  active: int


def count_parameters(model: nn.Module, batch_spec: Mapping[str, jax.ShapeDtypeStruct]) -> ParameterCount:
  """Counts from shapes alone. Every expert layer is asked how many experts it runs per token."""
  return total_count(parameter_sizes(model, batch_spec))


def total_count(sizes: Mapping[tuple[str, ...], tuple[int, float]]) -> ParameterCount:
  """The sums of `parameter_sizes`."""
  totals, actives = zip(*sizes.values())
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


class Exchange(NamedTuple):
  """Rows of activations on the way to the experts of one layer, and as many on the way home, in a training step.

  Attributes:
    repeats: how often the layer runs, as a scanned block does.
    rows: that each device holds.
    row_bytes: of each.
  """

  repeats: int
  rows: int
  row_bytes: int


def exchanges(model: nn.Module, batch_spec: Mapping[str, jax.ShapeDtypeStruct]) -> list[Exchange]:
  """Of every expert layer, from shapes alone. Call it inside `sharding.activate`, in whose mesh the layers are."""
  found: dict[tuple[str, ...], Exchange] = {}  # by path: what a scan traces twice is one layer
  repeats = [1]

  def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    module = context.module
    scanned = isinstance(module, Stack) and module.scan
    repeats.append(module.repeats if scanned else repeats[-1])
    result = call(*args, **kwargs)
    repeats.pop()
    if isinstance(module, MoELayer) and context.method_name == 'dispatch':
      y, journey = result
      found[module.path] = Exchange(repeats[-1], journey.rows, y.shape[-1] * y.dtype.itemsize)
    return result

  def init(key: jax.Array, batch: Any) -> PyTree:
    with nn.intercept_methods(watch):
      return nn.unbox(model.init(key, batch, train=True))

  key = jax.eval_shape(lambda: jax.random.key(0))
  jax.eval_shape(init, {'params': key, 'dropout': key, 'router': key}, dict(batch_spec))
  return list(found.values())


def dispatch_bytes(layers: Sequence[Exchange]) -> int:
  """Of the rows that a device holds out and home, in the layer that has the most; static shapes make it the worst."""
  return max((2 * layer.rows * layer.row_bytes for layer in layers), default=0)


def exchanged_bytes_per_token(layers: Sequence[Exchange], tokens: int) -> float:
  """Bytes that a forward pass sends to other devices, out and home, for each of a device's tokens.

  Rows, empty ones too, are spread evenly over the devices that share the experts, so that one in so many stays. Call it
  inside `sharding.activate`. Backward sends as much again.
  """
  leaving = 1 - 1 / sharding.shards('expert')
  return sum(2 * layer.repeats * layer.rows * layer.row_bytes for layer in layers) * leaving / tokens


def bytes_per_device(spec: PyTree) -> int:
  """Bytes of a tree of `ShapeDtypeStruct`s with shardings that the fullest device holds."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(spec)
  )
