"""Fits a scaling law to points, and says how far its constants can be trusted.

Errors are ln(predicted / measured): about the relative error of the loss. A fit draws many starts, keeps the best, goes
down from each by Levenberg-Marquardt to the least squares, and for a law with a threshold on by L-BFGS to the least sum
of Huber's losses, as Hoffmann et al. 2022 do. Derivatives are exact: a law is evaluated a tiny imaginary step away.

Letters: n points, k constants, R resamples.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import optimize, special

from moe_jax.analysis.scaling_laws import Calibrated, Law, Numbers, Points
from moe_jax.analysis.scaling_points import checked
from moe_jax.types import ConfigError

_STARTS_A_RESTART = 256
_TINY = 1e-30  # a step so small that its square is nothing beside 1


@dataclasses.dataclass(frozen=True)
class Fit(Calibrated):
  """A law fitted to points.

  Attributes:
    points: float64[n] each, the law's columns and 'loss'.
    residuals: float64[n], ln(predicted / measured).
  """

  points: Mapping[str, np.ndarray]
  residuals: np.ndarray

  @property
  def rmse(self) -> float:
    """Root of the mean squared residual. Divided by ln 10 it is that of log10 L, as Clark et al. have it."""
    return float(np.sqrt(np.mean(self.residuals**2)))


@dataclasses.dataclass(frozen=True)
class Bootstrap:
  """Constants of fits to resampled points.

  Attributes:
    law: the form.
    constants: name -> float64[R].
  """

  law: Law
  constants: Mapping[str, np.ndarray]

  def intervals(self, level: float = 0.9) -> dict[str, tuple[float, float]]:
    """Low and high of each constant, between which the share `level` of the resamples lies."""
    bounds = {name: _percentiles(values, level) for name, values in self.constants.items()}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}

  def loss(self, points: Points, level: float = 0.9) -> np.ndarray:
    """float64[2, n], low and high of the law itself at n points: a run will stray from it by its own noise besides."""
    columns = {name: np.atleast_1d(values) for name, values in points.items()}
    constants = {name: values[:, None] for name, values in self.constants.items()}
    return _percentiles(self.law.loss(constants, columns), level)

  def interval(self, function: Callable[..., Numbers], level: float = 0.9) -> np.ndarray:
    """float64[2, ...], low and high of a function of constants by name, such as the optimum for a budget."""
    return _percentiles(function(**self.constants), level)


def fit(law: Law, points: Points, restarts: int = 16, seed: int = 0) -> Fit:
  """Constants with which the law is nearest to measured losses.

  Args:
    law: to fit.
    points: float64[n] each, the law's columns and 'loss'; other columns may be there.
    restarts: how many of 256 times as many random starts to go down from.
    seed: of the starts.

  Raises:
    ConfigError: if points lack a column, are not finite and positive, are too few, or do not tell all constants.
  """
  columns = checked(points, law.columns, len(law.constants), law.name)
  problem = _Problem(law, columns)
  low, high = problem.internal(np.array([(start.low, start.high) for start in law.constants.values()]).T)
  starts = np.random.default_rng(seed).uniform(low, high, (_STARTS_A_RESTART * restarts, len(low)))
  with np.errstate(all='ignore'):
    costs = np.nan_to_num(problem.cost(problem.residuals(starts)), nan=np.inf)
    ends = [problem.descend(start) for start in starts[np.argsort(costs)[:restarts]]]
    best = min(ends, key=lambda x: np.nan_to_num(problem.cost(problem.residuals(x)), nan=np.inf))
    _check_told(law, problem, best)
  constants = {name: float(value[0]) for name, value in problem.constants(best).items()}
  ranges = {name: (float(columns[name].min()), float(columns[name].max())) for name in law.columns}
  source = f'fitted to {len(columns["loss"])} points'
  return Fit(law, constants, ranges, source, points=columns, residuals=problem.residuals(best))


def bootstrap(fitted: Fit, resamples: int = 200, seed: int = 0) -> Bootstrap:
  """Fits again to the law's own losses, strayed by errors drawn from the fit's.

  Points stay where they are, since a sweep is planned and small: drawn with replacement, its points would often not
  tell all constants any more. A fit of k constants to n points makes errors too small by sqrt((n - k) / n) on average;
  that is made up for. With few points and a threshold far below their noise the intervals are still somewhat narrow.

  Args:
    fitted: to what, and from where each fit starts.
    resamples: R, how many fits.
    seed: of the draws.
  """
  law, columns, count = fitted.law, fitted.points, len(fitted.residuals)
  rng = np.random.default_rng(seed)
  errors = (fitted.residuals - fitted.residuals.mean()) * np.sqrt(count / (count - len(law.constants)))
  drawn = rng.choice(errors, (resamples, count))
  start = _Problem(law, columns).internal(np.array([fitted.constants[name] for name in law.constants]))
  with np.errstate(all='ignore'):
    losses = fitted.loss(columns) * np.exp(-drawn)  # an error is of the prediction
    ends = np.stack([_Problem(law, {**columns, 'loss': loss}).descend(start) for loss in losses])
    return Bootstrap(law, {name: value[:, 0] for name, value in _Problem(law, columns).constants(ends).items()})


class _Problem:
  """A law and points as functions of x, float64[..., k]: constants, of positive ones log2."""

  def __init__(self, law: Law, columns: Mapping[str, np.ndarray]):
    self.law, self.columns, self.measured = law, columns, np.log(columns['loss'])
    self.positive = np.array([start.positive for start in law.constants.values()])

  def internal(self, values: np.ndarray) -> np.ndarray:
    return np.where(self.positive, np.log2(np.where(self.positive, values, 1.0)), values)

  def constants(self, x: np.ndarray) -> dict[str, np.ndarray]:
    """name -> [..., 1], to broadcast with points."""
    values = np.where(self.positive, 2 ** np.where(self.positive, x, 0.0), x)
    return {name: values[..., i, None] for i, name in enumerate(self.law.constants)}

  def residuals(self, x: np.ndarray) -> np.ndarray:
    """[..., n]."""
    return np.log(self.law.loss(self.constants(x), self.columns)) - self.measured

  def jacobian(self, x: np.ndarray) -> np.ndarray:
    """float64[n, k], of the residuals."""
    return self.residuals(x + 1j * _TINY * np.eye(len(x))).imag.T / _TINY

  def cost(self, residuals: np.ndarray) -> np.ndarray:
    """float64[...], the sum of Huber's losses."""
    if np.isinf(self.law.threshold):
      return 0.5 * np.sum(residuals**2, axis=-1)
    return np.sum(special.huber(self.law.threshold, residuals), axis=-1)

  def descend(self, x: np.ndarray) -> np.ndarray:
    """The nearest minimum, as far as one can tell."""
    x = optimize.least_squares(self.residuals, x, self.jacobian, method='lm', max_nfev=500).x
    if np.isinf(self.law.threshold):
      return x
    # In coordinates in which the least squares are round L-BFGS finds its way; in those of the constants, where A and
    # alpha trade for each other along a narrow valley, it stops early.
    try:
      round_ = np.linalg.pinv(np.linalg.qr(self.jacobian(x), mode='r'))
    except np.linalg.LinAlgError:
      return x

    def value_and_gradient(y: np.ndarray) -> tuple[Any, np.ndarray]:
      here = x + round_ @ y
      residuals = self.residuals(here)
      slopes = np.clip(residuals, -self.law.threshold, self.law.threshold)
      return self.cost(residuals) / scale, (slopes @ self.jacobian(here)) @ round_ / scale

    scale = self.cost(self.residuals(x)) or 1.0
    y = optimize.minimize(value_and_gradient, np.zeros(len(x)), jac=True, method='L-BFGS-B').x
    return x + round_ @ y


def _check_told(law: Law, problem: _Problem, x: np.ndarray) -> None:
  """Raises ConfigError unless the standard error of each constant is small enough to mean something.

  Losses are taken to be uncertain by 1e-6 at least: else constants that only move together would look certain wherever
  a law fits exactly.
  """
  residuals, jacobian = problem.residuals(x), problem.jacobian(x)
  error = max(1e-6, np.sqrt(np.sum(residuals**2) / (len(residuals) - len(x))))
  lost = ~np.isfinite(jacobian).all(axis=0) | (jacobian == 0).all(axis=0)  # as of E_max, when it went to infinity
  if not lost.any():
    _, singular, directions = np.linalg.svd(jacobian, full_matrices=False)
    errors = error * np.linalg.norm(directions / np.maximum(singular, _TINY)[:, None], axis=0)
    lost = errors > np.where(problem.positive, 10.0, 1.0)  # ten doublings, or one unit of an exponent
  if lost.any():
    untold = [name for name, is_lost in zip(law.constants, lost) if is_lost]
    raise ConfigError(
      f'These points do not tell {", ".join(untold)} of the law {law.name}: hold some of its constants (hold), take a'
      f' law with fewer, or points that lie further apart in {", ".join(law.columns)}.'
    )


def _percentiles(values: np.ndarray, level: float) -> np.ndarray:
  """float64[2, ...], of values[R, ...]; always one of the values, since E_max may be infinite."""
  return np.quantile(values, [0.5 - level / 2, 0.5 + level / 2], axis=0, method='inverted_cdf')
