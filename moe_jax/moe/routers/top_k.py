"""Token-choice: every token picks its k most probable experts (Shazeer 2017, GShard, Switch, ST-MoE, GLaM)."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.moe import router_losses
from moe_jax.moe.routers.base import Router, RoutingContext
from moe_jax.moe.routing_plan import RoutingPlan
from moe_jax.types import Array, Aux, ConfigError

Gates = Literal['raw', 'renormalised']


class TopKRouter(Router):
  """Softmax over the experts, then the k best, each weighed by its gate.

  Attributes:
    num_selected: k.
    gates: 'renormalised' divides the k probabilities by their sum, before any is dropped (GShard, ST-MoE, GLaM);
      'raw' leaves them (Switch, V-MoE).
    balance_loss_weight: of the load-balance loss over first choices; 1e-2 in Switch, ST-MoE and GLaM.
    z_loss_weight: of the router z-loss; 1e-3 in ST-MoE.
    jitter: in training the router sees tokens multiplied by uniform noise in [1 - jitter, 1 + jitter] (Switch: 1e-2).
  """

  num_selected: int = 2
  gates: Gates = 'renormalised'
  balance_loss_weight: float = 1e-2
  z_loss_weight: float = 0.0
  jitter: float = 0.0

  @property
  def choices_per_token(self) -> float:
    return self.num_selected

  def __post_init__(self) -> None:
    super().__post_init__()
    if not 1 <= self.num_selected <= self.num_experts:
      raise ConfigError(
        f'A token cannot pick {self.num_selected} of {self.num_experts} experts: raise NUM_EXPERTS or lower k.'
      )
    if self.num_selected == 1 and self.gates == 'renormalised':
      raise ConfigError("A renormalised top-1 gate is always 1 and teaches the router nothing: set gates = 'raw'.")

  @nn.compact
  def __call__(self, tokens: Array, context: RoutingContext) -> tuple[RoutingPlan, Aux]:
    if self.jitter and context.train:
      # In float32 like all of the router: between 0.99 and 1.01 bfloat16 has five values, and their mean is not 1.
      noise = jax.random.uniform(self.make_rng('router'), tokens.shape, jnp.float32, 1 - self.jitter, 1 + self.jitter)
      tokens = tokens.astype(jnp.float32) * noise
    logits = self.logits(tokens)
    probs = jax.nn.softmax(logits, axis=-1)
    gates, expert_index = jax.lax.top_k(probs, self.num_selected)
    if self.gates == 'renormalised':
      gates /= jnp.sum(gates, axis=-1, keepdims=True)

    plan = self.plan(expert_index, gates, context)

    valid, count = context.valid, context.token_count
    balance = router_losses.load_balance_loss(probs, expert_index[..., :1], valid, count)
    z = router_losses.router_z_loss(logits, valid, count)
    return plan, Aux(
      losses={'balance': self.balance_loss_weight * balance, 'z': self.z_loss_weight * z},
      metrics={
        'balance': balance,
        'z': z,
        'router_entropy': router_losses.router_entropy(probs, valid, count),
        **router_losses.plan_metrics(plan, valid, count),
      },
    )
