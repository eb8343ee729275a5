"""The mesh is invisible: loss, auxiliary losses and gradients are those of one device on every mesh."""

import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.moe.dispatchers.all_to_all import all_to_all
from moe_jax.moe.dispatchers.einsum import einsum
from moe_jax.objectives import LanguageModeling
from moe_jax.training.state import abstract_variables
from moe_jax.training.step import gradients
from tests import tiny

REPLICATED = sharding.replicated_rules()
DISPATCHERS = {'einsum': einsum, 'all_to_all': all_to_all}
KINDS = {'decoder_only': tiny.decoder_only, 'encoder_decoder': tiny.encoder_decoder}


def slow(*values: Any) -> Any:
  """A case that others make likely."""
  return pytest.param(*values, marks=pytest.mark.slow)


def one_step(kind: str, mesh: Any, rules: Any, microbatches: int = 1, params: Any = None, **options: Any) -> Any:
  """Gradients and metrics of one batch, on the host; the weights are made on one device and laid out on the mesh."""
  objective = LanguageModeling(KINDS[kind](**options), z_loss=1e-4)
  batch = tiny.batch(encoder=kind == 'encoder_decoder')
  spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
  with sharding.activate(mesh, rules):
    shapes, names = abstract_variables(objective, spec)
    place = jax.tree.map(lambda _, axes: sharding.named_sharding(mesh, *axes), shapes['params'], names['params'])
    params = jax.device_put(params, place)
    batch = {name: jax.device_put(x, sharding.named_sharding(mesh, 'batch', None)) for name, x in batch.items()}
    step = jax.jit(
      functools.partial(gradients, objective=objective, microbatches=microbatches), out_shardings=(place, None, None)
    )
    grads, _, metrics = step(params, {}, batch, jax.random.key(0))
  return jax.device_get((grads, metrics))


@functools.cache
def initial(kind: str) -> Any:
  """Weights made on one device, with routers that have opinions."""
  key, batch = jax.random.key(1), tiny.batch(encoder=kind == 'encoder_decoder')
  params = jax.device_get(jax.jit(lambda: nn.unbox(KINDS[kind]().init(key, batch)))()['params'])
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x * 10 if 'router' in jax.tree_util.keystr(path) else x, params
  )


@functools.cache
def reference(kind: str) -> Any:
  mesh = sharding.make_mesh({'data': 1, 'expert': 1, 'model': 1}, jax.devices()[:1])
  return one_step(kind, mesh, sharding.replicated_rules(), params=initial(kind))


def assert_same(actual: Any, expected: Any) -> None:
  (grads, metrics), (expected_grads, expected_metrics) = actual, expected
  assert metrics.keys() == expected_metrics.keys()
  for name, value in metrics.items():
    np.testing.assert_allclose(value, expected_metrics[name], rtol=1e-5, atol=1e-7, err_msg=name)
  for (path, value), expected in zip(
    jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True
  ):
    error = np.linalg.norm(value - expected) / np.linalg.norm(expected)
    assert error <= 1e-5, f'{jax.tree_util.keystr(path)}: relative error {error}'


@pytest.mark.parametrize(
  'dispatcher, microbatches, shape',
  [
    *(('einsum', 1, shape) for shape in [(1, 1, 1), (8, 1, 1), (2, 2, 2)]),
    *(('all_to_all', 4, shape) for shape in [(2, 4, 1), (1, 8, 1), (2, 2, 2)]),
    *(slow('einsum', 1, shape) for shape in [(2, 4, 1), (1, 8, 1)]),
    *(slow('all_to_all', 4, shape) for shape in [(1, 1, 1), (8, 1, 1)]),
  ],
)
def test_decoder_only(mesh, shape, dispatcher, microbatches):
  options = {'dispatcher': DISPATCHERS[dispatcher]}
  actual = one_step('decoder_only', mesh(*shape), REPLICATED, microbatches, initial('decoder_only'), **options)
  assert_same(actual, reference('decoder_only'))


@pytest.mark.parametrize('dispatcher', DISPATCHERS)
def test_weights_split_over_the_data_axes(mesh, dispatcher):
  options = {'dispatcher': DISPATCHERS[dispatcher]}
  actual = one_step('decoder_only', mesh(2, 2, 2), sharding.fsdp_rules(), 4, initial('decoder_only'), **options)
  assert_same(actual, reference('decoder_only'))


@pytest.mark.parametrize('dispatcher', DISPATCHERS)
def test_with_all_the_compilers_optimizations(mesh, dispatcher):
  """The other tests do without most of them, to compile quickly."""
  try:
    jax.config.update('jax_disable_most_optimizations', False)
    options = {'dispatcher': DISPATCHERS[dispatcher]}
    actual = one_step('decoder_only', mesh(2, 2, 2), REPLICATED, 4, initial('decoder_only'), **options)
  finally:
    jax.config.update('jax_disable_most_optimizations', True)
  assert_same(actual, reference('decoder_only'))


@pytest.mark.parametrize(
  'shape, rules',
  [
    ((2, 4, 1), sharding.replicated_rules()),
    ((2, 2, 2), sharding.fsdp_rules()),
    slow((2, 4, 1), sharding.fsdp_rules()),
    slow((2, 2, 2), sharding.replicated_rules()),
  ],
)
def test_encoder_decoder(mesh, shape, rules):
  actual = one_step('encoder_decoder', mesh(*shape), rules, 2, initial('encoder_decoder'), dispatcher=all_to_all)
  assert_same(actual, reference('encoder_decoder'))


@pytest.mark.parametrize(
  'dispatcher, microbatches, shape',
  [
    ('einsum', 4, (1, 1, 1)),
    ('all_to_all', 1, (2, 2, 2)),
    slow('einsum', 4, (2, 2, 2)),
    slow('all_to_all', 1, (1, 1, 1)),
  ],
)
def test_unrolled_equals_scanned(mesh, shape, dispatcher, microbatches):
  stacked = initial('decoder_only')
  repeats = 2
  unrolled = {**stacked, 'stack_0': {}}
  for i in range(repeats):
    unrolled['stack_0'][f'blocks_{i}'] = jax.tree.map(lambda x, i=i: x[i], stacked['stack_0']['blocks'])
  options = {'dispatcher': DISPATCHERS[dispatcher], 'scan': False, 'remat': 'none'}
  grads, metrics = one_step('decoder_only', mesh(*shape), REPLICATED, microbatches, unrolled, **options)
  blocks = [grads['stack_0'].pop(f'blocks_{i}') for i in range(repeats)]
  grads['stack_0']['blocks'] = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
  assert_same((grads, metrics), reference('decoder_only'))


@pytest.mark.parametrize(
  'dispatcher, shape',
  [('einsum', (2, 4, 1)), ('all_to_all', (2, 2, 2)), slow('einsum', (2, 2, 2)), slow('all_to_all', (2, 4, 1))],
)
def test_dense_layers_may_split_the_same_devices_otherwise(mesh, shape, dispatcher):
  rules = sharding.tensor_over_experts_rules()
  options = {'dispatcher': DISPATCHERS[dispatcher]}
  actual = one_step('decoder_only', mesh(*shape), rules, 1, initial('decoder_only'), **options)
  assert_same(actual, reference('decoder_only'))


@pytest.mark.parametrize('dispatcher', DISPATCHERS)
def test_replicas_are_invisible_too(dispatcher):
  mesh = sharding.make_mesh({'replica': 2, 'data': 2, 'expert': 2})
  options = {'dispatcher': DISPATCHERS[dispatcher]}
  actual = one_step('decoder_only', mesh, sharding.fsdp_rules(), 1, initial('decoder_only'), **options)
  assert_same(actual, reference('decoder_only'))


@pytest.mark.parametrize(
  'dispatcher, rules',
  [
    ('einsum', sharding.replicated_rules()),
    ('all_to_all', sharding.fsdp_rules()),
    slow('einsum', sharding.fsdp_rules()),
    slow('all_to_all', sharding.replicated_rules()),
  ],
)
def test_sequences_in_pieces(mesh, dispatcher, rules):
  the_mesh = mesh(data=2, expert=2, sequence=2)
  options = {'dispatcher': DISPATCHERS[dispatcher]}
  actual = one_step('decoder_only', the_mesh, rules, 2, initial('decoder_only'), **options)
  assert_same(actual, reference('decoder_only'))


def test_sequences_of_encoders_in_pieces(mesh):
  the_mesh, weights = mesh(expert=2, sequence=2, model=2), initial('encoder_decoder')
  actual = one_step('encoder_decoder', the_mesh, sharding.fsdp_rules(), 1, weights, dispatcher=all_to_all)
  assert_same(actual, reference('encoder_decoder'))


def test_the_reference_is_not_trivial():
  """The comparison above means something: tokens are dropped, the load is uneven, every weight has a gradient."""
  grads, metrics = reference('decoder_only')
  load = metrics['decoder/stack_0/moe/expert_load']
  assert np.allclose(load.sum(-1), 1) and load.max() > 1.3 / 8 and load.min() < 0.7 / 8
  assert np.all(metrics['decoder/stack_0/moe/dropped_choices'] > 0.05)
  assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))
