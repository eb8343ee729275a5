"""FLOPs of programs whose FLOPs are known."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import sharding
from moe_jax.analysis.flops import count_flops, forward_flops, model_flops
from moe_jax.analysis.forward_pass import Exchange, trace_forward
from moe_jax.analysis.parameters import dispatch_bytes, exchanged_bytes_per_token
from moe_jax.moe.dispatchers.all_to_all import all_to_all
from moe_jax.moe.dispatchers.einsum import einsum
from moe_jax.moe.dispatchers.gather import gather
from moe_jax.moe.dispatchers.ragged import ragged
from moe_jax.objectives import LanguageModeling
from moe_jax.training.step import gradients
from tests import tiny

M, K, N = 16, 32, 64
A, B = jax.ShapeDtypeStruct((M, K), jnp.float32), jax.ShapeDtypeStruct((K, N), jnp.float32)
ONE = 2 * M * K * N


def flops_of(function, *args):
  return count_flops(jax.jit(function).trace(*args))


def test_a_matmul_and_a_batch_of_them():
  assert flops_of(jnp.matmul, A, B) == ONE
  batch = jax.ShapeDtypeStruct((5, M, K), jnp.float32)
  assert flops_of(lambda a, b: jnp.einsum('bmk,kn->bmn', a, b), batch, B) == 5 * ONE


def test_a_gradient_takes_two_more():
  assert flops_of(jax.grad(lambda a, b: jnp.sum(jnp.tanh(a @ b)), argnums=(0, 1)), A, B) == 3 * ONE


def test_what_is_recomputed_counts_again():
  f = jax.checkpoint(lambda a, b: jnp.sum(jnp.tanh(a @ b) @ b.T))
  # two forward, four backward, and one again: the second's result is not needed
  assert flops_of(jax.grad(f, argnums=(0, 1)), A, B) == 7 * ONE


def test_a_scan_of_8_and_a_choice():
  square = jax.ShapeDtypeStruct((K, K), jnp.float32)
  assert flops_of(lambda a, b: jax.lax.scan(lambda x, _: (x @ b, None), a, length=8)[0], A, square) == 8 * 2 * M * K * K
  assert flops_of(lambda p, a, b: jax.lax.cond(p, lambda: a @ b, lambda: a @ b + a @ b), True, A, B) == 2 * ONE


def test_what_each_device_does_counts_for_every_device(mesh):
  split = jax.shard_map(jnp.matmul, mesh=mesh(data=4), in_specs=(P('data'), P()), out_specs=P('data'))
  assert flops_of(split, A, B) == ONE


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_a_training_step_takes_what_its_model_needs_and_little_more(mesh, remat):
  """Everything but attention's own products and dispatch is in 6 x active parameters x tokens."""
  objective = LanguageModeling(tiny.decoder_only(remat=remat))
  batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tiny.batch().items()}
  with sharding.activate(mesh(), sharding.replicated_rules()):
    init = lambda key, batch: nn.unbox(objective.model.init(key, batch))['params']  # noqa: E731
    params = jax.eval_shape(init, jax.random.key(0), batch)
    needed = model_flops(trace_forward(objective.model, batch))
    taken = flops_of(lambda p, b: gradients(p, {}, b, jax.random.key(0), objective=objective)[0], params, batch)
  assert 1 < taken / needed < 2.5
  if remat == 'full':
    assert taken / needed > 4 / 3


def shapes(batch):
  return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}


PARTS = {  # of tiny.decoder_only, a token: 4 layers, width 32, 4 heads of 8, sequences of 32, 64 words
  'attention': 4 * (2 * 4 * 32 * 32 + 2 * 2 * 32 * 32),  # four projections; scores, and their sums of values
  'dense': 2 * 3 * 2 * 32 * 64,
  'logits': 2 * 32 * 64,
}


@pytest.mark.parametrize('scan', [True, False])
@pytest.mark.parametrize('dispatcher', [einsum, gather, all_to_all, ragged])
def test_the_parts_of_a_forward_pass(mesh, dispatcher, scan):
  """Of 2 layers that are sparse: 8 experts of 32 hidden units, 2 of them chosen."""
  model, batch = tiny.decoder_only(dispatcher, scan=scan), shapes(tiny.batch())
  with sharding.activate(mesh(data=2, expert=4), sharding.replicated_rules()):
    found = forward_flops(trace_forward(model, batch))
  length = batch['decoder_input_tokens'].shape[1]
  attention = 4 * (2 * 4 * 32 * 32 + 2 * 2 * 32 * length)
  exact = PARTS | {'attention': attention}
  assert {part: found.by_part[part] for part in exact} == exact
  assert found.by_part['router'] >= 2 * 2 * 32 * 8  # the logits, and counts for the losses
  assert (found.by_part.get('dispatch', 0) > 0) == (dispatcher is einsum)
  chosen = 2 * 2 * (3 * 2 * 32 * 32)
  assert found.active == sum(exact.values()) + found.by_part['router'] + chosen
  assert found.total == sum(found.by_part.values())
  if dispatcher is not einsum and dispatcher is not ragged:
    assert found.by_part['experts'] == chosen  # at a capacity factor of 1: as many slots as choices
  dense = forward_flops(trace_forward(tiny.decoder_only(expert_every=0), batch))
  assert dense.by_part == exact | {'dense': 2 * PARTS['dense']} and dense.active == dense.total


def test_what_goes_to_other_devices(mesh):
  """2 layers send the rows of the experts of three devices of four, of 32 float32 each, out and home."""
  batch = shapes(tiny.batch())
  for scan in (True, False):
    with sharding.activate(mesh(data=2, expert=4), sharding.replicated_rules()):
      layers = trace_forward(tiny.decoder_only(all_to_all, scan=scan), batch).exchanges
      tokens = batch['decoder_input_tokens'].size // sharding.shards('group')
      sent = exchanged_bytes_per_token(layers, tokens)
    assert sum(layer.repeats for layer in layers) == 2
    rows = tokens // 16 * 8 * 4  # in each group of 16, 4 slots for each of 8 experts
    assert {layer.rows for layer in layers} == {rows}
    assert sent == 2 * 2 * rows * 32 * 4 * 3 / 4 / tokens
  assert dispatch_bytes([Exchange(1, 10, 4), Exchange(9, 8, 4)]) == 2 * 10 * 4
  with sharding.activate(mesh(), sharding.replicated_rules()):
    assert exchanged_bytes_per_token(layers, tokens) == 0
