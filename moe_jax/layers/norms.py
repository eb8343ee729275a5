"""Normalisation."""

import flax.linen as nn

from moe_jax.sharding import partitioned
from moe_jax.types import Dtype


def rms_norm(name: str, dtype: Dtype = 'float32') -> nn.RMSNorm:
  """Root-mean-square norm with a scale and no bias (Zhang and Sennrich 2019): float[..., M] -> float[..., M]."""
  return nn.RMSNorm(epsilon=1e-6, dtype=dtype, scale_init=partitioned(nn.initializers.ones, 'embed'), name=name)
