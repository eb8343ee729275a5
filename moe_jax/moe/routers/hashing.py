"""Fixed routing: by token id, by place, or by chance. Nothing is learnt, and the gate is 1 (Roller et al. 2021)."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.moe.routers.base import FixedRouter, RoutingContext
from moe_jax.types import Array, ConfigError, one_of

Share = Literal['token', 'batch']
Table = Callable[[int], np.ndarray]  # number of experts -> int32[V], the expert of each token id


def random_table(num_experts: int, vocab_size: int, seed: int = 0) -> np.ndarray:
  """Each token id gets a random expert, all experts equally many ids: int32[V]."""
  return (np.random.default_rng(seed).permutation(vocab_size) % num_experts).astype(np.int32)


def balanced_table(num_experts: int, counts: np.ndarray) -> np.ndarray:
  """Token ids by falling frequency, each to the expert that is lightest so far: int32[V].

  Args:
    num_experts: E.
    counts: [V], how often each id occurs.
  """
  with jax.ensure_compile_time_eval():  # tables are made while a model is traced
    return np.asarray(lightest_first(jnp.asarray(counts, jnp.float32), num_experts))


def clustered_table(num_experts: int, embeddings: np.ndarray, seed: int = 0) -> np.ndarray:
  """Token ids whose embeddings lie together share an expert (k-means): int32[V]. A foil: it is far from balanced.

  Args:
    num_experts: E.
    embeddings: float[V, M], of a trained model.
    seed: of the first centroids.
  """
  from scipy.cluster.vq import kmeans2  # only here, and slow to import

  return kmeans2(np.asarray(embeddings, np.float64), num_experts, minit='++', rng=seed)[1].astype(np.int32)


def lightest_first(counts: Array, num_experts: int) -> Array:
  """See `balanced_table`; jittable: float32[V] -> int32[V]."""

  def place(load: Array, count: Array) -> tuple[Array, Array]:
    expert = jnp.argmin(load)
    return load.at[expert].add(count), expert

  order = jnp.argsort(-counts, stable=True)
  _, experts = jax.lax.scan(place, jnp.zeros(num_experts), counts[order])
  return jnp.zeros(counts.shape, jnp.int32).at[order].set(experts.astype(jnp.int32))


class HashRouter(FixedRouter):
  """The expert is a function of the token id, the same in every layer.

  Attributes:
    table: makes a table of experts by token id: `random_table`, `balanced_table`, `clustered_table`. None scatters ids
      by a multiplicative hash, which needs no vocabulary.
  """

  table: Table | None = None

  def choose(self, context: RoutingContext) -> Array:
    """See `FixedRouter`."""
    if self.table is None:
      return (scattered(context.known('token_ids')) % self.num_experts).astype(jnp.int32)
    return jnp.asarray(self.table(self.num_experts))[context.known('token_ids')]


class BalancedHashRouter(FixedRouter):
  """Counts token ids for a while, then deals them out so that all experts have the same load, and keeps to that.

  Until then ids are scattered by a multiplicative hash. See `balanced_table`.

  Attributes:
    vocab_size: V.
    counting_steps: training steps to count for.
  """

  vocab_size: int = 0
  counting_steps: int = 20

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.vocab_size < 1 or self.counting_steps < 1:
      raise ConfigError('A balanced hash counts token ids for a while: set vocab_size, and counting_steps >= 1.')

  def choose(self, context: RoutingContext) -> Array:
    """See `FixedRouter`."""
    ids, steps = context.known('token_ids'), self.steps_done
    counting = steps < self.counting_steps
    self.gathered(context)
    counts, table = self.memory('counts', (self.vocab_size,)), self.memory('table', (self.vocab_size,), 'int32')
    seen = counts.value.at[ids].add(context.valid.astype(jnp.float32))
    self.remember(counts, jnp.where(counting, seen, counts.value), context)
    deal = lambda: lightest_first(seen, self.num_experts)  # noqa: E731
    last = steps == self.counting_steps - 1  # dealing goes through the vocabulary one by one: once is enough
    self.remember(table, jax.lax.cond(last, deal, lambda: table.value), context)
    return jnp.where(counting, (scattered(ids) % self.num_experts).astype(jnp.int32), table.value[ids])


class RandomRouter(FixedRouter):
  """A random expert, another at each step.

  Attributes:
    share: who draws together: every 'token' for itself, or the whole 'batch' one expert, which then has room for all
      (THOR, Zuo et al. 2021; see `objectives.LanguageModeling.consistency`). Outside training experts go by place.
  """

  share: Share = 'token'

  def __post_init__(self) -> None:
    super().__post_init__()
    one_of(share=(self.share, Share))

  def capacity(self, group_size: int, train: bool) -> int:
    """See `Router`."""
    return super().capacity(group_size, train) if self.share == 'token' else group_size

  def choose(self, context: RoutingContext) -> Array:
    """See `FixedRouter`."""
    if not context.train:
      return by_place(context, self.num_experts)
    shape = context.valid.shape if self.share == 'token' else (1, 1)
    return jnp.broadcast_to(
      jax.random.randint(self.make_rng('router'), shape, 0, self.num_experts), context.valid.shape
    )


class RoundRobinRouter(FixedRouter):
  """Experts in turn, by a token's position in its text: balanced, and a baseline."""

  def choose(self, context: RoutingContext) -> Array:
    """See `FixedRouter`."""
    return by_place(context, self.num_experts)


def scattered(token_ids: Array) -> Array:
  """Knuth's multiplicative hash, its upper half: int32[...] -> uint32[...] in [0, 2^16)."""
  return (token_ids.astype(jnp.uint32) * jnp.uint32(2654435761)) >> 16


def by_place(context: RoutingContext, num_experts: int) -> Array:
  """int32[G, S], a token's position in its text modulo E, or its place in the group where positions are not known."""
  if context.positions is None:
    return jnp.broadcast_to(jnp.arange(context.valid.shape[1]) % num_experts, context.valid.shape)
  return context.positions % num_experts
