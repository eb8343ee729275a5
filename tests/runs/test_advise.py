"""Advice: three budgets, the reasons, the command, and bad input."""

import json
import shlex

import gin
import pytest

import run
from moe_jax.analysis.budget import Candidate, parameters
from moe_jax.runs import advise
from moe_jax.types import ConfigError

pytestmark = pytest.mark.usefixtures('fresh_gin')


def advised(tmp_path, *bound):
  gin.clear_config()
  assert run.main(['--debug', '--run_mode=advise', f"--gin.MODEL_DIR='{tmp_path}'", *bound]) == 0
  return json.loads((tmp_path / 'advice.json').read_text())


def test_one_host_for_a_week(tmp_path, capsys):
  found = advised(tmp_path, "--gin.TOPOLOGY='v5e:2x4'", '--gin.HOURS=168')
  assert found['budget']['flops'] == pytest.approx(8 * 1.97e14 * 168 * 3600 * 0.4)
  assert found['budget']['sparse_flops'] == pytest.approx(0.75 * found['budget']['flops'])
  assert found['winner']['kind'] == 'sparse'
  assert 16 * found['winner']['total'] <= 0.7 * 8 * 16 * 2**30
  assert all(reason['source'] for reason in found['reasons'])
  assert found['command'] in capsys.readouterr().out


def test_the_command_builds(tmp_path):
  found = advised(tmp_path, "--gin.TOPOLOGY='v5e:2x4'", '--gin.HOURS=0.05')
  command = shlex.split(found['command'])[2:]
  gin.clear_config()
  assert run.main(['--debug', *command, '--gin.FAKE_DEVICES=8', '--dry_run']) == 0


def test_the_memory_that_serves_decides_and_what_it_is_for(tmp_path):
  pod = ("--gin.TOPOLOGY='v5p:4x8x8'", '--gin.HOURS=336')
  free, served = advised(tmp_path, *pod), advised(tmp_path, *pod, '--gin.SERVING_GIB=80')
  assert free['winner']['experts'] > served['winner']['experts']
  assert all(2 * one['total'] <= 0.7 * 80 * 2**30 for one in served['candidates'])
  for_reasoning = advised(tmp_path, *pod, '--gin.SERVING_GIB=80', "--gin.DOWNSTREAM='reasoning'")
  assert for_reasoning['winner']['experts'] <= served['winner']['experts']


def test_plans_take_the_place_of_what_is_assumed(tmp_path):
  asked = []

  def plan(bound):
    asked.append(bound)
    sparse = bound['EXPERT_EVERY'] == 1
    kept = dict.fromkeys(('mfu_serial', 'cycles', 'compile_seconds')) | {'fits': True}
    return {**kept, 'topology': 'v5e:2x4', 'parameters': 1e9, 'mfu': 0.1 if sparse else 0.5, 'bytes': {'total': 1}}

  found = advise.advise(str(tmp_path), topology='v5e:2x4', hours=168, plan=plan)
  assert sorted(bound['EXPERT_EVERY'] for bound in asked) == [0, 1]
  assert all(bound['EMBED_DIM'] % 64 == 0 for bound in asked)
  peak = 8 * 1.97e14 * 168 * 3600
  assert found['budget']['flops'] == pytest.approx(0.5 * peak)
  assert found['budget']['sparse_flops'] == pytest.approx(0.1 * peak)
  assert found['winner']['kind'] == 'dense'  # five times the FLOPs are more than experts are worth
  assert sum('plan of 1B on v5e:2x4' in reason['source'] for reason in found['reasons']) == 2


def test_what_does_not_fit_is_said_and_made_smaller(tmp_path):
  def plan(bound, most=2e9):
    size = parameters(bound['EMBED_DIM'], bound['NUM_EXPERTS'] if bound['EXPERT_EVERY'] else 1, 32128)
    kept = dict.fromkeys(('mfu_serial', 'cycles', 'compile_seconds')) | {'fits': size < most, 'bytes': {'total': 2**35}}
    return {**kept, 'topology': 'v5e:2x4', 'parameters': size, 'mfu': 0.4 if size < most else None}

  found = advise.advise(str(tmp_path), topology='v5e:2x4', hours=168, plan=plan)
  assert all(one['fits'] for one in found['plans'].values())
  assert found['candidates'] and all(one['total'] < 2e9 for one in found['candidates'])
  told = [reason['text'] for reason in found['reasons'] if 'does not fit: 32 GiB a chip' in reason['text']]
  assert len(told) > 2  # each time that one was too large
  nothing = advise.advise(str(tmp_path), topology='v5e:2x4', hours=168, plan=lambda bound: plan(bound, most=0))
  too_large = {one['experts']: one['parameters'] for one in nothing['plans'].values()}
  assert all(one['total'] < too_large.get(one['experts'], 1e99) for one in nothing['candidates'])


def test_ties_go_to_fewer_experts_but_for_knowledge():
  one = lambda experts, loss: Candidate(experts, 64, 1, 1, 1.0, 1.0, loss, '')  # noqa: E731
  ranked = [one(32, 2.0), one(16, 2.009), one(4, 2.015), one(1, 2.05)]
  chosen = {use: advise.choose(ranked, use).experts for use in advise.DOWNSTREAM}
  assert chosen == {'pretraining': 16, 'knowledge': 32, 'reasoning': 4, 'fine_tuning': 4}


def test_a_sweep_of_ones_own_is_told(tmp_path):
  law = {
    'which': 'all runs',
    'column': 'experts',
    'constants': {},
    'doubling': -0.02,
    'doubling_interval': [-0.03, -0.01],
  }
  (tmp_path / 'fits.json').write_text(json.dumps([law, {'which': 'x', 'refused': 'no'}]))
  found = advised(tmp_path, '--gin.FLOPS=1e20', f"--gin.SWEEP='{tmp_path}'")
  assert [r['text'] for r in found['reasons'] if 'fits.json' in r['source']] == [
    'all runs: twice the experts change the loss by -2.0% (-3.0 to -1.0), at that size.'
  ]


@pytest.mark.parametrize(
  ('bound', 'message'),
  [
    ({}, 'What is the budget'),
    ({'hours': 5}, 'What is the budget'),
    ({'topology': 'v5e:2x4', 'hours': 5, 'flops': 1e20}, 'both set'),
    ({'flops': -1.0}, 'FLOPS=-1.0: a positive number'),
    ({'flops': 1e20, 'serving_devices': 0}, 'SERVING_DEVICES=0'),
    ({'topology': 'v9:2x4', 'hours': 5}, 'is not like v5e:16x16'),
    ({'flops': 1e20, 'downstream': 'chess'}, "'chess' is none of"),
    ({'flops': 1e20, 'serving_chip': 'h100'}, 'for others give SERVING_GIB'),
    ({'flops': 1e20, 'serving_chip': 'v5e', 'serving_gib': 3}, 'says its memory by itself'),
    ({'flops': 1e20, 'latency_ms': 5}, 'needs the speed'),
    ({'flops': 1e20, 'serving_gib': 0.01}, 'limited by serving memory'),
    ({'flops': 1e20, 'sweep': '/nowhere'}, 'has no fits.json'),
    ({'flops': 1e20, 'plan': print}, 'give both'),
  ],
)
def test_input_that_makes_no_sense(tmp_path, bound, message):
  with pytest.raises(ConfigError, match=message):
    advise.advise(str(tmp_path), **bound)
