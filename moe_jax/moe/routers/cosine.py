"""Cosine router: tokens and experts meet in a small space, on the sphere (X-MoE, Chi et al. 2022)."""

import flax.linen as nn
import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.moe.routers.base import einsum, unit
from moe_jax.moe.routers.top_k import TopKRouter
from moe_jax.types import Array


class CosineRouter(TopKRouter):
  """Logits are cos(W x, e_i) / tau, which keeps the tokens' representation from collapsing onto the experts' centroids.

  Attributes:
    projection_dim: of the small space; None for E / 2.
    initial_temperature: of tau, which is learnt.
  """

  projection_dim: int | None = None
  initial_temperature: float = 0.3

  def logits(self, tokens: Array) -> Array:
    """See `Router`."""
    width = self.projection_dim or max(2, self.num_experts // 2)
    projected = self.linear('projection', tokens, (width,), nn.initializers.lecun_normal())
    init = sharding.partitioned(nn.initializers.orthogonal(), None, None)
    centroids = self.param('centroids', init, (width, self.num_experts))
    start = nn.initializers.constant(self.initial_temperature)
    temperature = self.param('temperature', sharding.partitioned(start), ())
    return einsum('gsw,we->gse', unit(projected, -1), unit(centroids, 0)) / jnp.maximum(temperature, 1e-2)
