"""Checkpoints of other libraries made into ours, and ours into theirs."""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from moe_jax import sharding
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
    source: reads `path` of this kind ('hf') into `model_dir`, which then holds model.gin and a checkpoint of step 0.
    target: writes the newest checkpoint of `model_dir` to `path` as this kind.
    path: their side, a folder.

  Returns:
    What was written.

  Raises:
    ConfigError: if not just one of source and target is given, or something does not fit.
  """
  if (source is None) == (target is None) or not path:
    raise ConfigError('--run_mode=convert needs --path=DIR, and either --from=hf or --to=hf.')
  engines: Mapping[str, Callable[..., Path]] = READERS if source else WRITERS
  kind = source or target or ''
  if kind not in engines:
    raise ConfigError(f'No {"--from" if source else "--to"}={kind}: choose among {", ".join(engines)}.')
  written = engines[kind](model_dir, devices, path)
  say(f'{kind}: wrote {written}')
  return written


def from_hugging_face(model_dir: str, devices: Devices, path: str) -> Path:
  """See `convert`."""
  from moe_jax.interop import huggingface

  config = huggingface.read_config(path)
  huggingface.describe(config)  # complains before anything is made
  mesh, folder = devices.make_mesh(), open_model_dir(model_dir)
  with locked(folder), Checkpointer(folder) as checkpointer:
    if checkpointer.latest_step() is not None:
      raise ConfigError(f'MODEL_DIR {model_dir!r} has checkpoints already: choose another folder.')
    _, variables = huggingface.load(path, mesh)
    checkpointer.save(TrainState(jnp.int32(0), variables['params'], None, {}))
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
    spec = jax.tree.map(lambda x: sharding.spread(mesh, x), checkpointer.parameters(step))
    number = sharding.spread(mesh, jax.ShapeDtypeStruct((), jnp.int32))
    state = checkpointer.restore(TrainState(number, spec, None, None), step=step)  # type: ignore[arg-type]
  huggingface.save_with_origin(path, state.params, origin)
  return Path(path)


READERS: dict[str, Callable[..., Path]] = {'hf': from_hugging_face}
WRITERS: dict[str, Callable[..., Path]] = {'hf': to_hugging_face}
