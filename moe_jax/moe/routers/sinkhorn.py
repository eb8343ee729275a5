"""Global assignment by optimal transport: S-BASE (Clark et al. 2022)."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.moe import router_losses
from moe_jax.moe.routers.base import Router, RoutingContext
from moe_jax.moe.routers.base_layers import balanced_assignment
from moe_jax.moe.routing_plan import RoutingPlan
from moe_jax.types import Array, Aux, one_of

Rounding = Literal['argmax', 'balanced']


class SinkhornRouter(Router):
  """Top-1 of a transport plan in which all experts weigh alike; the gate is the sigmoid of the raw logit.

  The plan guides the choice in training only, and no gradient flows through it; outside training each token takes its
  own best. The plan is balanced, its argmax nearly so: a capacity factor of 1.25 drops little.

  Attributes:
    iterations: of Sinkhorn's algorithm.
    temperature: of the logits in the plan; lower is nearer to the best assignment, and slower to balance.
    rounding: 'argmax' of the plan (S-BASE), or 'balanced', an exactly even assignment that starts from its potentials.
  """

  iterations: int = 30
  temperature: float = 1.0
  rounding: Rounding = 'argmax'

  def __post_init__(self) -> None:
    super().__post_init__()
    one_of(rounding=(self.rounding, Rounding))

  @property
  def choices_per_token(self) -> float:
    return 1

  @nn.compact
  def __call__(self, tokens: Array, context: RoutingContext) -> tuple[RoutingPlan, Aux]:
    valid, count = context.valid, context.token_count
    logits = self.logits(tokens)
    expert = jnp.argmax(logits, axis=-1)
    if context.train:
      scores = jax.lax.stop_gradient(logits)
      price = -self.temperature * sinkhorn(scores / self.temperature, valid, self.iterations)
      expert = jnp.argmax(scores - price[:, None], axis=-1)
      if self.rounding == 'balanced':
        expert = balanced_assignment(scores, valid, prices=price)
    expert_index = expert[..., None]
    gates = jax.nn.sigmoid(jnp.take_along_axis(logits, expert_index, axis=-1))
    plan = self.plan(expert_index, gates, context)
    entropy = router_losses.router_entropy(jax.nn.softmax(logits), valid, count)
    return plan, Aux(metrics={'router_entropy': entropy, **router_losses.plan_metrics(plan, valid, count)})


def sinkhorn(scores: Array, valid: Array, iterations: int) -> Array:
  """Column potentials of the plan P with the greatest <P, scores> + H(P): a token moves 1/n of it, an expert gets 1/E.

  log P[s, e] = scores[s, e] + row[s] + column[e], so that a token's best expert in P is that of scores + column. In the
  log domain, since exp overflows. Padding weighs nothing.

  Args:
    scores: float32[G, S, E].
    valid: bool[G, S]; n of them hold in a group.
    iterations: rounds over rows and columns, ending with columns.

  Returns:
    float32[G, E].
  """
  tokens = jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)  # [G, 1]
  experts = float(scores.shape[-1])

  def balance(_: int, column: Array) -> Array:
    row = -jnp.log(tokens) - jax.nn.logsumexp(scores + column[:, None], axis=-1)
    mass = jnp.where(valid[..., None], scores + row[..., None], -1e30)  # not -inf: a group may be all padding
    return -jnp.log(experts) - jax.nn.logsumexp(mass, axis=1)

  return jax.lax.fori_loop(0, iterations, balance, jnp.zeros((scores.shape[0], scores.shape[-1])))
