"""What a compiled program does on each device, read from its text: matmuls, other work, and collectives.

The TPU compiler writes an estimate of cycles next to almost every operation, and works without a TPU. Matmul estimates
are good; those of other operations are high where they are bound by memory, and sorts, gathers, scatters and Pallas
kernels have none: these are counted in bytes instead.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence

COLLECTIVES = ('all-to-all', 'ragged-all-to-all', 'all-gather', 'all-reduce', 'reduce-scatter', 'collective-permute')
# Compiled into nothing, or into transfers that run beside the computation.
_FREE = {
  *(
    'parameter',
    'constant',
    'tuple',
    'get-tuple-element',
    'bitcast',
    'reshape',
    'after-all',
    'partition-id',
    'opt-barrier',
  ),
  *('copy-start', 'copy-done', 'slice-start', 'slice-done', 'dynamic-slice-start', 'dynamic-slice-done', 'replica-id'),
  *('dynamic-update-slice-start', 'dynamic-update-slice-done'),
}
_BITS = {'pred': 8, 'bf16': 16}

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.-]+) (?:\(.*)?\{')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.-]+) = (.*?[\])}]) ([a-z][a-z0-9-]*)\((.*)$')
_ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')
_CALLED = re.compile(r'(?:calls|to_apply|called_computations|body|branch_computations)=\{?((?:%?[\w.-]+(?:, )?)+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_FREE_TARGETS = {'ConcatBitcast', 'AsyncCollectiveStart', 'AsyncCollectiveDone'}


@dataclasses.dataclass(frozen=True)
class Operation:
  """One operation of the program that each device runs.

  Attributes:
    kind: XLA's opcode, such as 'fusion' or 'all-to-all'; the -start of a pair is dropped.
    source: the path of JAX names it comes from.
    arrays: (dtype, shape) of each result.
    times: how often it runs, by the trip counts of the loops around it.
    cycles: estimated, of one run; None where the compiler gives none.
    matmul: does it multiply matrices?
    ways: devices that a collective spans; 1 for other operations.
  """

  kind: str
  source: str
  arrays: tuple[tuple[str, tuple[int, ...]], ...]
  times: int
  cycles: int | None
  matmul: bool
  ways: int

  @property
  def bytes(self) -> int:
    """Of all results of one run, on one device."""
    return sum(_bits(dtype) * math.prod(shape) // 8 for dtype, shape in self.arrays)

  @property
  def wire_bytes(self) -> float:
    """That one device sends in one run, by the best algorithm on a ring: 0 for what is no collective."""
    others = (self.ways - 1) / self.ways
    match self.kind:
      case 'all-to-all' | 'ragged-all-to-all' | 'all-gather':
        return self.bytes * others
      case 'all-reduce':
        return 2 * self.bytes * others
      case 'reduce-scatter':
        return self.bytes * (self.ways - 1)
      case 'collective-permute':
        return self.bytes
    return 0


def _bits(dtype: str) -> int:
  """Of one number."""
  return _BITS.get(dtype) or int((re.search(r'\d+', dtype) or ['0'])[0])


def operations(text: str) -> list[Operation]:
  """All operations of a compiled program, in order, loops unfolded into `times`.

  Args:
    text: `jax.jit(f).lower(...).compile().as_text()`.
  """
  entry, bodies = _computations(text)
  return list(_walk(entry, bodies, 1))


def collectives(operations: Iterable[Operation]) -> list[Operation]:
  """Those that move data between devices."""
  return [operation for operation in operations if operation.kind in COLLECTIVES and operation.ways > 1]


def cycles(operations: Iterable[Operation], matmul: bool) -> int:
  """The sum of estimates: of matmuls and what is fused with them, or of all else."""
  return sum(op.times * op.cycles for op in operations if op.cycles is not None and op.matmul == matmul)


def uncosted_bytes(operations: Iterable[Operation]) -> int:
  """Bytes written by what has no estimate, collectives apart: sorts, gathers, scatters, kernels; on chip or off it."""
  return sum(op.times * op.bytes for op in operations if op.cycles is None and op.kind not in COLLECTIVES)


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
  """The name of the entry, and the lines of every computation."""
  entry, bodies, current = '', {}, None
  for line in text.splitlines():
    if current is None or not line.startswith(' '):
      if found := _COMPUTATION.match(line):
        current = bodies.setdefault(found[2], [])
        entry = found[2] if found[1] else entry
      elif line.startswith('}'):
        current = None
      elif current and line.strip():  # attributes of kernels go over several lines
        current[-1] += line
    elif _INSTRUCTION.match(line) or not current:
      current.append(line)
    else:
      current[-1] += line
  return entry, bodies


def _walk(name: str, bodies: dict[str, list[str]], times: int) -> Iterator[Operation]:
  """The operations of a computation and of all that it calls."""
  for line in bodies[name]:
    if not (found := _INSTRUCTION.match(line)):
      continue
    _, results, kind, rest = found.groups()
    called = _called(rest, bodies)
    targets = set(_TARGET.findall(rest))
    if kind == 'fusion':
      targets |= {target for body in called for inner in bodies[body] for target in _TARGET.findall(inner)}
    if 'AsyncCollectiveStart' in targets:  # then steps of it are hidden in other fusions, which hand its buffers on
      yield from (op for body in called for op in _walk(body, bodies, times) if op.kind in COLLECTIVES)
    opcode, estimate = kind.removesuffix('-start'), _CYCLES.search(rest)
    if kind in _FREE or kind.endswith(('-done', '-update')) or (targets & _FREE_TARGETS and not estimate):
      continue
    if kind in ('while', 'call', 'conditional', 'async-start'):
      trips = int(found[1]) if kind == 'while' and (found := _TRIPS.search(rest)) else 1
      for body in called:
        yield from _walk(body, bodies, times * trips)
      continue
    arrays = tuple((d, tuple(map(int, filter(None, s.split(','))))) for d, s in _ARRAY.findall(_untiled(results)))
    if kind != opcode and len(arrays) > 1:  # (operands, results, ...)
      arrays = arrays[1:2]
    yield Operation(
      kind=opcode,
      source=found[1] if (found := _SOURCE.search(rest)) else '',
      arrays=arrays,
      times=times,
      cycles=int(estimate[1]) if estimate else None,
      matmul=_multiplies(kind, called, bodies),
      ways=_ways(rest) if opcode in COLLECTIVES else 1,
    )


def _untiled(shapes: str) -> str:
  """Without layouts, as in {1,0:T(8,128)S(1)}."""
  return re.sub(r'\{[^{}]*\}', '', shapes)


def _called(attributes: str, bodies: dict[str, list[str]]) -> list[str]:
  """The computations that an instruction calls."""
  names = [name.strip().lstrip('%') for group in _CALLED.findall(attributes) for name in group.split(',')]
  return [name for name in names if name in bodies]


def _multiplies(kind: str, called: Sequence[str], bodies: dict[str, list[str]]) -> bool:
  """Whether it is a matrix product, or a fusion around one."""
  inside = [found for body in called for line in bodies[body] if (found := _INSTRUCTION.match(line))]
  return kind in ('dot', 'convolution') or any(
    _multiplies(found[3], _called(found[4], bodies) if found[3] == 'fusion' else [], bodies) for found in inside
  )


def _ways(attributes: str) -> int:
  """How many devices take part, from any of the three ways in which XLA writes groups of devices."""
  if found := re.search(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}', attributes):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
  if found := re.search(r'replica_groups=\[\d+,(\d+)\]<=', attributes):
    return int(found[1])
  if found := re.search(r'replica_groups=\{\{([\d,]*)\}', attributes):
    return len(found[1].split(','))
  if found := re.search(r'source_target_pairs=\{(.*?)\}\}', attributes):
    return found[1].count('{')
  return 1
