"""Hugging Face's families of models in this library's words: configurations as our names, tensors as our arrays.

A family is a function from config.json to names, which are those of gin/ (NUM_LAYERS, EMBED_DIM, ...), a model made of
them, the gin files that make the same, and a table of tensors.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from moe_jax.interop.surgery import Place
from moe_jax.layers.attention import CrossAttention, SelfAttention
from moe_jax.layers.embeddings import TokenEmbedding
from moe_jax.layers.mlp import Mlp
from moe_jax.layers.positions import RelativeTable
from moe_jax.models.decoder_only import DecoderOnly
from moe_jax.models.encoder_decoder import EncoderDecoder
from moe_jax.models.stack import Stack, interleaved_stack
from moe_jax.moe.dispatchers.auto import auto
from moe_jax.moe.experts import Experts
from moe_jax.moe.moe_layer import MoELayer
from moe_jax.moe.routers.top_k import TopKRouter
from moe_jax.types import ConfigError

Config = Mapping[str, Any]
Names = dict[str, Any]
Gin = tuple[list[str], dict[str, str]]  # files of gin/ to include; bindings behind them
make = functools.partial


class Tensor(NamedTuple):
  """One of their tensors.

  Attributes:
    name: with {layer} and {expert} to be filled in.
    inputs: how many of our leading axes are the inputs of a matrix, which theirs has last; None is an array as it is,
      0 one that is flat there.
  """

  name: str
  inputs: int | None = None


@dataclasses.dataclass(frozen=True)
class Family:
  """A model_type.

  Attributes:
    names: what config.json says, in our names.
    model: made of names.
    gin: what makes the same model, of names.
    tensor: theirs that an array of ours is made of, by its place.
  """

  names: Callable[[Config], Names]
  model: Callable[[Names], nn.Module]
  gin: Callable[[Names], Gin]
  tensor: Callable[[Place, Names], Tensor]


def unsupported(config: Config, **allowed: Any) -> None:
  """Raises ConfigError, naming the first key whose value is none of those allowed; what is absent is allowed."""
  for key, values in allowed.items():
    if key in config and config[key] not in values:
      wanted = ' or '.join(map(repr, values))
      raise ConfigError(f'config.json has {key} = {config[key]!r}, and only {wanted} can be converted.')


# ---- Decoder-only: Mixtral, OLMoE, Qwen3-MoE, DeepSeekMoE -----------------------------------------------------------


def _decoder_names(config: Config, **more: Any) -> Names:
  rotary = config.get('rope_parameters') or {}
  if (rotary.get('rope_type', 'default') != 'default') or config.get('rope_scaling'):
    raise ConfigError('config.json scales its rotary positions (rope_scaling, rope_parameters): not to be converted.')
  unsupported(config, hidden_act=('silu',), attention_bias=(False,), clip_qkv=(None,), use_sliding_window=(False,))
  unsupported(config, partial_rotary_factor=(1.0,), mlp_bias=(False,))
  if config['num_experts_per_tok'] == 1 and more['GATES'] != 'raw':
    raise ConfigError('config.json has num_experts_per_tok = 1, of which gates make always 1: not to be converted.')
  heads = config['num_attention_heads']
  return {
    'NUM_LAYERS': config['num_hidden_layers'],
    'EMBED_DIM': config['hidden_size'],
    'MLP_DIM': config['intermediate_size'],
    'NUM_HEADS': heads,
    'NUM_KV_HEADS': config.get('num_key_value_heads') or heads,
    'HEAD_DIM': config.get('head_dim') or config['hidden_size'] // heads,
    'VOCAB_SIZE': config['vocab_size'],
    'ROTARY_BASE': float(rotary.get('rope_theta') or config.get('rope_theta', 10_000.0)),
    'NORM_EPSILON': config['rms_norm_eps'],
    'TIED_LOGITS': config.get('tie_word_embeddings', False),
    'TIED_SCALE': 1.0,
    'NUM_SELECTED': config['num_experts_per_tok'],
    'EXPERT_EVERY': 1,
    'QUERY_KEY_NORM': None,
    'SHARED_MLP_DIM': 0,
    'DENSE_LAYERS': 0,  # that come first
    **more,
  }


def _experts(config: Config) -> int:
  """Which of two names is written depends on the family and the version of the library."""
  return config['num_local_experts'] if 'num_local_experts' in config else config['num_experts']


def _mixtral(config: Config) -> Names:
  unsupported(config, sliding_window=(None,))
  return _decoder_names(
    config, NUM_EXPERTS=_experts(config), EXPERT_MLP_DIM=config['intermediate_size'], GATES='softmax'
  )


def _olmoe(config: Config) -> Names:
  gates = 'renormalised' if config.get('norm_topk_prob', False) else 'raw'
  experts = {'NUM_EXPERTS': _experts(config), 'EXPERT_MLP_DIM': config['intermediate_size'], 'GATES': gates}
  return _decoder_names(config, **experts, QUERY_KEY_NORM='whole')


def _qwen3(config: Config) -> Names:
  unsupported(config, mlp_only_layers=([], None))
  gates = 'renormalised' if config.get('norm_topk_prob', False) else 'raw'
  experts = {'NUM_EXPERTS': _experts(config), 'EXPERT_MLP_DIM': config['moe_intermediate_size'], 'GATES': gates}
  every = config.get('decoder_sparse_step', 1)
  if config['num_hidden_layers'] % every:
    raise ConfigError(f'config.json has decoder_sparse_step = {every}, which does not divide num_hidden_layers.')
  return _decoder_names(config, **experts, QUERY_KEY_NORM='head', EXPERT_EVERY=every)


def _deepseek(config: Config) -> Names:
  unsupported(config, moe_layer_freq=(1,), scoring_func=('softmax',), topk_method=('greedy', None), n_group=(1, None))
  unsupported(config, routed_scaling_factor=(1.0, None), kv_lora_rank=(None,))
  gates = 'renormalised' if config.get('norm_topk_prob', False) else 'raw'
  width, dense = config['moe_intermediate_size'], config.get('first_k_dense_replace', 0)
  names = _decoder_names(config, NUM_EXPERTS=config['n_routed_experts'], EXPERT_MLP_DIM=width, GATES=gates)
  names['SHARED_MLP_DIM'] = width * (config.get('n_shared_experts') or 0)
  return {**names, 'NUM_LAYERS': names['NUM_LAYERS'] - dense, 'DENSE_LAYERS': dense}


def _decoder(names: Names) -> nn.Module:
  gated = ('silu', 'linear')
  attention = make(
    SelfAttention,
    num_heads=names['NUM_HEADS'],
    num_kv_heads=names['NUM_KV_HEADS'],
    head_dim=names['HEAD_DIM'],
    rotary_base=names['ROTARY_BASE'],
    query_key_norm=names['QUERY_KEY_NORM'],
    norm_epsilon=names['NORM_EPSILON'],
  )
  router = make(
    TopKRouter,
    num_selected=names['NUM_SELECTED'],
    gates=names['GATES'],
    balance_choices='all',
    capacity_factor=None,
  )
  stack = make(
    interleaved_stack,
    mixers={'attention': attention},
    mlp=make(Mlp, hidden_dim=names['MLP_DIM'], activations=gated),
    moe=_moe(names, router, gated),
    stack=make(Stack, norm_epsilon=names['NORM_EPSILON']),
  )
  stacks = [make(stack, num_layers=names['NUM_LAYERS'], expert_every=names['EXPERT_EVERY'])]
  if names['DENSE_LAYERS']:
    stacks.insert(0, make(stack, num_layers=names['DENSE_LAYERS'], expert_every=0))
  return DecoderOnly(embedding=_embedding(names), stacks=stacks, norm_epsilon=names['NORM_EPSILON'])


def _moe(names: Names, router: Any, activations: tuple[str, ...]) -> Any:
  shared = make(Mlp, hidden_dim=names['SHARED_MLP_DIM'], activations=activations) if names['SHARED_MLP_DIM'] else None
  return make(
    MoELayer,
    num_experts=names['NUM_EXPERTS'],
    group_size=None,
    router=router,
    experts=make(Experts, hidden_dim=names['EXPERT_MLP_DIM'], activations=activations),
    dispatcher=auto,
    shared=shared,
  )


def _embedding(names: Names) -> Any:
  sizes = {'vocab_size': names['VOCAB_SIZE'], 'embed_dim': names['EMBED_DIM'], 'tied': names['TIED_LOGITS']}
  return make(TokenEmbedding, **sizes, tied_scale=names['TIED_SCALE'])


def _decoder_gin(names: Names) -> Gin:
  includes = [
    'models/decoder_only/mixtral',
    'routers/mixtral',
    *(['experts/shared'] if names['SHARED_MLP_DIM'] else []),
  ]
  bindings = {
    'top_k.TopKRouter.gates': repr(names['GATES']),
    'embeddings.TokenEmbedding.tied_scale': str(names['TIED_SCALE']),
  }
  if names['DENSE_LAYERS']:
    bindings |= {
      'decoder_only.DecoderOnly.stacks': '[@first/stack.interleaved_stack, @stack.interleaved_stack]',
      'first/stack.interleaved_stack.num_layers': str(names['DENSE_LAYERS']),
      'first/stack.interleaved_stack.expert_every': '0',
    }
  return includes, bindings


_LLAMA = {
  'attention_norm/scale': Tensor('input_layernorm'),
  'attention/query': Tensor('self_attn.q_proj', 1),
  'attention/key': Tensor('self_attn.k_proj', 1),
  'attention/value': Tensor('self_attn.v_proj', 1),
  'attention/out': Tensor('self_attn.o_proj', 2),
  'attention/query_norm/scale': Tensor('self_attn.q_norm', 0),
  'attention/key_norm/scale': Tensor('self_attn.k_norm', 0),
  'mlp_norm/scale': Tensor('post_attention_layernorm'),
  'moe_norm/scale': Tensor('post_attention_layernorm'),
  'mlp/wi_0': Tensor('mlp.gate_proj', 1),
  'mlp/wi_1': Tensor('mlp.up_proj', 1),
  'mlp/wo': Tensor('mlp.down_proj', 1),
  'moe/router/kernel': Tensor('mlp.gate', 1),
  'moe/experts/wi_0': Tensor('mlp.experts.{expert}.gate_proj', 1),
  'moe/experts/wi_1': Tensor('mlp.experts.{expert}.up_proj', 1),
  'moe/experts/wo': Tensor('mlp.experts.{expert}.down_proj', 1),
  'moe/shared/wi_0': Tensor('mlp.shared_experts.gate_proj', 1),
  'moe/shared/wi_1': Tensor('mlp.shared_experts.up_proj', 1),
  'moe/shared/wo': Tensor('mlp.shared_experts.down_proj', 1),
}
_MIXTRAL = _LLAMA | {
  'moe/router/kernel': Tensor('block_sparse_moe.gate', 1),
  'moe/experts/wi_0': Tensor('block_sparse_moe.experts.{expert}.w1', 1),
  'moe/experts/wi_1': Tensor('block_sparse_moe.experts.{expert}.w3', 1),
  'moe/experts/wo': Tensor('block_sparse_moe.experts.{expert}.w2', 1),
}
_LLAMA_ENDS = {
  'embedding/table': Tensor('model.embed_tokens'),
  'embedding/logits': Tensor('lm_head', 1),
  'final_norm/scale': Tensor('model.norm'),
}


def _decoder_tensor(layers: Mapping[str, Tensor], place: Place, names: Names) -> Tensor:
  if not place.sublayer:
    return _LLAMA_ENDS[place.rest]
  tensor = layers[f'{place.sublayer}/{place.rest}']
  layer = place.layer + (names['DENSE_LAYERS'] if place.stack == 'stack_1/' else 0)
  return tensor._replace(name=f'model.layers.{layer}.{tensor.name}')


# ---- Encoder-decoder: T5 1.1, Switch Transformers -------------------------------------------------------------------

_ACTIVATIONS = {'relu': ('relu',), 'gated-gelu': ('gelu', 'linear')}


def _t5(config: Config) -> Names:
  kind = config.get('feed_forward_proj', 'relu')
  unsupported(config, feed_forward_proj=tuple(_ACTIVATIONS), relative_attention_max_distance=(128,))
  unsupported(config, layer_norm_epsilon=(1e-6,), num_decoder_layers=(config['num_layers'],))
  return {
    'NUM_LAYERS': config['num_layers'],
    'EMBED_DIM': config['d_model'],
    'MLP_DIM': config['d_ff'],
    'EXPERT_MLP_DIM': config['d_ff'],
    'NUM_HEADS': config['num_heads'],
    'HEAD_DIM': config['d_kv'],
    'VOCAB_SIZE': config['vocab_size'],
    'TIED_LOGITS': config.get('tie_word_embeddings', True),
    'TIED_SCALE': None if config.get('scale_decoder_outputs', True) else 1.0,
    'ACTIVATIONS': _ACTIVATIONS[kind],
    'RELATIVE_BUCKETS': config.get('relative_attention_num_buckets', 32),
    'NUM_EXPERTS': 1,
    'EXPERT_EVERY': 0,
    'SHARED_MLP_DIM': 0,
    'SLOTS': None,
  }


def _switch(config: Config) -> Names:
  unsupported(config, feed_forward_proj=('relu',), router_bias=(False,), router_dtype=('float32',))
  every = config['encoder_sparse_step']
  unsupported(config, encoder_sparse_step=(1, 2, 0), decoder_sparse_step=(every,))
  return {
    **_t5(config),
    'NUM_EXPERTS': config['num_experts'],
    'EXPERT_EVERY': every,
    'SLOTS': config['expert_capacity'],
  }


def _encoder_decoder(names: Names) -> nn.Module:
  heads = {'num_heads': names['NUM_HEADS'], 'head_dim': names['HEAD_DIM'], 'query_scale': 1.0}
  router = make(TopKRouter, num_selected=1, gates='raw', slots=names['SLOTS'])
  table = make(RelativeTable, num_heads=names['NUM_HEADS'], num_buckets=names['RELATIVE_BUCKETS'])
  stack = make(
    interleaved_stack,
    mlp=make(Mlp, hidden_dim=names['MLP_DIM'], activations=names['ACTIVATIONS']),
    moe=_moe(names, router, names['ACTIVATIONS']),
    num_layers=names['NUM_LAYERS'],
    expert_every=names['EXPERT_EVERY'],
    stack=make(Stack, relative_table=table),
  )
  attention, cross = make(SelfAttention, **heads), make(CrossAttention, **heads)
  return EncoderDecoder(
    embedding=_embedding(names),
    encoder=make(stack, mixers={'attention': attention}),
    decoder=make(stack, mixers={'attention': attention, 'cross_attention': cross}),
  )


def _encoder_decoder_gin(names: Names) -> Gin:
  bindings = {
    'embeddings.TokenEmbedding.tied_scale': str(names['TIED_SCALE']),
    'positions.RelativeTable.num_buckets': str(names['RELATIVE_BUCKETS']),
    'top_k.TopKRouter.slots': str(names['SLOTS']),
  }
  return ['models/encoder_decoder/switch', 'routers/switch'], bindings


_T5 = {
  'attention_norm/scale': Tensor('layer.0.layer_norm'),
  'attention/query': Tensor('layer.0.SelfAttention.q', 1),
  'attention/key': Tensor('layer.0.SelfAttention.k', 1),
  'attention/value': Tensor('layer.0.SelfAttention.v', 1),
  'attention/out': Tensor('layer.0.SelfAttention.o', 2),
  'cross_attention_norm/scale': Tensor('layer.1.layer_norm'),
  'cross_attention/query': Tensor('layer.1.EncDecAttention.q', 1),
  'cross_attention/key': Tensor('layer.1.EncDecAttention.k', 1),
  'cross_attention/value': Tensor('layer.1.EncDecAttention.v', 1),
  'cross_attention/out': Tensor('layer.1.EncDecAttention.o', 2),
  'mlp_norm/scale': Tensor('layer.{last}.layer_norm'),
  'moe_norm/scale': Tensor('layer.{last}.layer_norm'),
  'mlp/wo': Tensor('layer.{last}.DenseReluDense.wo', 1),
}
_T5_PLAIN = _T5 | {'mlp/wi_0': Tensor('layer.{last}.DenseReluDense.wi', 1)}
_T5_GATED = _T5 | {f'mlp/wi_{i}': Tensor(f'layer.{{last}}.DenseReluDense.wi_{i}', 1) for i in range(2)}
_SWITCH = _T5 | {
  'mlp/wi_0': Tensor('layer.{last}.mlp.wi', 1),
  'mlp/wo': Tensor('layer.{last}.mlp.wo', 1),
  'moe/router/kernel': Tensor('layer.{last}.mlp.router.classifier', 1),
  'moe/experts/wi_0': Tensor('layer.{last}.mlp.experts.expert_{expert}.wi', 1),
  'moe/experts/wo': Tensor('layer.{last}.mlp.experts.expert_{expert}.wo', 1),
}
_T5_ENDS = {
  'embedding/table': Tensor('shared'),
  'embedding/logits': Tensor('lm_head', 1),
  'encoder_norm/scale': Tensor('encoder.final_layer_norm'),
  'decoder_norm/scale': Tensor('decoder.final_layer_norm'),
  'encoder/relative/table': Tensor('encoder.block.0.layer.0.SelfAttention.relative_attention_bias'),
  'decoder/relative/table': Tensor('decoder.block.0.layer.0.SelfAttention.relative_attention_bias'),
}


def _t5_tensor(place: Place, names: Names, switch: bool = False) -> Tensor:
  if not place.sublayer:
    return _T5_ENDS[place.rest]
  layers = _SWITCH if switch else _T5_GATED if len(names['ACTIVATIONS']) > 1 else _T5_PLAIN
  tensor = layers[f'{place.sublayer}/{place.rest}']
  last = 1 if place.stack == 'encoder/' else 2  # the feed-forward's place in a block
  name = tensor.name.replace('{last}', str(last))
  return tensor._replace(name=f'{place.stack.replace("/", ".block.")}{place.layer}.{name}')


def _decoders(names: Callable[[Config], Names], layers: Mapping[str, Tensor] = _LLAMA) -> Family:
  return Family(names, _decoder, _decoder_gin, make(_decoder_tensor, layers))


FAMILIES = {  # config.json's model_type -> what it is
  'mixtral': _decoders(_mixtral, _MIXTRAL),
  'olmoe': _decoders(_olmoe),
  'qwen3_moe': _decoders(_qwen3),
  'deepseek': _decoders(_deepseek),
  't5': Family(_t5, _encoder_decoder, _encoder_decoder_gin, _t5_tensor),
  'switch_transformers': Family(_switch, _encoder_decoder, _encoder_decoder_gin, make(_t5_tensor, switch=True)),
}
