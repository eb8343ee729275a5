"""Counts by hand."""

import jax
import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.analysis.forward_pass import trace_forward
from moe_jax.analysis.parameters import bytes_per_device, count_parameters
from moe_jax.moe.routers.top_k import TopKRouter
from tests import tiny


def spec():
  return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tiny.batch().items()}


def test_total_and_active_by_hand():
  width, hidden, layers, experts = 32, 32, 4, 8
  attention = 4 * width * width
  dense, expert = 3 * width * 64, 3 * width * hidden
  norms = width * (2 * layers + 1)
  shared = tiny.VOCAB * width + layers * attention + layers // 2 * (dense + width * experts) + norms
  for k in (1, 2, 5):
    router = tiny.make(TopKRouter, num_selected=k, gates='raw')
    count = count_parameters(trace_forward(tiny.decoder_only(router=router), spec()))
    assert count.total == shared + layers // 2 * experts * expert
    assert count.active == shared + layers // 2 * k * expert


def test_a_dense_model_is_active_throughout():
  count = count_parameters(trace_forward(tiny.decoder_only(expert_every=0), spec()))
  assert count.total == count.active


def test_bytes_are_those_of_the_shards(mesh):
  the_mesh = mesh(data=2, expert=2, model=2)
  with sharding.activate(the_mesh, sharding.replicated_rules()):
    split = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=sharding.named_sharding(the_mesh, 'expert', 'mlp'))
    whole = jax.ShapeDtypeStruct((5,), jnp.bfloat16, sharding=sharding.named_sharding(the_mesh, None))
  assert bytes_per_device({'split': split, 'whole': whole}) == 8 * 6 * 4 // 4 + 5 * 2
