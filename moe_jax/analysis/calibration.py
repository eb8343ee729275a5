"""Calibration of multiple choice: is a model right as often as it is sure? (Guo et al. 2017, https://arxiv.org/abs/1706.04599)

A question is a row, and a choice it does not have is -inf: float[Q, C] serves questions with different numbers of
choices. Q questions, C the most choices of one, B bins of confidence:

  log_likelihoods  float[Q, C]  of each choice
  worth            float[Q, C]  1 where a choice is right and 0 elsewhere, or BIG-bench's target scores
  confidence       float[Q]     probability of the likeliest choice, the first of several alike
  correct          float[Q]     what that choice is worth
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import softmax

BINS = 10
LEVEL = 0.95
RESAMPLES = 1000
Edges = Callable[[np.ndarray, int], np.ndarray]  # confidence and the number of bins -> inner edges


class Reliability(NamedTuple):
  """What a reliability diagram draws, float[B] and int[B]; NaN where a bin is empty."""

  confidence: np.ndarray
  accuracy: np.ndarray
  questions: np.ndarray


def by_question(questions: Sequence[Any], values: Sequence[float], fill: float) -> np.ndarray:
  """Values of N choices, and the question of each in any order -> float[Q, C], questions as they first come."""
  rows: dict[Any, list[float]] = {}
  for question, value in zip(questions, values, strict=True):
    rows.setdefault(question, []).append(value)
  table = np.full((len(rows), max(map(len, rows.values()), default=0)), fill, float)
  for row, found in zip(table, rows.values(), strict=True):
    row[: len(found)] = found
  return table


def probabilities(log_likelihoods: np.ndarray) -> np.ndarray:
  """Softmax over a question's choices, float[Q, C]; 0 for what is no choice."""
  return softmax(log_likelihoods, axis=1)


def answers(probabilities: np.ndarray, worth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Confidence and correctness of each question, float[Q] both."""
  likeliest = np.argmax(probabilities, axis=1)[:, None]
  confidence, correct = (np.take_along_axis(table, likeliest, axis=1)[:, 0] for table in (probabilities, worth))
  return confidence, correct


def brier_scores(probabilities: np.ndarray, worth: np.ndarray) -> np.ndarray:
  """Squared error between probabilities and targets, summed over choices, float[Q]: 0 is best, 2 is worst.

  Brier's (1950) definition for several classes. The targets are the worths, and where several choices are right their
  shares of the whole, so that 0 can be reached. A guess among C choices, one of them right, has 1 - 1 / C.
  """
  positive = np.maximum(worth, 0)
  total = np.sum(positive, axis=1, keepdims=True)
  targets = np.divide(positive, total, out=np.zeros_like(positive), where=total > 0)
  return np.sum((probabilities - targets) ** 2, axis=1)


def equal_width(confidence: np.ndarray, bins: int) -> np.ndarray:
  """Inner edges of bins that are as wide as each other, float[B - 1]."""
  return np.arange(1, bins) / bins


def equal_mass(confidence: np.ndarray, bins: int) -> np.ndarray:
  """Inner edges of bins that hold as many questions as each other, float[B - 1]; equals are never parted."""
  return np.quantile(confidence, equal_width(confidence, bins))


def reliability(
  confidence: np.ndarray, correct: np.ndarray, bins: int = BINS, edges: Edges = equal_width
) -> Reliability:
  """Mean confidence and accuracy of each bin. A bin is open below and closed above: 0.3 is the last of (0.2, 0.3]."""
  sure, right, questions = _totals(confidence, correct, bins, edges)
  some = np.where(questions, questions, np.nan)
  return Reliability(sure / some, right / some, questions)


def expected_calibration_error(
  confidence: np.ndarray, correct: np.ndarray, bins: int = BINS, edges: Edges = equal_width
) -> float:
  """Sum over bins of questions / Q |accuracy - confidence|, between 0 and 1.

  Naeini et al. 2015; Guo et al. 2017, equation 3.
  """
  sure, right, _ = _totals(confidence, correct, bins, edges)
  return float(np.sum(np.abs(right - sure)) / len(confidence))


def _totals(confidence: np.ndarray, correct: np.ndarray, bins: int, edges: Edges) -> tuple[np.ndarray, ...]:
  """Of each bin the sums of confidence and correctness, and how many questions fall in it, [B] each."""
  number = np.searchsorted(edges(confidence, bins), confidence, side='left')
  return tuple(np.bincount(number, values, minlength=bins) for values in (confidence, correct, None))


def bootstrap_interval(
  statistic: Callable[..., float], *columns: np.ndarray, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
  """An interval of a statistic of columns [Q], under questions drawn anew with replacement (Efron 1979).

  Its ends are percentiles, less the mean bias of the draws, so that they hold the statistic. Chance alone adds to an
  ECE, the more the fewer the questions, and once more to that of questions drawn anew; a mean has no such bias.
  """
  generator, questions = np.random.default_rng(seed), len(columns[0])
  draws = (generator.integers(questions, size=questions) for _ in range(resamples))
  values = [statistic(*(column[rows] for column in columns)) for rows in draws]
  low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]) - (np.mean(values) - statistic(*columns))
  return float(low), float(high)


def calibration(log_likelihoods: np.ndarray, worth: np.ndarray) -> dict[str, Any]:
  """Everything above of one task, as JSON has it: measures and their 95% intervals, and the reliability table."""
  chances = probabilities(log_likelihoods)
  confidence, correct = answers(chances, worth)
  measures: dict[str, tuple[Callable[..., float], tuple[np.ndarray, ...], tuple[float, float]]] = {
    'ece': (expected_calibration_error, (confidence, correct), (0, 1)),
    'brier': (_mean, (brier_scores(chances, worth),), (0, 2)),
    'accuracy': (_mean, (correct,), (np.min(worth), np.max(worth))),
  }
  intervals = {
    name: np.clip(bootstrap_interval(measure, *columns), *limits).tolist()
    for name, (measure, columns, limits) in measures.items()
  }
  table = reliability(confidence, correct)
  return {
    'questions': len(confidence),
    **{name: measure(*columns) for name, (measure, columns, _) in measures.items()},
    'ece_equal_mass': expected_calibration_error(confidence, correct, edges=equal_mass),
    'intervals': intervals,
    'reliability': {
      name: [None if np.isnan(value) else value for value in column.tolist()]
      for name, column in table._asdict().items()
    },
  }


def _mean(values: np.ndarray) -> float:
  return float(np.mean(values))
