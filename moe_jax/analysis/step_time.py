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
  'what it gives no cycles for reads as many bytes as it writes, at full HBM speed',
  'collectives run at full link speed over neighbouring chips, on every torus axis that their group spans',
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


def step_seconds(operations: Sequence[Operation], chip: Chip, devices: Sequence[jax.Device]) -> Seconds:
  """Seconds of one run of a program.

  Args:
    operations: of the compiled program.
    chip: that runs it.
    devices: of the mesh, in its order.
  """
  costed = sum(cycles(operations, matmul=matmul) for matmul in (True, False)) / chip.clock
  moved = collectives(operations)
  return Seconds(
    compute=costed + 2 * uncosted_bytes(operations) / chip.memory_speed,
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
    slowest = max(side / 4 / ways for side, ways in zip(sides, links))
    return operation.bytes * slowest / chip.link_speed
  ways = 1 if operation.kind == 'collective-permute' else sum(links)
  return operation.wire_bytes / (ways * chip.link_speed)


def _block(group: Sequence[jax.Device], devices: Sequence[jax.Device], chip: Chip) -> tuple[list[int], list[int]]:
  """Of each torus axis along which a group's chips differ: how many chips, and links that carry (2 in a ring)."""
  places, everywhere = (np.array([device.coords for device in some]) for some in (group, devices))
  sides, links = [], []
  for axis in range(places.shape[1]):
    side, whole = len(set(places[:, axis])), int(everywhere[:, axis].max()) + 1
    if side > 1:
      sides.append(side)
      links.append(2 if side == whole and whole % chip.wraps_at == 0 else 1)
  return sides, links


def describe_axes(operation: Operation, shape: Sequence[int], names: Iterable[str]) -> str:
  """The mesh axes that a collective's group spans, as 'data x expert'; between slices, the first."""
  if operation.slow:
    return next(iter(names))
  places = np.unravel_index(np.array(operation.group), tuple(shape))
  spanned = [name for name, place in zip(names, places) if len(set(place.tolist())) > 1]
  return ' x '.join(spanned)
