"""Attention: over the sequence itself, or over an encoder's output, with a key-value cache for decoding.

Letters: B batch, L length, M width, H heads, K key-value heads, D head width, N cache slots.
"""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from moe_jax import sharding
from moe_jax.layers.context import Context
from moe_jax.layers.initializers import fan_in
from moe_jax.layers.norms import rms_norm
from moe_jax.layers.positions import relative_bias, rotate
from moe_jax.types import Array, Aux, ConfigError, Dtype, Initializer, nest


def segment_mask(query_segments: Array, key_segments: Array) -> Array:
  """bool[B, 1, Lq, Lk]: a token sees its own segment only, and never padding (segment 0)."""
  same = query_segments[:, :, None] == key_segments[:, None, :]
  return (same & (key_segments > 0)[:, None, :])[:, None]


class _Attention(nn.Module):
  """Projections and the weighted sum; the two kinds of attention differ in whom they look at.

  Attributes:
    num_heads, head_dim: H and D.
    num_kv_heads: K, fewer than H for grouped queries; None is H.
    query_scale: multiplies the logits; None is 1/sqrt(D). T5 uses 1 and starts with smaller queries instead, so that
      logits begin the same.
  """

  num_heads: int
  head_dim: int
  num_kv_heads: int | None = None
  query_scale: float | None = None
  kernel_init: Callable[..., Initializer] = fan_in
  dtype: Dtype = 'float32'

  def project(self, name: str, x: Array, heads: int) -> Array:
    """float[B, L, M] -> float[B, L, heads, D]."""
    plain = self.kernel_init(in_axis=0, out_axis=(1, 2))
    start = self.head_dim**-0.5 / self.query_scale if name == 'query' and self.query_scale else 1.0
    init = sharding.partitioned(lambda *args: start * plain(*args), 'embed', 'heads', 'head_dim')
    kernel = self.param(name, init, (x.shape[-1], heads, self.head_dim)).astype(self.dtype)
    return self.placed(name, jnp.einsum('blm,mhd->blhd', x.astype(self.dtype), kernel))

  def placed(self, name: str, x: Array) -> Array:
    """float[B, L, heads, D], along the sequence too if a query: keys and values are gathered whole."""
    return sharding.constrain(x, 'batch', 'length' if name == 'query' else None, 'heads', None)

  def attend(self, query: Array, key: Array, value: Array, mask: Array, bias: Array | None, width: int) -> Array:
    """float[B, Lq, H, D] and float[B, Lk, K, D] twice -> float[B, Lq, M]; softmax in float32."""
    mixed = jax.nn.dot_product_attention(query, key, value, bias=bias, mask=mask, scale=self.query_scale)
    init = sharding.partitioned(self.kernel_init(in_axis=(0, 1), out_axis=2), 'heads', 'head_dim', 'embed')
    kernel = self.param('out', init, (self.num_heads, self.head_dim, width)).astype(self.dtype)
    return jnp.einsum('blhd,hdm->blm', mixed, kernel)

  def stored(self, name: str, make: Callable[[], Array], *names: str | None) -> nn.Variable:
    """A cache entry, made on the first call; it knows its axes, so that beam search can reorder its batch."""
    return self.variable('cache', name, lambda: nn.LogicallyPartitioned(make(), names))


class SelfAttention(_Attention):
  """Attention within a sequence (Vaswani et al. 2017).

  Attributes:
    rotary_base: rotary positions with this base; None for none.
    relative_table: makes this layer's own relative position table; a table in the context is used where this is None.
    query_key_norm: normalises queries and keys (RMS) before rotating them: 'head' each head by itself (Qwen3), 'whole'
      all heads together (OLMoE); None does not.
    norm_epsilon: of those norms.
    experts: which of query, key and value are expert layers, and what makes them (Switch, appendix A).
  """

  rotary_base: float | None = None
  query_key_norm: str | None = None
  norm_epsilon: float = 1e-6
  relative_table: Callable[..., nn.Module] | None = None
  experts: Mapping[str, Callable[..., nn.Module]] = FrozenDict()

  @nn.compact
  def __call__(self, x: Array, context: Context) -> tuple[Array, Aux]:
    reports: dict[str, Aux] = {}

    def project(name: str, heads: int) -> Array:
      if name not in self.experts:
        return self.project(name, x, heads)
      if heads * self.head_dim != x.shape[-1]:
        raise ConfigError(
          f'Experts as the {name} projection need NUM_HEADS * HEAD_DIM = EMBED_DIM, and'
          f' {heads} * {self.head_dim} is not {x.shape[-1]}.'
        )
      y, reports[name] = self.experts[name](name=f'{name}_experts')(x, context)
      return self.placed(name, y.reshape(*x.shape[:2], heads, -1))

    if unknown := sorted(set(self.experts) - {'query', 'key', 'value'}):
      raise ConfigError(f'{unknown[0]!r} is no projection of attention that experts can be: query, key, value are.')
    kv_heads = self.num_kv_heads or self.num_heads
    query, key, value = project('query', self.num_heads), project('key', kv_heads), project('value', kv_heads)
    if self.query_key_norm:
      query, key = self._normalised('query', query), self._normalised('key', key)
    if self.rotary_base:
      query = rotate(query, context.positions, self.rotary_base)
      key = rotate(key, context.positions, self.rotary_base)
    key_segments, start = context.segment_ids, jnp.int32(0)
    if context.cache_length:
      key, value, key_segments, start = self._extend_cache(key, value, context)

    query_index, key_index = start + jnp.arange(x.shape[1]), jnp.arange(key.shape[1])
    mask = segment_mask(context.segment_ids, key_segments)
    if context.causal:
      mask &= (key_index[None, :] <= query_index[:, None])[None, None]
    table = self.relative_table(name='relative')() if self.relative_table else context.relative_table
    bias = None if table is None else relative_bias(table, query_index, key_index, bidirectional=not context.causal)
    return self.attend(query, key, value, mask, bias, x.shape[-1]), nest(**reports)

  def _normalised(self, name: str, x: Array) -> Array:
    """float[B, L, H, D], and the same again, of mean square 1 times a learned scale."""
    if self.query_key_norm not in ('head', 'whole'):
      raise ConfigError(f"QUERY_KEY_NORM={self.query_key_norm!r} is none of None, 'head', 'whole'.")
    axes = ('head_dim',) if self.query_key_norm == 'head' else ('heads', 'head_dim')
    return rms_norm(f'{name}_norm', self.dtype, axes, self.norm_epsilon)(x)

  def _extend_cache(self, key: Array, value: Array, context: Context) -> tuple[Array, Array, Array, Array]:
    """Writes keys and values behind the old; the first call makes the cache. Returns it whole, and where it began."""
    batch, _, heads, width = key.shape
    slots = context.cache_length
    shape = (batch, slots, heads, width)
    keys = self.stored('key', lambda: jnp.zeros(shape, key.dtype), 'batch', None, 'heads', None)
    values = self.stored('value', lambda: jnp.zeros(shape, value.dtype), 'batch', None, 'heads', None)
    segments = self.stored('segment_ids', lambda: jnp.zeros((batch, slots), jnp.int32), 'batch', None)
    filled = self.stored('filled', lambda: jnp.int32(0))
    start = filled.value
    keys.value = jax.lax.dynamic_update_slice_in_dim(keys.value, key, start, axis=1)
    values.value = jax.lax.dynamic_update_slice_in_dim(values.value, value, start, axis=1)
    segments.value = jax.lax.dynamic_update_slice_in_dim(segments.value, context.segment_ids, start, axis=1)
    filled.value = start + key.shape[1]
    return keys.value, values.value, segments.value, start


class CrossAttention(_Attention):
  """Attention of a decoder over its encoder's output, which is projected once and kept while decoding."""

  @nn.compact
  def __call__(self, x: Array, context: Context) -> tuple[Array, Aux]:
    kv_heads = self.num_kv_heads or self.num_heads
    query = self.project('query', x, self.num_heads)

    if context.encoded_segment_ids is None:
      raise ConfigError('Cross-attention needs an encoder: this model has none.')

    def encoded(name: str) -> Array:
      assert context.encoded is not None  # it is left out once the cache has what is needed of it
      return self.project(name, context.encoded, kv_heads)

    if context.cache_length:
      key = self.stored('encoded_key', lambda: encoded('key'), 'batch', None, 'heads', None).value
      value = self.stored('encoded_value', lambda: encoded('value'), 'batch', None, 'heads', None).value
    else:
      key, value = encoded('key'), encoded('value')
    # A packed decoder segment looks at the encoder segment of the same number.
    mask = segment_mask(context.segment_ids, context.encoded_segment_ids)
    return self.attend(query, key, value, mask, None, x.shape[-1]), Aux()
