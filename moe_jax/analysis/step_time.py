"""How long a compiled step would take: an estimate from the compiler's cycles and a ring model of the links.

What it assumes is printed with it (`ASSUMPTIONS`): good for comparing layouts, not for promising a speed.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from moe_jax.analysis.chips import Chip
from moe_jax.analysis.compiled import Operation, collectives, cycles, uncosted_bytes

ASSUMPTIONS = (
  "the compiler's estimate of cycles, at the nominal clock",
  'what it gives no cycles for reads as many bytes as it writes, a buffer updated in place whole, at full HBM speed',
  'computation takes at least what all FLOPs take at peak: kernels, which may be most matmuls, have no cycles',
  'collectives run at full link speed on every torus axis that their group spans, those of other groups beside them',
  "'overlapped' hides the shorter of computation and communication wholly, 'serial' nothing",
  'no time for launching, waiting for others, or input',
)


class Seconds(NamedTuple):
  """Attributes: compute; ici, links within a slice; dcn, the network between slices."""

  compute: float
  ici: float
  dcn: float

  @property
  def serial(self) -> float:
    """With nothing at the same time."""
    return sum(self)

  @property
  def overlapped(self) -> float:
    """With everything at the same time."""
    return max(self)


def step_seconds(
  operations: Sequence[Operation], chip: Chip, devices: Sequence[jax.Device], flops: float = 0
) -> Seconds:
  """Seconds of one run of a program.

  Args:
    operations: of the compiled program.
    chip: that runs it.
    devices: of the mesh, in its order.
    flops: of one chip, below whose time at peak no computation is.
  """
  costed = sum(cycles(operations, matmul=matmul) for matmul in (True, False)) / chip.clock
  moved = collectives(operations)
  return Seconds(
    compute=max(costed + 2 * uncosted_bytes(operations) / chip.memory_speed, flops / chip.peak),
    ici=sum(op.times * link_seconds(op, chip, devices) for op in moved if not op.slow),
    dcn=sum(op.times * op.wire_bytes / chip.network_speed for op in moved if op.slow),
  )


def link_seconds(operation: Operation, chip: Chip, devices: Sequence[jax.Device]) -> float:
  """Seconds of one collective over a block of the torus. Two links leave a chip along each axis that is a ring.

  All-gathers and their like send their bytes over all axes at once. In an all-to-all a byte travels a quarter of a ring
  on average, or a third of a line, whose middle has to carry half of everything: the longest axis decides.
  """
  sides, links = _block([devices[i] for i in operation.group], devices, chip)
  if not sides:
    return 0.0
  if operation.kind in ('all-to-all', 'ragged-all-to-all'):
    slowest = max(side / 4 / ways for side, ways in zip(sides, links, strict=True))
    return operation.bytes * slowest / chip.link_speed
  ways = 1 if operation.kind == 'collective-permute' else sum(links)
  return operation.wire_bytes / (ways * chip.link_speed)


def _block(group: Sequence[jax.Device], devices: Sequence[jax.Device], chip: Chip) -> tuple[list[int], list[float]]:
  """Of each torus axis along which a group's chips differ: how many chips, and links that carry.

  Two in a ring, one in a line; shares of these where only every so many chips belong to the group, the others being
  more of its kind. An axis of 16 closes to a ring on v5e and v6e; every axis does on v4 and v5p if all are multiples of
  4.
  """
  places, everywhere = (np.array([device.coords for device in some]) for some in (group, devices))
  wholes = [int(size) + 1 for size in everywhere.max(axis=0)]
  cubes = all(whole % chip.wraps_at == 0 for whole in wholes[: chip.torus])
  sides: list[int] = []
  links: list[float] = []
  for axis, whole in enumerate(wholes):
    along = places[:, axis]
    side = len(set(along.tolist()))
    if side > 1:
      closed = side == whole and (cubes if chip.torus == 3 else whole % chip.wraps_at == 0)
      stride = (int(along.max()) - int(along.min())) / (side - 1)
      sides.append(side)
      links.append((2 if closed else 1) / stride)
  return sides, links


def describe_axes(operation: Operation, shape: Sequence[int], names: Iterable[str]) -> str:
  """The mesh axes that a collective's group spans, as 'data x expert'; slices differ along the first alone."""
  if operation.slow:
    return next(iter(names))
  places = np.unravel_index(np.array(operation.group), tuple(shape))
  spanned = [name for name, place in zip(names, places) if len(set(place.tolist())) > 1]
  return ' x '.join(spanned)
