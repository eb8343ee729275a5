"""What each dispatcher costs beside the bare expert matmuls: one layer, forward and backward.

python tests/benchmarks/dispatchers.py --on cpu|fake|tpu|gpu [--dispatchers NAME ...] [--cases NAME ...] [--json FILE]

See README.md beside this file for the method.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax

from moe_jax import sharding
from moe_jax.analysis.chips import read_topology, topology_devices
from moe_jax.analysis.compiled import collectives, cycles, operations, uncosted_bytes
from moe_jax.moe.dispatchers.base import Dispatcher
from tests.benchmarks.expert_layer import Program, Shape, bare_program, dense_program, layer_program

Row = dict[str, Any]

TPU = functools.partial(Shape, width=2048, batch=256, length=1024, group=1024)
TPU_CASES = {
  'top-2': TPU(64, 2, hidden=8192),
  'top-1': TPU(64, 1, hidden=8192),
  'fine': TPU(256, 8, hidden=2048),
  'gated': TPU(64, 2, hidden=5504, activations=('silu', 'linear')),
  'top-2, groups of 128': TPU(64, 2, hidden=8192, group=128),
  **{f'{e} experts': TPU(e, 2, hidden=8192) for e in (8, 16, 32, 64, 128, 256, 512)},
  **{f'{e} fine experts': TPU(e, e // 4, hidden=2**16 // e) for e in (8, 16, 32, 64)},
}
GPU_PEAK = {'H100': 9.89e14, 'H200': 9.89e14, 'A100': 3.12e14}  # bfloat16 FLOP/s


def cpu_cases(groups: Sequence[int] = (512, 4096), tokens: int = 4096) -> dict[str, Shape]:
  """Widths fall as experts and choices grow, so that weights fit and a call takes about a second."""
  cases = {}
  for e in (8, 32, 128, 512):
    for k in (1, 2, 8):
      for group in groups:
        hidden = min(2048 // k, 2**17 // e)
        shape = Shape(e, k, 512, hidden, tokens // group, group, group, capacity_rule='megablocks', dtype='float32')
        cases[f'E={e} k={k} group={group}'] = shape
  return cases


def dispatcher(name: str) -> Dispatcher:
  """The function of that name in the module of that name."""
  return getattr(importlib.import_module(f'moe_jax.moe.dispatchers.{name}'), name)


def programs(shape: Shape, names: Sequence[str], dense: bool = True) -> Iterator[tuple[str, Program | str]]:
  """The limit, the dense layer, and each dispatcher; or why not."""
  yield 'bare', bare_program(shape)
  if dense:
    yield 'dense', dense_program(shape)
  for name in names:
    one_hot = shape.batch * shape.length * shape.experts * shape.capacity * 4
    if name == 'einsum' and one_hot > 2**31:
      yield name, f'its one-hot arrays take {one_hot / 2**30:.0f} GiB each'
    else:
      yield name, layer_program(shape, dispatcher(name))


# ---- Run ------------------------------------------------------------------------------------------------------------


def run_case(shape: Shape, names: Sequence[str], rounds: int) -> list[Row]:
  """Times the systems in turn, round by round."""
  rows, calls = [], {}
  for name, program in programs(shape, names):
    if isinstance(program, str):
      rows.append({'system': name, 'skipped': program})
      continue
    compiled, key = program.compile(), iter(jax.random.split(jax.random.key(0), 99))
    arguments = jax.tree.map(
      lambda s, key=key: jax.device_put(0.05 * jax.random.normal(next(key), s.shape, s.dtype), s.sharding),
      program.arguments,
    )
    calls[name] = functools.partial(compiled, *arguments)
    flops = compiled.cost_analysis()['flops'] * (jax.device_count() if shape_is_split() else 1)
    # XLA counts the body of a loop once, however often it runs.
    rows.append({'system': name, 'flops': None if ' while(' in compiled.as_text() else flops / shape.flops})
  seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
  for turn in range(rounds + 1):
    for name, call in calls.items():
      cpu, wall = time.process_time(), time.perf_counter()
      jax.block_until_ready(call())
      if turn:  # the first warms up
        seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
  for row in rows:
    if row['system'] in calls:
      pairs = list(zip(seconds[row['system']], seconds['bare'], strict=True))
      row['cpu'], row['wall'] = (statistics.median(mine[i] / its[i] for mine, its in pairs) for i in (0, 1))
      row['seconds'] = statistics.median(mine[1] for mine, _ in pairs)
      row['flop_per_s'] = shape.flops / row['seconds']
  return rows


def shape_is_split() -> bool:
  """Whether programs are compiled for several devices, each counting its own part."""
  return not jax.sharding.get_abstract_mesh().empty


def on_cpu(flags: argparse.Namespace) -> Iterator[Row]:
  """One device."""
  for case, shape in chosen(cpu_cases(), flags.cases).items():
    for row in run_case(shape, flags.dispatchers, flags.rounds):
      if row['system'] == 'einsum':  # S E C M twice for dispatch and thrice for combine, forward and backward
        row['formula'] = 1 + 10 * shape.group / (6 * shape.hidden * (len(shape.activations) + 1))
      yield {'case': case, **row}


def on_fake(flags: argparse.Namespace) -> Iterator[Row]:
  """Eight devices that are one."""
  jax.config.update('jax_num_cpu_devices', 8)
  shapes = {name: dataclasses.replace(s, batch=8, group=512, length=512) for name, s in cpu_cases((512,)).items()}
  for case, shape in chosen(shapes, flags.cases).items():
    for sizes in flags.meshes or [(2, 4, 1), (1, 8, 1), (2, 2, 2)]:
      with mesh(sizes):
        for row in run_case(shape, flags.dispatchers, flags.rounds):
          yield {'case': case, 'mesh': 'x'.join(map(str, sizes)), **row}


def on_gpu(flags: argparse.Namespace) -> Iterator[Row]:
  """One GPU, bfloat16."""
  if jax.default_backend() != 'gpu':
    raise SystemExit(f'No GPU here: JAX sees {jax.default_backend()}.')
  kind = jax.devices()[0].device_kind
  peak = next((flops for name, flops in GPU_PEAK.items() if name in kind), None)
  shapes = {f'E={e} k=2': Shape(e, 2, 2048, 4096, 16, 1024, 1024) for e in (8, 32, 64)}
  for case, shape in chosen(shapes, flags.cases).items():
    for row in run_case(shape, flags.dispatchers, flags.rounds):
      if 'seconds' in row:
        row['tokens_per_s'] = shape.batch * shape.length / row['seconds']
        row['mfu'] = peak and row['flop_per_s'] / peak
      yield {'case': f'{case} on {kind}', **row}


# ---- Compile --------------------------------------------------------------------------------------------------------


def on_tpu(flags: argparse.Namespace) -> Iterator[Row]:
  """What the compiler says of one chip of a slice."""
  chip, devices = read_topology(flags.topology)[0], topology_devices(flags.topology)
  for case, shape in chosen(TPU_CASES, flags.cases or list(TPU_CASES)[:4]).items():
    shape = dataclasses.replace(shape, batch=len(devices))
    for sizes in flags.meshes or [(len(devices) // e, e, 1) for e in {16, min(shape.experts, 64)}]:
      bare = 0.0
      with mesh(sizes, devices):
        for name, program in programs(shape, flags.dispatchers, dense=False):
          compiled = program.compile(dict(chip.options))
          ops = operations(compiled.as_text())
          matmul, other = (1e3 * cycles(ops, matmul=m) / chip.clock for m in (True, False))
          bare = bare or matmul + other
          yield {
            'case': case,
            'mesh': 'x'.join(map(str, sizes)),
            'system': name,
            'matmul_ms': matmul,
            'other_ms': other,
            'ratio': (matmul + other) / bare,
            'uncosted_ms': 1e3 * uncosted_bytes(ops) / chip.memory_speed,
            'temporary_mib': compiled.memory_analysis().temp_size_in_bytes / 2**20,
            'collectives': ', '.join(f'{op.kind} {op.wire_bytes / 2**20:.1f}/{op.ways}' for op in collectives(ops)),
          }


# ---- Tell -----------------------------------------------------------------------------------------------------------


def mesh(sizes: Sequence[int], devices: Any = None) -> Any:
  """Enters a mesh of data x expert x model."""
  shape = dict(zip(('data', 'expert', 'model'), sizes, strict=True))
  return sharding.activate(sharding.make_mesh(shape, devices), sharding.replicated_rules())


def chosen(cases: Mapping[str, Shape], names: Sequence[str] | None) -> dict[str, Shape]:
  """Those whose name is given, or begins so."""
  return {case: shape for case, shape in cases.items() if not names or any(case.startswith(name) for name in names)}


def line(cells: Sequence[Any]) -> str:
  """Of a table in Markdown."""
  texts = ['' if x is None else f'{x:.3g}' if isinstance(x, float) else str(x) for x in cells]
  return f'| {" | ".join(texts)} |'


def main() -> None:
  """Prints the table as it grows, and writes it."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  modes = {'cpu': on_cpu, 'fake': on_fake, 'tpu': on_tpu, 'gpu': on_gpu}
  parser.add_argument('--on', choices=modes, required=True)
  parser.add_argument('--dispatchers', nargs='+', default=['einsum', 'gather', 'all_to_all', 'ragged'])
  parser.add_argument('--cases', nargs='+', help='only those whose names begin so')
  parser.add_argument('--meshes', nargs='+', type=lambda text: tuple(map(int, text.split('x'))), help='such as 4x64x1')
  parser.add_argument('--topology', default='v5e:16x16', help='such as v5p:8x8x4')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--json', type=pathlib.Path, help='where to write the rows too')
  flags = parser.parse_args()
  if flags.on != 'gpu':
    jax.config.update('jax_platforms', 'cpu')
  rows: list[Row] = []
  columns: list[str] = []
  for row in modes[flags.on](flags):
    rows.append(row)
    if new := [key for key in row if key not in columns]:
      columns += new
      print(f'\n{line(columns)}\n{line(["---"] * len(columns))}')
    print(line([row.get(column) for column in columns]), flush=True)
    if flags.json:
      flags.json.write_text(json.dumps(rows, indent=1))


if __name__ == '__main__':
  main()
