"""Each row times the matrix of its own expert, for experts with as many rows as they happen to get.

Rows are sorted by expert, and every expert's rows fill whole blocks, so that a block has one expert and its matmul is
an ordinary one: on a TPU a grid step of a kernel that is told which matrix to load (as in MegaBlocks, Gale et al.
2022), elsewhere a step of a loop. Blocks without rows cost nothing.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe_jax.types import Array, Dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(rows: Array, matrices: Array, blocks: Array, block: int) -> Array:
  """float[N, K] with float[E, K, F] -> float[N, F].

  Args:
    rows: sorted by expert, each expert's rows padded to whole blocks; padding is multiplied too.
    matrices: one an expert. They may be wider than the rows, and so are their gradients.
    blocks: int32[E], how many blocks of rows each expert has. Rows after the last come back as 0.
    block: rows in a block, of which N is a multiple.
  """
  return _per_block(rows, matrices, blocks, block, transposed=False)


def _forward(rows: Array, matrices: Array, blocks: Array, block: int) -> tuple[Array, Any]:
  return grouped_matmul(rows, matrices, blocks, block), (rows, matrices, blocks)


def _backward(block: int, saved: Any, gradient: Array) -> tuple[Array, Array, None]:
  rows, matrices, blocks = saved
  to_rows = _per_block(gradient, matrices, blocks, block, transposed=True)
  return to_rows, _per_expert(rows, gradient, blocks, block, matrices.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _per_block(rows: Array, matrices: Array, blocks: Array, block: int, transposed: bool) -> Array:
  """Every block times its expert's matrix, or the transpose of it."""
  contract = 1 if transposed else 0
  depth, columns = matrices.shape[1 + contract], matrices.shape[2 - contract]
  matrices = matrices.astype(rows.dtype)

  def loop(rows: Array, matrices: Array, blocks: Array) -> Array:
    starts = jnp.cumsum(blocks) - blocks

    def of_expert(e: Array, out: Array) -> Array:
      matrix = jax.lax.dynamic_index_in_dim(matrices, e, keepdims=False)

      def of_block(i: Array, out: Array) -> Array:
        done = _dot(_block_of(rows, i, block), matrix, (1, contract)).astype(out.dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, done, i * block, axis=0)

      return jax.lax.fori_loop(starts[e], starts[e] + blocks[e], of_block, out)

    return jax.lax.fori_loop(0, len(blocks), of_expert, jnp.zeros_like(rows, shape=(len(rows), columns)))

  def step(expert: Any, used: Any, rows: Any, matrix: Any, out: Any) -> None:
    @pl.when(pl.program_id(1) < used[0])
    def _() -> None:
      out[...] = _dot(rows[...], matrix[...], (1, contract)).astype(out.dtype)

    @pl.when(pl.program_id(1) >= used[0])
    def _() -> None:
      out[...] = jnp.zeros_like(out)

  def kernel(rows: Array, matrices: Array, blocks: Array) -> Array:
    row_bytes = depth * rows.dtype.itemsize
    high, tile = block, _tile(columns, _MEGABYTE * 2 // row_bytes)
    while high * row_bytes > 2 * _MEGABYTE:
      high //= 2
    expert, used = _experts_of_blocks(blocks * (block // high), len(rows) // high)
    part = (None, tile, depth) if transposed else (None, depth, tile)
    return pl.pallas_call(
      step,
      out_shape=_like(rows, (len(rows), columns)),
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(columns // tile, len(expert)),
        in_specs=[
          pl.BlockSpec((high, depth), lambda j, i, e, _: (i, 0)),
          pl.BlockSpec(part, lambda j, i, e, _: (e[i], j, 0) if transposed else (e[i], 0, j)),
        ],
        out_specs=pl.BlockSpec((high, tile), lambda j, i, e, _: (i, j)),
      ),
      interpret=INTERPRET,
    )(expert, used[None], rows, matrices)

  return _by_platform(kernel, loop, rows, matrices, blocks)


def _per_expert(rows: Array, gradient: Array, blocks: Array, block: int, dtype: Dtype) -> Array:
  """float[N, K], float[N, F] -> [E, K, F], each expert's rows, transposed, times its gradients."""
  depth, columns = rows.shape[1], gradient.shape[1]

  def loop(rows: Array, gradient: Array, blocks: Array) -> Array:
    starts = jnp.cumsum(blocks) - blocks
    zeros = jnp.zeros_like(gradient, jnp.float32, shape=(depth, columns))

    def of_expert(e: Array, out: Array) -> Array:
      def add(i: Array, total: Array) -> Array:
        return total + _dot(_block_of(rows, i, block), _block_of(gradient, i, block), (0, 0))

      total = jax.lax.fori_loop(starts[e], starts[e] + blocks[e], add, zeros)
      return jax.lax.dynamic_update_index_in_dim(out, total.astype(out.dtype), e, axis=0)

    out = jnp.zeros_like(gradient, dtype, shape=(len(blocks), depth, columns))
    return jax.lax.fori_loop(0, len(blocks), of_expert, out)

  def step(expert: Any, used: Any, rows: Any, gradient: Any, out: Any, total: Any) -> None:
    i, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when((i == 0) | (expert[i] != expert[jnp.maximum(i - 1, 0)]))
    def _() -> None:
      total[...] = jnp.zeros_like(total)

    @pl.when(i < used[0])
    def _() -> None:
      total[...] += _dot(rows[...], gradient[...], (0, 0))

    @pl.when((i == last) | (expert[i] != expert[jnp.minimum(i + 1, last)]))
    def _() -> None:
      out[...] = total[...].astype(out.dtype)

  def kernel(rows: Array, gradient: Array, blocks: Array) -> Array:
    expert, used = _experts_of_blocks(blocks, len(rows) // block)
    high, wide = _tile(depth, 1024), _tile(columns, 1024)
    out = pl.pallas_call(
      step,
      out_shape=_like(gradient, (len(blocks), depth, columns), dtype),
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(depth // high, columns // wide, len(expert)),
        in_specs=[
          pl.BlockSpec((block, high), lambda k, j, i, e, _: (i, k)),
          pl.BlockSpec((block, wide), lambda k, j, i, e, _: (i, j)),
        ],
        out_specs=pl.BlockSpec((None, high, wide), lambda k, j, i, e, _: (e[i], k, j)),
        scratch_shapes=[pltpu.VMEM((high, wide), jnp.float32)],
      ),
      interpret=INTERPRET,
    )(expert, used[None], rows, gradient)
    return jnp.where((blocks > 0)[:, None, None], out, 0)  # nothing is written for an expert without rows

  return _by_platform(kernel, loop, rows, gradient, blocks)


_MEGABYTE = 2**20  # TPUs give 16 of fast memory for a kernel; what is streamed takes its size twice
INTERPRET = False  # tests run the kernels on a CPU


def _by_platform(kernel: Any, loop: Any, *args: Array) -> Array:
  return kernel(*args) if INTERPRET else jax.lax.platform_dependent(*args, tpu=kernel, default=loop)


def _experts_of_blocks(blocks: Array, total: int) -> tuple[Array, Array]:
  """Whose each of all blocks is, int32[total], the last expert's where nobody's; and how many are somebody's."""
  ends = jnp.cumsum(blocks)
  expert = jnp.sum(jnp.arange(total)[:, None] >= ends[None], axis=1, dtype=jnp.int32)
  return jnp.minimum(expert, len(blocks) - 1), ends[-1]


def _block_of(x: Array, i: Array, block: int) -> Array:
  return jax.lax.dynamic_slice_in_dim(x, i * block, block)


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
  left, right = contract
  return jax.lax.dot_general(a, b, (((left,), (right,)), ((), ())), preferred_element_type=jnp.float32)


def _tile(size: int, at_most: int) -> int:
  """The largest divisor of a size in whole lanes, or all of it."""
  return max((t for t in range(128, min(size, max(at_most, 128)) + 1, 128) if size % t == 0), default=size)


def _like(x: Array, shape: tuple[int, ...], dtype: Dtype = None) -> jax.ShapeDtypeStruct:
  """Varying over the same mesh axes as x."""
  return jax.ShapeDtypeStruct(shape, dtype or x.dtype, manual_axis_type=jax.typeof(x).mat)
