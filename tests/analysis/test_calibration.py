"""Calibration against values by hand, and answers whose calibration is planted."""

import json

import numpy as np
import pytest

from moe_jax.analysis.calibration import (
  answers,
  bootstrap_interval,
  brier_scores,
  by_question,
  calibration,
  equal_mass,
  expected_calibration_error,
  probabilities,
  reliability,
)


def planted(generator, questions, gap=0.0):
  """Confidence uniform between 0.6 and 0.9, and right as often as that, or by `gap` less often."""
  confidence = generator.uniform(0.6, 0.9, questions)
  return confidence, (generator.uniform(size=questions) < confidence - gap).astype(float)


def test_questions_may_have_different_numbers_of_choices_and_come_mixed():
  table = by_question([7, 3, 7, 7, 3], [1, 2, 3, 4, 5], fill=-np.inf)
  np.testing.assert_array_equal(table, [[1, 3, 4], [2, 5, -np.inf]])
  chances = probabilities(np.log([[1, 2, 1], [3, 1, 0]], where=[[1, 1, 1], [1, 1, 0]], out=np.full((2, 3), -np.inf)))
  np.testing.assert_allclose(chances, [[0.25, 0.5, 0.25], [0.75, 0.25, 0]])
  # Likelihoods of whole texts are tiny, and only their ratios count.
  np.testing.assert_allclose(probabilities(np.log([[0.1, 0.3]]) - 5000), [[0.25, 0.75]])


def test_the_first_of_the_likeliest_answers():
  confidence, correct = answers(np.array([[0.4, 0.4, 0.2], [0.1, 0.2, 0.7]]), np.array([[0, 1, 0], [0, 0, 0.5]]))
  np.testing.assert_array_equal(confidence, [0.4, 0.7])
  np.testing.assert_array_equal(correct, [0, 0.5])


def test_brier_scores_by_hand():
  chances = np.array([[0.7, 0.2, 0.1], [1, 0, 0], [0, 1, 0], [0.5, 0.5, 0], [0.25, 0.75, 0], [0.5, 0.5, 0]])
  worth = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0], [0.2, 0.6, 0], [0, 0, 0]])
  np.testing.assert_allclose(brier_scores(chances, worth), [0.3**2 + 0.2**2 + 0.1**2, 0, 2, 0, 0, 0.5], atol=1e-12)
  for choices in (2, 5):
    guess = brier_scores(np.full((1, choices), 1 / choices), np.eye(choices)[:1])
    np.testing.assert_allclose(guess, 1 - 1 / choices)


def test_errors_of_bins_by_hand():
  confidence = np.array([0.35, 0.4, 0.55, 0.95, 0.95, 1.0])
  correct = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
  table = reliability(confidence, correct)
  np.testing.assert_array_equal(table.questions, [0, 0, 0, 2, 0, 1, 0, 0, 0, 3])
  np.testing.assert_allclose(table.confidence[[3, 5, 9]], [0.375, 0.55, 2.9 / 3])
  np.testing.assert_allclose(table.accuracy[[3, 5, 9]], [0.5, 0, 2 / 3])
  assert np.isnan(table.accuracy[[0, 4, 8]]).all()
  expected = 2 / 6 * 0.125 + 1 / 6 * 0.55 + 3 / 6 * 0.3
  assert expected_calibration_error(confidence, correct) == pytest.approx(expected)


def test_an_edge_belongs_to_the_bin_below_it():
  edges = np.arange(1, 11) / 10
  np.testing.assert_array_equal(reliability(edges, edges).questions, np.ones(10))
  above = np.nextafter(edges[:-1], 1)
  np.testing.assert_array_equal(reliability(above, above).questions, [0] + [1] * 9)
  assert reliability(np.zeros(1), np.zeros(1)).questions[0] == 1


def test_bins_of_equal_mass_hold_equally_many_and_part_no_equals():
  confidence = np.linspace(0.5, 0.6, 20)  # one or two bins of equal width
  table = reliability(confidence, np.ones(20), bins=5, edges=equal_mass)
  np.testing.assert_array_equal(table.questions, [4] * 5)
  expected = sum(4 / 20 * (1 - confidence[4 * i : 4 * i + 4].mean()) for i in range(5))
  assert expected_calibration_error(confidence, np.ones(20), 5, equal_mass) == pytest.approx(expected)
  # Of equals half are right, in whatever order they come: no error.
  confidence, correct = np.full(12, 0.5), np.array([1.0] * 6 + [0.0] * 6)
  for order in (slice(None), slice(None, None, 2)):
    assert expected_calibration_error(confidence[order], correct[order], 4, equal_mass) == pytest.approx(0)


def test_the_calibrated_have_no_error_and_the_overconfident_their_gap():
  generator = np.random.default_rng(1)
  for gap in (0.0, 0.2):
    found = expected_calibration_error(*planted(generator, 40_000, gap))
    assert found == pytest.approx(gap, abs=0.02)  # standard error of a bin of 13,000: 0.004
  correct = np.array([1.0] * 3 + [0.0] * 7)
  assert expected_calibration_error(np.ones(10), correct) == pytest.approx(0.7)  # always sure: 1 - accuracy


def test_intervals_cover_the_truth_as_often_as_they_say():
  """A mean of normal values: of 95 in a hundred intervals, give or take three standard errors."""
  generator = np.random.default_rng(2)
  samples = generator.normal(3, 1, (100, 60))
  hits = [low < 3 < high for low, high in (bootstrap_interval(np.mean, x, resamples=200) for x in samples)]
  assert abs(np.mean(hits) - 0.95) < 3 * np.sqrt(0.95 * 0.05 / 100)
  assert bootstrap_interval(np.mean, samples[0]) == bootstrap_interval(np.mean, samples[0]), 'drawn from one seed'


@pytest.mark.parametrize('gap', [0.0, 0.1])
def test_intervals_of_ece_hold_it_and_what_as_many_questions_have_on_average(gap):
  """Not 0 for the calibrated: chance alone makes an ECE."""
  generator = np.random.default_rng(3)
  average = np.mean([expected_calibration_error(*planted(generator, 400, gap)) for _ in range(400)])
  hits = 0
  for _ in range(60):
    columns = planted(generator, 400, gap)
    low, high = bootstrap_interval(expected_calibration_error, *columns, resamples=200)
    assert low <= expected_calibration_error(*columns) <= high
    hits += low <= average <= high
  assert hits / 60 > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 60)


def test_intervals_draw_questions_and_not_numbers_apart():
  confidence, correct = np.tile([0.5, 1.0], 20), np.tile([0.5, 1.0], 20)
  assert bootstrap_interval(expected_calibration_error, confidence, correct) == (0, 0)


def test_all_of_a_task_is_what_its_parts_are():
  """Three questions: sure and right, sure and wrong, and a tie of two, whose first is right."""
  log_likelihoods = np.log([[0.9, 0.05, 0.05], [0.8, 0.1, 0.1], [0.5, 0.5, 1]])
  log_likelihoods[2, 2] = -np.inf
  found = calibration(log_likelihoods, np.array([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]]))
  assert json.loads(json.dumps(found, allow_nan=False))['questions'] == 3
  assert found['accuracy'] == pytest.approx(2 / 3)
  assert found['ece'] == pytest.approx((0.1 + 0.8 + 0.5) / 3)
  brier = [0.1**2 + 2 * 0.05**2, 0.8**2 + 0.9**2 + 0.1**2, 0.5]
  assert found['brier'] == pytest.approx(np.mean(brier))
  assert found['reliability']['questions'] == [0, 0, 0, 0, 1, 0, 0, 1, 1, 0]
  assert found['reliability']['accuracy'][3:9] == [None, 1, None, None, 0, 1]
  for name in ('ece', 'brier', 'accuracy'):
    low, high = found['intervals'][name]
    assert 0 <= low <= found[name] <= high <= (2 if name == 'brier' else 1) and low < high


def test_a_model_that_gives_no_numbers_has_no_calibration():
  found = calibration(np.array([[np.nan, -1.0], [-1.0, -2.0]]), np.eye(2))
  assert np.isnan(found['ece']) and np.isnan(found['brier'])
