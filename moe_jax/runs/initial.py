"""Where a run's first weights come from: drawn at random, or another run's, as they are or made into this model's."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from moe_jax import sharding
from moe_jax.interop.surgery import average
from moe_jax.paths import absolute
from moe_jax.runs.setup import Program
from moe_jax.training.checkpoints import Checkpointer
from moe_jax.training.state import TrainState
from moe_jax.types import ConfigError

PyTree = Any
Transform = Callable[[PyTree, PyTree], PyTree]


@dataclasses.dataclass(frozen=True)
class Initial:
  """Another run's weights. The step and the data begin anew, and the optimizer if nothing else is said.

  Attributes:
    path: a MODEL_DIR, of which the newest checkpoint is taken, or MODEL_DIR/checkpoints/STEP; several are averaged;
      None draws at random.
    transform: makes this model's parameters of the other's and of those that this model would begin with by itself, as
      upcycling does; routers' memories then begin anew. None takes parameters and memories as they are.
    optimizer_transform: makes the optimizer's state likewise, of one run's, so that its schedule goes on; None begins
      anew.
  """

  path: str | Sequence[str] | None = None
  transform: Transform | None = None
  optimizer_transform: Transform | None = None

  def state(self, program: Program) -> TrainState:
    """The first state. Call it inside `program.activate`.

    Raises:
      ConfigError: if there is no such checkpoint, or it is of another model and there is no transform; if several are
        averaged, or one has weights alone, and the optimizer is to go on.
    """
    if not self.path:
      return program.make_state()
    paths = [self.path] if isinstance(self.path, str) else self.path
    if self.optimizer_transform and len(paths) > 1:
      raise ConfigError('INITIAL_OPTIMIZER_TRANSFORM goes on from one run: INITIAL_CHECKPOINT_PATH names several.')
    others = [self._saved(path, program) for path in paths]

    def begin(params: list[PyTree], variables: list[PyTree], optimizer: PyTree) -> TrainState:
      fresh = program.make_state()
      saved = average(params) if len(params) > 1 else params[0]
      if self.optimizer_transform:
        fresh = dataclasses.replace(fresh, opt_state=self.optimizer_transform(optimizer, fresh.opt_state))
      if self.transform:
        return dataclasses.replace(fresh, params=self.transform(saved, fresh.params))
      return dataclasses.replace(fresh, params=saved, variables=variables[-1])

    begun = jax.jit(begin, out_shardings=jax.tree.map(lambda x: x.sharding, program.state_spec))
    return begun([x.params for x in others], [x.variables for x in others], others[-1].opt_state)

  def _saved(self, path: str, program: Program) -> TrainState:
    folder, step = find(path)
    spec = dataclasses.replace(program.state_spec, opt_state=None)
    with Checkpointer(folder, read_only=True) as checkpointer:
      if not (self.transform or self.optimizer_transform):
        return checkpointer.restore(spec, step=step)
      saved = jax.tree.map(lambda x: sharding.spread(program.mesh, x), checkpointer.saved_spec(step))
      if self.optimizer_transform:
        if saved.opt_state is None:
          raise ConfigError(f'{path} has weights alone: begin without INITIAL_OPTIMIZER_TRANSFORM.')
        spec = dataclasses.replace(spec, opt_state=saved.opt_state)
      if self.transform:
        spec = dataclasses.replace(spec, params=saved.params, variables=None)
      return checkpointer.restore(spec, step=step)


def find(path: str) -> tuple[Path, int | None]:
  """The MODEL_DIR and the step that a path names, None being the newest.

  Raises:
    ConfigError: if no checkpoint is there.
  """
  folder, step = absolute(path), None
  if folder.name.isdigit() and folder.parent.name == 'checkpoints':
    folder, step = folder.parent, int(folder.name)
  if folder.name == 'checkpoints':
    folder = folder.parent
  if not (folder / 'checkpoints' / str('' if step is None else step)).is_dir():
    raise ConfigError(f'INITIAL_CHECKPOINT_PATH={path!r} holds no checkpoint: give a MODEL_DIR that does.')
  return folder, step
