"""Sweeps: one experiment under many bindings, held equal in what each run may spend, every run in its own process.

MODEL_DIR/sweep.jsonl has one object a run and is rewritten whole whenever one changes; MODEL_DIR/runs/NAME is that
run's own MODEL_DIR. What says that a run is finished is what it left there, so that nothing done is lost or repeated.
"""

import fcntl
import functools
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.paths import is_remote
from moe_jax.runs import sweep_page
from moe_jax.runs.progress import say
from moe_jax.runs.report import curve, load_run
from moe_jax.runs.setup import at_least_one, locked, open_model_dir
from moe_jax.runs.sweep_grid import Overrides, files_axis, grid, name_of, parse_axis
from moe_jax.runs.sweep_results import collect, read_rows, write_rows
from moe_jax.runs.sweep_table import LiveTable, show
from moe_jax.types import ConfigError

Row = dict[str, Any]
Size = Callable[[Overrides], dict[str, Any]]
HOLDS = ('flops', 'parameters', 'time', 'steps')
HELD = ('parameters', 'forward_flops_per_token', 'tokens_per_step', 'train_steps')  # of the dense twin, in sweep.json
TRIES = 2  # of a run, in one sweep
TIMED_STEPS = 12  # of each model, where step times are to be known beforehand
TICK = 0.5  # seconds
WIDTHS = 8  # hidden widths of experts are multiples of this


def sweep(
  model_dir: str,
  sweep: Sequence[str],
  sweep_gin: Sequence[str],
  sizes: AbstractContextManager[Size],
  command: Callable[[Overrides], list[str]],
  config: str,
  hold: str = 'flops',
  jobs: int = 1,
  commands: str | None = None,
) -> list[Row]:
  """Trains every combination of values, and the dense twin of each, and reports on all.

  A sweep of the same configuration into the same MODEL_DIR adds to it: finished runs stay, broken ones are tried again.

  Args:
    model_dir: of the sweep.
    sweep: axes as 'NAME=[VALUE, ...]'.
    sweep_gin: patterns of gin files, each one axis.
    sizes: gives, until it is left, what a dry run tells of the experiment under overrides, and its 'train_steps'.
    command: the command line that trains under bindings, a gin file among them perhaps.
    config: the configuration that is common to all.
    hold: what all runs have alike with the dense twin of the plain experiment, which has TRAIN_STEPS: 'flops', of
      training, each token through its chosen experts alone; 'parameters', in all, by the width of experts, at equal
      steps; 'time', by the step times that this machine shows beforehand; or 'steps' alone.
    jobs: runs at a time, each on its share of the cores; of accelerators every run takes all.
    commands: writes the command lines there, one a run, instead of running them; '-' prints them.

  Returns:
    The runs, as sweep.jsonl has them.

  Raises:
    ConfigError: if an axis cannot be read, the folder holds another sweep, or runs failed, naming them.
  """
  at_least_one(jobs=jobs)
  if hold not in HOLDS:
    raise ConfigError(f'--hold={hold} is none of {", ".join(HOLDS)}.')
  wanted = grid([*map(parse_axis, sweep), *map(files_axis, sweep_gin)])
  if is_remote(model_dir):
    raise ConfigError(f'MODEL_DIR {model_dir!r} is remote: a sweep keeps its runs in a folder of this machine.')
  folder = open_model_dir(model_dir)
  with locked(folder):
    rows = read(folder)
    known = {row['name'] for row in rows}
    with sizes as size:
      reference = size({'EXPERT_EVERY': 0})
      begin(folder, {'hold': hold, 'reference': {key: reference[key] for key in HELD}}, config)
      new = [planned(one, reference, size, hold) for one in wanted if name_of(one) not in known]
    for row in new:
      row['model_dir'] = str(folder / 'runs' / row['name'])
      if hold == 'time':
        timed = functools.partial(step_seconds, folder / 'timing', command, core_shares(jobs)[0])
        spend(row, round(reference['train_steps'] * timed({'EXPERT_EVERY': 0}) / timed(row['overrides'])))
      rows.append(row)
      write_rows(folder, rows)
    names = {name_of(overrides) for overrides in wanted}
    show(rows)
    todo = [row for row in rows if row['name'] in names and row['status'] != 'done']

    def command_of(row: Row) -> list[str]:
      return command({**row['overrides'], **row['held'], 'MODEL_DIR': row['model_dir']})

    if commands:
      lines = ''.join(shlex.join(['python', *command_of(row)[1:]]) + '\n' for row in todo)
      if commands == '-':
        print(lines, end='')
      else:
        Path(commands).write_text(lines)
        say(f'{len(todo)} commands in {commands}, one a line: line N is `sed -n "${{N}}p" {commands}`')
      return rows
    with LiveTable(rows) as table:

      def changed() -> None:
        write_rows(folder, rows)
        table.update()

      run_all(todo, command_of, jobs, changed)
  if any(row['status'] == 'done' for row in rows):
    say(f'\nreport: {sweep_page.sweep_report(folder)}')
  if failed := [row for row in todo if row['status'] == 'failed']:
    raise ConfigError(
      f'{len(failed)} of {len(todo)} runs failed; the same command tries them again: '
      + '; '.join(f'{row["name"]} ({row["error"]})' for row in failed)
    )
  return rows


# ---- What it may spend ----------------------------------------------------------------------------------------------


def planned(overrides: Overrides, reference: Mapping[str, Any], size: Size, hold: str) -> Row:
  """A run before it starts: its size, and its steps such that it spends what the reference does."""
  own, steps, held = size(overrides), reference['train_steps'], {}
  if hold == 'flops':
    steps = round(steps * training_flops(reference) / training_flops(own))
  elif hold == 'parameters' and own['parameters'] != reference['parameters']:
    held['EXPERT_MLP_DIM'], own = with_parameters(reference['parameters'], overrides, size)
  row = {
    'name': name_of(overrides),
    'overrides': dict(overrides),
    'held': held,
    'status': 'planned',
    'parameters': own['parameters'],
    'active_parameters': own['active_parameters'],
    'flops_per_token': 3 * own['forward_flops_per_token']['active'],
    'flops_by_part': own['forward_flops_per_token'],
    'exchanged_bytes_per_token': own['exchanged_bytes_per_token'],
    'tokens_per_step': own['tokens_per_step'],
    **dict.fromkeys(('loss', 'eval_loss', 'bits_per_byte', 'step_seconds', 'seconds')),
  }
  spend(row, steps)
  return row


def spend(row: Row, steps: int) -> None:
  """Gives a run so many steps, one at least."""
  steps = max(steps, 1)
  tokens = steps * row['tokens_per_step']
  row |= {'held': {**row['held'], 'TRAIN_STEPS': steps}, 'steps': steps, 'tokens': tokens}
  row['flops'] = tokens * row['flops_per_token']


def training_flops(size: Mapping[str, Any]) -> float:
  """Of a step: a forward pass through the chosen experts, and a backward pass of twice that."""
  return 3 * size['forward_flops_per_token']['active'] * size['tokens_per_step']


def with_parameters(total: int, overrides: Overrides, size: Size) -> tuple[int, dict[str, Any]]:
  """The width of experts that makes a model of so many parameters in all, to 5 %, and its size."""
  if 'EXPERT_MLP_DIM' in overrides:
    raise ConfigError('--hold=parameters sets EXPERT_MLP_DIM, so it cannot be swept.')
  narrow, wide = (size({**overrides, 'EXPERT_MLP_DIM': width})['parameters'] for width in (WIDTHS, 2 * WIDTHS))
  if wide == narrow:
    raise ConfigError(
      f'{name_of(overrides)} has no experts to make up for its size: hold flops, or do not sweep sizes.'
    )
  width = max(1 + round((total - narrow) / (wide - narrow)), 1) * WIDTHS  # parameters are linear in it
  found = size({**overrides, 'EXPERT_MLP_DIM': width})
  if abs(found['parameters'] / total - 1) > 0.05:
    raise ConfigError(
      f'{name_of(overrides)} cannot have the {total:,} parameters of the dense twin: with experts of {width} hidden'
      f' units it has {found["parameters"]:,}. Sweep fewer experts, or give the plain experiment a larger MLP_DIM.'
    )
  return width, found


def step_seconds(folder: Path, command: Callable, cores: set[int] | None, overrides: Overrides) -> float:
  """The median of some steps, on a run's share of the cores with nothing else running; measured once for all seeds."""
  overrides = {name: value for name, value in overrides.items() if name != 'SEED'}
  row = {'name': name_of(overrides), 'model_dir': str(folder / name_of(overrides))}
  place = Path(row['model_dir'])
  if not (place / 'summary.json').exists():
    say(f'timing {row["name"]}')
    few = {'TRAIN_STEPS': TIMED_STEPS, 'LOG_PERIOD': 1, 'EVAL_STEPS': 1, 'MODEL_DIR': str(place), 'STRATEGY': None}
    if code := start(row, command({**overrides, **few}), cores).wait():
      raise ConfigError(f'{row["name"]} could not be timed: {why(code, place / "log.txt")}')
  return float(np.median(curve(load_run(place), 'step_seconds').values[1:]))


# ---- Running --------------------------------------------------------------------------------------------------------


def run_all(todo: Sequence[Row], command_of: Callable[[Row], list[str]], jobs: int, changed: Callable) -> None:
  """Runs so many at a time until all are done, or have failed too often. Stopped itself, it stops them."""
  waiting: deque[Row] = deque(todo)
  running: dict[int, tuple[Row, subprocess.Popen]] = {}
  shares = core_shares(jobs)
  # A shell's background jobs ignore SIGINT.
  before = {sign: signal.signal(sign, _interrupt) for sign in (signal.SIGTERM, signal.SIGINT)}
  try:
    while waiting or running:
      # A sweep that was killed may have left runs that go on without it: they are waited for, in a slot.
      orphans = [row for row in waiting if someone_has(Path(row['model_dir']))]
      for slot in sorted(set(range(jobs)) - set(running))[: max(jobs - len(running) - len(orphans), 0)]:
        row = next((row for row in waiting if row not in orphans), None)
        if row is None:
          break
        waiting.remove(row)
        if not collect(row):
          running[slot] = row, start(row, command_of(row), shares[slot])
      for slot, (row, process) in list(running.items()):
        if (code := process.poll()) is not None:
          del running[slot]
          if not collect(row):
            row |= {'status': 'failed', 'error': why(code, Path(row['model_dir']) / 'log.txt')}
            if row['tries'] < TRIES:
              waiting.append(row)
      changed()
      time.sleep(TICK)
  except KeyboardInterrupt:
    say('\nStopping; the same command goes on from here.')
    raise
  finally:
    for row, process in running.values():
      process.send_signal(signal.SIGTERM)  # saves first
      row['status'] = 'planned'
    for _, process in running.values():
      process.wait()
    changed()
    for sign, handler in before.items():
      signal.signal(sign, handler)


def _interrupt(number: int, frame: Any) -> None:
  raise KeyboardInterrupt


def start(row: Row, command: list[str], cores: set[int] | None) -> subprocess.Popen:
  """Starts a run in its own process; what it prints goes to log.txt in its MODEL_DIR."""
  folder = Path(row['model_dir'])
  folder.mkdir(parents=True, exist_ok=True)
  row |= {'status': 'running', 'tries': row.get('tries', 0) + 1}
  row.pop('error', None)
  with (folder / 'log.txt').open('w') as log:
    process = subprocess.Popen(
      command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
    )
  if cores:
    with suppress(ProcessLookupError):  # it is over already
      os.sched_setaffinity(process.pid, cores)
  return process


def core_shares(jobs: int) -> list[set[int] | None]:
  """Which cores each of so many processes may use; None for all, where there are fewer cores than that."""
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else []
  if jobs == 1 or jobs > len(cores):
    return [None] * jobs
  return [set(cores[i * len(cores) // jobs : (i + 1) * len(cores) // jobs]) for i in range(jobs)]


def someone_has(folder: Path) -> bool:
  """Whether a process is writing to a run's folder."""
  if not (folder / '.lock').exists():
    return False
  with (folder / '.lock').open('a+') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return True
    except OSError:  # no locks on this file system
      return False
  return False


def why(code: int, log: Path) -> str:
  """In a line, why a run ended."""
  if code < 0:
    return f'{signal.Signals(-code).name}, perhaps for want of memory'
  return last_line(log.read_text(errors='replace')) or f'exit code {code}'


def last_line(text: str) -> str:
  """The last line that says something."""
  return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), '')


# ---- What is kept ---------------------------------------------------------------------------------------------------


def begin(folder: Path, settings: Mapping[str, Any], config: str) -> None:
  """Keeps what all runs share, and refuses to add to a sweep of something else."""
  place, kept = folder / 'sweep.json', folder / 'sweep.gin'
  if place.exists():
    here = lambda text: re.sub(r'^MODEL_DIR = .*$', '', text, flags=re.MULTILINE)  # noqa: E731
    same = {
      'settings': json.loads(place.read_text()) == settings,
      'configuration': here(kept.read_text()) == here(config),
    }
    if not all(same.values()):
      raise ConfigError(
        f'{folder} holds a sweep of other {" and ".join(k for k, v in same.items() if not v)} (see sweep.json and'
        ' sweep.gin there): choose another MODEL_DIR.'
      )
    return
  kept.write_text(config)
  place.write_text(json.dumps(settings, indent=2))


def read(folder: Path) -> list[Row]:
  """The runs so far, none of which has been tried yet by this sweep."""
  rows = read_rows(folder)
  for row in rows:
    row['tries'] = 0
    if row['status'] == 'running':  # of a sweep that was killed
      row['status'] = 'planned'
  return rows
