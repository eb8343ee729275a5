"""What follows from scaling laws: the best size for a budget, the dense twin of a sparse model, where experts end.

Letters as in `moe_jax.analysis.scaling_laws`; a token costs 6N FLOPs to train on.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.analysis.published_laws import PUBLISHED
from moe_jax.analysis.scaling_laws import Numbers, hoffmann_2022, ludziejewski_reduced, saturating_experts
from moe_jax.types import ConfigError

_VOCABULARY, _HEAD = 50257, 64  # of the models of Ludziejewski et al.


class Optimum(NamedTuple):
  """Attributes: parameters, as the law counts them; tokens; loss, as the law predicts it."""

  parameters: Numbers
  tokens: Numbers
  loss: Numbers


class SparseOptimum(NamedTuple):
  """Attributes: experts; parameters, active; total_parameters; tokens; loss, as the law predicts it."""

  experts: int
  parameters: float
  total_parameters: float
  tokens: float
  loss: float


def compute_optimal(flops: Numbers, *, E: Numbers, A: Numbers, alpha: Numbers, B: Numbers, beta: Numbers) -> Optimum:
  """Least loss of Hoffmann's law where 6ND = C, in closed form (Hoffmann et al. 2022, eq. 4).

  Args:
    flops: C.
    E, A, alpha, B, beta: of Hoffmann's law, or those to which Ludziejewski's comes down at a number of experts.
  """
  parameters = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
  tokens = flops / (6 * parameters)
  return Optimum(parameters, tokens, hoffmann_2022(parameters, tokens, E=E, A=A, alpha=alpha, B=B, beta=beta))


def effective_parameters(
  dense_parameters: Numbers,
  experts: Numbers,
  *,
  a: Numbers,
  b: Numbers,
  c: Numbers,
  E_start: Numbers,
  E_max: Numbers,
  d: Numbers = 0.0,
) -> Numbers:
  """Size of the dense model with the loss of a sparse one (Clark et al. 2022, effective parameter count).

  Args:
    dense_parameters: N of the model that experts were put into.
    experts: E.
    a, b, c, E_start, E_max: of Clark's law. Its d drops out.
    d: taken, so that all of a law's constants can be given by name.
  """
  capacity = saturating_experts(experts, E_start=E_start, E_max=E_max)
  slope, dense_slope = a + c * np.log10(capacity), a + c * np.log10(E_start)
  return dense_parameters ** (slope / dense_slope) * (capacity / E_start) ** (b / dense_slope)


def cut_off(b: Numbers, c: Numbers) -> Numbers:
  """N beyond which more experts do not help, by Clark's law.

  It hangs on b / c: of constants rounded to three digits it is off by an order of magnitude, and of two fits that are
  equally good by a third. And it is that of 130B tokens: with more, experts go on to help (Krajewski et al. 2024).
  """
  return 10 ** (-b / c)


def total_parameters(active: Numbers, experts: Numbers) -> Numbers:
  """All parameters of a model in the shape of Ludziejewski et al., of which so many are active.

  Each of d/64 layers has 4d² in attention and 9d² in an expert, of which one works on a token. Both embeddings are of
  50257 words.
  """
  return _parameters(_width(active, 13), 4 + 9 * np.asarray(experts))


def best_experts(
  flops: float,
  memory: float,
  experts: Sequence[int] = (1, 2, 4, 8, 16, 32),
  bytes_per_parameter: float = 2.0,
  constants: Mapping[str, float] = PUBLISHED['ludziejewski_2025'].constants,
) -> SparseOptimum:
  """Of models whose weights fit into memory, that of least loss by Ludziejewski's law.

  A model too large at its optimum is made smaller, and sees more tokens for it. Only weights are counted: the paper's
  own table, which counts otherwise, has half or twice as many experts in some places.

  Args:
    flops: C = 6ND, with N active.
    memory: bytes of a device, or of all that share the model.
    experts: to choose among.
    bytes_per_parameter: 2 for bfloat16.
    constants: of Ludziejewski's law.

  Raises:
    ConfigError: if there is no room for any model.
  """
  if not memory >= bytes_per_parameter > 0 or not flops > 0:
    raise ConfigError(
      f'memory={memory:g} and flops={flops:g}: there has to be some, of {bytes_per_parameter:g} bytes a parameter.'
    )
  return min(
    (_best(flops, memory / bytes_per_parameter, count, constants) for count in experts), key=lambda best: best.loss
  )


def _best(flops: float, most: float, experts: int, constants: Mapping[str, float]) -> SparseOptimum:
  """The best model of so many experts and at most so many parameters."""
  law = ludziejewski_reduced(experts, **constants)
  active = min(compute_optimal(flops, **law).parameters, _parameters(_width(most, 4 + 9 * experts), 13))
  tokens = flops / (6 * active)
  loss = hoffmann_2022(active, tokens, **law)
  return SparseOptimum(experts, float(active), float(total_parameters(active, experts)), float(tokens), float(loss))


def _parameters(width: Numbers, squares: Numbers) -> Numbers:
  """Of width / 64 layers with so many matrices of width², and two embeddings."""
  return squares * width**3 / _HEAD + 2 * _VOCABULARY * width


def _width(parameters: Numbers, squares: Numbers) -> Numbers:
  """The inverse of `_parameters`: the real root of width³ + p width = q."""
  p, q = 2 * _VOCABULARY * _HEAD / squares, _HEAD * parameters / squares
  return 2 * np.sqrt(p / 3) * np.sinh(np.arcsinh(1.5 * q / p * np.sqrt(3 / p)) / 3)
