"""Scaling laws by hand, at figures computed from their published constants, and what follows from them."""

import math

import numpy as np
import pytest
from scipy import optimize

from moe_jax.analysis import scaling_laws
from moe_jax.analysis.published_laws import PUBLISHED
from moe_jax.analysis.scaling_laws import CLARK, LAWS, hold
from moe_jax.analysis.scaling_optima import (
  best_experts,
  compute_optimal,
  cut_off,
  effective_parameters,
  total_parameters,
)
from moe_jax.types import ConfigError

JOINT = PUBLISHED['ludziejewski_2025'].constants


def test_by_hand():
  assert scaling_laws.kaplan_2020(4, 4, N_c=36, alpha_N=0.5, D_c=64, alpha_D=0.5) == 5  # sqrt(9 + 16)
  assert scaling_laws.hoffmann_2022(16, 9, E=1, A=8, alpha=0.5, B=3, beta=0.5) == 4  # 1 + 8/4 + 3/3
  assert scaling_laws.krajewski_2024(16, 9, 4, c=1, g=8, gamma=1, a=2, alpha=0.5, b=6, beta=0.5) == 4  # 1 + 4/4 + 6/3
  assert scaling_laws.clark_2022_separable(100, 10, a=-0.5, b=-1, d=2) == 1
  assert scaling_laws.clark_2022_bilinear(100, 10, a=-0.5, b=-1, c=0.5, d=2) == 10
  assert scaling_laws.one_size(100, b=-0.5, d=1) == 1


def test_experts_saturate():
  def saturate(experts):
    return scaling_laws.saturating_experts(experts, E_start=2, E_max=256)

  assert saturate(1) == pytest.approx(2) and saturate(1e12) == pytest.approx(256)
  assert np.all(np.diff(saturate(2.0 ** np.arange(12))) > 0)
  assert np.isnan(scaling_laws.saturating_experts(4, E_start=256, E_max=256))
  # Without a bound, and from one: E itself.
  assert scaling_laws.saturating_experts(7, E_start=1, E_max=math.inf) == pytest.approx(7)


# Computed from the published constants apart from this code, to the digits shown.
LOSSES = [
  ('kaplan_2020', {'nonembedding_parameters': 1e9, 'tokens': 1e10}, 2.4197),
  ('hoffmann_2022', {'parameters': 70e9, 'tokens': 1.4e12}, 1.9366),
  ('hoffmann_2022', {'parameters': 280e9, 'tokens': 300e9}, 1.9933),
  ('hoffmann_2022', {'parameters': 1e9, 'tokens': 2e10}, 2.5800),
  ('besiroglu_2024', {'parameters': 70e9, 'tokens': 1.4e12}, 1.9739),
  ('besiroglu_2024', {'parameters': 1e9, 'tokens': 2e10}, 2.5301),
  ('clark_2022_s_base', {'dense_parameters': 5.5e7, 'experts': 64}, 2.5290),
  ('clark_2022_s_base', {'dense_parameters': 1.3e9, 'experts': 128}, 2.0217),
  ('clark_2022_rl_r', {'dense_parameters': 5.5e7, 'experts': 64}, 2.5728),
  ('clark_2022_rl_r', {'dense_parameters': 1.3e9, 'experts': 128}, 2.0951),
  ('clark_2022_hash', {'dense_parameters': 5.5e7, 'experts': 64}, 2.5542),
  ('clark_2022_hash', {'dense_parameters': 1.3e9, 'experts': 128}, 2.0440),
  ('krajewski_2024_dense', {'nonembedding_parameters': 1e9, 'tokens': 2e10}, 2.9803),
  ('ludziejewski_2025', {'active_parameters': 1e9, 'tokens': 2e10, 'experts': 1}, 2.5776),
  ('ludziejewski_2025', {'active_parameters': 1e9, 'tokens': 2e10, 'experts': 8}, 2.5088),
  ('ludziejewski_2025', {'active_parameters': 1e9, 'tokens': 2e10, 'experts': 32}, 2.4546),
  ('ludziejewski_2025', {'active_parameters': 1e8, 'tokens': 2e9, 'experts': 1}, 3.2350),
  ('ludziejewski_2025', {'active_parameters': 5e9, 'tokens': 1e11, 'experts': 16}, 2.1796),
]


@pytest.mark.parametrize('name, point, loss', LOSSES)
def test_published_losses(name, point, loss):
  assert PUBLISHED[name].loss(point) == pytest.approx(loss, rel=1e-4)


def test_kaplan_with_one_thing_unlimited():
  # L(N) = (N_c/N)^alpha_N and L(D) = (D_c/D)^alpha_D, on which the other has no bearing.
  law = PUBLISHED['kaplan_2020']
  by_size = law.loss({'nonembedding_parameters': [1e8, 1e9], 'tokens': 1e40})
  np.testing.assert_allclose(by_size, (6.4e13 / np.array([1e8, 1e9])) ** 0.076, rtol=1e-6)
  by_data = law.loss({'nonembedding_parameters': 1e40, 'tokens': 1e10})
  assert by_data == pytest.approx((1.8e13 / 1e10) ** 0.103, rel=1e-6)


def test_krajewski_table():
  # The paper's optima at 64 experts' worth of parameters, 43 times the active; its constants are rounded.
  active, tokens, granularity, loss = np.array(
    [
      (1e8, 4.37e9, 8, 3.133),
      (1e9, 28.94e9, 16, 2.491),
      (3e9, 72.9e9, 16, 2.245),
      (7e9, 137.6e9, 32, 2.076),
      (70e9, 941e9, 32, 1.694),
      (300e9, 2.96e12, 64, 1.503),
      (1e12, 7.94e12, 64, 1.367),
    ]
  ).T
  points = {'nonembedding_parameters': 43 * active, 'tokens': tokens, 'granularity': granularity}
  np.testing.assert_allclose(PUBLISHED['krajewski_2024'].loss(points), loss, atol=0.025)


def test_ludziejewski_reduced_table():
  # experts, m, mu, n, nu of m N^mu + n D^nu + c
  for experts, *published in [
    (1, 30.3640, -0.1817, 53.9838, -0.1965),
    (2, 27.7982, -0.1780, 66.8401, -0.2065),
    (4, 24.8462, -0.1731, 87.7022, -0.2192),
    (8, 21.8330, -0.1676, 119.9126, -0.2338),
    (16, 19.0159, -0.1617, 167.5073, -0.2494),
    (32, 16.5424, -0.1557, 234.6726, -0.2652),
  ]:
    law = scaling_laws.ludziejewski_reduced(experts, **JOINT)
    np.testing.assert_allclose([law['A'], -law['alpha'], law['B'], -law['beta']], published, rtol=3e-3)
    assert law['E'] == JOINT['c']


@pytest.mark.parametrize('name', PUBLISHED)
def test_more_of_anything_helps(name):
  law = PUBLISHED[name]
  grid = {
    **dict.fromkeys(('parameters', 'nonembedding_parameters', 'dense_parameters'), np.geomspace(2e7, 1.3e9, 5)),
    **{'active_parameters': np.geomspace(2e7, 1.3e9, 5), 'tokens': np.geomspace(2e9, 2e11, 5)},
    **{'experts': np.array([1, 2, 8, 32, 512.0]), 'granularity': np.array([1, 2, 4, 8, 16.0])},
  }
  axes = np.meshgrid(*(grid[column] for column in law.law.columns), indexing='ij')
  losses = law.loss(dict(zip(law.law.columns, axes)))
  assert all(np.all(np.diff(losses, axis=axis) < 0) for axis in range(losses.ndim))


def test_what_is_outside_the_fitted_range():
  law = PUBLISHED['clark_2022_s_base']
  inside = {'dense_parameters': [1e8, 1e9], 'experts': 64, 'tokens': 1.3e11}
  assert not law.outside(inside) and not law.outside({'dense_parameters': 1e9, 'experts': 1})
  assert law.outside(inside | {'experts': [8, 1024]}) == ['experts 8 to 1024: outside fitted range of clark, 1 to 512']
  assert law.outside({'experts': 1024}) == ['experts 1024: outside fitted range of clark, 1 to 512']
  too_much = {'dense_parameters': 7e9, 'experts': 8, 'tokens': 1e12}
  assert [line.split()[0] for line in law.outside(too_much)] == ['dense_parameters', 'tokens']


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_constants_are_those_of_their_law(name):
  law = PUBLISHED[name]
  assert set(law.constants) == set(law.law.constants) and LAWS[law.law.name] is law.law and law.source
  for constant, value in law.constants.items():
    start = law.law.constants[constant]
    assert start.low < start.high and (not start.positive or start.low > 0)
    assert start.low / 1e2 < value < start.high * 1e2 if start.positive else start.low < value < start.high


@pytest.mark.parametrize('name', ['besiroglu_2024', 'hoffmann_2022', 'krajewski_2024_dense'])
def test_compute_optimal_is_the_minimum(name):
  constants = PUBLISHED[name].constants
  for flops in (1e18, 1e22):

    def loss(size, flops=flops):
      return scaling_laws.hoffmann_2022(np.exp(size), flops / 6 / np.exp(size), **constants)

    found = optimize.minimize_scalar(loss, bounds=(10, 30), method='bounded', options={'xatol': 1e-10})
    best = compute_optimal(flops, **constants)
    assert best.loss == pytest.approx(found.fun, abs=1e-12) and best.parameters == pytest.approx(
      np.exp(found.x), rel=1e-3
    )
    assert 6 * best.parameters * best.tokens == pytest.approx(flops)


def test_compute_optimal_of_hoffmann():
  # Computed apart from this code, to four digits: the rounded constants, and those of the replication.
  flops = np.array([1e19, 1e21, 5.76e23])
  best = compute_optimal(flops, **PUBLISHED['hoffmann_2022'].constants)
  np.testing.assert_allclose(best.parameters, [2.280e8, 1.824e9, 3.219e10], rtol=4e-4)
  np.testing.assert_allclose(best.tokens, [7.311e9, 9.136e10, 2.982e12], rtol=4e-4)
  best = compute_optimal(flops, **PUBLISHED['besiroglu_2024'].constants)
  np.testing.assert_allclose(best.parameters, [2.622e8, 2.778e9, 7.225e10], rtol=4e-4)
  np.testing.assert_allclose(best.tokens, [6.357e9, 5.999e10, 1.329e12], rtol=4e-4)


# Ludziejewski et al.: parameters and tokens in billions for 1e20, 1e21 and 1e22 FLOPs; losses computed apart.
JOINT_OPTIMA = {
  1: [(1.7, 9.7, 2.5897), (5.7, 29.3, 2.3502), (18.8, 88.6, 2.1575)],
  2: [(1.5, 11.4, 2.5745), (5, 33, 2.3354), (17.4, 96, 2.1434)],
  4: [(1.2, 13.9, 2.5540), (4.4, 38, 2.3164), (15.8, 105.4, 2.1262)],
  8: [(0.990, 17, 2.5291), (3.8, 44.3, 2.2945), (14.4, 115.8, 2.1071)],
  16: [(0.810, 20.7, 2.5013), (3.3, 51.2, 2.2713), (13.2, 126.5, 2.0878)],
  32: [(0.669, 24.9, 2.4724), (2.85, 58.4, 2.2483), (12.2, 136.9, 2.0694)],
}


@pytest.mark.parametrize('experts', JOINT_OPTIMA)
def test_compute_optimal_of_ludziejewski(experts):
  best = compute_optimal(np.array([1e20, 1e21, 1e22]), **scaling_laws.ludziejewski_reduced(experts, **JOINT))
  parameters, tokens, losses = np.array(JOINT_OPTIMA[experts]).T
  found = best.parameters / 1e9
  assert np.all(np.isclose(found, parameters, rtol=0.02) | (found.round(1) == parameters))  # 1.5 may be 1.45
  np.testing.assert_allclose(best.tokens / 1e9, tokens, rtol=0.02)
  np.testing.assert_allclose(best.loss, losses, rtol=1e-4)


def test_total_parameters():
  # By hand: a width of 1024 in 16 layers.
  embeddings, square = 2 * 50257 * 1024, 16 * 1024**2
  active = embeddings + 13 * square
  assert total_parameters(active, 1) == pytest.approx(active)
  np.testing.assert_allclose(total_parameters(active, [2, 8]), [embeddings + 22 * square, embeddings + 76 * square])


@pytest.mark.parametrize('flops, memory', [(1e20, 2e9), (1e21, 24e9), (1e22, 80e9), (1e23, 80e9), (1e24, 640e9)])
def test_best_experts_is_the_best_of_a_fine_grid(flops, memory):
  best = best_experts(flops, memory)
  sizes = np.geomspace(1e7, 1e12, 20001)[:, None]
  experts = np.array([1, 2, 4, 8, 16, 32])
  losses = scaling_laws.ludziejewski_2025(sizes, flops / 6 / sizes, experts, **JOINT)
  losses = np.where(2 * total_parameters(sizes, experts) <= memory, losses, np.inf)
  assert best.experts == experts[np.argmin(losses.min(axis=0))]
  # A step of the grid is 0.06 % of the size, by which the loss changes with a slope of no more than 0.1.
  assert best.loss - 1e-9 <= losses.min() <= best.loss + 6e-5
  assert 2 * best.total_parameters <= memory * (1 + 1e-9) and 6 * best.parameters * best.tokens == pytest.approx(flops)


def test_best_experts_of_the_paper():
  # Its table, for memories of 24, 80 and 640 GB, where 32 is "32 or more". It counts bytes in another way, and so may
  # differ: by a factor of two at most.
  table = {1e21: (16, 32, 32), 1e22: (4, 16, 32), 1e23: (1, 8, 32), 1e24: (1, 1, 16)}
  for flops, row in table.items():
    found = [best_experts(flops, memory).experts for memory in (24e9, 80e9, 640e9)]
    assert np.all(np.abs(np.log2(found) - np.log2(row)) <= 1), (flops, found)
    assert found == sorted(found), 'more memory, more experts'


def test_best_experts_with_room_is_the_compute_optimum():
  best = best_experts(1e21, 1e15)
  free = compute_optimal(1e21, **scaling_laws.ludziejewski_reduced(32, **JOINT))
  assert (best.experts, best.parameters, best.tokens) == (
    32,
    pytest.approx(free.parameters),
    pytest.approx(free.tokens),
  )
  with pytest.raises(ConfigError, match='memory=1'):
    best_experts(1e21, 1)


@pytest.mark.parametrize(
  'router, size, experts, capacity, effective',
  [
    ('s_base', 5.5e7, 64, 53.7687, 2.789e8),
    ('s_base', 1.3e9, 128, 91.4047, 4.644e9),
    ('rl_r', 5.5e7, 64, 57.0157, 2.270e8),
    ('rl_r', 1.3e9, 128, 101.1486, 2.986e9),
    ('hash', 5.5e7, 64, 58.9222, 2.309e8),
    ('hash', 1.3e9, 128, 102.9394, 3.801e9),
  ],
)
def test_effective_parameters(router, size, experts, capacity, effective):
  constants = PUBLISHED[f'clark_2022_{router}'].constants
  saturation = {name: constants[name] for name in ('E_start', 'E_max')}
  assert scaling_laws.saturating_experts(experts, **saturation) == pytest.approx(capacity, rel=1e-5)
  dense = effective_parameters(size, experts, **constants)
  assert dense == pytest.approx(effective, rel=3e-4)
  # What it means: a dense model of that size has the loss of the sparse one.
  sparse_loss = scaling_laws.clark_2022(size, experts, **constants)
  assert scaling_laws.clark_2022(dense, 1, **constants) == pytest.approx(sparse_loss, rel=1e-12)


def test_at_the_cut_off_experts_do_not_matter():
  constants = PUBLISHED['clark_2022_rl_r_refit'].constants
  size = cut_off(constants['b'], constants['c'])
  losses = scaling_laws.clark_2022(size, np.array([1, 8, 512]), **constants)
  np.testing.assert_allclose(losses, losses[0], rtol=1e-12)
  assert size == pytest.approx(93e9, rel=0.01)


def test_constants_can_be_held():
  constants = dict(PUBLISHED['clark_2022_hash'].constants)
  point = {'dense_parameters': 1e8, 'experts': np.array([2, 64])}
  held = hold(CLARK, E_start=constants.pop('E_start'), E_max=constants.pop('E_max'))
  assert list(held.constants) == ['a', 'b', 'c', 'd']
  np.testing.assert_array_equal(held.loss(constants, point), PUBLISHED['clark_2022_hash'].loss(point))
  with pytest.raises(ConfigError, match='no constant f: it has a, b, c, d'):
    hold(CLARK, f=1)


def test_a_law_names_the_column_that_it_lacks():
  with pytest.raises(ConfigError, match='kaplan needs the column tokens: points have nonembedding_parameters'):
    PUBLISHED['kaplan_2020'].loss({'nonembedding_parameters': 1e9})
