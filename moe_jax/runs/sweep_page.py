"""The page of a sweep: its table, loss over its axes, against FLOPs and against time, and the laws that fit."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, MaxNLocator, NullLocator, ScalarFormatter

from moe_jax.paths import is_remote, to_path
from moe_jax.runs import sweep_results
from moe_jax.runs.drawing import BLUE, COLOR, ORANGE, STYLE, note, si, spread, svg
from moe_jax.runs.report import curve, load_run
from moe_jax.runs.sweep_grid import FILE
from moe_jax.runs.sweep_results import Cell, Learning
from moe_jax.types import ConfigError

_GAIN = LinearSegmentedColormap.from_list(
  'gain', [(0.0, (*ORANGE, 0.85)), (0.5, (*ORANGE, 0.0)), (0.5, (*BLUE, 0.0)), (1.0, (*BLUE, 0.85))]
)
_SHOWN_AXES = ('EXPERT_EVERY', 'NUM_EXPERTS')  # rows and columns, where a sweep has them


def sweep_report(model_dir: str | Path, output: str | Path | None = None) -> Path:
  """Writes the page of a sweep, and beside it fits.json; returns the page's path.

  Args:
    model_dir: of the sweep, with its sweep.jsonl.
    output: the page's path; by default `report.html` in the MODEL_DIR.

  Raises:
    ConfigError: if no run is finished.
  """
  if is_remote(model_dir):
    raise ConfigError(f'The sweep {model_dir!r} is in a bucket: copy it to a folder.')
  folder = Path(model_dir)
  rows = sweep_results.read_rows(folder)
  sweep_results.write_rows(folder, rows)
  finished = [row for row in rows if row['status'] == 'done']
  if not finished:
    raise ConfigError(f'{folder}: no run of the sweep is finished. Its own command goes on with it.')
  learning = {row['name']: learning_of(row) for row in finished}
  found = sweep_results.cells(finished, learning)
  laws = sweep_results.write_fits(folder)
  with matplotlib.rc_context(STYLE):
    panels = {
      'gains': gain_panel(found),
      'spent': [
        learning_panel(found, learning, 'flops', 'training FLOPs'),
        learning_panel(found, learning, 'seconds', 'seconds of training'),
      ],
      'fits': [fit_panel(law) for law in laws if 'constants' in law],
    }
  jinja = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
  jinja.filters['si'] = si
  page = jinja.get_template('sweep.html.j2').render(
    name=folder.resolve().name,
    settings=json.loads((folder / 'sweep.json').read_text()),
    config=(folder / 'sweep.gin').read_text(),
    rows=rows,
    cells=found,
    laws=laws,
    noise=sweep_results.noise(found),
    gain_noise=sweep_results.gain_noise(found),
    level=sweep_results.LEVEL,
    known=np.isfinite,
    label=label,
    **panels,
  )
  path = to_path(output or folder / 'report.html')
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(page, encoding='utf-8')
  return path


def learning_of(row: Mapping[str, Any]) -> Learning:
  """Of a finished run, from its own log."""
  run = load_run(row['model_dir'])
  losses = curve(run, 'cross_entropy', 'validation')
  return Learning(losses.steps, losses.steps * curve(run, 'step_seconds').median, losses.values)


def label(overrides: Mapping[str, Any]) -> str:
  """For people: 'dense', or '8 experts, every 2'."""
  rest = {k: v for k, v in overrides.items() if k not in ('EXPERT_EVERY', 'NUM_EXPERTS')}
  words = [f'{Path(str(v)).stem}' if k == FILE else f'{k.lower()} {v}' for k, v in rest.items()]
  if overrides.get('EXPERT_EVERY') == 0:
    return ', '.join(['dense', *words])
  experts = [f'{overrides["NUM_EXPERTS"]} experts'] if 'NUM_EXPERTS' in overrides else []
  every = [f'every {overrides["EXPERT_EVERY"]}'] if 'EXPERT_EVERY' in overrides else []
  return ', '.join([*experts, *every, *words])


def axes_of(found: Sequence[Cell]) -> tuple[str, str] | None:
  """The two names along which a heat map is drawn: expert frequency and count if both vary, else the two that vary."""
  sparse = [cell.overrides for cell in found if cell.overrides.get('EXPERT_EVERY') != 0]
  names = dict.fromkeys(name for overrides in sparse for name in overrides)
  varying = [name for name in names if len({repr(overrides.get(name)) for overrides in sparse}) > 1]
  if set(_SHOWN_AXES) <= set(varying):
    return _SHOWN_AXES
  return (varying[0], varying[1]) if len(varying) == 2 else None


def gain_panel(found: Sequence[Cell]) -> dict[str, Any] | None:
  """A heat map of how far each model is below its dense twin, in nats per token; of more axes, the best is shown."""
  if not (names := axes_of(found)):
    return None
  if not (sparse := [cell for cell in found if len(cell.gains)]):
    return None  # no twin is finished
  rows, columns = (list(dict.fromkeys(cell.overrides.get(name) for cell in sparse)) for name in names)
  rows, columns = _in_order(rows), _in_order(columns)
  matrix = np.full((len(rows), len(columns)), np.nan)
  losses = matrix.copy()
  for cell in sparse:
    at = rows.index(cell.overrides.get(names[0])), columns.index(cell.overrides.get(names[1]))
    if not matrix[at] > np.mean(cell.gains):
      matrix[at], losses[at] = np.mean(cell.gains), np.mean(cell.losses)
  most = np.nanmax(np.abs(matrix))
  axes = Figure(figsize=(6.6, 0.8 + 0.42 * len(rows)), layout='constrained').subplots()
  axes.imshow(matrix, _GAIN, vmin=-most, vmax=most, aspect='auto', interpolation='none')
  for (i, j), gain in np.ndenumerate(matrix):
    if np.isfinite(gain):
      axes.text(j, i, f'{losses[i, j]:.3f}\n{-gain:+.3f}', ha='center', va='center', size=8)
  axes.set(xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows)), yticklabels=rows)
  axes.set(xlabel=names[1], ylabel=names[0])
  axes.spines[:].set_visible(False)
  best = max(sparse, key=lambda cell: np.mean(cell.gains))
  threshold = 2 * sweep_results.gain_noise(found)  # of one run; the mean of several strays less
  told = [np.mean(c.gains) for c in sparse if abs(np.mean(c.gains)) > threshold / np.sqrt(len(c.gains))]
  facts = {'of': len(sparse), 'below': sum(x > 0 for x in told), 'above': sum(x < 0 for x in told)}
  return {**facts, 'threshold': threshold, 'best': best, 'label': label(best.overrides), 'svg': svg(axes.figure)}


def _in_order(values: list[Any]) -> list[Any]:
  return sorted(values) if all(isinstance(x, (int, float)) for x in values) else values


def learning_panel(
  found: Sequence[Cell], learning: Mapping[str, Learning], key: str, unit: str
) -> dict[str, Any] | None:
  """Validation loss against what was spent, a line a cell, the mean over seeds; the dense twin in ink."""
  axes = Figure(figsize=(6.6, 3.0), layout='constrained').subplots()
  sparse = [cell for cell in found if cell.overrides.get('EXPERT_EVERY') != 0]
  ends: list[tuple[float, str, str]] = []
  for cell in found:
    runs = [learning[row['name']] for row in cell.rows]
    points = min(len(run.steps) for run in runs)
    if points == 0:
      continue
    losses = np.mean([run.losses[-points:] for run in runs], axis=0)
    if key == 'seconds':
      spent = np.mean([run.seconds[-points:] for run in runs], axis=0)
    else:
      per_step = cell.rows[0]['flops'] / cell.rows[0]['steps']
      spent = runs[0].steps[-points:] * per_step
    dense = cell not in sparse
    depth = 7 if len(sparse) < 2 else round(7 * sparse.index(cell) / (len(sparse) - 1)) if not dense else 0
    color = COLOR['ink'] if dense else COLOR[f'depth-{depth}']
    axes.plot(spent, losses, 'o-', color=color, linewidth=1.6 if dense else 1.0, markersize=3, zorder=3 if dense else 2)
    ends.append((losses[-1], label(cell.overrides), color))
  if not ends:
    return None
  axes.set_xscale('log')
  axes.set_xlabel(unit)
  axes.xaxis.set_minor_locator(NullLocator())
  low, high = axes.get_xlim()
  round_numbers = (m * 10.0**e for e in range(-3, 30) for m in (1, 2, 5))
  axes.xaxis.set_major_locator(FixedLocator([x for x in round_numbers if low <= x <= high]))
  axes.xaxis.set_major_formatter(EngFormatter(sep=''))
  ends.sort()
  if len(ends) > 9:
    kept = {0, len(ends) - 1, *np.linspace(0, len(ends) - 1, 7).astype(int)}
    ends = [end for i, end in enumerate(ends) if i in kept or end[1].startswith('dense')]
  bottom, top = axes.get_ylim()
  heights = spread([end for end, _, _ in ends], (top - bottom) * 0.06)
  for (_, text, color), height in zip(ends, heights):
    note(axes, text, 1, height, (8, 0), color=color)
  _tidy(axes, 'validation loss, nats per token')
  return {'svg': svg(axes.figure)}


def fit_panel(law: Mapping[str, Any]) -> dict[str, Any]:
  """Measured losses, the law, and the band between which it lies in so many of a hundred resamples."""
  axes = Figure(figsize=(3.3, 2.4), layout='constrained').subplots()
  x, y = law['measured']
  axes.fill_between(law['at'], *law['band'], color=COLOR['run-0'], alpha=0.18, linewidth=0)
  axes.plot(law['at'], law['predicted'], color=COLOR['run-0'], linewidth=1.3)
  axes.plot(x, y, 'o', color=COLOR['ink'], markersize=3)
  axes.set_xscale('log')
  axes.xaxis.set_major_locator(MaxNLocator(5) if max(x) / min(x) < 3 else FixedLocator(_ticks(x)))
  axes.xaxis.set_minor_locator(NullLocator())
  axes.xaxis.set_major_formatter(ScalarFormatter())
  axes.set_xlabel('experts a sparse layer' if law['column'] == 'experts' else 'all over active parameters')
  axes.margins(x=0.04)
  _tidy(axes, f'nats per token, {law["which"]}')
  return {'law': law, 'svg': svg(axes.figure)}


def _ticks(values: Sequence[float]) -> list[float]:
  distinct = sorted(set(values))
  if len(distinct) <= 8 and all(float(x).is_integer() for x in distinct):
    return distinct
  powers = (2.0**i for i in itertools.count())
  return [x for x in itertools.takewhile(lambda x: x <= max(values) * 1.01, powers) if x >= min(values) / 1.01]


def _tidy(axes: Any, unit: str) -> None:
  axes.figure.suptitle(unit, x=0, ha='left', size=8.5, color=COLOR['muted'])
  axes.spines[:].set_visible(False)
  axes.grid(axis='y', color=COLOR['rule'], linewidth=0.6)
