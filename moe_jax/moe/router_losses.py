"""Losses and measures of routing: pure functions, one line of mathematics each.

All are sums over the real tokens at hand divided by `token_count`, the real tokens of the whole batch. So padding
neither counts nor scales, and microbatches and devices add up.

Letters: G groups, S tokens a group, E experts, K choices.
"""

import jax
import jax.numpy as jnp

from moe_jax.moe.routing_plan import RoutingPlan
from moe_jax.types import Array


def _token_mean(values: Array, valid: Array, token_count: Array) -> Array:
  """float32[G, S] -> float32[], the mean over real tokens."""
  return jnp.sum(jnp.where(valid, values, 0.0)) / jnp.maximum(token_count, 1)


def choice_counts(expert_index: Array, num_experts: int, valid: Array) -> Array:
  """How many choices of real tokens fall on each expert: int32[G, S, K] -> float32[G, E]."""
  one_hot = jax.nn.one_hot(expert_index, num_experts, dtype=jnp.float32)
  return jnp.einsum('gske,gs->ge', one_hot, valid.astype(jnp.float32))


def load_balance_loss(probs: Array, expert_index: Array, valid: Array, token_count: Array) -> Array:
  """E sum_i f_i P_i, in each group, averaged over groups by their real tokens; 1 at perfect balance.

  f_i is the share of the given choices that fall on expert i (no gradient), P_i the mean router probability. Pass the
  first choices alone for the loss of GShard, Switch and ST-MoE (Fedus et al. 2021, eq. 4-6), before any capacity.

  Args:
    probs: float32[G, S, E].
    expert_index: int32[G, S, K].
    valid: bool[G, S].
    token_count: float32[].
  """
  num_experts, choices = probs.shape[-1], expert_index.shape[-1]
  tokens = jnp.sum(valid, axis=1).astype(jnp.float32)  # [G]
  prob_sums = jnp.sum(jnp.where(valid[..., None], probs, 0.0), axis=1)  # [G, E]
  product = jnp.sum(choice_counts(expert_index, num_experts, valid) * prob_sums, axis=-1)  # [G]
  return num_experts * jnp.sum(product / (choices * jnp.maximum(tokens, 1))) / jnp.maximum(token_count, 1)


def router_z_loss(logits: Array, valid: Array, token_count: Array) -> Array:
  """Mean over real tokens of logsumexp(logits)^2, which keeps logits small (ST-MoE, Zoph et al. 2022, eq. 5).

  Args:
    logits: float32[G, S, E].
    valid: bool[G, S].
    token_count: float32[].
  """
  return _token_mean(jax.nn.logsumexp(logits, axis=-1) ** 2, valid, token_count)


def router_entropy(probs: Array, valid: Array, token_count: Array) -> Array:
  """Mean entropy of the router's distribution over experts, in nats: log E when undecided, 0 when certain."""
  return _token_mean(jnp.sum(jax.scipy.special.entr(probs), axis=-1), valid, token_count)


def expert_load(expert_index: Array, num_experts: int, valid: Array, token_count: Array) -> Array:
  """float32[E], the share of all choices that each expert is asked for, before capacity; 1/E at perfect balance."""
  counts = jnp.sum(choice_counts(expert_index, num_experts, valid), axis=0)
  return counts / (expert_index.shape[-1] * jnp.maximum(token_count, 1))


def dropped_tokens(kept: Array, valid: Array, token_count: Array) -> Array:
  """Share of real tokens that no expert had room for; they pass by on the residual path alone. kept: bool[G, S, K]."""
  return _token_mean(1.0 - jnp.any(kept, axis=-1), valid, token_count)


def dropped_choices(kept: Array, valid: Array, token_count: Array) -> Array:
  """Share of the choices of real tokens that found their expert full. kept: bool[G, S, K]."""
  return _token_mean(1.0 - jnp.mean(kept, axis=-1), valid, token_count)


def plan_metrics(plan: RoutingPlan, valid: Array, token_count: Array) -> dict[str, Array]:
  """What every plan is watched for: the load of each expert, and what was dropped."""
  return {
    'expert_load': expert_load(plan.expert_index, plan.num_experts, valid, token_count),
    'dropped': dropped_tokens(plan.kept, valid, token_count),
    'dropped_choices': dropped_choices(plan.kept, valid, token_count),
  }
