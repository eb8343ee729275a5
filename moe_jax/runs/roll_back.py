"""Notices that a run diverges, so that it can go back to before that and meet other batches (as PaLM and GLaM did)."""

import collections
import math

import numpy as np

from moe_jax.types import ConfigError


class LossWatch:
  """Tells from one loss after another where a run began to diverge.

  Args:
    sigmas: a loss is too high where it exceeds the mean of the recent ones by so many of their standard deviations.
    patience: so many losses in a row that are too high are a divergence, and so is one that is no number.
    window: how many losses are recent.
    at_most: how often a run may go back.

  Raises:
    ConfigError: if `sigmas` is not positive.
  """

  def __init__(self, sigmas: float, patience: int = 10, window: int = 100, at_most: int = 10):
    if sigmas <= 0:
      raise ConfigError(f'ROLL_BACK={sigmas}: standard deviations above the recent mean are wanted, such as 6.0.')
    self._sigmas, self._patience, self._at_most = sigmas, patience, at_most
    self._recent: collections.deque[float] = collections.deque(maxlen=window)
    self._high: list[int] = []
    self.times = 0

  def diverged(self, step: int, loss: float) -> int | None:
    """The step at which a divergence began that shows by now, or None."""
    if not math.isfinite(loss):
      return (self._high or [step])[0]
    recent = np.array(self._recent)
    if len(recent) >= self._patience and loss > recent.mean() + self._sigmas * max(recent.std(), 1e-6):
      self._high.append(step)
    else:
      self._high.clear()
      self._recent.append(loss)
    return self._high[0] if len(self._high) >= self._patience else None

  def count(self, step: int) -> None:
    """Notes that the run goes back from a divergence at a step.

    Raises:
      ConfigError: if it has done so too often.
    """
    self.times += 1
    self._high.clear()
    if self.times > self._at_most:
      raise ConfigError(f'The loss diverged {self.times} times, last at step {step}: stopped. Lower the learning rate.')
