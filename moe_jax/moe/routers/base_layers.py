"""Global assignment: all experts get equally many tokens, with the greatest sum of scores (BASE, Lewis et al. 2021)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.moe import router_losses
from moe_jax.moe.routers.base import Router, RoutingContext
from moe_jax.moe.routing_plan import RoutingPlan
from moe_jax.types import Array, Aux


class BaseLayersRouter(Router):
  """Scores are x . c_e. In training the tokens of a group are dealt out evenly; outside it each takes its own best.

  The gate is sigmoid(score), the one way by which the centroids learn: with the residual path that gives
  x + sigmoid(score) f(x). No auxiliary loss, no capacity factor, and nothing is dropped.

  Attributes:
    tolerance: how far from the optimum an assignment may be, see `balanced_assignment`.
  """

  tolerance: float = 0.02

  @property
  def choices_per_token(self) -> float:
    return 1

  def capacity(self, group_size: int, train: bool) -> int:
    """C, exactly an expert's part in training; room for the worst case outside it."""
    return -(-group_size // self.num_experts) if train else group_size

  @nn.compact
  def __call__(self, tokens: Array, context: RoutingContext) -> tuple[RoutingPlan, Aux]:
    valid, count = context.valid, context.token_count
    scores = self.linear('kernel', tokens, (self.num_experts,), nn.initializers.orthogonal(0.1))
    expert = jnp.argmax(scores, axis=-1)
    if context.train:
      expert = balanced_assignment(jax.lax.stop_gradient(scores), valid, self.tolerance)
    expert_index = expert[..., None]
    gates = jax.nn.sigmoid(jnp.take_along_axis(scores, expert_index, axis=-1))
    plan = self.plan(expert_index, gates, context)
    entropy = router_losses.router_entropy(jax.nn.softmax(scores), valid, count)
    return plan, Aux(metrics={'router_entropy': entropy, **router_losses.plan_metrics(plan, valid, count)})


def balanced_assignment(
  scores: Array, valid: Array, tolerance: float = 0.02, prices: Array | None = None, max_rounds: int = 2000
) -> Array:
  """An expert for every token, none with more than its part, and nearly the greatest sum of scores: int32[G, S].

  An auction (Bertsekas 1979; for many places an expert, Bertsekas and Castanon 1989). In every round the tokens without
  a place bid for their best expert what it is worth to them over their second best, plus a minimum step; an expert
  keeps its highest bidders, and its price is the lowest bid it keeps. The sum ends within the number of tokens times
  the step of the optimum.

  Args:
    scores: float32[G, S, E]; what is not finite counts as the least that is.
    valid: bool[G, S]; an expert's part is the real tokens of a group over E, rounded up. Padding gets expert 0.
    tolerance: the step, as a share of what a token's best expert is better than its mean one, on average.
    prices: float32[G, E] to begin with; good ones (Sinkhorn's) save rounds.
    max_rounds: after which those still without a place take what is left.
  """
  if scores.shape[-1] == 1:
    return jnp.zeros(valid.shape, jnp.int32)
  finite = jnp.isfinite(scores)
  scores = jnp.where(finite, scores, jnp.min(scores, where=finite, initial=jnp.inf, axis=(1, 2), keepdims=True))
  if prices is None:
    prices = jnp.zeros((scores.shape[0], scores.shape[2]))
  auction = functools.partial(auction_of_group, tolerance=tolerance, max_rounds=max_rounds)
  return jax.vmap(auction)(scores, valid, prices)[0]


def auction_of_group(
  scores: Array, valid: Array, start: Array, tolerance: float, max_rounds: int
) -> tuple[Array, Array]:
  """One group: float32[S, E], bool[S], float32[E] -> int32[S], and how many rounds it took."""
  size, num_experts = scores.shape
  part = -(-jnp.sum(valid) // num_experts)
  gain = jnp.max(scores, axis=-1) - jnp.mean(scores, axis=-1)
  step = tolerance * jnp.sum(jnp.where(valid, gain, 0.0)) / jnp.maximum(jnp.sum(valid), 1) + 1e-6
  # Where tokens do not divide, indifferent bidders take the rest: only with all places taken are any prices right.
  rest = jnp.arange(num_experts - 1) < part * num_experts - jnp.sum(valid)
  scores, bidders = jnp.pad(scores, ((0, num_experts - 1), (0, 0))), jnp.concatenate([valid, rest])
  everyone = jnp.arange(len(bidders))

  def held(owner: Array) -> Array:
    return jnp.zeros(num_experts + 1, jnp.int32).at[owner].add(1)[:num_experts]

  def auction_round(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    owner, bid, rounds = carry  # owner: expert, or num_experts for none
    lowest = jnp.full(num_experts + 1, jnp.inf).at[owner].min(bid)[:num_experts]
    price = jnp.where(held(owner) < part, start, lowest)
    value, best = jax.lax.top_k(scores - price[None], 2)
    waiting = bidders & (owner == num_experts)
    offer = jnp.take_along_axis(scores, best[:, :1], axis=-1)[:, 0] - value[:, 1] + step
    owner, bid = jnp.where(waiting, best[:, 0], owner), jnp.where(waiting, offer, bid)
    order = jnp.lexsort((-bid, owner))
    first = jnp.searchsorted(owner[order], jnp.arange(num_experts + 1))
    rank = jnp.zeros(len(bidders), jnp.int32).at[order].set((everyone - first[owner[order]]).astype(jnp.int32))
    return jnp.where(rank < part, owner, num_experts), bid, rounds + 1

  def unsettled(carry: tuple[Array, Array, Array]) -> Array:
    return jnp.any(bidders & (carry[0] == num_experts)) & (carry[2] < max_rounds)

  nobody = jnp.full(len(bidders), num_experts, jnp.int32)
  owner, _, rounds = jax.lax.while_loop(unsettled, auction_round, (nobody, jnp.zeros(len(bidders)), jnp.int32(0)))
  left = bidders & (owner == num_experts)
  vacant = jnp.cumsum(jnp.maximum(part - held(owner), 0))
  filled = jnp.searchsorted(vacant, jnp.cumsum(left) - 1, side='right').astype(jnp.int32)
  return jnp.where(valid, jnp.where(left, filled, owner)[:size], 0), rounds
