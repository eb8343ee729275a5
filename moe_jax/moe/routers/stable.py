"""StableMoE: learn to route, distil that into a light router, and freeze it (Dai et al. 2022)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from moe_jax import sharding
from moe_jax.moe import router_losses
from moe_jax.moe.routers.base import Router, RoutingContext, tensordot
from moe_jax.moe.routing_plan import RoutingPlan
from moe_jax.types import Array, Aux, ConfigError


class StableRouter(Router):
  """Stage 1: top-1 of x . c_e, with a balance loss, while a router of word embeddings learns to tell the same expert.

  Stage 2: the distilled router's answer for every token id is frozen into a table, and tokens go by it for good. The
  gate is sigmoid(x . c_e) in both, the one thing that still depends on the token.

  Attributes:
    vocab_size: V.
    stage_1_steps: 6,000 of 60,000 updates in the paper.
    distilled_dim: of the word embeddings, 50.
    balance_loss_weight, distil_loss_weight: 0.3 each, in stage 1.
  """

  vocab_size: int = 0
  stage_1_steps: int = 6000
  distilled_dim: int = 50
  balance_loss_weight: float = 0.3
  distil_loss_weight: float = 0.3

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.vocab_size < 1 or self.stage_1_steps < 1:
      raise ConfigError('StableMoE learns a table of token ids for a while: set vocab_size, and stage_1_steps >= 1.')

  @property
  def choices_per_token(self) -> float:
    return 1

  @nn.compact
  def __call__(self, tokens: Array, context: RoutingContext) -> tuple[RoutingPlan, Aux]:
    valid, count, ids = context.valid, context.token_count, context.known('token_ids')
    scores = self.linear('kernel', tokens, (self.num_experts,), nn.initializers.orthogonal(0.1))
    learnt = jnp.argmax(scores, axis=-1)
    distilled = self.distilled()  # [V, E]
    table = self.memory('table', (self.vocab_size,), 'int32')
    learning = self.steps_done < self.stage_1_steps
    self.gathered(context)
    self.remember(table, jnp.where(learning, jnp.argmax(distilled, axis=-1).astype(jnp.int32), table.value), context)

    expert = jnp.where(learning, learnt, table.value[ids])
    gates = jax.nn.sigmoid(jnp.take_along_axis(scores, expert[..., None], axis=-1))
    plan = self.plan(expert[..., None], gates, context)
    balance = router_losses.excess_load_loss(gates[..., 0], expert, self.num_experts, valid, count)
    told = distilled[ids]
    distil = router_losses.token_mean(optax.softmax_cross_entropy_with_integer_labels(told, learnt), valid, count)
    agreed = router_losses.token_mean(jnp.argmax(told, axis=-1) == expert, valid, count)
    return plan, Aux(
      losses={
        'balance': jnp.where(learning, self.balance_loss_weight * balance, 0.0),
        'distil': jnp.where(learning, self.distil_loss_weight * distil, 0.0),
      },
      metrics={'balance': balance, 'distilled_agrees': agreed, **router_losses.plan_metrics(plan, valid, count)},
    )

  def distilled(self) -> Array:
    """The light router's scores for every token id, float32[V, E]."""
    init = nn.initializers.normal(self.distilled_dim**-0.5)
    embedding = self.param(
      'embedding', sharding.partitioned(init, 'vocab', None), (self.vocab_size, self.distilled_dim)
    )
    centroids = self.param(
      'centroids',
      sharding.partitioned(nn.initializers.orthogonal(), None, None),
      (self.distilled_dim, self.num_experts),
    )
    return tensordot(embedding, centroids)
