"""The dense feed-forward sublayer, gated or not."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.layers.context import Context
from moe_jax.layers.initializers import fan_in
from moe_jax.types import Array, Aux, Dtype, Initializer

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  'linear': lambda x: x,
  'relu': jax.nn.relu,
  'gelu': jax.nn.gelu,
  'silu': jax.nn.silu,
}


def apply_activations(hidden: Array, activations: Sequence[str]) -> Array:
  """The product of one activation per branch: ('gelu', 'linear') is GEGLU, ('relu',) a plain ReLU (Shazeer 2020).

  Args:
    hidden: float[..., A, F], one branch per activation.
    activations: A names out of `ACTIVATIONS`.

  Returns:
    float[..., F].
  """
  branches = [ACTIVATIONS[name](hidden[..., i, :]) for i, name in enumerate(activations)]
  product = branches[0]
  for branch in branches[1:]:
    product *= branch
  return product


class Mlp(nn.Module):
  """Feed-forward sublayer, [B, L, M] -> [B, L, F] -> [B, L, M].

  Attributes:
    hidden_dim: F.
    activations: one per branch of the input projection; two make a gated unit.
    dropout_rate: on the hidden activations.
  """

  hidden_dim: int
  activations: Sequence[str] = ('gelu', 'linear')
  dropout_rate: float = 0.0
  kernel_init: Callable[..., Initializer] = fan_in
  dtype: Dtype = 'float32'

  @nn.compact
  def __call__(self, x: Array, context: Context) -> tuple[Array, Aux]:
    width, branches = x.shape[-1], len(self.activations)
    wi_init = sharding.partitioned(self.kernel_init(in_axis=0, out_axis=(1, 2)), 'embed', None, 'mlp')
    wo_init = sharding.partitioned(self.kernel_init(in_axis=0, out_axis=1), 'mlp', 'embed')
    wi = self.param('wi', wi_init, (width, branches, self.hidden_dim)).astype(self.dtype)
    wo = self.param('wo', wo_init, (self.hidden_dim, width)).astype(self.dtype)
    hidden = apply_activations(jnp.einsum('blm,maf->blaf', x.astype(self.dtype), wi), self.activations)
    hidden = sharding.constrain(hidden, 'batch', None, 'mlp')
    hidden = nn.Dropout(self.dropout_rate, deterministic=not context.train)(hidden)
    return jnp.einsum('blf,fm->blm', hidden, wo), Aux()
