"""The calibration of runs: a reliability diagram a task and a curve a run, of what `--run_mode=eval` has measured.

Reads `calibration.json` in a MODEL_DIR, where there is one; `moe_jax/analysis/calibration.py` says what is in it.
Words are in `calibration.html.j2`, which `report.html.j2` includes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from moe_jax.paths import to_path
from moe_jax.runs.drawing import COLOR, svg

MEASURES = ('ece', 'brier', 'accuracy')


def load(model_dir: str | Path) -> dict[str, Any]:
  """What evaluations have measured, task by task; nothing if none had choices."""
  path = to_path(model_dir) / 'calibration.json'
  return json.loads(path.read_text('utf-8')) if path.exists() else {}


def section(names: Sequence[str], model_dirs: Sequence[str | Path]) -> dict[str, Any] | None:
  """Panels and rows of the table, of the runs in `model_dirs`, which the page calls `names`; None without any."""
  runs = dict(zip(names, map(load, model_dirs), strict=True))
  tasks = sorted({task for found in runs.values() for task in found})
  if not tasks:
    return None
  return {'panels': [panel(task, runs) for task in tasks], 'rows': rows(tasks, runs)}


def panel(task: str, runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """The reliability diagram of a task, above how many questions have which confidence; and what its caption tells."""
  upper, lower = (figure := Figure(figsize=(3.3, 3.9), layout='constrained')).subplots(
    2, 1, sharex=True, height_ratios=(3, 1)
  )
  upper.plot([0, 1], [0, 1], color=COLOR['muted'], linewidth=0.7, dashes=(4, 3))
  facts = []
  for i, (name, found) in enumerate(runs.items()):
    if task in found:
      confidence, accuracy, questions = columns(found[task])
      color, share, some = COLOR[f'run-{i % 8}'], questions / max(questions.sum(), 1), questions > 0
      upper.plot(confidence[some], accuracy[some], 'o-', color=color, linewidth=1.3, markersize=3.5, clip_on=False)
      lower.stairs(share, np.linspace(0, 1, len(share) + 1), color=color, fill=True, alpha=0.25)
      lower.stairs(share, np.linspace(0, 1, len(share) + 1), color=color, linewidth=1)
      facts.append(
        {'run': name, 'color': i % 8, 'sure': np.nansum(confidence * share), 'right': found[task]['accuracy']}
      )
  upper.set(xlim=(0, 1), ylim=(0, 1), ylabel='right')
  lower.set(xlabel='confidence', ylabel='questions', ylim=(0, None))
  for axes in (upper, lower):
    axes.spines[:].set_visible(False)
    axes.grid(axis='y', color=COLOR['rule'], linewidth=0.6)
    axes.xaxis.set_major_formatter(PercentFormatter(1, 0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
  return {'task': task, 'bins': len(share), 'runs': facts, 'svg': svg(figure)}


def columns(found: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
  """Confidence, accuracy and questions of each bin of a task, float[B]; NaN where a bin is empty."""
  return tuple(np.array(found['reliability'][name], float) for name in ('confidence', 'accuracy', 'questions'))


def rows(tasks: Sequence[str], runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
  """The table: of each task and run the measures and their intervals; and the means over tasks that all runs have."""
  found = [
    {'task': task, 'run': name, 'color': i % 8, **measured[task]}
    for task in tasks
    for i, (name, measured) in enumerate(runs.items())
    if task in measured
  ]
  shared = [task for task in tasks if all(task in measured for measured in runs.values())]
  if len(shared) < 2:
    return found
  return found + [
    {'task': f'mean of {len(shared)} tasks', 'run': name, 'color': i % 8, 'intervals': {}}
    | {measure: float(np.mean([measured[task][measure] for task in shared])) for measure in MEASURES}
    | {'questions': sum(measured[task]['questions'] for task in shared)}
    for i, (name, measured) in enumerate(runs.items())
  ]
