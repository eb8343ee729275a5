"""What a dispatcher is: the whole journey of the tokens, out to the experts and home again."""

from typing import NamedTuple, Protocol

from moe_jax.moe.experts import ExpertBank
from moe_jax.moe.routing_plan import Plan
from moe_jax.sharding import shards
from moe_jax.types import Array


class Journey(NamedTuple):
  """How it went.

  Attributes:
    rows: of activations, static: how many each device holds on the way out, and as many on the way home.
    overflow: float32[], choices that the plan kept and the journey had no room for; None where there is always room.
  """

  rows: int
  overflow: Array | None = None


class Dispatcher(Protocol):
  """Carries tokens to their experts, runs these, and sums the answers by combine weight."""

  def __call__(self, experts: ExpertBank, tokens: Array, plan: Plan) -> tuple[Array, Journey]:
    """tokens: float[G, S, M] -> float[G, S, M]; exactly 0 for a token whose every choice was dropped."""


def full_buffers(tokens: Array, plan: Plan) -> Journey:
  """Of a dispatcher that moves every slot of every group, tokens float[G, S, M], filled or not."""
  return Journey(rows=len(tokens) // shards('group') * plan.slots)
