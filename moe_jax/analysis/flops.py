"""Floating-point operations of matrix products, counted in what JAX traced: whole programs, loops unfolded."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax

from moe_jax.analysis.parameters import parameter_sizes


def count_flops(function: Callable[..., Any], *args: Any) -> int:
  """Of one call, over all devices; a multiplication and an addition are two. What is recomputed counts again.

  Args:
    function: traced, not run.
    args: arrays or `ShapeDtypeStruct`s.
  """
  return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
  return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
  if name == 'conv_general_dilated':
    kernel, out = equation.invars[1].aval, equation.outvars[0].aval
    return 2 * math.prod(out.shape) * math.prod(kernel.shape) // kernel.shape[params['dimension_numbers'].rhs_spec[0]]
  inside = [_count(jaxpr) for jaxpr in _inside(params)]
  match name:
    case 'cond':
      return max(inside, default=0)
    case 'scan':
      return params['length'] * sum(inside)
    case 'shard_map':  # written for one device
      mesh = params['mesh']
      return sum(inside) * math.prod(mesh.shape[axis] for axis in params.get('manual_axes', mesh.axis_names))
    case 'pallas_call':  # written for one cell of its grid
      return sum(inside) * math.prod(params['grid_mapping'].grid)
  return sum(inside)


def _inside(params: Mapping[str, Any]) -> Iterator[Any]:
  """The programs that an equation runs."""
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if hasattr(item, 'eqns'):
        yield item
      elif hasattr(getattr(item, 'jaxpr', None), 'eqns'):
        yield item.jaxpr


def model_flops(model: nn.Module, batch_spec: Mapping[str, jax.ShapeDtypeStruct]) -> int:
  """What training on a batch needs at least: 6 for each token and each parameter that works on it (Kaplan et al. 2020).

  Parameters of an encoder count on its tokens, all others on the decoder's, keys and values of cross-attention too. The
  input embedding does no work, and products of attention between tokens are left out, as is what is recomputed.
  """
  tokens = {
    side: math.prod(batch_spec[f'{side}_input_tokens'].shape)
    for side in ('encoder', 'decoder')
    if f'{side}_input_tokens' in batch_spec
  }
  sizes = parameter_sizes(model, batch_spec)
  untied = ('embedding', 'logits') in sizes
  return round(
    sum(
      6 * active * tokens['encoder' if path[0] == 'encoder' else 'decoder']
      for path, (_, active) in sizes.items()
      if not (untied and path == ('embedding', 'table'))
    )
  )
