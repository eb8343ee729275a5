"""What experts specialise in, from counts of who went where.

Every measure is a function of counts, or of the experts that tokens chose, and knows no model. Letters: V token ids, or
any other rows of a table; E experts, its columns; N tokens; K choices a token, -1 where one is not made.

Fedus, Dean and Zoph (2022), section 8, and Zoph et al. (2022), section 7, look at which tokens an expert is given;
Lewis et al. (2021) at the token before; Muennighoff et al. (2024) measure saturation, co-activation and domains.
"""

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

KINDS = ('letters', 'digits', 'whitespace', 'punctuation', 'special', 'other')


class Association(NamedTuple):
  """How much the rows of a table of counts tell of its columns, such as token ids of the experts they go to.

  Attributes:
    bits: the mutual information of the counts as they are. Finite samples have some even where nothing is related.
    baseline_bits: that much: the mean over tables drawn at random with the same margins, as permuting the rows of the
      tokens would give.
    deviation_bits: the standard deviation of those.
    entropy_bits: of the columns, the most that there is to tell.
    column_bits: float[E], what each column has to tell: the divergence of its rows from all rows, less its baseline.
  """

  bits: float
  baseline_bits: float
  deviation_bits: float
  entropy_bits: float
  column_bits: np.ndarray

  @property
  def share(self) -> float:
    """The uncertainty coefficient I / H(columns), adjusted for chance: 0 where nothing is related, 1 where rows decide.

    (I - E[I]) / (H - E[I]) as in Vinh, Epps and Bailey (2010); 0 where there is nothing to tell.
    """
    room = self.entropy_bits - self.baseline_bits
    return (self.bits - self.baseline_bits) / room if room > 1e-9 else 0.0


def tabulate(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """Counts int64[R, C] of pairs, from int[N] twice; what is negative is left out."""
  there = (rows >= 0) & (columns >= 0)
  places = rows[there].astype(np.int64) * shape[1] + columns[there]
  return np.bincount(places, minlength=shape[0] * shape[1]).reshape(shape)


def shares(counts: np.ndarray, axis: int | None = None) -> np.ndarray:
  """Counts over their sum; 0 where there are none."""
  return counts / np.maximum(np.sum(counts, axis=axis, keepdims=axis is not None), 1)


def entropy(probs: np.ndarray) -> float:
  """Of float[...] that sum to 1, in bits."""
  some = probs[probs > 0]
  return float(-np.sum(some * np.log2(some)))


def divergences(counts: np.ndarray) -> np.ndarray:
  """KL(P(row | column), P(row)) in bits, [R, C] -> float[C]; 0 for columns without counts.

  Their mean, weighted by the shares of columns, is the mutual information.
  """
  inside, overall = shares(counts, axis=0), shares(np.sum(counts, axis=1))[:, None]
  ratio = np.divide(inside, overall, out=np.ones_like(inside), where=inside > 0)
  return np.sum(inside * np.log2(ratio), axis=0)


def association(counts: np.ndarray, draws: int = 10, seed: int = 0) -> Association:
  """What the rows of whole counts int[R, C] tell of the columns, beside what chance does.

  Args:
    counts: each pair counted once.
    draws: tables for the baseline.
    seed: of those.
  """
  from scipy.stats import random_table  # only here, and slow to import

  counts = counts[np.any(counts, axis=1)]
  weights, found = shares(np.sum(counts, axis=0)), divergences(counts)
  if np.sum(counts) == 0:
    return Association(0.0, 0.0, 0.0, 0.0, found)
  tables = random_table(np.sum(counts, axis=1), np.sum(counts, axis=0), seed=np.random.default_rng(seed))
  chance = np.stack([divergences(tables.rvs()) for _ in range(draws)])
  totals = chance @ weights
  return Association(
    bits=float(found @ weights),
    baseline_bits=float(np.mean(totals)),
    deviation_bits=float(np.std(totals)),
    entropy_bits=entropy(weights),
    column_bits=found - np.mean(chance, axis=0),
  )


def lifts(counts: np.ndarray) -> np.ndarray:
  """P(row | column) / P(row), [R, C] -> float[R, C]: 1 by chance, and 0 for rows without counts."""
  by_chance = np.sum(counts, axis=1, keepdims=True) * np.sum(counts, axis=0, keepdims=True)  # times all counts
  return np.divide(counts * np.sum(counts), by_chance, out=np.zeros(counts.shape), where=by_chance > 0)


def top_rows(counts: np.ndarray, column: int, most: int = 10, least: int = 20) -> tuple[np.ndarray, np.ndarray]:
  """The tokens of an expert, best first: by lift, of those seen `least` times and more than by chance; by share.

  Args:
    counts: [V, E].
    column: the expert.
    most: tokens, of each.
    least: as often a token must be seen for its lift to count.

  Returns:
    Token ids, int[at most `most`] each.
  """
  own, lift = counts[:, column], lifts(counts)[:, column]
  by_share = np.lexsort((-lift, -own))[:most]
  by_lift = np.lexsort((-own, -lift))
  known = (np.sum(counts, axis=1) >= least) & (lift > 1)
  return by_lift[known[by_lift]][:most], by_share[own[by_share] > 0]


def token_cosines(counts: np.ndarray, others: np.ndarray) -> np.ndarray:
  """How alike experts of two layers are in what they are given: [V, E], [V, F] -> float[E, F].

  The cosine of P(token | expert) - P(token) of both: without the difference frequent tokens would make all alike.
  """

  def beyond_chance(counts: np.ndarray) -> np.ndarray:
    away = shares(counts, axis=0) - shares(np.sum(counts, axis=1))[:, None] * np.any(counts, axis=0)
    return away / np.maximum(np.linalg.norm(away, axis=0), 1e-12)

  return beyond_chance(counts).T @ beyond_chance(others)


def matched(similarity: np.ndarray) -> float:
  """The mean similarity of the best pairs, float[E, F]: numbers of experts mean nothing, so each finds its partner."""
  from scipy.optimize import linear_sum_assignment

  return float(np.mean(similarity[linear_sum_assignment(similarity, maximize=True)]))


def chosen(experts: np.ndarray, num_experts: int) -> np.ndarray:
  """bool[N, E], the experts that each token has chosen, from int[N, K]."""
  table = np.zeros((len(experts), num_experts + 1), bool)  # the last column takes what is not made
  np.put_along_axis(table, experts.astype(np.int64), True, axis=1)
  return table[:, :num_experts]


def coactivation(experts: np.ndarray, num_experts: int) -> np.ndarray:
  """Of the tokens of each expert, the share that chose each other too, int[N, K] -> float[E, E]; the diagonal is 0.

  Muennighoff et al. (2024).
  """
  sets = chosen(experts, num_experts).astype(np.float64)
  together = sets.T @ sets
  return together * (1 - np.eye(num_experts)) / np.maximum(np.diag(together), 1)[:, None]


def retention(experts: np.ndarray, others: np.ndarray, num_experts: int) -> tuple[float, float]:
  """The share of choices int[N, K] that the same tokens make in `others` too, and what that would be by chance.

  With another checkpoint's choices and the last one's it is router saturation (Muennighoff et al. 2024);
  with first choices alone, of K = 1, the share of tokens that keep their expert (Dai et al. 2022).
  """
  these, those = (chosen(x, num_experts) for x in (experts, others))
  made = max(int(np.sum(these)), 1)
  by_chance = np.sum(np.mean(these, axis=0) * np.mean(those, axis=0)) * len(these)
  return float(np.sum(these & those) / made), float(by_chance / made)


def dropped_shares(rows: np.ndarray, made: np.ndarray, dropped: np.ndarray, num_rows: int) -> np.ndarray:
  """The share of choices that found their expert full, by kind, position or whatever `rows` are.

  Args:
    rows: int[N], of each token; negative ones are left out.
    made, dropped: bool[N, K], choices.
    num_rows: R.

  Returns:
    float[R]; NaN where no choice was made.
  """
  there = rows >= 0
  asked, lost = (np.bincount(rows[there], np.sum(x, axis=1)[there], num_rows) for x in (made, dropped))
  return np.divide(lost, asked, out=np.full(num_rows, np.nan), where=asked > 0)


def token_kinds(texts: Sequence[str], special: Sequence[bool]) -> np.ndarray:
  """What each token is, int[V] into KINDS, by its text but for blanks around it, and by whether it is no text at all.

  A text of several kinds is 'other'; so is half a letter.
  """
  return np.array([KINDS.index('special' if none else _kind(text)) for text, none in zip(texts, special)], np.int64)


def _kind(text: str) -> str:
  letters = text.strip()
  if not letters:
    return 'whitespace' if text else 'other'
  kinds = {unicodedata.category(letter)[0] for letter in letters}
  names = {'L': 'letters', 'M': 'letters', 'N': 'digits', 'P': 'punctuation', 'S': 'punctuation'}
  found = {names.get(kind, 'other') for kind in kinds}
  return found.pop() if len(found) == 1 else 'other'
