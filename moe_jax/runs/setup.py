"""What training, evaluation and inference build alike: devices, data, and a model laid out on them."""

import contextlib
import dataclasses
import fcntl
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax import sharding
from moe_jax.analysis.chips import chip_of, topology_devices
from moe_jax.batch import batch_spec
from moe_jax.notices import notice
from moe_jax.objectives import LanguageModeling, Objective
from moe_jax.paths import is_remote, to_path
from moe_jax.training.checkpoints import Checkpointer
from moe_jax.training.state import OptimizerFactory, TrainState, init_state
from moe_jax.training.step import train_step
from moe_jax.types import ConfigError

if TYPE_CHECKING:
  from moe_jax.data import BatchIterator


@dataclasses.dataclass(frozen=True)
class Devices:
  """Which devices, in what mesh.

  Attributes:
    mesh: axis -> size, see `sharding.mesh_shape`.
    axis_rules: logical axis -> mesh axis.
    num_experts: E, which the widest fitting expert axis (-1) depends on; 0 for a dense model.
    fake_devices: how many devices each process pretends to have on a CPU; None, or any other platform, takes what is
      there.
    topology: of a TPU to compile for instead, see `chips.topology_devices`; nothing can run on it.
    tpu_options: of XLA for TPUs, for the training step, flag -> value; None: those that suit the chip, see
      `chips.CHIPS`. Other platforms do without.
  """

  mesh: Mapping[str, int]
  axis_rules: sharding.AxisRules
  num_experts: int = 0
  fake_devices: int | None = None
  topology: str | None = None
  tpu_options: Mapping[str, str] | None = None

  def make_mesh(self) -> Mesh:
    """Starts JAX's backend, if this process has not, and lays out its devices.

    Raises:
      ConfigError: if the mesh does not fit them.
    """
    if self.fake_devices:
      with contextlib.suppress(RuntimeError):  # the backend runs already: take it as it is
        jax.config.update('jax_num_cpu_devices', self.fake_devices)  # no matter where there is a GPU or a TPU
    if self.topology:
      jax.config.update('jax_platforms', 'cpu')  # the compiler's library would look for a TPU here
    devices = topology_devices(self.topology) if self.topology else jax.devices()
    shape = sharding.mesh_shape(self.mesh, len(devices), self.num_experts, sharding.count_slices(devices))
    widest = math.gcd(shape['data'] * shape['expert'], self.num_experts) if self.num_experts else 1
    if shape['expert'] < widest:
      notice(
        f'MESH: {self.num_experts} experts live on {shape["expert"]} devices and could on {widest}, which saves memory'
        " and the exchange of their gradients ('expert': -1 takes the widest axis that fits)"
      )
    return sharding.make_mesh(shape, devices)


@dataclasses.dataclass(frozen=True)
class Data:
  """A seqio task as batches for one kind of model; see `moe_jax.data.batches`.

  Attributes:
    task: name of a registered task or mixture.
    modules: imported to register it.
    lengths: feature -> tokens.
    batch_size: rows of a global batch.
    converter: 'decoder_only' or 'encoder_decoder'.
    vocab_size: of the model.
    seed: of shuffling.
    num_shards: into which the data are split, see `moe_jax.data.batches`.
    use_cached: reads what seqio has cached of the task in `cache_dirs`, and not the task's source.
  """

  task: str
  modules: Sequence[str]
  lengths: Mapping[str, int]
  batch_size: int
  converter: str
  vocab_size: int
  seed: int = 0
  num_shards: int | None = None
  use_cached: bool = False
  cache_dirs: Sequence[str] = ()

  def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch; reads nothing."""
    return batch_spec(self.lengths, self.batch_size, self.converter)

  def batches(self, mesh: Mesh, split: str, **options: Any) -> 'BatchIterator':
    """Batches on the mesh. Call inside `sharding.activate`."""
    from moe_jax import data  # imports TensorFlow

    return data.batches(
      self.task,
      self.lengths,
      self.batch_size,
      split,
      converter=self.converter,
      sharding=sharding.named_sharding(mesh, 'batch', None),
      modules=self.modules,
      vocab_size=self.vocab_size,
      cache_dirs=self.cache_dirs if self.use_cached else None,
      **{'seed': self.seed, 'num_shards': self.num_shards, **options},
    )

  def held_out(self, mesh: Mesh, split: str = 'validation') -> 'BatchIterator':
    """Batches to evaluate on: the same sample of the split every time, whatever the training's seed and hosts."""
    return self.batches(mesh, split, num_epochs=1, seed=0, num_shards=1)

  def vocabulary(self) -> Any:
    """The seqio vocabulary of the targets."""
    from moe_jax import data

    return data.vocabulary(self.task, self.modules)

  def tell_bytes(self, objective: LanguageModeling) -> LanguageModeling:
    """The objective, told how many bytes of text each token stands for."""
    from moe_jax import data

    return dataclasses.replace(objective, token_bytes=data.token_bytes(self.vocabulary()))


@dataclasses.dataclass(frozen=True)
class Program:
  """A model on its mesh, ready to run.

  Attributes:
    objective: model and loss.
    mesh, rules: where everything lives.
    batch_spec: shapes of a batch.
    state_spec: shapes and shardings of the training state.
    make_state: makes the first state in place.
    transform: the optimizer.
    compiler_options: of the training step.
  """

  objective: Objective
  mesh: Mesh
  rules: sharding.AxisRules
  batch_spec: Mapping[str, jax.ShapeDtypeStruct]
  state_spec: TrainState
  make_state: Callable[[], TrainState]
  transform: optax.GradientTransformation
  compiler_options: Mapping[str, str]

  def activate(self) -> AbstractContextManager[None]:
    """Enters the mesh and its rules."""
    return sharding.activate(self.mesh, self.rules)

  def with_fresh_optimizer(self, state: TrainState) -> TrainState:
    """The state, as if its optimizer had done nothing yet."""
    shardings = jax.tree.map(lambda x: x.sharding, self.state_spec.opt_state)
    return dataclasses.replace(state, opt_state=jax.jit(self.transform.init, out_shardings=shardings)(state.params))

  @property
  def mesh_axes(self) -> dict[str, int]:
    """Mesh axis -> size; those that few need only where they are used."""
    return {axis: size for axis, size in self.mesh.shape.items() if size > 1 or axis not in ('replica', 'sequence')}

  @property
  def everywhere(self) -> NamedSharding:
    """The sharding of what every host reads whole."""
    return NamedSharding(self.mesh, PartitionSpec())


def compiled_step(
  program: Program, objective: Objective, microbatches: int = 1, trainable: Sequence[str] = (), seed: int = 0
) -> Any:
  """The jitted training step, (state, batch) -> (state, metrics), in the place of the state that it is given."""
  options: dict[str, Any] = {'microbatches': microbatches, 'trainable': tuple(trainable), 'seed': seed}
  return jax.jit(
    functools.partial(train_step, objective=objective, transform=program.transform, **options),
    donate_argnums=0,
    out_shardings=(jax.tree.map(lambda x: x.sharding, program.state_spec), program.everywhere),
    compiler_options=dict(program.compiler_options),
  )


def build(
  objective: Objective, optimizer: OptimizerFactory, data: Data, devices: Devices, seed: int = 0, microbatches: int = 1
) -> Program:
  """Builds everything but the data, from shapes alone.

  Raises:
    ConfigError: if batch, experts or weights do not divide over the mesh, or the compiler lacks an option.
  """
  mesh = devices.make_mesh()
  with sharding.activate(mesh, devices.axis_rules):
    ways = sharding.shards('batch') * microbatches
    if data.batch_size % ways:
      raise ConfigError(
        f'BATCH_SIZE={data.batch_size} does not divide over {sharding.shards("batch")} data-parallel devices'
        f' in {microbatches} microbatches: use a multiple of {ways}.'
      )
    spec = data.spec()
    pieces = sharding.shards('length')
    for name, feature in spec.items():
      if feature.shape[1] % pieces:
        raise ConfigError(
          f'{name} is {feature.shape[1]} tokens long, which do not divide over the mesh axis sequence of {pieces}:'
          ' change TASK_FEATURE_LENGTHS, or MESH.'
        )
    make_state, state_spec, transform = init_state(objective, optimizer, spec, mesh, seed)
  options = _compiler_options(mesh, devices.tpu_options)
  return Program(objective, mesh, devices.axis_rules, spec, state_spec, make_state, transform, options)


def _compiler_options(mesh: Mesh, wanted: Mapping[str, str] | None) -> Mapping[str, str]:
  """See `Devices.tpu_options`. What is asked for is tried on a program that does nothing.

  Raises:
    ConfigError: if the compiler has no such option.
  """
  if wanted is None:
    chip = chip_of(mesh.devices.flat[0])
    return chip.options if chip else {}
  if not wanted or mesh.devices.flat[0].platform != 'tpu':
    return {}
  everywhere = NamedSharding(mesh, PartitionSpec())
  try:
    jax.jit(lambda: 0, out_shardings=everywhere, compiler_options=dict(wanted)).lower().compile()
  except jax.errors.JaxRuntimeError as error:
    raise ConfigError(f'TPU_OPTIONS, of which None takes what suits the chip: {str(error).splitlines()[0]}') from error
  return wanted


def use_compilation_cache(folder: str | None) -> None:
  """Keeps what is compiled for the next start, unless that is arranged for already; None does not."""
  if folder and jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
    jax.config.update('jax_compilation_cache_dir', str(to_path(folder)))


def open_model_dir(path: str) -> Path:
  """Makes the run's folder.

  Raises:
    ConfigError: if it cannot be written to.
  """
  folder = to_path(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f'.writable_{jax.process_index()}'
    probe.write_text('')
    probe.unlink()
  except Exception as error:  # clients of buckets have errors of their own
    reason = getattr(error, 'strerror', None) or f'{type(error).__name__}: {error}'.splitlines()[0][:200]
    advice = 'see that the bucket exists and is yours to write' if is_remote(folder) else 'choose another folder'
    raise ConfigError(f'MODEL_DIR {path!r} cannot be written to ({reason}): {advice}.') from error
  return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
  """Keeps this machine's other processes from writing to a run's folder, until this one ends in whatever way.

  Raises:
    ConfigError: if one does.
  """
  if is_remote(folder):
    notice(f'MODEL_DIR {folder} cannot be locked, being in a bucket: see that no other run writes there')
  if is_remote(folder) or jax.process_index() > 0:
    yield
    return
  with (folder / '.lock').open('a+') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      who = file.read().strip() or 'unknown'
      raise ConfigError(f'Process {who} is writing to MODEL_DIR {folder}: stop it, or choose another.') from error
    except OSError as error:  # some network file systems have no locks
      notice(f'MODEL_DIR {folder} cannot be locked ({error.strerror}): see that no other run writes there')
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    yield


def trained(model_dir: str, objective: Objective, data: Data, devices: Devices) -> tuple[Program, Checkpointer]:
  """A program that needs no optimizer, and the checkpoints of its run, opened for reading.

  Raises:
    ConfigError: if nothing was saved.
  """
  program = build(objective, lambda names: optax.identity(), data, devices)
  checkpointer = Checkpointer(to_path(model_dir), read_only=True)
  if checkpointer.latest_step() is None:
    raise ConfigError(f'No whole checkpoint in {checkpointer.directory} yet: train longer, or set MODEL_DIR.')
  return program, checkpointer


def restore(program: Program, checkpointer: Checkpointer, step: int | None = None) -> TrainState:
  """The state at a step, None being the newest, without its optimizer's part."""
  if step is not None and step not in checkpointer.all_steps():
    raise ConfigError(
      f'No checkpoint of step {step} in {checkpointer.directory}: there are {checkpointer.all_steps()}.'
    )
  return checkpointer.restore(dataclasses.replace(program.state_spec, opt_state=None), step=step)


def variables_of(state: TrainState) -> dict[str, Any]:
  """What a model is applied with."""
  return {'params': state.params, **state.variables}


def at_least_one(**numbers: int) -> None:
  """Raises ConfigError, naming the first number that is not a whole number of at least 1."""
  for name, value in numbers.items():
    if not isinstance(value, int) or value < 1:
      raise ConfigError(f'{name}={value!r}: a whole number of at least 1 is wanted.')
