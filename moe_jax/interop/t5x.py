"""T5X as another engine for the same models, driven by `python -m t5x.train` and the files of gin/t5x/.

T5X drives a model (`LanguageModel`) with an optimizer (`Optimizer`) on a mesh (`Partitioner`), all three ours in its
words. It is not on the package registries, README.md says how to install it; nothing else imports this file. Its
checkpoints are read and written by `t5x_checkpoints.py`, without it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics
from flax.core import freeze
from flax.linen.partitioning import AxisMetadata
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, PartitionSpec
from t5x import metrics as t5x_metrics
from t5x import models, optimizers, partitioning

from moe_jax import data, sharding
from moe_jax.decode import Strategy, decode
from moe_jax.objectives import LanguageModeling
from moe_jax.training.state import Names, OptimizerFactory, abstract_variables, follow_specs
from moe_jax.types import Array, Batch, Metrics

if TYPE_CHECKING:
  import seqio

PyTree = Any


class Devices(Protocol):
  """`runs.setup.Devices`."""

  @property
  def axis_rules(self) -> sharding.AxisRules: ...

  def make_mesh(self) -> Mesh: ...


class Partitioner(partitioning.PjitPartitioner):
  """T5X's partitioner, but on our mesh and by our rules."""

  def __init__(self, devices: Devices):
    """Starts JAX's backend with these devices.

    Raises:
      ConfigError: if the mesh does not fit them.
    """
    super().__init__(num_partitions=1, logical_axis_rules=devices.axis_rules)
    self._mesh = devices.make_mesh()

  @property
  def mesh(self) -> Mesh:
    """The mesh."""
    return self._mesh


class Optimizer(optimizers.OptaxWrapper):
  """Our optimizers, which want to know the parameters' axis names; T5X's learning rate is not used."""

  def __init__(self, factory: OptimizerFactory):
    super().__init__(optax.identity())
    self._factory = factory

  def set_param_axes(self, axes: PyTree) -> None:
    """T5X tells the logical axis names of each parameter, as PartitionSpecs."""
    names = jax.tree.map(lambda spec: Names(spec), axes, is_leaf=_is_spec)
    self.optax_optimizer = self._factory(names)

  def derive_logical_axes(self, optimizer: optimizers.Optimizer, axes: PyTree) -> optimizers.Optimizer:
    """T5X asks for the logical axis names of everything in the state."""
    states = follow_specs(optimizer.state.param_states, optimizer.target, axes)
    return optimizer.replace(state=optimizers.OptimizerState(step=None, param_states=states), target=axes)


class LanguageModel(models.BaseTransformerModel):
  """A model and its objective; losses, auxiliary ones included, and metrics are those of our own trainer.

  T5X traces all of it with its partitioner's mesh and rules around, which `sharding.constrain` and dispatchers find.
  """

  def __init__(
    self,
    objective: LanguageModeling,
    optimizer: OptimizerFactory,
    vocabulary: 'seqio.Vocabulary',
    converter: str,
    strategy: Strategy,
  ):
    """Builds nothing yet.

    Args:
      objective: model and loss.
      optimizer: makes the optimizer from the parameters' axis names.
      vocabulary: of inputs and targets.
      converter: 'decoder_only' or 'encoder_decoder'.
      strategy: how `predict_batch` chooses tokens.
    """
    self.FEATURE_CONVERTER_CLS = data.CONVERTERS[converter]
    self._objective = dataclasses.replace(objective, token_bytes=data.token_bytes(vocabulary))
    self._strategy = strategy
    super().__init__(objective.model, vocabulary, vocabulary, Optimizer(optimizer))

  def get_initial_variables(
    self, rng: Array, input_shapes: Mapping[str, Any], input_types: Mapping[str, Any] | None = None
  ) -> PyTree:
    """Variables, and beside each collection 'NAME' the logical axis names of its arrays, as 'NAME_axes'."""
    batch = as_one_segment({name: jnp.zeros(shape, jnp.int32) for name, shape in input_shapes.items()})
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    _, names = abstract_variables(self._objective, spec)
    variables = dict(nn.unbox(self.module.init(rng, batch)))
    return freeze(variables | {f'{collection}_axes': _axes(tree) for collection, tree in names.items()})

  def loss_fn(
    self, params: PyTree, batch: Batch, dropout_rng: Array | None, flax_mutables: PyTree | None = None
  ) -> tuple[Array, Any]:
    """The training loss float32[] and metrics; with routers that remember, ((metrics, their new memories)) instead."""
    rngs = None if dropout_rng is None else dict(zip(('dropout', 'router'), jax.random.split(dropout_rng)))
    loss, metrics, state = self._loss(params, batch, rngs, flax_mutables)
    return loss, (metrics if flax_mutables is None else (metrics, freeze(state)))

  def eval_fn(self, params: PyTree, batch: Batch, flax_mutables: PyTree | None = None) -> tuple[Array, Any]:
    """The cross-entropy float32[] without dropout, jitter or auxiliary losses, and metrics."""
    return self._loss(params, batch, None, flax_mutables)[:2]

  def _loss(
    self, params: PyTree, batch: Batch, rngs: dict[str, Array] | None, memories: PyTree | None
  ) -> tuple[Array, dict[str, clu_metrics.Metric], PyTree]:
    batch = self._objective.counted(as_one_segment(batch))
    variables = {'params': params, **(memories or {})}
    loss, (metrics, state) = self._objective.loss(variables, batch, rngs, train=rngs is not None)
    return loss, as_clu_metrics(metrics, len(batch['decoder_target_tokens'])), state

  def _compute_logits(
    self,
    params: PyTree,
    batch: Batch,
    dropout_rng: Array | None = None,
    flax_mutables: PyTree | None = None,
  ) -> Array:
    (logits, _) = self.module.apply({'params': params, **(flax_mutables or {})}, as_one_segment(batch))
    return logits

  def score_batch(
    self, params: PyTree, batch: Batch, return_intermediates: bool = False, flax_mutables: PyTree | None = None
  ) -> Array:
    """The log-probability float32[B] of each row's targets."""
    logits = self._compute_logits(params, batch, flax_mutables=flax_mutables)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['decoder_target_tokens'])
    return -jnp.sum(losses * batch['decoder_loss_weights'], axis=1)

  def predict_batch(
    self, params: PyTree, batch: Batch, rng: Array | None = None, flax_mutables: PyTree | None = None
  ) -> Array:
    """Tokens int32[B, L]."""
    return self.predict_batch_with_aux(params, batch, rng, flax_mutables)[0]

  def predict_batch_with_aux(
    self, params: PyTree, batch: Batch, rng: Array | None = None, flax_mutables: PyTree | None = None
  ) -> tuple[Array, dict[str, Array]]:
    """At most as many tokens as the targets are long, int32[B, L], 0 behind the end; and their 'scores' float32[B]."""
    tokens, scores = decode(
      self.module,
      {'params': params, **(flax_mutables or {})},
      prompts(batch),
      max_new_tokens=batch['decoder_target_tokens'].shape[1],
      strategy=self._strategy,
      key=jax.random.key(0) if rng is None else rng,
      eos_id=self.output_vocabulary.eos_id,
    )
    return tokens[:, 0], {'scores': scores[:, 0]}


def as_one_segment(batch: Batch) -> dict[str, Array]:
  """Adds the segments and positions that seqio leaves out of rows it did not pack."""
  added = {}
  # Not by the decoder's inputs: they begin with a 0 that is no padding.
  for side, name in (('decoder', 'decoder_target_tokens'), ('encoder', 'encoder_input_tokens')):
    if name in batch and f'{side}_segment_ids' not in batch:
      tokens = batch[name]
      positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
      added |= {f'{side}_segment_ids': (tokens != 0).astype(jnp.int32), f'{side}_positions': positions}
  return {**batch, **added}


def prompts(batch: Batch) -> dict[str, Array]:
  """What `decode` goes on from: the inputs of rows that are not packed, which a decoder alone reads itself."""
  batch = as_one_segment(batch)
  tokens = batch['decoder_input_tokens']
  first = (jnp.arange(tokens.shape[1]) == 0)[None, :]
  given = batch.get('decoder_causal_attention', jnp.broadcast_to(first, tokens.shape)).astype(jnp.int32)
  if 'encoder_input_tokens' in batch:
    tokens, given = tokens[:, :1], given[:, :1]
  encoder = {name: array for name, array in batch.items() if name.startswith('encoder_')}
  return {**encoder, 'decoder_input_tokens': tokens * given, 'decoder_segment_ids': given}


def as_clu_metrics(values: Metrics, rows: int) -> dict[str, clu_metrics.Metric]:
  """Our metrics of a batch as ones that add up over batches, each weighing as many target tokens as it has.

  Of an array, such as the loads of experts, the mean is watched and the largest entry, as 'NAME/max'.
  """
  tokens = values['target_tokens']

  def mean(value: Array) -> clu_metrics.Average:
    return clu_metrics.Average(total=value * tokens, count=tokens)

  found = {'target_tokens': t5x_metrics.Sum(total=tokens)}
  for name, value in values.items():
    if name not in ('target_tokens', 'target_bytes'):
      found[name] = mean(jnp.mean(value))
      if value.size > 1:
        found[f'{name}/max'] = mean(jnp.max(value))
  if 'target_bytes' in values:
    bits = values['cross_entropy'] * tokens / math.log(2)
    found['bits_per_byte'] = clu_metrics.Average(total=bits, count=values['target_bytes'])
  return found | {
    'timing/steps_per_second': t5x_metrics.StepsPerTime.from_model_output(),
    'timing/seqs_per_second': t5x_metrics.TimeRate.from_model_output(numerator=rows),
    'timing/target_tokens_per_second': t5x_metrics.TimeRate.from_model_output(numerator=tokens),
  }


def _axes(names: PyTree) -> PyTree:
  """Names of axes as Flax's `param_with_axes` leaves them: of 'wi', as metadata 'wi_axes'."""
  flat = {(*path[:-1], f'{path[-1]}_axes'): AxisMetadata(tuple(axes)) for path, axes in flatten_dict(names).items()}
  return unflatten_dict(flat)


def _is_spec(x: Any) -> bool:
  return isinstance(x, PartitionSpec)
