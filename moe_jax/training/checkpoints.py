"""Checkpoints: Orbax, asynchronous, with the data iterator's position inside."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, Self

import jax
import orbax.checkpoint as ocp
from absl import logging

from moe_jax.training.state import TrainState
from moe_jax.types import Batch, ConfigError

PyTree = Any


class SavableIterator(Iterator[Batch], Protocol):
  """An iterator whose exact position can be saved under a file name and found again."""

  def save(self, path: str) -> None: ...
  def restore(self, path: str) -> None: ...


class _IteratorHandler(ocp.CheckpointHandler):
  """Saves each host's data iterator beside the state. Done before training goes on, since the next batch moves it."""

  def save(self, directory: Any, args: '_SaveIterator') -> None:
    args.iterator.save(str(directory / 'iterator'))

  def restore(self, directory: Any, args: '_RestoreIterator') -> SavableIterator:
    args.iterator.restore(str(directory / 'iterator'))
    return args.iterator


@ocp.args.register_with_handler(_IteratorHandler, for_save=True)
@dataclasses.dataclass
class _SaveIterator(ocp.args.CheckpointArgs):
  iterator: SavableIterator


@ocp.args.register_with_handler(_IteratorHandler, for_restore=True)
@dataclasses.dataclass
class _RestoreIterator(ocp.args.CheckpointArgs):
  iterator: SavableIterator


class Checkpointer:
  """Saves and finds the states of one run, under `MODEL_DIR/checkpoints`.

  Args:
    model_dir: the run's folder.
    keep: how many of the newest to keep.
    read_only: writes and cleans nothing, for evaluation beside a running training.
    asynchronous: writes while training goes on.
  """

  def __init__(self, model_dir: Path, keep: int = 2, read_only: bool = False, asynchronous: bool = True):
    directory = Path(model_dir).absolute() / 'checkpoints'
    if read_only and not directory.exists():
      raise ConfigError(f'No checkpoints in {directory}: train there first, or set MODEL_DIR.')
    self._manager = ocp.CheckpointManager(
      directory,
      item_handlers={'state': ocp.PyTreeCheckpointHandler(), 'data': _IteratorHandler()},
      options=ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else keep,
        create=not read_only,
        read_only=read_only,
        enable_async_checkpointing=asynchronous,
      ),
    )
    self.directory = directory

  def latest_step(self) -> int | None:
    """The newest complete checkpoint's step; a half-written one does not count."""
    return self._manager.latest_step()

  def all_steps(self) -> list[int]:
    """Steps of all complete checkpoints, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, state: TrainState, iterator: SavableIterator) -> None:
    """Starts saving; the files are written while training goes on, and appear under their name only when whole."""
    step = int(state.step)
    if step not in self._manager.all_steps():
      items = ocp.args.Composite(state=ocp.args.PyTreeSave(_as_dict(state)), data=_SaveIterator(iterator))
      self._manager.save(step, args=items, force=True)

  def restore(
    self, state_spec: TrainState, iterator: SavableIterator | None = None, step: int | None = None
  ) -> TrainState:
    """Reads a state straight onto the devices its spec names, and moves the data iterator to where it stood.

    Args:
      state_spec: shapes, types and shardings; where `opt_state` is None, it is not read.
      iterator: restored in place; None leaves data alone.
      step: which; None is the newest.

    Raises:
      ConfigError: if the checkpoint holds other parameters or shapes, or cannot be read.
    """
    step = self.latest_step() if step is None else step
    wanted = {key: value for key, value in _as_dict(state_spec).items() if value is not None}
    items = {
      'state': ocp.args.PyTreeRestore(
        wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
      )
    }
    if iterator is not None:
      items['data'] = _RestoreIterator(iterator)
    try:
      self._check_shapes(wanted, step)
      restored = self._manager.restore(step, args=ocp.args.Composite(**items))
    except ConfigError:
      raise
    except (ValueError, OSError, KeyError) as error:
      reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
      raise ConfigError(
        f'The checkpoint {self.directory}/{step} cannot be read ({reason}...):'
        ' move that folder aside to go on from the one before.'
      ) from error
    logging.info('Restored step %d from %s', step, self.directory)
    return dataclasses.replace(state_spec, **restored['state'])

  def _check_shapes(self, wanted: PyTree, step: int | None) -> None:
    metadata = self._manager.item_metadata(step)['state']
    tree = getattr(metadata, 'tree', metadata)
    saved, here = _shapes({key: tree.get(key) for key in wanted}), _shapes(wanted)
    for path in [*here, *saved]:
      if saved.get(path) != here.get(path):
        there, now = (f'has shape {shapes[path]}' if path in shapes else 'is missing' for shapes in (saved, here))
        raise ConfigError(
          f'The checkpoint {self.directory}/{step} is of another model: {path} {there} there and {now} here.'
          ' Use its configuration (config.gin beside it), or another MODEL_DIR.'
        )

  def reached_preemption(self, step: int) -> bool:
    """Whether some host of several is about to be taken away, so that all save after this step and stop."""
    return self._manager.reached_preemption(step)

  def wait(self) -> None:
    """Waits until what was being saved is whole."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and lets go of the folder."""
    self.wait()
    self._manager.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: object) -> None:
    if error[0] is None or jax.process_count() == 1:  # else another host may be gone, and waiting for it is for ever
      self.close()


def _as_dict(state: TrainState) -> dict[str, PyTree]:
  return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, 'shape'))
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape)
    for path, leaf in leaves
    if hasattr(leaf, 'shape')
  }
