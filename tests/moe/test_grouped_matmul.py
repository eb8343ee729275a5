"""Each row times its own expert's matrix, however many rows an expert has; the TPU kernels say the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from moe_jax.moe import grouped_matmul as module
from moe_jax.moe.grouped_matmul import grouped_matmul

BLOCK, DEPTH, WIDTH = 8, 128, 256


def by_hand(rows, matrices, blocks, gradient):
  """Products, and gradients to rows and matrices, in float64."""
  rows, matrices, gradient = (np.asarray(x, np.float64) for x in (rows, matrices, gradient))
  y, to_rows, to_matrices = np.zeros_like(gradient), np.zeros_like(rows), np.zeros_like(matrices)
  ends = np.cumsum(blocks) * BLOCK
  for e, end in enumerate(ends):
    mine = slice(end - blocks[e] * BLOCK, end)
    y[mine], to_rows[mine] = rows[mine] @ matrices[e], gradient[mine] @ matrices[e].T
    to_matrices[e] = rows[mine].T @ gradient[mine]
  return y, to_rows, to_matrices


def draw(seed, blocks, spare, dtype='float32'):
  rng = np.random.default_rng(seed)
  total = (sum(blocks) + spare) * BLOCK
  shapes = (total, DEPTH), (len(blocks), DEPTH, WIDTH), (total, WIDTH)
  rows, matrices, gradient = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
  return jnp.asarray(rows, dtype), jnp.asarray(matrices), jnp.asarray(blocks, jnp.int32), jnp.asarray(gradient, dtype)


def by_us(rows, matrices, blocks, gradient):
  y, pull = jax.vjp(lambda rows, matrices: grouped_matmul(rows, matrices, blocks, BLOCK), rows, matrices)
  return y, *pull(gradient)


def assert_close(actual, expected, tolerance):
  for mine, its in zip(actual, expected, strict=True):
    assert np.linalg.norm(np.asarray(mine, np.float64) - its) <= tolerance * max(np.linalg.norm(its), 1)


@pytest.mark.parametrize('kernels', [False, True], ids=['loop', 'kernels'])
@settings(max_examples=10)  # each compiles anew
@given(blocks=st.lists(st.integers(0, 3), min_size=1, max_size=4), spare=st.integers(0, 2), seed=st.integers(0, 999))
def test_every_expert_has_its_rows(kernels, blocks, spare, seed):
  if not sum(blocks) + spare:
    spare = 1
  args = draw(seed, blocks, spare)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(module, 'INTERPRET', kernels)
    assert_close(by_us(*args), by_hand(*args), 1e-6)


@pytest.mark.parametrize('kernels', [False, True], ids=['loop', 'kernels'])
def test_matrices_may_be_wider_than_rows(kernels, monkeypatch):
  monkeypatch.setattr(module, 'INTERPRET', kernels)
  args = draw(0, [2, 0, 3], 1, 'bfloat16')
  y, to_rows, to_matrices = by_us(*args)
  assert (y.dtype, to_rows.dtype, to_matrices.dtype) == ('bfloat16', 'bfloat16', 'float32')
  assert_close((y, to_rows), by_hand(*args)[:2], 1e-2)
  assert_close((to_matrices,), by_hand(*args)[2:], 1e-6)  # products of bfloat16 are exact in float32


def test_in_shard_map(mesh):
  """Each device has blocks of its own, and the same matrices."""
  blocks = [[1, 2], [3, 0], [0, 0], [0, 3], [2, 1], [1, 1], [0, 1], [1, 0]]
  many = [draw(i, b, 3 - sum(b)) for i, b in enumerate(blocks)]
  matrices = many[0][1]
  rows, sizes, gradient = (jnp.concatenate([m[i] for m in many]) for i in (0, 2, 3))
  run = jax.shard_map(
    lambda rows, sizes, gradient: by_us(rows, jax.lax.pcast(matrices, 'data', to='varying'), sizes, gradient)[:2],
    mesh=mesh(8),
    in_specs=P('data'),
    out_specs=P('data'),
  )
  expected = [by_hand(m[0], matrices, b, m[3]) for m, b in zip(many, blocks, strict=True)]
  assert_close(jax.jit(run)(rows, sizes, gradient), [np.concatenate(x) for x in list(zip(*expected))[:2]], 1e-6)


@pytest.mark.parametrize('block', [16, 64, 512])
def test_kernels_compile_for_tpus(block, tpu):
  """One layer's worth of rows, forward and backward, in bfloat16."""
  mesh = tpu('v5e:2x2', data=4)
  where = jax.sharding.NamedSharding(mesh, P('data'))
  shapes = (4 * 4096, 2048), (4 * 8, 2048, 8192), (4 * 8,), (4 * 4096, 8192)
  dtypes = 'bfloat16', 'bfloat16', 'int32', 'bfloat16'
  args = [jax.ShapeDtypeStruct(s, d, sharding=where) for s, d in zip(shapes, dtypes, strict=True)]

  def step(rows, matrices, blocks, gradient):
    y, pull = jax.vjp(lambda *args: grouped_matmul(*args, blocks, block), rows, matrices)
    return y, *pull(gradient)

  run = jax.shard_map(step, mesh=mesh, in_specs=P('data'), out_specs=P('data'))
  assert jax.jit(run).lower(*args).compile().as_text().count('tpu_custom_call') >= 3
