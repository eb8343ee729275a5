"""Encoder-decoder language models (T5, Switch, ST-MoE, GShard): two stacks and one embedding."""

from collections.abc import Callable

import flax.linen as nn

from moe_jax.batch import token_count
from moe_jax.layers.context import Context
from moe_jax.layers.embeddings import TokenEmbedding
from moe_jax.layers.norms import rms_norm
from moe_jax.types import Array, Aux, Batch, Dtype, nest


class EncoderDecoder(nn.Module):
  """A sequence-to-sequence model: batch -> logits float32[B, L, V].

  Attributes:
    embedding: makes the token embedding that both sides share.
    encoder: makes the encoder's stack.
    decoder: makes the decoder's stack, whose pattern holds cross-attention.
    dropout_rate: on embedded tokens and on the last hidden state of each side.
  """

  embedding: Callable[..., TokenEmbedding]
  encoder: Callable[..., nn.Module]
  decoder: Callable[..., nn.Module]
  dropout_rate: float = 0.0
  dtype: Dtype = 'float32'

  def setup(self) -> None:
    self.token_embedding = self.embedding(name='embedding')
    self.encoder_stack = self.encoder(name='encoder')
    self.decoder_stack = self.decoder(name='decoder')
    self.encoder_norm = rms_norm('encoder_norm', self.dtype)
    self.decoder_norm = rms_norm('decoder_norm', self.dtype)
    self.dropout = nn.Dropout(self.dropout_rate)

  def __call__(self, batch: Batch, train: bool = False) -> tuple[Array, Aux]:
    """Reads seqio's 'encoder_*' int32[B, L_in] and 'decoder_*' int32[B, L]."""
    encoded, encoder_aux = self.encode(batch, train)
    logits, decoder_aux = self.decode(batch, encoded, train)
    return logits, nest(encoder=encoder_aux, decoder=decoder_aux)

  def encode(self, batch: Batch, train: bool = False) -> tuple[Array, Aux]:
    """'encoder_input_tokens' -> float[B, L_in, M]."""
    tokens = batch['encoder_input_tokens']
    context = Context(
      segment_ids=batch['encoder_segment_ids'],
      positions=batch['encoder_positions'],
      token_count=token_count(batch, 'encoder'),
      token_ids=tokens,
      causal=False,
      train=train,
    )
    x = self.dropout(self.token_embedding.encode(tokens), deterministic=not train)
    x, aux = self.encoder_stack(x, context)
    return self.dropout(self.encoder_norm(x), deterministic=not train), aux

  def decode(self, batch: Batch, encoded: Array, train: bool = False, cache_length: int = 0) -> tuple[Array, Aux]:
    """'decoder_input_tokens' and the encoder's output -> logits; `cache_length` as in `DecoderOnly`."""
    tokens = batch['decoder_input_tokens']
    context = Context(
      segment_ids=batch['decoder_segment_ids'],
      positions=batch['decoder_positions'],
      token_count=token_count(batch, 'decoder'),
      token_ids=tokens,
      task_ids=batch.get('decoder_task_ids'),
      encoded=encoded,
      encoded_segment_ids=batch['encoder_segment_ids'],
      causal=True,
      train=train,
      cache_length=cache_length,
    )
    x = self.dropout(self.token_embedding.encode(tokens), deterministic=not train)
    x, aux = self.decoder_stack(x, context)
    x = self.dropout(self.decoder_norm(x), deterministic=not train)
    return self.token_embedding.decode(x), aux
