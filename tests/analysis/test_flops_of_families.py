"""What is counted of the papers' models against what XLA counts of them."""

import contextlib
import dataclasses

import gin
import jax
import pytest

import run
from moe_jax.analysis.flops import count_flops, forward_flops
from moe_jax.analysis.forward_pass import trace_forward
from moe_jax.objectives import LanguageModeling
from moe_jax.runs.setup import build
from moe_jax.runs.train import train
from moe_jax.training.step import gradients

# Wide enough that matrix products are nearly all there is, and small enough to trace soon.
SIZES = [
  *('NUM_LAYERS = 4', 'EMBED_DIM = 256', 'MLP_DIM = 1024', 'EXPERT_MLP_DIM = 512', 'NUM_HEADS = 2', 'HEAD_DIM = 128'),
  *('NUM_EXPERTS = 4', 'GROUP_SIZE = 64', 'VOCAB_SIZE = 512', 'BATCH_SIZE = 8', 'FAKE_DEVICES = 8', 'TRAIN_STEPS = 1'),
  *('SCAN = False', "REMAT = 'none'", "DTYPE = 'float32'", "MESH = {'data': 8, 'expert': 1, 'model': 1}"),
]
FAMILIES = {  # experiment -> its dispatcher here. XLA counts once what a loop or each device does, so none of these
  'glam_0_1b_64e': 'einsum',
  'st_moe_32b': 'gather',
  'switch_base': 'einsum',
  'gshard_600b': 'einsum',
  'mixtral_8x7b': 'gather',
  'olmoe_1b_7b': 'gather',
  'deepseek_moe_16b': 'gather',
  'qwen3_30b_a3b': 'gather',
}


def program_of(name, more=()):
  grouped = ['NUM_KV_HEADS = 1', 'NUM_SELECTED = 2'] if FAMILIES[name] != 'einsum' and name != 'st_moe_32b' else []
  gin.clear_config()
  files = [f'gin/experiments/{name}.gin', f'gin/dispatchers/{FAMILIES[name]}.gin']
  run.parse_gin('train', files, [*SIZES, *grouped, *more], ['.'])
  bound = gin.get_bindings(train)
  lengths = {'targets': 64} | ({'inputs': 64} if bound['data'].converter == 'encoder_decoder' else {})
  data = dataclasses.replace(bound['data'], lengths=lengths)
  with contextlib.redirect_stdout(None):
    return build(bound['objective'], bound['optimizer'], data, bound['devices'])


def key():
  return jax.eval_shape(lambda: jax.random.key(0))


@pytest.mark.parametrize('name', FAMILIES)
def test_a_forward_pass_is_what_xla_counts(fresh_gin, name):
  """To 2 percent: XLA counts what is done to single numbers too."""
  program = program_of(name)
  model, batch = program.objective.model, dict(program.batch_spec)
  variables = {'params': program.state_spec.params, **program.state_spec.variables}

  def forward(variables, batch, key):
    rngs = {'dropout': key, 'router': key}
    return model.apply(variables, batch, train=True, rngs=rngs, mutable=['state'])[0][0]

  with program.activate():
    counted = forward_flops(trace_forward(model, batch))
    theirs = jax.jit(forward).lower(variables, batch, key()).cost_analysis()['flops']
  ratio = theirs / (counted.total * batch['decoder_input_tokens'].size)
  assert 1 <= ratio < 1.02


@pytest.mark.parametrize('name', ['mixtral_8x7b', 'st_moe_32b'])
def test_a_training_step_is_what_xla_counts_and_three_forward_passes(fresh_gin, name):
  program = program_of(name)
  objective, batch = LanguageModeling(program.objective.model), dict(program.batch_spec)

  def step(params, batch, key):
    return gradients(params, {}, batch, key, objective=objective)[0]

  with program.activate():
    forward = forward_flops(trace_forward(objective.model, batch)).total * batch['decoder_input_tokens'].size
    traced = jax.jit(step).trace(program.state_spec.params, batch, key())
    ours, theirs = count_flops(traced), traced.lower().cost_analysis()['flops']
  assert 1 <= theirs / ours < 1.02
  assert ours == pytest.approx(3 * forward, rel=0.01)
