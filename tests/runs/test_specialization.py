"""Watching what experts specialise in: in real models, scanned or not, of real tokens alone."""

import functools

import jax
import numpy as np
import pytest

from moe_jax.moe.moe_layer import MoELayer
from moe_jax.moe.routers.expert_choice import ExpertChoiceRouter
from moe_jax.moe.routers.hashing import HashRouter, RandomRouter, RoundRobinRouter, random_table
from moe_jax.moe.routers.soft import SoftRouter
from moe_jax.moe.routers.top_k import TopKRouter
from moe_jax.objectives import LanguageModeling
from moe_jax.runs.specialization import collected, stability, summary, watch
from moe_jax.types import ConfigError
from tests import tiny

HASH = functools.partial(HashRouter, table=functools.partial(random_table, vocab_size=tiny.VOCAB))
TEXTS = [f'<{i}>' if i >= 50 else chr(60 + i) for i in range(tiny.VOCAB)]
SPECIAL = [i >= 50 for i in range(tiny.VOCAB)]
SHALLOW = {'expert_every': 1, 'num_layers': 2}


def seen_of(model, batches=2, variables=None, extra=None, **batch):
  """What is seen of a model that nothing has taught, over some batches."""
  batches = [tiny.batch(seed=seed, **batch) | (extra or {}) for seed in range(batches)]
  variables = variables or jax.jit(model.init)(jax.random.key(0), batches[0])
  look = jax.jit(functools.partial(watch, objective=LanguageModeling(model)))
  return collected([jax.device_get(look(variables, batch)) for batch in batches])


def shares_of(seen):
  """Layer -> what is told of its experts -> adjusted share."""
  layers = summary(seen, TEXTS, SPECIAL)['layers']
  return {name: {key: x['share'] for key, x in layer['associations'].items()} for name, layer in layers.items()}


@pytest.mark.parametrize('scan', [True, False], ids=['scanned', 'unrolled'])
def test_hashes_are_told_by_the_token_and_by_nothing_else(scan):
  seen = seen_of(tiny.encoder_decoder(router=HASH, **SHALLOW, scan=scan, remat='full'), encoder=True)
  found = shares_of(seen)
  assert list(found) == ['encoder/moe/0', 'encoder/moe/1', 'decoder/moe/0', 'decoder/moe/1']
  table = random_table(8, tiny.VOCAB)
  for name, layer in seen.layers.items():
    np.testing.assert_array_equal(layer.first, table[seen.tokens[name.split('/')[0]]['ids']])
    assert set(found[name]) == {'token', 'previous', 'position', 'kind'}
    np.testing.assert_allclose(found[name]['token'], 1)
    assert abs(found[name]['position']) < 0.02 and abs(found[name]['previous']) < 0.05
  layer = summary(seen, TEXTS, SPECIAL)['layers']['decoder/moe/1']
  for facts in layer['most_specialised_experts']:
    assert {table[token['id']] for token in facts['top_by_lift']} == {facts['expert']}


@pytest.mark.parametrize('router', [RoundRobinRouter, RandomRouter])
def test_experts_in_turn_are_told_by_no_token(router):
  for told in shares_of(seen_of(tiny.decoder_only(router=router, **SHALLOW), rows=64)).values():
    assert abs(told['token']) < 0.02 and abs(told['kind']) < 0.02


def test_scanned_and_unrolled_layers_are_seen_alike():
  scanned, unrolled = (
    tiny.decoder_only(**SHALLOW, scan=True, remat='full'),
    tiny.decoder_only(**SHALLOW, scan=False, remat='none'),
  )
  variables = jax.jit(scanned.init)(jax.random.key(0), tiny.batch())
  stack = variables['params']['stack_0']
  blocks = {f'blocks_{i}': jax.tree.map(lambda x, i=i: x[i], jax.tree.map(lambda x: x.value, stack['blocks'],
            is_leaf=lambda x: hasattr(x, 'value'))) for i in range(2)}  # fmt: skip
  params = {**variables['params'], 'stack_0': {key: x for key, x in stack.items() if key != 'blocks'} | blocks}
  one, other = seen_of(scanned, variables=variables), seen_of(unrolled, variables={'params': params})
  assert list(one.layers) == list(other.layers) == ['decoder/stack_0/moe/0', 'decoder/stack_0/moe/1']
  for name, layer in one.layers.items():
    for ours, theirs in zip(layer, other.layers[name]):
      np.testing.assert_array_equal(ours, theirs)
  assert not np.array_equal(one.layers['decoder/stack_0/moe/0'].first, one.layers['decoder/stack_0/moe/1'].first)


def test_padding_is_left_out_and_a_text_begins_with_nothing_before_it():
  batch = tiny.batch(seed=0)
  real = batch['decoder_segment_ids'] > 0
  tasks = np.arange(1, 33, dtype=np.int32)[:, None] * real
  seen = seen_of(tiny.decoder_only(**SHALLOW), batches=1, extra={'decoder_task_ids': tasks})
  tokens = seen.tokens['decoder']
  np.testing.assert_array_equal(tokens['task'], tasks[real])
  assert 'task' in shares_of(seen)['decoder/stack_0/moe/0']
  np.testing.assert_array_equal(tokens['ids'], batch['decoder_input_tokens'][real])
  np.testing.assert_array_equal(tokens['previous'] < 0, batch['decoder_positions'][real] == 0)
  np.testing.assert_array_equal(tokens['previous'][1:20], tokens['ids'][:19])
  assert tokens['position'].max() < 16
  for layer in seen.layers.values():
    assert len(layer.first) == len(layer.experts) == np.sum(real) and layer.first.min() >= 0


def test_dropped_choices_are_counted_by_kind():
  router = functools.partial(TopKRouter, capacity_factor=1.0, eval_capacity_factor=0.5)
  seen = seen_of(tiny.decoder_only(router=router, **SHALLOW))
  found = summary(seen, TEXTS, SPECIAL)
  layer, watched = found['layers']['decoder/stack_0/moe/0'], seen.layers['decoder/stack_0/moe/0']
  assert watched.dropped.any() and (watched.experts[watched.dropped] >= 0).all()
  np.testing.assert_allclose(layer['dropped_share'], watched.dropped.mean())
  by_kind, weights = layer['dropped_share_by_kind'], found['sides']['decoder']['share_of_tokens_by_kind']
  mean = sum(by_kind[kind] * weight for kind, weight in weights.items() if weight)
  np.testing.assert_allclose(mean, layer['dropped_share'])
  assert seen_of(tiny.decoder_only(**SHALLOW)).layers['decoder/stack_0/moe/0'].dropped.sum() == 0


def test_experts_that_choose_are_seen_by_the_token():
  with pytest.warns(UserWarning, match='looks at later tokens'):
    layer = seen_of(tiny.decoder_only(router=ExpertChoiceRouter, **SHALLOW)).layers['decoder/stack_0/moe/0']
  assert layer.experts.shape[1] == 8 and (layer.first < 0).any()  # whom no expert took
  some = layer.first >= 0
  assert np.any(layer.experts[some] == layer.first[some, None], axis=1).all()


def test_mixtures_of_tokens_are_left_out():
  with pytest.warns(UserWarning, match='looks at later tokens'), pytest.raises(ConfigError, match='no layer of this'):
    seen_of(tiny.decoder_only(router=SoftRouter, **SHALLOW))


def test_who_does_not_look_pays_nothing(monkeypatch):
  objective = LanguageModeling(tiny.decoder_only(**SHALLOW))
  batch = objective.counted(tiny.batch())
  variables = jax.eval_shape(objective.model.init, jax.random.key(0), batch)
  assert set(variables) == {'params'}

  def step():
    jax.clear_caches()
    loss = functools.partial(objective.loss, batch=batch, rngs=None, train=True)
    return str(jax.make_jaxpr(jax.grad(loss, has_aux=True))(variables))

  with_a_place_to_look = step()
  monkeypatch.setattr(MoELayer, 'sow', lambda *args, **options: False)
  assert step() == with_a_place_to_look


def test_equal_checkpoints_route_alike():
  model = tiny.decoder_only(**SHALLOW)
  first, second = seen_of(model), seen_of(model, variables=jax.jit(model.init)(jax.random.key(1), tiny.batch()))
  found = stability({100: first, 200: second, 300: first})
  assert found['steps'] == [100, 200, 300]
  for layer in found['layers'].values():
    assert layer['same_expert_share'][0] == layer['same_choices_share'][0] == layer['same_expert_share'][2] == 1
    for key in ('same_expert_share', 'same_choices_share'):
      assert abs(layer[key][1] - layer[f'{key}_by_chance'][1]) < 0.2
