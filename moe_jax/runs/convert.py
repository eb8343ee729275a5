"""Checkpoints of other libraries made into ours, and ours into theirs."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from moe_jax import sharding
from moe_jax.paths import is_remote
from moe_jax.runs.initial import find
from moe_jax.runs.progress import say
from moe_jax.runs.setup import Devices, locked, open_model_dir
from moe_jax.training.checkpoints import Checkpointer
from moe_jax.training.state import TrainState
from moe_jax.types import ConfigError

ORIGIN = 'hf'  # in MODEL_DIR: what came with the weights, for the way back


def convert(
  model_dir: str, devices: Devices, source: str | None = None, target: str | None = None, path: str = ''
) -> Path:
  """Converts weights; optimizers begin anew.

  Args:
    model_dir: our side.
    devices: over which arrays are spread meanwhile.
    source: reads `path` of this kind into `model_dir`: 'hf', then with model.gin and a checkpoint of step 0, or 't5x',
      then with a checkpoint of T5X's step.
    target: writes the newest checkpoint of `model_dir` to `path` as this kind.
    path: their side, a folder.

  Returns:
    What was written.

  Raises:
    ConfigError: if not just one of source and target is given, or something does not fit.
  """
  if (source is None) == (target is None) or not path:
    raise ConfigError(f'--run_mode=convert needs --path=DIR, and either --from or --to: {" or ".join(READERS)}.')
  if is_remote(path) and 'hf' in (source, target):
    raise ConfigError(f'--path={path} is remote: hf reads and writes local files alone, to be copied from or to there.')
  engines: Mapping[str, Callable[..., Path]] = READERS if source else WRITERS
  kind = source or target or ''
  if kind not in engines:
    raise ConfigError(f'No {"--from" if source else "--to"}={kind}: choose among {", ".join(engines)}.')
  written = engines[kind](model_dir, devices, path)
  multihost_utils.sync_global_devices('written')  # a host that left before the first has written would end it
  say(f'{kind}: wrote {written}')
  return written


def from_hugging_face(model_dir: str, devices: Devices, path: str) -> Path:
  """See `convert`."""
  from moe_jax.interop import huggingface

  config = huggingface.read_config(path)
  huggingface.describe(config)  # complains before anything is made
  mesh, folder = devices.make_mesh(), open_model_dir(model_dir)
  with locked(folder), Checkpointer(folder) as checkpointer:
    _check_empty(checkpointer, model_dir)
    _, variables = huggingface.load(path, mesh)
    checkpointer.save(TrainState(np.int32(0), variables['params'], None, {}))  # type: ignore[arg-type]
    if jax.process_index() == 0:
      (folder / 'model.gin').write_text(huggingface.gin_text(config, model_dir))
      huggingface.keep_origin(path, folder / ORIGIN)
  return folder / 'model.gin'


def to_hugging_face(model_dir: str, devices: Devices, path: str) -> Path:
  """See `convert`."""
  from moe_jax.interop import huggingface

  folder, step = find(model_dir)
  origin = folder / ORIGIN
  if not (origin / 'config.json').exists():
    raise ConfigError(f'{origin} has no config.json: copy {ORIGIN}/ from the MODEL_DIR that it was trained from.')
  mesh = devices.make_mesh()
  with Checkpointer(folder, read_only=True) as checkpointer:
    spec = jax.tree.map(lambda x: sharding.spread(mesh, x), checkpointer.saved_spec(step).params)
    number = sharding.spread(mesh, jax.ShapeDtypeStruct((), jnp.int32))
    state = checkpointer.restore(TrainState(number, spec, None, None), step=step)  # type: ignore[arg-type]
  huggingface.save_with_origin(path, state.params, origin)
  return Path(path)


def from_t5x(model_dir: str, devices: Devices, path: str) -> Path:
  """See `convert`. The optimizer's state stays behind."""
  from moe_jax.interop.t5x_checkpoints import from_checkpoint

  devices.make_mesh()
  folder, state = open_model_dir(model_dir), from_checkpoint(path)
  with locked(folder), Checkpointer(folder) as checkpointer:
    _check_empty(checkpointer, model_dir)
    checkpointer.save(state)
  return folder / 'checkpoints' / str(int(state.step))


def to_t5x(model_dir: str, devices: Devices, path: str) -> Path:
  """See `convert`. The optimizer's state stays behind."""
  from moe_jax.interop.t5x_checkpoints import to_checkpoint

  (folder, step), mesh = find(model_dir), devices.make_mesh()
  with Checkpointer(folder, read_only=True) as checkpointer:
    saved = dataclasses.replace(checkpointer.saved_spec(step), opt_state=None)
    spec = jax.tree.map(lambda x: sharding.spread(mesh, x), saved)
    state = checkpointer.restore(spec, step=step)
  return to_checkpoint(state, path)


def _check_empty(checkpointer: Checkpointer, model_dir: str) -> None:
  if checkpointer.latest_step() is not None:
    raise ConfigError(f'MODEL_DIR {model_dir!r} has checkpoints already: choose another folder.')


READERS: dict[str, Callable[..., Path]] = {'hf': from_hugging_face, 't5x': from_t5x}
WRITERS: dict[str, Callable[..., Path]] = {'hf': to_hugging_face, 't5x': to_t5x}
