"""Soft MoE: slots hold mixtures of tokens, so that nothing is chosen and nothing dropped (Puigcerver et al. 2023)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.moe.routers.base import Router, RoutingContext, einsum, unit
from moe_jax.moe.routing_plan import SoftRoutingPlan
from moe_jax.types import Array, Aux


class SoftRouter(Router):
  """Each slot is a softmax over the tokens of the group, each token's output a softmax over all slots.

  Scores are scale * cosine(token, slot). `capacity_factor` sets the slots: about that many experts' worth per token.
  **Not causal**: every slot mixes all tokens of the group. The slots are parameters, so the group size is for good.
  """

  @property
  def choices_per_token(self) -> float:
    return min(self.capacity_factor or self.num_experts, self.num_experts)

  @property
  def causal(self) -> bool:
    return False

  def capacity(self, group_size: int, train: bool) -> int:
    """Slots per expert, the same in training and outside: they are parameters."""
    return max(1, round(self.choices_per_token * group_size / self.num_experts))

  @nn.compact
  def __call__(self, tokens: Array, context: RoutingContext) -> tuple[SoftRoutingPlan, Aux]:
    slots = self.capacity(tokens.shape[1], context.train)
    init = sharding.partitioned(nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2)), 'embed', None, None)
    kernel = self.param('kernel', init, (tokens.shape[-1], self.num_experts, slots))
    scale = self.param('scale', sharding.partitioned(nn.initializers.ones), ())
    logits = einsum('gsm,mec->gsec', unit(tokens.astype(jnp.float32), -1), scale * unit(kernel, 0))

    valid = context.valid[..., None, None]
    dispatch = jax.nn.softmax(jnp.where(valid, logits, -1e30), axis=1)  # not -inf: a group may be all padding
    dispatch = jnp.where(valid, dispatch, 0.0)
    combine = jax.nn.softmax(logits.reshape(*logits.shape[:2], -1), axis=-1).reshape(logits.shape)
    load = jnp.sum(jnp.where(valid, combine, 0.0), axis=(0, 1, 3)) / jnp.maximum(context.token_count, 1)
    return SoftRoutingPlan(dispatch, jnp.where(valid, combine, 0.0)), Aux(metrics={'expert_load': load})
