"""The dense feed-forward sublayer, gated or not."""

import functools
import operator
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

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


def apply_activations(branches: Sequence[Array], activations: Sequence[str]) -> Array:
  """The product of one activation per branch: ('gelu', 'linear') is GEGLU, ('relu',) a plain ReLU (Shazeer 2020).

  Args:
    branches: float[..., F] each, one per activation.
    activations: names out of `ACTIVATIONS`.

  Returns:
    float[..., F].
  """
  return functools.reduce(operator.mul, (ACTIVATIONS[name](x) for name, x in zip(activations, branches, strict=True)))


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
    width, x = x.shape[-1], x.astype(self.dtype)
    wi_init = sharding.partitioned(self.kernel_init(in_axis=0, out_axis=1), 'embed', 'mlp')
    wo_init = sharding.partitioned(self.kernel_init(in_axis=0, out_axis=1), 'mlp', 'embed')
    # One weight a branch, as in T5X: nothing has to take a fused one apart, and TPUs would lay it out badly.
    branches = [
      x @ self.param(f'wi_{i}', wi_init, (width, self.hidden_dim)).astype(self.dtype)
      for i in range(len(self.activations))
    ]
    wo = self.param('wo', wo_init, (self.hidden_dim, width)).astype(self.dtype)
    hidden = sharding.constrain(apply_activations(branches, self.activations), 'batch', 'length', 'mlp')
    hidden = nn.Dropout(self.dropout_rate, deterministic=not context.train)(hidden)
    return hidden @ wo, Aux()
