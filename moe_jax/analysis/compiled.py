"""What a compiled program does on each device, read from its text: matmuls, other work, and collectives.

The TPU compiler writes an estimate of cycles next to almost every operation, and works without a TPU. Matmul estimates
are good; those of other operations are high where they are bound by memory, and sorts, gathers, scatters and Pallas
kernels have none: these are counted in bytes instead.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

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
_CALLED = re.compile(
  r'(?:calls|to_apply|body|(?:called|branch)_computations|(?:true|false)_computation)=\{?((?:%?[\w.-]+(?:, )?)+)'
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_PARTITIONS = re.compile(r'num_partitions=(\d+)')
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_TABLE = re.compile(r'^(FileNames|FileLocations|StackFrames)\n((?:\d+ .*\n)*)', re.MULTILINE)
_FREE_TARGETS = {'ConcatBitcast', 'AsyncCollectiveStart', 'AsyncCollectiveDone'}


@dataclasses.dataclass(frozen=True)
class Operation:
  """One operation of the program that each device runs.

  Attributes:
    kind: XLA's opcode, such as 'fusion' or 'all-to-all'; the -start of a pair is dropped.
    source: the path of JAX names it comes from.
    arrays: (dtype, shape) of each result; of a transfer between slices, of each operand.
    times: how often it runs, by the trip counts of the loops around it.
    cycles: estimated, of one run; None where the compiler gives none.
    matmul: does it multiply matrices?
    group: of a collective, devices that take part together, by their place in the mesh; of all such groups the first.
    slow: whether it goes over the network between slices. Then `group` is left empty.
    slices: that take part, where it does.
    line: where in the code it comes from, as 'file.py:12'; '' where the compiler does not say.
  """

  kind: str
  source: str
  arrays: tuple[tuple[str, tuple[int, ...]], ...]
  times: int
  cycles: int | None
  matmul: bool
  group: tuple[int, ...] = ()
  slow: bool = False
  slices: int = 1
  line: str = ''

  @property
  def ways(self) -> int:
    """Devices that a collective spans, or slices; 1 for other operations."""
    return self.slices if self.slow else max(1, len(self.group))

  @property
  def bytes(self) -> int:
    """Of all results of one run, on one device."""
    return sum(_bits(dtype) * math.prod(shape) // 8 for dtype, shape in self.arrays)

  @property
  def wire_bytes(self) -> float:
    """That one device sends in one run, by the best algorithm on a ring: 0 for what is no collective."""
    others = (self.ways - 1) / self.ways
    if self.slow and self.kind in ('all-gather', 'reduce-scatter'):  # `arrays` are what is sent, not what comes of it
      return self.bytes * (self.ways - 1 if self.kind == 'all-gather' else others)
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
  program = _Program(bodies, _lines(text), int(found[1]) if (found := _PARTITIONS.search(text)) else 1)
  return list(_walk(entry, program, 1))


def collectives(operations: Iterable[Operation]) -> list[Operation]:
  """Those that move data between devices."""
  return [operation for operation in operations if operation.kind in COLLECTIVES and operation.ways > 1]


def cycles(operations: Iterable[Operation], matmul: bool) -> int:
  """The sum of estimates: of matmuls and what is fused with them, or of all else."""
  costed = (op for op in operations if op.cycles is not None and op.kind not in COLLECTIVES and op.matmul == matmul)
  return sum(op.times * op.cycles for op in costed if op.cycles is not None)


def uncosted_bytes(operations: Iterable[Operation]) -> int:
  """Bytes written by what has no estimate, collectives apart: sorts, gathers, scatters, kernels; on chip or off it."""
  return sum(op.times * op.bytes for op in operations if op.cycles is None and op.kind not in COLLECTIVES)


class _Program(NamedTuple):
  """Attributes: bodies, the lines of every computation; lines, where each stack frame is; devices, that run it."""

  bodies: Mapping[str, list[str]]
  lines: Mapping[str, str]
  devices: int


def _lines(text: str) -> dict[str, str]:
  """Stack frame -> 'file.py:12', the innermost place outside of installed packages."""
  tables: dict[str, dict[str, str]] = {}
  for name, body in _TABLE.findall(text):
    tables[name] = dict(line.split(' ', 1) for line in body.strip().splitlines() if ' ' in line)
  files = {number: name.strip('"') for number, name in tables.get('FileNames', {}).items()}

  def place(frame: str) -> str:
    while frame in tables['StackFrames']:
      found = dict(re.findall(r'(\w+)=(\d+)', tables['StackFrames'][frame]))
      where = dict(re.findall(r'(\w+)=(\d+)', tables['FileLocations'].get(found['file_location_id'], '')))
      name = files.get(where.get('file_name_id', ''), '')
      if name and 'site-packages' not in name:
        return f'{name}:{where["line"]}'
      parent = found.get('parent_frame_id', '0')
      frame = '' if parent == frame else parent
    return ''

  return {frame: place(frame) for frame in tables.get('StackFrames', {})}


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


def _walk(name: str, program: _Program, times: int) -> Iterator[Operation]:
  """The operations of a computation and of all that it calls."""
  bodies = program.bodies
  for line in bodies[name]:
    if not (found := _INSTRUCTION.match(line)):
      continue
    _, results, kind, rest = found.groups()
    called = _called(rest, bodies)
    targets = set(_TARGET.findall(rest))
    if kind == 'fusion':
      targets |= {target for body in called for inner in bodies[body] for target in _TARGET.findall(inner)}
    if 'AsyncCollectiveStart' in targets:  # then steps of it are hidden in other fusions, which hand its buffers on
      yield from (op for body in called for op in _walk(body, program, times) if op.kind in COLLECTIVES)
    if fused := [body for body in called if body.startswith('all-reduce-scatter')]:
      kind, rest = 'reduce-scatter', rest + next((line for line in bodies[fused[0]] if ' all-reduce(' in line), '')
    opcode, estimate = kind.removesuffix('-start'), _CYCLES.search(rest)
    if kind == 'send' and (transfer := _BETWEEN_SLICES.search(rest)):
      opcode = transfer[1].lower().replace('_', '-')
    elif kind in ('send', 'recv'):
      continue
    if kind in _FREE or kind.endswith(('-done', '-update')) or (targets & _FREE_TARGETS and not estimate):
      continue
    if kind in ('while', 'call', 'conditional', 'async-start'):
      trips = _trips(rest, bodies[name], bodies) if kind == 'while' else 1
      if trips is None:  # told as an operation without cycles
        yield Operation('while', found[1] if (found := _SOURCE.search(rest)) else '', (), times, None, False)
      inside = [list(_walk(body, program, times * (trips or 1))) for body in called]
      if kind == 'conditional':  # of its branches the one that costs most
        inside = [max(inside, key=lambda ops: sum(op.times * (op.cycles or 0) for op in ops), default=[])]
      yield from (op for ops in inside for op in ops)
      continue
    arrays = tuple((d, tuple(map(int, filter(None, s.split(','))))) for d, s in _ARRAY.findall(_untiled(results)))
    if kind == 'send':  # (operand, context, token)
      arrays = arrays[:1]
    elif kind != opcode and opcode != 'all-reduce':  # (operands, results, flags), but of an all-reduce the results
      arrays = tuple(array for array in arrays if array != ('u32', ()))
      arrays = arrays[len(arrays) // 2 :]
    yield Operation(
      kind=opcode,
      source=found[1] if (found := _SOURCE.search(rest)) else '',
      arrays=arrays,
      times=times,
      cycles=int(estimate[1]) if estimate else None,
      matmul=_multiplies(kind, called, bodies),
      group=_group(rest, program.devices) if opcode in COLLECTIVES and kind != 'send' else (),
      slow=kind == 'send',
      slices=_slices(rest) if kind == 'send' else 1,
      line=_line(rest, program.lines),
    )


def _trips(attributes: str, around: Sequence[str], bodies: Mapping[str, list[str]]) -> int | None:
  """How often a loop runs: as the compiler says, or by its condition, a counter from one constant up to another."""
  if found := _TRIPS.search(attributes):
    return int(found[1])
  start = re.match(r'%?([\w.-]+)\)', attributes)
  condition = re.search(r'condition=%?([\w.-]+)', attributes)
  if not start or not condition or condition[1] not in bodies:
    return None
  inside, outside = _by_name(bodies[condition[1]]), _by_name(around)
  compared = next((rest for kind, rest in inside.values() if kind == 'compare'), None)
  if compared is None:
    return None
  names = re.findall(r'%?([\w.-]+)', compared.split(')')[0])
  index = re.search(r'index=(\d+)', inside.get(names[0], ('', ''))[1])
  _, carried = outside.get(start[1], ('', ''))
  begin = re.findall(r'%?([\w.-]+)', carried.split(')')[0])
  if 'direction=LT' not in compared or not index or int(index[1]) >= len(begin):
    return None
  bound, first = _constant(names[1], inside), _constant(begin[int(index[1])], outside)
  return None if bound is None or first is None or bound < first else bound - first


def _by_name(lines: Sequence[str]) -> dict[str, tuple[str, str]]:
  """Name of an instruction -> opcode, and what follows it."""
  return {found[1]: (found[3], found[4]) for line in lines if (found := _INSTRUCTION.match(line))}


def _constant(name: str, instructions: Mapping[str, tuple[str, str]]) -> int | None:
  """The whole number that a name stands for, or None."""
  kind, rest = instructions.get(name, ('', ''))
  if kind == 'constant' and (found := re.match(r'(-?\d+)\)', rest)):
    return int(found[1])
  if kind in ('copy', 'bitcast'):
    return _constant(re.match(r'%?([\w.-]+)', rest)[1], instructions)  # type: ignore[index]
  return None


def _untiled(shapes: str) -> str:
  """Without layouts, as in {1,0:T(8,128)S(1)}."""
  return re.sub(r'\{[^{}]*\}', '', shapes)


def _called(attributes: str, bodies: Mapping[str, list[str]]) -> list[str]:
  """The computations that an instruction calls."""
  names = [name.strip().lstrip('%') for group in _CALLED.findall(attributes) for name in group.split(',')]
  return [name for name in names if name in bodies]


def _multiplies(kind: str, called: Sequence[str], bodies: Mapping[str, list[str]]) -> bool:
  """Whether it is a matrix product, or a fusion around one."""
  inside = [found for body in called for line in bodies[body] if (found := _INSTRUCTION.match(line))]
  return kind in ('dot', 'convolution') or any(
    _multiplies(found[3], _called(found[4], bodies) if found[3] == 'fusion' else [], bodies) for found in inside
  )


def _line(attributes: str, lines: Mapping[str, str]) -> str:
  """Where an instruction comes from; older compilers write it out, newer ones point to a stack frame."""
  if found := re.search(r'stack_frame_id=(\d+)', attributes):
    return lines.get(found[1], '')
  found = re.search(r'source_file="([^"]*)" source_line=(\d+)', attributes)
  return f'{found[1]}:{found[2]}' if found else ''


def _slices(attributes: str) -> int:
  """How many slices a transfer between slices has for its targets, as in _xla_megascale_target="{1,2}x{0:15}"."""
  found = re.search(r'_xla_megascale_target="\{([^}]*)\}', attributes)
  ends = [list(map(int, part.split(':'))) for part in found[1].split(',')] if found else [[0]]
  return sum(part[-1] - part[0] + 1 for part in ends)


def _group(attributes: str, devices: int) -> tuple[int, ...]:
  """The first group of devices, from any of the ways in which XLA writes them."""
  if found := re.search(r'replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}', attributes):
    sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    axes, names = re.findall(r"'(\w+)'", found[3]), list(sizes)
    order = _iota(found[2]) if '<=' in found[2] else np.arange(math.prod(sizes.values()))
    inside = tuple(slice(None) if name in axes else 0 for name in names)
    return tuple(int(i) for i in order.reshape(tuple(sizes.values()))[inside].reshape(-1))
  if found := re.search(r'replica_groups=(\[\d+,\d+\]<=\[[\d,]+\](?:T\([\d,]+\))?)', attributes):
    return tuple(int(i) for i in _iota(found[1])[0])
  if found := re.search(r'replica_groups=\{\{([\d,]*)\}', attributes):
    return tuple(map(int, found[1].split(',')))
  if 'replica_groups={}' in attributes:
    return tuple(range(devices))
  if found := re.search(r'source_target_pairs=\{(.*?)\}\}', attributes):
    targets = {int(a): int(b) for a, b in re.findall(r'(\d+),(\d+)', found[1]) if a != b}
    chain = list(targets)[:1]
    while chain and (following := targets.get(chain[-1], chain[0])) not in chain:
      chain.append(following)
    return tuple(chain)
  return ()


def _iota(text: str) -> np.ndarray:
  """Device numbers as in [2,4]<=[4,2]T(1,0): those of the shape on the right, transposed, in the shape on the left."""
  shape, dims, order = (
    [int(n) for n in re.findall(r'\d+', part or '')]
    for part in re.search(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text).groups()  # type: ignore[union-attr]
  )
  ids = np.arange(math.prod(dims)).reshape(dims)
  return ids.transpose(order or range(len(dims))).reshape(shape)
