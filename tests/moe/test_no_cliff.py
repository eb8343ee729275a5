"""The expert layer as the TPU compiler sees it, on every kind of mesh: nothing is gathered that need not be.

What a chip computes, holds and sends, of one layer forward and backward, read from the compiled text.
"""

import dataclasses
import functools
import math

import pytest

from moe_jax import sharding
from moe_jax.analysis.chips import CHIPS
from moe_jax.analysis.compiled import collectives, cycles, operations
from moe_jax.moe.dispatchers.all_to_all import all_to_all
from moe_jax.moe.dispatchers.einsum import einsum
from moe_jax.moe.dispatchers.gather import gather
from moe_jax.moe.dispatchers.ragged import ragged
from tests.benchmarks.expert_layer import Shape, bare_program, layer_program

SHAPE = Shape(experts=64, choices=2, width=2048, hidden=8192, batch=256, length=1024, group=1024)
MESHES = [(256, 1, 1), (64, 4, 1), (16, 16, 1), (4, 64, 1), (16, 8, 2), (8, 8, 4)]
LIMITS = {(16, 16, 1): 1.08, (4, 64, 1): 1.10}  # of the compute of the bare matmuls


@pytest.fixture
def compiled(tpu):
  """(dispatcher or None for the bare matmuls, mesh shape) -> operations, and bytes of temporaries."""

  @functools.cache
  def compile(dispatcher, shape):
    mesh = tpu('v5e:16x16', *shape)
    with sharding.activate(mesh, sharding.replicated_rules()):
      program = layer_program(SHAPE, dispatcher) if dispatcher else bare_program(SHAPE)
      executable = program.compile(CHIPS['TPU v5 lite'].options)
    return operations(executable.as_text()), executable.memory_analysis().temp_size_in_bytes

  return compile


def check_traffic(dispatcher, ops, shape):
  """Four all-to-alls of the least size, one of a number a row, sums of gradients, what `model` needs, nothing else."""
  data, expert, model = shape
  groups = SHAPE.batch * SHAPE.length // SHAPE.group // (data * expert)
  split = model if model > 1 and expert > 2 else 1  # then each chip carries a part of every row
  buffers = groups * SHAPE.experts * SHAPE.capacity * SHAPE.width * 2 // split
  weight = SHAPE.experts // expert * SHAPE.width * SHAPE.hidden // model
  found = [(op.kind, op.ways, [math.prod(s) for _, s in op.arrays], op.bytes) for op in collectives(ops)]
  exchanges = sorted(bytes for kind, _, _, bytes in found if kind == 'all-to-all')
  numbers = [buffers * split // SHAPE.width] * (dispatcher is not einsum)  # to weigh gradients by
  assert exchanges == ([*numbers, *[buffers] * 4] if expert > 1 else []), found
  for kind, ways, sizes, _ in found:
    if kind == 'all-to-all':
      assert ways == expert, found
    elif kind == 'all-reduce' and set(sizes) <= {weight, SHAPE.width * SHAPE.experts}:
      assert ways in (data, 256 // model), found  # the gradients of experts and router
    else:
      assert model > 1 and ways == model, found


@pytest.mark.parametrize('shape', MESHES, ids=lambda s: 'x'.join(map(str, s)))
def test_all_to_all(shape, compiled):
  ops, temporaries = compiled(all_to_all, shape)
  bare, bare_temporaries = compiled(None, shape)
  compute, bare_compute = (cycles(x, matmul=True) + cycles(x, matmul=False) for x in (ops, bare))
  print(
    shape,
    compute / bare_compute,
    temporaries / 2**20,
    bare_temporaries / 2**20,
    [(o.kind, o.ways, o.wire_bytes / 2**20, o.arrays) for o in collectives(ops)],
  )
  check_traffic(all_to_all, ops, shape)
  # What a layer has to hold besides: rows in four buffers (out, there, answered, home), and those of all choices.
  tokens = SHAPE.batch * SHAPE.length // (shape[0] * shape[1])
  rows = tokens * SHAPE.choices + 4 * tokens // SHAPE.group * SHAPE.experts * SHAPE.capacity
  assert temporaries <= 1.25 * (bare_temporaries + rows * SHAPE.width * 2)
  assert compute <= LIMITS.get(shape, math.inf) * bare_compute


@pytest.mark.parametrize('dispatcher', [gather, einsum])
@pytest.mark.parametrize('shape', [(16, 16, 1), (4, 64, 1)], ids=lambda s: 'x'.join(map(str, s)))
def test_left_to_the_compiler(dispatcher, shape, compiled):
  check_traffic(dispatcher, compiled(dispatcher, shape)[0], shape)


@pytest.mark.parametrize(('dtype', 'name'), [('bfloat16', 'bf16'), ('float32', 'f32')])
def test_a_chip_sums_no_more_of_a_gradient_than_it_keeps(dtype, name, tpu):
  """Where weights are split for memory (FSDP), gradients are scattered as they are summed, in the weights' type."""
  data, expert = 16, 16
  with sharding.activate(tpu('v5e:16x16', data, expert), sharding.fsdp_rules()):
    program = layer_program(dataclasses.replace(SHAPE, dtype=dtype), all_to_all)
    ops = collectives(operations(program.compile().as_text()))
  found = [(op.kind, op.ways, [(d, math.prod(s)) for d, s in op.arrays]) for op in ops]
  part = SHAPE.experts // expert * SHAPE.width * SHAPE.hidden // data
  assert [x for x in found if x[0] == 'reduce-scatter'] == [('reduce-scatter', data, [(name, part)])] * 2, found
  summed_whole = {size for kind, _, arrays in found if kind == 'all-reduce' for _, size in arrays}
  assert summed_whole == {SHAPE.width * SHAPE.experts}, found  # the router's


@pytest.mark.parametrize(('topology', 'kind'), [('v5e:4x4', 'all-to-all'), ('v5p:2x2x4', 'ragged-all-to-all')])
def test_filled_rows_alone_travel_where_the_chip_can(topology, kind, tpu):
  shape = Shape(experts=16, choices=2, width=512, hidden=256, batch=16, length=256, group=256)
  with sharding.activate(tpu(topology, 4, 4), sharding.replicated_rules()):
    ops = collectives(operations(layer_program(shape, ragged).compile().as_text()))
  room = 4 * 2 * 256  # rows of the worst case: every choice of a device, to each of four
  moved = [op.kind for op in ops if any(math.prod(s) == room * shape.width for _, s in op.arrays)]
  assert moved == [kind] * 4, ops  # out and home, forward and backward
