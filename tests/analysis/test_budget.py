"""Dense or sparse for a budget: limits are kept, the law is inverted, and the models are those that gin builds."""

import gin
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import run
from moe_jax.analysis import budget as budgets
from moe_jax.analysis.budget import Budget, Candidate, candidates, dense_flops, opinions
from moe_jax.analysis.forward_pass import trace_forward
from moe_jax.analysis.parameters import count_parameters
from moe_jax.analysis.published_laws import PUBLISHED
from moe_jax.analysis.scaling_laws import ludziejewski_reduced
from moe_jax.analysis.scaling_optima import compute_optimal
from moe_jax.runs.train import train
from moe_jax.types import ConfigError

G = 2.0**30


@pytest.mark.parametrize('experts', [1, 2, 8])
def test_parameters_are_those_of_the_model_that_gin_builds(fresh_gin, experts):
  one = Candidate(experts, 256, 0, 0, 1e9, 1e18, 3.0, '')
  one = one._replace(active=budgets.parameters(256, 1, 32128))
  bound = budgets.bindings(one, 2**20, 2048, 8, 32128)
  run.parse_gin('train', ['gin/experiments/advised.gin'], [f'{k} = {v!r}' for k, v in bound.items()], ['.'])
  given = gin.get_bindings(train)
  count = count_parameters(trace_forward(given['objective'].model, given['data'].spec()))
  norms, routers = (2 * 4 + 1) * 256, 4 * 256 * experts if experts > 1 else 0
  assert count.total == budgets.parameters(256, experts, 32128) + norms + routers
  assert count.active == one.active + norms + routers
  assert bound['BATCH_SIZE'] * 2048 * bound['TRAIN_STEPS'] == pytest.approx(1e9, rel=1e-3)


@given(
  flops=st.floats(1e19, 1e23),
  serving=st.floats(2, 200),
  training=st.floats(20, 5000),
  tokens=st.floats(1e9, 1e13),
  slower=st.floats(0.4, 1),
)
def test_every_candidate_meets_every_limit(flops, serving, training, tokens, slower):
  budget = Budget(flops, slower * flops, training * G, training * G, serving * G, tokens=tokens)
  found = candidates(budget)
  assert [one.loss for one in found] == sorted(one.loss for one in found)
  for one in found:
    assert 2 * one.total <= serving * G and 16 * one.total <= training * G and one.tokens <= tokens
    assert one.flops <= (flops if one.experts == 1 else slower * flops) * (1 + 1e-9)
    assert one.total == budgets.parameters(one.width, one.experts, 32128)
    assert one.width == 64 * one.layers


def test_without_limits_the_sizes_are_the_laws_own():
  for one in candidates(Budget(1e21, 1e21, vocabulary=50257)):
    law = ludziejewski_reduced(one.experts, **PUBLISHED[budgets.JOINT].constants)
    best = compute_optimal(1e21, **law)
    assert one.active == pytest.approx(best.parameters, rel=0.1)  # widths are multiples of 64
    assert best.loss <= one.loss < best.loss + 1e-3 and one.limited_by == ''


def test_what_is_in_the_way_is_named():
  free = {one.experts: one for one in candidates(Budget(1e22, 1e22))}
  assert not any(one.limited_by for one in free.values())
  served = candidates(Budget(1e22, 1e22, serving_bytes=24 * G))
  assert {one.limited_by for one in served if one.experts >= 2} == {'serving memory'}
  assert served[0].experts < min(free.values(), key=lambda one: one.loss).experts  # memory takes experts away
  read = candidates(Budget(1e22, 1e22, active_bytes=4 * G))
  assert all(one.limited_by == 'latency' and 2 * one.active <= 4 * G for one in read)
  known = candidates(Budget(1e22, 1e22, tokens=1e10))
  assert all(one.limited_by == 'text' and one.tokens == 1e10 for one in known)
  with pytest.raises(ConfigError, match='limited by serving memory'):
    candidates(Budget(1e22, 1e22, serving_bytes=1e6))


@given(st.floats(1e18, 1e25))
def test_the_dense_law_is_inverted(flops):
  law = ludziejewski_reduced(1, **PUBLISHED[budgets.JOINT].constants)
  assert dense_flops(float(compute_optimal(flops, **law).loss)) == pytest.approx(flops, rel=1e-6)


def test_no_dense_model_gets_below_the_entropy_of_text():
  assert dense_flops(1.3) == np.inf


def test_laws_have_their_say():
  one = next(one for one in candidates(Budget(1e20, 1e20, vocabulary=50257)) if one.experts == 32)
  views = {view.law: view for view in opinions(one, 50257)}
  assert views[budgets.JOINT].gain == pytest.approx(dense_flops(one.loss) / 1e20)
  # Krajewski et al. say 20 times at 1e20 FLOPs, and more with more.
  assert views['krajewski_2024'].gain == pytest.approx(20, rel=0.15)
  huge = next(one for one in candidates(Budget(1e25, 1e25)) if one.experts == 32)
  assert next(view for view in opinions(huge, 32128) if view.law == 'krajewski_2024').gain > 30
  assert any('outside fitted range' in line for line in opinions(huge, 32128)[0].outside)
