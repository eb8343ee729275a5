"""Several hosts as one run: how they find each other, how they stop, and what is said when one is lost."""

import ctypes
import os
import signal
import sys
from typing import Any, Self

import jax

from moe_jax.training.checkpoints import Checkpointer
from moe_jax.types import ConfigError

HEARTBEAT_SECONDS = 30  # without a word, a host counts as lost
_AGAIN = 'Start all again: the run goes on from its newest checkpoint.'
LOST = f'This run seems to have lost one of its processes, so this one stops. {_AGAIN}'
_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl


def join(
  coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
  """Joins the other processes of a run. Call it before anything else touches JAX.

  Args:
    coordinator_address: 'host:port' of process 0. If all are None, Cloud TPU, SLURM or Open MPI are asked.
    num_processes: in all.
    process_id: of this one, from 0.

  Raises:
    ConfigError: if only some are given, or the others do not answer.
  """
  given = {'coordinator_address': coordinator_address, 'num_processes': num_processes, 'process_id': process_id}
  if missing := [name for name, value in given.items() if value is None]:
    if len(missing) < 3:
      raise ConfigError(f'--{missing[0]} is missing: give all of --{", --".join(given)}, or --distributed alone.')
  elif not 0 <= process_id < num_processes:  # type: ignore[operator]
    raise ConfigError(f'--process_id={process_id} is not below --num_processes={num_processes}; the first is 0.')
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(
      coordinator_address, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )
  except (RuntimeError, ValueError) as error:
    raise ConfigError(
      f'The processes of this run did not find each other ({str(error).splitlines()[0][:120]}): start all of them, on'
      ' machines that Cloud TPU, SLURM or Open MPI made known, or with --coordinator_address, --num_processes,'
      ' --process_id.'
    ) from error


def is_one_of_several() -> bool:
  """Whether this process has joined others."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def watched() -> int | None:
  """Goes on in a child process, since XLA ends a process that has lost another one without a chance to tell of it.

  Returns:
    In the child None, and in its parent the exit code, after the child has ended.
  """
  child = os.fork()
  if child == 0:
    if sys.platform == 'linux':
      ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    return None
  signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  if code == -signal.SIGABRT:
    print(LOST, file=sys.stderr)
  elif code < 0:
    print(f'{signal.Signals(-code).name} ended this process (out of memory?). {_AGAIN}', file=sys.stderr)
  return code if code >= 0 else 1


def explain(error: BaseException) -> str | None:
  """What an error says of another host that is gone; None if it says nothing of that."""
  signs = ('Gloo', 'gloo', 'heartbeat', 'coordination service', 'Connection closed', 'Connection reset')
  return LOST if is_one_of_several() and any(sign in str(error) for sign in signs) else None


def leave(code: int) -> None:
  """Ends this process at once where it is one of several: waiting for the others would be waiting for ever."""
  if is_one_of_several():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Preemption:
  """Notices that this machine, or that of another host, is about to be taken away: SIGTERM says so."""

  def __init__(self, checkpointer: Checkpointer):
    """Takes what saves, since that has the hosts agree on a step."""
    self._checkpointer, self._told = checkpointer, False
    self._before: Any = None

  def reached(self, step: int) -> bool:
    """Whether to save and stop after this step: the same answer on every host."""
    return self._checkpointer.reached_preemption(step) if is_one_of_several() else self._told

  def __enter__(self) -> Self:
    if not is_one_of_several():  # else JAX listens
      self._before = signal.signal(signal.SIGTERM, self._hear)
    return self

  def _hear(self, *_: Any) -> None:
    self._told = True

  def __exit__(self, *error: object) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)
