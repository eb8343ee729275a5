"""What a batch is: its features, its token counts, and its microbatches.

Features carry seqio's names and are all [B, L], packed or not:

  decoder_input_tokens   int32    the targets shifted right; 0 is both the first token of a segment and padding
  decoder_target_tokens  int32    0 is padding
  decoder_loss_weights   float32  1 where the loss is taken
  decoder_segment_ids    int32    1, 2, ... for the examples packed in a row; 0 is padding
  decoder_positions      int32    from 0 in each segment
  encoder_input_tokens, encoder_segment_ids, encoder_positions    int32, with an encoder only
  decoder_task_ids       int32    the task, language or domain of each token, from 1; only where the data name them
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.types import Array, Batch

_DECODER = ('input_tokens', 'target_tokens', 'loss_weights', 'segment_ids', 'positions')
_ENCODER = ('input_tokens', 'segment_ids', 'positions')


def batch_spec(lengths: Mapping[str, int], batch_size: int, converter: str) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a batch, found without reading data.

  Args:
    lengths: task feature -> tokens a row, such as {'inputs': 512, 'targets': 114}.
    batch_size: rows of a global batch.
    converter: 'decoder_only' or 'encoder_decoder'.
  """
  if converter == 'decoder_only':
    columns = {f'decoder_{name}': lengths['targets'] + lengths.get('inputs', 0) for name in _DECODER}
  else:
    columns = {f'decoder_{name}': lengths['targets'] for name in _DECODER}
    columns |= {f'encoder_{name}': lengths['inputs'] for name in _ENCODER}
  if 'task_ids' in lengths:
    columns['decoder_task_ids'] = lengths['task_ids']
  dtypes = {'decoder_loss_weights': jnp.float32}
  return {name: jax.ShapeDtypeStruct((batch_size, n), dtypes.get(name, jnp.int32)) for name, n in columns.items()}


def with_token_counts(batch: Batch) -> Batch:
  """Adds 'encoder_token_count' and 'decoder_token_count', float32[], real tokens of each side.

  Losses are divided by the counts of the whole batch, so count before it is split.
  """
  counts = {
    name.removesuffix('segment_ids') + 'token_count': jnp.sum(segments > 0).astype(jnp.float32)
    for name, segments in batch.items()
    if name.endswith('segment_ids')
  }
  return {**batch, **counts}


def token_count(batch: Batch, side: str) -> Array:
  """Real tokens of the whole batch, of which this may be one microbatch; if nobody counted, those at hand."""
  counted = batch.get(f'{side}_token_count')
  return with_token_counts(batch)[f'{side}_token_count'] if counted is None else counted


def split_microbatches(batch: Batch, count: int) -> dict[str, Array]:
  """Gives every array of examples a leading [count] axis; scalars are repeated.

  Each device keeps its own examples and splits them in order, so nothing moves and routing groups stay whole.

  Args:
    batch: arrays [B, ...], with B a multiple of `count` times the data-parallel devices, and scalars.
    count: microbatches.
  """
  shards = sharding.shards('batch')

  def split(x: Array) -> Array:
    if x.ndim == 0:
      return jnp.broadcast_to(x, (count,))
    x = x.reshape(shards, count, -1, *x.shape[1:]).swapaxes(0, 1)
    return sharding.constrain(x.reshape(count, -1, *x.shape[3:]), None, 'batch', *(None,) * (x.ndim - 3))

  return {key: split(value) for key, value in batch.items()}
