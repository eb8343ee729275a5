"""How many parameters a model has, how many work on a token, and how many bytes each device holds and sends."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax import sharding
from moe_jax.analysis.forward_pass import Exchange, ForwardPass, Path

PyTree = Any


class ParameterCount(NamedTuple):
  """Attributes: total, all parameters; active, those that work on one token (of E experts only the chosen)."""

  total: int
  active: int


def count_parameters(forward: ForwardPass) -> ParameterCount:
  """The sums of `parameter_sizes`."""
  totals, actives = zip(*parameter_sizes(forward).values())
  return ParameterCount(sum(totals), round(sum(actives)))


def parameter_sizes(forward: ForwardPass) -> dict[Path, tuple[int, float]]:
  """Of every array by its path: its size, and how much of it works on a token."""
  sizes = {}
  for path, shape in forward.shapes.items():
    share = next((share for prefix, share in forward.active_shares.items() if path[: len(prefix)] == prefix), 1.0)
    sizes[path] = (math.prod(shape), math.prod(shape) * share)
  return sizes


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
