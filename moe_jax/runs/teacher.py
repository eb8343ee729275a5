"""Distillation: a teacher's predictions as one more feature of each batch, so that no student's step has a teacher."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from moe_jax import sharding
from moe_jax.objectives import LanguageModeling
from moe_jax.runs.setup import Data, Devices, restore, trained, variables_of
from moe_jax.training.checkpoints import SavableIterator
from moe_jax.types import Array, Batch, ConfigError


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A trained model, compiled, which no later configuration touches.

  Attributes:
    answer: batch -> logits [B, L, V].
    vocab_size: V.
  """

  answer: Callable[[Batch], Array]
  vocab_size: int


def teacher(
  model_dir: str, objective: LanguageModeling, data: Data, devices: Devices, dtype: str = 'bfloat16', config: str = ''
) -> Teacher:
  """Reads the newest checkpoint of a run and compiles the model for a student's batches.

  Args:
    model_dir: of the teacher's run.
    objective: holds the teacher's model.
    data: the student's, whose batches it answers.
    devices: the student's.
    dtype: of the logits that it hands over.
    config: unused.

  Raises:
    ConfigError: if nothing was saved there, or it does not fit the student's data or devices.
  """
  program, checkpointer = trained(model_dir, objective, data, devices)
  with program.activate(), checkpointer:
    variables = variables_of(restore(program, checkpointer))
    rows = sharding.named_sharding(program.mesh, 'batch', None)
    specs = {x: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=rows) for x, s in program.batch_spec.items()}

    def predict(variables: Any, batch: Batch) -> Array:
      logits, _ = objective.model.apply(variables, objective.counted(batch), train=False)
      return sharding.constrain(logits.astype(dtype), 'batch', 'length', None)

    compiled = jax.jit(predict).lower(variables, specs).compile()
    vocab_size = jax.eval_shape(predict, variables, specs).shape[-1]
  return Teacher(lambda batch: compiled(variables, dict(batch)), vocab_size)


class Taught(SavableIterator):
  """A student's batches with the teacher's answers.

  Args:
    batches: without.
    teacher: who gives them.
    steps: so many batches have them, and later ones do not: Mixture-of-Students learns by itself towards the end
      (Rajbhandari et al. 2022); None is all.
    first: batches that were there before.
  """

  def __init__(self, batches: SavableIterator, teacher: Teacher, steps: int | None = None, first: int = 0):
    self._batches, self._teacher, self._steps, self._given = batches, teacher, steps, first

  def __next__(self) -> Batch:
    batch = next(self._batches)
    self._given += 1
    if self._steps is not None and self._given > self._steps:
      return batch
    return {**batch, 'teacher_logits': self._teacher.answer(batch)}

  def save(self, path: str) -> None:
    """As the batches do."""
    self._batches.save(path)

  def restore(self, path: str) -> None:
    """As the batches do."""
    self._batches.restore(path)


def check_vocabularies(teacher: Teacher, vocab_size: int) -> None:
  """Raises ConfigError where a teacher predicts other tokens than its student."""
  if teacher.vocab_size != vocab_size:
    raise ConfigError(f'The teacher has VOCAB_SIZE={teacher.vocab_size}, its student {vocab_size}: they must agree.')
