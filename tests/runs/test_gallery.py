"""Pictures of routers: what is seen of a router at work, and the page that shows it."""

import itertools
import re
import shutil
from functools import partial
from pathlib import Path

import gin
import jax.numpy as jnp
import numpy as np
import pytest

import run
from moe_jax import sharding
from moe_jax.layers.embeddings import TokenEmbedding
from moe_jax.models.decoder_only import DecoderOnly
from moe_jax.models.stack import Stack
from moe_jax.moe.dispatchers.einsum import einsum
from moe_jax.moe.experts import Experts
from moe_jax.moe.moe_layer import MoELayer
from moe_jax.moe.routers.soft import SoftRouter
from moe_jax.moe.routers.top_k import TopKRouter
from moe_jax.moe.routing_plan import RoutingPlan
from moe_jax.objectives import LanguageModeling
from moe_jax.runs.gallery import SHOWN, Picture, gallery, picture, turned_away
from moe_jax.runs.setup import Data, Devices
from moe_jax.training import optimizers
from moe_jax.types import ConfigError

DEVICES = Devices({'data': 4, 'expert': 2}, sharding.replicated_rules(), num_experts=2)
DATA = Data('local_text_lm', ('tasks.local_text',), {'targets': 64}, 8, converter='decoder_only', vocab_size=384)


@pytest.fixture(autouse=True)
def _corpus(monkeypatch, tmp_path):
  """Twenty documents, the alphabet again and again; and no configuration left from another test."""
  (tmp_path / 'text').mkdir()
  for number in range(20):
    (tmp_path / 'text' / f'{number}').write_text(''.join(chr(97 + (number + i) % 26) for i in range(400)))
  monkeypatch.setenv('LOCAL_TEXT_GLOB', f'{tmp_path}/text/*')
  gin.clear_config()
  yield
  gin.clear_config()


def watched(router, train_steps=0, **stack):
  experts = partial(Experts, hidden_dim=8)
  moe = partial(MoELayer, num_experts=4, group_size=64, router=router, experts=experts, dispatcher=einsum)
  options = {'repeats': 1, 'scan': False, 'remat': 'none', **stack}
  model = DecoderOnly(partial(TokenEmbedding, vocab_size=384, embed_dim=8), [partial(Stack, {'moe': moe}, **options)])
  optimizer = partial(optimizers.adafactor, learning_rate=optimizers.inverse_sqrt())
  return picture('name', 'caption', LanguageModeling(model), optimizer, DATA, DEVICES, train_steps)


def test_choices_are_seen_and_who_came_too_late():
  seen = watched(partial(TopKRouter, capacity_factor=1.0), train_steps=2)
  assert seen.causal and (seen.group_size, seen.train_steps) == (64, 2)
  letters = ''.join(seen.text).replace('□', '')
  assert len(seen.text) == SHOWN and len(letters) > SHOWN // 2
  assert all((ord(b) - ord(a)) % 26 == 1 for a, b in itertools.pairwise(letters))  # one text, read on
  assert seen.weights.shape == seen.turned_away.shape == (SHOWN, 4)
  chosen = (seen.weights > 0).astype(int) + seen.turned_away
  np.testing.assert_array_equal(chosen.sum(axis=1), 2)  # at home or turned away, each of two choices
  np.testing.assert_array_equal(seen.dropped, seen.turned_away.sum(axis=1) == 2)
  np.testing.assert_allclose(seen.weights.sum(axis=1)[~seen.turned_away.any(axis=1)], 1, rtol=1e-6)
  assert seen.turned_away.any() and 0 < seen.dropped_share < 1
  np.testing.assert_allclose(seen.load.mean(), 1, rtol=1e-6)


def test_mixtures_of_tokens_are_seen_too():
  seen = watched(partial(SoftRouter, capacity_factor=1.0))
  np.testing.assert_allclose(seen.weights.sum(axis=1), 1, rtol=1e-5)
  assert not seen.turned_away.any() and not seen.dropped.any() and not seen.causal
  assert abs(seen.dropped_share) < 1e-6


@pytest.mark.parametrize('stack', [{'scan': True}, {'remat': 'full'}], ids=['scanned', 'rematerialised'])
def test_what_cannot_be_watched_is_an_error(stack):
  with pytest.raises(ConfigError, match='SCAN = False and REMAT'):
    watched(TopKRouter, **stack)


def test_only_who_asked_is_turned_away():
  never = 4  # S * K
  expert, slot = jnp.array([[[0, 1], [0, -1]]]), jnp.array([[[0, 1], [1, never]]])
  plan = RoutingPlan(expert, slot, jnp.ones(expert.shape), num_experts=3, capacity=1)
  np.testing.assert_array_equal(turned_away(plan), [[[False, True, False], [True, False, False]]])


def drawn(name, caption='What it does.', **changes):
  weights = np.array([[0.4, 0.0], [0.0, 1.5], [0.0, 0.0]])
  away = np.array([[False, False], [False, False], [True, False]])
  facts = Picture(name, caption, ['a', '<', '·'], weights, away, ~weights.any(1), np.array([1.5, 0.5]), 0.25, 64, 30)
  return facts._replace(**changes)


def test_page_is_self_contained_and_tells_the_numbers(tmp_path):
  pictures = [drawn('first'), drawn('second', caption='<b>bold</b> & more', causal=False)]
  path = gallery(pictures, tmp_path / 'pages' / 'routers.html')
  page = path.read_text()
  assert path == tmp_path / 'pages' / 'routers.html'
  assert not re.search(r'(src|href)\s*=', page) and '@import' not in page and 'url(' not in page
  figures = page.split('<figure>')[1:]
  assert len(figures) == 2
  for figure in figures:
    assert re.findall(r'class="cell".* fill-opacity="([\d.]+)"', figure) == ['0.49', '1.00']
    assert figure.count('class="away"') == 1 and figure.count('l6 6m0 -6l-6 6') == 1
    assert 'busiest 1.5× · dropped 25.0%' in figure and '>a&lt;·<' in figure
  assert 'not causal' not in figures[0] and 'not causal' in figures[1]
  assert '&lt;b&gt;bold&lt;/b&gt; &amp; more' in page
  assert 'after 30 steps' in page and 'Of the 64 tokens' in page


SMALL = ['EMBED_DIM=16', 'MLP_DIM=16', 'EXPERT_MLP_DIM=16', 'NUM_HEADS=2', 'HEAD_DIM=8', 'TRAIN_STEPS=1']
SMALL += ["TASK_FEATURE_LENGTHS={'targets': 64}", 'GROUP_SIZE=64']


@pytest.fixture
def draw(monkeypatch, tmp_path):
  """Draws copies of some files of gin/routers/, and files of one's own."""

  def draw(*names: str, **own: str) -> tuple[int, Path]:
    folder, page = tmp_path / 'routers', tmp_path / 'page.html'
    folder.mkdir()
    for name in names:
      shutil.copy(run.ROUTERS / f'{name}.gin', folder)
    for name, text in own.items():
      (folder / f'{name}.gin').write_text(text)
    monkeypatch.setattr(run, 'ROUTERS', folder)
    bindings = [f'--gin.{binding}' for binding in SMALL]
    return run.main(['--run_mode=report', '--routers', f'--output={page}', *bindings]), page

  return draw


def test_every_file_of_the_folder_is_drawn(draw, capsys):
  code, path = draw('switch', 'top_2')
  assert code == 0, capsys.readouterr().err
  page = path.read_text()
  assert page.count('<figure>') == 2 and page.index('>switch<') < page.index('>top_2<')
  assert 'the two best experts, their gates renormalised' in page and str(path) in capsys.readouterr().out


def test_a_file_that_fails_is_named_in_one_line(draw, capsys):
  code, path = draw(broken="include 'gin/routers/top_2.gin'\nNUMBER_OF_EXPERTS = 3\n")
  message = capsys.readouterr().err.strip()
  assert code == 1 and not path.exists()
  assert 'broken.gin: Nothing reads NUMBER_OF_EXPERTS' in message and message.count('\n') == 0
