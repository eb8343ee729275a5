"""The table of a sweep: alive in a terminal, a line for whatever changes elsewhere."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from moe_jax.runs.drawing import si

Row = Mapping[str, Any]


class LiveTable:
  """Shows runs and how far they are.

  Args:
    rows: of the sweep, which change meanwhile.
    console: where to; None is the terminal.
  """

  def __init__(self, rows: Sequence[Row], console: Console | None = None):
    self._rows, self._console = rows, console or _console()
    self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
    self._told: dict[str, str] = {}

  def update(self) -> None:
    """Shows what has changed."""
    if self._live:
      self._live.update(table(self._rows), refresh=True)
      return
    for row in self._rows:
      if self._told.get(row['name'], 'planned') != row['status']:
        found = f', {row["eval_loss"]:.4f} nats per token' if row['status'] == 'done' else ''
        self._console.print(f'{row["name"]}: {row["status"]}{found}', highlight=False, soft_wrap=True)
      self._told[row['name']] = row['status']

  def __enter__(self) -> Self:
    if self._live:
      self._live.start()
    return self

  def __exit__(self, *error: object) -> None:
    self.update()
    if self._live:
      self._live.stop()
    else:
      self._console.print(table(self._rows))


def _console() -> Console:
  """The terminal, or what stands for one, wide enough for the table."""
  console = Console()
  return console if console.is_terminal else Console(width=120)


def show(rows: Sequence[Row]) -> None:
  """Prints what each run is to spend, before any starts."""
  _console().print(table(rows))


def table(rows: Sequence[Row]) -> Table:
  """Sizes and results of all runs."""
  shown = Table(box=None, header_style='dim')
  for title in ('run', 'parameters', 'active', 'FLOPs/token', 'steps', 'FLOPs', 'eval loss', 's/step', 'status'):
    shown.add_column(title, justify='left' if title in ('run', 'status') else 'right', overflow='fold')
  for row in rows:
    shown.add_row(
      row['name'],
      *(si(row[key]) for key in ('parameters', 'active_parameters', 'flops_per_token')),
      f'{row["steps"]:,}',
      si(row['flops']),
      f'{row["eval_loss"]:.4f}' if row['eval_loss'] is not None else '',
      f'{row["step_seconds"]:.3f}' if row['step_seconds'] is not None else '',
      f'step {step_of(row)}' if row['status'] == 'running' else row['status'],
    )
  return shown


def step_of(row: Row) -> int:
  """How far a run is, by its log."""
  path = Path(row['model_dir']) / 'metrics.jsonl'
  if not path.exists():
    return 0
  with path.open('rb') as file:
    file.seek(max(path.stat().st_size - 20_000, 0))
    lines = file.read().decode(errors='replace').splitlines()
  for line in reversed(lines):
    try:
      return json.loads(line)['step']
    except (ValueError, KeyError, TypeError):
      continue
  return 0
