"""What experts specialise in: structure that is planted is found, chance is not taken for it, and values by hand."""

import numpy as np
import pytest

from moe_jax.analysis.specialization import (
  KINDS,
  association,
  coactivation,
  divergences,
  dropped_shares,
  lifts,
  matched,
  retention,
  tabulate,
  token_cosines,
  token_kinds,
  top_rows,
)

E, V, N = 4, 40, 4000


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.fixture
def ids(rng):
  """Token ids, some far more frequent than others."""
  return np.minimum(rng.geometric(0.1, N) - 1, V - 1)


def test_counts_are_of_pairs_that_are_there():
  table = tabulate(np.array([0, 0, 2, -1, 1]), np.array([1, 1, 0, 1, -1]), (3, 2))
  np.testing.assert_array_equal(table, [[0, 2], [0, 0], [1, 0]])


def test_information_by_hand():
  counts = np.array([[6, 2], [0, 8]])  # the first expert's tokens are all of the first id, which is half of all
  np.testing.assert_allclose(divergences(counts), [1, 0.2 * np.log2(0.4) + 0.8 * np.log2(1.6)])
  found = association(counts)
  by_definition = 6 / 16 * np.log2(2) + 2 / 16 * np.log2(0.4) + 8 / 16 * np.log2(1.6)
  np.testing.assert_allclose(found.bits, by_definition)
  np.testing.assert_allclose(found.entropy_bits, -6 / 16 * np.log2(6 / 16) - 10 / 16 * np.log2(10 / 16))
  np.testing.assert_allclose(lifts(counts), [[2, 0.4], [0, 1.6]])


def test_the_baseline_is_that_of_permuted_tokens(rng, ids):
  experts = (ids + rng.integers(0, 2, N)) % E
  found = association(tabulate(ids, experts, (V, E)), draws=200)
  permuted = [association(tabulate(rng.permutation(ids), experts, (V, E)), draws=1).bits for _ in range(200)]
  assert abs(np.mean(permuted) - found.baseline_bits) < 4 * found.deviation_bits / np.sqrt(100)
  np.testing.assert_allclose(np.std(permuted), found.deviation_bits, rtol=0.3)


def test_experts_by_token_tell_all_and_show_their_tokens(ids):
  table = np.arange(V) % E
  counts = tabulate(ids, table[ids], (V, E))
  found = association(counts)
  np.testing.assert_allclose(found.bits, found.entropy_bits)
  np.testing.assert_allclose(found.share, 1)
  for expert in range(E):
    by_lift, by_share = top_rows(counts, expert, most=3, least=5)
    np.testing.assert_array_equal(by_lift, [expert, expert + 4, expert + 8])  # equal lifts: the frequent first
    np.testing.assert_array_equal(by_share, [expert, expert + 4, expert + 8])


def test_rare_tokens_have_no_lift_and_absent_ones_are_not_shown():
  counts = np.array([[50, 50], [1, 0], [0, 50]])
  by_lift, by_share = top_rows(counts, 0)
  np.testing.assert_array_equal(by_lift, [0])  # lifted, as the second is more; but that was seen once
  np.testing.assert_array_equal(by_share, [0, 1])


def test_experts_by_chance_tell_nothing(rng, ids):
  for rows, size in ((ids, V), (rng.integers(0, 16, N), 16)):
    found = association(tabulate(rows, rng.integers(0, E, N), (size, E)))
    assert found.bits > 0.001  # a finite sample looks related
    assert abs(found.bits - found.baseline_bits) < 4 * found.deviation_bits
    assert abs(found.share) < 0.01
    assert np.all(np.abs(found.column_bits) < 0.02)  # chance is taken off that of each expert too


@pytest.mark.parametrize('size', [16, len(KINDS)], ids=['by position', 'by kind'])
def test_what_is_planted_in_one_thing_is_found_there_alone(rng, ids, size):
  rows = rng.integers(0, size, N)
  experts = np.where(rng.random(N) < 0.7, rows % E, rng.integers(0, E, N))
  assert association(tabulate(rows, experts, (size, E))).share > 0.3
  assert abs(association(tabulate(ids, experts, (V, E))).share) < 0.01


def test_one_expert_has_nothing_to_tell(ids):
  assert association(tabulate(ids, np.zeros(N, int), (V, 1))).share == 0
  empty = association(np.zeros((V, E), int))
  assert (empty.bits, empty.share) == (0, 0)


def test_layers_that_agree_but_for_names_are_alike_and_independent_ones_are_not(rng, ids):
  one = (ids // 2 + rng.integers(0, 2, N)) % E
  renamed, other = np.array([2, 0, 3, 1])[one], rng.integers(0, E, N)
  counts, same, apart = (tabulate(ids, experts, (V, E)) for experts in (one, renamed, other))
  np.testing.assert_allclose(association(tabulate(one, renamed, (E, E))).share, 1)
  np.testing.assert_allclose(matched(token_cosines(counts, same)), 1)
  np.testing.assert_allclose(token_cosines(counts, same)[np.arange(E), [2, 0, 3, 1]], 1)
  assert abs(association(tabulate(one, other, (E, E))).share) < 0.01
  assert matched(token_cosines(counts, apart)) < 0.5


def test_coactivation_by_hand():
  experts = np.array([[0, 1], [1, 0], [0, 2], [2, -1]])
  np.testing.assert_allclose(coactivation(experts, 3), [[0, 2 / 3, 1 / 3], [1, 0, 0], [1 / 2, 0, 0]])


def test_routing_is_kept_between_equal_checkpoints_and_by_hand(rng):
  experts = np.argsort(rng.random((N, E)), axis=1)[:, :2]
  assert retention(experts, experts, E)[0] == 1
  assert retention(experts, experts[:, ::-1], E)[0] == 1  # sets, whatever the order
  share, chance = retention(experts, rng.permutation(experts), E)
  assert abs(share - chance) < 0.03 and abs(chance - 0.5) < 0.01  # two of four
  ours, theirs = np.array([[0, 1], [1, 2], [3, -1]]), np.array([[1, 2], [2, 1], [0, -1]])
  np.testing.assert_allclose(retention(ours, theirs, E)[0], 3 / 5)
  np.testing.assert_allclose(retention(ours[:, :1], theirs[:, :1], E)[0], 0)


def test_dropped_choices_by_hand():
  made = np.array([[True, True], [True, False], [True, True], [True, True]])
  dropped = np.array([[False, True], [True, False], [False, False], [True, True]])
  found = dropped_shares(np.array([0, 0, 1, -1]), made, dropped, 3)
  np.testing.assert_allclose(found, [2 / 3, 0, np.nan])


def test_kinds_of_tokens():
  texts = ['a', ' the', 'É', '7', '½', ' ', '\n', '_', '==', '<1>', '<id 1>', '\\xc3', 'x1', '', '\x00']
  special = [text.startswith('<') for text in texts]
  names = ['letters'] * 3 + ['digits'] * 2 + ['whitespace'] * 2 + ['punctuation'] * 2 + ['special'] * 2 + ['other'] * 4
  assert [KINDS[kind] for kind in token_kinds(texts, special)] == names
