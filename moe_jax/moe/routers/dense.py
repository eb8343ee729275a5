"""Mixtures that run every expert on every token: Eigen's of 2013, and DSelect-k, which ends up sparse."""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.layers.initializers import fan_in
from moe_jax.moe import router_losses
from moe_jax.moe.routers.base import Router, RoutingContext, tensordot
from moe_jax.moe.routing_plan import RoutingPlan
from moe_jax.types import Array, Aux, ConfigError, Initializer


class AllExpertsRouter(Router):
  """Base of routers that weigh all experts. Nothing is dropped, and the cost is that of E dense layers."""

  @property
  def choices_per_token(self) -> float:
    return self.num_experts

  def capacity(self, group_size: int, train: bool) -> int:
    """C: there is room for all."""
    return group_size

  def weighed(self, gates: Array, context: RoutingContext) -> RoutingPlan:
    """The plan of gates float32[G, S, E]; an expert with a gate of 0 is not asked."""
    experts = jnp.arange(self.num_experts)[None, None]
    return self.plan(jnp.where(gates > 0, experts, -1), gates, context)


class DenseRouter(AllExpertsRouter):
  """A softmax over all experts, from a hidden layer (Eigen et al. 2013).

  Left alone it settles on a few experts early. So for the first steps it goes by a constraint: an expert whose gates,
  summed over all of training so far, exceed the mean of the experts by more than a margin has gate 0 for this step.

  Attributes:
    hidden_dim: of the gating network.
    balanced_steps: how long the constraint holds.
    margin: as a share of the mean.
  """

  hidden_dim: int = 64
  balanced_steps: int = 1000
  margin: float = 0.1

  @nn.compact
  def __call__(self, tokens: Array, context: RoutingContext) -> tuple[RoutingPlan, Aux]:
    valid, count = context.valid, context.token_count
    hidden = jax.nn.relu(self.linear('hidden', tokens, (self.hidden_dim,), fan_in(0, 1)))
    init = sharding.partitioned(nn.initializers.normal(0.02), None, None)
    logits = tensordot(hidden, self.param('kernel', init, (self.hidden_dim, self.num_experts)))
    total = self.memory('total', (self.num_experts,))
    if context.train:
      had_too_much = total.value > (1 + self.margin) * jnp.mean(total.value)
      logits = jnp.where((had_too_much & (self.steps_done < self.balanced_steps))[None, None], -jnp.inf, logits)
    gates = jax.nn.softmax(logits, axis=-1)
    load = jnp.sum(jnp.where(valid[..., None], gates, 0.0), axis=(0, 1))
    of_step, step_ends = self.gathered(context, load=load)
    self.remember(total, total.value + jnp.where(step_ends, of_step['load'], 0.0), context)
    entropy = router_losses.router_entropy(gates, valid, count)
    metrics = {'router_entropy': entropy, 'expert_load': load / jnp.maximum(count, 1)}
    return self.weighed(gates, context), Aux(metrics=metrics)


class DSelectKRouter(AllExpertsRouter):
  """k selectors, each a smooth binary code of one expert, mixed by a softmax (DSelect-k, Hazimeh et al. 2021).

  Selector j gives expert i the weight prod_b s(z_jb) or 1 - s(z_jb), as bit b of i is 1 or 0, with a step s that is
  smooth yet exactly 0 below -gamma / 2 and 1 above gamma / 2. So the gates are differentiable throughout, and once all
  codes have settled at most k of them are not 0.

  Attributes:
    num_selected: k.
    gamma: width of the step.
    entropy_weight: of the selectors' mean entropy, which makes codes settle.
    reach_weight: of 1 / (weight on experts that exist), where E is no power of 2; per selector.
  """

  num_selected: int = 2
  gamma: float = 1.0
  entropy_weight: float = 1e-6
  reach_weight: float = 1e-6

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.num_selected < 1 or self.num_experts < 2:
      raise ConfigError(
        f'DSelect-k selects at least one of two experts, not {self.num_selected} of {self.num_experts}.'
      )

  @nn.compact
  def __call__(self, tokens: Array, context: RoutingContext) -> tuple[RoutingPlan, Aux]:
    valid, count, k = context.valid, context.token_count, self.num_selected
    bits = math.ceil(math.log2(self.num_experts))
    near_half = nn.initializers.uniform(self.gamma / 50)
    code = smooth_step(self.linear('code', tokens, (k, bits), _shifted(near_half, -self.gamma / 100)), self.gamma)
    mix = jax.nn.softmax(self.linear('mix', tokens, (k,)), axis=-1)
    digits = jnp.array([*itertools.product((0.0, 1.0), repeat=bits)][: self.num_experts])[None, None, None]  # [E, bits]
    selectors = jnp.prod(jnp.where(digits == 1, code[..., None, :], 1 - code[..., None, :]), axis=-1)  # [G, S, k, E]
    gates = jnp.einsum('gsk,gske->gse', mix, selectors)
    plan = self.weighed(gates, context)

    entropy = router_losses.token_mean(jnp.mean(router_losses.entropy(selectors), axis=-1), valid, count)
    losses = {'entropy': self.entropy_weight * entropy}
    if self.num_experts != 2**bits:
      missed = jnp.sum(1 / jnp.maximum(jnp.sum(selectors, axis=-1), 1e-6), axis=-1)
      losses['reach'] = self.reach_weight * router_losses.token_mean(missed, valid, count)
    load = jnp.sum(jnp.where(valid[..., None], gates, 0.0), axis=(0, 1)) / jnp.maximum(count, 1)
    used = router_losses.token_mean(jnp.sum(gates > 0, axis=-1), valid, count)
    return plan, Aux(losses, {'selector_entropy': entropy, 'experts_per_token': used, 'expert_load': load})


def smooth_step(z: Array, gamma: float) -> Array:
  """0 below -gamma / 2, 1 above gamma / 2, and a cubic between that meets both with slope 0."""
  z = jnp.clip(z, -gamma / 2, gamma / 2)
  return -2 * z**3 / gamma**3 + 1.5 * z / gamma + 0.5


def _shifted(init: Initializer, by: float) -> Initializer:
  return lambda *args: init(*args) + by
