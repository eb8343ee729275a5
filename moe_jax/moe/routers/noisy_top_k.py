"""Noisy top-k: noise that the router scales itself, and losses on importance and load (Shazeer et al. 2017)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.moe import router_losses
from moe_jax.moe.routers.base import Router, RoutingContext
from moe_jax.moe.routing_plan import RoutingPlan
from moe_jax.types import Array, Aux, ConfigError

MIN_NOISE = 1e-2  # the load divides by the noise


class NoisyTopKRouter(Router):
  """H(x) = x W_g + N(0, 1) softplus(x W_noise); the gates are a softmax over the k best of H (eq. 3-5).

  Both weights start at 0, so that routing starts as pure, balanced noise. There is none outside training.

  Attributes:
    num_selected: k, less than E; at least 2 was thought needed then.
    importance_loss_weight, load_loss_weight: 0.1 each for language models, 0.01 for translation.
  """

  num_selected: int = 2
  importance_loss_weight: float = 0.1
  load_loss_weight: float = 0.1

  def __post_init__(self) -> None:
    super().__post_init__()
    if not 1 <= self.num_selected < self.num_experts:
      raise ConfigError(f'Noisy top-k picks fewer than all experts, not {self.num_selected} of {self.num_experts}.')
    if self.num_selected == 1:
      raise ConfigError('A softmax over one expert is always 1 and teaches the router nothing: set num_selected >= 2.')

  @property
  def choices_per_token(self) -> float:
    return self.num_selected

  @nn.compact
  def __call__(self, tokens: Array, context: RoutingContext) -> tuple[RoutingPlan, Aux]:
    k, valid, count = self.num_selected, context.valid, context.token_count
    clean, noisy, scale = noisy_logits(self, '', tokens, (self.num_experts,), context.train)
    best, expert_index = jax.lax.top_k(noisy, k)
    gates = jax.nn.softmax(best, axis=-1)
    plan = self.plan(expert_index, gates, context)

    spread = jnp.einsum('gsk,gske->gse', gates, jax.nn.one_hot(expert_index, self.num_experts))
    importance = router_losses.importance_loss(spread, valid, count)
    losses = {'importance': self.importance_loss_weight * importance}
    if context.train:
      load = router_losses.load_loss(clean, noisy, scale, k, valid, count)
      losses['load'] = self.load_loss_weight * load
    entropy = router_losses.router_entropy(jax.nn.softmax(clean), valid, count)
    metrics = {'importance': importance, 'router_entropy': entropy}
    return plan, Aux(losses, metrics | router_losses.plan_metrics(plan, valid, count))


def noisy_logits(
  router: Router, prefix: str, tokens: Array, features: tuple[int, ...], train: bool
) -> tuple[Array, Array, Array]:
  """Logits without noise and with it, and its standard deviation, float32[G, S, *features] each (eq. 4)."""
  zeros = nn.initializers.zeros
  clean = router.linear(f'{prefix}kernel', tokens, features, zeros)
  scale = jax.nn.softplus(router.linear(f'{prefix}noise_kernel', tokens, features, zeros)) + MIN_NOISE
  noise = jax.random.normal(router.make_rng('router'), clean.shape) if train else jnp.zeros(())
  return clean, clean + scale * noise, scale
