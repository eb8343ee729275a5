"""One training step, and one evaluation step."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.batch import split_microbatches
from moe_jax.objectives import Objective
from moe_jax.training.optimizers import trainable_mask
from moe_jax.training.state import TrainState
from moe_jax.types import Array, Batch, Metrics

PyTree = Any


def gradients(
  params: PyTree,
  variables: PyTree,
  batch: Batch,
  key: Array,
  *,
  objective: Objective,
  microbatches: int = 1,
  trainable: Sequence[str] = (),
) -> tuple[PyTree, PyTree, Metrics]:
  """Gradients of the whole batch, taken microbatch by microbatch to save memory.

  Args:
    params: the model's parameters.
    variables: its other collections, such as routers' memories.
    batch: global arrays [B, ...].
    key: of dropout and jitter; every microbatch draws its own.
    objective: model and loss.
    microbatches: pieces; losses, metrics and gradients are those of the whole.
    trainable: see `optimizers.trainable_mask`; other gradients are 0, and cost nothing.

  Returns:
    Gradients like `params`, the variables after, and metrics, float32 each.
  """

  mask = trainable_mask(params, trainable)

  def loss(params: PyTree, variables: PyTree, piece: Batch, key: Array) -> tuple[Array, tuple[Metrics, PyTree]]:
    params = jax.tree.map(lambda x, on: x if on else jax.lax.stop_gradient(x), params, mask)
    rngs = dict(zip(('dropout', 'router'), jax.random.split(key), strict=True))
    return objective.loss({'params': params, **variables}, piece, rngs, train=True)

  def accumulate(carry: tuple[PyTree, PyTree], piece: tuple[Batch, Array]) -> tuple[tuple[PyTree, PyTree], Metrics]:
    sums, variables = carry
    (_, (metrics, variables)), grads = jax.value_and_grad(loss, has_aux=True)(params, variables, *piece)
    return (jax.tree.map(jnp.add, sums, grads), variables), metrics

  pieces = split_microbatches(objective.counted(batch), microbatches)
  start = (jax.tree.map(jnp.zeros_like, params), variables)
  (grads, variables), metrics = jax.lax.scan(accumulate, start, (pieces, jax.random.split(key, microbatches)))
  return grads, variables, {name: jnp.sum(value, axis=0) for name, value in metrics.items()}


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  objective: Objective,
  transform: optax.GradientTransformation,
  microbatches: int = 1,
  trainable: Sequence[str] = (),
  seed: int = 0,
) -> tuple[TrainState, Metrics]:
  """One update: gradients, then the optimizer. Every step draws its own dropout and jitter from `seed`."""
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  grads, variables, metrics = gradients(
    state.params,
    state.variables,
    batch,
    key,
    objective=objective,
    microbatches=microbatches,
    trainable=trainable,
  )
  updates, opt_state = transform.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  accepted = optax.tree_utils.tree_get(opt_state, 'accepted')  # of `optimizers.skip_bad_batches`, where that is used
  if accepted is not None:
    variables = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), variables, state.variables)
    metrics['skipped_batches'] = optax.tree_utils.tree_get(opt_state, 'skipped')
    metrics['skipped'] = ~accepted
  metrics['gradient_norm'] = optax.global_norm(grads)
  metrics['parameter_norm'] = optax.global_norm(params)  # after the update: what is no number shows before it is saved
  return TrainState(state.step + 1, params, opt_state, variables), metrics


def eval_step(state: TrainState, batch: Batch, *, objective: Objective) -> Metrics:
  """Metrics of a batch without dropout, jitter or update; capacity is the routers' own for evaluation."""
  variables = {'params': state.params, **state.variables}
  _, (metrics, _) = objective.loss(variables, objective.counted(batch), None, train=False)
  return metrics
