"""The experts: their weights, and the pure function that runs them on filled buffers."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental.layout import Layout, with_layout_constraint

from moe_jax import sharding
from moe_jax.layers.initializers import fan_in
from moe_jax.layers.mlp import apply_activations
from moe_jax.moe.grouped_matmul import grouped_matmul
from moe_jax.moe.slots import weigh_gradient
from moe_jax.types import Array, ConfigError, Dtype, Initializer

Weights = dict[str, Array]
Axes = tuple[int, ...]


class ExpertBank(NamedTuple):
  """All experts of one layer, ready for a dispatcher to carry tokens to.

  Attributes:
    apply: (weights, float[G, E, C, M]) -> float[G, E, C, M], each expert on its own slots; sums over hidden shards are
      partial where `weights` hold only a shard of the hidden axis.
    weights: arrays with a leading expert axis.
    axes: logical axis names of each weight.
    grouped: (weights, float[N, M], blocks int32[E], block) -> float[N, M], on rows that are sorted by expert, so many
      blocks of `block` rows each; None for experts that run on buffers only.
    weighed: (weights, float[G, E, C, M], gradient_weight float[G, E, C]) -> as `apply`, for experts that multiply the
      gradients of their answers more cheaply than by a pass over all rows; None for others.
  """

  apply: Callable[[Weights, Array], Array]
  weights: Weights
  axes: dict[str, tuple[str | None, ...]]
  grouped: Callable[[Weights, Array, Array, int], Array] | None = None
  weighed: Callable[[Weights, Array, Array], Array] | None = None

  def answer(self, weights: Weights, slots: Array, gradient_weight: Array | None) -> Array:
    """As `apply`; gradients of the answers are multiplied by `gradient_weight`, if any (see `slots.read_deferred`)."""
    if gradient_weight is None:
      return self.apply(weights, slots)
    if self.weighed:
      return self.weighed(weights, slots, gradient_weight)
    return weigh_gradient(self.apply(weights, slots), gradient_weight)


def expert_mlp(
  weights: Weights, slots: Array, gradient_weight: Array | None = None, *, activations: Sequence[str]
) -> Array:
  """Runs every expert's feed-forward on its own slots.

  Args:
    weights: 'wi_0', 'wi_1', ..., one a branch, float[E, M, F]; 'wo' float[E, F, M]; F hidden.
    slots: float[G, E, C, M].
    gradient_weight: float[G, E, C], by which gradients of the answers are multiplied; None is 1.
    activations: one per branch, see `layers.mlp.apply_activations`.

  Returns:
    float[G, E, C, M].
  """
  shape = slots.shape
  if shape[1] == 1:  # one expert has one block of rows, which TPUs do not see by themselves
    slots = slots.reshape(1, 1, -1, shape[-1])
  if gradient_weight is not None:
    gradient_weight = gradient_weight.reshape(slots.shape[:3])
  branches = [_into_experts(slots, weights[f'wi_{i}']) for i in range(len(activations))]
  return _out_of_experts(apply_activations(branches, activations), weights['wo'], gradient_weight).reshape(shape)


def grouped_expert_mlp(weights: Weights, rows: Array, blocks: Array, block: int, activations: Sequence[str]) -> Array:
  """As `expert_mlp`, on float[N, M] rows of which every expert has whole blocks; see `grouped_matmul`."""
  branches = [grouped_matmul(rows, weights[f'wi_{i}'], blocks, block) for i in range(len(activations))]
  return grouped_matmul(apply_activations(branches, activations), weights['wo'], blocks, block)


# The two matmuls, with derivatives written out: those that JAX derives give the weights' gradients transposed, which
# TPUs then copy. Hidden activations have the experts first, so that each expert's rows are one block; slots have the
# groups first, as the all-to-all before and after them wants. The weights may be wider than the activations: the
# gradients are then summed over slots and devices in that wider type.


@jax.custom_vjp
def _into_experts(slots: Array, wi: Array) -> Array:
  """float[G, E, C, M], float[E, M, F] -> float[E, G, C, F]."""
  return _dot(slots, wi.astype(slots.dtype), contract=((3,), (1,)), batch=((1,), (0,)))


def _into_forward(slots: Array, wi: Array) -> tuple[Array, tuple[Array, Array]]:
  return _into_experts(slots, wi), (slots, wi)


def _into_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
  slots, wi = saved
  to_slots = _dot(gradient, wi.astype(slots.dtype), contract=((3,), (2,)), batch=((0,), (0,)))
  to_wi = _dot(slots, gradient, contract=((0, 2), (1, 2)), batch=((1,), (0,)), dtype=wi.dtype)
  return _groups_first(to_slots), to_wi


@jax.custom_vjp
def _out_of_experts(hidden: Array, wo: Array, gradient_weight: Array | None) -> Array:
  """float[E, G, C, F], float[E, F, M] -> float[G, E, C, M], whose gradient is weighed by float[G, E, C]."""
  return _groups_first(_dot(hidden, wo.astype(hidden.dtype), contract=((3,), (1,)), batch=((0,), (0,))))


def _out_forward(hidden: Array, wo: Array, gradient_weight: Array | None) -> tuple[Array, Any]:
  return _out_of_experts(hidden, wo, gradient_weight), (hidden, wo, gradient_weight)


def _out_backward(saved: Any, gradient: Array) -> tuple[Array, Array, None]:
  # The weight multiplies the hidden side of both products, where TPUs do it inside matmuls. Of `gradient`, that both
  # products need, they would first make a weighed copy.
  hidden, wo, gradient_weight = saved
  to_hidden = _dot(gradient, wo.astype(hidden.dtype), contract=((3,), (2,)), batch=((1,), (0,)))
  if gradient_weight is not None:
    by_row = gradient_weight.swapaxes(0, 1)[..., None].astype(hidden.dtype)
    hidden, to_hidden = by_row * hidden, by_row * to_hidden
  to_wo = _dot(hidden, gradient, contract=((1, 2), (0, 2)), batch=((0,), (1,)), dtype=wo.dtype)
  return to_hidden, to_wo, None


_into_experts.defvjp(_into_forward, _into_backward)
_out_of_experts.defvjp(_out_forward, _out_backward)


def _dot(a: Array, b: Array, contract: tuple[Axes, Axes], batch: tuple[Axes, Axes], dtype: Dtype = None) -> Array:
  """`dot_general`: batch axes first, then what is left of a, then what is left of b."""
  plain = functools.partial(jax.lax.dot_general, dimension_numbers=(contract, batch), preferred_element_type=dtype)

  def merged(a: Array, b: Array) -> Array:  # for CPUs, which multiply slowly where a side has several axes
    (left, i), (right, j) = _three_axes(a, contract[0], batch[0]), _three_axes(b, contract[1], batch[1])
    product = jax.lax.dot_general(left, right, (((i,), (j,)), ((0,), (0,))), preferred_element_type=dtype)
    return product.reshape(jax.eval_shape(plain, a, b).shape)

  return jax.lax.platform_dependent(a, b, cpu=merged, default=plain)


def _three_axes(x: Array, contract: Axes, batch: Axes) -> tuple[Array, int]:
  """[batch, contracted, free] or [batch, free, contracted], as they lie; and which is contracted."""
  free = tuple(axis for axis in range(x.ndim) if axis not in (*contract, *batch))
  order = [batch, *sorted((contract, free))]
  sizes = [math.prod(x.shape[axis] for axis in axes) for axes in order]
  return x.transpose([axis for axes in order for axis in axes]).reshape(sizes), order.index(contract)


def _groups_first(x: Array) -> Array:
  """float[E, G, C, M] -> float[G, E, C, M]; on TPUs the matmul before it is told to write its rows in that order."""
  if sharding.is_local():  # else some compilers would gather x on every device, to constrain its layout
    order = Layout((1, 0, 2, 3))
    x = jax.lax.platform_dependent(x, tpu=lambda x: with_layout_constraint(x, order), default=lambda x: x)
  return x.swapaxes(0, 1)


class Experts(nn.Module):
  """Feed-forward experts, each with its own weights: (train) -> ExpertBank.

  Attributes:
    num_experts: E.
    features: M.
    hidden_dim: F of one expert.
    activations: as in `layers.mlp.Mlp`; GLaM's experts are not gated, ST-MoE's are.
    dtype: of activations.
    gradient_dtype: in which the weights' gradients are summed over slots and devices, and the weights gathered where
      they are split (FSDP). None is that of activations: in bfloat16 half the traffic of float32.
    dropout_rate: of hidden activations in training (expert dropout, Switch section 2.4, ST-MoE). A unit is dropped for
      all tokens of a step that its expert sees, so that every mesh and every dispatcher draws the same.
  """

  num_experts: int
  features: int
  hidden_dim: int
  activations: Sequence[str] = ('gelu', 'linear')
  kernel_init: Callable[..., Initializer] = fan_in
  dtype: Dtype = 'float32'
  gradient_dtype: Dtype | None = None
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(self, train: bool = False) -> ExpertBank:
    wi, wo = (self.num_experts, self.features, self.hidden_dim), (self.num_experts, self.hidden_dim, self.features)
    shapes = {f'wi_{i}': wi for i in range(len(self.activations))} | {'wo': wo}
    axes: dict[str, tuple[str | None, ...]] = {name: ('expert', 'embed', 'expert_mlp') for name in shapes}
    axes['wo'] = ('expert', 'expert_mlp', 'embed')
    init = self.kernel_init(in_axis=1, out_axis=2, batch_axis=0)
    weights = {
      name: self.param(name, sharding.partitioned(init, *axes[name]), shape).astype(self.gradient_dtype or self.dtype)
      for name, shape in shapes.items()
    }
    # Hidden units meet the rest of the model through the rows of wo: without them they are dropped.
    dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(2,), deterministic=not train)
    weights['wo'] = dropout(weights['wo'])
    activations = tuple(self.activations)
    mlp, grouped = (functools.partial(run, activations=activations) for run in (expert_mlp, grouped_expert_mlp))
    return ExpertBank(mlp, weights, axes, grouped, weighed=mlp)


class ModuleExperts(nn.Module):
  """Experts that are any token-wise module, each with its own weights: (train) -> ExpertBank.

  They run on full buffers, whole along the mesh axis `model`.

  Attributes:
    num_experts: E.
    features: M.
    expert: makes the module, float[..., M] -> float[..., M], of parameters alone: no randomness, no state.
      Such as `nn.Dense`.
    dtype: in which its weights are handed to it.

  Raises:
    ConfigError: if the module gives another width than M.
  """

  num_experts: int
  features: int
  expert: Callable[..., nn.Module]
  dtype: Dtype = 'float32'

  @nn.compact
  def __call__(self, train: bool = False) -> ExpertBank:
    del train
    expert = self.expert(parent=None)
    row = jnp.zeros((1, self.features), self.dtype)

    def init(key: Array) -> Any:
      stacked = jax.vmap(lambda key: expert.init(key, row)['params'])(jax.random.split(key, self.num_experts))
      return jax.tree.map(_expert_first, stacked, is_leaf=_is_box)

    def run(params: Any, rows: Array) -> Array:
      return expert.apply({'params': params}, rows)  # type: ignore[return-value]

    params = self.param('each', init)
    if (shape := jax.eval_shape(run, jax.tree.map(lambda x: x[0], params), row).shape) != row.shape:
      raise ConfigError(
        f'{type(expert).__name__} as an expert turns {self.features} features into {shape[-1]}:'
        ' an expert gives as many as it takes.'
      )
    weights = {name: x.astype(self.dtype) for name, x in flatten_dict(params, sep='/').items()}

    def apply(weights: Weights, slots: Array) -> Array:
      rows = slots.swapaxes(0, 1).reshape(slots.shape[1], -1, slots.shape[3])
      rows = jax.vmap(run)(unflatten_dict(weights, sep='/'), rows)
      return rows.reshape(slots.shape[1], slots.shape[0], *slots.shape[2:]).swapaxes(0, 1).astype(slots.dtype)

    boxes = flatten_dict(jax.eval_shape(init, jax.random.key(0)), sep='/')
    return ExpertBank(apply, weights, {name: box.names for name, box in boxes.items()})


def _is_box(x: Any) -> bool:
  return isinstance(x, nn.meta.AxisMetadata)


def _expert_first(x: Any) -> Any:
  """Says that a stacked weight has the experts first; of its own axes only 'embed' may be split (FSDP)."""
  value, names = (x.value, x.names) if _is_box(x) else (x, (None,) * (x.ndim - 1))
  return nn.LogicallyPartitioned(value, ('expert', *(name if name == 'embed' else None for name in names)))
