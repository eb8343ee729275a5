"""Explicit expert parallelism: full buffers, with one all-to-all over the expert axis out and one home.

Each device fills buffers for all experts from its own groups, sends each expert's buffers to the device that holds the
expert, and weighs the answers when they are back.
"""

from moe_jax.moe.dispatchers.base import Journey, full_buffers
from moe_jax.moe.dispatchers.by_device import Device, by_device
from moe_jax.moe.experts import ExpertBank, Weights
from moe_jax.moe.routing_plan import Plan
from moe_jax.types import Array, Metrics


def all_to_all(experts: ExpertBank, tokens: Array, plan: Plan) -> tuple[Array, Journey]:
  """See `Dispatcher`."""

  def journey(device: Device, weights: Weights, tokens: Array, plan: Plan) -> tuple[Array, Metrics]:
    shape, plan = tokens.shape, plan.merged()  # groups of a device share a journey
    slots = plan.fill(tokens.reshape(plan.groups, -1, shape[-1]))
    slots = device.exchange(slots, split_axis=1, concat_axis=0)  # [g, E, C, M] -> [g * n, E / n, C, M]
    slots = device.share_rows(experts.apply(weights, device.whole_rows(slots)))
    slots = device.exchange(slots, split_axis=0, concat_axis=1)
    return plan.read(slots).reshape(shape), {}

  y, _ = by_device(journey, experts, tokens, plan)
  return y, full_buffers(tokens, plan)
