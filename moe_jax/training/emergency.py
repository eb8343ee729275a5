"""Emergency checkpoints: each host's own part of the newest states on its own disk, for a run that ends without a word.

A host writes the pieces of arrays that its devices hold; their places in the data go beside the run, where all hosts
see them. A step counts where the hosts together have every piece: one whose disk is lost, such as a new machine, takes
its pieces from others whose devices hold the same. Else the run goes on from its newest checkpoint, with a notice.
"""

import concurrent.futures
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.notices import notice
from moe_jax.paths import absolute, is_remote, readable, remove_folder, writable
from moe_jax.sharding import axes_of
from moe_jax.training.checkpoints import SavableIterator
from moe_jax.training.fingerprints import fingerprints
from moe_jax.training.state import TrainState
from moe_jax.types import Array, ConfigError, path_name

_KEPT = 2  # while hosts write one, all have the one before
_UNFINISHED = '.unfinished'  # on its way in or out
_PLACES = 'places'  # in MODEL_DIR

Pieces = Mapping[str, np.ndarray]  # array's path and index -> its words


class LocalCheckpoints:
  """The newest states of one run, each host's part on its own disk. Every host makes the same calls.

  Args:
    directory: on a disk of each host, or in its memory. Runs and processes have folders of their own in it.
    model_dir: the run's folder, which all hosts see.

  Raises:
    ConfigError: if the directory cannot be written to.
  """

  def __init__(self, directory: str, model_dir: os.PathLike[str]):
    if is_remote(directory):
      raise ConfigError(f'LOCAL_CHECKPOINT_DIR={directory!r} is remote: give a folder on a disk that each host has.')
    run = absolute(model_dir)
    name = f'{run.name}_{hashlib.sha256(str(run).encode()).hexdigest()[:8]}'
    self.directory = Path(directory).expanduser().absolute() / name / f'process_{jax.process_index()}'
    self._places = run / _PLACES
    self._writer = concurrent.futures.ThreadPoolExecutor(1)
    self._written: concurrent.futures.Future[None] | None = None
    self._last: int | None = None
    self._fingerprints = jax.jit(fingerprints)
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise ConfigError(f'LOCAL_CHECKPOINT_DIR={directory!r} cannot be written to ({error.strerror}).') from error

  def save(self, state: TrainState, iterator: SavableIterator) -> None:
    """Copies this host's part of the state; it is written while training goes on.

    Raises:
      ConfigError: if the save before it could not be written.
      OSError: if its place in the data cannot be written to the run's folder.
    """
    self._wait()
    before, self._last = self._last, int(state.step)
    marks = {path: int(mark) for path, mark in jax.device_get(self._fingerprints(state)).items()}
    place = self._places / str(self._last)
    place.mkdir(parents=True, exist_ok=True)
    with writable(place) as folder:
      iterator.save(str(folder / 'iterator'))
    pieces = _pieces(state)
    multihost_utils.sync_global_devices('local checkpoint')  # every place is whole, and every host's step before
    self._keep(before, self._last)
    self._written = self._writer.submit(self._write, self._last, pieces, marks)

  def _write(self, step: int, pieces: Pieces, marks: Mapping[str, int]) -> None:
    unfinished = self.directory / _UNFINISHED
    unfinished.mkdir()
    (unfinished / 'fingerprints.json').write_text(json.dumps(marks))
    with (unfinished / 'pieces.npz').open('wb') as file:
      np.savez(file, **pieces)  # type: ignore[arg-type]
      file.flush()
      os.fsync(file.fileno())
    unfinished.rename(self.directory / str(step))

  def restore(
    self, state_spec: TrainState, batches: Callable[[], SavableIterator], after: int | None
  ) -> tuple[TrainState, SavableIterator] | None:
    """The newest state that is whole over all hosts, and the batches that follow it; all others are then removed.

    Args:
      state_spec: shapes, types and shardings.
      batches: makes an iterator at its beginning.
      after: what is not of a later step is of no use.

    Returns:
      None if there is none. One that is there and is not whole is told of, and left there.
    """
    steps = self._steps()[:_KEPT]
    known = _of_all_hosts(np.array(steps + [-1] * (_KEPT - len(steps)), np.int32))
    newer = sorted({int(step) for step in known.flat if step > (-1 if after is None else after)}, reverse=True)
    for step in newer:  # on every host the same
      found = self._restore(state_spec, batches, step)
      if found is not None:
        self._last = step
        self._keep(step)
        return found
      notice(f'The local checkpoint of step {step} is not whole over all hosts, and is passed over.')
    return None

  def _restore(
    self, state_spec: TrainState, batches: Callable[[], SavableIterator], step: int
  ) -> tuple[TrainState, SavableIterator] | None:
    """Every host gives the same answer: none goes on where another has failed."""
    saved = self._read(state_spec, step)
    hosts = {int(host) for host in np.flatnonzero(_of_all_hosts(np.array(saved is not None)))}
    pieces, marks = saved or ({}, None)
    leaves, tree = jax.tree_util.tree_flatten_with_path(state_spec)
    if not all(all(_holders(leaf, hosts).values()) for _, leaf in leaves):
      return None
    arrays = [_array(path_name(path), leaf, pieces, hosts) for path, leaf in leaves]
    state = jax.tree.unflatten(tree, arrays)
    same = {path: int(mark) for path, mark in jax.device_get(self._fingerprints(state)).items()} == marks
    iterator = batches()
    try:
      with readable(self._places / str(step)) as folder:
        iterator.restore(str(folder / 'iterator'))
      at_place = True
    except Exception:  # of other data, or whatever the client of a bucket raises
      at_place = False
    well = at_place and (same or saved is None)
    return (state, iterator) if _of_all_hosts(np.array(well)).all() else None

  def _read(self, state_spec: TrainState, step: int) -> tuple[Pieces, Mapping[str, int]] | None:
    """What this host's devices want of a step; None if it is not there, or damaged."""
    folder = self.directory / str(step)
    try:
      with np.load(folder / 'pieces.npz') as file:
        pieces = {name: file[name] for name in file.files}  # checks its sums
      marks = json.loads((folder / 'fingerprints.json').read_text())
    except Exception:  # whatever a reader makes of bytes that nobody wrote
      return None
    for path, leaf in jax.tree_util.tree_leaves_with_path(state_spec):
      wanted = leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize
      for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values():
        piece = pieces.get(_name(path_name(path), index, leaf.shape))
        if piece is None or (piece.shape, piece.dtype.itemsize) != wanted:
          return None
    return pieces, marks

  def clear(self) -> None:
    """Removes all, since the run goes on from another state, or has ended."""
    self._wait()
    self._last = None
    self._keep()

  def _keep(self, *steps: int | None) -> None:
    """Removes what this host has of all other steps, and the first host their places."""
    unfinished = self.directory / _UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    for folder in list(self.directory.glob('[0-9]*')):
      if folder.name not in map(str, steps):
        shutil.rmtree(folder.rename(unfinished))  # a part of one must not pass for the whole
    _forget_places(self._places, steps)

  def _steps(self) -> list[int]:
    """Of what this host has written and knows the place of, newest first."""
    steps = [int(folder.name) for folder in self.directory.iterdir() if folder.name.isdigit()]
    return sorted((step for step in steps if (self._places / str(step)).exists()), reverse=True)

  def _wait(self) -> None:
    try:
      if self._written:
        self._written.result()
    except OSError as error:
      raise ConfigError(
        f'A local checkpoint cannot be written to {self.directory} ({error.strerror}): make room there, or set'
        ' LOCAL_CHECKPOINT_DIR=None.'
      ) from error

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: object) -> None:
    self._writer.shutdown(wait=False)  # a single process still writes what it has begun
    if error[0] is None:
      self.clear()


def forget_local_checkpoints(model_dir: os.PathLike[str]) -> None:
  """Makes a run's local checkpoints useless, wherever they are, since it goes on without them."""
  _forget_places(absolute(model_dir) / _PLACES)


def _forget_places(places: Path, but: Collection[int | None] = ()) -> None:
  if jax.process_index() == 0 and places.exists():
    for place in places.iterdir():
      if place.name not in map(str, but):
        remove_folder(place)


def _of_all_hosts(value: np.ndarray) -> np.ndarray:
  """Each host's value, [hosts, ...]."""
  return np.reshape(multihost_utils.process_allgather(value), (jax.process_count(), *value.shape))


def _name(path: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
  ends = (part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
  return f'{path}[{",".join(f"{first}:{end}" for first, end in ends)}]'


def _pieces(state: TrainState) -> dict[str, np.ndarray]:
  """What this host's devices hold, each piece once, as words: a copy, since the next step takes the state's place."""
  leaves = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]
  shards = {_name(path, x.index, leaf.shape): x.data for path, leaf in leaves for x in leaf.addressable_shards}
  for data in shards.values():
    data.copy_to_host_async()
  return {name: np.array(data).view(f'u{data.dtype.itemsize}') for name, data in shards.items()}


def _holders(leaf: jax.ShapeDtypeStruct, hosts: Collection[int]) -> dict[str, Any]:
  """Each piece's name -> the first device of these hosts that has it, or None."""
  found: dict[str, Any] = {}
  for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
    name = _name('', index, leaf.shape)
    found[name] = found.get(name) or (device if device.process_index in hosts else None)
  return found


def _array(path: str, leaf: jax.ShapeDtypeStruct, pieces: Pieces, hosts: Collection[int]) -> Array:
  """The array that these hosts have pieces of; the others take them from there."""
  if len(hosts) == jax.process_count():
    read = lambda index: pieces[_name(path, index, leaf.shape)].view(leaf.dtype)  # noqa: E731
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, read)
  mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
  split = {axis for part in spec for axis in axes_of(part)}
  copied = tuple(axis for axis in mesh.axis_names if axis not in split)
  copies = NamedSharding(mesh, PartitionSpec(copied, *spec))  # every device's copy apart, all but one of them zeros
  holders = _holders(leaf, hosts)
  nothing = np.zeros(leaf.sharding.shard_shape(leaf.shape), f'u{leaf.dtype.itemsize}')
  blocks = [
    jax.device_put((pieces[path + name] if holders[name] == device else nothing)[None], device)
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items()
    for name in [_name('', index, leaf.shape)]
  ]
  shape = (math.prod(mesh.shape[axis] for axis in copied), *leaf.shape)
  stacked = jax.make_array_from_single_device_arrays(shape, copies, blocks)
  return jax.jit(_merged, static_argnums=1, out_shardings=leaf.sharding)(stacked, leaf.dtype)


def _merged(copies: Array, dtype: Any) -> Array:
  """Of copies of words of which all but one are 0, that one, bit by bit."""
  words = jnp.sum(copies, axis=0, dtype=copies.dtype)
  return words.astype(dtype) if dtype == jnp.bool_ else jax.lax.bitcast_convert_type(words, dtype)
