"""T5X's checkpoints of our models, read and written without T5X: Orbax's, under its names."""

import re
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from moe_jax.paths import absolute
from moe_jax.training.state import TrainState
from moe_jax.types import ConfigError

_PREFIX = 'checkpoint'  # of the folder of a step, 'checkpoint_20'


def from_checkpoint(path: str) -> TrainState:
  """Reads weights that T5X saved of one of our models.

  Args:
    path: T5X's MODEL_DIR, of which the newest checkpoint is taken, or its checkpoint_STEP.

  Returns:
    The state on the host, without the optimizer's part: `Checkpointer.save` writes it, and runs begin with it.

  Raises:
    ConfigError: if there is no checkpoint, or none of T5X.
  """
  folder = absolute(path)
  steps = {int(match[1]): x for x in folder.glob('*') if (match := re.fullmatch(_PREFIX + r'_(\d+)', x.name))}
  folder = (steps[max(steps)] if steps else folder) / 'state'
  if not folder.is_dir():
    raise ConfigError(f'No checkpoint of T5X in {path}: give its MODEL_DIR, or MODEL_DIR/{_PREFIX}_STEP.')
  reader = ocp.PyTreeCheckpointHandler()
  saved = reader.metadata(folder).tree
  wanted = {name: saved[name] for name in ('target', 'flax_mutables') if name in saved}
  wanted['state'] = {'step': saved['state']['step']}  # without 'param_states', the optimizer's
  on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
  tree = reader.restore(folder, args=ocp.args.PyTreeRestore(wanted, restore_args=on_host, partial_restore=True))
  return TrainState(
    step=np.int32(tree['state']['step']),  # type: ignore[arg-type]
    params=tree['target'],
    opt_state=None,
    variables=tree.get('flax_mutables', {}),
  )


def to_checkpoint(state: TrainState, model_dir: str) -> Path:
  """Writes our weights as a checkpoint of T5X, without an optimizer's state.

  Args:
    state: whose step, parameters and routers' memories.
    model_dir: T5X's; made where there is none.

  Returns:
    The folder written, `model_dir`/checkpoint_STEP.
  """
  folder, step = absolute(model_dir), int(state.step)
  tree = {'target': state.params, 'state': {'step': np.int32(step)}}
  if state.variables:
    tree['flax_mutables'] = state.variables
  options = ocp.CheckpointManagerOptions(step_prefix=_PREFIX, create=True)
  with ocp.CheckpointManager(folder, options=options) as manager:
    manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree)), force=True)
  return folder / f'{_PREFIX}_{step}'
