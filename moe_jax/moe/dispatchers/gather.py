"""Dispatch by gathers, forward and backward, sharding left to the compiler. For groups of any size.

Moves K rows a token each way and multiplies nothing, where one-hot dispatch costs 4 S E C M FLOPs a group. See `slots`.
"""

import jax

from moe_jax.moe.dispatchers.base import Journey, full_buffers
from moe_jax.moe.experts import ExpertBank
from moe_jax.moe.routing_plan import Plan
from moe_jax.sharding import constrain
from moe_jax.types import Array


def gather(experts: ExpertBank, tokens: Array, plan: Plan) -> tuple[Array, Journey]:
  """See `Dispatcher`."""

  def out(x: Array) -> Array:
    rest = (None,) * (x.ndim - 2)
    return constrain(constrain(x, 'group', None, *rest), 'expert_group', 'expert', *rest)  # all-to-all

  slots = experts.answer(experts.weights, out(plan.fill(tokens)), jax.tree.map(out, plan.gradient_weight(tokens.dtype)))
  slots = constrain(slots, 'expert_group', 'expert', None, None)
  slots = constrain(slots, 'group', None, None, None)  # all-to-all
  return plan.read(slots), full_buffers(tokens, plan)
