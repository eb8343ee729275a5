"""Optimizers and schedules: optax, composed as the papers of sparse models use it.

An optimizer here is a function of the parameters' logical axis names (see `state.OptimizerFactory`).
"""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax.types import Array, ConfigError, path_name

PyTree = Any
Schedule = Callable[[Array], Array]
SEPARATE_AXES = ('layers', 'expert')  # each index of these holds a matrix of its own


def inverse_sqrt(peak: float = 0.01, warmup_steps: int = 10_000, linear_warmup: bool = False) -> Schedule:
  """T5's schedule: `peak` for the first steps, then falling as 1/sqrt(step).

  peak * sqrt(warmup / max(step, warmup)); with the defaults this is 1/sqrt(max(step, 10^4)) (Raffel et al. 2020, GLaM).
  With `linear_warmup` the first steps rise linearly instead (as ST-MoE words it).
  """

  def schedule(step: Array) -> Array:
    step = jnp.asarray(step, jnp.float32)
    rate = peak * jnp.sqrt(warmup_steps / jnp.maximum(step, warmup_steps))
    return rate * jnp.minimum(1.0, (step + 1) / warmup_steps) if linear_warmup else rate

  return schedule


def constant(peak: float, warmup_steps: int = 0) -> Schedule:
  """Linear warm-up to `peak`, which is then kept (T5X's fine-tuning)."""
  return optax.linear_schedule(0.0 if warmup_steps else peak, peak, warmup_steps)


def cosine(peak: float, total_steps: int, warmup_steps: int = 0, final_fraction: float = 0.1) -> Schedule:
  """Linear warm-up to `peak`, then half a cosine down to `final_fraction` of it at `total_steps`."""
  total_steps = max(total_steps, 1)
  warmup = min(warmup_steps, max(total_steps - 1, 0))
  return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, total_steps, peak * final_fraction)


def adafactor(
  axes: PyTree,
  learning_rate: Schedule,
  decay_rate: float = 0.8,
  clip_threshold: float = 1.0,
  beta1: float | None = None,
  clip_norm: float | None = None,
) -> optax.GradientTransformation:
  """Adafactor (Shazeer and Stern 2018) as T5X uses it, each layer's and each expert's matrix treated by itself.

  Args:
    axes: logical axis names of each parameter.
    learning_rate: relative to the root mean square of each matrix.
    decay_rate: c of the second moment's decay 1 - t^-c.
    clip_threshold: largest root mean square of an update.
    beta1: momentum; None as in GLaM, Switch and ST-MoE.
    clip_norm: clips the gradients' global norm first; None does not.
  """
  return optax.chain(
    optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
    each_matrix(optax.scale_by_factored_rms(decay_rate=decay_rate), axes),
    each_matrix(optax.clip_by_block_rms(clip_threshold), axes),
    each_matrix(optax.scale_by_param_block_rms(), axes),
    optax.ema(beta1, debias=False) if beta1 else optax.identity(),
    optax.scale_by_learning_rate(learning_rate),
  )


def adamw(
  axes: PyTree,
  learning_rate: Schedule,
  beta1: float = 0.9,
  beta2: float = 0.95,
  weight_decay: float = 0.1,
  clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
  """AdamW (Loshchilov and Hutter 2019) after clipping by global norm; norms and biases do not decay."""
  decays = jax.tree.map(lambda names: sum(name not in SEPARATE_AXES for name in names) > 1, axes, is_leaf=_is_names)
  return optax.chain(
    optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
    optax.adamw(learning_rate, beta1, beta2, weight_decay=weight_decay, mask=decays),
  )


def _is_names(x: Any) -> bool:
  return isinstance(x, tuple) and not isinstance(x, optax.MaskedNode)


def with_policies(
  axes: PyTree,
  optimizer: Callable[[PyTree], optax.GradientTransformation],
  trainable: Sequence[str] = (),
  skip_above: float | None = None,
) -> optax.GradientTransformation:
  """An optimizer of some parameters only, that passes over bad batches.

  Args:
    axes: logical axis names of each parameter.
    optimizer: made from axes.
    trainable: see `trainable_mask`.
    skip_above: see `skip_bad_batches`; None takes every batch.
  """
  if trainable:
    mask = trainable_mask(axes, trainable)
    kept = jax.tree.map(lambda on, names: names if on else optax.MaskedNode(), mask, axes)
    frozen = jax.tree.map(lambda on: not on, mask)
    transform = optax.chain(optax.masked(optimizer(kept), mask), optax.masked(optax.set_to_zero(), frozen))
  else:
    transform = optimizer(axes)
  return transform if skip_above is None else skip_bad_batches(transform, skip_above)


def trainable_mask(tree: PyTree, patterns: Sequence[str]) -> PyTree:
  """bool of each parameter: whether a pattern is found in its path, such as 'decoder/blocks/moe/experts/wo'; () is all.

  Args:
    tree: of parameters, or of their axis names.
    patterns: regular expressions.

  Raises:
    ConfigError: if a pattern is found in no path.
  """
  paths = jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), tree, is_leaf=_is_names)
  every = jax.tree.leaves(paths)
  for pattern in patterns:
    try:
      found = any(re.search(pattern, path) for path in every)
    except re.error as error:
      raise ConfigError(f'TRAINABLE: {pattern!r} is no regular expression ({error}).') from error
    if not found:
      near = difflib.get_close_matches(pattern, every, n=1, cutoff=0)
      raise ConfigError(f'TRAINABLE: no parameter has {pattern!r} in its path; one is {"".join(near)}.')
  return jax.tree.map(lambda path: not patterns or any(re.search(pattern, path) for pattern in patterns), paths)


class SkipState(NamedTuple):
  """Of `skip_bad_batches`.

  Attributes:
    accepted: whether the last batch was taken, bool[].
    skipped: how many were not, int32[].
    mean_norm: the running mean of the gradient norms of those that were, float32[].
    inner: the optimizer's.
  """

  accepted: Array
  skipped: Array
  mean_norm: Array
  inner: PyTree


def skip_bad_batches(inner: optax.GradientTransformation, above: float) -> optax.GradientTransformation:
  """Changes nothing on a batch whose gradient is not finite (GLaM), or far larger than of late.

  Args:
    inner: what else to do.
    above: in multiples of the running mean of the global gradient norm; infinity passes over the not finite alone.

  Raises:
    ConfigError: if `above` is not more than 1.
  """
  if not above > 1:
    raise ConfigError(f'SKIP_ABOVE={above}: a multiple of the usual gradient norm above 1 is wanted, such as 10.0.')

  def init(params: PyTree) -> SkipState:
    return SkipState(jnp.bool_(True), jnp.int32(0), jnp.float32(0), inner.init(params))

  def update(updates: PyTree, state: SkipState, params: PyTree | None = None) -> tuple[PyTree, SkipState]:
    norm = optax.global_norm(updates).astype(jnp.float32)
    first = state.mean_norm == 0
    accepted = jnp.isfinite(norm) & (first | (norm <= above * state.mean_norm))
    safe = jax.tree.map(lambda x: jnp.where(accepted, x, 0), updates)
    safe, after = inner.update(safe, state.inner, params)
    mean_norm = jnp.where(first, norm, 0.99 * state.mean_norm + 0.01 * norm)
    return jax.tree.map(lambda x: jnp.where(accepted, x, 0), safe), SkipState(
      accepted=accepted,
      skipped=state.skipped + jnp.where(accepted, 0, 1),
      mean_norm=jnp.where(accepted, mean_norm, state.mean_norm),
      inner=jax.tree.map(lambda new, old: jnp.where(accepted, new, old), after, state.inner),
    )

  return optax.GradientTransformation(init, update)


def each_matrix(transform: optax.GradientTransformation, axes: PyTree) -> optax.GradientTransformation:
  """Maps a transformation that treats every array by itself over the leading 'layers' and 'expert' axes of each.

  Statistics of a stacked [layers, experts, M, F] array are then those of its matrices: factored over M and F whatever
  the number of experts, and clipped one by one (T5X's MoE rules do the same by hand).

  Args:
    transform: from optax; its state may hold scalars (shared) and arrays shaped after the parameter.
    axes: logical axis names of each parameter.
  """
  levels = jax.tree.map(lambda names: sum(name in SEPARATE_AXES for name in names), axes, is_leaf=_is_names)

  def mapped_axes(
    param: Array, level: int
  ) -> PyTree:  # 0 for the arrays of one parameter's state, None for its scalars
    state = jax.eval_shape(transform.init, jax.ShapeDtypeStruct(param.shape[level:], param.dtype))
    return jax.tree.map(lambda x: 0 if x.ndim else None, state)

  def mapped(function: Callable[..., Any], level: int, in_axes: Any, out_axes: Any) -> Callable[..., Any]:
    for _ in range(level):
      function = jax.vmap(function, in_axes=in_axes, out_axes=out_axes)
    return function

  def init(params: PyTree) -> PyTree:
    def one(param: Array, level: int) -> PyTree:
      return mapped(transform.init, level, 0, mapped_axes(param, level))(param)

    return jax.tree.map(one, params, levels)

  def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
    def one(gradient: Array, state: PyTree, param: Array, level: int) -> tuple[Array, PyTree]:
      state_axes = mapped_axes(param, level)
      return mapped(transform.update, level, (0, state_axes, 0), (0, state_axes))(gradient, state, param)

    leaves, treedef = jax.tree.flatten(updates)  # type: Any, Any
    others = (treedef.flatten_up_to(tree) for tree in (state, params, levels))
    results = [one(*args) for args in zip(leaves, *others, strict=True)]
    return treedef.unflatten([u for u, _ in results]), treedef.unflatten([s for _, s in results])

  return optax.GradientTransformation(init, update)
