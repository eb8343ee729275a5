"""TPU chips: what they can do at best, and how to compile for their pods without having one.

Figures of compute, memory and links are those of "How to Scale Your Model" (Austin et al. 2025), chapter 2.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from moe_jax.types import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip.

  Attributes:
    name: as topologies spell it.
    peak: bfloat16 FLOP/s.
    memory: bytes of HBM.
    memory_speed: bytes/s of HBM.
    link_speed: bytes/s of one ICI link, one way.
    network_speed: bytes/s between slices (DCN), of one chip's share.
    clock: Hz.
    torus: dimensions of the ICI network.
    wraps_at: an axis closes to a ring where its length is a multiple of this.
    options: of XLA, for training steps: flag -> value.
  """

  name: str
  peak: float
  memory: float
  memory_speed: float
  link_speed: float
  network_speed: float
  clock: float
  torus: int
  wraps_at: int
  options: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _room_for_fusions(mebibytes: int) -> dict[str, str]:
  """More of the memory on chip than XLA gives a fusion by itself.

  Windows of matmuls are larger then, and whole steps take up to three tenths fewer cycles (tests/benchmarks). Too much
  is bad as well: it is taken from arrays that could stay on chip. On v4 and v6e 32 MiB gained nothing.
  """
  return {'xla_tpu_scoped_vmem_limit_kib': str(1024 * mebibytes)}


CHIPS = {  # by `jax.Device.device_kind`
  'TPU v4': Chip('v4', 2.75e14, 32 * 2**30, 1.2e12, 4.5e10, 6.25e9, 1.05e9, 3, 4),
  'TPU v5': Chip('v5p', 4.59e14, 95 * 2**30, 2.765e12, 9e10, 6.25e9, 1.75e9, 3, 4, _room_for_fusions(48)),
  'TPU v5 lite': Chip('v5e', 1.97e14, 16 * 2**30, 8.1e11, 4.5e10, 3.1e9, 1.5e9, 2, 16, _room_for_fusions(60)),
  # The clock of v6e is not published: that of v5p is assumed.
  'TPU v6 lite': Chip('v6e', 9.2e14, 32 * 2**30, 1.64e12, 9e10, 12.5e9, 1.75e9, 2, 16),
}


def chip_of(device: jax.Device) -> Chip | None:
  """The chip, or None for what is not in the table, such as a CPU."""
  return CHIPS.get(device.device_kind)


def _parts(topology: str) -> tuple[int, Chip, str]:
  """'2*v5e:16x16' -> 2 slices of v5e, of shape '16x16' each."""
  found = re.fullmatch(r'(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)', topology)
  chips = {chip.name: chip for chip in CHIPS.values()}
  if not found or found[2] not in chips:
    raise ConfigError(
      f'TOPOLOGY={topology!r} is not like v5e:16x16 or 2*v5e:16x16, with one of {", ".join(sorted(chips))}.'
    )
  return int(found[1] or 1), chips[found[2]], found[3]


def read_topology(topology: str) -> tuple[Chip, int]:
  """The chip, and how many of them, by the name alone.

  Raises:
    ConfigError: if it is not like 'v5e:16x16'.
  """
  slices, chip, shape = _parts(topology)
  return chip, slices * math.prod(map(int, shape.split('x')))


def topology_devices(topology: str) -> Sequence[jax.Device]:
  """Devices to compile for, by libtpu, on any machine.

  Args:
    topology: chip and shape, as 'v5e:16x16'; with several slices '2*v5e:16x16'.

  Raises:
    ConfigError: if there is no such topology, or no libtpu.
  """
  slices, chip, shape = _parts(topology)
  name = chip.name
  options: dict[str, Any] = {'num_slices': slices} if slices > 1 else {}
  if name == 'v4':
    options['chip_config_name'] = 'megacore'  # both cores of a chip as one device, as JAX has it on a real v4
  # libtpu looks for the cloud machine that it runs on, and for other processes that have it open.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', 'true')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', 'true')
  from jax.experimental import topologies

  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=f'{name}:{shape}', **options).devices
  except (RuntimeError, NotImplementedError) as error:
    if 'INVALID_ARGUMENT' in str(error):
      raise ConfigError(
        f'TOPOLOGY={topology!r}: there is no {name} of that shape (2x2, 4x4, 4x8, 16x16 for v5e and v6e;'
        ' multiples of 4 as 4x4x4, 8x8x16 for v4 and v5p).'
      ) from error
    raise ConfigError('Compiling for a TPU needs its compiler, libtpu: pip install "jax[tpu]".') from error
