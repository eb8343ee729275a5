"""Token embeddings, and the way back to the vocabulary."""

import flax.linen as nn
import jax.numpy as jnp

from moe_jax.sharding import constrain, partitioned
from moe_jax.types import Array, Dtype


class TokenEmbedding(nn.Module):
  """A table float32[V, M], read forwards and, when logits are tied to it, backwards.

  Attributes:
    vocab_size: V, at least the vocabulary's size.
    embed_dim: M.
    tied: the logits use the same table.
    tied_scale: of them then; None is 1/sqrt(M), since the table's entries start at unit variance (T5).
  """

  vocab_size: int
  embed_dim: int
  tied: bool = True
  tied_scale: float | None = None
  dtype: Dtype = 'float32'

  def setup(self) -> None:
    shape = (self.vocab_size, self.embed_dim)
    self.table = self.param('table', partitioned(nn.initializers.normal(1.0), 'vocab', 'embed'), shape)
    if not self.tied:
      init = nn.initializers.variance_scaling(1.0, 'fan_in', 'truncated_normal')
      self.logits_kernel = self.param('logits', partitioned(init, 'embed', 'vocab'), shape[::-1])

  def encode(self, token_ids: Array) -> Array:
    """int32[B, L] -> float[B, L, M]."""
    return constrain(jnp.take(self.table.astype(self.dtype), token_ids, axis=0), 'batch', 'length', None)

  def decode(self, x: Array) -> Array:
    """float[B, L, M] -> logits float32[B, L, V]."""
    if self.tied:
      scale = self.embed_dim**-0.5 if self.tied_scale is None else self.tied_scale
      x, kernel, letters = x * scale, self.table, 'blm,vm->blv'
    else:
      kernel, letters = self.logits_kernel, 'blm,mv->blv'
    logits = jnp.einsum(letters, x, kernel.astype(self.dtype), preferred_element_type=jnp.float32)
    return constrain(logits, 'batch', 'length', 'vocab')
