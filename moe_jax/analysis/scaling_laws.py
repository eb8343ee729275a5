"""Scaling laws: the loss of a language model from its size, its data and its experts.

A law is a pure function of columns of points and of named constants, in which both broadcast. `LAWS` holds the laws to
fit (`moe_jax.analysis.scaling_fits`), `PUBLISHED` the constants that papers found. Every paper counts parameters in
its own way, and a column's name says how:

  parameters               all, with embeddings: Hoffmann
  nonembedding_parameters  all but embeddings: Kaplan, whose models are dense, and Krajewski, with all experts
  dense_parameters         those of the dense model that experts were put into, without embeddings: Clark
  active_parameters        those that work on one token, with embeddings: Ludziejewski
  ratio                    all parameters over those active

Letters: N parameters, D tokens, E experts a layer, G granularity, C training FLOPs, L loss in nats per token.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from moe_jax.types import ConfigError

Numbers = Any  # a float or float64[...], which broadcast
Points = Mapping[str, Any]  # column -> float64[n], or one number


def kaplan_2020(N: Numbers, D: Numbers, *, N_c: Numbers, alpha_N: Numbers, D_c: Numbers, alpha_D: Numbers) -> Numbers:
  """Kaplan et al. 2020, "Scaling Laws for Neural Language Models", eq. 1.5; N without embeddings."""
  return ((N_c / N) ** (alpha_N / alpha_D) + D_c / D) ** alpha_D


def hoffmann_2022(
  N: Numbers, D: Numbers, *, E: Numbers, A: Numbers, alpha: Numbers, B: Numbers, beta: Numbers
) -> Numbers:
  """Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", approach 3; N with embeddings.

  Here E is the entropy of text, which no model gets below.
  """
  return E + A / N**alpha + B / D**beta


def saturating_experts(E: Numbers, *, E_start: Numbers, E_max: Numbers) -> Numbers:
  """Clark's Ehat, which goes from E_start at one expert towards E_max; nan unless E_start < E_max."""
  with np.errstate(divide='ignore', invalid='ignore'):
    offset = 1 / np.asarray(1 / E_start - 1 / E_max)
    experts = 1 / (1 / (E - 1 + offset) + 1 / E_max)
  return np.where(np.real(E_start) < np.real(E_max), experts, np.nan)


def clark_2022_separable(N: Numbers, E: Numbers, *, a: Numbers, b: Numbers, d: Numbers) -> Numbers:
  """Clark et al. 2022, "Unified Scaling Laws for Routed Language Models", without interaction. Logs to base 10."""
  return 10 ** (a * np.log10(N) + b * np.log10(E) + d)


def clark_2022_bilinear(N: Numbers, E: Numbers, *, a: Numbers, b: Numbers, c: Numbers, d: Numbers) -> Numbers:
  """Clark et al. 2022: with c > 0 the larger the model is, the less experts help. Logs to base 10."""
  return 10 ** (a * np.log10(N) + b * np.log10(E) + c * np.log10(N) * np.log10(E) + d)


def clark_2022(
  N: Numbers, E: Numbers, *, a: Numbers, b: Numbers, c: Numbers, d: Numbers, E_start: Numbers, E_max: Numbers
) -> Numbers:
  """Clark et al. 2022, the whole law: bilinear in log N and log Ehat. Logs to base 10.

  N counts the dense model that experts were put into, without embeddings. All models saw 130B tokens: it says nothing
  of others.
  """
  return clark_2022_bilinear(N, saturating_experts(E, E_start=E_start, E_max=E_max), a=a, b=b, c=c, d=d)


def one_size(experts_or_ratio: Numbers, *, b: Numbers, d: Numbers) -> Numbers:
  """What is left of Clark's law where all models have one size: log10 L = d + b log10 E.

  At one N the constants a and c are lost in d and b. Clark et al. write the law with total over active parameters for
  E too, so that numbers of experts a token, and of sparse layers, fall on one curve.
  """
  return 10 ** (d + b * np.log10(experts_or_ratio))


def one_size_saturating(E: Numbers, *, b: Numbers, d: Numbers, E_start: Numbers, E_max: Numbers) -> Numbers:
  """As `one_size`, of Ehat: it takes experts from few to very many to tell its constants."""
  return one_size(saturating_experts(E, E_start=E_start, E_max=E_max), b=b, d=d)


def krajewski_2024(
  N: Numbers,
  D: Numbers,
  G: Numbers,
  *,
  c: Numbers,
  g: Numbers,
  gamma: Numbers,
  a: Numbers,
  alpha: Numbers,
  b: Numbers,
  beta: Numbers,
) -> Numbers:
  """Krajewski et al. 2024, "Scaling Laws for Fine-Grained Mixture of Experts".

  N is without embeddings and counts all experts. G is the width of an MLP over that of an expert: G·E experts, of which
  G work on a token.
  """
  return c + (g / G**gamma + a) / N**alpha + b / D**beta


def ludziejewski_2025(N: Numbers, D: Numbers, E: Numbers, **constants: Numbers) -> Numbers:
  """Ludziejewski et al. 2025, "Joint MoE Scaling Laws"; N active, with embeddings.

  Args:
    **constants: those of `ludziejewski_reduced`.
  """
  return hoffmann_2022(N, D, **ludziejewski_reduced(E, **constants))


def ludziejewski_reduced(
  E: Numbers,
  *,
  a: Numbers,
  alpha: Numbers,
  delta: Numbers,
  gamma: Numbers,
  b: Numbers,
  beta: Numbers,
  omega: Numbers,
  zeta: Numbers,
  E_start: Numbers,
  E_max: Numbers,
  c: Numbers,
) -> dict[str, Numbers]:
  """Constants of Hoffmann's law, which a Ehat^δ N^(α + γ ln Ehat) + b Ehat^ω D^(β + ζ ln Ehat) + c is at E experts."""
  experts = saturating_experts(E, E_start=E_start, E_max=E_max)
  return {
    'E': c,
    'A': a * experts**delta,
    'alpha': -(alpha + gamma * np.log(experts)),
    'B': b * experts**omega,
    'beta': -(beta + zeta * np.log(experts)),
  }


class Constant(NamedTuple):
  """From where fits of a constant start, and how they vary it.

  Attributes:
    low: end of the range.
    high: the other end.
    positive: it cannot be negative; its logarithm is varied.
  """

  low: float
  high: float
  positive: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Law:
  """A functional form.

  Attributes:
    name: its key in `LAWS`.
    formula: for people to read.
    function: of the columns, by position, and of the constants, by name.
    columns: of points, in the function's order. All of them have to vary in points to fit.
    constants: what a fit looks for.
    threshold: of |ln(predicted / measured)|, from which on a fit counts a point's error itself and not its square
      (Huber): so a few bad runs do not bend it. Infinite for least squares.
  """

  name: str
  formula: str
  function: Callable[..., Numbers]
  columns: tuple[str, ...]
  constants: Mapping[str, Constant]
  threshold: float = math.inf

  def loss(self, constants: Mapping[str, Numbers], points: Points) -> Numbers:
    """float64[...], the law at points, of constants that broadcast with their columns.

    Raises:
      ConfigError: if a column is not there.
    """
    missing = [name for name in self.columns if name not in points]
    if missing:
      raise ConfigError(f'The law {self.name} needs the column {missing[0]}: points have {", ".join(points)}.')
    return self.function(*(np.asarray(points[name], np.float64) for name in self.columns), **constants)


def hold(law: Law, **constants: float) -> Law:
  """The law with some of its constants given, where points do not tell them: `hold(CLARK, E_max=math.inf)`."""
  unknown = sorted(set(constants) - set(law.constants))
  if unknown:
    raise ConfigError(f'The law {law.name} has no constant {unknown[0]}: it has {", ".join(law.constants)}.')
  free = {name: start for name, start in law.constants.items() if name not in constants}
  return dataclasses.replace(law, function=functools.partial(law.function, **constants), constants=free)


_EXPONENT = Constant(0.02, 1.0)
_SCALE = Constant(1.0, 1e6, positive=True)  # of a power of N or D, with exponents as these
_ENTROPY = Constant(0.1, 3.0, positive=True)
_CLARK = {'a': Constant(-0.2, 0.0), 'b': Constant(-0.3, 0.0), 'c': Constant(-0.02, 0.04), 'd': Constant(0.2, 2.0)}
_SATURATION = {'E_start': Constant(1.0, 8.0, positive=True), 'E_max': Constant(16.0, 2048.0, positive=True)}
_CLARK_COLUMNS = ('dense_parameters', 'experts')

KAPLAN = Law(
  'kaplan',
  '[(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D',
  kaplan_2020,
  ('nonembedding_parameters', 'tokens'),
  {
    'N_c': Constant(1e8, 1e16, positive=True),
    'alpha_N': Constant(0.02, 0.3),
    'D_c': Constant(1e8, 1e16, positive=True),
    'alpha_D': Constant(0.02, 0.3),
  },
  threshold=1e-3,
)
HOFFMANN = Law(
  'hoffmann',
  'E + A/N^alpha + B/D^beta',
  hoffmann_2022,
  ('parameters', 'tokens'),
  {'E': _ENTROPY, 'A': _SCALE, 'alpha': _EXPONENT, 'B': _SCALE, 'beta': _EXPONENT},
  threshold=1e-3,
)
KRAJEWSKI_DENSE = dataclasses.replace(HOFFMANN, name='krajewski_dense', columns=('nonembedding_parameters', 'tokens'))
CLARK_SEPARABLE = Law(
  'clark_separable',
  '10^(a log N + b log E + d)',
  clark_2022_separable,
  _CLARK_COLUMNS,
  {name: _CLARK[name] for name in 'abd'},
)
CLARK_BILINEAR = Law(
  'clark_bilinear',
  '10^(a log N + b log E + c log N log E + d)',
  clark_2022_bilinear,
  _CLARK_COLUMNS,
  _CLARK,
)
CLARK = Law(
  'clark',
  '10^(a log N + b log Ehat + c log N log Ehat + d)',
  clark_2022,
  _CLARK_COLUMNS,
  _CLARK | _SATURATION,
)
_ONE_SIZE = {'b': _CLARK['b'], 'd': Constant(-1.0, 1.0)}
ONE_SIZE = Law('one_size', '10^(d + b log E)', one_size, ('experts',), _ONE_SIZE)
ONE_SIZE_RATIO = Law('one_size_ratio', '10^(d + b log ratio)', one_size, ('ratio',), _ONE_SIZE)
ONE_SIZE_SATURATING = Law(
  'one_size_saturating', '10^(d + b log Ehat)', one_size_saturating, ('experts',), _ONE_SIZE | _SATURATION
)
KRAJEWSKI = Law(
  'krajewski',
  'c + (g/G^gamma + a)/N^alpha + b/D^beta',
  krajewski_2024,
  ('nonembedding_parameters', 'tokens', 'granularity'),
  {
    'c': _ENTROPY,
    'g': Constant(0.1, 1e3, positive=True),
    'gamma': Constant(0.1, 1.5),
    'a': _SCALE,
    'alpha': _EXPONENT,
    'b': _SCALE,
    'beta': _EXPONENT,
  },
  threshold=1e-2,
)
LUDZIEJEWSKI = Law(
  'ludziejewski',
  'a Ehat^delta N^(alpha + gamma ln Ehat) + b Ehat^omega D^(beta + zeta ln Ehat) + c',
  ludziejewski_2025,
  ('active_parameters', 'tokens', 'experts'),
  {
    'a': _SCALE,
    'alpha': Constant(-1.0, -0.02),
    'delta': Constant(-0.5, 0.5),
    'gamma': Constant(-0.03, 0.03),
    'b': _SCALE,
    'beta': Constant(-1.0, -0.02),
    'omega': Constant(-1.0, 1.0),
    'zeta': Constant(-0.05, 0.05),
    **_SATURATION,
    'c': _ENTROPY,
  },
  threshold=1e-2,
)
LAWS = {
  law.name: law
  for law in (
    *(KAPLAN, HOFFMANN, CLARK_SEPARABLE, CLARK_BILINEAR, CLARK, ONE_SIZE, ONE_SIZE_RATIO, ONE_SIZE_SATURATING),
    *(KRAJEWSKI, KRAJEWSKI_DENSE, LUDZIEJEWSKI),
  )
}


@dataclasses.dataclass(frozen=True)
class Calibrated:
  """A law with its constants.

  Attributes:
    law: the form.
    constants: by name.
    ranges: column -> least and greatest of what the constants were fitted on, of the columns where that is known.
    source: where the constants are from, and what to know of them.
  """

  law: Law
  constants: Mapping[str, float]
  ranges: Mapping[str, tuple[float, float]]
  source: str

  def loss(self, points: Points) -> Numbers:
    """Predicted loss at points, float64[...]."""
    return self.law.loss(self.constants, points)

  def outside(self, points: Points) -> list[str]:
    """A line for each column in which points leave the range that the constants were fitted on."""
    lines = []
    for name, (low, high) in self.ranges.items():
      values = np.asarray(points.get(name, low), np.float64)
      if values.min() < low or values.max() > high:
        where = f'{values.min():.4g}' + (f' to {values.max():.4g}' if np.ptp(values) else '')
        lines.append(f'{name} {where}: outside fitted range of {self.law.name}, {low:.4g} to {high:.4g}')
    return lines
