"""The ring model on collectives whose time is known, and programs of known cost through the TPU compiler."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.analysis.chips import CHIPS, topology_devices
from moe_jax.analysis.compiled import Operation, collectives, cycles, operations
from moe_jax.analysis.step_time import describe_axes, link_seconds, step_seconds
from moe_jax.types import ConfigError

V5E, V5P = CHIPS['TPU v5 lite'], CHIPS['TPU v5']
SIZE = 2**20
op = functools.partial(Operation, source='', arrays=(('f32', (SIZE // 4,)),), times=1, cycles=None, matmul=False)


def pod(*shape):
  return [types.SimpleNamespace(coords=coords) for coords in np.ndindex(shape)]


def test_a_closed_ring_uses_both_links():
  row = tuple(range(16))  # the last axis of 16 x 16, which closes to a ring
  gather = link_seconds(op('all-gather', group=row), V5E, pod(16, 16, 1))
  assert gather == pytest.approx(SIZE * 15 / 16 / (2 * 4.5e10))
  assert link_seconds(op('all-reduce', group=row), V5E, pod(16, 16, 1)) == pytest.approx(2 * gather)
  # an all-to-all takes a quarter of the time in which the same bytes on every chip would be gathered
  exchange = link_seconds(op('all-to-all', group=row), V5E, pod(16, 16, 1))
  assert exchange == pytest.approx(SIZE * 16 / 4 / (2 * 4.5e10))


def test_a_line_has_half_of_that():
  row = tuple(range(8))
  gather = link_seconds(op('all-gather', group=row), V5E, pod(8, 8, 1))
  assert gather == pytest.approx(SIZE * 7 / 8 / 4.5e10)


def test_more_axes_are_faster():
  pod_of_64 = pod(4, 4, 4)
  line = link_seconds(op('all-gather', group=(0, 1, 2, 3)), V5P, pod_of_64)
  cube = link_seconds(op('all-gather', group=tuple(range(64))), V5P, pod_of_64)
  assert line == pytest.approx(SIZE * 3 / 4 / (2 * 9e10))
  assert cube == pytest.approx(SIZE * 63 / 64 / (6 * 9e10))


def test_v4_and_v5p_have_rings_only_in_pods_of_whole_cubes():
  line = link_seconds(op('all-gather', group=(0, 1, 2, 3)), V5P, pod(2, 2, 4))
  assert line == pytest.approx(SIZE * 3 / 4 / 9e10)


def test_groups_that_lie_in_one_another_share_the_links():
  beside = link_seconds(op('all-gather', group=(0, 1, 2, 3)), V5E, pod(16, 16, 1))
  within = link_seconds(op('all-gather', group=(0, 4, 8, 12)), V5E, pod(16, 16, 1))
  assert within == pytest.approx(4 * beside)
  beside, within = (
    link_seconds(op('all-to-all', group=group), V5E, pod(16, 16, 1)) for group in ((0, 1, 2, 3), (0, 4, 8, 12))
  )
  assert within == pytest.approx(4 * beside)


def test_no_computation_is_faster_than_the_peak():
  assert step_seconds([], V5E, pod(4, 4, 1), flops=1.97e14).compute == pytest.approx(1)


def test_the_network_between_slices_is_slow_and_apart():
  between = op('all-reduce', slow=True, slices=2)
  seconds = step_seconds([between, between], V5E, pod(4, 4, 1))
  assert seconds.dcn == pytest.approx(2 * SIZE / 3.1e9) and seconds.ici == seconds.compute == 0
  assert seconds.serial == seconds.overlapped == seconds.dcn


def test_cycles_and_uncosted_bytes_become_seconds():
  costed = Operation('fusion', '', (), times=3, cycles=1500, matmul=True)
  seconds = step_seconds([costed, op('sort')], V5E, pod(4, 4, 1))
  assert seconds.compute == pytest.approx(3 * 1500 / 1.5e9 + 2 * SIZE / 8.1e11)


def test_axes_are_told_from_groups():
  shape, names = (1, 2, 4, 2), ('replica', 'data', 'expert', 'model')
  assert describe_axes(op('all-to-all', group=(0, 2, 4, 6)), shape, names) == 'expert'
  assert describe_axes(op('all-reduce', group=tuple(range(0, 16, 2))), shape, names) == 'data x expert'
  assert describe_axes(op('all-reduce', slow=True, slices=2), shape, names) == 'replica'


@pytest.mark.parametrize('topology', ['v5x:4x4', 'v5e', '4x4', 'v5e:'])
def test_a_topology_that_is_none(topology):
  with pytest.raises(ConfigError, match='is not like v5e:16x16'):
    topology_devices(topology)


# ---- Programs of known cost, compiled for a TPU ----


def compiled(function, *shapes, mesh=None, specs=None):
  args = [
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for shape, spec in zip(shapes, specs)
  ]
  return operations(jax.jit(function).lower(*args).compile().as_text())


def test_a_shape_that_is_none(tpu):
  with pytest.raises(ConfigError, match='no v5e of that shape'):
    topology_devices('v5e:3x3')


@pytest.mark.parametrize('topology', ['v5e:4x4', 'v4:2x2x4', 'v5p:2x2x4'])
def test_a_matmul_runs_near_the_peak(tpu, topology):
  mesh = tpu(topology, data=16)
  ops = compiled(jnp.matmul, (16 * 4096, 4096), (4096, 4096), mesh=mesh, specs=[P('data'), P()])
  chip = CHIPS[mesh.devices.flat[0].device_kind]
  ideal = 2 * 4096**3 / chip.peak * chip.clock
  assert 0.95 < cycles(ops, matmul=True) / ideal < 1.15


def test_a_scan_of_8_costs_8_times_a_matmul(tpu):
  mesh, shapes = tpu('v5e:4x4', data=16), [(16 * 2048, 2048), (2048, 2048)]
  specs = [P('data'), P()]
  one = cycles(compiled(lambda x, w: jnp.tanh(x @ w), *shapes, mesh=mesh, specs=specs), matmul=True)
  many = compiled(
    lambda x, w: jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=8)[0], *shapes, mesh=mesh, specs=specs
  )
  assert 7 < cycles(many, matmul=True) / one < 9


def test_a_rematerialised_block_costs_a_forward_pass_more(tpu):
  mesh, shapes = tpu('v5e:4x4', data=16), [(16 * 4096, 2048), (2048, 8192), (8192, 2048)]
  specs = [P('data'), P(), P()]

  def cost(wrap):
    block = wrap(lambda x, w, v: jnp.sum(jnp.tanh(jnp.tanh(jnp.tanh(x @ w) @ v) @ w).astype(jnp.float32)))
    return cycles(compiled(jax.value_and_grad(block, argnums=(0, 1, 2)), *shapes, mesh=mesh, specs=specs), matmul=True)

  # 3 products forward, 6 back, and with rematerialisation the 3 again, of which the last has no other use than its tanh
  assert 1.2 < cost(jax.checkpoint) / cost(lambda f: f) < 1.4


def test_a_psum_and_an_all_to_all_send_what_they_should(tpu):
  mesh = tpu('v5e:4x4', data=16)
  local = 16 * 1024 * 2

  def over(body, out):
    split = jax.shard_map(body, mesh=mesh, in_specs=P('data'), out_specs=out)
    return collectives(compiled(split, (256, 1024), mesh=mesh, specs=[P('data')]))

  (reduced,) = over(lambda x: jax.lax.psum(x, 'data'), P())
  assert (reduced.kind, reduced.ways, reduced.wire_bytes) == ('all-reduce', 16, 2 * local * 15 / 16)
  (exchanged,) = over(lambda x: jax.lax.all_to_all(x, 'data', 0, 1, tiled=True), P('data'))
  assert (exchanged.kind, exchanged.ways, exchanged.wire_bytes) == ('all-to-all', 16, local * 15 / 16)


@pytest.mark.parametrize('slices', [2, 4])
def test_between_slices_only_replicas_talk(tpu, slices):
  from moe_jax import sharding

  devices = topology_devices(f'{slices}*v5e:4x4')
  mesh = sharding.make_mesh(
    sharding.mesh_shape({'data': -1}, 16 * slices, num_slices=sharding.count_slices(devices)), devices
  )
  ops = compiled(
    jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w).astype(jnp.float32))),
    *[(1024, 1024), (4096, 1024)],
    mesh=mesh,
    specs=[P('data'), P(('replica', 'data'))],
  )
  slow = [(op.kind, op.ways) for op in collectives(ops) if op.slow]
  assert slow and set(slow) == {('all-reduce', slices)}
  assert all(max(op.group) < 16 for op in collectives(ops) if not op.slow)
