"""Defects that other codebases shipped. Each check holds for our code, and fails once the defect is put in."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import sharding
from moe_jax.batch import split_microbatches
from moe_jax.layers.context import Context
from moe_jax.models.stack import Stack
from moe_jax.moe import router_losses
from moe_jax.moe.dispatchers.base import Journey
from moe_jax.moe.experts import Experts
from moe_jax.moe.moe_layer import MoELayer, rows_per_group
from moe_jax.moe.routers import bias_balanced
from moe_jax.moe.routers.base import RoutingContext
from moe_jax.moe.routers.bias_balanced import BiasBalancedRouter
from moe_jax.moe.routers.reinforce import ReinforceRouter
from moe_jax.moe.routers.top_k import TopKRouter
from moe_jax.objectives import LanguageModeling
from moe_jax.training.state import abstract_variables
from moe_jax.training.step import gradients
from moe_jax.types import ConfigError, total_loss
from tests import tiny
from tests.moe import test_routers as routers

make = functools.partial
B, L, M, E, KEY = 8, 8, 8, 4, jax.random.key(0)
X = np.random.default_rng(0).normal(0.5, 1, (B, L, M)).astype(np.float32)
SEGMENTS = np.ones((B, L), np.int32)
SEGMENTS[1, 5:] = SEGMENTS[2] = 0


def filled(shapes):
  """Random parameters, which give routers opinions; and empty memories."""
  rng, others = np.random.default_rng(1), dict(shapes)
  params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(x.dtype), others.pop('params'))
  return params, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), others)


def sparse_model(router, **options):
  """A language model of one sparse layer, its parameters and memories."""
  objective = LanguageModeling(tiny.decoder_only(router=router, num_layers=1, expert_every=1, remat='none', **options))
  return objective, *filled(abstract_variables(objective, tiny.batch(rows=8, length=16))[0])


def of_the_router(variables, name):
  return variables['stack_0']['blocks']['moe']['router'][name]


def layer(router, group_size, train):
  """A whole expert layer: (x, segment_ids) -> output and metrics."""
  module = MoELayer(E, group_size, router, make(Experts, hidden_dim=4))

  def apply(x, segments):
    context = Context(segments, segments, jnp.sum(segments > 0).astype(jnp.float32), train=train)
    params, state = filled(jax.eval_shape(module.init, KEY, x, context))
    y, aux = module.apply({'params': params, **state}, x, context)
    return y, aux.metrics

  return apply


# 1. Under gradient accumulation the auxiliary loss all but vanishes, or is multiplied.


def check_accumulation(gradient, expected):
  for pieces in (1, 4):
    near = {'rtol': 1e-4, 'atol': 1e-5 * np.abs(expected).max()}
    np.testing.assert_allclose(gradient(pieces), expected, **near, err_msg=f'in {pieces} microbatches')


def without_chance(monkeypatch):
  """Makes every draw the likeliest. Microbatches draw other noise than the whole; without it they must agree."""
  monkeypatch.setattr(jax.random, 'normal', lambda key, shape: jnp.zeros(shape))
  monkeypatch.setattr(jax.random, 'categorical', lambda key, logits: jnp.argmax(logits, axis=-1))
  monkeypatch.setattr(jax.random, 'bernoulli', lambda key, probs: probs > 0.5)


def pass_by(bank, tokens, plan):
  """Experts that return their tokens hide the router from the task: all of its gradient is the auxiliary loss's."""
  return tokens, Journey(rows=0)


@pytest.mark.parametrize('router', [make(TopKRouter, z_loss_weight=1e-3), ReinforceRouter])
def test_accumulation_keeps_the_auxiliary_loss(monkeypatch, router):
  objective, params, _ = sparse_model(router, dispatcher=pass_by)
  batch = jax.tree.map(jnp.asarray, tiny.batch(rows=8, length=16))
  without_chance(monkeypatch)

  def auxiliary_loss(params):
    return objective.loss({'params': params}, objective.counted(batch), {'router': KEY}, train=True)[1][0]['aux_loss']

  def compiled(pieces):
    step = make(gradients, objective=objective, microbatches=pieces)
    return jax.jit(lambda batch: of_the_router(step(params, {}, batch, KEY)[0], 'kernel'))

  expected = of_the_router(jax.jit(jax.grad(auxiliary_loss))(params), 'kernel')
  whole = compiled(1)
  check_accumulation(lambda pieces: whole(batch) if pieces == 1 else compiled(pieces)(batch), expected)

  # The defects: every microbatch divides by its own tokens, and then no divisor puts the sum right.
  parts = split_microbatches(batch, 4)
  total = sum(whole({name: x[i] for name, x in parts.items()}) for i in range(4))
  tokens = np.sum(batch['decoder_segment_ids'] > 0)
  for divisor in (1, 4, tokens):  # added up; averaged, though padding is uneven; a mean within a sum over tokens
    with pytest.raises(AssertionError, match='in 4 microbatches'):
      check_accumulation(lambda pieces, divisor=divisor: expected if pieces == 1 else total / divisor, expected)


ONE_OF_A_CLASS = {type(case.router(num_experts=case.num_experts)): name for name, case in routers.CASES.items()}


@pytest.mark.parametrize('name', [name for kind, name in ONE_OF_A_CLASS.items() if '__call__' in vars(kind)])
def test_losses_of_every_router_add_up(monkeypatch, name):
  case, variables, (tokens, valid) = routers.CASES[name], routers.variables(name), routers.tokens_and_valid()
  told = routers.context(valid)
  without_chance(monkeypatch)

  def loss(params, valid, count):
    router, facts = case.router(num_experts=case.num_experts), told.replace(valid=valid, token_count=count)
    given = {**variables, 'params': params}
    (_, aux), _ = router.apply(given, tokens, facts, rngs={'router': KEY}, mutable=['state'])
    return total_loss(aux), aux

  if not jax.eval_shape(loss, variables['params'], valid, told.token_count)[1].losses:
    return
  compiled = jax.jit(jax.grad(loss, has_aux=True))

  def gradient(pieces, counted=True):
    """The groups of other microbatches are padding here, so that one compiled function does for all."""
    total = 0.0
    for part in np.split(np.arange(len(valid)), pieces):
      own = valid & np.isin(np.arange(len(valid)), part)[:, None]
      grads, _ = compiled(variables['params'], own, told.token_count if counted else jnp.sum(own).astype(jnp.float32))
      total += jax.flatten_util.ravel_pytree(grads)[0]
    return total

  expected = gradient(1)
  assert np.all(np.isfinite(expected)), 'one group is all padding'
  check_accumulation(gradient, expected)
  with pytest.raises(AssertionError, match='in 4 microbatches'):
    check_accumulation(make(gradient, counted=False), expected)  # the defect: each divides by its own tokens


# 2. Statistics of one device are declared to be everyone's.

DEVICES = ('data', 'expert')


def statistics(kernel, tokens, valid, token_count):
  """What a router reports, and the gradient of its losses."""

  def loss(kernel):
    router = TopKRouter(E, z_loss_weight=1e-3, capacity_factor=1.0)
    _, aux = router.apply({'params': {'kernel': kernel}}, tokens, RoutingContext(valid, token_count, train=True))
    return total_loss(aux), aux.metrics

  (total, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(kernel)
  return {**metrics, 'total': total, 'gradient': gradient}


def check_statistics(measure, mesh):
  """Every device holds what one alone would find. It is not enough to look at the first."""
  kernel, tokens, valid = np.eye(M, E, dtype=np.float32), np.concatenate([X, X[::-1]]), np.tile(SEGMENTS, (2, 1)) > 0
  expected = jax.jit(statistics)(kernel, tokens, valid, valid.sum())
  placed = jax.device_put((tokens, valid), NamedSharding(mesh, P(DEVICES)))
  actual = jax.jit(measure, out_shardings=NamedSharding(mesh, P()))(kernel, *placed)
  for name, value in actual.items():
    assert len(value.addressable_shards) == 8
    for shard in value.addressable_shards:
      np.testing.assert_allclose(shard.data, expected[name], rtol=1e-5, atol=1e-7, err_msg=f'{name}, {shard.device}')


def test_statistics_are_those_of_all_devices(mesh):
  def own(kernel, tokens, valid):
    return statistics(kernel, tokens, valid, jnp.sum(valid))

  def averaged(kernel, tokens, valid):  # though padding is uneven
    return jax.lax.pmean(own(kernel, tokens, valid), DEVICES)

  def summed(kernel, tokens, valid):  # as it is right
    return jax.lax.psum(statistics(kernel, tokens, valid, jax.lax.psum(jnp.sum(valid), DEVICES)), DEVICES)

  def by_device(local, check_vma=False):
    specs = P(), P(DEVICES), P(DEVICES)
    return jax.shard_map(local, mesh=the_mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)

  the_mesh = mesh(data=2, expert=4)
  check_statistics(own, the_mesh)  # of global arrays, as the library computes them
  check_statistics(by_device(summed), the_mesh)
  for defect in (own, averaged):
    with pytest.raises(AssertionError, match='balance, '):
      check_statistics(by_device(defect), the_mesh)
  with pytest.raises(ValueError, match='replicat'):  # which is why the library never turns this off
    check_statistics(by_device(own, check_vma=True), the_mesh)


# 3. Routers' biases move too often, or drift apart.

RATE = 0.01


def check_bias(router, mesh, microbatches):
  """After three steps: on each device, one move a step against the load of the whole batch."""

  def step(variables, batch):
    return gradients(params, variables, batch, KEY, objective=objective, microbatches=microbatches)[1:]

  with sharding.activate(mesh, sharding.replicated_rules()):
    objective, params, variables = sparse_model(make(router, bias_rate=RATE), dispatcher=pass_by)
    step, loads = jax.jit(step, out_shardings=NamedSharding(mesh, P())), []
    for seed in range(3):
      batch = tiny.batch(rows=32, length=16, seed=seed)
      variables, metrics = step(variables, jax.device_put(batch, sharding.named_sharding(mesh, 'batch', None)))
      loads.append(np.asarray(metrics['decoder/stack_0/moe/expert_load'][0]))
  moves = np.sign(np.round(1 / 8 - np.stack(loads), 6))  # rounded, since equal parts add up to nearly 1 / 8
  bias = of_the_router(variables['state'], 'bias')
  for shard in bias.addressable_shards:
    np.testing.assert_allclose(shard.data[0], RATE * moves.sum(axis=0), atol=1e-6, err_msg=f'bias on {shard.device}')
  return np.asarray(bias)


def test_the_bias_moves_once_a_step(mesh):
  bias = check_bias(BiasBalancedRouter, mesh(), microbatches=1)
  assert np.max(np.abs(bias)) > 2 * RATE
  np.testing.assert_array_equal(check_bias(BiasBalancedRouter, mesh(data=2, expert=4), microbatches=4), bias)

  class EveryMicrobatch(BiasBalancedRouter):
    def gathered(self, context, **amounts):
      """The defect: a microbatch is taken for a whole step."""
      return amounts, jnp.asarray(context.train)

  with pytest.raises(AssertionError, match='bias on'):
    check_bias(EveryMicrobatch, mesh(), microbatches=4)


def test_the_bias_is_the_same_on_every_device(monkeypatch, mesh):
  def local_counts(expert_index, num_experts, valid):
    """The defect: each device counts its own tokens, and says that all counted alike."""

    def count(*local):
      return jnp.sum(router_losses.choice_counts(local[0], num_experts, local[1]), axis=0, keepdims=True)

    return jax.shard_map(count, in_specs=P(DEVICES), out_specs=P(), check_vma=False)(expert_index, valid)

  patched = types.SimpleNamespace(**{**vars(router_losses), 'choice_counts': local_counts})
  monkeypatch.setattr(bias_balanced, 'router_losses', patched)
  with pytest.raises(AssertionError, match='bias on'):
    check_bias(BiasBalancedRouter, mesh(data=2, expert=4), microbatches=1)


# 4. Padding scales the auxiliary loss.


def check_padding():
  def measure(x, segments):  # four slots an expert at all lengths here
    apply = layer(make(TopKRouter, capacity_factor=1.0), x.shape[1], train=True)
    return jax.jit(lambda *args: apply(*args)[1])(x, segments)

  real = measure(X, SEGMENTS)
  assert real['dropped'] > 0
  for rows, tokens in [(8, 0), (0, 8), (3, 4)]:
    x = np.random.default_rng(2).normal(0, 9, (B + rows, L + tokens, M)).astype(np.float32)  # padding holds anything
    x[:B, :L] = X
    padded = measure(x, np.pad(SEGMENTS, ((0, rows), (0, tokens))))
    for name in real:
      np.testing.assert_array_equal(padded[name], real[name], err_msg=f'{name} with {rows} rows, {tokens} tokens more')


def balance_over_padding(probs, expert_index, valid, token_count):
  share = jnp.mean(jax.nn.one_hot(expert_index[..., 0], E) * valid[..., None], axis=1)
  return jnp.mean(E * jnp.sum(share * jnp.mean(probs * valid[..., None], axis=1), axis=-1))


def test_padding_changes_nothing(monkeypatch):
  check_padding()
  defects = {  # the function: its defective self, and what shows it
    'load_balance_loss': (balance_over_padding, 'balance with'),
    'router_z_loss': (lambda logits, valid, count: jnp.mean(valid * jax.nn.logsumexp(logits, axis=-1) ** 2), 'z with'),
    'dropped_tokens': (lambda kept, valid, count: 1 - jnp.mean(jnp.any(kept, axis=-1)), 'dropped with'),
  }
  for name, (defect, what) in defects.items():
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match=what):
      patch.setattr(router_losses, name, defect)
      check_padding()


# 5. In evaluation a sequence's output depends on the rest of the batch.


def check_evaluation(router):
  together, _ = jax.jit(layer(router, B * L, train=False))(X, SEGMENTS)
  evaluate = jax.jit(layer(router, L, train=False))
  for row in range(B):
    alone, _ = evaluate(X[row : row + 1], SEGMENTS[row : row + 1])
    np.testing.assert_allclose(alone[0], together[row], rtol=1e-5, atol=1e-6, err_msg=f'row {row} alone')


@pytest.mark.parametrize('router', [TopKRouter, BiasBalancedRouter])
def test_a_sequence_does_not_know_its_batch(router):
  check_evaluation(router)
  with pytest.raises(AssertionError, match='alone'):
    check_evaluation(make(router, eval_capacity_factor=1.0))  # the defect: room for an even load only


# 6. A group size silently becomes another.


def fits(batch, length, size):
  return size > 0 and (length % size == 0 or (size % length == 0 and batch % (size // length) == 0))


def check_group_size(rows_of):
  """The wished size, or an error that names sizes that fit."""
  batch = 8 // sharding.shards('batch')  # of a device
  wishes = {1: (0, 3, 8, 16), 6: (-1, 2, 4, 6, 7, 12, 18, 48), 8: (4, 5, 8, 12, 24, 32, 64, 65)}
  for length, wish in [(n, size) for n, sizes in wishes.items() for size in sizes]:
    try:
      rows = rows_of(8, length, wish, decoding=False)
    except ConfigError as error:
      named = [int(size) for size in re.findall(r'\d+', str(error).split(': ')[1])]
      assert named and all(fits(batch, length, size) for size in named) and not fits(batch, length, wish), error
    else:
      assert fits(batch, length, wish) and wish == (rows * length if rows else wish), f'{wish} became another size'


def test_a_group_size_never_becomes_another(mesh):
  def fall_back(batch, length, wish, decoding):
    """The defect: the next smaller size that does."""
    size = next(s for s in range(max(wish, 1), 0, -1) if fits(batch // sharding.shards('batch'), length, s))
    return size // length or None

  for the_mesh in (mesh(), mesh(data=2, expert=2)):
    with sharding.activate(the_mesh, sharding.replicated_rules()):
      check_group_size(rows_per_group)
      with pytest.raises(AssertionError, match='became another size'):
        check_group_size(fall_back)
  with pytest.raises(ConfigError, match=r'GROUP_SIZE=5 .*: 4 and 8 would'):
    jax.eval_shape(layer(TopKRouter, 5, train=False), X, SEGMENTS)


# 7. The balance loss is pooled over layers.


def check_layers(balance):
  """Of two experts the first layer uses one, and the second the other. Each is as bad as can be: 2, and not 1."""
  first = np.broadcast_to(np.array([3, -3], np.float32), (M, 2))
  found = balance(np.stack([first, -first]), np.abs(X) + 0.1)
  np.testing.assert_allclose(found, 2, rtol=1e-3, err_msg='collapsed layers')


def test_layers_do_not_balance_each_other():
  def ours(kernels, x):
    router = make(TopKRouter, num_selected=1, gates='raw', balance_loss_weight=1.0)
    experts_of_nothing = make(Experts, hidden_dim=4), lambda bank, tokens, plan: (jnp.zeros_like(tokens), Journey(0))
    stack = Stack({'moe': make(MoELayer, 2, L, router, *experts_of_nothing)}, repeats=2, remat='none')
    context = Context(jnp.ones((B, L)), jnp.ones((B, L)), jnp.float32(B * L), train=True)
    params, _ = filled(jax.eval_shape(stack.init, KEY, x, context))
    params['blocks']['moe']['router']['kernel'] = kernels
    params['blocks']['moe_norm']['scale'] = np.ones((2, M), np.float32)
    _, aux = jax.jit(stack.apply)({'params': params}, x, context)
    assert total_loss(aux) == pytest.approx(4, rel=1e-3), 'what is trained on'
    return aux.losses['moe/balance']

  def pooled(kernels, x):
    """The defect: one mean over the tokens of both layers."""
    logits = jnp.einsum('blm,nme->nble', x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True)), kernels)
    probs = jax.nn.softmax(logits).reshape(1, -1, 2)
    valid = jnp.ones(probs.shape[:2], bool)
    return router_losses.load_balance_loss(probs, jnp.argmax(probs, axis=-1)[..., None], valid, valid.sum())

  check_layers(ours)
  with pytest.raises(AssertionError, match='collapsed layers'):
    check_layers(pooled)
