"""What a sweep shows: each model beside its dense twin, at equal cost and at equal time, and the laws that fit it."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.analysis.scaling_fits import bootstrap, fit
from moe_jax.analysis.scaling_laws import ONE_SIZE, ONE_SIZE_RATIO, Law
from moe_jax.analysis.scaling_points import read_points, select
from moe_jax.runs.report import curve, load_run
from moe_jax.runs.sweep_grid import dense_twin, name_of
from moe_jax.types import ConfigError

Row = dict[str, Any]
LEVEL = 0.9  # of intervals
_SEED = 'SEED'


@dataclasses.dataclass(frozen=True)
class Learning:
  """Validation losses of a run as it went.

  Attributes:
    steps: float64[n].
    seconds: float64[n], of training until then, every step taken to be the median one.
    losses: float64[n], nats per token.
  """

  steps: np.ndarray
  seconds: np.ndarray
  losses: np.ndarray

  def at(self, seconds: float) -> float:
    """The loss after so long, between two evaluations in proportion to the logarithm of time; nan before the first."""
    if not len(self.seconds) or seconds < self.seconds[0]:
      return np.nan
    return float(np.interp(np.log(seconds), np.log(self.seconds), self.losses))


@dataclasses.dataclass(frozen=True)
class Cell:
  """The runs that differ in their seed alone.

  Attributes:
    overrides: without the seed.
    rows: of sweep.jsonl.
    losses: float64[n], see `without_seeds`.
    gains: float64[n], nats per token by which each run's loss is below that of its dense twin, which has its seed.
    gains_in_time: float64[n], the same at the time that the twin took in all, or this run if that is less; on one
      machine, with as much beside it.
  """

  overrides: Mapping[str, Any]
  rows: Sequence[Row]
  losses: np.ndarray
  gains: np.ndarray
  gains_in_time: np.ndarray

  @property
  def name(self) -> str:
    """Of the runs, without the seed."""
    return name_of(self.overrides)

  def mean(self, key: str) -> float:
    """Of a number of the runs."""
    return float(np.mean([row[key] for row in self.rows]))


def read_rows(folder: Path) -> list[dict[str, Any]]:
  """The runs of sweep.jsonl, none if it is not there yet, with what each has left in its folder since."""
  path = folder / 'sweep.jsonl'
  rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
  rows = [{**row, 'model_dir': str(folder / 'runs' / row['name'])} for row in rows]  # the sweep may have been moved
  for row in rows:
    collect(row)
  return rows


def write_rows(folder: Path, rows: Sequence[Row]) -> None:
  """All runs, at once, if anything has changed."""
  path, text = folder / 'sweep.jsonl', ''.join(json.dumps(row) + '\n' for row in rows)
  if not path.exists() or path.read_text() != text:
    path.with_suffix('.tmp').write_text(text)
    os.replace(path.with_suffix('.tmp'), path)


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


def without_seeds(rows: Sequence[Row]) -> dict[str, float]:
  """Each run's loss less what its seed's dense twin lies above the mean of the twins, by name.

  A seed is an order of the data too, which all models of that seed have in common: models of which not all seeds were
  run compare by this, as they would if all had been.
  """
  by_name = {row['name']: row for row in rows}
  twins: dict[str, list[float]] = {}
  for row in rows:
    if row['overrides'].get('EXPERT_EVERY') == 0:
      twins.setdefault(name_of(_without_seed(row)), []).append(row['eval_loss'])
  found = {}
  for row in rows:
    twin = by_name.get(name_of(dense_twin(row['overrides'])))
    common = twin['eval_loss'] - float(np.mean(twins[name_of(_without_seed(twin))])) if twin else 0.0
    found[row['name']] = row['eval_loss'] - common
  return found


def cells(rows: Sequence[Row], learning: Mapping[str, Learning]) -> list[Cell]:
  """Finished runs by what they are, in the order of the first of each.

  Args:
    rows: that are finished.
    learning: how each went, by name.
  """
  by_name, losses = {row['name']: row for row in rows}, without_seeds(rows)
  groups: dict[str, list[Row]] = {}
  for row in rows:
    groups.setdefault(name_of(_without_seed(row)), []).append(row)
  found = []
  for group in groups.values():
    pairs = [(row, by_name.get(name_of(dense_twin(row['overrides'])))) for row in group]
    paired = [(row, twin) for row, twin in pairs if twin and twin is not row]
    gains = [twin['eval_loss'] - row['eval_loss'] for row, twin in paired]
    timed = []
    for row, twin in paired:
      own, other = learning[row['name']], learning[twin['name']]
      seconds = min(own.seconds[-1], other.seconds[-1])
      timed.append(other.at(seconds) - own.at(seconds))
    alike = np.array([losses[row['name']] for row in group])
    found.append(Cell(_without_seed(group[0]), group, alike, np.array(gains), np.array(timed)))
  return found


def _without_seed(row: Row) -> dict[str, Any]:
  return {name: value for name, value in row['overrides'].items() if name != _SEED}


def noise(found: Sequence[Cell]) -> float:
  """Standard deviation of the loss between seeds, pooled over cells; nan where no cell has two."""
  return _pooled([np.array([row['eval_loss'] for row in cell.rows]) for cell in found])


def gain_noise(found: Sequence[Cell]) -> float:
  """As `noise`, of the gains: what runs of one seed have in common, such as their data, cancels in them."""
  return _pooled([cell.gains for cell in found])


def _pooled(groups: Sequence[np.ndarray]) -> float:
  groups = [group for group in groups if len(group) > 1]
  freedom = sum(len(group) - 1 for group in groups)
  return float(np.sqrt(sum(np.sum((x - x.mean()) ** 2) for x in groups) / freedom)) if freedom else np.nan


def fits(folder: Path) -> list[dict[str, Any]]:
  """Laws that the finished runs of a sweep tell the constants of, with intervals.

  Of each frequency, how the loss falls with the number of experts, the dense twin being one expert; and of all runs
  together, how it falls with all over active parameters. Losses are those `without_seeds`. There are no laws where
  anything else was swept or held: a line through unlike models means nothing.
  """
  rows = [row for row in read_rows(folder) if row['status'] == 'done']
  alike = all(set(row['overrides']) <= {'NUM_EXPERTS', 'EXPERT_EVERY', _SEED} for row in rows)
  if not alike or json.loads((folder / 'sweep.json').read_text())['hold'] != 'flops':
    return []
  points, losses = read_points(folder / 'sweep.jsonl'), without_seeds(rows)
  points['loss'] = np.array([losses[name] for name in points['name']])
  every = sorted({row['overrides'].get('EXPERT_EVERY') for row in rows} - {0, None})
  asked: list[tuple[str, Law, Mapping[str, Any]]] = [
    (f'EXPERT_EVERY={some}', ONE_SIZE, select(points, expert_every=[0, some])) for some in every
  ]
  asked = asked or [('NUM_EXPERTS', ONE_SIZE, points)]
  asked.append(('all runs', ONE_SIZE_RATIO, points))
  found: list[dict[str, Any]] = []
  for which, law, some in asked:
    try:
      fitted = fit(law, some)
    except ConfigError as reason:
      found.append({'which': which, 'law': law.name, 'formula': law.formula, 'refused': str(reason)})
      continue
    spread = bootstrap(fitted)
    column = law.columns[0]
    at = np.geomspace(some[column].min(), some[column].max(), 30)
    found.append(
      {
        'which': which,
        'law': law.name,
        'formula': law.formula,
        'column': column,
        'constants': dict(fitted.constants),
        'intervals': spread.intervals(LEVEL),
        'level': LEVEL,
        'points': len(fitted.residuals),
        'rmse': fitted.rmse,
        'doubling': 2 ** fitted.constants['b'] - 1,
        'doubling_interval': [2**bound - 1 for bound in spread.intervals(LEVEL)['b']],
        'at': at.tolist(),
        'predicted': fitted.loss({column: at}).tolist(),
        'band': spread.loss({column: at}, LEVEL).tolist(),
        'measured': [some[column].tolist(), some['loss'].tolist()],
      }
    )
  return found


def write_fits(folder: Path) -> list[dict[str, Any]]:
  """Keeps the fits in fits.json beside the sweep."""
  found = fits(folder)
  (folder / 'fits.json').write_text(json.dumps(found, indent=2))
  return found
