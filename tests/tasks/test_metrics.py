"""Metrics against values by hand, and where a library has them, against the library."""

import numpy as np
import pytest

from tasks.metrics import (
  Grouped,
  accuracy,
  binary_f1,
  bleu,
  correlations,
  exact_match,
  macro_f1,
  matthews_correlation,
  multiple_choice,
  multirc,
  name_words,
  record,
  rouge,
  squad,
  word_f1,
)
from tasks.postprocessors import class_of, rating_of


def test_classes():
  assert accuracy([0, 1, 2, 2], [0, 1, 1, -1]) == {'accuracy': 50}
  # Two hits, one false alarm, one miss, and one that names no class, which is another miss.
  assert binary_f1([1, 1, 0, 1, 1], [1, 1, 1, 0, -1]) == {'f1': pytest.approx(100 * 2 * 2 / (3 + 4))}
  assert binary_f1([1, 0], [1, -1]) == {'f1': pytest.approx(200 / 3)}  # where 0 is right, no class is a false alarm
  # Class by class 2/3, 1 and 0: the last is never predicted.
  assert macro_f1([0, 0, 1, 2], [0, -1, 1, -1]) == {'f1': pytest.approx(100 * (2 / 3 + 1 + 0) / 3)}


def test_matthews_correlation_of_two_classes_is_the_formula_of_the_book():
  targets, predictions = [1] * 6 + [0] * 4, [1, 1, 1, 1, 0, 0, 0, 0, 0, 1]
  hits, rejections, alarms, misses = 4, 3, 1, 2
  expected = (hits * rejections - alarms * misses) / np.sqrt(
    (hits + alarms) * (hits + misses) * (rejections + alarms) * (rejections + misses)
  )
  assert matthews_correlation(targets, predictions)['matthews_correlation'] == pytest.approx(100 * expected)
  assert matthews_correlation([0, 1, 1], [0, 1, 1]) == {'matthews_correlation': pytest.approx(100)}
  assert matthews_correlation([0, 1, 1], [1, 1, 1]) == {'matthews_correlation': 0}


def test_correlations():
  found = correlations([1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 16.0])
  assert found['spearman'] == pytest.approx(100)
  assert found['pearson'] == pytest.approx(100 * np.corrcoef([1, 2, 3, 4], [1, 4, 9, 16])[0, 1])
  assert correlations([1.0, 2.0], [3.0, 3.0]) == {'pearson': 0, 'spearman': 0}


def test_questions_with_several_answers():
  targets = [Grouped((0, 0), 1), Grouped((0, 0), 0), Grouped((0, 1), 1), Grouped((0, 1), 1)]
  found = multirc(targets, [1, 0, 1, 0])  # three right; one question wholly; F1a of 2 hits and 1 miss
  assert found == {'f1': pytest.approx(80), 'exact_match': 50}
  targets = [Grouped((1, 1), ['Bob', 'Ann']), Grouped((1, 1), ['Bob', 'Ann']), Grouped((1, 2), ['a red car'])]
  assert record(targets, ['bob', 'nobody', 'car']) == {'exact_match': 50, 'f1': pytest.approx(100 * (1 + 2 / 3) / 2)}


def test_squad_counts_the_best_answer_without_case_articles_and_punctuation():
  assert squad([['The Cell!', 'biology']], ['cell']) == {'exact_match': 100, 'f1': 100}
  # 'small grey cats' against 'grey cats': precision 2/3, recall 1; and nothing against an answer.
  found = squad([['grey cats', 'no'], ['yes']], ['the small grey cats', ''])
  assert found == {'exact_match': 0, 'f1': pytest.approx(100 * (0.8 + 0) / 2)}


def test_exact_match_of_any_reference():
  assert exact_match(['a', ['b', 'c '], 'd'], [' a', 'c', 'x']) == {'exact_match': pytest.approx(200 / 3)}


def test_words_of_names():
  assert name_words('__getHTTPResponse_v2') == ['get', 'http', 'response', 'v', '2']
  assert word_f1(['read_line', 'close'], ['readLines', 'close']) == {'word_f1': pytest.approx(100 * (0.5 + 1) / 2)}


def test_the_likeliest_choice_counts_in_whatever_order_they_come():
  targets = [Grouped((5,), 0.0), Grouped((2,), 1.0), Grouped((5,), 1.0), Grouped((2,), 0.0), Grouped((9,), 0.25)]
  found = multiple_choice(targets, [-1.0, -2.0, -3.0, -4.0, -9.0])
  assert found == {'accuracy': pytest.approx(100 * (0 + 1 + 0.25) / 3)}


def test_rouge():
  pytest.importorskip('rouge_score', reason='the pins have it: make clean test')
  # 'the cat sat' against 'the cat ran': 2 of 3 words, 1 of 2 pairs; the longest common subsequence is 2 of 3.
  found = rouge(['the cat ran'], ['the cat sat'])
  assert found == {'rouge1': pytest.approx(200 / 3), 'rouge2': 50, 'rougeLsum': pytest.approx(200 / 3)}
  assert rouge([['no', 'the cat sat']], ['the cat sat'])['rouge2'] == 100
  # Sentences are compared one by one, in whatever order.
  assert rouge(['a b . c d'], ['c d . a b'])['rougeLsum'] == 100


def test_bleu():
  pytest.importorskip('sacrebleu', reason='the pins have it: make clean test')
  assert bleu(['The cat sat on the mat.'], ['The cat sat on the mat.']) == {'bleu': pytest.approx(100)}
  # The quotation mark is a word of its own: right are 4 of 5 words, 3 of 4 pairs, 2 of 3 threes, 1 of 2 fours.
  found = bleu(['“aa bb cc dd'], ['«aa bb cc dd'])
  assert found == {'bleu': pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)}


def test_what_a_text_means():
  assert [class_of(text, ('False', 'True')) for text in (' True', 'true', 'False', '')] == [1, -1, 0, -1]
  assert [rating_of(text) for text in ('3.2', '5', 'five', '')] == [3.2, 5.0, -1.0, -1.0]
