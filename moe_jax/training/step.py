"""One training step, and one evaluation step."""

import jax
import jax.numpy as jnp
import optax

from moe_jax.objectives import Objective, split_microbatches
from moe_jax.training.state import TrainState
from moe_jax.types import Array, Batch, Metrics


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  objective: Objective,
  transform: optax.GradientTransformation,
  microbatches: int = 1,
  seed: int = 0,
) -> tuple[TrainState, Metrics]:
  """Gradients of the whole batch, microbatch by microbatch, and one update.

  Args:
    state: before.
    batch: global arrays [B, ...].
    objective: model and loss.
    transform: the optimizer.
    microbatches: pieces the batch is split into to save memory; losses and gradients are those of the whole.
    seed: of dropout and jitter; every step and microbatch draws its own.

  Returns:
    The state after, and metrics (float32 each).
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  pieces = split_microbatches(objective.counted(batch), microbatches)

  def loss(params, variables, batch: Batch, key: Array):  # noqa: ANN001, ANN202
    rngs = dict(zip(('dropout', 'router'), jax.random.split(key), strict=True))
    return objective.loss({'params': params, **variables}, batch, rngs, train=True)

  def accumulate(carry, piece):  # noqa: ANN001, ANN202
    sums, variables = carry
    batch, key = piece
    (_, (metrics, variables)), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, variables, batch, key)
    return (jax.tree.map(jnp.add, sums, gradients), variables), metrics

  zeros = jax.tree.map(jnp.zeros_like, state.params)
  keys = jax.random.split(key, microbatches)
  (gradients, variables), metrics = jax.lax.scan(accumulate, (zeros, state.variables), (pieces, keys))
  metrics = {name: jnp.sum(value, axis=0) for name, value in metrics.items()}
  metrics['gradient_norm'] = optax.global_norm(gradients)

  updates, opt_state = transform.update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  return TrainState(state.step + 1, params, opt_state, variables), metrics


def eval_step(state: TrainState, batch: Batch, *, objective: Objective) -> Metrics:
  """Metrics of a batch without dropout, jitter or update; capacity is the routers' own for evaluation."""
  variables = {'params': state.params, **state.variables}
  _, (metrics, _) = objective.loss(variables, objective.counted(batch), None, train=False)
  return metrics
