"""What a dispatcher is: the whole journey of the tokens, out to the experts and home again."""

from typing import Protocol

from moe_jax.moe.experts import ExpertBank
from moe_jax.moe.routing_plan import Plan
from moe_jax.types import Array


class Dispatcher(Protocol):
  """Carries tokens to their experts, runs these, and sums the answers by combine weight."""

  def __call__(self, experts: ExpertBank, tokens: Array, plan: Plan) -> Array:
    """tokens: float[G, S, M] -> float[G, S, M]; exactly 0 for a token whose every choice was dropped."""
