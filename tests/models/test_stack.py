"""Stacks: patterns of layers, scanned or not, and what they report."""

import functools
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.context import Context
from moe_jax.models.stack import Stack, interleaved_stack, run_stacks
from moe_jax.types import Aux, ConfigError

B, L, M = 2, 4, 6
X = np.random.default_rng(0).normal(size=(B, L, M)).astype(np.float32)


class Tanh(nn.Module):
  """The smallest sublayer with weights, losses and metrics."""

  @nn.compact
  def __call__(self, x, context):
    y = jnp.tanh(x @ self.param('w', nn.initializers.normal(1.0), (M, M)))
    return y, Aux(losses={'size': jnp.mean(y**2)}, metrics={'widths': jnp.mean(y, axis=(0, 1))})


class Nothing(nn.Module):
  """What a sparse layer gives tokens that no expert had room for."""

  @nn.compact
  def __call__(self, x, context):
    return jnp.zeros_like(x), Aux()


class Dice(nn.Module):
  """Reports what it draws."""

  @nn.compact
  def __call__(self, x, context):
    draws = {name: jax.random.uniform(self.make_rng(name)) for name in ('dropout', 'router')}
    return jnp.zeros_like(x), Aux(metrics=draws)


def context(train=False):
  ones = jnp.ones((B, L), jnp.int32)
  return Context(ones, ones, jnp.float32(B * L), train=train)


@functools.cache
def params():
  """Of three scanned repeats of two sublayers; the norms' scales are no longer 1."""
  variables = Stack({'a': Tanh, 'b': Tanh}, repeats=3).init(jax.random.key(0), X, context())
  return jax.tree.map(lambda w: w + 0.1 * jnp.cos(jnp.arange(w.size)).reshape(w.shape), nn.unbox(variables)['params'])


def by_hand(x, weights):
  losses = []
  for i in range(3):
    for name in 'ab':
      scale, w = weights['blocks'][f'{name}_norm']['scale'][i], weights['blocks'][name]['w'][i]
      y = np.tanh(x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale @ w)
      losses.append(np.mean(y**2))
      x = x + y
  return x, np.reshape(losses, (3, 2))


def test_equation():
  """x + sublayer(norm(x)), again and again; every report has a row for each repeat."""
  x, aux = jax.jit(Stack({'a': Tanh, 'b': Tanh}, repeats=3).apply)({'params': params()}, X, context())
  expected, losses = by_hand(X, jax.device_get(params()))
  np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)
  assert aux.losses.keys() == {'a/size', 'b/size'} and aux.metrics.keys() == {'a/widths', 'b/widths'}
  np.testing.assert_allclose(np.stack([aux.losses['a/size'], aux.losses['b/size']], -1), losses, rtol=1e-4)
  assert aux.metrics['a/widths'].shape == (3, M)


def unrolled(weights):
  return {f'blocks_{i}': jax.tree.map(lambda w, i=i: w[i], weights['blocks']) for i in range(3)}


def test_unrolled_equals_scanned():
  stack = functools.partial(Stack, {'a': Tanh, 'b': Tanh}, repeats=3)
  x, aux = jax.jit(stack().apply)({'params': params()}, X, context())
  other, other_aux = jax.jit(stack(scan=False).apply)({'params': unrolled(params())}, X, context())
  np.testing.assert_allclose(other, x, rtol=1e-6)
  assert jax.tree.structure(aux) == jax.tree.structure(other_aux)
  for mine, its in zip(jax.tree.leaves(aux), jax.tree.leaves(other_aux), strict=True):
    assert mine.shape == its.shape and mine.shape[0] == 3
    np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-7)


def test_what_is_recomputed_changes_no_gradient():
  def gradients(remat, scan):
    stack = Stack({'a': Tanh, 'b': Tanh}, repeats=3, remat=remat, scan=scan)

    def loss(weights):
      x, aux = stack.apply({'params': weights if scan else unrolled(weights)}, X, context())
      return jnp.sum(x**2) + jnp.sum(aux.losses['a/size'])

    return jax.jit(jax.grad(loss))(params())

  expected = gradients('none', scan=True)
  for remat, scan in [('dots', True), ('full', True), ('full', False)]:
    for mine, its in zip(jax.tree.leaves(gradients(remat, scan)), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('scan', [True, False])
def test_every_sublayer_and_repeat_has_weights_of_its_own(scan):
  init = jax.jit(Stack({'a': Tanh, 'b': Tanh}, repeats=3, scan=scan).init)
  weights = nn.unbox(init(jax.random.key(0), X, context()))['params']
  blocks = unrolled(weights).values() if scan else weights.values()
  matrices = {np.asarray(block[name]['w']).tobytes() for block in blocks for name in 'ab'}
  assert len(matrices) == 6


def test_weights_of_a_scan_have_a_layers_axis():
  shapes = jax.eval_shape(Stack({'a': Tanh}, repeats=3).init, jax.random.key(0), X, context())
  scale = shapes['params']['blocks']['a_norm']['scale']
  assert scale.names == ('layers', 'embed') and scale.value.shape == (3, M)


@pytest.mark.parametrize('scan', [True, False])
def test_what_is_dropped_passes_unchanged(scan):
  stack = Stack({'nothing': Nothing}, repeats=2, scan=scan)
  x, aux = stack.apply(stack.init(jax.random.key(0), X, context()), X, context())
  np.testing.assert_array_equal(x, X)
  assert aux == Aux()


@pytest.mark.parametrize('scan', [True, False])
def test_every_repeat_draws_its_own_noise(scan):
  stack = Stack({'one': Dice, 'two': Dice}, repeats=3, scan=scan)
  variables = stack.init(jax.random.key(0), X, context())
  rngs = {'dropout': jax.random.key(1), 'router': jax.random.key(2)}
  _, aux = stack.apply(variables, X, context(), rngs=rngs)
  assert len({float(draw) for draws in aux.metrics.values() for draw in draws}) == 12


def test_stacks_report_under_their_names():
  class Two(nn.Module):
    @nn.compact
    def __call__(self, x, context):
      return run_stacks([Stack({'a': Tanh}, repeats=n, name=f'of_{n}') for n in (1, 2)], x, context)

  two = Two()
  x, aux = two.apply(two.init(jax.random.key(0), X, context()), X, context())
  assert x.shape == X.shape
  assert {name: loss.shape for name, loss in aux.losses.items()} == {'of_1/a/size': (1,), 'of_2/a/size': (2,)}


def interleaved(**layers):
  mixers, plain = {'attention': 'A', 'cross': 'X'}, types.SimpleNamespace
  return interleaved_stack(mixers, mlp='D', moe='S', stack=plain, name='s', **layers)


@pytest.mark.parametrize(('expert_every', 'order'), [(0, 'AXD'), (1, 'AXSE'), (2, 'AXDAXSE')])
def test_what_follows_a_sparse_sublayer(expert_every, order):
  """Right behind it, and nowhere where there is none."""
  assert (
    ''.join(interleaved(num_layers=4, expert_every=expert_every, after_moe={'extra': 'E'}).pattern.values()) == order
  )
  with pytest.raises(ConfigError, match="'attention', and there is one already"):
    interleaved(num_layers=4, expert_every=1, after_moe={'attention': 'E'})


@pytest.mark.parametrize(
  ('num_layers', 'expert_every', 'expert_first', 'feed_forwards', 'repeats'),
  [
    (4, 0, False, 'D', 4),
    (4, 1, False, 'S', 4),
    (4, 2, False, 'DS', 2),
    (4, 2, True, 'SD', 2),
    (4, 4, False, 'DDDS', 1),
    (8, 4, True, 'SDDD', 2),
  ],
)
def test_interleaved(num_layers, expert_every, expert_first, feed_forwards, repeats):
  stack = interleaved(num_layers=num_layers, expert_every=expert_every, expert_first=expert_first)
  assert (stack.repeats, stack.name) == (repeats, 's')
  assert ''.join(stack.pattern.values()) == ''.join(f'AX{kind}' for kind in feed_forwards)


def test_names_of_interleaved_layers():
  """One sparse layer a pattern, always called 'moe'; where layers differ they are counted."""
  assert list(interleaved(num_layers=2, expert_every=0).pattern) == ['attention', 'cross', 'mlp']
  assert list(interleaved(num_layers=2, expert_every=1).pattern) == ['attention', 'cross', 'moe']
  names = ['attention_0', 'cross_0', 'mlp_0', 'attention_1', 'cross_1', 'moe']
  assert list(interleaved(num_layers=4, expert_every=2).pattern) == names


@pytest.mark.parametrize(('num_layers', 'expert_every'), [(4, 3), (6, 4), (4, 8), (4, -1)])
def test_layers_that_do_not_divide_are_refused(num_layers, expert_every):
  fits = [k for k in range(1, num_layers + 1) if num_layers % k == 0]
  message = f'EXPERT_EVERY={expert_every} does not divide NUM_LAYERS={num_layers}.*{re.escape(str(fits))}'
  with pytest.raises(ConfigError, match=message):
    interleaved(num_layers=num_layers, expert_every=expert_every)


def test_the_pattern_keeps_its_order():
  """Not that of the alphabet."""
  pattern = {'z': Tanh, 'a': Tanh, 'm': Tanh}
  for scan in (True, False):
    stack = Stack(pattern, repeats=1, scan=scan)
    seen = []

    def watch(call, args, kwargs, about, seen=seen):
      if isinstance(about.module, Tanh):
        seen.append(about.module.name)
      return call(*args, **kwargs)

    with nn.intercept_methods(watch):
      jax.eval_shape(stack.init, jax.random.key(0), X, context())
    assert seen[:3] == ['z', 'a', 'm']
