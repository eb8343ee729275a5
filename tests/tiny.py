"""Models small enough to compile in seconds, and a batch with everything that real ones have: packing and padding."""

import functools
from typing import Any

import flax.linen as nn
import numpy as np

from moe_jax.layers.attention import CrossAttention, SelfAttention
from moe_jax.layers.embeddings import TokenEmbedding
from moe_jax.layers.mlp import Mlp
from moe_jax.layers.positions import RelativeTable
from moe_jax.models.decoder_only import DecoderOnly
from moe_jax.models.encoder_decoder import EncoderDecoder
from moe_jax.models.stack import Stack, interleaved_stack
from moe_jax.moe.dispatchers.einsum import einsum
from moe_jax.moe.experts import Experts
from moe_jax.moe.moe_layer import MoELayer
from moe_jax.moe.routers.top_k import TopKRouter

VOCAB, WIDTH = 64, 32
make = functools.partial


def stack_factory(
  mixers: dict[str, Any],
  dispatcher: Any,
  router: Any,
  expert_every: int,
  num_layers: int = 4,
  group_size: int = 16,
  **stack: Any,
) -> Any:
  """`num_layers` layers, one in `expert_every` sparse: 8 experts, groups of 16 tokens unless told otherwise."""
  moe = make(
    MoELayer,
    num_experts=8,
    group_size=group_size,
    router=router,
    experts=make(Experts, hidden_dim=32),
    dispatcher=dispatcher,
  )
  return make(
    interleaved_stack,
    mixers=mixers,
    mlp=make(Mlp, hidden_dim=64),
    moe=moe,
    num_layers=num_layers,
    expert_every=expert_every,
    stack=make(Stack, **stack),
  )


ROUTER = make(TopKRouter, z_loss_weight=1e-3, capacity_factor=1.0)


def decoder_only(dispatcher: Any = einsum, router: Any = ROUTER, expert_every: int = 2, **options: Any) -> nn.Module:
  """Rotary attention."""
  attention = make(SelfAttention, num_heads=4, head_dim=8, rotary_base=10_000.0)
  stack = stack_factory({'attention': attention}, dispatcher, router, expert_every, **options)
  return DecoderOnly(embedding=make(TokenEmbedding, vocab_size=VOCAB, embed_dim=WIDTH), stacks=[stack])


def encoder_decoder(dispatcher: Any = einsum, router: Any = ROUTER, expert_every: int = 2, **options: Any) -> nn.Module:
  """T5's relative positions, shared by the layers of a stack."""
  heads = {'num_heads': 4, 'head_dim': 8, 'query_scale': 1.0}
  options = {'relative_table': make(RelativeTable, num_heads=4), **options}
  attention, cross = make(SelfAttention, **heads), make(CrossAttention, **heads)
  build = make(stack_factory, dispatcher=dispatcher, router=router, expert_every=expert_every, **options)
  return EncoderDecoder(
    embedding=make(TokenEmbedding, vocab_size=VOCAB, embed_dim=WIDTH),
    encoder=build({'attention': attention}),
    decoder=build({'attention': attention, 'cross_attention': cross}),
  )


def batch(rows: int = 32, length: int = 32, encoder: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
  """Two packed segments in a row, one row half padding, one row all padding."""
  rng = np.random.default_rng(seed)
  segments = np.ones((rows, length), np.int32)
  segments[:, length * 5 // 8 :] = 2
  segments[1, length // 2 :] = 0
  segments[2] = 0
  first = np.arange(length) < length * 5 // 8
  positions = np.where(first, np.arange(length), np.arange(length) - length * 5 // 8).astype(np.int32)

  def tokens() -> np.ndarray:
    return np.where(segments > 0, rng.integers(1, VOCAB, (rows, length)), 0).astype(np.int32)

  features = {}
  for side in ('decoder', 'encoder')[: 1 + encoder]:
    features[f'{side}_input_tokens'] = tokens()
    features[f'{side}_segment_ids'] = segments.copy()
    features[f'{side}_positions'] = np.broadcast_to(positions, segments.shape).copy()
  return features | {'decoder_target_tokens': tokens(), 'decoder_loss_weights': (segments > 0).astype(np.float32)}
