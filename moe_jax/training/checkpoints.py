"""Checkpoints: Orbax, asynchronous, with the data iterator's position and a fingerprint of every array inside."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from moe_jax.notices import notice
from moe_jax.paths import absolute, is_remote, make_folder, readable, writable
from moe_jax.training.fingerprints import fingerprints
from moe_jax.training.state import TrainState
from moe_jax.types import Batch, ConfigError, Damaged, path_name

PyTree = Any
T = TypeVar('T')
_DELETED = '.deleted'  # in checkpoints/, on their way out


class SavableIterator(Iterator[Batch], Protocol):
  """An iterator whose exact position can be saved under a file name and found again."""

  def save(self, path: str) -> None: ...
  def restore(self, path: str) -> None: ...


class _IteratorHandler(ocp.CheckpointHandler):
  """Saves each host's data iterator beside the state. Done before training goes on, since the next batch moves it."""

  def save(self, directory: Any, args: '_SaveIterator') -> None:
    with writable(directory) as local:
      args.iterator.save(str(local / 'iterator'))

  def restore(self, directory: Any, args: '_RestoreIterator') -> SavableIterator:
    with readable(directory) as local:
      args.iterator.restore(str(local / 'iterator'))
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
    directory = absolute(model_dir) / 'checkpoints'
    if read_only and not directory.exists():
      raise ConfigError(f'No checkpoints in {directory}: train there first, or set MODEL_DIR.')
    self._manager = ocp.CheckpointManager(
      directory,
      item_handlers=_handlers(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else keep,
        create=not read_only,
        read_only=read_only,
        enable_async_checkpointing=asynchronous,
        todelete_subdir=None if read_only or is_remote(directory) else _DELETED,
      ),
    )
    # Orbax has hosts meet after reading, where one that could not read would be missed: here they meet in `_together`.
    alone = ocp.options.MultiprocessingOptions(primary_host=None, active_processes={jax.process_index()})
    self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**_handlers()), multiprocessing_options=alone)
    self.directory = directory
    self._fingerprints = jax.jit(fingerprints)
    self._writes = not read_only
    self._set_aside = None if read_only else directory.parent / 'damaged_checkpoints'

  def _sweep(self) -> None:
    """Removes old checkpoints, which Orbax has but renamed: a part of one must not pass for the whole."""
    if self._writes and not is_remote(self.directory) and jax.process_index() == 0:
      shutil.rmtree(self.directory / _DELETED, ignore_errors=True)

  def latest_step(self) -> int | None:
    """The newest complete checkpoint's step; a half-written one does not count."""
    return self._manager.latest_step()

  def all_steps(self) -> list[int]:
    """Steps of all complete checkpoints, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, state: TrainState, iterator: SavableIterator | None = None) -> None:
    """Starts saving; the files are written while training goes on, and appear under their name only when whole.

    Args:
      state: where `opt_state` is None it is weights alone, to begin other runs with.
      iterator: whose place in the data is saved too.

    Raises:
      ConfigError: if this or the save before it cannot be written, such as on a full disk.
    """
    step, tree = int(state.step), _as_dict(state)
    if step in self._manager.all_steps():
      return
    marks = {path: int(mark) for path, mark in jax.device_get(self._fingerprints(tree)).items()}
    items = {'state': ocp.args.PyTreeSave(tree), 'fingerprints': ocp.args.JsonSave(marks)}
    if iterator is not None:
      items['data'] = _SaveIterator(iterator)
    with self._writing():
      self._manager.wait_until_finished()  # as saving would: so nothing is on its way out while that is swept
      self._sweep()
      self._manager.save(step, args=ocp.args.Composite(**items), force=True)

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except (ValueError, OSError, RuntimeError) as error:
      if jax.process_count() > 1:  # perhaps another host is gone, and that is what to tell of
        raise
      self._manager.reload()
      whole = self.latest_step()
      safe = f'that of step {whole} is whole' if whole is not None else 'there is none before it'
      raise ConfigError(
        f'A checkpoint cannot be written to {self.directory} ({_reason(error)}); {safe}. Make room, and run again.'
      ) from error

  def restore(
    self, state_spec: TrainState, iterator: SavableIterator | None = None, step: int | None = None
  ) -> TrainState:
    """Reads a state straight onto the devices its spec names, and moves the data iterator to where it stood.

    If no step is asked for, a damaged checkpoint is passed over for the one before it, with a notice, and moved to
    `MODEL_DIR/damaged_checkpoints`. What one of several hosts cannot read, none of them takes.

    Args:
      state_spec: shapes, types and shardings; where `opt_state` is None, it is not read.
      iterator: restored in place; None leaves data alone.
      step: which; None is the newest.

    Returns:
      The state; of a checkpoint of weights alone, its `opt_state` is None and the iterator has not moved.

    Raises:
      ConfigError: if the checkpoint holds other parameters or shapes.
      Damaged: if it cannot be read, nor any before it.
    """
    if step is not None:
      return self._read(state_spec, iterator, step)
    steps = self.all_steps()
    for step in reversed(steps):
      try:
        return self._read(state_spec, iterator, step)
      except Damaged as error:
        if step == steps[0]:
          raise
        notice(f'{error} Going on from the one before.')
        if self._set_aside:
          if jax.process_index() == 0:
            make_folder(self._set_aside)
            (self.directory / str(step)).rename(self._set_aside / f'{step}_{len(list(self._set_aside.iterdir()))}')
          multihost_utils.sync_global_devices('set aside')
          self._manager.reload()
    raise ConfigError(f'No whole checkpoint in {self.directory}.')

  def _read(self, state_spec: TrainState, iterator: SavableIterator | None, step: int) -> TrainState:
    restored = self._together(step, lambda: self._read_here(state_spec, iterator, step))
    marks = jax.device_get(self._fingerprints(restored['state']))
    self._together(step, lambda: self._check_marks(marks, restored.get('fingerprints') or {}, step))
    logging.info('Restored step %d from %s', step, self.directory)
    return dataclasses.replace(state_spec, **{'opt_state': None, **restored['state']})

  def _read_here(self, state_spec: TrainState, iterator: SavableIterator | None, step: int) -> Any:
    """The items of a checkpoint, as far as they lie on this host's devices."""
    wanted = {key: value for key, value in _as_dict(state_spec).items() if value is not None}
    place = self.directory / str(step)
    try:
      saved = self._saved_tree(step)
      if not (place / 'data').exists():  # weights alone
        wanted.pop('opt_state', None)
        iterator = None
      self._check_shapes(wanted, saved, step)
      restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
      items = {'state': ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)}
      if (place / 'fingerprints').exists():  # there were none once
        items['fingerprints'] = ocp.args.JsonRestore()
      if iterator is not None:
        items['data'] = _RestoreIterator(iterator)
      return self._reader.restore(place, args=ocp.args.Composite(**items))
    except ConfigError:
      raise
    except Exception as error:  # whatever a reader makes of bytes that nobody wrote
      raise self._damaged(step, f'cannot be read ({_reason(error)})') from error

  def _check_marks(self, marks: PyTree, saved: PyTree, step: int) -> None:
    for path, mark in saved.items():
      if path in marks and marks[path] != mark:
        raise self._damaged(step, f'is damaged: {path} is not what was saved')

  def _together(self, step: int | None, act: Callable[[], T]) -> T:
    """What `act` returns, if it does on every host; if it raises on one, something is raised on all of them.

    Raises:
      Damaged: if it cannot be read on some host.
      ConfigError: if some host refuses it.
    """
    error: Exception | None = None
    try:
      result = act()
    except Exception as raised:
      error = raised
    severity = 0 if error is None else 1 if isinstance(error, Damaged) else 2
    worst = severity if jax.process_count() == 1 else multihost_utils.process_allgather(np.int32(severity)).max()
    if worst > severity:
      error = self._damaged(step, 'cannot be read on another host')
    if worst > max(severity, 1):
      error = ConfigError(f'The checkpoint {self.directory}/{step} is refused on another host, which says why.')
    if error is not None:
      raise error
    return result

  def saved_spec(self, step: int | None = None) -> TrainState:
    """Shapes and types of all that was saved, as jax.ShapeDtypeStructs; `opt_state` is None where it is weights alone.

    Raises:
      Damaged: if they cannot be read.
    """
    step = self.latest_step() if step is None else step

    def read() -> TrainState:
      try:
        tree = self._saved_tree(step)
        return TrainState(tree['step'], tree['params'], tree.get('opt_state'), tree.get('variables') or {})
      except Exception as error:
        raise self._damaged(step, f'cannot be read ({_reason(error)})') from error

    saved = self._together(step, read)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved, is_leaf=lambda x: hasattr(x, 'shape'))

  def delete_after(self, step: int) -> None:
    """Deletes the checkpoints of later steps."""
    self.wait()
    for later in self.all_steps():
      if later > step:
        self._manager.delete(later)

  def _damaged(self, step: int | None, what: str) -> Damaged:
    return Damaged(f'The checkpoint {self.directory}/{step} {what}: move it aside to go on from the one before.')

  def _saved_tree(self, step: int | None) -> PyTree:
    metadata = self._manager.item_metadata(step)['state']
    return getattr(metadata, 'tree', metadata)

  def _check_shapes(self, wanted: PyTree, tree: PyTree, step: int) -> None:
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
    with self._writing():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and lets go of the folder."""
    self.wait()
    self._sweep()
    self._reader.close()
    self._manager.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: object) -> None:
    if error[0] is None or jax.process_count() == 1:  # else another host may be gone, and waiting for it is for ever
      self.close()


def _handlers() -> dict[str, ocp.CheckpointHandler]:
  return {
    'state': ocp.PyTreeCheckpointHandler(),
    'data': _IteratorHandler(),
    'fingerprints': ocp.JsonCheckpointHandler(),
  }


def _as_dict(state: TrainState) -> dict[str, PyTree]:
  """The parts that there are."""
  parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
  return {name: part for name, part in parts.items() if part is not None}


def _reason(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, 'shape'))
  return {path_name(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, 'shape')}
