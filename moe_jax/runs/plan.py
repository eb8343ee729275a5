"""A compile plan: the real step compiled for a TPU that is not there, and what it would hold, compute and send."""

import json
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from moe_jax import sharding
from moe_jax.analysis.chips import Chip, chip_of
from moe_jax.analysis.compiled import COLLECTIVES, Operation, cycles, operations
from moe_jax.analysis.flops import count_flops, model_flops
from moe_jax.analysis.forward_pass import trace_forward
from moe_jax.analysis.parameters import bytes_per_device, count_parameters, dispatch_bytes
from moe_jax.analysis.step_time import describe_axes, step_seconds
from moe_jax.objectives import LanguageModeling
from moe_jax.runs import plan_page
from moe_jax.runs.progress import compiling, say
from moe_jax.runs.setup import Data, Devices, Program, at_least_one, build, compiled_step, open_model_dir
from moe_jax.training.state import OptimizerFactory
from moe_jax.types import ConfigError

PyTree = Any
TOP = 10  # operations that are shown


def plan(
  model_dir: str,
  objective: LanguageModeling,
  optimizer: OptimizerFactory,
  data: Data,
  devices: Devices,
  step: str = 'train',
  microbatches: int = 1,
  max_new_tokens: int = 1024,
  trainable: Sequence[str] = (),
  config: str = '',
) -> dict[str, Any]:
  """Compiles a step and tells what it takes, per chip.

  Args:
    model_dir: where plan.json, plan.html and plan.gin, the configuration, go.
    objective: model and loss.
    optimizer: makes the optimizer, whose state and update are part of the training step.
    data: for the shapes of a batch; nothing is read.
    devices: what to compile for, see `Devices.topology`.
    step: 'train', or 'decode': one more token for each of a batch of texts, given their cache.
    microbatches: pieces of each batch, to save memory.
    max_new_tokens: of 'decode', the room in the cache behind the input.
    trainable: which parameters, see `optimizers.trainable_mask`; () is all.
    config: the operative configuration.

  Returns:
    What plan.json holds; bytes, FLOPs, cycles and seconds are those of one chip. None is what is not known: what only a
    compiled program tells, of a step that does not fit, and cycles and seconds of other devices than TPUs.

  Raises:
    ConfigError: if the pieces do not fit together, or the topology cannot be compiled for.
  """
  at_least_one(MICROBATCHES=microbatches, MAX_NEW_TOKENS=max_new_tokens, BATCH_SIZE=data.batch_size)
  if step not in ('train', 'decode'):
    raise ConfigError(f"STEP={step!r} is none of 'train', 'decode'.")
  program = build(objective, optimizer, data, devices, microbatches=microbatches)
  folder = open_model_dir(model_dir)  # not before: it starts JAX, and `build` says on which devices
  mesh, chip = program.mesh, chip_of(program.mesh.devices.flat[0])
  with program.activate():
    if step == 'decode' and sharding.shards('length') > 1:
      raise ConfigError("STEP='decode' makes no use of the mesh axis sequence: give its devices to data or expert.")
    if step == 'train':
      function, args = compiled_step(program, objective, microbatches, trainable), (program.state_spec, _batch(program))
    else:
      function, args = decode_step(program, max_new_tokens)
    traced = function.trace(*args)
    forward = trace_forward(objective.model, program.batch_spec)
    count = count_parameters(forward)
    piece = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((x.shape[0] // microbatches, *x.shape[1:]), x.dtype), program.batch_spec
    )
    micro = forward if microbatches == 1 or step == 'decode' else trace_forward(objective.model, piece)
    result: dict[str, Any] = {
      'topology': devices.topology or f'{mesh.size} {mesh.devices.flat[0].device_kind}',
      'step': step,
      'num_devices': mesh.size,
      'mesh': program.mesh_axes,
      'batch_size': data.batch_size,
      'microbatches': microbatches,
      'lengths': dict(data.lengths),
      'parameters': count.total,
      'active_parameters': count.active,
      'hbm_bytes': chip and chip.memory,
      'bytes': {
        'params': bytes_per_device(program.state_spec.params),
        'optimizer': bytes_per_device(program.state_spec.opt_state) if step == 'train' else 0,
        'temporaries': None,
        'dispatch_buffers': dispatch_bytes(micro.exchanges) if step == 'train' else None,
        'total': None,
      },
      'flops': count_flops(traced) // mesh.size,
      'mfu': None,
      'mfu_serial': None,
    }
    say(f'{count.total:,} parameters, {count.active:,} active per token')
    say(f'{result["topology"]}: {mesh.size} devices, mesh {program.mesh_axes}')
    started = time.perf_counter()
    with compiling(f'compiling the {step} step'):
      lowered = traced.lower()
      try:
        compiled = lowered.compile()
      except jax.errors.JaxRuntimeError as error:
        compiled = None
        result['bytes'] |= wanted_bytes(error, result['bytes']['params'] + result['bytes']['optimizer'])
    result['compile_seconds'] = round(time.perf_counter() - started, 1)
  if compiled is None:
    result |= dict.fromkeys(('cycles', 'matmul_cycles', 'uncosted', 'collectives', 'step_seconds', 'top_operations'))
    result['fits'] = False
  else:
    result |= measures(operations(compiled.as_text()), mesh, chip, result['flops'])
    result['bytes'] |= held_bytes(compiled)
    result['fits'] = None if chip is None else result['bytes']['total'] <= chip.memory
    if chip and step == 'train':
      ideal = model_flops(forward) / (mesh.size * chip.peak)
      result |= {f'mfu{k}': ideal / result['step_seconds'][n] for k, n in [('', 'overlapped'), ('_serial', 'serial')]}
  result['advice'] = advice(result)
  (folder / 'plan.json').write_text(json.dumps(result, indent=2))
  (folder / 'plan.gin').write_text(config)
  plan_page.write(result, folder / 'plan.html')
  plan_page.show(result)
  say(f'\nplan: {folder / "plan.html"}')
  return result


def held_bytes(compiled: Any) -> dict[str, int]:
  """What one device holds while a compiled program runs: its temporaries, and all with arguments, results and code."""
  memory = compiled.memory_analysis()
  kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  temporaries = memory.temp_size_in_bytes
  return {'temporaries': temporaries, 'total': kept + temporaries + memory.generated_code_size_in_bytes}


def _batch(program: Program) -> dict[str, jax.ShapeDtypeStruct]:
  """The batch's shapes, and where its rows live."""
  rows = sharding.named_sharding(program.mesh, 'batch', None)
  return {name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=rows) for name, s in program.batch_spec.items()}


def decode_step(program: Program, max_new_tokens: int) -> tuple[Any, tuple[PyTree, ...]]:
  """One more token for every row of a batch: the jitted function, and shapes of variables, cache and tokens."""
  model, batch = program.objective.model, _batch(program)
  variables = {'params': program.state_spec.params, **program.state_spec.variables}
  names = ('input_tokens', 'segment_ids', 'positions')
  prompt = {k: s for k, s in batch.items() if k.removeprefix('decoder_').removeprefix('encoder_') in names}
  slots = prompt['decoder_input_tokens'].shape[1] + max_new_tokens

  @sharding.whole_sequences()
  def begin(variables: PyTree, batch: PyTree) -> PyTree:
    encoded, _ = model.apply(variables, batch, method='encode')
    return model.apply(variables, batch, encoded, cache_length=slots, method='decode', mutable=['cache'])[1]

  @sharding.whole_sequences()
  def extend(variables: PyTree, cache: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
    (logits, _), cache = model.apply(
      {**variables, **cache}, batch, None, cache_length=slots, method='decode', mutable=['cache']
    )
    return jnp.argmax(logits[:, -1], axis=-1), cache

  def place(box: Any) -> Any:
    if not isinstance(box, nn.LogicallyPartitioned):
      return jax.ShapeDtypeStruct(box.shape, box.dtype, sharding=program.everywhere)
    where = NamedSharding(program.mesh, sharding.spec(*box.names))
    return box.replace(value=jax.ShapeDtypeStruct(box.value.shape, box.value.dtype, sharding=where))

  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
  cache = jax.tree.map(place, jax.eval_shape(begin, variables, prompt), is_leaf=is_box)
  token = {
    name: jax.ShapeDtypeStruct((s.shape[0], 1), s.dtype, sharding=s.sharding)
    for name, s in prompt.items()
    if name.startswith('decoder_')
  }
  token |= {name: s for name, s in prompt.items() if name == 'encoder_segment_ids'}
  return jax.jit(extend, donate_argnums=1), (variables, cache, token)


def wanted_bytes(error: Exception, kept: int) -> dict[str, int]:
  """What a program wants that the compiler found too large, by its message; nothing where that does not say.

  Args:
    error: of the compiler.
    kept: bytes of what the program is given, which the compiler may leave out.

  Raises:
    ConfigError: if it failed for another reason.
  """
  message = str(error)
  if 'RESOURCE_EXHAUSTED' not in message or 'memory space vmem' in message:  # on the chip
    raise ConfigError(f'The compiler refuses this program: {message.splitlines()[0]}') from error
  if found := re.search(r'Used ([\d.]+)([KMGT]?) of \S+ hbm', message):
    return {'total': _read_size(*found.groups())}
  if found := re.search(r'temporaries \(([\d.]+)([KMGT]?)\) exceed', message):
    temporaries = _read_size(*found.groups())
    return {'temporaries': temporaries, 'total': temporaries + kept}
  return {}


def _read_size(number: str, unit: str) -> int:
  return round(float(number) * 1024 ** ' KMGT'.index(unit or ' '))


def measures(ops: Sequence[Operation], mesh: jax.sharding.Mesh, chip: Chip | None, flops: float) -> dict[str, Any]:
  """What `plan.json` says of a compiled program."""
  moved, uncosted, sources = _Table(), _Table(), _Table()
  for op in ops:
    if op.kind in COLLECTIVES and op.ways > 1:
      axis = describe_axes(op, mesh.devices.shape, mesh.axis_names)
      moved.add((op.kind, axis, op.ways, 'dcn' if op.slow else 'ici'), op.times, op.times * op.wire_bytes)
    elif op.cycles is None and op.kind not in COLLECTIVES:
      uncosted.add((op.kind,), op.times, op.times * op.bytes)
    elif op.cycles is not None:
      name = op.source.split('/')[-1] or op.kind  # what the compiler put in itself has no source
      sources.add((shorter(op.line), name), op.times, op.times * op.cycles)
  seconds = step_seconds(ops, chip, list(mesh.devices.flat), flops) if chip else None
  matmuls, others = (cycles(ops, matmul=matmul) for matmul in (True, False))
  return {
    'cycles': matmuls + others or None,
    'matmul_cycles': matmuls or None,
    'uncosted': uncosted.rows(('kind',), 'bytes'),
    'collectives': moved.rows(('kind', 'axis', 'group_size', 'link'), 'wire_bytes'),
    'step_seconds': seconds and {**seconds._asdict(), 'serial': seconds.serial, 'overlapped': seconds.overlapped},
    'top_operations': sources.rows(('line', 'operation'), 'cycles')[:TOP],
  }


class _Table:
  """How often each key was met, and the sum of its values."""

  def __init__(self) -> None:
    self._counts: Counter[tuple] = Counter()
    self._sums: defaultdict[tuple, float] = defaultdict(float)

  def add(self, key: tuple, count: int, value: float) -> None:
    """Counts one more."""
    self._counts[key] += count
    self._sums[key] += value

  def rows(self, names: Sequence[str], value: str) -> list[dict[str, Any]]:
    """Objects with the key's parts by name, the count, and the sum by the name `value`; the largest first."""
    keys = sorted(self._sums, key=lambda key: -self._sums[key])
    return [{**dict(zip(names, key)), 'count': self._counts[key], value: round(self._sums[key])} for key in keys]


def shorter(line: str) -> str:
  """A place in the code, from the package's folder on."""
  return re.sub(r'^.*/(?=moe_jax/\w+/|moe_jax/\w+\.py)', '', line)


def advice(result: Mapping[str, Any]) -> list[str]:
  """What would make a plan fit, most promising first; nothing for one that does."""
  if result['fits'] is not False:
    return []
  size, kept = result['hbm_bytes'], result['bytes']['params'] + result['bytes']['optimizer']
  hints = ["REMAT='full', if it is not yet", f'MICROBATCHES={2 * result["microbatches"]}']
  if 2 * (result['bytes']['dispatch_buffers'] or 0) > size:
    hints.insert(0, 'RAGGED_BOUND=2.0, or a CAPACITY_FACTOR: rows on the way to experts alone take half')
  if kept > size / 2:
    hints.insert(0, 'gin/meshes/fsdp.gin, if it is not used yet, or more chips: weights and optimizer alone take half')
  return [*hints, "more of MESH's 'model'", '--search tries these']


Candidate = Mapping[str, Any]


def search(
  first: Mapping[str, Any], again: Callable[[Candidate], Mapping[str, Any]], remat: str
) -> list[dict[str, Any]]:
  """A small search: mesh shapes, then on the best of them rematerialisation, then microbatches.

  Args:
    first: the plan as it was asked for.
    again: makes another with some names bound otherwise, {'MESH': ..., 'REMAT': ..., 'MICROBATCHES': ...}.
    remat: as it was asked for, which is not tried again.

  Returns:
    Plans, best first: those that fit before those that do not, by estimated time or missing memory. Each says in
    'candidate' what it binds, and one that cannot be built in 'error' why.
  """
  tried: list[dict[str, Any]] = [{**first, 'candidate': {}}]

  def attempt(candidate: Candidate) -> None:
    if any(plan['candidate'] == candidate for plan in tried):
      return
    say(f'\ntrying {candidate}')
    try:
      tried.append({**again(candidate), 'candidate': dict(candidate)})
    except ConfigError as error:
      reason, *_ = str(error).splitlines()  # gin says below in which call
      say(reason)
      tried.append({'candidate': dict(candidate), 'error': reason})

  def best() -> dict[str, Any]:
    return min(tried, key=rank)

  for mesh in meshes(first['mesh'], first['num_devices']):
    attempt({'MESH': mesh})
  for other in ('none', 'dots', 'full'):
    if other != remat:
      attempt({**best()['candidate'], 'REMAT': other})
  for factor in (2, 4):
    attempt({**best()['candidate'], 'MICROBATCHES': first['microbatches'] * factor})
    if best().get('fits'):
      break
  return sorted(tried, key=rank)


def meshes(mesh: Mapping[str, int], num_devices: int) -> Iterator[dict[str, int]]:
  """Neighbours of a mesh: half and twice as wide along the expert axis, and along the model axis."""
  others = num_devices // mesh['expert'] // mesh['model'] // mesh['data']
  for axis in ('model', 'expert'):
    for size in (mesh[axis] * 2, mesh[axis] // 2):
      changed = {**mesh, axis: size}
      changed['data'] = num_devices // max(1, others * changed['expert'] * changed['model'])
      if size and changed['data'] and others * changed['data'] * changed['expert'] * changed['model'] == num_devices:
        yield changed


def rank(plan: Mapping[str, Any]) -> tuple[int, float]:
  """The smaller, the better."""
  if 'error' in plan:
    return 3, 0.0
  if plan['fits'] is False:
    return 2, float(plan['bytes']['total'] or math.inf)
  return 1, plan['step_seconds']['overlapped'] if plan['step_seconds'] else 0.0
