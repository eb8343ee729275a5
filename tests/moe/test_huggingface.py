"""Blocks of Hugging Face's `transformers` and our expert layer, given the same weights and tokens, give the same.

Weights are random and everything is float32. Skipped without the extra `hf`.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.context import Context
from moe_jax.layers.mlp import Mlp
from moe_jax.moe.experts import Experts
from moe_jax.moe.moe_layer import MoELayer
from moe_jax.moe.routers.bias_balanced import BiasBalancedRouter
from moe_jax.moe.routers.top_k import TopKRouter

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

B, L, M, E, F, K = 4, 16, 12, 8, 20, 3
RNG = np.random.default_rng(0)
X, COTANGENT = RNG.normal(0, 1, (2, B, L, M)).astype(np.float32)
CONTEXT = Context(jnp.ones((B, L), 'int32'), jnp.zeros((B, L), 'int32'), token_count=jnp.float32(B * L))
make = functools.partial


def theirs(family: str) -> Any:
  return importlib.import_module(f'transformers.models.{family}.modeling_{family}')


def randomised(block: Any) -> Any:
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in block.parameters():
      parameter.normal_(0, 0.5)
  return block.eval()


def switch(capacity: int) -> Any:
  config = transformers.SwitchTransformersConfig(d_model=M, d_ff=F, num_experts=E, expert_capacity=capacity)
  return randomised(theirs('switch_transformers').SwitchTransformersSparseMLP(config))


def mixtral() -> Any:
  config = transformers.MixtralConfig(hidden_size=M, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K)
  return randomised(theirs('mixtral').MixtralSparseMoeBlock(config))


def olmoe(norm_topk_prob: bool) -> Any:
  sizes = {'hidden_size': M, 'intermediate_size': F, 'num_experts': E, 'num_experts_per_tok': K}
  config = transformers.OlmoeConfig(**sizes, norm_topk_prob=norm_topk_prob)
  return randomised(theirs('olmoe').OlmoeSparseMoeBlock(config))


def qwen3(norm_topk_prob: bool) -> Any:
  sizes = {'hidden_size': M, 'moe_intermediate_size': F, 'num_experts': E, 'num_experts_per_tok': K}
  config = transformers.Qwen3MoeConfig(**sizes, norm_topk_prob=norm_topk_prob)
  return randomised(theirs('qwen3_moe').Qwen3MoeSparseMoeBlock(config))


def deepseek(bias: float, **routing: Any) -> Any:
  sizes = {'hidden_size': M, 'moe_intermediate_size': F, 'n_routed_experts': E, 'num_experts_per_tok': K}
  config = transformers.DeepseekV3Config(**sizes, n_shared_experts=1, **routing)
  block = randomised(theirs('deepseek_v3').DeepseekV3MoE(config))
  block.gate.e_score_correction_bias.normal_(0, bias)
  return block


def numbers(tensor: Any) -> np.ndarray:
  return tensor.detach().numpy()


def gradient(parameter: Any) -> np.ndarray:
  return parameter.grad.numpy()


def switch_params(block: Any, read: Callable[[Any], np.ndarray] = numbers) -> dict[str, Any]:
  """Our names and shapes, from one linear [F, M] and one [M, F] for each expert; `read` may be `gradient`."""
  mlps = [block.experts[f'expert_{e}'] for e in range(E)]
  wi = np.stack([read(mlp.wi.weight).T for mlp in mlps])
  wo = np.stack([read(mlp.wo.weight).T for mlp in mlps])
  return {'router': {'kernel': read(block.router.classifier.weight).T}, 'experts': {'wi_0': wi, 'wo': wo}}


def fused_params(block: Any, read: Callable[[Any], np.ndarray] = numbers) -> dict[str, Any]:
  """The same from [E, 2 F, M], the activated half before the linear one, and [E, M, F]."""
  gate, up = np.moveaxis(read(block.experts.gate_up_proj).reshape(E, 2, F, M), 1, 0).swapaxes(2, 3)
  wo = read(block.experts.down_proj).swapaxes(1, 2)
  experts = {'wi_0': gate, 'wi_1': up, 'wo': wo}
  return {'router': {'kernel': read(block.gate.weight).T}, 'experts': experts}


def deepseek_params(block: Any, read: Callable[[Any], np.ndarray] = numbers) -> dict[str, Any]:
  """The same, and the expert that all tokens share, which for us is a dense sublayer."""
  mlp = block.shared_experts
  linears = {'wi_0': mlp.gate_proj, 'wi_1': mlp.up_proj, 'wo': mlp.down_proj}
  return fused_params(block, read) | {'shared': {name: read(linear.weight).T for name, linear in linears.items()}}


@dataclasses.dataclass(frozen=True)
class Case:
  """Their block, its weights by our names, and the router of ours that should do the same."""

  block: Callable[[], Any]
  router: Callable[..., Any]
  params: Callable[..., dict[str, Any]] = fused_params
  activations: tuple[str, ...] = ('silu', 'linear')
  drops: bool = False


TOP_1 = make(TopKRouter, num_selected=1, gates='raw')
TOP_K = make(TopKRouter, num_selected=K)
BALANCED = make(BiasBalancedRouter, num_selected=K)
SWITCH = make(Case, params=switch_params, activations=('relu',))
DEEPSEEK = make(Case, params=deepseek_params)
CASES = {
  'switch': SWITCH(make(switch, capacity=L), TOP_1),
  'switch-drops': SWITCH(make(switch, capacity=4), make(TOP_1, eval_capacity_factor=4 * E / L), drops=True),
  'mixtral': Case(mixtral, make(TOP_K, gates='softmax')),
  'mixtral-renormalised': Case(mixtral, make(TOP_K, gates='renormalised')),
  'olmoe': Case(make(olmoe, norm_topk_prob=False), make(TOP_K, gates='raw')),
  'olmoe-renormalised': Case(make(olmoe, norm_topk_prob=True), make(TOP_K, gates='renormalised')),
  'qwen3': Case(make(qwen3, norm_topk_prob=True), make(TOP_K, gates='renormalised')),
  'qwen3-raw': Case(make(qwen3, norm_topk_prob=False), make(TOP_K, gates='raw')),
  'deepseek': DEEPSEEK(
    make(deepseek, bias=0.5, n_group=4, topk_group=2, routed_scaling_factor=2.5),
    make(BALANCED, num_groups=4, groups_kept=2, route_scale=2.5),
  ),
  'deepseek-one-group': DEEPSEEK(
    make(deepseek, bias=0.5, n_group=1, topk_group=1, routed_scaling_factor=1.0), BALANCED
  ),
  'deepseek-no-bias': DEEPSEEK(
    make(deepseek, bias=0.0, n_group=1, topk_group=1, routed_scaling_factor=1.0), make(TOP_K, gates='sigmoid')
  ),
}


def ours(case: Case, block: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
  """Our layer with the weights of `block`: (params, x) -> (y, metrics), and the params."""
  params = case.params(block)
  layer = MoELayer(E, L, case.router, make(Experts, hidden_dim=F, activations=case.activations))
  shapes = jax.eval_shape(layer.init, jax.random.key(0), X, CONTEXT)
  state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.get('state', {}))
  if state:
    state['router']['bias'] = numbers(block.gate.e_score_correction_bias)

  @jax.jit
  def apply(params: dict[str, Any], x: jax.Array) -> Any:
    routed = {name: params[name] for name in ('router', 'experts')}
    y, aux = layer.apply({'params': routed, 'state': state}, x, CONTEXT)
    if 'shared' in params:
      y += Mlp(F, case.activations).apply({'params': params['shared']}, x, CONTEXT)[0]
    return y, aux.metrics

  return apply, params


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
  """No number is off by more than `tolerance` times the largest there is."""
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.max(np.abs(expected)))


@pytest.mark.parametrize('name', CASES)
def test_outputs_agree(name):
  case, block = CASES[name], CASES[name].block()
  apply, params = ours(case, block)
  y, metrics = apply(params, X)
  expected = numbers(block(torch.from_numpy(X)))
  assert_close(y, expected, 1e-5)
  # They leave a token that no expert had room for at 0, and so do we; rows are our groups.
  absent = np.all(expected == 0, axis=-1)
  assert np.all(np.asarray(y)[absent] == 0)
  assert metrics['dropped'] == pytest.approx(absent.mean())
  assert absent.any() == case.drops


@pytest.mark.parametrize('name', CASES)
def test_gradients_agree(name):
  """Of all weights, the router's among them, and of the tokens."""
  case, block = CASES[name], CASES[name].block()
  apply, params = ours(case, block)
  actual = jax.jit(jax.grad(lambda *args: jnp.sum(apply(*args)[0] * COTANGENT), argnums=(0, 1)))(params, X)
  x = torch.tensor(X, requires_grad=True)
  (block(x) * torch.from_numpy(COTANGENT)).sum().backward()
  jax.tree.map(make(assert_close, tolerance=1e-4), actual, (case.params(block, gradient), gradient(x)))
