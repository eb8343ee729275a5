"""Decoder-only language models (GLaM, Mixtral, ...): embed, stacks, norm, logits."""

from collections.abc import Callable, Sequence

import flax.linen as nn

from moe_jax.batch import token_count
from moe_jax.layers.context import Context
from moe_jax.layers.embeddings import TokenEmbedding
from moe_jax.layers.norms import rms_norm
from moe_jax.models.stack import run_stacks
from moe_jax.types import Array, Aux, Batch, Dtype, nest


class DecoderOnly(nn.Module):
  """A causal language model: batch -> logits float32[B, L, V].

  Attributes:
    embedding: makes the token embedding.
    stacks: factories of the stacks, run in order.
    dropout_rate: on the embedded tokens and on the last hidden state.
    norm_epsilon: of the norm after the last stack.
  """

  embedding: Callable[..., TokenEmbedding]
  stacks: Sequence[Callable[..., nn.Module]]
  dropout_rate: float = 0.0
  norm_epsilon: float = 1e-6
  dtype: Dtype = 'float32'

  @nn.compact
  def __call__(self, batch: Batch, train: bool = False, cache_length: int = 0) -> tuple[Array, Aux]:
    """Reads 'decoder_input_tokens', 'decoder_segment_ids' and 'decoder_positions', int32[B, L] each.

    With a `cache_length` the tokens extend the sequences in the 'cache' collection, which the first call makes.
    """
    tokens = batch['decoder_input_tokens']
    context = Context(
      segment_ids=batch['decoder_segment_ids'],
      positions=batch['decoder_positions'],
      token_count=token_count(batch, 'decoder'),
      token_ids=tokens,
      task_ids=batch.get('decoder_task_ids'),
      causal=True,
      train=train,
      cache_length=cache_length,
    )
    embedding = self.embedding(name='embedding')
    dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
    x = dropout(embedding.encode(tokens))
    x, aux = run_stacks([stack(name=f'stack_{i}') for i, stack in enumerate(self.stacks)], x, context)
    x = dropout(rms_norm('final_norm', self.dtype, epsilon=self.norm_epsilon)(x))
    return embedding.decode(x), nest(decoder=aux)

  def encode(self, batch: Batch, train: bool = False) -> tuple[None, Aux]:
    """There is nothing to encode; so that `moe_jax.decode` need not know which model it has."""
    return None, Aux()

  def decode(self, batch: Batch, encoded: None, train: bool = False, cache_length: int = 0) -> tuple[Array, Aux]:
    """The model itself, by the name it has in `EncoderDecoder`."""
    return self(batch, train, cache_length)
