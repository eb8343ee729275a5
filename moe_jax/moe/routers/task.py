"""Routing by what a text is, not by its tokens: by task, language or domain, or by sentence."""

import flax.linen as nn
import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.moe.routers.base import FixedRouter, RoutingContext, einsum
from moe_jax.moe.routers.top_k import TopKRouter
from moe_jax.types import Array, ConfigError


class TaskRouter(TopKRouter):
  """Top-k of a learnt embedding of the task, the same for all of its tokens (Task-MoE, Kudugunta et al. 2021).

  So a task's sub-network can be cut out and served alone. All tokens of a group may want the same experts: leave room
  for that (`capacity_factor` None, or up to E / k), or mix tasks in a group.

  Attributes:
    num_tasks: tasks, languages or pairs, numbered from 0.
    default_task: outside training, of texts that do not name theirs; None refuses them.
  """

  num_tasks: int = 1
  default_task: int | None = None

  def router_input(self, tokens: Array, context: RoutingContext) -> Array:
    """See `TopKRouter`."""
    init = sharding.partitioned(nn.initializers.normal(1.0), None, 'embed')
    embedding = self.param('tasks', init, (self.num_tasks, tokens.shape[-1]))
    return super().router_input(embedding[task_ids(context, self.default_task)], context)


class SentenceRouter(TopKRouter):
  """Top-k of the mean of the tokens of a text, the same for all of them (Kudugunta et al. 2021).

  A text is a segment of a row. **Not causal**: the mean is over all of it.
  """

  @property
  def causal(self) -> bool:
    return False

  def router_input(self, tokens: Array, context: RoutingContext) -> Array:
    """See `TopKRouter`."""
    segments = context.valid.astype(jnp.int32) if context.segment_ids is None else context.segment_ids
    rows, segments = context.rows(tokens.astype(jnp.float32)), context.rows(segments)
    together = (segments[:, :, None] == segments[:, None, :]).astype(jnp.float32)
    together /= jnp.sum(together, axis=-1, keepdims=True)
    return super().router_input(einsum('bst,btm->bsm', together, rows).reshape(tokens.shape), context)


class DomainRouter(FixedRouter):
  """Expert d has domain d, and no other learns from it (DEMix, Gururangan et al. 2021; language-specific layers).

  The gate is 1, and there is room for all of a group. For a text of unknown domain, mix the predictions under each
  domain by `analysis.domains.domain_posterior`.

  Attributes:
    num_tasks: domains, numbered from 0; as many as experts, or fewer.
    default_task: outside training, the domain of texts that do not name theirs; None refuses them.
  """

  num_tasks: int = 1
  default_task: int | None = None
  capacity_factor: float | None = None

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.num_tasks > self.num_experts:
      raise ConfigError(f'{self.num_tasks} domains need as many experts, not {self.num_experts}: raise NUM_EXPERTS.')

  def choose(self, context: RoutingContext) -> Array:
    """See `FixedRouter`."""
    return task_ids(context, self.default_task)


def task_ids(context: RoutingContext, default: int | None) -> Array:
  """int32[G, S], from 0; padding has any.

  Raises:
    ConfigError: if the batch names no tasks, and there is no default or a default would be learnt from.
  """
  if context.task_ids is not None:
    return jnp.maximum(context.task_ids - 1, 0)  # in data 0 is padding
  if default is None or context.train:
    raise ConfigError(
      "This router goes by task, and the batch names none: add the feature 'task_ids' to the task and to"
      ' TASK_FEATURE_LENGTHS, as gin/tasks/local_text_domains.gin does.'
    )
  return jnp.full(context.valid.shape, default, jnp.int32)
