"""What a model is trained for: batch -> loss and metrics."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from moe_jax.batch import with_token_counts
from moe_jax.types import Array, Aux, Batch, Metrics, total_loss

Variables = Mapping[str, Any]
STATE = 'state'  # the collection of what a model remembers that no gradient trains


class Objective(Protocol):
  """A model and a loss on it."""

  @property
  def model(self) -> nn.Module: ...

  def counted(self, batch: Batch) -> Batch:
    """Adds the token counts that losses are divided by. Called on the whole batch, before it is split."""

  def loss(
    self, variables: Variables, batch: Batch, rngs: dict[str, Array] | None, train: bool
  ) -> tuple[Array, tuple[Metrics, Variables]]:
    """The loss float32[], metrics, and the model's new state. Losses and metrics of microbatches add up."""


@dataclasses.dataclass(frozen=True)
class LanguageModeling:
  """Cross-entropy of the next token, averaged over real targets, plus the model's auxiliary losses.

  Attributes:
    model: `DecoderOnly` or `EncoderDecoder`.
    z_loss: weight of log(Z)^2 of the vocabulary softmax (1e-4 in T5X and GLaM).
    label_smoothing: share of the target spread over the vocabulary.
    consistency: if not 0, the model is applied twice in training, with different random draws; the loss is that of both
      plus this times the divergence of their predictions (THOR, Zuo et al. 2021: 1 to 5). Auxiliary losses are the
      first's.
    hard_weight, soft_weight: of the cross-entropy, and of the divergence from a teacher's predictions where the batch
      has its 'teacher_logits' (0.75 and 0.25 in Switch, 1 and 1 in Mixture-of-Students); see `divergence`.
    soft_temperature: of both predictions in the latter.
    aux_loss_scale: of all auxiliary losses together; 0 trains without them.
    token_bytes: how many bytes of text each token id stands for, to report bits per byte; () if unknown.
  """

  model: nn.Module
  z_loss: float = 0.0
  label_smoothing: float = 0.0
  consistency: float = 0.0
  hard_weight: float = 1.0
  soft_weight: float = 0.0
  soft_temperature: float = 1.0
  aux_loss_scale: float = 1.0
  token_bytes: Sequence[int] = ()

  def counted(self, batch: Batch) -> Batch:
    """Adds 'encoder_token_count', 'decoder_token_count' and 'target_count', float32[] each."""
    targets = jnp.sum(batch['decoder_loss_weights'], dtype=jnp.float32)
    return {**with_token_counts(batch), 'target_count': targets}

  def loss(
    self, variables: Variables, batch: Batch, rngs: dict[str, Array] | None, train: bool
  ) -> tuple[Array, tuple[Metrics, Variables]]:
    """See `Objective`. Outside training the auxiliary losses are left out of the loss."""
    (logits, aux), state = self.model.apply(variables, batch, train=train, rngs=rngs, mutable=[STATE])
    targets, weights = batch['decoder_target_tokens'], batch['decoder_loss_weights'].astype(jnp.float32)
    count = jnp.maximum(batch['target_count'], 1)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    loss = jnp.sum(cross_entropy * weights) / count
    metrics = {
      'cross_entropy': loss,
      'accuracy': jnp.sum((jnp.argmax(logits, -1) == targets) * weights) / count,
      'target_tokens': jnp.sum(weights),
    }
    if self.token_bytes:
      lengths = jnp.zeros(logits.shape[-1]).at[: len(self.token_bytes)].set(jnp.asarray(self.token_bytes, jnp.float32))
      metrics['target_bytes'] = jnp.sum(lengths[targets] * weights)
    if train:
      loss = self.smoothed(loss, logits, weights, count)
      if self.consistency:
        other_rngs = {name: jax.random.fold_in(key, 1) for name, key in (rngs or {}).items()}
        (others, _), _ = self.model.apply(variables, batch, train=True, rngs=other_rngs, mutable=[STATE])
        others_cross_entropy = optax.softmax_cross_entropy_with_integer_labels(others, targets)
        others_loss = self.smoothed(jnp.sum(others_cross_entropy * weights) / count, others, weights, count)
        metrics['inconsistency'] = jnp.sum(symmetric_kl(logits, others) * weights) / count
        loss += others_loss + self.consistency * metrics['inconsistency']
      if 'teacher_logits' in batch:
        soft = divergence(logits, batch['teacher_logits'], self.soft_temperature)
        metrics['teacher_divergence'] = jnp.sum(soft * weights) / count
        loss = self.hard_weight * loss + self.soft_weight * metrics['teacher_divergence']
      auxiliary = self.aux_loss_scale * total_loss(aux)
      auxiliary += _reinforced(aux, jax.lax.stop_gradient(cross_entropy), weights)
      metrics |= {'aux_loss': auxiliary, **{f'loss/{key}': value for key, value in aux.losses.items()}}
      loss += auxiliary
    return loss, ({'loss': loss, **metrics, **aux.metrics}, state)

  def log_likelihoods(self, variables: Variables, batch: Batch) -> Array:
    """The log-probability of each target, outside training, float32[B, L]; 0 where no loss is taken."""
    (logits, _), _ = self.model.apply(variables, batch, train=False, rngs=None, mutable=[STATE])
    targets, weights = batch['decoder_target_tokens'], batch['decoder_loss_weights'].astype(jnp.float32)
    return -optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights

  def smoothed(self, loss: Array, logits: Array, weights: Array, count: Array) -> Array:
    """The cross-entropy float32[] of a pass, with label smoothing and z-loss."""
    if self.label_smoothing:
      spread = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
      loss = (1 - self.label_smoothing) * loss + self.label_smoothing * jnp.sum(spread * weights) / count
    if self.z_loss:
      loss += self.z_loss * jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2 * weights) / count
    return loss


def divergence(logits: Array, teacher_logits: Array, temperature: float = 1.0) -> Array:
  """T^2 KL(teacher, student) at temperature T (Hinton et al. 2015): float[..., V] twice -> float32[...]."""
  log_p = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
  log_q = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
  return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def symmetric_kl(logits: Array, others: Array) -> Array:
  """(KL(p, q) + KL(q, p)) / 2 of two predictions, float32[..., V] -> float32[...]."""
  log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(others)
  return 0.5 * jnp.sum((jnp.exp(log_p) - jnp.exp(log_q)) * (log_p - log_q), axis=-1)


def _reinforced(aux: Aux, cross_entropy: Array, weights: Array) -> Array:
  """All token terms, each times its token's own loss float32[B, L], or its row's mean loss on an encoder's side."""
  real = weights > 0
  row_mean = jnp.sum(cross_entropy * real, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1)
  total = jnp.float32(0)
  for name, terms in aux.token_terms.items():
    reward = row_mean[:, None] if name.startswith('encoder/') else cross_entropy * real
    total += jnp.sum(
      jnp.einsum('rbl,bl->r', terms.reshape(-1, *terms.shape[-2:]), jnp.broadcast_to(reward, terms.shape[-2:]))
    )
  return total
