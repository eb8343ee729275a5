"""Decoding: cache, other rows and mesh make no difference, and strategies do what they say."""

import functools
import itertools
from functools import partial

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax import decode as decoding
from moe_jax import sharding
from moe_jax.decode import GREEDY, Beam, Sampling, decode, likely
from moe_jax.layers.attention import CrossAttention, SelfAttention
from moe_jax.layers.embeddings import TokenEmbedding
from moe_jax.layers.positions import RelativeTable
from moe_jax.models.decoder_only import DecoderOnly
from moe_jax.models.encoder_decoder import EncoderDecoder
from moe_jax.models.stack import Stack
from moe_jax.moe.dispatchers.all_to_all import all_to_all
from moe_jax.moe.experts import Experts
from moe_jax.moe.moe_layer import MoELayer
from moe_jax.moe.routers.top_k import TopKRouter
from moe_jax.types import Aux, ConfigError

KEY = jax.random.key(0)
V, L, N = 12, 10, 4  # vocabulary, length of whole texts, new tokens
KINDS = ('rotary', 'relative', 'encoder_decoder')
LENGTHS = (1, 6, 3, 2, 5, 4, 0, 6)  # of prompts; 0 is an empty row


def make_model(kind):
  """Two sparse layers of two experts; top-1, so that tight buffers would overflow."""
  attention = partial(SelfAttention, num_heads=2, head_dim=4)
  router = partial(TopKRouter, num_selected=1, gates='raw')
  experts = partial(Experts, hidden_dim=8)
  moe = partial(MoELayer, num_experts=2, group_size=L, router=router, experts=experts, dispatcher=all_to_all)
  embedding = partial(TokenEmbedding, vocab_size=V, embed_dim=8, tied=False)
  stack = partial(Stack, repeats=2, remat='none')
  table = partial(RelativeTable, num_heads=2, num_buckets=8)
  match kind:
    case 'rotary':
      attention = partial(attention, rotary_base=100.0)
      return DecoderOnly(embedding, [partial(stack, {'attention': attention, 'moe': moe})])
    case 'relative':
      attention = partial(attention, relative_table=table)
      return DecoderOnly(embedding, [partial(stack, {'attention': attention, 'moe': moe}, scan=False)])
    case _:
      stack = partial(stack, relative_table=table)
      cross = partial(CrossAttention, num_heads=2, head_dim=4)
      return EncoderDecoder(
        embedding,
        encoder=partial(stack, {'attention': attention, 'moe': moe}),
        decoder=partial(stack, {'attention': attention, 'cross': cross, 'moe': moe}),
      )


def right_padded(side, tokens, lengths):
  segments = (np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None]).astype(np.int32)
  positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
  names = ('input_tokens', 'segment_ids', 'positions')
  return {f'{side}_{name}': value for name, value in zip(names, (tokens * segments, segments, positions), strict=True)}


@functools.cache
def program(kind):
  """A model, its variables, texts of eight rows, and the logits of whole texts, cache aside."""
  model, rng = make_model(kind), np.random.default_rng(0)
  tokens = rng.integers(2, V, (8, L)).astype(np.int32)
  tokens[:, 0] = 0
  sources = {}
  if kind == 'encoder_decoder':
    sources = right_padded('encoder', rng.integers(2, V, (8, L)).astype(np.int32), [L - 1 - n for n in LENGTHS])
  variables = jax.jit(lambda: nn.unbox(model.init(KEY, sources | right_padded('decoder', tokens, [L] * 8))))()

  def louder(path, x):  # routers and predictions that are sure of themselves
    factors = {'router': 50, 'logits': 4}
    return x * next((f for name, f in factors.items() if f"'{name}'" in jax.tree_util.keystr(path)), 1)

  variables = jax.tree_util.tree_map_with_path(louder, variables)
  logits = jax.jit(lambda batch: model.apply(variables, batch)[0])
  return model, variables, tokens, sources, logits


@functools.cache
def decoder(kind, strategy, length=N):
  model, *_ = program(kind)
  return jax.jit(partial(decode, model, max_new_tokens=length, strategy=strategy))


def prompts(kind):
  _, _, tokens, sources, _ = program(kind)
  return sources | right_padded('decoder', tokens[:, : max(LENGTHS)], LENGTHS)


def naive(kind):
  """Greedy decoding by whole texts: tokens [8, N] and log-probabilities of each."""
  _, _, tokens, sources, logits = program(kind)
  tokens, lengths, chosen = tokens.copy(), np.array(LENGTHS), []
  for step in range(N):
    batch = sources | right_padded('decoder', tokens, np.where(lengths > 0, lengths + step, 0))
    last = jax.nn.log_softmax(logits(batch))[np.arange(8), lengths + step - 1]
    tokens[np.arange(8), lengths + step] = np.argmax(last, -1)
    chosen.append((np.argmax(last, -1), np.max(last, -1)))
  return tuple(np.stack(values, axis=1) for values in zip(*chosen, strict=True))


# ---- The cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
def test_cached_logits_are_those_of_the_whole_text(kind):
  model, variables, tokens, sources, logits = program(kind)
  expected = np.asarray(logits(sources | right_padded('decoder', tokens, [L] * 8)))
  lengths, slots = np.array(LENGTHS), max(LENGTHS) + N

  @jax.jit
  def forward(batch, encoded, cache):
    return model.apply({**variables, **cache}, batch, encoded, cache_length=slots, method='decode', mutable=['cache'])

  batch = decoding.pushed_right(prompts(kind))
  encoded = jax.jit(lambda batch: model.apply(variables, batch, method='encode')[0])(batch)
  (got, _), cache = forward(batch, encoded, {})
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(got[row, slots - N - length :], expected[row, :length], atol=1e-5)
  for step in range(N):
    new = {'decoder_input_tokens': tokens[np.arange(8), lengths + step][:, None]}
    new |= {'decoder_segment_ids': np.ones((8, 1), np.int32), 'decoder_positions': (lengths + step)[:, None]}
    (got, _), cache = forward(batch | new, None, cache)
    np.testing.assert_allclose(got[:, 0], expected[np.arange(8), lengths + step], atol=1e-5)


def test_prompts_are_pushed_right_whichever_side_is_padded():
  left = {'decoder_input_tokens': jnp.array([[9, 0, 5, 6]]), 'decoder_segment_ids': jnp.array([[0, 1, 1, 1]])}
  right = {'decoder_input_tokens': jnp.array([[0, 5, 6, 9]]), 'decoder_segment_ids': jnp.array([[1, 1, 1, 0]])}
  for batch in (left, right):
    pushed = jax.tree.map(np.ndarray.tolist, jax.device_get(decoding.pushed_right(batch)))
    assert pushed == {
      'decoder_input_tokens': [[9, 0, 5, 6]],
      'decoder_segment_ids': [[0, 1, 1, 1]],
      'decoder_positions': [[0, 0, 1, 2]],
    }


@pytest.mark.parametrize('kind', KINDS)
def test_greedy_is_the_likeliest_next_token_of_whole_texts(kind):
  _, variables, *_ = program(kind)
  tokens, scores = decoder(kind, GREEDY)(variables, prompts(kind), key=KEY, eos_id=-1)
  expected, gains = naive(kind)
  real = np.array(LENGTHS) > 0
  assert len({tuple(row) for row in expected[real]}) > 3  # the rows differ
  np.testing.assert_array_equal(tokens[real, 0], expected[real])
  np.testing.assert_allclose(scores[real, 0], gains[real].sum(1), atol=1e-4)
  assert not np.any(tokens[~real])


@pytest.mark.parametrize('kind', KINDS)
def test_nothing_follows_eos(kind):
  _, variables, *_ = program(kind)
  expected, gains = naive(kind)
  eos_id = int(expected[1, 1])
  tokens, scores = decoder(kind, GREEDY)(variables, prompts(kind), key=KEY, eos_id=eos_id)
  for row in np.flatnonzero(LENGTHS):
    ends = np.append(np.flatnonzero(expected[row] == eos_id), N)[0] + 1
    np.testing.assert_array_equal(tokens[row, 0], np.where(np.arange(N) < ends, expected[row], 0))
    np.testing.assert_allclose(scores[row, 0], gains[row, :ends].sum(), atol=1e-4)


@pytest.mark.parametrize('kind', KINDS)
def test_a_row_alone_is_the_row_among_others(kind):
  _, variables, *_ = program(kind)
  batch = prompts(kind)
  tokens, scores = decoder(kind, GREEDY)(variables, batch, key=KEY, eos_id=-1)
  for row in (4, 7):  # the last are the first to be dropped
    alone = {name: value[row : row + 1] for name, value in batch.items()}
    if kind == 'rotary':  # the others are not there at all, elsewhere they are empty: another shape to compile
      got, score = decoder(kind, GREEDY)(variables, alone, key=KEY, eos_id=-1)
    else:
      alone = {name: np.concatenate([value, np.zeros_like(batch[name][1:])]) for name, value in alone.items()}
      got, score = decoder(kind, GREEDY)(variables, alone, key=KEY, eos_id=-1)
    np.testing.assert_array_equal(got[0], tokens[row])
    np.testing.assert_allclose(score[0], scores[row], atol=1e-5)


@pytest.mark.parametrize(
  ('kind', 'strategy', 'shape', 'ways'),
  [
    ('relative', GREEDY, {'data': 4, 'expert': 2}, 8),
    ('encoder_decoder', Beam(3), {'data': 2, 'expert': 2, 'sequence': 2}, 4),
  ],
)
def test_eight_devices_are_one(kind, strategy, shape, ways, mesh):
  _, variables, *_ = program(kind)
  expected = decoder(kind, strategy)(variables, prompts(kind), key=KEY, eos_id=1)
  with sharding.activate(mesh(**shape), sharding.replicated_rules()):
    run = jax.jit(decoder(kind, strategy).__wrapped__)
    tokens, scores = run(variables, prompts(kind), key=KEY, eos_id=1)
    np.testing.assert_array_equal(tokens, expected[0])
    np.testing.assert_allclose(scores, expected[1], atol=1e-5)
    few = {name: value[:6] for name, value in prompts(kind).items()}
    with pytest.raises(ConfigError, match=f'6 prompts do not divide over {ways} data-parallel devices'):
      run(variables, few, key=KEY, eos_id=1)


# ---- Beams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
def test_every_beam_has_the_score_of_its_text(kind):
  _, variables, tokens, sources, logits = program(kind)
  eos_id, beam = int(naive(kind)[0][1, 2]), Beam(3, length_penalty=0.7)
  written, scores = jax.device_get(decoder(kind, beam)(variables, prompts(kind), key=KEY, eos_id=eos_id))
  lengths, ended = np.array(LENGTHS), 0
  assert not np.any(written[lengths == 0]) and np.all(np.isneginf(scores[lengths == 0]))
  for w in range(3):
    texts = tokens.copy()
    for row, start in enumerate(lengths):
      texts[row, start : start + N] = written[row, w]
    log_probs = np.asarray(jax.nn.log_softmax(logits(sources | right_padded('decoder', texts, [L] * 8))))
    for row in np.flatnonzero(lengths):
      ends = np.append(np.flatnonzero(written[row, w] == eos_id), N - 1)[0] + 1
      gains = log_probs[row, lengths[row] - 1 + np.arange(ends), written[row, w, :ends]]
      np.testing.assert_allclose(scores[row, w], gains.sum() / ((5 + ends) / 6) ** 0.7, atol=1e-4)
      assert not np.any(written[row, w, ends:])
      ended += ends < N
  assert ended > 2
  assert np.all(np.diff(scores[lengths > 0], axis=1) <= 0)
  assert all(len({tuple(text) for text in row}) == 3 for row in written[lengths > 0])


class Table(nn.Module):
  """The next token depends on the last one alone: log-probabilities [v, V]. `seen` is called with what is fed."""

  log_probs: tuple[tuple[float, ...], ...]
  seen: object = None

  def encode(self, batch):
    return None, Aux()

  def decode(self, batch, encoded, cache_length):
    if self.seen:
      jax.debug.callback(self.seen, batch['decoder_input_tokens'], batch['decoder_segment_ids'], ordered=True)
    return jnp.array(self.log_probs)[batch['decoder_input_tokens']], Aux()


def table(size, seed=0):
  logits = np.random.default_rng(seed).normal(size=(size, size)) * 1.5
  return np.asarray(jax.nn.log_softmax(logits), np.float64)


def run_table(log_probs, strategy, length, rows=3, eos_id=1, key=KEY, seen=None):
  model = Table(tuple(map(tuple, log_probs)), seen)
  batch = right_padded('decoder', np.arange(rows, dtype=np.int32)[:, None] % len(log_probs), [1] * rows)
  run = jax.jit(partial(decode, model, max_new_tokens=length, strategy=strategy, eos_id=eos_id))
  return jax.device_get(run({}, batch, key=key))


def all_texts(log_probs, first, length, penalty, eos_id=1):
  """Every text that ends with EOS, or is cut off, with its score."""
  found = {}
  for text in itertools.product(range(len(log_probs)), repeat=length):
    ends = text.index(eos_id) + 1 if eos_id in text else length
    text = text[:ends]
    score = sum(log_probs[a, b] for a, b in itertools.pairwise((first, *text))) / ((5 + ends) / 6) ** penalty
    found[text + (0,) * (length - ends)] = score
  return found


@pytest.mark.parametrize('penalty', [0.0, 0.6, 2.0])
def test_a_wide_beam_finds_the_best_of_all_texts(penalty):
  log_probs, length = table(4), 4
  tokens, scores = run_table(log_probs, Beam(64, penalty), length)
  for row in range(3):
    expected = all_texts(log_probs, row, length, penalty)
    np.testing.assert_allclose(scores[row], sorted(expected.values(), reverse=True)[:64], atol=1e-5)
    texts = [tuple(text) for text in tokens[row].tolist()]
    np.testing.assert_allclose(scores[row], [expected[text] for text in texts], atol=1e-5)
    assert len(set(texts)) == 64


@pytest.mark.parametrize(('seed', 'width', 'penalty'), [(0, 3, 1.0), (1, 2, 3.0), (5, 3, 3.0)])
def test_a_narrow_beam_finds_what_the_textbook_finds(seed, width, penalty):
  log_probs, length = table(5, seed), 5
  tokens, scores = run_table(log_probs, Beam(width, penalty), length)
  for row in range(3):
    live, ended = [(0.0, (row,))], []
    for step in range(1, length + 1):
      grown = sorted(((s + log_probs[t[-1], v], (*t, v)) for s, t in live for v in range(5)), reverse=True)
      ended += [(s / ((5 + step) / 6) ** penalty, t) for s, t in grown[:width] if t[-1] == 1]
      live = [(s, t) for s, t in grown if t[-1] != 1][:width]
    ended += [(s / ((5 + length) / 6) ** penalty, t) for s, t in live]
    expected = sorted(ended, reverse=True)[:width]
    np.testing.assert_allclose(scores[row], [s for s, _ in expected], atol=1e-5)
    np.testing.assert_array_equal(tokens[row], [(*t[1:], *(0,) * (length + 1 - len(t))) for _, t in expected])


@pytest.mark.parametrize('seed', range(3))
def test_strategies_that_are_greedy_by_another_name(seed):
  log_probs = table(6, seed)
  tokens, scores = run_table(log_probs, GREEDY, 5)
  for strategy in (Beam(1, 0.0), Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(temperature=1e-5)):
    got_tokens, got_scores = run_table(log_probs, strategy, 5)
    np.testing.assert_array_equal(got_tokens, tokens)
    np.testing.assert_allclose(got_scores, scores, atol=1e-5)


# ---- Sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('top_k', 'top_p', 'expected'),
  [
    (0, 1.0, {0, 1, 2, 3}),
    (2, 1.0, {1, 3}),
    (9, 1.0, {0, 1, 2, 3}),
    (0, 0.01, {3}),
    (0, 0.49, {3}),
    (0, 0.51, {1, 3}),
    (0, 0.79, {1, 3}),
    (0, 0.81, {1, 2, 3}),
    (0, 0.96, {0, 1, 2, 3}),
    (2, 0.62, {3}),  # of the two that are left the first has 5/8
    (2, 0.63, {1, 3}),
  ],
)
def test_likely_tokens(top_k, top_p, expected):
  logits = jnp.log(jnp.array([0.05, 0.3, 0.15, 0.5]))
  kept = likely(logits, top_k, top_p)
  assert set(np.flatnonzero(np.isfinite(kept)).tolist()) == expected
  np.testing.assert_array_equal(kept[jnp.isfinite(kept)], logits[jnp.isfinite(kept)])


def test_of_equally_likely_tokens_the_first_are_kept():
  assert np.isfinite(likely(jnp.zeros(4), 3, 1.0)).tolist() == [True, True, True, False]
  assert np.isfinite(likely(jnp.zeros(4), 0, 0.5)).tolist() == [True, True, False, False]


@hypothesis.given(logits=st.lists(st.floats(-5, 5), min_size=8, max_size=8), top_p=st.floats(0.01, 0.99))
def test_the_nucleus_is_the_fewest_likeliest_tokens(logits, top_p):
  kept = np.isfinite(likely(jnp.array(logits), 0, top_p))
  probs = np.asarray(jax.nn.softmax(jnp.array(logits)), np.float64)
  assert probs[kept].sum() >= top_p - 1e-6
  assert probs[kept].sum() - probs[kept].min() < top_p + 1e-6
  assert not np.any(~kept) or probs[~kept].max() <= probs[kept].min()


def test_tokens_are_drawn_as_often_as_they_are_likely():
  rows, log_probs = 3000, table(4)
  tokens, scores = run_table(log_probs, Sampling(temperature=0.7), 2, rows=rows, eos_id=-1)
  for first in range(4):
    counts = np.bincount(tokens[first::4, 0, 0], minlength=4) / (rows / 4)
    np.testing.assert_allclose(counts, jax.nn.softmax(log_probs[first] / 0.7), atol=0.06)
    seconds = tokens[tokens[:, 0, 0] == first, 0, 1]  # drawn afresh
    counts = np.bincount(seconds, minlength=4) / len(seconds)
    np.testing.assert_allclose(counts, jax.nn.softmax(log_probs[first] / 0.7), atol=0.1)
  firsts, pairs = np.arange(rows) % 4, tokens[:, 0]
  expected = log_probs[firsts, pairs[:, 0]] + log_probs[pairs[:, 0], pairs[:, 1]]
  np.testing.assert_allclose(scores[:, 0], expected, atol=1e-5)  # of the model, whatever the temperature


def test_a_draw_depends_on_key_and_row_and_not_on_the_other_rows():
  log_probs = table(6)
  tokens, _ = run_table(log_probs, Sampling(), 8, rows=6, eos_id=-1)
  fewer, _ = run_table(log_probs, Sampling(), 8, rows=4, eos_id=-1)
  other, _ = run_table(log_probs, Sampling(), 8, rows=6, eos_id=-1, key=jax.random.key(1))
  np.testing.assert_array_equal(tokens[:4], fewer)
  assert np.any(tokens != other)
  assert len({tuple(text) for text in tokens[:, 0].tolist()}) == 6


# ---- The loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('strategy', [GREEDY, Beam(1, 0.0)])
def test_what_has_ended_is_fed_as_padding_and_the_loop_stops(strategy):
  likely_next = {0: 2, 2: 3, 3: 1, 4: 5, 5: 1}  # 1 is EOS
  log_probs = np.full((6, 6), np.log(0.001))
  for token, following in likely_next.items():
    log_probs[token, following] = np.log(0.995)
  fed = []
  model = Table(tuple(map(tuple, log_probs)), lambda *arrays: fed.append(jax.device_get(arrays)))
  batch = right_padded('decoder', np.array([[0], [4], [3]], np.int32), [1, 1, 0])
  run = jax.jit(partial(decode, model, max_new_tokens=50, strategy=strategy, eos_id=1))
  tokens, _ = run({}, batch, key=KEY)
  jax.effects_barrier()
  assert tokens[:, 0, :4].tolist() == [[2, 3, 1, 0], [5, 1, 0, 0], [0, 0, 0, 0]]
  segments = [segments.reshape(3, -1).max(1).tolist() for _, segments in fed]
  assert segments == [[1, 1, 0], [1, 1, 0], [1, 0, 0]]


def test_traced_once_for_a_shape():
  traces = []

  class Traced(Table):
    def decode(self, batch, encoded, cache_length):
      traces.append(batch['decoder_input_tokens'].shape)
      return super().decode(batch, encoded, cache_length)

  run = jax.jit(partial(decode, Traced(tuple(map(tuple, table(6)))), max_new_tokens=5, strategy=Beam(2), eos_id=1))
  for seed in range(3):
    tokens = np.random.default_rng(seed).integers(0, 6, (4, 3)).astype(np.int32)
    run({}, right_padded('decoder', tokens, [1, 2, 3, 3]), key=jax.random.key(seed))
  assert sorted(set(traces)) == [(4, 3), (8, 1)]
  assert traces.count((4, 3)) == 1 and traces.count((8, 1)) <= 2  # the loop's body may be traced for its types, too


@pytest.mark.parametrize(
  ('strategy', 'message'),
  [
    (lambda: Sampling(temperature=-1), 'TEMPERATURE'),
    (lambda: Sampling(top_k=-1), 'TOP_K'),
    (lambda: Sampling(top_p=0), 'TOP_P'),
    (lambda: Sampling(top_p=1.5), 'TOP_P'),
    (lambda: Beam(0), 'BEAM_WIDTH'),
    (lambda: Beam(2, -0.5), 'LENGTH_PENALTY'),
  ],
)
def test_strategies_that_make_no_sense_are_refused(strategy, message):
  with pytest.raises(ConfigError, match=message):
    strategy()
