"""Where metrics go: a line of JSON, and TensorBoard files."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Self

import jax
import numpy as np

from moe_jax.paths import copy_files, writable
from moe_jax.types import Metrics

Values = dict[str, np.ndarray]
_SHOW_SECONDS = 60.0


def averaged(batches: Iterable[Metrics]) -> Values:
  """The mean of batches' metrics, each batch weighing as many target tokens as it has; counts are summed."""
  fetched = [jax.device_get(dict(metrics)) for metrics in batches]
  tokens = np.array([metrics['target_tokens'] for metrics in fetched], np.float64)
  weights = tokens / max(tokens.sum(), 1)
  mean = {key: sum(w * m[key] for w, m in zip(weights, fetched, strict=True)) for key in fetched[0]}
  counts = {key: np.sum([m[key] for m in fetched]) for key in ('target_tokens', 'target_bytes') if key in fetched[0]}
  return mean | counts


def with_bits_per_byte(values: Mapping[str, Any]) -> dict[str, Any]:
  """Adds the cross-entropy in bits per byte of target text, comparable across vocabularies, where these tell bytes."""
  if not values.get('target_bytes'):
    return dict(values)
  nats = float(values['cross_entropy']) * float(values['target_tokens'])
  return {**values, 'bits_per_byte': nats / math.log(2) / float(values['target_bytes'])}


class MetricsLog:
  """Writes `metrics.jsonl`, one object per logged step, and TensorBoard summaries. Only the first host writes.

  Args:
    model_dir: the run's folder.
    resume_step: lines of later steps, left by a run that died, are dropped.
  """

  def __init__(self, model_dir: Path, resume_step: int = 0):
    from clu import metric_writers  # imports TensorFlow

    self._closing = contextlib.ExitStack()
    self._model_dir, self._folder = model_dir, self._closing.enter_context(writable(model_dir))
    self._writer = metric_writers.create_default_writer(str(self._folder), just_logging=jax.process_index() > 0)
    self._path = self._folder / 'metrics.jsonl'
    if self._folder != model_dir and jax.process_index() == 0 and (model_dir / 'metrics.jsonl').exists():
      self._path.write_bytes((model_dir / 'metrics.jsonl').read_bytes())
    self._file: IO[str] | None = None
    self._shown = time.monotonic()
    self.drop_after(resume_step)

  def drop_after(self, step: int) -> None:
    """Drops the lines of later steps, which a run that went back to this one did for nothing."""
    if jax.process_index() == 0:
      if self._file:
        self._file.close()
      _keep_until(self._path, step)
      self._file = self._path.open('a')

  def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
    """Logs one step. Arrays, such as the load of each expert, go whole to JSON and by their mean to TensorBoard."""
    arrays = {key: np.asarray(value, np.float64) for key, value in values.items()}
    self._writer.write_scalars(step, {f'{split}/{key}': float(value.mean()) for key, value in arrays.items()})
    if self._file:
      line = {'step': step, 'split': split, **{key: _rounded(value) for key, value in arrays.items()}}
      self._file.write(json.dumps(line) + '\n')
      self._file.flush()
    if time.monotonic() - self._shown > _SHOW_SECONDS:
      self.show()

  def show(self) -> None:
    """Brings a remote folder up to date, which happens once a minute by itself."""
    if self._folder != self._model_dir:
      self._writer.flush()
      copy_files(self._folder, self._model_dir)
    self._shown = time.monotonic()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: object) -> None:
    self._writer.close()
    if self._file:
      self._file.close()
    self._closing.close()


def _rounded(value: np.ndarray) -> Any:
  return np.vectorize(lambda x: float(f'{x:.9g}'), otypes=[float])(value).tolist()  # all a float32 holds


def _keep_until(path: Path, step: int) -> None:
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines():
    try:
      if json.loads(line)['step'] <= step:
        kept.append(line + '\n')
    except (json.JSONDecodeError, KeyError):
      continue  # torn by a kill
  temporary = path.with_suffix('.tmp')
  temporary.write_text(''.join(kept))
  os.replace(temporary, path)
