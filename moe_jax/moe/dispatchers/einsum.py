"""One-hot dispatch: two einsums around the experts, sharding left to the compiler (GShard, Lepikhin 2020, alg. 2).

Costs 4 S C E M / (E C) = 4 S M FLOPs per slot besides the experts, so groups should be small beside the expert's hidden
width. All-to-alls are *induced*: the buffers are pinned before and after the exchange. Without both pins the compiler
gathers every token on every device instead.
"""

import jax.numpy as jnp

from moe_jax.moe.dispatchers.base import Journey, full_buffers
from moe_jax.moe.experts import ExpertBank
from moe_jax.moe.routing_plan import Plan
from moe_jax.sharding import constrain
from moe_jax.types import Array


def einsum(experts: ExpertBank, tokens: Array, plan: Plan) -> tuple[Array, Journey]:
  """See `Dispatcher`."""
  slots = jnp.einsum('gsec,gsm->gecm', plan.dispatch_array(tokens.dtype), tokens)
  slots = constrain(slots, 'group', None, None, None)
  slots = constrain(slots, 'expert_group', 'expert', None, None)  # all-to-all
  slots = experts.apply(experts.weights, slots)
  slots = constrain(slots, 'expert_group', 'expert', None, None)
  slots = constrain(slots, 'group', None, None, None)  # all-to-all
  return jnp.einsum('gsec,gecm->gsm', plan.combine_array(tokens.dtype), slots), full_buffers(tokens, plan)
