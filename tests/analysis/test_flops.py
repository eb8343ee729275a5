"""FLOPs of programs whose FLOPs are known."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import sharding
from moe_jax.analysis.flops import count_flops, model_flops
from moe_jax.objectives import LanguageModeling
from moe_jax.training.step import gradients
from tests import tiny

M, K, N = 16, 32, 64
A, B = jax.ShapeDtypeStruct((M, K), jnp.float32), jax.ShapeDtypeStruct((K, N), jnp.float32)
ONE = 2 * M * K * N


def test_a_matmul_and_a_batch_of_them():
  assert count_flops(jnp.matmul, A, B) == ONE
  batch = jax.ShapeDtypeStruct((5, M, K), jnp.float32)
  assert count_flops(lambda a, b: jnp.einsum('bmk,kn->bmn', a, b), batch, B) == 5 * ONE


def test_a_gradient_takes_two_more():
  assert count_flops(jax.grad(lambda a, b: jnp.sum(jnp.tanh(a @ b)), argnums=(0, 1)), A, B) == 3 * ONE


def test_what_is_recomputed_counts_again():
  f = jax.checkpoint(lambda a, b: jnp.sum(jnp.tanh(a @ b) @ b.T))
  # two forward, four backward, and one again: the second's result is not needed
  assert count_flops(jax.grad(f, argnums=(0, 1)), A, B) == 7 * ONE


def test_a_scan_of_8_and_a_choice():
  square = jax.ShapeDtypeStruct((K, K), jnp.float32)
  assert (
    count_flops(lambda a, b: jax.lax.scan(lambda x, _: (x @ b, None), a, length=8)[0], A, square) == 8 * 2 * M * K * K
  )
  assert count_flops(lambda p, a, b: jax.lax.cond(p, lambda: a @ b, lambda: a @ b + a @ b), True, A, B) == 2 * ONE


def test_what_each_device_does_counts_for_every_device(mesh):
  split = jax.shard_map(jnp.matmul, mesh=mesh(data=4), in_specs=(P('data'), P()), out_specs=P('data'))
  assert count_flops(split, A, B) == ONE


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_a_training_step_takes_what_its_model_needs_and_little_more(mesh, remat):
  """Everything but attention's own products and dispatch is in 6 x active parameters x tokens."""
  objective = LanguageModeling(tiny.decoder_only(remat=remat))
  batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tiny.batch().items()}
  with sharding.activate(mesh(), sharding.replicated_rules()):
    init = lambda key, batch: nn.unbox(objective.model.init(key, batch))['params']  # noqa: E731
    params = jax.eval_shape(init, jax.random.key(0), batch)
    needed = model_flops(objective.model, batch)
    taken = count_flops(lambda p, b: gradients(p, {}, b, jax.random.key(0), objective=objective)[0], params, batch)
  assert 1 < taken / needed < 2.5
  if remat == 'full':
    assert taken / needed > 4 / 3
