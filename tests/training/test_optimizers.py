"""Optimizers against their papers' equations, each matrix by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.training import optimizers
from moe_jax.training.state import Names
from moe_jax.types import ConfigError

AXES = {
  'experts': Names(('layers', 'expert', 'embed', 'expert_mlp')),
  'dense': Names(('embed', 'mlp')),
  'scale': Names(('layers', 'embed')),
}
SHAPES = {'experts': (2, 3, 128, 160), 'dense': (128, 160), 'scale': (2, 128)}


def trees(getkey):
  draw = lambda: {name: jax.random.normal(getkey(), shape) for name, shape in SHAPES.items()}  # noqa: E731
  return draw(), draw(), draw()


def adafactor_by_hand(param, gradients, rate):
  """Two steps of Shazeer and Stern 2018, algorithm 4 to 8, on one matrix or vector, in float64."""
  param, row, col, full = np.float64(param), 0.0, 0.0, 0.0
  for t, gradient in enumerate(np.float64(gradients), start=1):
    decay = 1 - t**-0.8
    square = gradient**2 + 1e-30
    if param.ndim == 2 and min(param.shape) >= 128:
      row = decay * row + (1 - decay) * square.mean(1)
      col = decay * col + (1 - decay) * square.mean(0)
      second = np.outer(row, col) / row.mean()
    else:
      full = decay * full + (1 - decay) * square
      second = full
    update = gradient / np.sqrt(second)
    update /= max(1.0, np.sqrt((update**2).mean()))
    param = param - rate * max(1e-3, np.sqrt((param**2).mean())) * update
  return param


def run(optimizer, params, *gradients):
  @jax.jit
  def step(params, state, gradient):
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  state = jax.jit(optimizer.init)(params)
  for gradient in gradients:
    params, state = step(params, state, gradient)
  return params, state


def test_adafactor_treats_every_expert_by_itself(getkey):
  params, first, second = trees(getkey)
  first['experts'] *= jnp.arange(1.0, 4)[None, :, None, None]  # experts of very different gradients
  actual, state = run(optimizers.adafactor(AXES, lambda _: 0.1), params, first, second)
  for layer in range(2):
    for expert in range(3):
      at = (layer, expert)
      expected = adafactor_by_hand(params['experts'][at], [first['experts'][at], second['experts'][at]], 0.1)
      np.testing.assert_allclose(actual['experts'][at], expected, rtol=2e-5, atol=2e-5)
    expected = adafactor_by_hand(params['scale'][layer], [first['scale'][layer], second['scale'][layer]], 0.1)
    np.testing.assert_allclose(actual['scale'][layer], expected, rtol=2e-5, atol=2e-5)
  expected = adafactor_by_hand(params['dense'], [first['dense'], second['dense']], 0.1)
  np.testing.assert_allclose(actual['dense'], expected, rtol=2e-5, atol=2e-5)
  sizes = [leaf.size for leaf in jax.tree.leaves(state)]
  assert sum(sizes) < 0.05 * sum(leaf.size for leaf in jax.tree.leaves(params)), 'second moments are factored'


def test_each_matrix_equals_the_plain_transform_without_stacked_axes(getkey):
  params, gradient, _ = trees(getkey)
  flat = {'dense': params['dense']}, {'dense': gradient['dense']}
  ours = optimizers.each_matrix(optax.scale_by_factored_rms(), {'dense': AXES['dense']})
  updates, _ = ours.update(flat[1], ours.init(flat[0]), flat[0])
  plain = optax.scale_by_factored_rms()
  expected, _ = plain.update(flat[1], plain.init(flat[0]), flat[0])
  np.testing.assert_array_equal(updates['dense'], expected['dense'])


def test_adamw_decays_matrices_alone():
  params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
  zeros = jax.tree.map(jnp.zeros_like, params)
  after, _ = run(optimizers.adamw(AXES, lambda _: 0.1, weight_decay=0.5), params, zeros)
  assert np.allclose(after['experts'], 0.95) and np.allclose(after['dense'], 0.95)
  assert np.all(after['scale'] == 1.0)


def test_gradients_are_clipped_by_their_global_norm(getkey):
  params, gradient, _ = trees(getkey)
  clipped, _ = run(optimizers.adamw(AXES, lambda _: 0.1, clip_norm=1.0, weight_decay=0.0), params, gradient)
  same, _ = run(
    optimizers.adamw(AXES, lambda _: 0.1, clip_norm=None, weight_decay=0.0),
    params,
    jax.tree.map(lambda g: g / optax.global_norm(gradient), gradient),
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), clipped, same)


@pytest.mark.parametrize('step, rate', [(0, 0.01), (10_000, 0.01), (40_000, 0.005), (1_000_000, 0.001)])
def test_inverse_sqrt_is_t5s(step, rate):
  assert float(optimizers.inverse_sqrt()(step)) == pytest.approx(rate, rel=1e-5)


def test_inverse_sqrt_warms_up_linearly_on_request():
  schedule = optimizers.inverse_sqrt(peak=1.0, warmup_steps=10, linear_warmup=True)
  assert [float(schedule(step)) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])


def test_cosine_begins_peaks_and_ends_where_it_should():
  schedule = optimizers.cosine(2.0, total_steps=100, warmup_steps=10)
  assert [float(schedule(step)) for step in (0, 5, 10, 55, 100)] == pytest.approx([0.0, 1.0, 2.0, 1.1, 0.2], abs=1e-6)


def test_adafactor_of_some_alone(getkey):
  params, first, second = trees(getkey)
  some = optimizers.with_policies(AXES, lambda axes: optimizers.adafactor(axes, lambda _: 0.1), ['experts'])
  after, state = run(some, params, first, second)
  expected, whole = run(optimizers.adafactor(AXES, lambda _: 0.1), params, first, second)
  np.testing.assert_array_equal(after['experts'], expected['experts'])
  np.testing.assert_array_equal(after['dense'], params['dense'])
  size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
  assert size(state) < size(whole)


def test_what_is_frozen_stays_and_has_no_state(getkey):
  params, gradient, _ = trees(getkey)
  policies = {'axes': AXES, 'optimizer': lambda axes: optimizers.adamw(axes, lambda _: 0.1)}
  after, state = run(optimizers.with_policies(**policies, trainable=['^dense$', 'sca']), params, gradient)
  np.testing.assert_array_equal(after['experts'], params['experts'])
  assert np.all(after['dense'] != params['dense']) and np.all(after['scale'] != params['scale'])
  moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
  assert moments == 2 * (params['dense'].size + params['scale'].size)
  # The others are updated, clipped and decayed as if they were all there is.
  alone = {name: AXES[name] for name in ('dense', 'scale')}
  without = lambda tree: {name: tree[name] for name in alone}  # noqa: E731
  expected, _ = run(optimizers.adamw(alone, lambda _: 0.1), without(params), without(gradient))
  jax.tree.map(np.testing.assert_array_equal, without(after), expected)


def test_a_pattern_that_fits_nothing_is_named():
  with pytest.raises(ConfigError, match=r"no parameter has 'exprts' in its path; one is experts\."):
    optimizers.trainable_mask(AXES, ['exprts'])
  with pytest.raises(ConfigError, match='no regular expression'):
    optimizers.trainable_mask(AXES, ['('])


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf, 20.0])
def test_a_bad_batch_changes_nothing(getkey, bad):
  params, first, second = trees(getkey)
  wrong = {**first, 'dense': first['dense'] * bad}  # its norm is a third of all at first
  make = lambda above: optimizers.skip_bad_batches(optimizers.adamw(AXES, lambda _: 0.1), above)  # noqa: E731
  expected, plain = run(make(5.0), params, first, second)
  after, state = run(make(5.0), params, first, wrong, second)
  jax.tree.map(np.testing.assert_array_equal, after, expected)
  jax.tree.map(np.testing.assert_array_equal, state.inner, plain.inner)
  assert int(state.skipped) == 1 and bool(state.accepted) and int(plain.skipped) == 0
  if jnp.isfinite(bad):
    _, state = run(make(jnp.inf), params, first, wrong)
    assert int(state.skipped) == 0


def test_skipping_needs_a_multiple():
  with pytest.raises(ConfigError, match='SKIP_ABOVE=1'):
    optimizers.skip_bad_batches(optax.identity(), 1.0)
