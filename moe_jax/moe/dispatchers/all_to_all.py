"""Explicit expert parallelism: full buffers, with one all-to-all over the expert axis out and one home.

Each device fills buffers for all experts from its own groups, sends each expert's buffers to the device that holds the
expert, and weighs the answers when they are back. Their gradients are weighed by the experts: combine weights go there
too, in an exchange of one number a slot.
"""

import functools

import jax

from moe_jax.moe.dispatchers.base import Journey, full_buffers
from moe_jax.moe.dispatchers.by_device import Device, by_device
from moe_jax.moe.experts import ExpertBank, Weights
from moe_jax.moe.routing_plan import Plan
from moe_jax.types import Array, Metrics


def all_to_all(experts: ExpertBank, tokens: Array, plan: Plan) -> tuple[Array, Journey]:
  """See `Dispatcher`."""

  def journey(device: Device, weights: Weights, tokens: Array, plan: Plan) -> tuple[Array, Metrics]:
    shape, plan = tokens.shape, plan.merged()  # groups of a device share a journey
    out = functools.partial(device.exchange, split_axis=1, concat_axis=0)  # [g, E, ...] -> [g * n, E / n, ...]
    home = functools.partial(device.exchange, split_axis=0, concat_axis=1)
    slots = device.whole_rows(out(plan.fill(tokens.reshape(plan.groups, -1, shape[-1]))))
    slots = experts.answer(weights, slots, jax.tree.map(out, plan.gradient_weight(tokens.dtype)))
    slots = home(device.share_rows(slots))
    return plan.read(slots).reshape(shape), {}

  y, _ = by_device(journey, experts, tokens, plan)
  return y, full_buffers(tokens, plan)
