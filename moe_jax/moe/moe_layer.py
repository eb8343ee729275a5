"""The mixture-of-experts layer: group, route, dispatch, ungroup.

Letters, here and in all of `moe/`: B batch, L length, M model width, G groups, S tokens a group, E experts, C capacity,
K choices a token, F hidden width of an expert.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.layers.context import Context
from moe_jax.moe.dispatchers.base import Dispatcher, Journey
from moe_jax.moe.dispatchers.einsum import einsum
from moe_jax.moe.experts import ExpertBank, Experts
from moe_jax.moe.routers.base import Router, RoutingContext
from moe_jax.moe.routers.top_k import TopKRouter
from moe_jax.moe.routing_plan import Plan
from moe_jax.notices import notice
from moe_jax.types import Array, Aux, ConfigError


def rows_per_group(batch: int, length: int, group_size: int | None, decoding: bool) -> int | None:
  """How many sequences a routing group spans; None where a group is a part of one sequence.

  Groups never cross devices, and never depend on the mesh: a wish that cannot be met is an error.

  Args:
    batch: B.
    length: L.
    group_size: the wished S; None is a sequence, however long.
    decoding: groups make no difference where nothing is dropped, so a step takes what a device has as one group, and a
      prompt each sequence as one.

  Raises:
    ConfigError: naming sizes that would fit.
  """
  own = length // sharding.shards('length')  # tokens of a sequence that a device has
  if own < length and (not group_size or own % group_size):
    raise ConfigError(
      f'GROUP_SIZE={group_size} does not divide the {own} tokens of a sequence that each device along the mesh axis'
      f' sequence has: GROUP_SIZE={own} does (groups never cross devices).'
    )
  if group_size is None:
    group_size = length
  ways = sharding.shards('group')
  divided = not decoding and 0 < group_size < length and length % group_size == 0
  pieces = length // group_size if divided else 1  # of a sequence
  per_device, remainder = divmod(batch * pieces, ways)
  if remainder:
    raise ConfigError(
      f'BATCH_SIZE={batch} (after splitting into microbatches) does not divide over {ways}'
      f' data-parallel devices: use a multiple of {math.lcm(ways, pieces) // pieces}.'
    )
  if decoding:
    return per_device if length == 1 else 1
  if group_size < length:
    if group_size < 1 or length % group_size:
      fits = [size for size in range(1, length + 1) if length % size == 0]
      around = {max((s for s in fits if s < group_size), default=1), min(s for s in fits if s > group_size)}
      would = ' and '.join(map(str, sorted(around)))
      raise ConfigError(f'GROUP_SIZE={group_size} does not divide sequences of {length}: {would} would.')
    return None
  rows = group_size // length
  if per_device % rows or group_size % length:
    tiles = [r * length for r in range(1, per_device + 1) if per_device % r == 0]
    nearest = min(tiles, key=lambda size: abs(size - group_size))
    raise ConfigError(
      f'GROUP_SIZE={group_size} does not tile the {per_device} sequences of {length} tokens that each device has:'
      f' GROUP_SIZE={nearest} does (groups never cross devices).'
    )
  return rows


SublayerFactory = Callable[..., nn.Module]
ROUTING = 'routing'  # the collection of plans, one a layer, for who asks that it be mutable


class MoELayer(nn.Module):
  """A sparse feed-forward sublayer: float[B, L, M] -> float[B, L, M].

  Attributes:
    num_experts: E.
    group_size: S, tokens that are routed together and compete for capacity. A divisor of the sequence length, or a
      multiple of it that fits one device; None is the sequence. Larger groups drop fewer tokens; one-hot dispatch costs
      grow with them.
    router: makes the router, given the number of experts.
    experts: makes the experts, given their number and width: `Experts`, or any module that answers with an ExpertBank.
    dispatcher: carries the tokens.
    shared: makes a sublayer that every token passes besides its experts, and whose output is added: shared experts
      (DeepSeekMoE, Dai et al. 2024), which are one MLP as wide as all of them; the residual branch of PR-MoE
      (Rajbhandari et al. 2022).
  """

  num_experts: int
  group_size: int | None
  router: Callable[..., Router] = TopKRouter
  experts: Callable[..., nn.Module] = Experts
  dispatcher: Dispatcher = einsum
  shared: SublayerFactory | None = None

  @nn.compact
  def __call__(self, x: Array, context: Context) -> tuple[Array, Aux]:
    batch, length, width = x.shape
    if self.num_experts % (ways := sharding.shards('expert')):
      raise ConfigError(
        f'NUM_EXPERTS={self.num_experts} does not divide over the mesh axis expert of {ways}: use a multiple of {ways},'
        ' or change MESH (-1 takes the widest axis that fits).'
      )
    rows = rows_per_group(batch, length, self.group_size, decoding=context.cache_length > 0)
    size = self.group_size if rows is None and self.group_size else (rows or 1) * length

    def group(values: Array) -> Array:  # [B, L, ...] -> [G, S, ...]
      return sharding.constrain(values.reshape(-1, size, *values.shape[2:]), 'group', *(None,) * (values.ndim - 1))

    segment_ids = group(context.segment_ids)
    routing_context = RoutingContext(
      valid=segment_ids > 0,
      token_count=context.token_count,
      token_ids=None if context.token_ids is None else group(context.token_ids),
      task_ids=None if context.task_ids is None else group(context.task_ids),
      positions=group(context.positions),
      segment_ids=segment_ids,
      row_length=length,
      train=context.train,
    )
    tokens = group(x)
    router = self.router(num_experts=self.num_experts, name='router')
    if context.causal and not router.causal:
      advice = f'{type(router).__name__} looks at later tokens: in a decoder its loss is too good to be true, and it'
      advice += ' cannot generate. Use it in an encoder (ENCODER_ROUTER).'
      if context.cache_length:
        raise ConfigError(advice)
      warnings.warn(advice, stacklevel=2)
    plan, aux = router(tokens, routing_context)
    if not self.is_initializing():  # nothing is kept but for who asks to look
      self.sow(ROUTING, 'plan', plan, init_fn=lambda: None, reduce_fn=lambda _, plan: plan)
    bank = self.experts(num_experts=self.num_experts, features=width, name='experts')(context.train)
    y, journey = self.dispatch(bank, tokens, plan)
    mebibytes = journey.rows * width * y.dtype.itemsize / 2**20
    notice(
      f'{"training" if context.train else "outside training"}: a device holds {journey.rows:,} rows of {width}'
      f' {y.dtype} ({mebibytes:,.1f} MiB) on the way to the experts of a layer, and as many on the way home'
    )
    metrics = aux.metrics
    if journey.overflow is not None:
      metrics = {**metrics, 'overflow': journey.overflow / jnp.maximum(context.token_count, 1)}
    y = sharding.constrain(y.reshape(batch, length, width), 'batch', 'length', None)
    if self.shared:
      y += self.shared(name='shared')(x, context)[0]
    terms = {name: term.reshape(batch, length) for name, term in aux.token_terms.items()}
    return y, dataclasses.replace(aux, metrics=metrics, token_terms=terms)

  def dispatch(self, experts: ExpertBank, tokens: Array, plan: Plan) -> tuple[Array, Journey]:
    """The dispatcher's journey, under a name by which it can be watched from outside; and so are the experts on it."""
    inside = jax.named_scope('[experts]')
    runs = {name: getattr(experts, name) for name in ('apply', 'grouped', 'weighed')}
    experts = experts._replace(**{name: run and inside(run) for name, run in runs.items()})
    return self.dispatcher(experts, tokens, plan)
