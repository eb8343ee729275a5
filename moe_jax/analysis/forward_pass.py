"""One forward pass in training, traced from shapes alone: where parameters, FLOPs and exchanged bytes are counted."""

import contextlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from moe_jax.layers.attention import CrossAttention, SelfAttention
from moe_jax.layers.embeddings import TokenEmbedding
from moe_jax.layers.mlp import Mlp
from moe_jax.models.stack import Stack
from moe_jax.moe.moe_layer import MoELayer
from moe_jax.moe.routers.base import Router

Path = tuple[str, ...]

# Kinds of modules -> what they are a part of. Of an expert layer, what is no expert's and no router's carries tokens.
PARTS = {
  SelfAttention: 'attention',
  CrossAttention: 'attention',
  Mlp: 'dense',
  Router: 'router',
  MoELayer: 'dispatch',
  TokenEmbedding: 'logits',
}


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


class ForwardPass(NamedTuple):
  """What was seen on the way.

  Attributes:
    shapes: path -> of every parameter.
    active_shares: path of a layer's experts -> the share of them that works on a token.
    exchanges: of every expert layer.
    jaxpr: the operations; those of a part are in a scope `[part]`, see `PARTS`.
    tokens: 'encoder', 'decoder' -> how many a batch has, padding too.
  """

  shapes: dict[Path, tuple[int, ...]]
  active_shares: dict[Path, float]
  exchanges: list[Exchange]
  jaxpr: Any
  tokens: dict[str, int]


def trace_forward(model: nn.Module, batch_spec: Mapping[str, jax.ShapeDtypeStruct]) -> ForwardPass:
  """Traces a model's first call, with which it makes its parameters.

  Call it inside `sharding.activate`: the mesh decides how experts are reached.
  """
  shares: dict[Path, float] = {}
  exchanges: dict[Path, Exchange] = {}  # by path: what a scan traces twice is one layer
  repeats = [1]

  def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    module, method = context.module, context.method_name
    part = next((part for kind, part in PARTS.items() if isinstance(module, kind)), None)
    scanned = isinstance(module, Stack) and module.scan
    repeats.append(module.repeats if scanned else repeats[-1])
    with jax.named_scope(f'[{part}]') if part else contextlib.nullcontext():
      result = call(*args, **kwargs)
    repeats.pop()
    if isinstance(module, MoELayer) and method == '__call__':
      router = module.router(num_experts=module.num_experts, parent=None)
      shares[(*module.path, 'experts')] = router.choices_per_token / module.num_experts
    if isinstance(module, MoELayer) and method == 'dispatch':
      y, journey = result
      exchanges[module.path] = Exchange(repeats[-1], journey.rows, y.shape[-1] * y.dtype.itemsize)
    return result

  def init(key: jax.Array, batch: Any) -> Any:
    with nn.intercept_methods(watch):
      return nn.unbox(model.init({'params': key, 'dropout': key, 'router': key}, batch, train=True))['params']

  key = jax.eval_shape(lambda: jax.random.key(0))
  traced, params = jax.make_jaxpr(init, return_shape=True)(key, dict(batch_spec))
  leaves = jax.tree_util.tree_leaves_with_path(params)
  shapes = {tuple(entry.key for entry in path): leaf.shape for path, leaf in leaves}
  names = {side: f'{side}_input_tokens' for side in ('encoder', 'decoder')}
  tokens = {side: math.prod(batch_spec[name].shape) for side, name in names.items() if name in batch_spec}
  return ForwardPass(shapes, shares, list(exchanges.values()), traced.jaxpr, tokens)
