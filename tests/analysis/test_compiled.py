"""What a compiled program does is read rightly from its text, written by hand here or by a real compiler."""

# ruff: noqa: E501

import functools
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.analysis.compiled import collectives, cycles, operations, uncosted_bytes

TPU = textwrap.dedent("""\
  HloModule jit_f, is_scheduled=true

  %fused_product (a: bf16[8,128], b: bf16[128,64]) -> bf16[8,64] {
    %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
    %b = bf16[128,64]{1,0:T(8,128)(2,1)} parameter(1)
    ROOT %product = bf16[8,64]{1,0:T(8,128)(2,1)} convolution(%a, %b), dim_labels=bf_io->bf
  }

  %begin (x: bf16[4,64]) -> (bf16[64,64], u32[]) {
    %x = bf16[4,64]{1,0} parameter(0)
    %all-gather.1 = bf16[64,64]{1,0} all-gather(%x), channel_id=7, replica_groups=mesh['axis_0'=4,'axis_1'=4], device_ids=([4,4]T(1,0)) {'axis_0','axis_1'}, dimensions={0}
    ROOT %start = (bf16[64,64]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
  }

  %step (x: bf16[4,64], y: bf16[8,128], z: bf16[128,64]) -> (bf16[8,64], bf16[64,64]) {
    %x = bf16[4,64]{1,0} parameter(0)
    %y = bf16[8,128]{1,0} parameter(1)
    %z = bf16[128,64]{1,0} parameter(2)
    %all-gather.2 = bf16[64,64]{1,0} all-gather(%x), channel_id=7, replica_groups=[1,16]<=[16], dimensions={0}
    %inner = bf16[8,64]{1,0} fusion(%y, %z), kind=kOutput, calls=%fused_product
    ROOT %both = (bf16[8,64]{1,0}, bf16[64,64]{1,0}) tuple(%inner, %all-gather.2)
  }

  %body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
    %p = (s32[], f32[8,16]{1,0}) parameter(0)
    %g = f32[8,16]{1,0} get-tuple-element(%p), index=1
    %exchanged = f32[8,16]{1,0:T(8,128)S(1)} all-to-all(%g), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
    %sum = f32[8,16]{1,0} add(%exchanged, %g), backend_config={"window_config":{"estimated_cycles":"100"}}
    ROOT %t = (s32[], f32[8,16]{1,0}) tuple(%g, %sum)
  }

  %all-reduce-scatter.1 (input: bf16[4,64]) -> bf16[4,32] {
    %input = bf16[4,64]{1,0} parameter(0)
    %all-reduce.9 = bf16[4,64]{1,0} all-reduce(%input), channel_id=9, replica_groups={{0,1},{2,3}}, to_apply=%condition
    ROOT %part = bf16[4,32]{1,0} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={4,32}
  }

  %condition (p: (s32[], f32[8,16])) -> pred[] {
    %p = (s32[], f32[8,16]{1,0}) parameter(0)
    ROOT %less = pred[] constant(true)
  }

  ENTRY %main (x: bf16[4,64], y: bf16[8,128]) -> bf16[8,64] {
    %x = bf16[4,64]{1,0} parameter(0)
    %y = bf16[8,128]{1,0} parameter(1)
    %loop = (s32[], f32[8,16]{1,0}) while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
    %begun = (bf16[64,64]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%begin
    %stepped = (bf16[8,64]{1,0}, bf16[64,64]{1,0}) fusion(%x, %y, %y), kind=kOutput, calls=%step, metadata={op_name="jit(f)/dot"}, backend_config={"window_config":{"estimated_cycles":"5000"}}
    %reduced = (f32[16]{0}, bf16[32,2]{1,0}) all-reduce(%y, %x), channel_id=2, replica_groups={{0,4,8,12},{1,5,9,13}}, to_apply=%condition
    %sent-start = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,2},{2,0}}
    %sent = f32[5]{0} collective-permute-done(%sent-start)
    %scattered = f32[10]{0} reduce-scatter(%x), channel_id=4, replica_groups=mesh['data'=2,'expert'=4] {'expert'}, dimensions={0}, to_apply=%condition
    %fused = bf16[4,32]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(f)/dot"}
    %kernel = bf16[100,10]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
      "a": 1,
      "b": 2}}, metadata={op_name="jit(f)/pallas_call"}
    %joined = bf16[1000,1000]{1,0} custom-call(%x, %x), custom_call_target="ConcatBitcast"
    ROOT %sorted = s32[30]{0:T(128)S(1)} sort(%x), dimensions={0}, to_apply=%condition
  }
""")


def test_collectives_are_found_once_wherever_they_hide():
  found = [(op.kind, op.ways, op.times, op.bytes, op.wire_bytes) for op in collectives(operations(TPU))]
  assert found == [
    ('all-to-all', 4, 3, 8 * 16 * 4, 8 * 16 * 4 * 3 / 4),
    ('all-gather', 16, 1, 64 * 64 * 2, 64 * 64 * 2 * 15 / 16),
    ('all-reduce', 4, 1, 16 * 4 + 64 * 2, 2 * (16 * 4 + 64 * 2) * 3 / 4),
    ('collective-permute', 3, 1, 20, 20),
    ('reduce-scatter', 4, 1, 40, 40 * 3),
    ('reduce-scatter', 2, 1, 4 * 32 * 2, 4 * 32 * 2),
  ]


def test_cycles_and_bytes():
  ops = operations(TPU)
  assert cycles(ops, matmul=True) == 5000
  assert cycles(ops, matmul=False) == 3 * 100
  assert uncosted_bytes(ops) == 100 * 10 * 2 + 30 * 4  # the kernel and the sort
  assert [op.source for op in ops if op.kind == 'custom-call'] == ['jit(f)/pallas_call']


def on_eight(body, out):
  """Compiled for 8 devices in a row, each holding float32[8, 16] of float32[64, 16]."""
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  run = jax.shard_map(body, mesh=mesh, in_specs=P('x'), out_specs=out)
  return jax.jit(run).lower(jax.ShapeDtypeStruct((64, 16), jnp.float32)).compile().as_text()


SHARD = 8 * 16 * 4


@pytest.mark.parametrize(
  ('kind', 'body', 'out', 'wire_bytes'),
  [
    ('all-reduce', lambda x: jax.lax.psum(x, 'x'), P(), 2 * SHARD * 7 / 8),
    ('all-gather', lambda x: jax.lax.all_gather(x, 'x'), P('x'), 8 * SHARD * 7 / 8),
    ('reduce-scatter', lambda x: jax.lax.psum_scatter(x, 'x', tiled=True), P('x'), SHARD * 7 / 8),
    ('all-to-all', lambda x: jax.lax.all_to_all(x, 'x', 0, 1, tiled=True), P('x'), SHARD * 7 / 8),
    ('collective-permute', lambda x: jax.lax.ppermute(x, 'x', [(i, (i + 1) % 8) for i in range(8)]), P('x'), SHARD),
  ],
)
def test_real_collectives(kind, body, out, wire_bytes):
  (op,) = collectives(operations(on_eight(body, out)))
  assert (op.kind, op.ways, op.times) == (kind, 8, 1)
  np.testing.assert_allclose(op.wire_bytes, wire_bytes)


def test_real_loops_are_unfolded():
  def body(x):
    turn = functools.partial(jax.lax.ppermute, axis_name='x', perm=[(i, (i + 1) % 8) for i in range(8)])
    return jax.lax.scan(lambda x, _: (turn(x) * 2, None), x, length=5)[0]

  (op,) = collectives(operations(on_eight(body, P('x'))))
  assert (op.kind, op.times, op.wire_bytes) == ('collective-permute', 5, SHARD)


def loop(bound='constant(8)', first='copy(%zero)'):
  """A loop whose condition compares its counter, without the compiler's word on how often it runs."""
  return f"""HloModule jit_f, num_partitions=1

%condition (p: (s32[], f32[4])) -> pred[] {{
  %bound = s32[] {bound}
  %p = (s32[], f32[4]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %p = (s32[], f32[4]{{0}}) parameter(0)
  %work = f32[4]{{0}} fusion(%p), kind=kLoop, calls=%condition, backend_config={{"estimated_cycles":"100"}}
}}

ENTRY %main (x: f32[4]) -> f32[4] {{
  %zero = s32[] constant(3)
  %x = f32[4]{{0}} parameter(0)
  %first = s32[] {first}
  %start = (s32[], f32[4]{{0}}) tuple(%first, %x)
  %run = (s32[], f32[4]{{0}}) while(%start), condition=%condition, body=%body
}}
"""


def test_trips_follow_from_a_loops_condition_where_the_compiler_is_silent():
  assert cycles(operations(loop()), matmul=False) == 5 * 100


@pytest.mark.parametrize('unknown', [{'bound': 'get-tuple-element(%p), index=1'}, {'first': 'add(%zero, %zero)'}])
def test_a_loop_of_unknown_length_is_counted_once_and_told(unknown):
  ops = operations(loop(**unknown))
  assert cycles(ops, matmul=False) == 100 and 'while' in [op.kind for op in ops if op.cycles is None]
  assert 'while' not in [op.kind for op in operations(loop())]


LINES = """HloModule jit_f, num_partitions=8

FileNames
1 "/somewhere/site-packages/flax/core.py"
2 "/home/me/moe_jax/moe/experts.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=10 end_line=10 column=3 end_column=9}
2 {file_name_id=2 function_name_id=1 line=57 end_line=57 column=3 end_column=9}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=1}


ENTRY %main (x: f32[16]) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  %a = f32[16]{0} add(%x, %x), metadata={op_name="jit(f)/add" stack_frame_id=2}
  %b = f32[16]{0} add(%x, %x), metadata={op_name="jit(f)/add" source_file="moe.py" source_line=3}
  %c = f32[16]{0} all-reduce(%x), replica_groups={}, to_apply=%add
  %d = f32[16]{0} all-reduce(%x), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  ROOT %e = f32[16]{0} all-reduce(%x), replica_groups=mesh['data'=2,'expert'=4] {'data'}, to_apply=%add
}
"""


def test_source_lines_and_groups():
  a, b, c, d, e = operations(LINES)
  assert (a.line, b.line) == ('/home/me/moe_jax/moe/experts.py:57', 'moe.py:3')  # not where Flax called it
  assert (c.group, d.group, e.group) == (tuple(range(8)), (0, 2, 4, 6), (0, 4))


def one(instruction):
  """The collectives of a program of one instruction."""
  text = f'HloModule jit_f, num_partitions=8\n\nENTRY %main (x: f32[16]) -> f32[16] {{\n  {instruction}\n}}\n'
  return [(op.kind, op.ways, op.bytes) for op in collectives(operations(text))]


def test_all_results_of_a_pair_count_and_operands_do_not():
  many = '(f32[16]{0}, f32[32]{0}) all-reduce-start(%x, %y), replica_groups={{0,1}}, to_apply=%add'
  assert one(f'%a = {many}') == [('all-reduce', 2, 4 * 48)]
  many = '((f32[1]{0}, f32[2]{0}), (f32[16]{0}, f32[32]{0})) all-gather-start(%x, %y), replica_groups={{0,1}}'
  assert one(f'%a = {many}') == [('all-gather', 2, 4 * 48)]


def test_devices_that_keep_what_they_have_do_not_hide_those_that_exchange():
  pairs = 'f32[16]{0} collective-permute(%x), source_target_pairs={{0,0},{1,2},{2,1},{3,3}}'
  assert one(f'%a = {pairs}') == [('collective-permute', 2, 64)]
  assert one('%a = f32[16]{0} collective-permute(%x), source_target_pairs={{0,0},{1,1}}') == []


@pytest.mark.parametrize(
  ('target', 'slices', 'kind', 'wire_bytes'),
  [
    ('{1,2}x{0:15}', 2, 'ALL_REDUCE', 64),
    ('{1:4}x{0:15}', 4, 'ALL_GATHER', 3 * 64),
    ('{1:4}x{0:15}', 4, 'REDUCE_SCATTER', 64 * 3 / 4),
  ],
)
def test_transfers_between_slices(target, slices, kind, wire_bytes):
  transfer = f'_xla_megascale_target="{target}",_xla_megascale_transfer_type="{kind}"'
  line = f'%a = (f32[16]{{0}}, u32[], token[]) send(%x, %t), channel_id=2, frontend_attributes={{{transfer}}}'
  (found,) = operations(f'HloModule jit_f\n\nENTRY %main (x: f32[16]) -> f32[16] {{\n  {line}\n}}\n')
  assert (found.slow, found.ways, found.wire_bytes) == (True, slices, wire_bytes)


def test_of_a_choice_the_branch_that_costs_most_counts():
  branch = '%{name} (p: f32[4]) -> f32[4] {{\n  %w = f32[4]{{0}} fusion(%p), kind=kLoop, calls=%c, {cost}\n}}\n\n'
  text = 'HloModule jit_f\n\n'
  for name, cost in (('cheap', 10), ('dear', 500)):
    text += branch.format(name=name, cost=f'backend_config={{"estimated_cycles":"{cost}"}}')
  for how in ('true_computation=%dear, false_computation=%cheap', 'branch_computations={%cheap, %dear}'):
    program = f'{text}ENTRY %main (x: f32[4]) -> f32[4] {{\n  %r = f32[4]{{0}} conditional(%i, %x, %x), {how}\n}}\n'
    assert cycles(operations(program), matmul=False) == 500
