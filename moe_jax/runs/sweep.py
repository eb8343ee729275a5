"""Sweeps: one experiment under many bindings, held equal in what each run may spend, every run in its own process.

MODEL_DIR/sweep.jsonl has one object a run and is rewritten whole whenever one changes; MODEL_DIR/runs/NAME is that
run's own MODEL_DIR. What says that a run is finished is what it left there, so that nothing done is lost or repeated.
"""

import fcntl
import functools
import json
import os
import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.runs import sweep_page
from moe_jax.runs.progress import say
from moe_jax.runs.report import curve, load_run
from moe_jax.runs.setup import at_least_one, locked, open_model_dir
from moe_jax.runs.sweep_grid import Overrides, files_axis, grid, name_of, parse_axis
from moe_jax.runs.sweep_results import read_rows
from moe_jax.runs.sweep_table import LiveTable
from moe_jax.types import ConfigError

Row = dict[str, Any]
HOLDS = ('flops', 'parameters', 'time', 'steps')
TRIES = 2  # of a run, in one sweep
TIMED_STEPS = 12  # of each model, where step times are to be known beforehand
TICK = 0.5  # seconds
WIDTHS = 8  # hidden widths of experts are multiples of this


def sweep(
  model_dir: str,
  sweep: Sequence[str],
  sweep_gin: Sequence[str],
  size: Callable[[Overrides], dict[str, Any]],
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
    size: what a dry run tells of the experiment under overrides, and its 'train_steps'.
    command: the command line that trains under bindings, a gin file among them perhaps.
    config: the configuration that is common to all.
    hold: what all runs have alike with the dense twin of the plain experiment, which has TRAIN_STEPS: 'flops', of
      training, each token through its chosen experts alone; 'parameters', in all, by the width of experts, at equal
      steps; 'time', by the step times that this machine shows beforehand; or 'steps' alone.
    jobs: runs at a time, each on its share of the cores.
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
  reference = size({'EXPERT_EVERY': 0})
  folder = open_model_dir(model_dir)
  with locked(folder):
    begin(folder, {'hold': hold, 'reference': reference}, config)
    rows = read(folder)
    known = {row['name'] for row in rows}
    timed = functools.partial(step_seconds, folder / 'timing', command) if hold == 'time' else None
    for overrides in wanted:
      if (name := name_of(overrides)) not in known:
        rows.append(planned(name, overrides, reference, size, hold, timed))
        rows[-1]['model_dir'] = str(folder / 'runs' / name)
        write(folder, rows)
    names = {name_of(overrides) for overrides in wanted}
    LiveTable.show_plan(rows)
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
        write(folder, rows)
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


def planned(
  name: str, overrides: Overrides, reference: Mapping[str, Any], size: Callable, hold: str, timed: Callable | None
) -> Row:
  """A run before it starts: its size, and its steps such that it spends what the reference does."""
  own = size(overrides)
  held: dict[str, Any] = {'TRAIN_STEPS': reference['train_steps']}
  if hold == 'flops':
    budget = training_flops(reference) * reference['train_steps']
    held['TRAIN_STEPS'] = max(round(budget / training_flops(own)), 1)
  elif hold == 'time' and timed:
    budget = timed({'EXPERT_EVERY': 0}) * reference['train_steps']
    held['TRAIN_STEPS'] = max(round(budget / timed(overrides)), 1)
  elif hold == 'parameters' and own['parameters'] != reference['parameters']:
    held['EXPERT_MLP_DIM'], own = with_parameters(reference['parameters'], overrides, size)
  steps = held['TRAIN_STEPS']
  return {
    'name': name,
    'overrides': dict(overrides),
    'held': held,
    'status': 'planned',
    'parameters': own['parameters'],
    'active_parameters': own['active_parameters'],
    'flops_per_token': 3 * own['forward_flops_per_token']['active'],
    'flops_by_part': own['forward_flops_per_token'],
    'exchanged_bytes_per_token': own['exchanged_bytes_per_token'],
    'steps': steps,
    'tokens': steps * own['tokens_per_step'],
    'flops': steps * training_flops(own),
    **dict.fromkeys(('loss', 'eval_loss', 'bits_per_byte', 'step_seconds', 'seconds')),
  }


def training_flops(size: Mapping[str, Any]) -> float:
  """Of a step: a forward pass through the chosen experts, and a backward pass of twice that."""
  return 3 * size['forward_flops_per_token']['active'] * size['tokens_per_step']


def with_parameters(total: int, overrides: Overrides, size: Callable) -> tuple[int, dict[str, Any]]:
  """The width of experts that makes a model of so many parameters in all, to 5 %, and its size."""
  if 'EXPERT_MLP_DIM' in overrides:
    raise ConfigError('--hold=parameters sets EXPERT_MLP_DIM, so it cannot be swept.')
  narrow, wide = (size({**overrides, 'EXPERT_MLP_DIM': width})['parameters'] for width in (WIDTHS, 2 * WIDTHS))
  width = max(1 + round((total - narrow) / (wide - narrow)), 1) * WIDTHS  # parameters are linear in it
  found = size({**overrides, 'EXPERT_MLP_DIM': width})
  if abs(found['parameters'] / total - 1) > 0.05:
    raise ConfigError(
      f'{name_of(overrides)} cannot have the {total:,} parameters of the dense twin: with experts of {width} hidden'
      f' units it has {found["parameters"]:,}. Sweep fewer experts, or give the plain experiment a larger MLP_DIM.'
    )
  return width, found


def step_seconds(folder: Path, command: Callable, overrides: Overrides) -> float:
  """The median of some steps, with nothing else running; measured once."""
  place = folder / name_of(overrides)
  if not (place / 'summary.json').exists():
    say(f'timing {name_of(overrides)}')
    few = {'TRAIN_STEPS': TIMED_STEPS, 'LOG_PERIOD': 1, 'EVAL_STEPS': 1, 'MODEL_DIR': str(place), 'STRATEGY': None}
    done = subprocess.run(command({**overrides, **few}), capture_output=True, text=True)
    if done.returncode:
      raise ConfigError(f'{name_of(overrides)} could not be timed: {last_line(done.stderr)}')
  return float(np.median(curve(load_run(place), 'step_seconds').values[1:]))


# ---- Running --------------------------------------------------------------------------------------------------------


def run_all(todo: Sequence[Row], command_of: Callable[[Row], list[str]], jobs: int, changed: Callable) -> None:
  """Runs so many at a time until all are done, or have failed too often. Stopped itself, it stops them."""
  waiting, running = deque(row for row in todo if not collect(row)), {}
  changed()
  shares = core_shares(jobs)
  # A shell's background jobs ignore SIGINT.
  before = {sign: signal.signal(sign, _interrupt) for sign in (signal.SIGTERM, signal.SIGINT)}
  try:
    while waiting or running:
      for slot in set(range(jobs)) - set(running):
        if not waiting:
          break
        row = waiting.popleft()
        if collect(row):  # by another process, perhaps
          continue
        if someone_has(Path(row['model_dir'])):  # a sweep that was killed: its runs go on without it
          waiting.append(row)
          continue
        running[slot] = row, start(row, command_of(row), shares[slot])
      for slot, (row, process) in list(running.items()):
        if (code := process.poll()) is not None:
          del running[slot]
          if not collect(row):
            row |= {'status': 'failed', 'error': last_line((Path(row['model_dir']) / 'log.txt').read_text()) or code}
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


def collect(row: Row) -> bool:
  """Reads what a run left, if it is finished; returns whether it is.

  `loss` is the training cross-entropy over the last tenth of the steps, `eval_loss` that of validation at the end, both
  in nats per token; `step_seconds` is the median step; `seconds` are all steps'.
  """
  folder = Path(row['model_dir'])
  if not (folder / 'summary.json').exists():
    return False
  run = load_run(folder)
  validation, training = curve(run, 'cross_entropy', 'validation'), curve(run, 'cross_entropy')
  if not len(validation.steps) or validation.steps[-1] != row['steps']:
    return False
  times = curve(run, 'step_seconds')
  row |= {
    'status': 'done',
    'loss': float(np.mean(training.values[training.steps > 0.9 * row['steps']])),
    'eval_loss': validation.last,
    'bits_per_byte': run.summary.get('validation_bits_per_byte'),
    'step_seconds': times.median,
    'seconds': float(np.nansum(times.values * np.diff(times.steps, prepend=0))),
  }
  row.pop('error', None)
  return True


def last_line(text: str) -> str:
  """The last line that says something."""
  return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), '')


# ---- What is kept ---------------------------------------------------------------------------------------------------


def begin(folder: Path, settings: Mapping[str, Any], config: str) -> None:
  """Keeps what all runs share, and refuses to add to a sweep of something else."""
  place, kept = folder / 'sweep.json', folder / 'sweep.gin'
  if place.exists():
    before = json.loads(place.read_text())
    same = {'settings': before == settings, 'configuration': kept.read_text() == config}
    if not all(same.values()):
      raise ConfigError(
        f'{folder} holds a sweep of other {" and ".join(k for k, v in same.items() if not v)} (see sweep.json and'
        ' sweep.gin there): choose another MODEL_DIR.'
      )
    return
  kept.write_text(config)
  place.write_text(json.dumps(settings, indent=2))


def read(folder: Path) -> list[Row]:
  """The runs so far. What a killed sweep left running is planned again: whether it is finished its own folder says."""
  rows = read_rows(folder)
  for row in rows:
    row['tries'] = 0
    if row['status'] == 'running':
      row['status'] = 'planned'
  return rows


def write(folder: Path, rows: Sequence[Row]) -> None:
  """All runs, at once."""
  temporary = folder / 'sweep.jsonl.tmp'
  temporary.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  os.replace(temporary, folder / 'sweep.jsonl')
