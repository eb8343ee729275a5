"""Decoding over the key-value cache: one pass over all prompts, then a token at a time until every row has ended.

A strategy says how texts grow: `Sampling` (temperature 0 is greedy) or `Beam`. Prompts of different lengths are pushed
to the right, so that all end at the same slot of the cache.

Letters: B rows, P prompt length, N new tokens, W beams of a row, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from moe_jax import sharding
from moe_jax.types import Array, Batch, ConfigError

PyTree = Any


@struct.dataclass
class Hypotheses:
  """The texts that are being written, W to a row.

  Attributes:
    step: int32[], tokens written so far.
    tokens: int32[B, W, N]; 0 behind the end.
    scores: float32[B, W], their log-probability; -inf for a beam that does not exist.
    live: bool[B, W], not ended.
    parent: int32[B, W], the beam of the step before that each one goes on from.
    ended_tokens, ended_scores: as above, the best that have ended; for `Beam`, whose live beams go on without them.
  """

  step: Array
  tokens: Array
  scores: Array
  live: Array
  parent: Array
  ended_tokens: Array
  ended_scores: Array


class Strategy(Protocol):
  """How texts grow. `width` is W."""

  @property
  def width(self) -> int: ...

  def extend(self, texts: Hypotheses, log_probs: Array, key: Array, eos_id: int) -> Hypotheses:
    """Writes one more token, given float32[B, W, V] of the next one."""

  def result(self, texts: Hypotheses) -> tuple[Array, Array]:
    """Tokens int32[B, W, N] and scores float32[B, W], best first."""


@sharding.whole_sequences()
def decode(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  batch: Batch,
  *,
  max_new_tokens: int,
  strategy: Strategy,
  key: Array,
  eos_id: int,
) -> tuple[Array, Array]:
  """Goes on from prompts. Pure: jit it, inside `sharding.activate` where there is a mesh.

  Args:
    model: `DecoderOnly` or `EncoderDecoder`, or another with their `encode` and `decode`.
    variables: of the model.
    batch: 'decoder_input_tokens' and 'decoder_segment_ids' int32[B, P], the prompts: 0 is their first token (BOS), and
      segment 0 is padding, on either side. With an encoder, 'encoder_*' int32[B, L_in] too. A row that is all padding
      stays so.
    max_new_tokens: N.
    strategy: how to choose.
    key: of what is drawn at random; a row's draws depend on its index and on nothing else in the batch.
    eos_id: ends a text, and is its last token; -1 where nothing does.

  Returns:
    tokens int32[B, W, N], without prompts and 0 behind the end, and scores float32[B, W], best first.

  Raises:
    ConfigError: if the rows do not divide over the data-parallel devices.
  """
  rows, ways = len(batch['decoder_input_tokens']), sharding.shards('batch')
  if rows % ways:
    raise ConfigError(f'{rows} prompts do not divide over {ways} data-parallel devices: add empty rows.')
  batch = pushed_right(batch)
  lengths = jnp.sum(batch['decoder_segment_ids'], axis=1)
  width, slots = strategy.width, batch['decoder_input_tokens'].shape[1] + max_new_tokens

  def forward(batch: Batch, encoded: Array | None, cache: PyTree) -> tuple[Array, PyTree]:
    """The next token's log-probabilities float32[B, W, V], beams being neighbouring rows, and the new cache."""
    (logits, _), made = model.apply(
      {**variables, **cache}, batch, encoded, cache_length=slots, method='decode', mutable=['cache']
    )
    return jax.nn.log_softmax(logits[:, -1]).reshape(rows, -1, logits.shape[-1]), made

  # ---- The prompts ---------------------------------------------------------------------------------------------------
  encoded, _ = model.apply(variables, batch, method='encode')
  log_probs, cache = forward(batch, encoded, {})
  exists = (lengths > 0)[:, None] & (jnp.arange(width) == 0)[None, :]  # one beam each, until it branches
  tokens, scores = jnp.zeros((rows, width, max_new_tokens), jnp.int32), jnp.where(exists, 0.0, -jnp.inf)
  parent = jnp.zeros((rows, width), jnp.int32)
  texts = Hypotheses(jnp.int32(0), tokens, scores, exists, parent, tokens, jnp.full_like(scores, -jnp.inf))
  texts = strategy.extend(texts, jnp.repeat(log_probs, width, axis=1), key, eos_id)

  # ---- Token by token ------------------------------------------------------------------------------------------------
  cache = _map_rows(lambda x, axis: jnp.repeat(x, width, axis), cache)
  kept = {name: jnp.repeat(batch[name], width, axis=0) for name in ('encoder_segment_ids',) if name in batch}
  lengths = jnp.repeat(lengths, width)[:, None]

  def write(carry: tuple[Hypotheses, PyTree]) -> tuple[Hypotheses, PyTree]:
    texts, cache = carry
    if width > 1:
      cache = _map_rows(lambda x, axis: _follow(x, texts.parent, axis), cache)
    token = {
      'decoder_input_tokens': texts.tokens[:, :, texts.step - 1].reshape(-1, 1),
      'decoder_segment_ids': texts.live.reshape(-1, 1).astype(jnp.int32),  # experts do not see what has ended
      'decoder_positions': lengths + texts.step - 1,
    }
    log_probs, cache = forward(token | kept, None, cache)  # the cache holds what is needed of `encoded`
    return strategy.extend(texts, log_probs, key, eos_id), cache

  def unfinished(carry: tuple[Hypotheses, PyTree]) -> Array:
    texts, _ = carry
    return (texts.step < max_new_tokens) & jnp.any(texts.live)

  texts, _ = jax.lax.while_loop(unfinished, write, (texts, cache))
  return strategy.result(texts)


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Draws each token from the model's distribution, or from its likely part. Scores are log-probabilities of the model.

  Attributes:
    temperature: sharpens the distribution below 1 and flattens it above; 0 always takes the likeliest token (greedy).
    top_k: draws from so many likeliest tokens; 0 from all.
    top_p: draws from the nucleus, the fewest likeliest tokens that together have this probability (Holtzman et al.
      2019); `top_k` comes first.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  width: ClassVar[int] = 1

  def __post_init__(self) -> None:
    if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise ConfigError(f'TEMPERATURE and TOP_K are not negative, and TOP_P is in (0, 1], unlike in {self}.')

  def extend(self, texts: Hypotheses, log_probs: Array, key: Array, eos_id: int) -> Hypotheses:
    """See `Strategy`."""
    if self.temperature == 0:
      token = jnp.argmax(log_probs, axis=-1)
    else:
      key = jax.random.fold_in(key, texts.step)
      keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(log_probs)))
      token = jax.vmap(jax.random.categorical)(keys, likely(log_probs / self.temperature, self.top_k, self.top_p))
    token = jnp.where(texts.live, token, 0)
    gain = jnp.take_along_axis(log_probs, token[..., None], axis=-1)[..., 0]
    return dataclasses.replace(
      texts,
      step=texts.step + 1,
      tokens=texts.tokens.at[:, :, texts.step].set(token),
      scores=texts.scores + jnp.where(texts.live, gain, 0.0),
      live=texts.live & (token != eos_id),
    )

  def result(self, texts: Hypotheses) -> tuple[Array, Array]:
    """See `Strategy`."""
    return texts.tokens, texts.scores


GREEDY = Sampling(temperature=0.0)


@dataclasses.dataclass(frozen=True)
class Beam:
  """Beam search: keeps the W likeliest beginnings, and the W best texts that have ended.

  A text of n tokens, EOS counted, scores log-probability / ((5 + n) / 6)^length_penalty (Wu et al. 2016, eq. 14). One
  that is cut off at N tokens competes as it is.

  Attributes:
    width: W.
    length_penalty: 0 compares log-probabilities, which favours short texts; 0.6 is T5X's.
  """

  width: int = 4
  length_penalty: float = 0.6

  def __post_init__(self) -> None:
    if self.width < 1 or self.length_penalty < 0:
      raise ConfigError(f'BEAM_WIDTH is at least 1 and LENGTH_PENALTY not negative, unlike in {self}.')

  def penalty(self, length: Array | int) -> Array:
    """What a log-probability is divided by, float32[]."""
    return ((5 + jnp.asarray(length, jnp.float32)) / 6) ** self.length_penalty

  def extend(self, texts: Hypotheses, log_probs: Array, key: Array, eos_id: int) -> Hypotheses:
    """See `Strategy`."""
    rows, _, vocab = log_probs.shape
    # Each beam ends in one way only, so that of 2 W candidates at least W go on. To end, one must be among the W best.
    totals, index = jax.lax.top_k((texts.scores[..., None] + log_probs).reshape(rows, -1), 2 * self.width)
    parent, token = index // vocab, index % vocab
    tokens = _pick(texts.tokens, parent).at[:, :, texts.step].set(token)
    step, ends = texts.step + 1, token == eos_id

    ended = jnp.where(ends & (jnp.arange(2 * self.width) < self.width)[None, :], totals / self.penalty(step), -jnp.inf)
    ended_tokens, ended_scores = self._best(texts.ended_tokens, texts.ended_scores, tokens, ended)
    scores, order = jax.lax.top_k(jnp.where(ends, -jnp.inf, totals), self.width)
    # What the likeliest beam scores if it loses nothing up to N: below the worst that has ended, the row is done.
    done = scores[:, :1] / self.penalty(tokens.shape[-1]) <= ended_scores[:, -1:]
    scores = jnp.where(done, -jnp.inf, scores)
    return Hypotheses(
      step=step,
      tokens=_pick(tokens, order),
      scores=scores,
      live=scores > -jnp.inf,
      parent=_pick(parent, order),
      ended_tokens=ended_tokens,
      ended_scores=ended_scores,
    )

  def result(self, texts: Hypotheses) -> tuple[Array, Array]:
    """See `Strategy`."""
    cut_off = texts.scores / self.penalty(texts.tokens.shape[-1])  # -inf in rows that were done before
    return self._best(texts.ended_tokens, texts.ended_scores, texts.tokens, cut_off)

  def _best(self, tokens: Array, scores: Array, more_tokens: Array, more_scores: Array) -> tuple[Array, Array]:
    """The W best of two lists, best first."""
    scores, order = jax.lax.top_k(jnp.concatenate([scores, more_scores], axis=1), self.width)
    tokens = _pick(jnp.concatenate([tokens, more_tokens], axis=1), order)
    return jnp.where(scores[..., None] > -jnp.inf, tokens, 0), scores


def likely(logits: Array, top_k: int, top_p: float) -> Array:
  """Puts -inf in place of all but the `top_k` likeliest tokens (0: of none), then of all outside their nucleus.

  Args:
    logits: float32[..., V].
    top_k, top_p: as in `Sampling`. Of tokens that are equally likely, those of lower id come first.

  Returns:
    float32[..., V].
  """
  order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
  ranks = jnp.argsort(order, axis=-1)
  if top_k:
    logits = jnp.where(ranks < top_k, logits, -jnp.inf)
  if top_p < 1:
    probs = jnp.take_along_axis(jax.nn.softmax(logits), order, axis=-1)
    nucleus = jnp.cumsum(probs, axis=-1) - probs < top_p  # by rank: what comes before does not suffice
    logits = jnp.where(jnp.take_along_axis(nucleus, ranks, axis=-1), logits, -jnp.inf)
  return logits


def pushed_right(batch: Batch) -> dict[str, Array]:
  """Moves the padding of 'decoder_*' int32[B, P] to the left; positions count from the first real token."""
  real = batch['decoder_segment_ids'] > 0
  order = jnp.argsort(real, axis=1, stable=True)
  segments = jnp.sort(real, axis=1).astype(jnp.int32)
  return {
    **batch,
    'decoder_input_tokens': jnp.take_along_axis(batch['decoder_input_tokens'], order),
    'decoder_segment_ids': segments,
    'decoder_positions': jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0),
  }


def _map_rows(function: Callable[[Array, int], Array], cache: PyTree) -> PyTree:
  """Applies function(array, axis) to every array of the cache that has an axis named 'batch'."""

  def apply(box: nn.LogicallyPartitioned) -> nn.LogicallyPartitioned:
    if 'batch' not in box.names:
      return box
    value = function(box.value, box.names.index('batch'))
    return box.replace(value=sharding.constrain(value, *box.names))

  return jax.tree.map(apply, cache, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def _follow(x: Array, parent: Array, axis: int) -> Array:
  """Gives each beam what its parent had: [..., B * W, ...], with B * W on `axis`, by int32[B, W]."""
  split = x.reshape(*x.shape[:axis], *parent.shape, *x.shape[axis + 1 :])
  return _pick(split, parent, axis).reshape(x.shape)


def _pick(x: Array, index: Array, axis: int = 0) -> Array:
  """Takes beams by int32[B, K], each row its own: [..., B, W, ...] -> [..., B, K, ...], with B on `axis`."""
  index = index.reshape((1,) * axis + index.shape + (1,) * (x.ndim - axis - 2))
  return jnp.take_along_axis(x, index, axis=axis + 1)
