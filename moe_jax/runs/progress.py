"""What a person sees while a model trains: a bar in a terminal, plain lines elsewhere."""

import contextlib
import re
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  SpinnerColumn,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from moe_jax.paths import writable
from moe_jax.types import ConfigError


class Progress:
  """Shows step, loss, speed, balance and the time left. Only the first host shows anything.

  Args:
    first: step to begin after.
    total: step to end with.
    console: where to; None is the terminal.
  """

  def __init__(self, first: int, total: int, console: Console | None = None):
    self._console = console or Console(quiet=jax.process_index() > 0)
    self._first, self._total, self._started = first, total, time.perf_counter()
    self._bar = None
    if self._console.is_terminal:
      columns = (BarColumn(), MofNCompleteColumn(), TextColumn('{task.fields[facts]}'), TimeRemainingColumn())
      self._bar = Bar(*columns, console=self._console)
      self._task = self._bar.add_task('', total=total, completed=first, facts='compiling')

  def update(self, step: int, values: Mapping[str, Any]) -> None:
    """Shows the metrics of a step."""
    facts = summarize(values)
    if self._bar:
      self._bar.update(self._task, completed=step, facts=facts)
    else:
      left = (time.perf_counter() - self._started) / (step - self._first) * (self._total - step)
      self._console.print(f'step {step}/{self._total}  {facts}  {left:.0f}s left', highlight=False, soft_wrap=True)

  def note(self, line: str) -> None:
    """Prints a line above the bar."""
    self._console.print(line, highlight=False, soft_wrap=True)

  def __enter__(self) -> Self:
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *error: object) -> None:
    if self._bar:
      self._bar.stop()


class Profiler:
  """Traces some steps with JAX's profiler; TensorBoard and Perfetto show what it writes.

  Args:
    steps: 'first:last'; None traces nothing.

  Raises:
    ConfigError: if it is neither.
  """

  def __init__(self, steps: str | None):
    found = re.fullmatch(r'(\d+):(\d+)', steps or '')
    if steps is not None and (not found or int(found[1]) > int(found[2])):
      raise ConfigError(f'--profile_steps={steps}: FIRST:LAST is wanted, such as 10:15.')
    self._first, self._last = (int(found[1]), int(found[2])) if found else (0, 0)
    self._tracing: contextlib.ExitStack | None = None

  def before(self, step: int, folder: Path) -> None:
    """Begins with the first step, or with the first that there is."""
    if self._first <= step <= self._last and not self._tracing:
      self._tracing = contextlib.ExitStack()
      jax.profiler.start_trace(str(self._tracing.enter_context(writable(folder / 'profile'))))

  def after(self, step: int, state: Any) -> None:
    """Ends after the last step, when its result is there."""
    if self._tracing and step >= self._last:
      jax.block_until_ready(state)
      jax.profiler.stop_trace()
      self._tracing.close()
      self._tracing = None


@contextlib.contextmanager
def compiling(what: str, every: float = 15.0) -> Iterator[None]:
  """Shows that something is going on: a spinner with a clock in a terminal, a line now and then elsewhere."""
  console, done, started = Console(quiet=jax.process_index() > 0), threading.Event(), time.perf_counter()

  def tick() -> None:
    while not done.wait(every):
      console.print(f'{what}, {time.perf_counter() - started:.0f} s', highlight=False)

  if console.is_terminal:
    columns = (SpinnerColumn(), TextColumn(what), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True) as bar:
      bar.add_task('', total=None)
      yield
    return
  thread = threading.Thread(target=tick, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def summarize(values: Mapping[str, Any]) -> str:
  """One line of facts. The busiest expert's load is in multiples of its fair share, over all layers."""
  facts = [f'loss {float(values["loss"]):.3f}']
  if 'bits_per_byte' in values:
    facts.append(f'{values["bits_per_byte"]:.3f} bits/byte')
  facts.append(f'{values["tokens_per_second"]:,.0f} tokens/s')
  loads = [np.asarray(value) for key, value in values.items() if key.endswith('/expert_load')]
  if loads:
    busiest = max(float(np.max(load / np.maximum(load.mean(-1, keepdims=True), 1e-20))) for load in loads)
    facts.append(f'busiest expert {busiest:.2f}x')
  overflow = max((float(np.max(value)) for key, value in values.items() if key.endswith('/overflow')), default=0.0)
  if overflow > 0:
    facts.append(f'overflow {overflow:.2g} choices a token')
  return '  '.join(facts)


def say(line: str) -> None:
  """Prints on the first host only."""
  if jax.process_index() == 0:
    print(line, flush=True)


def describe_loss(values: dict[str, Any]) -> str:
  """The cross-entropy in the unit that readers care for."""
  if 'bits_per_byte' in values:
    return f'{values["bits_per_byte"]:.3f} bits per byte'
  return f'cross-entropy {float(values["cross_entropy"]):.3f} nats per token'
