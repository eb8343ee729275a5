"""The experts: their weights, and the pure function that runs them on filled buffers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.layers.initializers import fan_in
from moe_jax.layers.mlp import apply_activations
from moe_jax.types import Array, Dtype, Initializer

Weights = dict[str, Array]


class ExpertBank(NamedTuple):
  """All experts of one layer, ready for a dispatcher to carry tokens to.

  Attributes:
    apply: (weights, float[G, E, C, M]) -> float[G, E, C, M], each expert on its own slots; sums over hidden shards are
      partial where `weights` hold only a shard of the hidden axis.
    weights: arrays with a leading expert axis.
    axes: logical axis names of each weight.
  """

  apply: Callable[[Weights, Array], Array]
  weights: Weights
  axes: dict[str, tuple[str | None, ...]]


def expert_mlp(weights: Weights, slots: Array, activations: Sequence[str]) -> Array:
  """Runs every expert's feed-forward on its own slots.

  Args:
    weights: 'wi' float[E, M, A, F] and 'wo' float[E, F, M]; A branches, F hidden.
    slots: float[G, E, C, M].
    activations: one per branch, see `layers.mlp.apply_activations`.

  Returns:
    float[G, E, C, M].
  """
  hidden = apply_activations(jnp.einsum('gecm,emaf->gecaf', slots, weights['wi']), activations)
  return jnp.einsum('gecf,efm->gecm', hidden, weights['wo'])


class Experts(nn.Module):
  """Feed-forward experts, each with its own weights: () -> ExpertBank.

  Attributes:
    num_experts: E.
    features: M.
    hidden_dim: F of one expert.
    activations: as in `layers.mlp.Mlp`; GLaM's experts are not gated, ST-MoE's are.
  """

  num_experts: int
  features: int
  hidden_dim: int
  activations: Sequence[str] = ('gelu', 'linear')
  kernel_init: Callable[..., Initializer] = fan_in
  dtype: Dtype = 'float32'

  @nn.compact
  def __call__(self) -> ExpertBank:
    shapes = {
      'wi': (self.num_experts, self.features, len(self.activations), self.hidden_dim),
      'wo': (self.num_experts, self.hidden_dim, self.features),
    }
    axes: dict[str, tuple[str | None, ...]] = {
      'wi': ('expert', 'embed', None, 'expert_mlp'),
      'wo': ('expert', 'expert_mlp', 'embed'),
    }
    inits = {
      'wi': self.kernel_init(in_axis=1, out_axis=(2, 3), batch_axis=0),
      'wo': self.kernel_init(in_axis=1, out_axis=2, batch_axis=0),
    }
    weights = {
      name: self.param(name, sharding.partitioned(inits[name], *axes[name]), shape).astype(self.dtype)
      for name, shape in shapes.items()
    }
    activations = tuple(self.activations)
    return ExpertBank(lambda w, slots: expert_mlp(w, slots, activations), weights, axes)
