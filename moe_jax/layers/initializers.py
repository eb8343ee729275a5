"""How weights start."""

from collections.abc import Sequence

from flax.linen import initializers

from moe_jax.types import Initializer


def fan_in(
  in_axis: int | Sequence[int], out_axis: int | Sequence[int], batch_axis: int | Sequence[int] = (), scale: float = 1.0
) -> Initializer:
  """Truncated normal with standard deviation sqrt(scale / fan_in), measured after truncation.

  Sparse models like a tenth of the usual scale (Fedus et al. 2021, section 2.4). `batch_axis` holds the expert axis:
  each expert starts on its own.
  """
  return initializers.variance_scaling(
    scale, 'fan_in', 'truncated_normal', in_axis=in_axis, out_axis=out_axis, batch_axis=batch_axis
  )
