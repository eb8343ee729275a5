"""When a run is taken to diverge."""

import math
from unittest import mock

import numpy as np
import pytest

from moe_jax.runs.roll_back import LossWatch
from moe_jax.runs.train import go_back
from moe_jax.types import ConfigError


def told(watch, losses, first=1):
  return [watch.diverged(step, loss) for step, loss in enumerate(losses, first)]


def usual(steps, seed=0):
  return list(3 + 0.1 * np.random.default_rng(seed).normal(size=steps))


def test_the_usual_ups_and_downs_are_none():
  assert not any(told(LossWatch(6.0), usual(500)))


def test_a_spike_that_stays_is_told_of_from_where_it_began():
  answers = told(LossWatch(6.0, patience=4), usual(50) + [5.0] * 6)
  assert answers[:53] == [None] * 53 and answers[53] == 51


def test_a_spike_that_passes_is_none_and_does_not_count_as_usual():
  watch = LossWatch(6.0, patience=4)
  assert not any(told(watch, usual(50) + [50.0] * 3 + usual(20)))
  assert told(watch, [5.0] * 4, first=101)[-1] == 101, 'the high ones left the mean alone'


def test_no_number_is_a_divergence_at_once():
  watch = LossWatch(6.0)
  assert watch.diverged(7, math.nan) == 7 and watch.diverged(8, math.inf) == 8
  assert told(LossWatch(6.0), [*usual(50), 9.0, 9.0, math.nan])[-1] == 51


def test_it_may_go_back_so_often():
  watch = LossWatch(6.0, at_most=2)
  watch.count(5), watch.count(9)
  with pytest.raises(ConfigError, match='diverged 3 times, last at step 12'):
    watch.count(12)
  with pytest.raises(ConfigError, match='ROLL_BACK=-1'):
    LossWatch(-1)


def test_a_run_that_stops_for_its_losses_does_not_go_on_from_a_local_checkpoint_of_them():
  checkpointer, local = mock.Mock(), mock.Mock()
  checkpointer.all_steps.return_value = [7]
  with pytest.raises(ConfigError, match='diverged at step 5, and no checkpoint is older'):
    go_back(mock.Mock(), checkpointer, local, LossWatch(6.0), diverged_at=5)
  local.clear.assert_called_once()
  checkpointer.delete_after.assert_not_called()
