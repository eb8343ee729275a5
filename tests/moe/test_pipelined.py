"""Expert parallelism in pieces: the same numbers as in one, and transfers beside matmuls."""

import functools
import re

import jax
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.moe.dispatchers.all_to_all import all_to_all
from moe_jax.moe.dispatchers.pipelined import pipelined
from moe_jax.moe.routing_plan import SoftRoutingPlan
from moe_jax.types import ConfigError
from tests.benchmarks.expert_layer import Shape, layer_program

SHAPE = Shape(16, 2, 16, 32, batch=8, length=32, group=16, activations=('silu', 'linear'), dtype='float32')


def gradients(dispatcher):
  """To weights and tokens, some of which are dropped."""
  program = layer_program(SHAPE, dispatcher)
  keys = iter(jax.random.split(jax.random.key(0), 9))
  draw = lambda s: jax.device_put(0.2 * jax.random.normal(next(keys), s.shape, s.dtype), s.sharding)  # noqa: E731
  return jax.tree.map(np.asarray, program.compile()(*jax.tree.map(draw, program.arguments)))


@pytest.mark.parametrize('shape', [(2, 4, 1), (1, 8, 1), (1, 4, 2)], ids=str)
def test_pieces_change_nothing(shape, mesh):
  with sharding.activate(mesh(*shape), sharding.replicated_rules()):
    expected = gradients(all_to_all)
    for pieces in (1, 2, 4):
      actual = gradients(functools.partial(pipelined, pieces=pieces))
      jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), actual, expected)


def test_pieces_that_do_not_divide_are_said(mesh, monkeypatch):
  said = []
  monkeypatch.setattr('moe_jax.moe.dispatchers.pipelined.notice', said.append)
  with sharding.activate(mesh(2, 4, 1), sharding.replicated_rules()):
    program = layer_program(SHAPE, functools.partial(pipelined, pieces=6))
    jax.eval_shape(program.function, *program.arguments)
  assert said == ['pipelined: 4 experts a device are taken in 2 pieces, not 6']


def test_mixtures_of_tokens_are_not_taken():
  plan = SoftRoutingPlan(dispatch=np.ones((1, 4, 2, 2)), combine=np.ones((1, 4, 2, 2)))
  with pytest.raises(ConfigError, match='einsum, gather or all_to_all'):
    pipelined(None, np.ones((1, 4, 8)), plan)


def test_tpus_compute_while_rows_travel(tpu):
  shape = Shape(32, 2, 512, 1024, batch=64, length=256, group=256)
  with sharding.activate(tpu('v5e:4x4', 4, 4), sharding.replicated_rules()):
    text = layer_program(shape, functools.partial(pipelined, pieces=4)).compile().as_text()
  assert 'all-to-all(' not in text
  flying, beside = 0, 0
  for line in text[text.index('\nENTRY') :].splitlines():
    flying += len(re.findall(r' collective-permute-start\(', line)) - len(
      re.findall(r' collective-permute-done\(', line)
    )
    beside += bool(flying and 'dot_general' in line and ' fusion(' in line)
  assert beside >= 8, 'of the 6 matmuls on each of 4 pieces'
