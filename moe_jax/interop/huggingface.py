"""Weights in and out of Hugging Face's safetensors files; see `families` for what becomes of what.

A tensor is read when a device asks for its part of the array that it makes, no more of it than that part, and never
twice by the same one; nothing is unpickled.
"""

import collections
import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_jax import sharding
from moe_jax.interop.families import FAMILIES, Family, Names, Tensor
from moe_jax.interop.surgery import places
from moe_jax.paths import to_path
from moe_jax.types import ConfigError

Params = Any
INDEX, SINGLE = 'model.safetensors.index.json', 'model.safetensors'
SHARD_BYTES = 5 * 10**9
_DTYPES = {'float32': np.float32, 'float16': np.float16, 'bfloat16': ml_dtypes.bfloat16}
_SAFETENSORS_DTYPES = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}
_TABLE = 'shared.weight'  # of T5 and Switch, of which some files hold copies:
_COPIES = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')


class Slot(NamedTuple):
  """Where one of their tensors goes: its place along our array's leading axes, of layers and experts."""

  at: tuple[int, ...]
  tensor: Tensor


def load(folder: str | Path, mesh: Mesh | None = None, rules: sharding.AxisRules = ()) -> tuple[nn.Module, Any]:
  """Reads a model.

  Args:
    folder: with config.json and *.safetensors.
    mesh: where its arrays shall live; None is the default device.
    rules: logical axis -> mesh axis; with none, each array is split along its largest axis, where that goes.

  Returns:
    The model, and its variables in float32: `model.apply(variables, batch, train=False)` gives logits float32[B, L, V].

  Raises:
    ConfigError: if the family or something about it is not known, or tensors are missing, left over or of other shapes.
  """
  family, names = describe(read_config(folder))
  model = family.model(names)
  with sharding.activate(mesh, rules) if mesh and rules else contextlib.nullcontext():
    spec = parameters_of(model, mesh)
    with _opened(Path(folder)) as files:
      slots = plan(family, names, spec)
      _check(files, slots, spec)
      arrays = {path: _array(files, slots[path], spec[path]) for path in spec}
  return model, {'params': unflatten_dict(arrays, sep='/')}


def read_config(folder: str | Path) -> dict[str, Any]:
  """config.json, corrected where today's library says of T5 1.1 that its logits are tied, though the files know better.

  Raises:
    ConfigError: if there is none, or it is none.
  """
  path = to_path(folder) / 'config.json'
  try:
    config = json.loads(path.read_text())
  except (OSError, json.JSONDecodeError) as error:
    raise ConfigError(f'{path} cannot be read: give a folder with config.json and *.safetensors.') from error
  if config.get('model_type') == 't5' and path.with_name(SINGLE).exists() | path.with_name(INDEX).exists():
    with _opened(path.parent) as files:
      if 'lm_head.weight' in files:
        config = {**config, 'tie_word_embeddings': False}
        config.pop('scale_decoder_outputs', None)
  return config


def describe(config: Mapping[str, Any]) -> tuple[Family, Names]:
  """The family of a configuration, and what it says in our names.

  Raises:
    ConfigError: naming what is not known of it.
  """
  kind = config.get('model_type')
  if kind not in FAMILIES:
    raise ConfigError(f'config.json has model_type = {kind!r}: choose among {", ".join(FAMILIES)}.')
  try:
    return FAMILIES[kind], FAMILIES[kind].names(config)
  except KeyError as error:
    raise ConfigError(f'config.json of this {kind} lacks {error}.') from error


def parameters_of(model: nn.Module, mesh: Mesh | None = None) -> dict[str, jax.ShapeDtypeStruct]:
  """Path -> shape of each parameter, and its sharding: as the active rules say, or on the default device."""
  rows = sharding.shards('batch')
  features = [
    f'{side}_{name}' for side in ('encoder', 'decoder') for name in ('input_tokens', 'segment_ids', 'positions')
  ]
  batch = {name: jax.ShapeDtypeStruct((rows, 8), jnp.int32) for name in features}
  with sharding.whole_sequences():
    boxed = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), batch)['params']
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  found = {}
  for path, box in flatten_dict(boxed, sep='/').items():
    shape = jax.ShapeDtypeStruct(box.value.shape, box.value.dtype, sharding=device)
    if mesh and nn.get_logical_axis_rules():
      shape = shape.update(sharding=sharding.named_sharding(mesh, *box.names))
    found[path] = sharding.spread(mesh, shape) if mesh and not nn.get_logical_axis_rules() else shape
  return found


def plan(family: Family, names: Names, spec: Mapping[str, Any]) -> dict[str, list[Slot]]:
  """Path of ours -> the tensors of theirs that it is made of."""
  result: dict[str, list[Slot]] = {path: [] for path in spec}
  for place, (path, repeat) in places(spec).items():
    tensor, leading = family.tensor(place, names), () if repeat is None else (repeat,)
    if '{expert}' not in tensor.name:
      result[path].append(Slot(leading, tensor._replace(name=f'{tensor.name}.weight')))
      continue
    for expert in range(spec[path].shape[len(leading)]):
      name = tensor.name.replace('{expert}', str(expert))
      result[path].append(Slot((*leading, expert), tensor._replace(name=f'{name}.weight')))
  return result


def _theirs(shape: tuple[int, ...], inputs: int | None) -> tuple[int, ...]:
  """The shape that an array of ours has there."""
  if inputs is None:
    return shape
  return (math.prod(shape[inputs:]), math.prod(shape[:inputs])) if inputs else (math.prod(shape),)


def _to_theirs(x: np.ndarray, inputs: int | None) -> np.ndarray:
  there = _theirs(x.shape, inputs)
  return np.ascontiguousarray(x.reshape(there[::-1]).T) if inputs else x.reshape(there)


# ---- Reading --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[dict[str, Any]]:
  """Tensor name -> the open file that has it."""
  folder = folder.expanduser()
  index = folder / INDEX
  paths = sorted({*json.loads(index.read_text())['weight_map'].values()}) if index.exists() else [SINGLE]
  with contextlib.ExitStack() as stack:
    found: dict[str, Any] = {}
    for path in paths:
      try:
        file = stack.enter_context(safe_open(folder / path, framework='np'))
      except (OSError, SafetensorError) as error:
        raise ConfigError(f'{folder / path} is missing or no safetensors file ({error}).') from error
      found |= dict.fromkeys(file.keys(), file)
    yield found


def _check(files: Mapping[str, Any], slots: Mapping[str, list[Slot]], spec: Mapping[str, Any]) -> None:
  wanted = {
    slot.tensor.name: _theirs(spec[path].shape[len(slot.at) :], slot.tensor.inputs)
    for path, all_slots in slots.items()
    for slot in all_slots
  }
  if missing := sorted(wanted.keys() - files.keys()):
    raise ConfigError(f'Tensors are missing: {_some(missing)}.')
  if unused := sorted(files.keys() - wanted.keys() - (set(_COPIES) if _TABLE in wanted else set())):
    raise ConfigError(f'Tensors are left over, which this model has no use for: {_some(unused)}.')
  for name in files.keys() & set(_COPIES):
    if not np.array_equal(files[name].get_tensor(name), files[_TABLE].get_tensor(_TABLE)):
      raise ConfigError(f'{name} is no copy of {_TABLE}: this model has one table for both sides.')
  for name, shape in wanted.items():
    there = tuple(files[name].get_slice(name).get_shape())
    if there != shape:
      raise ConfigError(f'{name} has shape {there}, and config.json makes it {shape}.')


def _some(names: list[str]) -> str:
  return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def _array(files: Mapping[str, Any], slots: list[Slot], spec: jax.ShapeDtypeStruct) -> jax.Array:
  """One of our arrays, each device's part made of the tensors that it needs."""
  leading = len(slots[0].at)
  by_index = {slot.at: slot.tensor for slot in slots}

  def part(index: Any) -> np.ndarray:
    ranges = [range(*at.indices(size)) for at, size in zip(index, spec.shape)]
    made = np.empty([len(r) for r in ranges], spec.dtype)
    for at in np.ndindex(*made.shape[:leading]):
      tensor = by_index[tuple(ranges[axis][i] for axis, i in enumerate(at))]
      there = files[tensor.name].get_slice(tensor.name)
      made[at] = _part(there, spec.shape[leading:], ranges[leading:], tensor.inputs)
    return made

  return jax.make_array_from_callback(spec.shape, spec.sharding, part)


def _part(tensor: Any, shape: tuple[int, ...], ranges: list[range], inputs: int | None) -> np.ndarray:
  """The part of an array of ours, of no more of their tensor than the rows and columns that it lies in."""
  firsts = list(range(len(shape))) if inputs is None else sorted({0, inputs})  # where an axis of theirs begins
  spans = []
  for axis, end in zip(firsts, [*firsts[1:], len(shape)], strict=True):
    inner = math.prod(shape[axis + 1 : end])
    spans.append(slice(ranges[axis].start * inner, ranges[axis].stop * inner))
  read = tensor[tuple(spans[::-1])].T if inputs else tensor[tuple(spans)]
  read = read.reshape([len(ranges[axis]) if axis in firsts else size for axis, size in enumerate(shape)])
  return read[tuple(slice(None) if axis in firsts else slice(r.start, r.stop) for axis, r in enumerate(ranges))]


# ---- Writing --------------------------------------------------------------------------------------------------------


def save(
  folder: str | Path, params: Params, config: Mapping[str, Any], dtypes: Mapping[str, str] | None = None
) -> None:
  """Writes a model's parameters as Hugging Face's. Of several hosts, all call it, and the first writes.

  Args:
    folder: gets config.json and model.safetensors, or several of `SHARD_BYTES` and their index.
    params: of the model that `config` describes.
    config: of the family, as config.json has it.
    dtypes: of all tensors by name; None is that of `config`, or float32.

  Raises:
    ConfigError: if the parameters are of another model.
  """
  folder = Path(folder).expanduser()
  family, names = describe(config)
  spec, flat = parameters_of(family.model(names)), flatten_dict(params, sep='/')
  for path in sorted({*spec, *flat}):
    here, wanted = (tree[path].shape if path in tree else 'missing' for tree in (flat, spec))
    if here != wanted:
      raise ConfigError(f'The parameters are not those of config.json: {path} is {here} and would be {wanted}.')
  tensors = _tensors(
    family, names, spec, flat, dtypes or {}, config.get('dtype') or config.get('torch_dtype') or 'float32'
  )
  if jax.process_index() > 0:
    collections.deque(tensors, maxlen=0)  # helps to gather them
    return
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(dict(config), indent=2) + '\n')

  copies = [name for name in _COPIES if (name in dtypes if dtypes else not names['TIED_LOGITS'])]
  shards: list[dict[str, np.ndarray]] = [{}]
  room, sizes = SHARD_BYTES, {}
  files: list[Path] = []
  for tensor, x in tensors:
    for name in (tensor, *(copies if tensor == _TABLE else ())):
      if x.nbytes > room and shards[-1]:
        files.append(_write(folder, shards[-1], len(files)))
        shards[-1], room = {}, SHARD_BYTES
      shards[-1][name] = x
      sizes[name] = (len(files), x.nbytes)
      room -= x.nbytes
  files.append(_write(folder, shards[-1], len(files)))
  if len(files) == 1:
    files[0].rename(folder / SINGLE)
    return
  final = [f'model-{i + 1:05d}-of-{len(files):05d}.safetensors' for i in range(len(files))]
  for file, name in zip(files, final, strict=True):
    file.rename(folder / name)
  weight_map = {name: final[number] for name, (number, _) in sizes.items()}
  total = sum(size for _, size in sizes.values())
  (folder / INDEX).write_text(json.dumps({'metadata': {'total_size': total}, 'weight_map': weight_map}, indent=2))


def _tensors(
  family: Family, names: Names, spec: Mapping[str, Any], flat: Mapping[str, Any], dtypes: Mapping[str, str], plain: str
) -> Iterator[tuple[str, np.ndarray]]:
  """Their tensors by name, each gathered from all hosts as it is asked for."""
  for path, slots in plan(family, names, spec).items():
    for slot in slots:
      x = flat[path][slot.at]
      if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
      dtype = _DTYPES[dtypes.get(slot.tensor.name, plain)]
      yield slot.tensor.name, _to_theirs(np.asarray(x), slot.tensor.inputs).astype(dtype)


def _write(folder: Path, tensors: dict[str, np.ndarray], number: int) -> Path:
  path = folder / f'.part-{number}.safetensors'
  save_file(tensors, path, metadata={'format': 'pt'})
  return path


# ---- What stays beside a converted checkpoint -----------------------------------------------------------------------


def dtypes_of(folder: str | Path) -> dict[str, str]:
  """Tensor name -> dtype of a model's files."""
  with _opened(Path(folder)) as files:
    found = {name: file.get_slice(name).get_dtype() for name, file in files.items()}
  if odd := sorted(name for name, dtype in found.items() if dtype not in _SAFETENSORS_DTYPES):
    raise ConfigError(f'{odd[0]} has dtype {found[odd[0]]}: {", ".join(_DTYPES)} can be converted.')
  return {name: _SAFETENSORS_DTYPES[dtype] for name, dtype in found.items()}


def keep_origin(source: str | Path, folder: Path) -> None:
  """Copies what comes with the weights (configuration, tokenizer), for the way back."""
  folder.mkdir(parents=True, exist_ok=True)
  for path in Path(source).expanduser().iterdir():
    if path.is_file() and path.suffix in ('.json', '.txt', '.model') and path.name != INDEX:
      (folder / path.name).write_bytes(path.read_bytes())
  (folder / 'config.json').write_text(json.dumps(read_config(source), indent=2))
  (folder / 'dtypes.json').write_text(json.dumps(dtypes_of(source)))


def save_with_origin(folder: str | Path, params: Params, origin: Path) -> None:
  """Writes parameters with what `keep_origin` kept, as `save` does."""
  dtypes = json.loads((origin / 'dtypes.json').read_text()) if (origin / 'dtypes.json').exists() else None
  save(folder, params, read_config(origin), dtypes)
  for path in origin.iterdir() if jax.process_index() == 0 else ():
    if path.name not in ('config.json', 'dtypes.json'):
      (Path(folder).expanduser() / path.name).write_bytes(path.read_bytes())


_IMPORTS = (
  'layers import embeddings',
  'layers import positions',
  'models import decoder_only',
  'models import stack',
  'moe.routers import top_k',
  'runs import setup',
)


def gin_text(config: Mapping[str, Any], model_dir: str) -> str:
  """A gin file of the model, to be given before or after that of a task."""
  family, names = describe(config)
  ours = {
    name: value
    for name, value in names.items()
    if name not in ('GATES', 'DENSE_LAYERS', 'RELATIVE_BUCKETS', 'SLOTS', 'TIED_SCALE')
  }
  if not names['SHARED_MLP_DIM']:
    del ours['SHARED_MLP_DIM']
  includes, bindings = family.gin(names)
  for reader in ('embeddings.TokenEmbedding', 'setup.Data'):  # whatever a task's file makes of VOCAB_SIZE
    bindings[f'{reader}.vocab_size'] = str(names['VOCAB_SIZE'])
  files = [*includes, 'dispatchers/auto', 'optimizers/adamw', 'meshes/replicated']
  lines = [
    f'# {config["model_type"]} as its config.json says. Required: a task, in a file of its own.',
    'from __gin__ import dynamic_registration',
    '',
    *(f"include 'gin/{file}.gin'" for file in files),
    '',
    *(f'from moe_jax.{module}' for module in _IMPORTS),
    '',
    f'MODEL_DIR = {model_dir!r}',
    'BATCH_SIZE = 8',
    'GROUP_SIZE = None  # a sequence',
    *(f'{name} = {value!r}' for name, value in ours.items()),
    '',
    *(f'{name} = {value}' for name, value in bindings.items()),
  ]
  return '\n'.join(lines) + '\n'
