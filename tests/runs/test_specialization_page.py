"""The page about what experts learn: what was planted shows, in figures and in words, and no run needs to have it."""

import html.parser
import json
import re

import numpy as np
import pytest

from moe_jax.runs.report import report
from moe_jax.runs.specialization import Layer, Seen, rounded, stability, summary
from moe_jax.runs.specialization_page import most_specialised, panels
from tests.runs.test_report import SPARSE, train_line, write_run

TEXTS = ['<id 0>', ' ', '\n', *'abcdefg', '<', '5', '<1>']
SPECIAL = [text in ('<id 0>', '<1>') for text in TEXTS]
E, N = 4, 3000


def planted(seed, sides=('encoder', 'decoder')):
  """Two layers a side: experts by token with a part of chance, and by chance alone; the latter has full experts."""
  rng = np.random.default_rng(seed)
  tokens, layers = {}, {}
  for side in sides:
    ids = rng.integers(0, len(TEXTS), N)
    tokens[side] = {'ids': ids, 'previous': np.roll(ids, 1), 'position': np.arange(N) % 16}
    for number, firm in enumerate((0.9, 0.0)):
      first = np.where(rng.random(N) < firm, ids % E, rng.integers(0, E, N))
      dropped = (rng.random(N) < 0.5) & (number == 1) & (ids == 1)
      layers[f'{side}/moe/{number}'] = Layer(first[:, None], first, dropped[:, None], E)
  return Seen(tokens, layers)


@pytest.fixture
def looked_at(tmp_path):
  """`looked_at(*steps)` is the folder of a run whose experts were looked at, at these steps."""

  def make(*steps, **options):
    folder = write_run(tmp_path / 'run', [train_line(step, SPARSE) for step in (10, 20)])
    seen = {step: planted(0, **options) for step in steps}
    found = summary(seen[steps[-1]], TEXTS, SPECIAL) | {'stability': stability(seen)}
    found |= {'step': steps[-1], 'split': 'validation', 'batches': 8}
    (folder / 'specialization.json').write_text(json.dumps(rounded(found)))
    return folder

  return make


class Balanced(html.parser.HTMLParser):
  """Sees that what is opened is closed, but for what HTML lets be open."""

  LOOSE = {'meta', 'tr', 'td', 'th', 'br'}

  def __init__(self):
    super().__init__()
    self.open = []

  def handle_starttag(self, tag, attrs):
    if tag not in self.LOOSE:
      self.open.append(tag)

  def handle_endtag(self, tag):
    if tag not in self.LOOSE:
      assert self.open.pop() == tag, (tag, self.getpos())


def test_planted_structure_shows(looked_at):
  folder = looked_at(100, 200)
  found = panels(folder)
  assert found['associations']['best_key'] == 'token' and found['associations']['best_layer'].endswith('· moe · 0')
  assert found['dropped']['where'] == 'whitespace' and found['dropped']['layer'].endswith('· moe · 1')
  assert [x['side'] for x in found['overlaps']] == ['encoder', 'decoder']
  assert all(abs(x['mean']) < 0.01 for x in found['overlaps'])
  assert found['stability']['least'] == 1 and abs(found['stability']['chance'] - 1 / E) < 0.01
  for expert in found['experts'][:E]:
    assert expert['layer'].endswith('· moe · 0')
    assert {token['id'] % E for token in expert['top_by_lift'][:3]} == {expert['expert']}


def test_page_is_whole_and_tells_it(looked_at):
  page = report([looked_at(100, 200)]).read_text()
  for words in ('What experts learn', 'What tells a token’s expert', 'Overlap of layers, encoder', 'Stability',
                'Dropped choices by kind of token', '<b>⏎</b>', '<b>&lt;1&gt;</b>', 'blue is the encoder',
                'encoder · moe · 0', '3,000 tokens of the encoder and 3,000 tokens of the decoder'):  # fmt: skip
    assert words in page, words
  assert '#fe01' not in page and not re.search(r'\bnan\b', page)
  parser = Balanced()
  parser.feed(page)
  assert not parser.open


def test_what_was_not_measured_is_not_shown(looked_at):
  folder = looked_at(200, sides=('decoder',))
  page = report([folder]).read_text()
  assert 'What experts learn' in page and 'Stability' not in page and 'blue is the encoder' not in page
  (folder / 'specialization.json').unlink()
  assert 'What experts learn' not in report([folder]).read_text()


def test_experts_with_hardly_any_tokens_are_not_the_most_specialised():
  expert = {'top_by_lift': [], 'top_by_share': []}
  experts = [
    {'expert': 0, 'share_of_tokens': 0.01, 'divergence_bits': 5.0, **expert},
    {'expert': 1, 'share_of_tokens': 0.5, 'divergence_bits': 0.5, **expert},
    {'expert': 2, 'share_of_tokens': 0.2, 'divergence_bits': 1.0, **expert},
  ]
  found = {'layers': {'decoder/moe/0': {'experts': 4, 'most_specialised_experts': experts}}}
  assert [x['expert'] for x in most_specialised(found)] == [2, 1]
