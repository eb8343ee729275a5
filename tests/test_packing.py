"""Packing is invisible: in a sparse model a document's logits are what they are alone, whatever shares its row.

So it is outside training, where there is room for the worst case. That a loss is divided by the real targets of all the
batch, however that is split over devices and microbatches, tests/test_mesh_invisible.py has: its batch is uneven.
"""

import functools

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from moe_jax.moe.dispatchers.einsum import einsum
from moe_jax.moe.dispatchers.ragged import ragged
from tests import tiny

LENGTH = 32
KINDS = {'decoder_only': tiny.decoder_only, 'encoder_decoder': tiny.encoder_decoder}
DISPATCHERS = {'einsum': einsum, 'ragged': ragged}
LENGTHS = st.lists(st.integers(1, 14), min_size=2, max_size=5).filter(lambda lengths: sum(lengths) <= LENGTH)


@functools.cache
def _model(kind, dispatcher='einsum'):
  """A model whose router has opinions: apply(batch, train) -> logits float32[B, L, V], compiled."""
  model = KINDS[kind](dispatcher=DISPATCHERS[dispatcher])
  batch = tiny.batch(rows=4, length=LENGTH, encoder=kind == 'encoder_decoder')
  params = jax.jit(lambda: nn.unbox(model.init(jax.random.key(1), batch)))()['params']
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: x * 10 if 'router' in jax.tree_util.keystr(path) else x, params
  )
  apply = jax.jit(lambda batch, train: model.apply({'params': params}, batch, train=train)[0], static_argnums=1)
  return lambda batch, train=False: np.asarray(apply(batch, train))


def _documents(lengths, seed):
  """int32[length] each."""
  rng = np.random.default_rng(seed)
  return [rng.integers(1, tiny.VOCAB, length).astype(np.int32) for length in lengths]


def _batch(*rows, encoder):
  """Rows of documents, each of which is packed in its order; with an encoder, inputs are the targets backwards."""
  features = {}
  for side in ('decoder', 'encoder')[: 1 + encoder]:
    tokens, segments, positions = np.zeros((3, len(rows), LENGTH), np.int32)
    for row, documents in enumerate(rows):
      start = 0
      for number, document in enumerate(documents, 1):
        place = slice(start, start + len(document))
        tokens[row, place] = document[::-1] if side == 'encoder' else document
        segments[row, place], positions[row, place] = number, np.arange(len(document))
        start += len(document)
    features |= {f'{side}_input_tokens': tokens, f'{side}_segment_ids': segments, f'{side}_positions': positions}
  return {
    **features,
    'decoder_target_tokens': features['decoder_input_tokens'],
    'decoder_loss_weights': (features['decoder_segment_ids'] > 0).astype(np.float32),
  }


@pytest.mark.parametrize(('kind', 'dispatcher'), [*((kind, 'einsum') for kind in KINDS), ('decoder_only', 'ragged')])
@hypothesis.given(lengths=LENGTHS, seed=st.integers(0, 2**16), data=st.data())
def test_a_document_is_as_alone(kind, dispatcher, lengths, seed, data):
  documents, apply = _documents(lengths, seed), _model(kind, dispatcher)
  chosen = data.draw(st.integers(0, len(documents) - 1))
  packed, alone = apply(_batch(documents, [documents[chosen]], encoder=kind == 'encoder_decoder'))
  start, length = sum(lengths[:chosen]), lengths[chosen]
  np.testing.assert_allclose(packed[start : start + length], alone[:length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
@hypothesis.given(lengths=LENGTHS, seed=st.integers(0, 2**16), data=st.data())
def test_packed_documents_never_attend_to_each_other(kind, lengths, seed, data):
  """All tokens of one change: its own logits do, and no others."""
  documents = _documents(lengths, seed)
  chosen = data.draw(st.integers(0, len(documents) - 1))
  others = [*documents]
  others[chosen] = documents[chosen] % (tiny.VOCAB - 1) + 1
  before, after = _model(kind)(_batch(documents, others, encoder=kind == 'encoder_decoder'))
  own = np.repeat(np.arange(len(lengths)) == chosen, lengths)
  felt = np.max(np.abs(before - after), axis=-1)[: sum(lengths)]
  assert felt[~own].max() < 1e-5 and felt[own].min() > 1e-3


def test_it_is_the_room_for_all_that_makes_it_so():
  """In training, where experts are full, a neighbour takes a document's place."""
  documents = _documents([14, 14], seed=0)
  batch = _batch(documents, documents[1:], encoder=False)
  packed, alone = _model('decoder_only')(batch, train=True)
  assert np.abs(packed[14:28] - alone[:14]).max() > 1e-2
