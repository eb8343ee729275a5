"""Whole models of Hugging Face's `transformers` and ours, given the same files, give the same.

Skipped without the extra `hf`.
Weights are random and everything is float32. DeepSeekMoE comes with code of its own, which transformers does not have:
its reference is here put together of transformers' Llama and a few lines for the sparse layer (Dai et al. 2024, section
3): softmax over all experts, the k best, shared experts added.
"""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_jax.decode import GREEDY, decode
from moe_jax.interop import huggingface

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
from torch import nn  # noqa: E402

LLAMA = {'attention_dropout': 0.0, 'pad_token_id': 0, 'eos_token_id': 1, 'bos_token_id': 0}
CASES = {
  'mixtral': ('MixtralForCausalLM', {
    'hidden_size': 24, 'intermediate_size': 36, 'num_hidden_layers': 3, 'num_attention_heads': 6, 'head_dim': 6,
    'num_key_value_heads': 2, 'num_local_experts': 5, 'num_experts_per_tok': 2, 'vocab_size': 97, 'rms_norm_eps': 1e-5,
    'sliding_window': None, 'tie_word_embeddings': False, **LLAMA,
  }),
  'mixtral-tied': ('MixtralForCausalLM', {
    'hidden_size': 16, 'intermediate_size': 10, 'num_hidden_layers': 1, 'num_attention_heads': 4,
    'num_key_value_heads': 4, 'num_local_experts': 8, 'num_experts_per_tok': 3, 'vocab_size': 64,
    'sliding_window': None, 'tie_word_embeddings': True, 'rope_theta': 1e6, **LLAMA,
  }),
  'olmoe': ('OlmoeForCausalLM', {
    'hidden_size': 24, 'intermediate_size': 14, 'num_hidden_layers': 2, 'num_attention_heads': 6,
    'num_key_value_heads': 3, 'num_experts': 7, 'num_experts_per_tok': 3, 'vocab_size': 101, **LLAMA,
  }),
  'olmoe-normalised': ('OlmoeForCausalLM', {
    'hidden_size': 16, 'intermediate_size': 12, 'num_hidden_layers': 2, 'num_attention_heads': 2,
    'num_key_value_heads': 2, 'num_experts': 4, 'num_experts_per_tok': 2, 'vocab_size': 90, 'norm_topk_prob': True,
    **LLAMA,
  }),
  'qwen3': ('Qwen3MoeForCausalLM', {
    'hidden_size': 20, 'intermediate_size': 30, 'moe_intermediate_size': 9, 'num_hidden_layers': 4,
    'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 10, 'num_experts': 6, 'num_experts_per_tok': 2,
    'decoder_sparse_step': 2, 'norm_topk_prob': True, 'vocab_size': 103, 'tie_word_embeddings': True, **LLAMA,
  }),
  'qwen3-raw': ('Qwen3MoeForCausalLM', {
    'hidden_size': 20, 'intermediate_size': 30, 'moe_intermediate_size': 9, 'num_hidden_layers': 2,
    'num_attention_heads': 4, 'num_key_value_heads': 1, 'head_dim': 6, 'num_experts': 5, 'num_experts_per_tok': 4,
    'decoder_sparse_step': 1, 'norm_topk_prob': False, 'vocab_size': 66, **LLAMA,
  }),
  't5-1.1': ('T5ForConditionalGeneration', {
    'd_model': 20, 'd_kv': 6, 'd_ff': 30, 'num_layers': 3, 'num_decoder_layers': 3, 'num_heads': 3, 'vocab_size': 99,
    'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False, 'decoder_start_token_id': 0, 'dropout_rate': 0.0,
  }),
  't5-untied': ('T5ForConditionalGeneration', {
    'd_model': 16, 'd_kv': 6, 'd_ff': 22, 'num_layers': 2, 'num_decoder_layers': 2, 'num_heads': 4, 'vocab_size': 70,
    'feed_forward_proj': 'relu', 'decoder_start_token_id': 0, 'dropout_rate': 0.0,
  }),
  'switch': ('SwitchTransformersForConditionalGeneration', {
    'd_model': 20, 'd_kv': 6, 'd_ff': 30, 'num_layers': 4, 'num_decoder_layers': 4, 'num_heads': 3, 'vocab_size': 99,
    'num_experts': 5, 'expert_capacity': 2, 'num_sparse_encoder_layers': 2, 'num_sparse_decoder_layers': 2,
    'decoder_start_token_id': 0, 'dropout_rate': 0.0,
  }),
  'switch-everywhere': ('SwitchTransformersForConditionalGeneration', {
    'd_model': 12, 'd_kv': 5, 'd_ff': 7, 'num_layers': 2, 'num_decoder_layers': 2, 'num_heads': 2, 'vocab_size': 65,
    'num_experts': 8, 'expert_capacity': 64, 'num_sparse_encoder_layers': 2, 'num_sparse_decoder_layers': 2,
    'decoder_start_token_id': 0, 'dropout_rate': 0.0,
  }),
  'deepseek': ('deepseek', {
    'hidden_size': 24, 'intermediate_size': 40, 'moe_intermediate_size': 10, 'num_hidden_layers': 4,
    'num_attention_heads': 4, 'num_key_value_heads': 4, 'n_routed_experts': 6, 'n_shared_experts': 2,
    'num_experts_per_tok': 3, 'first_k_dense_replace': 1, 'norm_topk_prob': False, 'vocab_size': 96,
    'rms_norm_eps': 1e-6, 'tie_word_embeddings': False, **LLAMA,
  }),
}  # fmt: skip


def drawn(family, seed):
  """A model's class and a configuration of random sizes, few of them even."""
  rng = np.random.default_rng(seed)
  draw, flip = lambda low, high: int(rng.integers(low, high + 1)), lambda: bool(rng.integers(2))
  kv, experts, vocab = draw(1, 3), draw(3, 9), draw(61, 131)
  if family == 'switch':
    layers = draw(1, 3)
    return 'SwitchTransformersForConditionalGeneration', {
      'd_model': draw(9, 25), 'd_kv': draw(3, 9), 'd_ff': draw(7, 33), 'num_layers': layers, 'vocab_size': vocab,
      'num_decoder_layers': layers, 'num_heads': draw(1, 5), 'num_experts': experts, 'expert_capacity': draw(1, 3),
      'num_sparse_encoder_layers': layers, 'num_sparse_decoder_layers': layers, 'tie_word_embeddings': flip(),
      'decoder_start_token_id': 0, 'dropout_rate': 0.0,
    }  # fmt: skip
  heads, head_dim = kv * draw(1, 3), 2 * draw(2, 5)
  fields = {
    'num_attention_heads': heads, 'num_key_value_heads': kv, 'intermediate_size': draw(7, 33), 'vocab_size': vocab,
    'num_hidden_layers': draw(1, 3), 'num_experts_per_tok': draw(2, experts), 'tie_word_embeddings': flip(),
    'rms_norm_eps': float(rng.choice([1e-6, 1e-5])), 'rope_theta': float(rng.choice([1e4, 1e6])), **LLAMA,
  }  # fmt: skip
  fields |= (
    {'hidden_size': heads * head_dim}
    if family in ('olmoe', 'deepseek')
    else {'hidden_size': draw(9, 25), 'head_dim': head_dim}
  )
  fine = {'moe_intermediate_size': draw(5, 15), 'norm_topk_prob': flip()}
  return {
    'mixtral': ('MixtralForCausalLM', {**fields, 'num_local_experts': experts, 'sliding_window': None}),
    'olmoe': ('OlmoeForCausalLM', {**fields, 'num_experts': experts, 'norm_topk_prob': flip()}),
    'qwen3': ('Qwen3MoeForCausalLM', {**fields, **fine, 'num_experts': experts}),
    'deepseek': ('deepseek', {
      **fields, **fine, 'n_routed_experts': experts, 'n_shared_experts': draw(1, 3), 'tie_word_embeddings': False,
      'first_k_dense_replace': draw(0, fields['num_hidden_layers'] - 1),
    }),
  }[family]  # fmt: skip


CASES |= {
  f'{family}-drawn-{seed}': drawn(family, seed)
  for family in ('switch', 'mixtral', 'olmoe', 'qwen3', 'deepseek')
  for seed in range(2)
}


class DeepSeekLayer(nn.Module):
  """Routed and shared experts, by the names that DeepSeekMoE's files have."""

  def __init__(self, config):
    super().__init__()
    mlp = lambda width: transformers.models.llama.modeling_llama.LlamaMLP(  # noqa: E731
      transformers.LlamaConfig(hidden_size=config['hidden_size'], intermediate_size=width, num_attention_heads=1)
    )
    width = config['moe_intermediate_size']
    self.k, self.normalised = config['num_experts_per_tok'], config['norm_topk_prob']
    self.gate = nn.Linear(config['hidden_size'], config['n_routed_experts'], bias=False)
    self.experts = nn.ModuleList(mlp(width) for _ in range(config['n_routed_experts']))
    self.shared_experts = mlp(width * config['n_shared_experts'])

  def forward(self, x):
    gates, chosen = self.gate(x).softmax(-1).topk(self.k)
    gates = gates / gates.sum(-1, keepdim=True) if self.normalised else gates
    weights = torch.zeros(*x.shape[:-1], len(self.experts)).scatter(-1, chosen, gates)
    routed = sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
    return routed + self.shared_experts(x)


def theirs(case):
  """The model with random weights."""
  name, fields = CASES[case]
  torch.manual_seed(0)
  if name == 'deepseek':
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    for layer in model.model.layers[fields['first_k_dense_replace'] :]:
      layer.mlp = DeepSeekLayer(fields)
  else:
    kind = getattr(transformers, name)
    # Eager: their grouped matrix products want sizes that are multiples of four.
    model = kind._from_config(kind.config_class(**fields), experts_implementation='eager')
  if case == 't5-untied':  # as the files of T5 1.1 are, which their library no longer makes by itself
    model.config.tie_word_embeddings = model.config.scale_decoder_outputs = False
    model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim > 1:
        parameter.normal_(0, 0.2 if case == 't5-1.1' else 0.3)  # where float32 itself has no more than 2e-5
      else:
        parameter.uniform_(0.5, 1.5)
    if hasattr(
      model, 'encoder'
    ):  # which their Switch without tied logits holds three times, as published ones do alike
      for side in (model.encoder, model.decoder):
        side.embed_tokens.weight.copy_(model.shared.weight)
  return model.eval()


@functools.cache
def pair(case, root):
  """Their model, its folder, and ours read from there."""
  model, folder = theirs(case), root / case
  if CASES[case][0] == 'deepseek':
    folder.mkdir()
    save_file({name: x.numpy() for name, x in model.state_dict().items()}, folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps({'model_type': 'deepseek', **CASES[case][1]}))
  else:
    model.save_pretrained(folder)
  return model, folder, huggingface.load(folder)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  return tmp_path_factory.mktemp('hf')


def is_encoder_decoder(case):
  return 'd_model' in CASES[case][1]


def features(side, tokens):
  positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
  segments = np.ones_like(tokens)
  return {f'{side}_input_tokens': tokens, f'{side}_segment_ids': segments, f'{side}_positions': positions}


def tokens_of(case, length, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(3, CASES[case][1]['vocab_size'], (3, length)).astype(np.int32)


@pytest.mark.parametrize('case', CASES)
def test_logits_agree(case, root):
  model, _, (ours, variables) = pair(case, root)
  inputs, targets = tokens_of(case, 13), tokens_of(case, 11, seed=1)
  batch = features('decoder', targets)
  if is_encoder_decoder(case):
    batch |= features('encoder', inputs)
    arguments = {'input_ids': torch.from_numpy(inputs).long(), 'decoder_input_ids': torch.from_numpy(targets).long()}
  else:
    arguments = {'input_ids': torch.from_numpy(targets).long()}
  with torch.no_grad():
    expected = model(**arguments).logits.numpy()
  actual, _ = jax.jit(lambda: ours.apply(variables, batch, train=False))()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)
  assert np.std(expected) > 0.1


@pytest.mark.parametrize('case', CASES)
def test_greedy_generations_are_identical(case, root):
  model, _, (ours, variables) = pair(case, root)
  prompts, count = tokens_of(case, 7, seed=2), 12
  options = {'max_new_tokens': count, 'do_sample': False, 'num_beams': 1, 'pad_token_id': 0}
  model.generation_config.eos_token_id = None  # to the end
  with torch.no_grad():
    whole = model.generate(torch.from_numpy(prompts).long(), **options).numpy()
  if is_encoder_decoder(case):
    expected = whole[:, 1:]
    batch = features('encoder', prompts) | features('decoder', np.zeros((3, 1), np.int32))
  else:
    expected, batch = whole[:, 7:], features('decoder', prompts)
  run = jax.jit(
    lambda: decode(ours, variables, batch, max_new_tokens=count, strategy=GREEDY, eos_id=-1, key=jax.random.key(0))
  )
  actual, _ = run()
  np.testing.assert_array_equal(np.asarray(actual)[:, 0], expected)


@pytest.mark.parametrize('case', CASES)
def test_their_files_come_back_to_the_bit(case, root):
  _, folder, (_, variables) = pair(case, root)
  config, dtypes = huggingface.read_config(folder), huggingface.dtypes_of(folder)
  huggingface.save(folder / 'back', variables['params'], config, dtypes)
  before, after = load_file(folder / 'model.safetensors'), load_file(folder / 'back' / 'model.safetensors')
  assert before.keys() == after.keys()
  assert all(before[name].tobytes() == x.tobytes() for name, x in after.items())
  if CASES[case][0] != 'deepseek':  # and they take them
    again = type(theirs(case)).from_pretrained(folder / 'back')
    for name, x in theirs(case).state_dict().items():
      assert torch.equal(again.state_dict()[name], x), name
