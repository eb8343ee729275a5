"""A task's own metrics, through `seqio.Evaluator`: the model answers its inputs, or says how likely its targets are."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from moe_jax import sharding
from moe_jax.analysis.calibration import by_question, calibration
from moe_jax.decode import GREEDY, Strategy
from moe_jax.objectives import LanguageModeling, Variables
from moe_jax.runs.infer import compiled_decode, decoded
from moe_jax.runs.setup import Data, Program, at_least_one
from moe_jax.types import Array, Batch

Score = Callable[[Array, Array, Array], Array]
Rows = Mapping[str, np.ndarray]


def total(log_likelihoods: Array, tokens: Array, lengths: Array) -> Array:
  """The log-likelihood of the targets, EOS included: float32[B, L] each -> float32[B]."""
  return jnp.sum(log_likelihoods, axis=1)


def per_token(log_likelihoods: Array, tokens: Array, lengths: Array) -> Array:
  """`total` over the number of tokens; `tokens` is 1 for a target and 0 elsewhere."""
  return total(log_likelihoods, tokens, lengths) / jnp.maximum(jnp.sum(tokens, axis=1), 1)


def per_byte(log_likelihoods: Array, tokens: Array, lengths: Array) -> Array:
  """`total` over the bytes of text, whatever the vocabulary; `lengths` are those of each target, 0 elsewhere."""
  return total(log_likelihoods, tokens, lengths) / jnp.maximum(jnp.sum(lengths, axis=1), 1)


@dataclasses.dataclass(frozen=True)
class TaskMetrics:
  """How the metrics of a task are taken.

  Attributes:
    strategy: how answers are written.
    max_new_tokens: of an answer; None is the length of 'targets'.
    num_examples: of each task; None for all. A choice of a question is an example.
    score: what a metric of likelihoods compares: `total`, `per_token` or `per_byte`.
  """

  strategy: Strategy = GREEDY
  max_new_tokens: int | None = None
  num_examples: int | None = None
  score: Score = total

  def prepare(
    self, program: Program, objective: LanguageModeling, data: Data, split: str
  ) -> Callable[[Variables], tuple[dict[str, float], dict[str, Any]]]:
    """Reads the examples; what it returns measures a model on them, and is compiled once for all checkpoints.

    Call both inside `program.activate`. The measures are named task/metric, and 'average' is the mean over tasks of the
    mean over a task's metrics, as GLUE and SuperGLUE have it; a task without metrics has no measures. Beside them comes
    the `calibration` of each task with choices; its task/ece and task/brier are measures too, outside the average.
    """
    limits = {'MAX_NEW_TOKENS': self.max_new_tokens, 'NUM_EXAMPLES': self.num_examples}
    at_least_one(**{name: number for name, number in limits.items() if number is not None})
    evaluator = evaluator_of(data, split, self.num_examples)
    if evaluator is None:
      return lambda variables: ({}, {})
    writes = compiled_decode(program, data, self.strategy, self.max_new_tokens or data.lengths['targets'])
    rates = jax.jit(functools.partial(scores, objective=objective, score=self.score), out_shardings=program.everywhere)

    def measure(variables: Variables) -> tuple[dict[str, float], dict[str, Any]]:
      predict = functools.partial(predictions, writes, program, variables, data)
      rate = functools.partial(ratings, rates, program, variables, data)
      found, outputs = evaluator.evaluate(compute_metrics=True, predict_fn=predict, score_fn=rate)
      calibrated = calibrations(evaluator, outputs)
      errors = {f'{task}/{name}': of[name] for task, of in calibrated.items() for name in ('ece', 'brier')}
      return flattened(found.result()) | errors, calibrated

    return measure


def evaluator_of(data: Data, split: str, num_examples: int | None) -> Any:
  """The seqio.Evaluator of a task, or of a mixture's tasks; None if none of them has metrics and the split.

  Its model datasets have (number, row) with the features of `batch_spec`, of one row [L].

  Raises:
    ConfigError: if the tasks are to be cached, and are not.
  """
  import seqio

  from moe_jax.data import as_one_segment, feature_converter, find_cached, provider

  tasks = seqio.get_subtasks(provider(data.task, data.modules))
  if not any(task.metric_objs and split in task.splits for task in tasks):
    return None
  if data.use_cached:
    find_cached(data.task, data.modules, data.cache_dirs)
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)  # seqio warns of lengths that are given, and of loggers that are not
  try:
    evaluator = seqio.Evaluator(
      data.task,
      feature_converter(data.lengths, data.converter, pack=False),
      eval_split=split,
      use_cached=data.use_cached,
      sequence_length=dict(data.lengths),
      num_examples=num_examples,
      async_compute_metrics=False,
    )
  finally:
    logging.set_verbosity(verbosity)
  datasets: Any = evaluator.cached_model_datasets
  for name, rows in datasets.items():
    datasets[name] = rows.map(lambda number, row: (number, as_one_segment(row)))
  return evaluator


def flattened(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
  """task -> metric -> value as task/metric -> value, and their 'average'."""
  values = {f'{task}/{name}': float(value) for task, found in metrics.items() for name, value in found.items()}
  return {**values, 'average': float(np.mean([np.mean(list(found.values())) for found in metrics.values()]))}


def calibrations(evaluator: Any, outputs: Mapping[str, Mapping[Any, Any]]) -> dict[str, dict[str, Any]]:
  """The `calibration` of each task that was scored, and whose examples say of which 'question' they are a choice.

  Args:
    evaluator: that of `evaluator_of`; the examples of such tasks have 'question' and 'worth', scalars both.
    outputs: task -> seqio's kind of output -> an output an example, as `seqio.Evaluator.evaluate` returns them.
  """
  import seqio

  found = {}
  for task, dataset in evaluator.cached_task_datasets.items():
    scores = outputs[task].get(seqio.metrics.ModelOutputType.SCORE)
    if scores is not None and {'question', 'worth'} <= dataset.element_spec.keys():
      rows = list(dataset.as_numpy_iterator())
      questions = [int(row['question']) for row in rows]
      log_likelihoods = by_question(questions, scores, -np.inf)
      found[task] = calibration(log_likelihoods, by_question(questions, [float(row['worth']) for row in rows], 0.0))
  return found


def scores(variables: Variables, batch: Batch, *, objective: LanguageModeling, score: Score) -> Array:
  """A score float32[B] for each row."""
  tokens = batch['decoder_loss_weights'].astype(jnp.float32)
  lengths = (
    jnp.asarray(objective.token_bytes, jnp.float32).at[batch['decoder_target_tokens']].get(mode='fill', fill_value=0)
  )
  return score(objective.log_likelihoods(variables, batch), tokens, lengths * tokens)


def predictions(
  run: Callable[..., Any], program: Program, variables: Variables, data: Data, dataset: Any
) -> list[tuple[int, np.ndarray]]:
  """(number, int32[N]) of each row of one of the evaluator's datasets: what the model answers; seqio's `predict_fn`."""
  rows = list(dataset.as_numpy_iterator())
  prompts = [prompt(row, data.vocabulary().eos_id) for _, row in rows]
  length = 1 + data.lengths.get('inputs', 0)  # with BOS
  answers = decoded(run, program, variables, data, prompts, prompt_length=length)
  return [(int(number), tokens) for (number, _), (tokens, _) in zip(rows, answers, strict=True)]


def prompt(row: Rows, eos_id: int) -> list[int]:
  """The tokens that a row's targets follow; of an encoder's without the EOS, which decoding adds."""
  if 'encoder_input_tokens' not in row:
    return row['decoder_target_tokens'][: int(np.argmax(row['decoder_loss_weights'] > 0))].tolist()
  tokens = row['encoder_input_tokens']
  tokens = tokens[tokens > 0].tolist()
  return tokens[:-1] if tokens[-1:] == [eos_id] else tokens[: len(row['encoder_input_tokens']) - 1]


def ratings(
  run: Callable[..., Any], program: Program, variables: Variables, data: Data, dataset: Any
) -> list[tuple[int, float]]:
  """(number, score) of each row of one of the evaluator's datasets; seqio's `score_fn`."""
  rated = []
  for numbers, batch in _batches(program, data, dataset):
    rated += zip(numbers.tolist(), np.asarray(run(variables, batch)).tolist(), strict=False)  # empty rows are last
  return rated


def _batches(program: Program, data: Data, dataset: Any) -> Iterator[tuple[np.ndarray, Batch]]:
  """Rows in batches on the mesh, the last filled up with empty ones."""
  sharded = sharding.named_sharding(program.mesh, 'batch', None)
  for numbers, rows in dataset.batch(data.batch_size).as_numpy_iterator():
    missing = data.batch_size - len(numbers)
    batch = {
      name: np.pad(rows[name], ((0, missing), (0, 0))).astype(spec.dtype) for name, spec in program.batch_spec.items()
    }
    yield numbers, jax.device_put(batch, sharded)
