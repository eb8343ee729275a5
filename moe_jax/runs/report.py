"""One self-contained HTML page about a run, or about several overlaid: `report(['runs/quickstart'])`.

Reads what training leaves in a MODEL_DIR: `metrics.jsonl`, and where they are there `summary.json` and `config.gin`.
Numbers and figures are made here, words in `report.html.j2`; sections of other files are made there, as
`calibration_page` and `specialization_page` say.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, ScalarFormatter

from moe_jax.paths import to_path
from moe_jax.runs import calibration_page, specialization_page
from moe_jax.runs.drawing import BLUE, COLOR, ORANGE, STYLE, note, si, spread, svg

# Clear at the centre: a uniform share has the colour of the page, be it light or dark.
_LOAD_STOPS = [(0.0, (*BLUE, 0.9)), (0.5, (*BLUE, 0.0)), (0.5, (*ORANGE, 0.0)), (1.0, (*ORANGE, 0.9))]
_LOAD_COLORS = LinearSegmentedColormap.from_list('load', _LOAD_STOPS)
_LINES: Mapping[str, tuple[str, Callable, str, tuple[float, float]]] = {
  # unit, what is drawn of the values, the statistic the caption tells, inches
  'bits_per_byte': ('bits per byte', np.asarray, 'last', (6.6, 2.6)),
  'cross_entropy': ('nats', np.asarray, 'last', (6.6, 2.6)),
  'loss': ('nats', np.asarray, 'last', (6.6, 2.6)),
  'expert_load': ('times the uniform share', lambda load: load.max(1) / load.mean(1), 'last', (6.6, 2.6)),
  'dropped_choices': ('% of choices', lambda share: 100 * share, 'last', (6.6, 2.6)),
  'router_entropy': ('nats', np.asarray, 'last', (6.6, 2.6)),
  'step_seconds': ('seconds', np.asarray, 'median', (3.3, 2.2)),
  'tokens_per_second': ('tokens per second', np.asarray, 'median', (3.3, 2.2)),
}
_LOSSES = ('bits_per_byte', 'cross_entropy', 'loss')  # drawn with validation; the page shows the first there is


class Run(NamedTuple):
  """What a MODEL_DIR holds. `rows` maps a split to its log lines, in order of step."""

  name: str
  rows: Mapping[str, Sequence[Mapping[str, Any]]]
  summary: Mapping[str, Any]
  config: str


class Curve(NamedTuple):
  """A quantity over training: `steps` int[N], `values` float[N] or, for loads, float[N, E]. NaN is a gap."""

  label: str
  steps: np.ndarray
  values: np.ndarray

  def means(self, most: int) -> tuple[np.ndarray, ...]:
    """Steps and values, averaged over at most `most` stretches."""
    parts = np.array_split(np.arange(len(self.steps)), min(most, len(self.steps)) or 1)
    return tuple(np.array([x[part].mean() for part in parts if len(part)]) for x in (self.steps, self.values))

  @property
  def last(self) -> float:
    """The last finite value, or NaN."""
    return next((float(value) for value in self.values[::-1] if np.isfinite(value)), np.nan)

  @property
  def median(self) -> float:
    """The median of the finite values, or NaN."""
    return float(np.nanmedian(self.values)) if np.isfinite(self.last) else np.nan


def report(model_dirs: Sequence[str | Path], output: str | Path | None = None) -> Path:
  """Writes one HTML page about the runs in `model_dirs`, and returns its path.

  Args:
    model_dirs: the MODEL_DIRs of training runs; several are overlaid.
    output: the page's path; by default `report.html` in the MODEL_DIR, or of several runs in the first's parent.

  Raises:
    ConfigError: if a run has left no metrics.
  """
  runs = [load_run(path) for path in model_dirs]
  if len({run.name for run in runs}) < len(runs):
    runs = [run._replace(name=str(path)) for run, path in zip(runs, model_dirs)]
  with matplotlib.rc_context(STYLE):
    panels = {'heat': [heat_panel(run) for run in runs], 'lines': {key: line_panel(runs, key) for key in _LINES}}
    panels['specializations'] = [specialization_page.panels(path) for path in model_dirs]
    calibration = calibration_page.section([run.name for run in runs], model_dirs)
  jinja = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
  jinja.filters['si'] = lambda value: si(value, places=1).replace('.0', '')
  jinja.tests['known'] = lambda value: isinstance(value, (int, float)) and value == value
  first = to_path(model_dirs[0])
  folder = first if len(runs) == 1 else first.parent
  planned = output is None and (folder / 'plan.html').exists()
  page = jinja.get_template('report.html.j2').render(
    runs=runs, figures=[key_figures(run) for run in runs], planned=planned, calibration=calibration, **panels
  )
  path = to_path(output or folder / 'report.html')
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(page, encoding='utf-8')
  return path


def load_run(model_dir: str | Path) -> Run:
  """Reads a MODEL_DIR. Torn lines are skipped; of two lines for one step, the later wins."""
  folder = to_path(model_dir)
  metrics, summary, config = (folder / name for name in ('metrics.jsonl', 'summary.json', 'config.gin'))
  splits: dict[str, dict[int, dict]] = {}
  for line in metrics.read_bytes().decode('utf-8', 'replace').splitlines() if metrics.exists() else ():
    try:
      row = json.loads(line)
      splits.setdefault(row['split'], {})[row['step']] = row
    except (ValueError, KeyError, TypeError):
      continue  # the run was killed as it wrote
  if not splits:
    from moe_jax.types import ConfigError  # here, so that a report of good runs does not wait for jax

    raise ConfigError(f'{metrics} holds no metrics: train first (--run_mode=train), or check MODEL_DIR.')
  return Run(
    name=folder.resolve().name,
    rows={split: [by_step[step] for step in sorted(by_step)] for split, by_step in splits.items()},
    summary=json.loads(summary.read_text('utf-8')) if summary.exists() else {},
    config=config.read_text('utf-8') if config.exists() else '',
  )


def curve(run: Run, key: str, split: str = 'train') -> Curve:
  """A logged quantity. Lines without it, or with another shape than its last, are left out."""
  rows = [(row['step'], np.asarray(row[key], float)) for row in run.rows.get(split, ()) if key in row]
  rows = [(step, value) for step, value in rows if value.shape == rows[-1][1].shape]
  values = np.array([value for _, value in rows], float)
  return Curve(run.name, np.array([step for step, _ in rows]), np.where(np.isfinite(values), values, np.nan))


def layer_curves(run: Run, metric: str, split: str = 'train') -> list[Curve]:
  """A curve a sparse layer, 'stack_0 · moe · 1', from the keys '…/metric', whose values are [repeats, ...]."""
  keys = {key for row in run.rows.get(split, ()) for key in row if key.endswith(f'/{metric}')}
  ordered = sorted(keys, key=lambda key: (key.startswith('decoder'), key))  # an encoder comes first
  return [
    Curve(' · '.join([*key.split('/')[:-1], str(layer)]), stacked.steps, stacked.values[:, layer])
    for key, stacked in ((key, curve(run, key, split)) for key in ordered)
    for layer in range(stacked.values.shape[1])
  ]


def expert_load_matrix(run: Run) -> tuple[list[str], np.ndarray]:
  """Layer names, and each expert's last load over the uniform share, float[layers, E]; NaN pads narrower layers."""
  loads = layer_curves(run, 'expert_load', 'validation') or layer_curves(run, 'expert_load')
  matrix = np.full((len(loads), max((load.values.shape[1] for load in loads), default=0)), np.nan)
  for row, load in zip(matrix, loads):
    row[: load.values.shape[1]] = load.values[-1] / max(np.mean(load.values[-1]), 1e-20)
  return [load.label for load in loads], matrix


def key_figures(run: Run) -> dict[str, Any]:
  """What the cards and the comparison show: summary.json, and what the log adds. None or NaN is unknown."""
  loads, dropped = expert_load_matrix(run)[1], [layer.last for layer in layer_curves(run, 'dropped_choices')]
  times = curve(run, 'step_seconds')  # means since the line before
  return {
    'name': run.name,
    'train_seconds': float(np.nansum(times.values * np.diff(times.steps, prepend=0))),
    'validation_bits_per_byte': curve(run, 'bits_per_byte', 'validation').last,
    'tokens_per_second': curve(run, 'tokens_per_second').median,
    'step': max(rows[-1]['step'] for rows in run.rows.values()),
    'busiest': np.nanmax(loads) if np.isfinite(loads).any() else None,
    'dropped': 100 * np.mean(dropped) if dropped else None,
    **run.summary,
  }


def heat_panel(run: Run) -> dict[str, Any] | None:
  """The figure of `expert_load_matrix`, and the facts its caption tells."""
  names, matrix = expert_load_matrix(run)
  if not np.isfinite(matrix).any():
    return None
  (layers, experts), most = matrix.shape, np.nanmax(matrix)
  top = float(np.clip(most, 2, 4))
  axes = Figure(figsize=(6.6, 0.75 + 0.23 * layers), layout='constrained').subplots()
  axes.imshow(matrix, _LOAD_COLORS, TwoSlopeNorm(1, 0, top), aspect='auto', interpolation='none')
  for (row, column), load in np.ndenumerate(matrix if max(layers, experts) <= 16 else matrix[:0]):
    axes.text(column, row, f'{load:.2f}' if np.isfinite(load) else '', ha='center', va='center', size=8)
  axes.set(yticks=range(layers), yticklabels=names, xlabel='expert')
  axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
  axes.spines[:].set_visible(False)
  layer, expert = np.unravel_index(np.nanargmax(matrix), matrix.shape)
  facts = {'run': run.name, 'layer': names[layer], 'expert': expert, 'most': most, 'limit': top}
  return facts | {'idle': np.sum(matrix < 0.1), 'total': np.isfinite(matrix).sum(), 'svg': svg(axes.figure)}


def line_panel(runs: Sequence[Run], key: str) -> dict[str, Any] | None:
  """A figure of _LINES, a line a layer, or of several runs a line a run; and the facts its caption tells."""
  (unit, read, statistic, size), curves, labels = _LINES[key], [], []
  for run in runs:
    layers = layer_curves(run, key) or [x for x in [curve(run, key)] if len(x.steps)]
    layers = [x._replace(values=read(x.values)) for x in layers]
    some = layers or [Curve(run.name, np.array([]), np.array([]))]
    curves += layers if len(runs) == 1 else [Curve(run.name, some[0].steps, np.mean([x.values for x in some], 0))]
  if not (known := [x for x in curves if np.isfinite(x.last)]):
    return None
  validation = [curve(run, key, 'validation') for run in runs] if key in _LOSSES else []
  marks = {'uniform': 1.0} if key == 'expert_load' else {}
  marks |= {name: x for name in ('unigram', 'zlib') for run in runs if (x := run.summary.get(f'{name}_{key}'))}
  palette = 'run' if len(curves) in (1, len(runs)) else 'depth'
  axes = Figure(figsize=size, layout='constrained').subplots()
  for i, (line, dots) in enumerate(itertools.zip_longest(curves, validation)):
    color = COLOR[f'run-{i % 8}' if palette == 'run' else f'depth-{round(7 * i / (len(curves) - 1))}']
    axes.plot(*line.means(6000 // len(curves)), color=color, linewidth=0.6, alpha=0.35 if palette == 'run' else 0)
    axes.plot(*line.means(50), 'o-' if len(line.steps) == 1 else '-', color=color, linewidth=1.3, markersize=3.5)
    if dots:
      axes.plot(dots.steps, dots.values, 'o', color=color, ms=3.5 if len(dots.steps) < 50 else 1.8, clip_on=False)
    if len(curves) > 1 and np.isfinite(line.last):
      labels.append((line.last, line.label, color))
  for name, height in marks.items():
    axes.axhline(height, color=COLOR['muted'], linewidth=0.7, dashes=(4, 3))
    note(axes, name, 0.99, height, (0, 5), ha='right')
  low, usual, high = np.nanpercentile(np.concatenate([x.values for x in known]), (0, 90, 100))
  # From zero if that is near; and a first step that compiles may leave the axes, lest it flatten the others.
  axes.set_ylim(0 if 0 <= low <= high / 4 else None, 1.3 * usual if high > 5 * usual > 0 else None)
  labels = [sorted(labels)[i] for i in sorted({*np.linspace(0, len(labels) - 1, 8).astype(int)} if labels else ())]
  bottom, top = axes.get_ylim()
  heights = spread(np.clip([end for end, _, _ in labels], bottom, top), (top - bottom) * 0.14 / (size[1] - 0.5))
  for (_, label, color), height in zip(labels, heights):
    note(axes, label if len(label) < 33 else f'…{label[-31:]}', 1, height, (10, 0), color=color)
  axes.figure.suptitle(f'{unit}, by step', x=0, ha='left', size=8.5, color=COLOR['muted'])
  axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
  axes.xaxis.set_major_formatter(EngFormatter(sep=''))
  axes.yaxis.set_major_formatter(EngFormatter(sep='') if high >= 1e4 else ScalarFormatter())
  axes.spines[:].set_visible(False)
  axes.grid(axis='y', color=COLOR['rule'], linewidth=0.6)
  best = min((x for x in validation if np.isfinite(x.last)), key=lambda x: x.last, default=None)
  facts = {'best': best, 'lost': [x.label for x in known if np.isnan(x.values[-1])], 'of': len(known)}
  return facts | {'top': max(known, key=lambda x: getattr(x, statistic)), 'svg': svg(axes.figure)}
