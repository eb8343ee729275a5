"""Metrics of tasks by their official definitions: (targets, predictions) or (targets, scores) -> name -> percent.

Targets and predictions are what a task's `postprocess_fn` makes of them, an example each, and scores log-likelihoods of
the targets. seqio tells by the names of the arguments which of both a metric wants.
"""

import collections
import importlib
import re
import string
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from moe_jax.types import ConfigError

Values = dict[str, float]
INVALID = -1  # the class of what names none


class Grouped(NamedTuple):
  """A target that belongs to a question with several examples."""

  question: tuple[int, ...]
  value: Any


# ---- Classes ---------------------------------------------------------------------------------------------------------
def accuracy(targets: Sequence[Any], predictions: Sequence[Any]) -> Values:
  """How many are equal."""
  return {'accuracy': _percent(target == prediction for target, prediction in zip(targets, predictions, strict=True))}


def binary_f1(targets: Sequence[int], predictions: Sequence[int]) -> Values:
  """F1 of class 1 (GLUE's MRPC and QQP, MultiRC's F1a). A prediction of no class counts as the wrong one."""
  return {'f1': 100 * _f1_of_class(targets, _wrong_where_invalid(targets, predictions), 1)}


def macro_f1(targets: Sequence[int], predictions: Sequence[int]) -> Values:
  """F1 averaged over the three classes of CB, as SuperGLUE has it. A prediction of no class misses its own."""
  return {'f1': 100 * float(np.mean([_f1_of_class(targets, predictions, label) for label in range(3)]))}


def matthews_correlation(targets: Sequence[int], predictions: Sequence[int]) -> Values:
  """Matthews' coefficient of however many classes (Gorodkin 2004), 0 where either side is constant; GLUE's CoLA."""
  classes = np.unique([*targets, *predictions])
  x, y = (np.equal.outer(np.asarray(labels), classes).astype(float) for labels in (targets, predictions))
  x, y = x - x.mean(axis=0), y - y.mean(axis=0)
  scale = np.sqrt(np.sum(x * x) * np.sum(y * y))
  return {'matthews_correlation': 100 * float(np.sum(x * y) / scale) if scale else 0.0}


def correlations(targets: Sequence[float], predictions: Sequence[float]) -> Values:
  """Pearson's and Spearman's, 0 where either side is constant; GLUE's STS-B."""
  if len(set(targets)) < 2 or len(set(predictions)) < 2:
    return {'pearson': 0.0, 'spearman': 0.0}
  pearson, spearman = scipy.stats.pearsonr(targets, predictions), scipy.stats.spearmanr(targets, predictions)
  return {'pearson': 100 * float(pearson.statistic), 'spearman': 100 * float(spearman.statistic)}


def multirc(targets: Sequence[Grouped], predictions: Sequence[int]) -> Values:
  """MultiRC's F1a, over all answers, and the questions all of whose answers are judged right."""
  right = collections.defaultdict(list)
  for target, prediction in zip(targets, predictions, strict=True):
    right[target.question].append(target.value == prediction)
  f1 = binary_f1([target.value for target in targets], predictions)
  return {**f1, 'exact_match': _percent(all(answers) for answers in right.values())}


def multiple_choice(targets: Sequence[Grouped], scores: Sequence[float]) -> Values:
  """What the likeliest choice of a question is worth: 1 if right and 0 if not, or BIG-bench's target score."""
  questions = collections.defaultdict(list)
  for target, score in zip(targets, scores, strict=True):
    questions[target.question].append((float(score), target.value))
  return {'accuracy': _percent(max(choices, key=lambda choice: choice[0])[1] for choices in questions.values())}


# ---- Texts -----------------------------------------------------------------------------------------------------------
def exact_match(targets: Sequence[Any], predictions: Sequence[str]) -> Values:
  """How many are equal, or equal one of several references, blanks around them aside."""
  pairs = zip(targets, predictions, strict=True)
  return {'exact_match': _percent(text.strip() in [t.strip() for t in references(target)] for target, text in pairs)}


def squad(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> Values:
  """SQuAD's exact match and F1 of words, by the best of several answers, but for case, punctuation and articles."""
  pairs = [
    ([plain_words(answer) for answer in answers], plain_words(text))
    for answers, text in zip(targets, predictions, strict=True)
  ]
  return {
    'exact_match': _percent(words in answers for answers, words in pairs),
    'f1': _percent(max(_bag_f1(answer, words) for answer in answers) for answers, words in pairs),
  }


def record(targets: Sequence[Grouped], predictions: Sequence[str]) -> Values:
  """As `squad`, each query once, though it was an example for each of its answers."""
  first = {
    target.question: (target.value, text) for target, text in reversed([*zip(targets, predictions, strict=True)])
  }
  return squad(*zip(*first.values()))


def word_f1(targets: Sequence[str], predictions: Sequence[str]) -> Values:
  """F1 of the words that make up names, as in code2seq (https://arxiv.org/abs/1808.01400), averaged over names."""
  pairs = zip(targets, predictions, strict=True)
  return {'word_f1': _percent(_bag_f1(name_words(target), name_words(text)) for target, text in pairs)}


def rouge(targets: Sequence[Any], predictions: Sequence[str]) -> Values:
  """F-measures of ROUGE-1, ROUGE-2 and ROUGE-Lsum, by the best of several references, averaged."""
  scorer = _library('rouge_score.rouge_scorer').RougeScorer(['rouge1', 'rouge2', 'rougeLsum'])
  results = [
    scorer.score_multi([_sentences(reference) for reference in references(target)], _sentences(text))
    for target, text in zip(targets, predictions, strict=True)
  ]
  return {name: _percent(result[name].fmeasure for result in results) for name in ('rouge1', 'rouge2', 'rougeLsum')}


def bleu(targets: Sequence[str], predictions: Sequence[str]) -> Values:
  """SacreBLEU of the corpus, with its international tokenization, as T5 reports it."""
  result = _library('sacrebleu').corpus_bleu(list(predictions), [list(targets)], tokenize='intl')
  return {'bleu': float(result.score)}


# ---- Their parts -----------------------------------------------------------------------------------------------------
def references(target: str | Sequence[str]) -> Sequence[str]:
  """One reference or several, as several."""
  return [target] if isinstance(target, str) else target


def plain_words(text: str) -> list[str]:
  """Words in lower case without punctuation and articles, as SQuAD compares answers."""
  text = ''.join(letter for letter in text.lower() if letter not in string.punctuation)
  return re.sub(r'\b(a|an|the)\b', ' ', text).split()


def name_words(name: str) -> list[str]:
  """The words of snake_case and camelCase, in lower case."""
  return [word.lower() for word in re.findall(r'[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+', name)]


def _bag_f1(target: Sequence[str], prediction: Sequence[str]) -> float:
  """Harmonic mean of precision and recall of two bags of words; of an empty one whether both are."""
  if not target or not prediction:
    return float(target == prediction)
  common = sum((collections.Counter(target) & collections.Counter(prediction)).values())
  return 2 * common / (len(target) + len(prediction))


def _f1_of_class(targets: Sequence[int], predictions: Sequence[int] | np.ndarray, label: int) -> float:
  x, y = np.equal(targets, label), np.equal(predictions, label)
  return 2 * float(np.sum(x & y)) / max(float(np.sum(x) + np.sum(y)), 1)


def _wrong_where_invalid(targets: Sequence[int], predictions: Sequence[int]) -> np.ndarray:
  return np.where(np.equal(predictions, INVALID), 1 - np.asarray(targets), predictions)


def _sentences(text: str) -> str:
  return text.replace(' . ', ' .\n')


def _percent(values: Iterable[float]) -> float:
  return 100 * float(np.mean(list(values)))


def _library(name: str) -> Any:
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    raise ConfigError(f'This metric needs {name.partition(".")[0]}: pip install rouge-score sacrebleu.') from error
