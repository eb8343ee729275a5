"""The dispatcher that suits the plan and the mesh. All give the same numbers, at different costs."""

from collections.abc import Callable

from moe_jax.moe.dispatchers.all_to_all import all_to_all
from moe_jax.moe.dispatchers.base import Journey
from moe_jax.moe.dispatchers.ragged import ragged
from moe_jax.moe.experts import ExpertBank
from moe_jax.moe.routing_plan import Plan
from moe_jax.notices import notice
from moe_jax.sharding import shards
from moe_jax.types import Array


def auto(experts: ExpertBank, tokens: Array, plan: Plan) -> tuple[Array, Journey]:
  """See `Dispatcher`; says once which it took, and why."""
  carry, why = choose(experts, plan)
  notice(f'auto: {carry.__name__}, since {why}')
  return carry(experts, tokens, plan)


def choose(experts: ExpertBank, plan: Plan) -> tuple[Callable[..., tuple[Array, Journey]], str]:
  """One that moves and multiplies least, and the reason.

  Neither `gather` nor `einsum` is ever it: on a mesh what they leave to the compiler costs more, on one device
  `all_to_all` is `gather`, and one-hot dispatch is not cheaper even in groups of 64 (tests/benchmarks).
  """
  if plan.slots_per_choice > 2 and experts.grouped:
    return ragged, f'full buffers would have {plan.slots_per_choice:.3g} slots for each choice'
  ways = shards('expert')
  return all_to_all, f'experts live on {ways} devices' if ways > 1 else 'every device has all experts'
