"""Normalisation."""

from collections.abc import Sequence

import flax.linen as nn

from moe_jax.sharding import partitioned
from moe_jax.types import Dtype


def rms_norm(
  name: str, dtype: Dtype = 'float32', axes: Sequence[str] = ('embed',), epsilon: float = 1e-6
) -> nn.RMSNorm:
  """Root-mean-square norm with a scale and no bias (Zhang and Sennrich 2019): float[..., M] -> float[..., M].

  Args:
    name: of the module.
    dtype: of the result.
    axes: logical names of the last axes, over which the mean is taken and which the scale has.
    epsilon: added to the mean square.
  """
  last = tuple(range(-len(axes), 0))
  return nn.RMSNorm(
    epsilon=epsilon,
    dtype=dtype,
    scale_init=partitioned(nn.initializers.ones, *axes),
    reduction_axes=last,
    feature_axes=last,
    name=name,
  )
