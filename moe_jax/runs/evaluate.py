"""Evaluation of a run's newest checkpoint, or of every one, on a split: the objective's metrics, and the task's own."""

import functools
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.objectives import LanguageModeling
from moe_jax.paths import append, to_path
from moe_jax.runs.progress import describe_loss, say
from moe_jax.runs.setup import Data, Devices, at_least_one, restore, trained, variables_of
from moe_jax.runs.specialization import Watcher
from moe_jax.runs.task_metrics import TaskMetrics
from moe_jax.training.metrics import averaged, with_bits_per_byte
from moe_jax.training.step import eval_step


def evaluate(
  model_dir: str,
  objective: LanguageModeling,
  data: Data,
  devices: Devices,
  eval_steps: int | None = None,
  split: str = 'validation',
  all_checkpoints: bool = False,
  task_metrics: TaskMetrics = TaskMetrics(),
  specialization: int | None = None,
) -> list[dict[str, Any]]:
  """Measures checkpoints, and adds one object each to evaluation.jsonl in `model_dir`; optimizer state is not read.

  How sure a model is of its choices goes to calibration.json there, task by task: the latest that was measured of each.

  Args:
    model_dir: where the run lives.
    objective: model and loss.
    data: the task.
    devices: where to run.
    eval_steps: batches for the objective's metrics; None for all of the split.
    split: of the task.
    all_checkpoints: the older ones too, oldest first.
    task_metrics: how those of the task are taken.
    specialization: batches over which to watch what experts specialise in, for specialization.json; None: not at all.

  Returns:
    What was written: step, split, and metrics by name; those of tasks as task/metric, and their average.

  Raises:
    ConfigError: if there is no checkpoint, or the task has no such split.
  """
  if eval_steps is not None:
    at_least_one(EVAL_STEPS=eval_steps)
  program, checkpointer = trained(model_dir, objective, data, devices)
  objective = data.tell_bytes(objective)
  measure = jax.jit(functools.partial(eval_step, objective=objective), out_shardings=program.everywhere)
  results = []
  with program.activate(), checkpointer:
    watcher = None if specialization is None else Watcher(program, objective, data, split, specialization)
    measure_tasks = task_metrics.prepare(program, objective, data, split)
    for step in checkpointer.all_steps()[0 if all_checkpoints else -1 :]:
      state = restore(program, checkpointer, step)
      batches = itertools.islice(data.held_out(program.mesh, split), eval_steps)
      values = with_bits_per_byte(averaged(measure(state, batch) for batch in batches))
      result = {'step': step, 'split': split, **{name: np.asarray(value).tolist() for name, value in values.items()}}
      if watcher:
        watcher(step, variables_of(state))
      answers, calibrated = measure_tasks(variables_of(state))
      results.append(result | answers)
      say(f'step {step}: {split} {describe_loss(values)}, accuracy {float(values["accuracy"]):.3f}')
      for name, value in answers.items():
        say(f'step {step}: {split} {name} {value:.4g}')
      if jax.process_index() == 0:
        folder = to_path(model_dir)
        append(folder / 'evaluation.jsonl', json.dumps(results[-1]) + '\n')
        place = {'step': step, 'split': split}
        _update(folder / 'calibration.json', {task: place | of for task, of in calibrated.items()})
    if watcher:
      say(f'specialization: {watcher.write(model_dir)}')
  return results


def _update(path: Path, found: Mapping[str, Any]) -> None:
  """Puts these entries into a JSON file, in place of those of the same names."""
  if found:
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **found}, indent=1) + '\n')
