"""Losses and measures of routing: pure functions, one line of mathematics each.

All are sums over the real tokens at hand divided by `token_count`, the real tokens of the whole batch. So padding
neither counts nor scales, and microbatches and devices add up.

Letters: G groups, S tokens a group, E experts, K choices.
"""

import jax
import jax.numpy as jnp

from moe_jax.moe.routing_plan import RoutingPlan
from moe_jax.types import Array


def token_mean(values: Array, valid: Array, token_count: Array) -> Array:
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
  counts = choice_counts(expert_index, num_experts, valid)  # [G, E]
  # f_i times the group's tokens is its count, and over groups the tokens come in again: they cancel.
  product = jnp.sum(counts * group_mean(probs, valid), axis=-1)  # [G]
  return num_experts * jnp.sum(product) / (choices * jnp.maximum(token_count, 1))


def router_z_loss(logits: Array, valid: Array, token_count: Array) -> Array:
  """Mean over real tokens of logsumexp(logits)^2, which keeps logits small (ST-MoE, Zoph et al. 2022, eq. 5).

  Args:
    logits: float32[G, S, E].
    valid: bool[G, S].
    token_count: float32[].
  """
  return token_mean(jax.nn.logsumexp(logits, axis=-1) ** 2, valid, token_count)


def entropy(probs: Array) -> Array:
  """-sum p log p over the last axis, in nats; with a gradient that is finite where p is 0."""
  return -jnp.sum(probs * jnp.log(jnp.where(probs > 0, probs, 1.0)), axis=-1)


def router_entropy(probs: Array, valid: Array, token_count: Array) -> Array:
  """Mean entropy of the router's distribution over experts, in nats: log E when undecided, 0 when certain."""
  return token_mean(entropy(probs), valid, token_count)


def expert_load(expert_index: Array, num_experts: int, valid: Array, token_count: Array) -> Array:
  """float32[E], how often each expert is asked, as a share of K a token; 1/E at perfect balance if all K are made."""
  counts = jnp.sum(choice_counts(expert_index, num_experts, valid), axis=0)
  return counts / (expert_index.shape[-1] * jnp.maximum(token_count, 1))


def dropped_tokens(kept: Array, valid: Array, token_count: Array) -> Array:
  """Share of real tokens that no expert had room for; they pass by on the residual path alone. kept: bool[G, S, K]."""
  return token_mean(1.0 - jnp.any(kept, axis=-1), valid, token_count)


def dropped_choices(kept: Array, valid: Array, token_count: Array) -> Array:
  """Share of the choices of real tokens that found their expert full. kept: bool[G, S, K]."""
  return token_mean(1.0 - jnp.mean(kept, axis=-1), valid, token_count)


def plan_metrics(plan: RoutingPlan, valid: Array, token_count: Array, choices: float | None = None) -> dict[str, Array]:
  """What every plan is watched for: the load of each expert, and what was dropped.

  Args:
    plan: with K choices a token, some perhaps not made.
    valid: bool[G, S].
    token_count: float32[].
    choices: how many of them a token is to make, on average; None: all.
  """
  load = expert_load(plan.expert_index, plan.num_experts, valid, token_count)
  return {
    'expert_load': load * (plan.expert_index.shape[-1] / (choices or plan.expert_index.shape[-1])),
    'dropped': dropped_tokens(plan.kept, valid, token_count),
    'dropped_choices': dropped_choices(plan.kept | (plan.expert_index < 0), valid, token_count),
  }


def squared_cv(amounts: Array) -> Array:
  """Squared coefficient of variation, (std / mean)^2: float32[..., E] -> float32[...]; 0 if all are equal."""
  mean = jnp.mean(amounts, axis=-1)
  return jnp.var(amounts, axis=-1) / jnp.maximum(mean**2, 1e-12)  # where nothing is, the gradient is 0 and not NaN


def group_mean(values: Array, valid: Array) -> Array:
  """float32[G, S, ...] -> float32[G, ...], the mean over the real tokens of each group; 0 where there are none."""
  weight = valid.reshape(*valid.shape, *(1,) * (values.ndim - 2))
  total = jnp.sum(jnp.where(weight, values, 0.0), axis=1)
  return total / jnp.maximum(jnp.sum(weight, axis=1), 1)


def over_groups(values: Array, valid: Array, token_count: Array) -> Array:
  """float32[G] -> float32[], each group weighing as many real tokens as it has."""
  return jnp.sum(values * jnp.sum(valid, axis=1)) / jnp.maximum(token_count, 1)


def importance_loss(gates: Array, valid: Array, token_count: Array) -> Array:
  """CV^2 of the experts' importance, the sum of their gates over a group; 0 at perfect balance (Shazeer 2017, eq. 6-7).

  Per group, averaged over groups as V-MoE does: the square of a mean over the batch would not add up over microbatches.

  Args:
    gates: float32[G, S, E], 0 where not chosen.
    valid: bool[G, S].
    token_count: float32[].
  """
  importance = jnp.sum(jnp.where(valid[..., None], gates, 0.0), axis=1)
  return over_groups(squared_cv(importance), valid, token_count)


def load_probability(clean: Array, noisy: Array, noise_scale: Array, k: int) -> Array:
  """How likely each expert would be among the k best, were its noise drawn anew (Shazeer 2017, eq. 8-9).

  P(x, i) = Phi((clean_i - k-th largest of the others' noisy logits) / noise_i). All float32[..., E], k < E.
  """
  largest = jax.lax.top_k(noisy, k + 1)[0]
  last_in, first_out = largest[..., k - 1 : k], largest[..., k:]
  # The others' k-th largest: for those among the k best, themselves left out, it is the next one.
  threshold = jnp.where(noisy >= last_in, first_out, last_in)
  return jax.scipy.stats.norm.cdf((clean - threshold) / noise_scale)


def load_loss(clean: Array, noisy: Array, noise_scale: Array, k: int, valid: Array, token_count: Array) -> Array:
  """CV^2 of the experts' smooth load, the sum of `load_probability` over a group (Shazeer 2017, eq. 10-11).

  Args:
    clean, noisy: logits float32[G, S, E], without and with noise.
    noise_scale: float32[G, S, E], standard deviation of the noise.
    k: choices a token.
    valid: bool[G, S].
    token_count: float32[].
  """
  return importance_loss(load_probability(clean, noisy, noise_scale, k), valid, token_count)


def excess_load_loss(gates: Array, expert_index: Array, num_experts: int, valid: Array, token_count: Array) -> Array:
  """Mean over tokens of gate * (n_i - n) / n where n_i tokens chose the same expert, n on average (Dai et al. 2022).

  0 at perfect balance. It lowers the gates of crowded experts and raises those of idle ones. Counts are of a group, and
  have no gradient.

  Args:
    gates: float32[G, S], of the chosen expert.
    expert_index: int32[G, S].
    num_experts: E.
    valid: bool[G, S].
    token_count: float32[].
  """
  counts = choice_counts(expert_index[..., None], num_experts, valid)
  mean = jnp.maximum(jnp.mean(counts, axis=-1, keepdims=True), 1e-9)
  excess = jnp.take_along_axis((counts - mean) / mean, expert_index, axis=-1)
  return token_mean(excess * gates, valid, token_count)


def mean_importance_loss(probs: Array, valid: Array, token_count: Array) -> Array:
  """E sum_i P_i^2 of a group's mean probabilities P; 1 at perfect balance, E when collapsed (SpeechMoE, You 2021)."""
  mean = group_mean(probs, valid)
  return over_groups(probs.shape[-1] * jnp.sum(mean**2, axis=-1), valid, token_count)


def sparsity_l1_loss(probs: Array, valid: Array, token_count: Array) -> Array:
  """Mean of |p / |p|_2|_1: 1 for a certain router, sqrt(E) for an undecided one (SpeechMoE, You 2021)."""
  norm = jnp.sqrt(jnp.sum(probs**2, axis=-1))
  return token_mean(jnp.sum(probs, axis=-1) / norm, valid, token_count)


def global_entropy_loss(probs: Array, valid: Array, token_count: Array, min_experts: float) -> Array:
  """max(0, log min_experts - H(mean of p)), per group: asks for the use of about so many experts (LIMoE, Mustafa 2022).

  Its partner, which asks each token to be sure, is `router_entropy`.
  """
  mean = group_mean(probs, valid)
  return over_groups(jnp.maximum(0.0, jnp.log(min_experts) - entropy(mean)), valid, token_count)
