"""Which domain a text is of, and what a mixture of domain experts predicts (DEMix, Gururangan et al. 2021)."""

import jax
import jax.numpy as jnp

from moe_jax.types import Array


def domain_posterior(log_probs: Array, prior: Array | None = None) -> Array:
  """p(D = j | x_<t), proportional to p(x_<t | D = j) p(D = j): float32[D, B, L] that sum to 1 over domains.

  Args:
    log_probs: float32[D, B, L], log p(x_t | x_<t, D = j) of each token that came, under each domain; 0 for padding.
      One text a row: the texts of a packed row would be taken for one.
    prior: float32[D]; None: all alike.
  """
  domains = log_probs.shape[0]
  before = jnp.cumsum(jnp.pad(log_probs[..., :-1], ((0, 0), (0, 0), (1, 0))), axis=-1)
  log_prior = jnp.log(jnp.full(domains, 1 / domains) if prior is None else prior)
  return jax.nn.softmax(before + log_prior[:, None, None], axis=0)


def mixture_log_probs(log_probs: Array, prior: Array | None = None) -> Array:
  """log sum_j p(x_t | x_<t, D = j) p(D = j | x_<t), float32[B, L]; arguments as in `domain_posterior`."""
  return jax.nn.logsumexp(log_probs + jnp.log(domain_posterior(log_probs, prior)), axis=0)
