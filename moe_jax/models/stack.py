"""A stack: a named pattern of sublayers, each normalised before and added after, repeated under one scan."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.layers.context import Context
from moe_jax.layers.norms import rms_norm
from moe_jax.types import Array, Aux, ConfigError, Dtype, nest

SublayerFactory = Callable[..., nn.Module]
REMAT = {
  'none': None,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}


class Block(nn.Module):
  """One run of the pattern: x + dropout(sublayer(norm(x))) for each sublayer in turn."""

  pattern: Sequence[tuple[str, SublayerFactory]]  # pairs: Flax's lifted transforms sort the keys of a mapping
  dropout_rate: float = 0.0
  norm_epsilon: float = 1e-6
  dtype: Dtype = 'float32'

  @nn.compact
  def __call__(self, x: Array, context: Context) -> tuple[Array, Aux]:
    reports = {}
    for name, sublayer in self.pattern:
      y = rms_norm(f'{name}_norm', self.dtype, epsilon=self.norm_epsilon)(x)
      y, reports[name] = sublayer(name=name)(y, context)
      y = nn.Dropout(self.dropout_rate, deterministic=not context.train)(y)
      x = sharding.constrain(x + y, 'batch', 'length', None)
    return x, nest(**reports)


class Stack(nn.Module):
  """`repeats` blocks in a row; what they report gains a leading [repeats] axis.

  Attributes:
    pattern: name -> factory of a sublayer. Factories, not instances: an instance used twice would share its weights.
    repeats: how often the pattern runs.
    scan: one compiled block for all repeats, with weights stacked on a 'layers' axis; else unrolled.
    remat: what the backward pass recomputes: 'none' nothing, 'dots' all but matrix products, 'full' everything.
    relative_table: makes a relative position table shared by all layers (T5).
    dropout_rate: on the output of each sublayer.
    norm_epsilon: of the norm before each.
  """

  pattern: Mapping[str, SublayerFactory]
  repeats: int
  scan: bool = True
  remat: str = 'full'
  relative_table: Callable[..., nn.Module] | None = None
  dropout_rate: float = 0.0
  norm_epsilon: float = 1e-6
  dtype: Dtype = 'float32'

  @nn.compact
  def __call__(self, x: Array, context: Context) -> tuple[Array, Aux]:
    options = {'dropout_rate': self.dropout_rate, 'norm_epsilon': self.norm_epsilon, 'dtype': self.dtype}
    if self.relative_table:
      context = dataclasses.replace(context, relative_table=self.relative_table(name='relative')())
    if self.remat not in REMAT:
      raise ConfigError(f'REMAT={self.remat!r} is none of {", ".join(REMAT)}.')
    block, pattern = Block, tuple(self.pattern.items())
    if self.remat != 'none' and not context.cache_length:
      block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=not self.scan)
    if self.scan:
      return nn.scan(
        block,
        length=self.repeats,
        in_axes=nn.broadcast,
        variable_axes={'params': 0, 'state': 0, 'cache': 0, 'routing': 0},
        split_rngs={'params': True, 'dropout': True, 'router': True},
        metadata_params={nn.PARTITION_NAME: 'layers'},
      )(pattern, **options, name='blocks')(x, context)
    reports = []
    for i in range(self.repeats):
      x, aux = block(pattern, **options, name=f'blocks_{i}')(x, context)
      reports.append(aux)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *reports)


def run_stacks(stacks: Sequence[nn.Module], x: Array, context: Context) -> tuple[Array, Aux]:
  """One stack after another, each reporting under its own name."""
  reports = {}
  for stack in stacks:
    x, reports[str(stack.name)] = stack(x, context)
  return x, nest(**reports)


def interleaved_stack(
  mixers: Mapping[str, SublayerFactory],
  mlp: SublayerFactory,
  moe: SublayerFactory,
  num_layers: int,
  expert_every: int,
  expert_first: bool = False,
  after_moe: Mapping[str, SublayerFactory] | None = None,
  stack: Callable[..., Stack] = Stack,
  name: str | None = None,
) -> Stack:
  """A stack in which every `expert_every`-th layer is sparse.

  Args:
    mixers: the sublayers that begin every layer, attention most often, by name.
    mlp: the feed-forward sublayer of a dense layer.
    moe: that of a sparse layer.
    num_layers: layers in all; a multiple of `expert_every`.
    expert_every: 1 makes every layer sparse, 2 every other, 0 none: the dense twin.
    expert_first: the sparse layer opens each run of layers (GShard, GLaM) instead of closing it (Switch, ST-MoE).
    after_moe: sublayers that follow each sparse one, by name, such as ST-MoE's extra MLP.
    stack: makes the stack from its pattern and repeats.
    name: of the stack.

  Raises:
    ConfigError: if the layers do not divide into runs, or a name in `after_moe` is taken.
  """
  period, after_moe = expert_every or 1, after_moe or {}
  if taken := sorted({*mixers, 'mlp', 'moe'} & set(after_moe)):
    raise ConfigError(f'after_moe has a sublayer {taken[0]!r}, and there is one already: use another name.')
  if num_layers < 1:
    raise ConfigError(f'NUM_LAYERS={num_layers}: at least one.')
  if expert_every < 0 or num_layers % period:
    fits = [k for k in range(1, num_layers + 1) if num_layers % k == 0]
    raise ConfigError(
      f'EXPERT_EVERY={expert_every} does not divide NUM_LAYERS={num_layers}: use 0 (dense) or one of {fits}.'
    )
  sparse = None if expert_every == 0 else 0 if expert_first else period - 1
  pattern: dict[str, SublayerFactory] = {}
  for layer in range(period):
    suffix = f'_{layer}' if period > 1 else ''
    pattern |= {mixer + suffix: factory for mixer, factory in mixers.items()}
    pattern |= {'moe': moe, **after_moe} if layer == sparse else {'mlp' + suffix: mlp}
  return stack(pattern=pattern, repeats=num_layers // period, name=name)
