"""Models made of other models: equal where the recipes promise it."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from moe_jax.interop import surgery
from moe_jax.moe.experts import Experts
from moe_jax.moe.moe_layer import MoELayer
from moe_jax.moe.routers.top_k import TopKRouter
from moe_jax.training import optimizers
from moe_jax.training.state import Names
from moe_jax.types import ConfigError
from tests import tiny

KINDS = {'decoder_only': tiny.decoder_only, 'encoder_decoder': tiny.encoder_decoder}
ROOMY = functools.partial(TopKRouter, capacity_factor=8.0)  # nothing is dropped, and gates sum to one


def sized(monkeypatch, experts=8, hidden=64):
  """Tiny models with so many experts, as wide as their dense layers."""

  def make(target, **fields):
    if target is MoELayer:
      fields |= {'num_experts': experts, 'experts': functools.partial(Experts, hidden_dim=hidden)}
    return functools.partial(target, **fields)

  monkeypatch.setattr(tiny, 'make', make)


def init(model, kind, seed=0):
  batch = tiny.batch(rows=8, encoder=kind == 'encoder_decoder')
  params = jax.jit(lambda: nn.unbox(model.init(jax.random.key(seed), batch)))()['params']
  real = (batch['decoder_segment_ids'] > 0)[..., None]  # padding meets no expert
  return jax.device_get(params), lambda params: jax.jit(lambda p: model.apply({'params': p}, batch)[0])(params) * real


@pytest.mark.parametrize('every, scan', [(1, True), (2, False), (4, True)])
@pytest.mark.parametrize('kind', KINDS)
def test_an_upcycled_model_computes_what_the_dense_one_did(monkeypatch, kind, every, scan):
  sized(monkeypatch)
  dense, dense_output = init(KINDS[kind](expert_every=0), kind, seed=1)
  fresh, output = init(KINDS[kind](router=ROOMY, expert_every=every, scan=scan), kind, seed=2)
  upcycled = surgery.upcycle(dense, fresh)
  assert jax.tree.map(jnp.shape, upcycled) == jax.tree.map(jnp.shape, fresh)
  np.testing.assert_allclose(output(upcycled), dense_output(dense), atol=1e-5)
  assert np.abs(output(fresh) - dense_output(dense)).max() > 0.1
  routers = {path: x for path, x in flatten_dict(upcycled, sep='/').items() if '/router/' in path}
  for path, x in routers.items():
    np.testing.assert_array_equal(x, flatten_dict(fresh, sep='/')[path])
  assert routers


@pytest.mark.parametrize('scan', [True, False])
@pytest.mark.parametrize('name', ['adafactor', 'adamw'])
def test_optimizer_state_is_upcycled_too(name, scan):
  """With the dense statistics, and the dense gradient on each expert, every copy takes the dense layer's own step."""
  make = functools.partial(getattr(optimizers, name), learning_rate=optimizers.constant(0.01), clip_norm=None)

  def axes(tree):
    stacked = {'moe': ('layers', 'expert')} if scan else {'moe': ('expert',)}
    other = ('layers',) if scan else ()
    flat = flatten_dict(tree, sep='/')
    names = {path: stacked.get(path.split('/')[1], other) if 'router' not in path else other for path in flat}
    return unflatten_dict({p: Names((*n, *(None,) * (flat[p].ndim - len(n)))) for p, n in names.items()}, sep='/')

  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  if scan:
    dense = {'blocks': {'mlp': {'wo': draw(4, 130, 140)}, 'attention': {'query': draw(4, 5)}}}
    sparse = {f'attention_{i}': {'query': draw(2, 5)} for i in range(2)}
    sparse |= {'mlp_0': {'wo': draw(2, 130, 140)}, 'moe': {'experts': {'wo': draw(2, 3, 130, 140)}}}
    sparse['moe']['router'] = {'kernel': draw(2, 5, 3)}
    sparse = {'blocks': sparse}
  else:
    dense = {f'blocks_{i}': {'mlp': {'wo': draw(130, 140)}} for i in range(2)}
    sparse = {
      f'blocks_{i}': {'moe': {'experts': {'wo': draw(3, 130, 140)}, 'router': {'k': draw(5, 3)}}} for i in (0, 1)
    }
  fresh_params, old, new = sparse, make(axes(dense)), make(axes(sparse))
  gradient = jax.tree.map(lambda x: draw(*x.shape), dense)
  state = old.init(dense)
  for _ in range(3):
    _, state = old.update(jax.tree.map(lambda x: draw(*x.shape), dense), state, dense)
  params = surgery.upcycle(dense, fresh_params)
  carried, first = surgery.upcycle_optimizer(state, new.init(params)), new.init(params)
  assert jax.tree.map(jnp.shape, carried) == jax.tree.map(jnp.shape, first)
  expected, _ = old.update(gradient, state, dense)
  copied = surgery.upcycle(gradient, jax.tree.map(jnp.zeros_like, params))
  wanted = surgery.upcycle(expected, jax.tree.map(jnp.zeros_like, params))
  for begun, same in ((carried, True), (first, False)):
    got, _ = new.update(copied, begun, params)
    for path, x in flatten_dict(got, sep='/').items():
      if 'router' not in path:
        assert np.allclose(x, flatten_dict(wanted, sep='/')[path], rtol=1e-5, atol=1e-9) == same
  with pytest.raises(ConfigError, match='Only one of the two optimizers has'):
    surgery.upcycle_optimizer(optax.sgd(0.1, momentum=0.9).init(dense), (optax.adam(0.1).init(params),))


def test_noise_tells_experts_apart(monkeypatch):
  sized(monkeypatch)
  dense, _ = init(tiny.decoder_only(expert_every=0), 'decoder_only')
  fresh, _ = init(tiny.decoder_only(), 'decoder_only')
  experts = surgery.upcycle(dense, fresh, noise=0.01)['stack_0']['blocks']['moe']['experts']['wo']
  copy = dense['stack_0']['blocks']['mlp']['wo'][1]
  assert np.abs(experts[0, 0] - experts[0, 1]).max() > 0
  assert np.std(experts[0] / copy[None] - 1) == pytest.approx(0.01, rel=0.1)


def test_what_cannot_be_upcycled_is_named(monkeypatch):
  sized(monkeypatch, hidden=32)
  dense, _ = init(tiny.decoder_only(expert_every=0), 'decoder_only')
  fresh, _ = init(tiny.decoder_only(), 'decoder_only')
  with pytest.raises(ConfigError, match=r'layer 1/moe/experts/wi_0 has shape \(8, 32, 64\)'):
    surgery.upcycle(dense, fresh)
  sized(monkeypatch)
  plain = jax.tree.map(lambda x: x, fresh)
  del plain['stack_0']['blocks']['moe']['experts']['wi_1']  # experts that are not gated, of a gated layer
  plain['stack_0']['blocks']['moe']['experts'] = {
    name: np.zeros((2, 8, *shape), np.float32) for name, shape in {'wi_0': (32, 64), 'wo': (64, 32)}.items()
  }
  with pytest.raises(ConfigError, match='no use for stack_0/layer 1/mlp/wi_1'):
    surgery.upcycle(dense, plain)
  shallow, _ = init(tiny.decoder_only(expert_every=0, num_layers=2), 'decoder_only')
  with pytest.raises(ConfigError, match='has nothing for stack_0/layer 2/'):
    surgery.upcycle(shallow, fresh)


@pytest.mark.parametrize('scan', [True, False])
def test_pruning_keeps_the_most_used_and_their_routing(monkeypatch, scan):
  params, _ = init(tiny.decoder_only(router=ROOMY, scan=scan), 'decoder_only')
  flat = flatten_dict(params, sep='/')
  loads = jnp.array([[0, 0, 0.4, 0.1, 0, 0.5, 0, 0], [0.3, 0, 0, 0, 0, 0, 0.2, 0.5]])
  kept = np.array([[2, 3, 5], [0, 6, 7]])
  sized(monkeypatch, experts=3, hidden=32)
  fresh, fewer_output = init(tiny.decoder_only(router=ROOMY, scan=scan), 'decoder_only')
  pruned = surgery.prune(params, fresh, loads={'stack_0/': loads})
  for path, x in flatten_dict(pruned, sep='/').items():
    axis = 0 if '/experts/' in path else 1
    if '/moe/' not in path:
      np.testing.assert_array_equal(x, flat[path])
    elif scan:
      for layer in range(2):
        np.testing.assert_array_equal(x[layer], np.take(flat[path][layer], kept[layer], axis=axis))
    else:
      np.testing.assert_array_equal(x, np.take(flat[path], kept[int('blocks_1' in path)], axis=axis))
  random = surgery.prune(params, fresh, seed=3)
  assert jax.tree.map(jnp.shape, random) == jax.tree.map(jnp.shape, fresh)
  assert np.all(np.isfinite(fewer_output(random)))


def test_pruning_to_the_experts_that_have_all_traffic_changes_nothing(monkeypatch):
  """Of router columns a, -a, b, -b two are positive for any token, so that columns of 0 are never of the best two."""
  params, output = init(tiny.decoder_only(router=ROOMY), 'decoder_only')
  kept = [[6, 1, 4, 3], [0, 7, 2, 5]]
  router = params['stack_0']['blocks']['moe']['router']
  ((path, columns),) = flatten_dict(router).items()
  planted = np.zeros_like(columns)
  for layer, experts in enumerate(kept):
    for at, expert in enumerate(experts):
      planted[layer, :, expert] = columns[layer, :, at // 2] * (-1) ** at
  params['stack_0']['blocks']['moe']['router'] = unflatten_dict({path: planted})
  sized(monkeypatch, experts=4, hidden=32)
  fresh, fewer_output = init(tiny.decoder_only(router=ROOMY), 'decoder_only')
  pruned = surgery.prune(params, fresh, keep={'stack_0/': kept})
  np.testing.assert_allclose(fewer_output(pruned), output(params), atol=1e-5)
  first = surgery.prune(params, fresh)
  assert np.abs(fewer_output(first) - output(params)).max() > 1e-3
  for wrong in ([[0, 1, 2, 2]] * 2, [[0, 1, 2]] * 2, [[0, 1, 2, 8]] * 2):
    with pytest.raises(ConfigError, match='name 4 different experts of 0 to 7'):
      surgery.prune(params, fresh, keep={'stack_0/': wrong})


def test_equal_experts_merge_to_themselves(monkeypatch):
  sized(monkeypatch)
  dense, dense_output = init(tiny.decoder_only(expert_every=0), 'decoder_only', seed=1)
  fresh, _ = init(tiny.decoder_only(router=ROOMY), 'decoder_only')
  upcycled = surgery.upcycle(dense, fresh)
  again = surgery.merge(upcycled, dense)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, dense)
  sized(monkeypatch, experts=4)
  fewer, output = init(tiny.decoder_only(router=ROOMY), 'decoder_only')
  loads = {'stack_0/': 1 / jnp.arange(1.0, 17).reshape(2, 8)}
  np.testing.assert_allclose(output(surgery.merge(upcycled, fewer, loads)), dense_output(dense), atol=1e-5)


def test_merging_weighs_experts_by_their_use(monkeypatch):
  params, _ = init(tiny.decoder_only(), 'decoder_only')
  sized(monkeypatch, experts=4, hidden=32)
  fresh, _ = init(tiny.decoder_only(), 'decoder_only')
  loads = jnp.array([[1.0, 3, 1, 1, 1, 1, 1, 1], [1.0, 1, 1, 1, 1, 1, 2, 8]])
  before = params['stack_0']['blocks']['moe']['experts']['wo']
  after = surgery.merge(params, fresh, {'stack_0/': loads})['stack_0']['blocks']['moe']['experts']['wo']
  np.testing.assert_allclose(after[0, 0], 0.25 * before[0, 0] + 0.75 * before[0, 1], rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(after[1, 3], 0.2 * before[1, 6] + 0.8 * before[1, 7], rtol=1e-5, atol=1e-7)
  sized(monkeypatch, experts=3, hidden=32)
  fresh, _ = init(tiny.decoder_only(), 'decoder_only')
  with pytest.raises(ConfigError, match='8 experts do not merge into 3 evenly'):
    surgery.merge(params, fresh)
  groups = {'stack_0/': [[[0, 5], [1, 2, 3, 4, 6], [7]], [[7, 0], [1], [2, 3, 4, 5, 6]]]}
  after = surgery.merge(params, fresh, {'stack_0/': loads}, groups)['stack_0']['blocks']['moe']
  np.testing.assert_allclose(after['experts']['wo'][0, 0], (before[0, 0] + before[0, 5]) / 2, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(after['experts']['wo'][1, 0], (8 * before[1, 7] + before[1, 0]) / 9, rtol=1e-5, atol=1e-7)
  kernel = params['stack_0']['blocks']['moe']['router']['kernel']
  np.testing.assert_allclose(after['router']['kernel'][0, :, 2], kernel[0, :, 7], rtol=1e-6)
  with pytest.raises(ConfigError, match='name each of 8 experts in one of 3 groups'):
    surgery.merge(params, fresh, groups={'stack_0/': [[[0, 5], [1, 2, 3, 4], [7]]] * 2})
  with pytest.raises(ConfigError, match='groups says nothing of stack_0/layer 3'):
    surgery.merge(params, fresh, groups={'stack_0/': groups['stack_0/'][:1]})


def test_a_student_begins_with_what_it_shares():
  teacher, _ = init(tiny.decoder_only(), 'decoder_only', seed=1)
  fresh, _ = init(tiny.decoder_only(expert_every=0), 'decoder_only', seed=2)
  student = surgery.shared_start(teacher, fresh)
  blocks, theirs, own = (tree['stack_0']['blocks'] for tree in (student, teacher, fresh))
  np.testing.assert_array_equal(student['embedding']['table'], teacher['embedding']['table'])
  np.testing.assert_array_equal(blocks['attention']['key'][3], theirs['attention_1']['key'][1])
  np.testing.assert_array_equal(blocks['mlp']['wo'][2], theirs['mlp_0']['wo'][1])
  np.testing.assert_array_equal(blocks['mlp']['wo'][3], own['mlp']['wo'][3])
  shallow, _ = init(tiny.decoder_only(num_layers=2), 'decoder_only', seed=2)
  student = surgery.shared_start(teacher, shallow)
  theirs = jax.tree.map(lambda x: x[:1], theirs)
  jax.tree.map(np.testing.assert_array_equal, student, {**teacher, 'stack_0': {'blocks': theirs}})


def test_averages():
  one, _ = init(tiny.decoder_only(), 'decoder_only', seed=1)
  two, _ = init(tiny.decoder_only(), 'decoder_only', seed=2)
  jax.tree.map(np.testing.assert_array_equal, surgery.average([one, one]), one)
  mean = surgery.average([one, two], [3.0, 1.0])
  jax.tree.map(lambda m, a, b: np.testing.assert_allclose(m, 0.75 * a + 0.25 * b, rtol=1e-6), mean, one, two)
  other, _ = init(tiny.decoder_only(num_layers=2), 'decoder_only')
  with pytest.raises(ConfigError, match=r'Models to average differ: stack_0/blocks/attention_0/key is \(2, 32, 4, 8\)'):
    surgery.average([one, other])


def test_loads_are_read_from_a_run(tmp_path):
  line = {'split': 'train', 'decoder/stack_0/moe/expert_load': [[0.25, 0.75]], 'encoder/moe/expert_load': [[1.0, 0.0]]}
  later = {**line, 'decoder/stack_0/moe/expert_load': [[0.75, 0.25]]}
  rows = [{**line, 'encoder/moe/expert_load': [[0.0, 9.0]]}, line, {**line, 'split': 'validation'}, later]
  (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  loads = surgery.measured_loads(str(tmp_path), last=2)
  assert {stack: load.tolist() for stack, load in loads.items()} == {'stack_0/': [[0.5, 0.5]], 'encoder/': [[1.0, 0.0]]}
  with pytest.raises(ConfigError, match='tells of no loads'):
    surgery.measured_loads(str(tmp_path / 'nowhere'))
