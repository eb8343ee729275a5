"""What every sublayer may know about the tokens it is given, in one object instead of ten keyword arguments."""

from typing import Protocol

from flax import struct

from moe_jax.types import Array, Aux


@struct.dataclass
class Context:
  """Facts about the tokens of one stack.

  Attributes:
    segment_ids: int32[B, L]; tokens see each other only within a segment, and 0 is padding (never guess it from zeros).
    positions: int32[B, L], position of each token in its segment.
    token_count: float32[], real tokens of the *whole* batch, of which this may be one microbatch. Losses and metrics
      are divided by it, so that those of microbatches add up to those of the batch.
    token_ids: int32[B, L], for routers that hash them.
    task_ids: int32[B, L], of tasks, languages or domains from 1, for routers that go by them.
    encoded: float[B, L_in, M], the encoder's output for cross-attention.
    encoded_segment_ids: int32[B, L_in].
    relative_table: float[buckets, H], a relative position table shared by the layers of a stack.
    causal: tokens see only the past.
    train: dropout, jitter, training capacity.
    cache_length: slots of the key-value cache; 0 when not decoding.
  """

  segment_ids: Array
  positions: Array
  token_count: Array
  token_ids: Array | None = None
  task_ids: Array | None = None
  encoded: Array | None = None
  encoded_segment_ids: Array | None = None
  relative_table: Array | None = None
  causal: bool = struct.field(pytree_node=False, default=True)
  train: bool = struct.field(pytree_node=False, default=False)
  cache_length: int = struct.field(pytree_node=False, default=0)


class Sublayer(Protocol):
  """Attention, MLP, expert layer: one contract."""

  def __call__(self, x: Array, context: Context) -> tuple[Array, Aux]:
    """x: float[B, L, M] -> float[B, L, M], and what to report."""
