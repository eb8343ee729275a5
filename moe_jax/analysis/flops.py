"""Floating-point operations of matrix products, counted in what JAX traced: whole programs, loops unfolded."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from moe_jax.analysis.forward_pass import ForwardPass, Path
from moe_jax.analysis.parameters import parameter_sizes

_SCOPE = re.compile(r'\[(\w+)\]')


class ForwardFlops(NamedTuple):
  """Of a forward pass in training, per target token, over all devices.

  Attributes:
    by_part: attention, dense, experts, router, dispatch, logits, other -> FLOPs as they run, `dispatch` being the
      one-hot products that carry tokens, and `experts` with the empty slots of their buffers.
    active: all of these but dispatch, the experts without empty slots: each token through its chosen experts alone.
  """

  by_part: dict[str, float]
  active: float

  @property
  def total(self) -> float:
    """As they run."""
    return sum(self.by_part.values())


def count_flops(traced: jax.stages.Traced) -> int:
  """Of one call, over all devices; a multiplication and an addition are two. What is recomputed counts again.

  Args:
    traced: `jax.jit(f).trace(*args)`, of arrays or `ShapeDtypeStruct`s.
  """
  return sum(_count(traced.jaxpr.jaxpr).values())


def _count(jaxpr: Any, part: str = 'other') -> Counter[str]:
  """FLOPs by the part whose scope they are in, the innermost that `PARTS` or an expert layer opens."""
  found: Counter[str] = Counter()
  for equation in jaxpr.eqns:
    scopes = _SCOPE.findall(str(equation.source_info.name_stack))
    for inner, flops in _count_equation(equation, scopes[-1] if scopes else part).items():
      found[inner] += flops
  return found


def _count_equation(equation: Any, part: str) -> Counter[str]:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    left = equation.invars[0].aval.shape
    return Counter({part: 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)})
  if name == 'conv_general_dilated':
    kernel, out = equation.invars[1].aval, equation.outvars[0].aval
    per_output = math.prod(kernel.shape) // kernel.shape[params['dimension_numbers'].rhs_spec[0]]
    return Counter({part: 2 * math.prod(out.shape) * per_output})
  inside = [_count(jaxpr, part) for jaxpr in _inside(params)]
  if name == 'cond':
    return max(inside, key=Counter.total, default=Counter())
  match name:
    case 'scan':
      times = params['length']
    case 'shard_map':  # written for one device
      mesh = params['mesh']
      times = math.prod(mesh.shape[axis] for axis in params.get('manual_axes', mesh.axis_names))
    case 'pallas_call':  # written for one cell of its grid
      times = math.prod(params['grid_mapping'].grid)
    case _:
      times = 1
  return Counter({part: times * sum(found[part] for found in inside) for part in {*itertools.chain(*inside)}})


def _inside(params: Mapping[str, Any]) -> Iterator[Any]:
  """The programs that an equation runs."""
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if hasattr(item, 'eqns'):
        yield item
      elif hasattr(getattr(item, 'jaxpr', None), 'eqns'):
        yield item.jaxpr


def forward_flops(forward: ForwardPass) -> ForwardFlops:
  """Counts by part. Backward takes twice as much, and what is recomputed comes on top."""
  counted, tokens = _count(forward.jaxpr), forward.tokens
  through_experts = sum(
    2 * active * tokens[_side(path)] for path, (_, active) in parameter_sizes(forward).items() if 'experts' in path
  )
  active = counted.total() - counted['experts'] - counted['dispatch'] + through_experts
  return ForwardFlops({part: n / tokens['decoder'] for part, n in counted.items()}, active / tokens['decoder'])


def model_flops(forward: ForwardPass) -> int:
  """What training on a batch needs at least: 6 for each token and each parameter that works on it (Kaplan et al. 2020).

  Parameters of an encoder count on its tokens, all others on the decoder's, keys and values of cross-attention too. The
  input embedding does no work, and products of attention between tokens are left out, as is what is recomputed.
  """
  untied = ('embedding', 'logits') in forward.shapes
  return round(
    sum(
      6 * active * forward.tokens[_side(path)]
      for path, (_, active) in parameter_sizes(forward).items()
      if not (untied and path == ('embedding', 'table'))
    )
  )


def _side(path: Path) -> str:
  """On whose tokens an array works: an encoder's on its own, all others on the decoder's."""
  return 'encoder' if path[0] == 'encoder' else 'decoder'
