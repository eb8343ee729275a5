"""Hugging Face's files and ours. What needs their library is in test_huggingface_parity.py."""

import collections
import functools
import json
import shutil
import subprocess
import sys

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax.traverse_util import flatten_dict
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

import run
from moe_jax import sharding
from moe_jax.interop import huggingface
from moe_jax.layers.context import Context
from moe_jax.moe.experts import Experts
from moe_jax.moe.moe_layer import MoELayer
from moe_jax.moe.routers.top_k import TopKRouter
from moe_jax.types import ConfigError
from tests.processes import free_port
from tests.test_run import ROOT, _clean  # noqa: F401

DECODER = {
  'num_hidden_layers': 3, 'hidden_size': 12, 'intermediate_size': 20, 'num_attention_heads': 4, 'head_dim': 6,
  'num_key_value_heads': 2, 'vocab_size': 400, 'rms_norm_eps': 1e-5, 'rope_theta': 1e4, 'num_experts_per_tok': 2,
}  # fmt: skip
T5 = {
  'num_layers': 2, 'num_decoder_layers': 2, 'd_model': 12, 'd_ff': 20, 'num_heads': 3, 'd_kv': 4, 'vocab_size': 400,
}  # fmt: skip
FINE = {'moe_intermediate_size': 8}
CONFIGS = {
  'mixtral': {**DECODER, 'num_local_experts': 4},
  'olmoe': {**DECODER, 'num_experts': 4, 'tie_word_embeddings': True},
  'qwen3_moe': {**DECODER, 'num_hidden_layers': 4, 'num_experts': 4, **FINE, 'decoder_sparse_step': 2},
  'deepseek': {**DECODER, 'n_routed_experts': 4, **FINE, 'n_shared_experts': 2, 'first_k_dense_replace': 1},
  't5': {**T5, 'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False},
  'switch_transformers': {
    **T5, 'num_experts': 4, 'expert_capacity': 64, 'encoder_sparse_step': 2, 'decoder_sparse_step': 2
  },
}  # fmt: skip


def described(kind):
  config = {'model_type': kind, **CONFIGS[kind]}
  family, names = huggingface.describe(config)
  return config, family, names


def theirs(folder, kind, dtype=np.float32, seed=0):
  """A model of theirs with random weights, as files."""
  config, family, names = described(kind)
  spec = huggingface.parameters_of(family.model(names))
  rng, tensors = np.random.default_rng(seed), {}
  for path, slots in huggingface.plan(family, names, spec).items():
    for slot in slots:
      shape = huggingface._theirs(spec[path].shape[len(slot.at) :], slot.tensor.inputs)
      tensors[slot.tensor.name] = rng.normal(0, 0.5, shape).astype(dtype)
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(json.dumps(config))
  save_file(tensors, folder / 'model.safetensors')
  return tensors


def batch(rows=2, length=8):
  tokens = np.random.default_rng(1).integers(3, 300, (rows, length)).astype(np.int32)
  positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
  return {
    f'{side}_{name}': value
    for side in ('encoder', 'decoder')
    for name, value in (('input_tokens', tokens), ('segment_ids', np.ones_like(tokens)), ('positions', positions))
  }


@pytest.mark.parametrize('dtype', [np.float32, bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('kind', CONFIGS)
def test_there_and_back_is_the_same_to_the_bit(tmp_path, kind, dtype):
  tensors = theirs(tmp_path / 'theirs', kind, dtype)
  model, variables = huggingface.load(tmp_path / 'theirs')
  logits, _ = jax.jit(model.apply, static_argnames='train')(variables, batch(), train=False)
  assert logits.shape == (2, 8, 400) and np.all(np.isfinite(logits))
  config = {**huggingface.read_config(tmp_path / 'theirs'), 'torch_dtype': np.dtype(dtype).name}
  huggingface.save(tmp_path / 'back', variables['params'], config)
  back = load_file(tmp_path / 'back' / 'model.safetensors')
  assert back.keys() - set(huggingface._COPIES) == tensors.keys()
  for name, x in tensors.items():
    assert back[name].dtype == dtype and back[name].tobytes() == x.tobytes(), name


def test_several_files_go_straight_to_their_devices(tmp_path, monkeypatch):
  """Each expert's tensors are read for the device that it lives on."""
  tensors = theirs(tmp_path / 'theirs', 'mixtral')
  _, one = huggingface.load(tmp_path / 'theirs')
  monkeypatch.setattr(huggingface, 'SHARD_BYTES', 5000)
  huggingface.save(tmp_path / 'split', one['params'], huggingface.read_config(tmp_path / 'theirs'))
  index = json.loads((tmp_path / 'split' / 'model.safetensors.index.json').read_text())
  files = sorted(set(index['weight_map'].values()))
  assert len(files) > 5 and index['weight_map'].keys() == tensors.keys()
  assert index['metadata']['total_size'] == sum(x.nbytes for x in tensors.values())
  assert {path.name for path in (tmp_path / 'split').iterdir()} == {
    *files,
    'config.json',
    'model.safetensors.index.json',
  }

  mesh = sharding.make_mesh({'data': 2, 'expert': 4, 'model': 1})
  _, spread = huggingface.load(tmp_path / 'split', mesh, sharding.replicated_rules())
  experts = spread['params']['stack_0']['blocks']['moe']['experts']['wi_0']
  assert len({str(shard.index) for shard in experts.addressable_shards}) == 4
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(spread), jax.device_get(one))


def test_sequences_take_no_slots_of_each_other_in_decoding():
  """A step of many rows is one group, and yet an expert that has a slot a sequence has room for all."""
  layer = MoELayer(
    num_experts=2,
    group_size=None,
    router=functools.partial(TopKRouter, num_selected=1, gates='raw', slots=1),
    experts=functools.partial(Experts, hidden_dim=4, activations=('relu',)),
  )
  x = jnp.ones((6, 1, 8))
  context = Context(jnp.ones((6, 1), 'int32'), jnp.zeros((6, 1), 'int32'), token_count=jnp.float32(6))
  variables, apply = jax.jit(layer.init)(jax.random.key(0), x, context), jax.jit(layer.apply)
  y, aux = apply(variables, x, context.replace(cache_length=8))
  assert aux.metrics['dropped'] == 0 and np.any(y)
  np.testing.assert_array_equal(y, jnp.broadcast_to(y[:1], y.shape))
  _, aux = apply(variables, x.swapaxes(0, 1), jax.tree.map(lambda x: x.T, context))
  assert aux.metrics['dropped'] == pytest.approx(5 / 6)  # of one sequence


@given(st.data())
def test_a_part_is_that_of_the_whole(data):
  """However an array of ours is cut, whichever of its axes are the inputs of theirs."""
  shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
  inputs = data.draw(st.sampled_from([None, *range(len(shape))]))
  ranges = [
    range(start, data.draw(st.integers(start + 1, n))) for n in shape for start in [data.draw(st.integers(0, n - 1))]
  ]
  ours = np.arange(np.prod(shape)).reshape(shape)
  part = huggingface._part(huggingface._to_theirs(ours, inputs), shape, ranges, inputs)
  np.testing.assert_array_equal(part, ours[np.ix_(*ranges)], strict=True)


def test_a_device_reads_its_part_alone(tmp_path, monkeypatch):
  """Split eight ways, no array of theirs is read more than once in all, unless no axis of it is a multiple of eight."""
  tensors, read = theirs(tmp_path / 'theirs', 'mixtral'), collections.Counter()

  class Counted:
    def __init__(self, tensor, name):
      self.tensor, self.name, self.get_shape = tensor, name, tensor.get_shape

    def __getitem__(self, index):
      part = self.tensor[index]
      read[self.name] += part.size
      return part

  class File:
    def __init__(self, *args, **options):
      self.file = safetensors.safe_open(*args, **options)

    def __enter__(self):
      return self

    def __exit__(self, *_):
      return None

    def keys(self):
      return self.file.keys()

    def get_slice(self, name):
      return Counted(self.file.get_slice(name), name)

  _, one = huggingface.load(tmp_path / 'theirs')
  monkeypatch.setattr(huggingface, 'safe_open', File)
  mesh = sharding.make_mesh({'data': 8, 'expert': 1, 'model': 1})
  _, spread = huggingface.load(tmp_path / 'theirs', mesh)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(spread), jax.device_get(one))
  once = {name for name, x in tensors.items() if read[name] == x.size}
  assert {'model.embed_tokens.weight', 'lm_head.weight'} <= once, read


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda t: t.pop('model.norm.weight'), 'Tensors are missing: model.norm.weight.'),
    (
      lambda t: t.update(extra=t['model.norm.weight']),
      'Tensors are left over, which this model has no use for: extra',
    ),
    (
      lambda t: t.update({'lm_head.weight': t['lm_head.weight'][:-1]}),
      r'lm_head.weight has shape \(399, 12\), and config.json makes it \(400, 12\)',
    ),
    (
      lambda t: [t.pop(f'model.layers.{i}.self_attn.q_proj.weight') for i in range(3)] + [t.pop('lm_head.weight')],
      r'lm_head.weight, model.layers.0.self_attn.q_proj.weight, model.layers.1.self_attn.q_proj.weight and 1 more',
    ),
  ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, message):
  tensors = theirs(tmp_path / 'theirs', 'mixtral')
  change(tensors)
  save_file(tensors, tmp_path / 'theirs' / 'model.safetensors')
  with pytest.raises(ConfigError, match=message):
    huggingface.load(tmp_path / 'theirs')


@pytest.mark.parametrize(
  'kind, change, message',
  [
    ('mixtral', {'model_type': 'gpt2'}, "model_type = 'gpt2': choose among mixtral"),
    ('mixtral', {'hidden_act': 'gelu'}, "hidden_act = 'gelu'"),
    ('mixtral', {'sliding_window': 4096}, 'sliding_window = 4096'),
    ('mixtral', {'num_experts_per_tok': 1}, 'num_experts_per_tok = 1'),
    ('mixtral', {'rope_scaling': {'type': 'yarn'}}, 'rope_scaling'),
    ('mixtral', {'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 1.0}}, 'rope_parameters'),
    ('olmoe', {'clip_qkv': 8.0}, 'clip_qkv = 8.0'),
    ('qwen3_moe', {'mlp_only_layers': [1]}, 'mlp_only_layers'),
    ('qwen3_moe', {'decoder_sparse_step': 3}, 'decoder_sparse_step = 3'),
    ('deepseek', {'scoring_func': 'sigmoid'}, "scoring_func = 'sigmoid'"),
    ('switch_transformers', {'encoder_sparse_step': 4}, 'encoder_sparse_step = 4'),
    ('switch_transformers', {'decoder_sparse_step': 1}, 'decoder_sparse_step = 1'),
    ('t5', {'feed_forward_proj': 'gated-silu'}, "feed_forward_proj = 'gated-silu'"),
  ],
)
def test_what_cannot_be_converted_is_said(tmp_path, kind, change, message):
  theirs(tmp_path / 'theirs', kind)
  (tmp_path / 'theirs' / 'config.json').write_text(json.dumps({**described(kind)[0], **change}))
  with pytest.raises(ConfigError, match=message) as error:
    huggingface.load(tmp_path / 'theirs')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('kind', ['t5', 'switch_transformers'])
def test_copies_of_the_table_are_copies_and_come_back(tmp_path, kind):
  config = {**described(kind)[0], 'tie_word_embeddings': False}
  tensors = theirs(tmp_path / 'theirs', kind)
  tensors |= {f'{side}.embed_tokens.weight': tensors['shared.weight'] for side in ('encoder', 'decoder')}
  tensors['lm_head.weight'] = tensors['shared.weight'] + 1
  (tmp_path / 'theirs' / 'config.json').write_text(json.dumps(config))
  save_file(tensors, tmp_path / 'theirs' / 'model.safetensors')
  _, variables = huggingface.load(tmp_path / 'theirs')
  for dtypes in (None, huggingface.dtypes_of(tmp_path / 'theirs')):
    huggingface.save(tmp_path / 'back', variables['params'], config, dtypes)
    back = load_file(tmp_path / 'back' / 'model.safetensors')
    assert back.keys() == tensors.keys() and all(back[name].tobytes() == x.tobytes() for name, x in tensors.items())
  tensors['decoder.embed_tokens.weight'] = tensors['lm_head.weight']
  save_file(tensors, tmp_path / 'theirs' / 'model.safetensors')
  with pytest.raises(ConfigError, match=r'decoder\.embed_tokens\.weight is no copy of shared\.weight'):
    huggingface.load(tmp_path / 'theirs')


def test_no_model_there(tmp_path):
  with pytest.raises(ConfigError, match=r'config\.json cannot be read'):
    huggingface.load(tmp_path)
  theirs(tmp_path / 'theirs', 't5')
  (tmp_path / 'theirs' / 'model.safetensors').write_bytes(b'no')
  with pytest.raises(ConfigError, match='is missing or no safetensors file'):
    huggingface.load(tmp_path / 'theirs')
  config = described('t5')[0]
  del config['d_model']
  with pytest.raises(ConfigError, match=r"config\.json of this t5 lacks 'd_model'"):
    huggingface.describe(config)
  with pytest.raises(ConfigError, match=r'are not those of config\.json: embedding/logits is missing'):
    huggingface.save(tmp_path / 'x', {'stack_0': {'x': jnp.zeros(1)}}, described('mixtral')[0])


@pytest.mark.parametrize('kind', CONFIGS)
def test_gin_makes_the_same_model(tmp_path, monkeypatch, kind):
  """With a task before it; the same parameters by path and shape, and the same logits."""
  monkeypatch.chdir(ROOT)
  theirs(tmp_path / 'theirs', kind)
  model, variables = huggingface.load(tmp_path / 'theirs')
  task = 'local_text_span_corruption' if 't5' in kind or 'switch' in kind else 'local_text_lm'
  (tmp_path / 'model.gin').write_text(huggingface.gin_text(huggingface.read_config(tmp_path / 'theirs'), 'here'))
  run.parse_gin('eval', [f'gin/tasks/{task}.gin', str(tmp_path / 'model.gin')], [], ['.'])
  from moe_jax.objectives import LanguageModeling

  other = gin.get_configurable(LanguageModeling)().model
  shapes = jax.eval_shape(other.init, jax.random.key(0), batch())['params']
  boxed = {path: box.value.shape for path, box in flatten_dict(shapes, sep='/').items()}
  assert boxed == {path: x.shape for path, x in flatten_dict(variables['params'], sep='/').items()}
  expected, _ = jax.jit(lambda: model.apply(variables, batch()))()
  actual, _ = jax.jit(lambda: other.apply(variables, batch()))()
  np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures('_clean')
def test_the_command_line_there_and_back(tmp_path, capsys):
  tensors = theirs(tmp_path / 'theirs', 'mixtral', bfloat16)
  (tmp_path / 'theirs' / 'tokenizer.json').write_text('{}')
  ours, back = tmp_path / 'ours', tmp_path / 'back'
  there = ['--run_mode=convert', '--from=hf', f'--path={tmp_path / "theirs"}', f"--gin.MODEL_DIR='{ours}'"]
  assert run.main(['--debug', *there]) == 0
  gin.clear_config()
  assert run.main(['--debug', '--run_mode=convert', '--to=hf', f'--path={back}', f"--gin.MODEL_DIR='{ours}'"]) == 0
  for name, x in load_file(back / 'model.safetensors').items():
    assert x.tobytes() == tensors[name].tobytes(), name
  assert (back / 'tokenizer.json').exists() and not (back / 'dtypes.json').exists()

  # Other modes take it, training among them.
  model = [f'--gin_file={ours / "model.gin"}', '--gin_file=gin/tasks/local_text_lm.gin', '--gin.FAKE_DEVICES=8']
  model += ["--gin.TASK_FEATURE_LENGTHS={'targets': 32}", '--gin.EVAL_STEPS=1']
  gin.clear_config()
  assert run.main(['--debug', '--run_mode=eval', *model]) == 0
  measured = json.loads((ours / 'evaluation.jsonl').read_text().splitlines()[-1])
  gin.clear_config()
  more = ['--gin.TRAIN_STEPS=2', '--gin.EVAL_PERIOD=2', '--gin.CHECKPOINT_PERIOD=2', '--gin.STRATEGY=None']
  assert run.main(['--debug', '--run_mode=train', *model, *more, '--gin.LEARNING_RATE=1e-9']) == 0
  validation = [json.loads(line) for line in (ours / 'metrics.jsonl').read_text().splitlines()][-1]
  assert validation['step'] == 2 and validation['loss'] == pytest.approx(measured['loss'], rel=1e-4)

  capsys.readouterr()
  for wrong, message in [
    (['--from=hf', f'--path={tmp_path}', f"--gin.MODEL_DIR='{tmp_path / 'x'}'"], 'config.json cannot be read'),
    (there[1:], 'has checkpoints already'),
    (['--from=onnx', '--path=x', "--gin.MODEL_DIR='x'"], 'No --from=onnx: choose among hf'),
    (['--path=x', "--gin.MODEL_DIR='x'"], 'either --from or --to: hf'),
  ]:
    gin.clear_config()
    assert run.main(['--run_mode=convert', *wrong]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and error.count('\n') == 0
  shutil.rmtree(ours / 'hf')
  gin.clear_config()
  assert run.main(['--run_mode=convert', '--to=hf', f'--path={back}', f"--gin.MODEL_DIR='{ours}'"]) == 1
  assert 'copy hf/ from the MODEL_DIR' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures('_clean')
def test_two_hosts_write_one_model(tmp_path):
  tensors = theirs(tmp_path / 'theirs', 'mixtral')
  ours, back = tmp_path / 'ours', tmp_path / 'back'
  for flags in (['--from=hf', f'--path={tmp_path / "theirs"}'], ['--to=hf', f'--path={back}']):
    command = [sys.executable, 'run.py', '--run_mode=convert', *flags, f"--gin.MODEL_DIR='{ours}'"]
    command += ['--gin.FAKE_DEVICES=2', f'--coordinator_address=localhost:{free_port()}', '--num_processes=2']
    both = [
      subprocess.Popen([*command, f'--process_id={i}'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
      for i in range(2)
    ]
    try:
      said = [process.communicate(timeout=200)[0] for process in both]
    finally:
      for process in both:
        process.kill()
    assert [process.returncode for process in both] == [0, 0], '\n'.join(said)[-3000:]
    assert ['wrote' in text for text in said] == [True, False]
  written = load_file(back / 'model.safetensors')
  assert written.keys() == tensors.keys()
  for name, x in written.items():
    assert x.tobytes() == tensors[name].tobytes(), name
