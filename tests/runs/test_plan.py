"""Plans: what they say of known programs, on pretended CPU devices and, where the compiler is there, on TPUs."""

import dataclasses
import json

import gin
import jax
import pytest
from rich.console import Console

import run
from moe_jax.runs import plan, plan_page
from moe_jax.runs.setup import build, compiled_step
from moe_jax.types import ConfigError

QUICKSTART = ['--debug', '--run_mode=plan', '--gin_file=gin/experiments/quickstart.gin']
KEYS = {
  *('topology', 'num_devices', 'mesh', 'parameters', 'active_parameters', 'hbm_bytes', 'bytes', 'fits', 'flops'),
  *('cycles', 'uncosted', 'collectives', 'step_seconds', 'mfu', 'compile_seconds'),
}


pytestmark = pytest.mark.usefixtures('fresh_gin')


def planned(folder, *more):
  assert run.main([*QUICKSTART, f"--gin.MODEL_DIR='{folder}'", *more]) == 0
  result = json.loads((folder / 'plan.json').read_text())
  assert set(result) >= KEYS
  assert set(result['bytes']) == {'params', 'optimizer', 'temporaries', 'dispatch_buffers', 'total'}
  page = (folder / 'plan.html').read_text()
  assert f'<td>{plan_page.number(result["flops"])}</tr>' in page
  return result


def test_a_plan_for_the_devices_that_are_here(tmp_path, capsys):
  result = planned(tmp_path / 'plan')
  assert (result['num_devices'], result['mesh']) == (8, {'data': 1, 'expert': 8, 'model': 1})
  assert (result['parameters'], result['active_parameters']) == (2_707_072, 1_134_208)  # as training says
  assert result['bytes']['params'] == 3_488_256 and result['bytes']['optimizer'] == 1_088_576
  assert result['bytes']['total'] > result['bytes']['temporaries'] > 0
  tokens = 8 * 256 // 8  # of a device, top-2 with factor 2 of glam's rule: two slots a choice
  assert result['bytes']['dispatch_buffers'] == 2 * (tokens * 2 * 2 // 2) * 128 * 4
  assert result['cycles'] is result['step_seconds'] is result['mfu'] is result['fits'] is None
  moved = {(c['kind'], c['axis']): c for c in result['collectives']}
  exchanged = moved['all-to-all', 'expert']
  assert exchanged['group_size'] == 8 and exchanged['link'] == 'ici' and exchanged['count'] >= 8  # 2 layers, 4 each
  assert 'all-to-all' in capsys.readouterr().out


def test_a_plan_of_a_decoding_step(tmp_path):
  result = planned(tmp_path / 'plan', "--gin.STEP='decode'", '--gin.MAX_NEW_TOKENS=64')
  assert result['step'] == 'decode' and result['bytes']['optimizer'] == 0
  train = 6 * result['active_parameters'] * 256  # FLOPs of a device's tokens, were it to train
  assert 0 < result['flops'] < train / 50


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    (["--gin.TOPOLOGY='v5x:4x4'"], 'is not like v5e:16x16'),
    (["--gin.STEP='guess'"], "STEP='guess' is none of"),
    (['--gin.MICROBATCHES=0'], 'MICROBATCHES=0'),
  ],
)
def test_bad_wishes_get_one_line(tmp_path, capsys, more, message):
  arguments = [argument for argument in QUICKSTART if argument != '--debug']
  assert run.main([*arguments, f"--gin.MODEL_DIR='{tmp_path}'", *more]) == 1
  (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
  assert message in line


def test_what_does_not_fit_is_said_with_what_would_help():
  error = RuntimeError('RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.')
  assert plan.wanted_bytes(error, kept=7) == {'total': round(20.5 * 2**30)}
  error = RuntimeError('RESOURCE_EXHAUSTED: required for HLO temporaries (24.00M) exceeds available HBM (15.75G).')
  assert plan.wanted_bytes(error, kept=7) == {'temporaries': 24 * 2**20, 'total': 24 * 2**20 + 7}
  assert plan.wanted_bytes(RuntimeError('RESOURCE_EXHAUSTED: who knows'), kept=7) == {}
  with pytest.raises(ConfigError, match='refuses this program: RESOURCE_EXHAUSTED'):  # of memory on the chip
    plan.wanted_bytes(RuntimeError('RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.'), kept=7)
  with pytest.raises(ConfigError, match='The compiler refuses this program: UNIMPLEMENTED'):
    plan.wanted_bytes(RuntimeError('UNIMPLEMENTED: no such thing'), kept=7)
  result = {
    **dict.fromkeys(('cycles', 'matmul_cycles', 'uncosted', 'collectives', 'step_seconds', 'mfu', 'top_operations')),
    **{'step': 'train', 'topology': 'v5e:4x4', 'mesh': {'data': 16}, 'parameters': 10**9, 'flops': 1, 'fits': False},
    **{'hbm_bytes': 16 * 2**30, 'microbatches': 2, 'compile_seconds': 1.0},
    'bytes': {
      'params': 8 * 2**30, 'optimizer': 2**30, 'temporaries': None, 'dispatch_buffers': 9 * 2**30, 'total': 20 * 2**30
    },
  }  # fmt: skip
  result['advice'] = plan.advice(result)
  assert [hint.split(',')[0] for hint in result['advice'][:4]] == [
    'gin/meshes/fsdp.gin', 'RAGGED_BOUND=2.0', "REMAT='full'", 'MICROBATCHES=4'
  ]  # fmt: skip
  console = Console(record=True, width=120)
  plan_page.show(result, console)
  assert 'does not fit by 4.00 GiB' in console.export_text()
  assert plan.advice({**result, 'fits': True}) == []


def outcome(seconds=None, total=0, fits=True):
  times = seconds and {'overlapped': seconds, 'serial': seconds}
  return {
    **{'fits': fits, 'step_seconds': times, 'bytes': {'total': total}, 'mfu': 0.4, 'num_devices': 16},
    **{'mesh': {'data': 4, 'expert': 4, 'model': 1}, 'microbatches': 1},
  }


def test_search_walks_meshes_then_remat_then_microbatches():
  asked = []

  def again(candidate):
    asked.append(candidate)
    if candidate.get('MESH', {}).get('expert') == 8:
      raise ConfigError('NUM_EXPERTS=4 does not divide')
    fits = candidate.get('MICROBATCHES', 1) > 1
    return outcome(seconds=1.0, fits=fits, total=30 - 10 * (candidate.get('MESH', {}).get('model') == 2))

  ranked = plan.search(outcome(total=30, fits=False), again, remat='full')
  assert [c['MESH'] for c in asked if set(c) == {'MESH'}] == [
    {'data': 2, 'expert': 4, 'model': 2}, {'data': 2, 'expert': 8, 'model': 1}, {'data': 8, 'expert': 2, 'model': 1}
  ]  # fmt: skip
  best = {'data': 2, 'expert': 4, 'model': 2}
  assert all(c['MESH'] == best for c in asked if 'REMAT' in c)
  assert not any(c.get('REMAT') == 'full' for c in asked)  # it was that already
  assert ranked[0]['fits'] and ranked[0]['candidate']['MICROBATCHES'] == 2
  assert 'error' in ranked[-1]
  assert not any(c.get('MICROBATCHES') == 4 for c in asked)  # two were enough
  console = Console(record=True, width=160)
  plan_page.show_search(ranked, console)
  assert 'MICROBATCHES=2' in console.export_text().splitlines()[2]


def test_a_search_from_the_command_line(tmp_path, monkeypatch):
  asked = []

  def fake(first, again, remat):
    assert remat == 'none'  # the quickstart's
    for candidate in ({'MICROBATCHES': 1, 'MESH': {'data': 2, 'expert': 4, 'model': 1}},):
      asked.append({**again(candidate), 'candidate': candidate})
    return [{**first, 'candidate': {}}, *asked]

  monkeypatch.setattr(plan, 'search', fake)
  assert run.main([*QUICKSTART, '--search', f"--gin.MODEL_DIR='{tmp_path}'"]) == 0
  assert asked[0]['mesh'] == {'data': 2, 'expert': 4, 'model': 1}
  assert len(json.loads((tmp_path / 'search.json').read_text())) == 2


def test_a_plan_for_a_tpu(tmp_path, tpu):
  del tpu  # there is a compiler
  options = ["--gin.TOPOLOGY='v5e:4x4'", '--gin.BATCH_SIZE=16', '--gin.SCAN=True', "--gin.REMAT='full'"]
  result = planned(tmp_path / 'plan', *options)
  assert result['fits'] and result['num_devices'] == 16 and result['hbm_bytes'] == 16 * 2**30
  assert result['cycles'] > result['matmul_cycles'] > 0 and 0 < result['mfu_serial'] < result['mfu'] < 1
  assert result['step_seconds']['serial'] > result['step_seconds']['overlapped']
  big = {c['kind'] for c in result['collectives'] if c['axis'] == 'expert' and c['wire_bytes'] > 1000}
  assert big == {'all-to-all'}  # tokens travel so, and no other way
  assert any(op['line'].startswith('moe_jax/') for op in result['top_operations'])


def test_options_that_the_compiler_lacks_get_one_line(tmp_path, tpu):
  del tpu
  with pytest.raises(ConfigError, match=r"TPU_OPTIONS.*No such compile option: 'xla_tpu_no_such'"):
    planned(tmp_path, "--gin.TOPOLOGY='v5e:2x2'", "--gin.TPU_OPTIONS={'xla_tpu_no_such': '1'}")


def test_options_reach_the_compiler():
  run.parse_gin('plan', ['gin/experiments/quickstart.gin'], [], ['.'])
  bound = gin.get_bindings(plan.plan)
  program = build(bound['objective'], bound['optimizer'], bound['data'], bound['devices'])
  assert not program.compiler_options, 'those of TPUs are for TPUs'
  step = compiled_step(dataclasses.replace(program, compiler_options={'xla_no_such': '1'}), bound['objective'])
  with program.activate(), pytest.raises(jax.errors.JaxRuntimeError, match='xla_no_such'):
    step.lower(program.state_spec, program.batch_spec).compile()


def test_a_plan_that_does_not_fit_a_tpu(tmp_path, tpu):
  del tpu
  sizes = ['--gin.NUM_EXPERTS=512', '--gin.EXPERT_MLP_DIM=65536', "--gin.TOPOLOGY='v5e:2x2'", '--gin.BATCH_SIZE=4']
  result = planned(tmp_path / 'plan', *sizes)
  assert result['fits'] is False and result['bytes']['total'] > result['hbm_bytes'] and result['advice']
  assert jax.config.jax_platforms == 'cpu'
