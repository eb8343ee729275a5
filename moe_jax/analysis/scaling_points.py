"""Points for scaling laws: what runs were, and the loss that came of it.

Points are columns of equal length, by name: float64[n] where they hold numbers, else arrays of text.
"""

import csv
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.types import ConfigError

Row = dict[str, Any]


def read_points(path: str | pathlib.Path, **stand_ins: str) -> dict[str, np.ndarray]:
  """Points of a table or of a sweep.

  Overrides of a sweep's runs become columns by their names in lower case. Besides, where a file has what it takes:
  `experts` is num_experts, and 1 for a dense twin (expert_every = 0); `ratio` is parameters over active_parameters;
  `loss` is eval_loss, which laws speak of.

  Args:
    path: of a CSV with a line of names, where lines that begin with # are passed over; or of a sweep.jsonl, a JSON
      object a line, where runs are passed over whose `status` is not 'done'.
    **stand_ins: columns that the file lacks, and the column to take for each. It is for you to know that one may stand
      for the other, as `dense_parameters='active_parameters'` may at one expert a token and a small vocabulary.

  Raises:
    ConfigError: if there is no such file, no run in it that is done, or no column to stand in.
  """
  path = pathlib.Path(path)
  if path.suffix not in _READERS:
    raise ConfigError(f'{path}: points are read from a .csv or a .jsonl file.')
  if not path.is_file():
    raise ConfigError(f'{path} is not there: points are read from a .csv or a .jsonl file.')
  rows = [_derived(row) for row in _READERS[path.suffix](path)]
  if not rows:
    raise ConfigError(f'{path} has no run that is done.')
  evaluated = [row.get('eval_loss') not in (None, '') for row in rows]
  if any(evaluated):
    if not all(evaluated):
      raise ConfigError(f'{path}: point {evaluated.index(False) + 1} has no eval_loss, and others have: leave it out.')
    rows = [{**row, 'loss': row['eval_loss']} for row in rows]
  points = {
    name: _column([row.get(name) for row in rows]) for name in dict.fromkeys(key for row in rows for key in row)
  }
  for name, stand_in in stand_ins.items():
    if stand_in not in points:
      raise ConfigError(f'{path} has no column {stand_in} to stand for {name}: it has {", ".join(points)}.')
    points[name] = points[stand_in]
  return points


def select(points: Mapping[str, np.ndarray], **values: Any) -> dict[str, np.ndarray]:
  """Those points whose columns have these values, or one of them: `select(points, router='hash', experts=[8, 64])`."""
  chosen = np.all([np.isin(points[name], value) for name, value in values.items()], axis=0)
  return {name: column[chosen] for name, column in points.items()}


def checked(points: Mapping[str, Any], columns: Sequence[str], constants: int, wanted_by: str) -> dict[str, np.ndarray]:
  """The columns and 'loss', float64[n] each, of points that can be fitted.

  Args:
    points: to check.
    columns: that have to vary.
    constants: how many a fit looks for. It takes as many places, and one point more.
    wanted_by: the law, to name.

  Raises:
    ConfigError: if that is not so, or if a number is not finite and positive.
  """
  taken = {}
  for name in (*columns, 'loss'):
    if name not in points:
      hint = (
        'loss, measured' if name == 'loss' else f'{name}; another column may stand in: read_points(path, {name}=...)'
      )
      raise ConfigError(f'To fit {wanted_by} points need the column {hint}. They have {", ".join(points)}.')
    taken[name] = _numbers(name, points[name])
  sizes = {name: len(values) for name, values in taken.items()}
  if len(set(sizes.values())) > 1:
    raise ConfigError(f'Columns have to be of one length: {", ".join(f"{name} {n}" for name, n in sizes.items())}.')
  places = len(np.unique(np.stack([taken[name] for name in columns]), axis=1).T)
  for name in columns:
    if np.ptp(taken[name]) == 0:
      raise ConfigError(
        f'To fit {wanted_by} {name} has to vary: it is {taken[name][0]:g} at all points. Take another law.'
      )
  if sizes['loss'] <= constants or places < constants:
    raise ConfigError(
      f'{wanted_by} has {constants} constants: it takes {constants + 1} points at {constants} places of'
      f' {", ".join(columns)} to fit them, and there are {sizes["loss"]} at {places}.'
    )
  return taken


def _numbers(name: str, values: Any) -> np.ndarray:
  values = np.atleast_1d(values)
  if values.size == 0:
    raise ConfigError(f'There are no points: the column {name} is empty.')
  if values.dtype.kind not in 'iuf':
    raise ConfigError(f'{name} has to be numbers: at point 1 it is {str(values[0])!r}.')
  bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
  if bad.size:
    raise ConfigError(
      f'{name} has to be finite and positive: at point {bad[0] + 1} of {len(values)} it is {values[bad[0]]}.'
    )
  return values.astype(np.float64)


def _derived(row: Row) -> Row:
  """With the columns that follow from others."""
  if row.get('expert_every') == 0:
    row = {'experts': 1} | row
  elif 'num_experts' in row:
    row = {'experts': row['num_experts']} | row
  sizes = [_number(row.get(name)) for name in ('parameters', 'active_parameters')]
  return row if any(map(math.isnan, sizes)) else {'ratio': sizes[0] / sizes[1]} | row


def _column(values: Iterable[Any]) -> np.ndarray:
  values = list(values)
  numbers = np.array([_number(value) for value in values])
  texts = [value for value, number in zip(values, numbers) if math.isnan(number) and str(value).lower() not in _NOTHING]
  return np.array(['' if value is None else str(value) for value in values]) if texts else numbers


def _number(value: Any) -> float:
  """As a number; nan where it is none."""
  try:
    return float(value)
  except (TypeError, ValueError):
    return math.nan


def _table(path: pathlib.Path) -> list[Row]:
  with path.open(newline='') as file:
    return list(csv.DictReader(line for line in file if not line.startswith('#')))


def _sweep(path: pathlib.Path) -> list[Row]:
  rows = []
  for number, line in enumerate(path.read_text().splitlines(), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      overrides = {name.lower(): value for name, value in row.pop('overrides', {}).items()}
    except (ValueError, AttributeError, TypeError) as error:
      raise ConfigError(f'{path}, line {number} is not a run of a sweep: it has to be one JSON object.') from error
    if row.get('status', 'done') == 'done':
      rows.append(overrides | row)
  return rows


_NOTHING = ('', 'none', 'nan')
_READERS = {'.csv': _table, '.jsonl': _sweep}
