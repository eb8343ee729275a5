"""What a trained model's experts specialise in: its layers watched over some batches, and specialization.json.

The measures are those of `moe_jax/analysis/specialization.py`. Who looks asks for the collection 'routing', in which
every expert layer leaves its plan, scanned and rematerialised layers too; who does not, pays nothing.
"""

import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from moe_jax.analysis import specialization as measures
from moe_jax.moe.moe_layer import ROUTING
from moe_jax.moe.routing_plan import RoutingPlan
from moe_jax.notices import notice
from moe_jax.objectives import STATE, LanguageModeling, Variables
from moe_jax.paths import to_path
from moe_jax.runs.setup import Data, Program, at_least_one
from moe_jax.types import Array, Batch, ConfigError

SIDES = ('encoder', 'decoder')
BUCKETS = 16  # of positions: a row's length in as many parts
EXPERTS_SHOWN, TOKENS_SHOWN = 8, 10


class Layer(NamedTuple):
  """What a layer did with the N real tokens of its side.

  Attributes:
    experts: int[N, K], the choices; -1 where one is not made.
    first: int[N], the expert of the token: of its choices that found room that of the greatest weight, else its first.
    dropped: bool[N, K], choices that found their expert full.
    num_experts: E.
  """

  experts: np.ndarray
  first: np.ndarray
  dropped: np.ndarray
  num_experts: int


class Seen(NamedTuple):
  """What was seen of one checkpoint.

  Attributes:
    tokens: side -> 'ids', 'previous', 'position', and 'task' where the batch names tasks -> int[N]. 'previous' is -1 at
      the start of a text; 'position' is a part of the row's length, of BUCKETS.
    layers: name -> layer, in order of depth, encoder first: 'encoder/moe/0', 'decoder/stack_0/moe/1'.
  """

  tokens: dict[str, dict[str, np.ndarray]]
  layers: dict[str, Layer]


class Watcher:
  """Watches checkpoints of one model over the same batches: `watcher(step, variables)`, then `write`."""

  def __init__(self, program: Program, objective: LanguageModeling, data: Data, split: str, batches: int):
    """Compiles nothing yet.

    Args:
      program: the model on its mesh.
      objective: holds the model.
      data: the task.
      split: of it.
      batches: how many to watch.

    Raises:
      ConfigError: if that is not a whole number of at least 1.
    """
    at_least_one(SPECIALIZATION=batches)
    self._watch = jax.jit(functools.partial(watch, objective=objective), out_shardings=program.everywhere)
    self._batches = lambda: itertools.islice(data.held_out(program.mesh, split), batches)
    self._data, self._facts = data, {'split': split, 'batches': batches}
    self.seen: dict[int, Seen] = {}

  def __call__(self, step: int, variables: Variables) -> None:
    """Watches a checkpoint.

    Raises:
      ConfigError: if no layer of the model chooses experts.
    """
    self.seen[step] = collected([jax.device_get(self._watch(variables, batch)) for batch in self._batches()])

  def write(self, model_dir: str) -> Path:
    """Writes specialization.json about the last checkpoint that was seen, and the stability of those before it."""
    from moe_jax import data  # imports TensorFlow

    vocabulary = self._data.vocabulary()
    texts, special = data.token_texts(vocabulary), [not n for n in data.token_bytes(vocabulary)]
    last = self.seen[max(self.seen)]
    found = {'step': max(self.seen), **self._facts, **summary(last, texts, special), 'stability': stability(self.seen)}
    path = to_path(model_dir) / 'specialization.json'
    if jax.process_index() == 0:
      path.write_text(json.dumps(rounded(found), indent=1))
    return path


def watch(variables: Variables, batch: Batch, objective: LanguageModeling) -> dict[str, Any]:
  """'tokens': side -> feature -> [B, L]; 'layers': name -> field of `Layer` -> [B, L, K] or [B, L]. Trains nothing."""
  batch = objective.counted(batch)
  _, state = objective.model.apply(variables, batch, train=False, mutable=[STATE, ROUTING])
  layers = {}
  for path, plan in flatten_dict(state.get(ROUTING, {})).items():
    name = _name(path[:-1])
    if not isinstance(plan, RoutingPlan):
      notice(f'SPECIALIZATION: {name.format("*")} mixes tokens and chooses no expert for any: it is left out')
      continue
    shape = batch[f'{name.split("/")[0]}_segment_ids'].shape
    index, kept, weight = (
      x.reshape(-1, *shape, x.shape[-1]) for x in (plan.expert_index, plan.kept, plan.combine_weight)
    )
    best = jnp.argmax(jnp.where(index >= 0, weight, -jnp.inf), axis=-1, keepdims=True)
    first = jnp.take_along_axis(index, best, axis=-1)[..., 0]
    for i in range(len(index)):  # those of a scan, or the one there is
      dropped = (index[i] >= 0) & ~kept[i]
      facts = {'experts': index[i], 'first': first[i], 'dropped': dropped, 'num_experts': jnp.int32(plan.num_experts)}
      layers[name.format(i)] = facts
  sides = [side for side in SIDES if f'{side}_segment_ids' in batch]
  return {'tokens': {side: _tokens(batch, side) for side in sides}, 'layers': layers}


def _name(path: Sequence[str]) -> str:
  """A layer's name as its metrics have it, and its place in the stack: that of a scan is '{}', to be filled in."""
  side = () if path[0] in SIDES else ('decoder',)
  blocks = [re.fullmatch(r'blocks_?(\d*)', part) for part in path]
  repeat = next((block[1] or '{}' for block in blocks if block), '0')
  return '/'.join([*side, *(part for part, block in zip(path, blocks) if not block), repeat])


def _depth(name: str) -> tuple[Any, ...]:
  """By which layers are sorted: the encoder first, then stack by stack, then place by place."""
  side, *inner, repeat = name.split('/')
  stack = inner[0] if inner[0].startswith('stack_') else ''
  return SIDES.index(side), len(stack), stack, int(repeat), inner


def _tokens(batch: Batch, side: str) -> dict[str, Array]:
  """What may be told of each token of a side, int32[B, L]; and 'real', bool[B, L]."""
  ids, positions = batch[f'{side}_input_tokens'], batch[f'{side}_positions']
  told = {
    'ids': ids,
    'previous': jnp.where(positions > 0, jnp.roll(ids, 1, axis=1), -1),
    'position': positions * BUCKETS // ids.shape[1],
    'real': batch[f'{side}_segment_ids'] > 0,
  }
  return told | ({'task': batch[f'{side}_task_ids']} if f'{side}_task_ids' in batch else {})


def collected(batches: Sequence[Mapping[str, Any]]) -> Seen:
  """What `watch` found in some batches, without padding.

  Raises:
    ConfigError: if there are no batches, or no layer chose experts.
  """
  if not batches or not batches[0]['layers']:
    raise ConfigError('SPECIALIZATION: no layer of this model chooses experts for a token, or there are no batches.')
  sides = [side for side in SIDES if side in batches[0]['tokens']]
  real = {side: [batch['tokens'][side]['real'] for batch in batches] for side in sides}

  def joined(side: str, arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(array)[there] for array, there in zip(arrays, real[side])])

  tokens = {
    side: {key: joined(side, [x['tokens'][side][key] for x in batches]) for key in batches[0]['tokens'][side]}
    for side in sides
  }
  for told in tokens.values():
    del told['real']  # all of them are
  layers = {}
  for name in sorted(batches[0]['layers'], key=_depth):
    seen = [batch['layers'][name] for batch in batches]
    arrays = {key: joined(name.split('/')[0], [x[key] for x in seen]) for key in ('experts', 'first', 'dropped')}
    layers[name] = Layer(**arrays, num_experts=int(seen[0]['num_experts']))
  return Seen(tokens, layers)


def summary(seen: Seen, texts: Sequence[str], special: Sequence[bool]) -> dict[str, Any]:
  """What specialization.json tells of one checkpoint.

  Args:
    seen: of it.
    texts: of each token id.
    special: of each token id, whether it stands for no text.
  """
  kinds = measures.token_kinds(texts, special)
  layers, between, sides = {}, {}, {}
  for side, tokens in seen.tokens.items():
    names = [name for name in seen.layers if name.startswith(f'{side}/')]
    if not names:
      continue
    told = {'token': tokens['ids'], **{name: rows for name, rows in tokens.items() if name != 'ids'}}
    told['kind'] = kinds[tokens['ids']]
    for name in names:
      layers[name] = {'side': side, **of_layer(seen.layers[name], told, texts)}
    between[side] = between_layers([seen.layers[name] for name in names], tokens['ids'], len(texts))
    by_kind = measures.shares(np.bincount(told['kind'], minlength=len(measures.KINDS)))
    share = {key: [layers[name]['associations'][key]['share'] for name in names] for key in told}
    sides[side] = {
      'layers': names,
      'tokens': len(tokens['ids']),
      'share_of_tokens_by_kind': dict(zip(measures.KINDS, by_kind)),
      'mean_association_share': {key: np.mean(values) for key, values in share.items()},
    }
  return {'sides': sides, 'layers': layers, 'between_layers': between}


def of_layer(layer: Layer, told: Mapping[str, np.ndarray], texts: Sequence[str]) -> dict[str, Any]:
  """What is told of one layer. told: 'token', 'kind', 'position' and the like -> int[N], of each token."""
  sizes = {'token': len(texts), 'previous': len(texts), 'kind': len(measures.KINDS), 'position': BUCKETS}
  tables = {
    key: measures.tabulate(rows, layer.first, (sizes.get(key, int(np.max(rows, initial=0)) + 1), layer.num_experts))
    for key, rows in told.items()
  }
  found = {key: measures.association(table) for key, table in tables.items()}
  counts, information = tables['token'], found['token'].column_bits
  load, lifts, kept = measures.shares(np.sum(counts, axis=0)), measures.lifts(counts), measures.shares(counts, axis=0)

  def tokens(ids: np.ndarray, expert: int) -> list[dict[str, Any]]:
    facts = ({'lift': lifts[i, expert], 'share_of_expert': kept[i, expert]} for i in ids)
    return [{'token': texts[i], 'id': int(i), **fact} for i, fact in zip(ids, facts)]

  experts = []
  for expert in np.argsort(-information * load, kind='stable')[:EXPERTS_SHOWN]:
    by_lift, by_share = measures.top_rows(counts, expert, TOKENS_SHOWN)
    facts = {'expert': int(expert), 'share_of_tokens': load[expert], 'divergence_bits': information[expert]}
    experts.append({**facts, 'top_by_lift': tokens(by_lift, expert), 'top_by_share': tokens(by_share, expert)})
  made = layer.experts >= 0
  dropped = {key: measures.dropped_shares(told[key], made, layer.dropped, sizes[key]) for key in ('kind', 'position')}
  return {
    'experts': layer.num_experts,
    'choices_per_token': np.sum(made) / max(len(made), 1),
    'associations': {
      key: {field: x for field, x in told._asdict().items() if field != 'column_bits'} | {'share': told.share}
      for key, told in found.items()
    },
    'most_specialised_experts': experts,
    'dropped_share': np.sum(layer.dropped) / max(np.sum(made), 1),
    'dropped_share_by_kind': dict(zip(measures.KINDS, dropped['kind'])),
    'dropped_share_by_position': dropped['position'],
    'coactivation_share': measures.coactivation(layer.experts, layer.num_experts) if made.shape[1] > 1 else None,
  }


def between_layers(layers: Sequence[Layer], ids: np.ndarray, vocab_size: int) -> dict[str, Any]:
  """Of each pair of a side's layers, what a token's expert in one (row) tells of that in the other (column).

  And how alike the token sets of their experts are, each expert beside its best partner.
  """
  counts = [measures.tabulate(ids, x.first, (vocab_size, x.num_experts)) for x in layers]
  joint = [[measures.tabulate(a.first, b.first, (a.num_experts, b.num_experts)) for b in layers] for a in layers]
  return {
    'association_share': [[measures.association(table).share for table in row] for row in joint],
    'matched_token_cosine': [[measures.matched(measures.token_cosines(a, b)) for b in counts] for a in counts],
  }


def stability(seen: Mapping[int, Seen]) -> dict[str, Any]:
  """Of the same tokens at each checkpoint and at the last one: how much of the routing is the same."""
  steps, last, layers = sorted(seen), seen[max(seen)], {}
  for name, final in last.layers.items():
    pairs = [(seen[step].layers[name], final) for step in steps]
    kept = [measures.retention(a.first[:, None], b.first[:, None], final.num_experts) for a, b in pairs]
    overlap = [measures.retention(a.experts, b.experts, final.num_experts) for a, b in pairs]
    layers[name] = {
      'same_expert_share': [x for x, _ in kept],
      'same_expert_share_by_chance': [x for _, x in kept],
      'same_choices_share': [x for x, _ in overlap],
      'same_choices_share_by_chance': [x for _, x in overlap],
    }
  return {'steps': steps, 'layers': layers}


def rounded(value: Any) -> Any:
  """Plain Python of it for JSON: five digits, and None for NaN."""
  if isinstance(value, Mapping):
    return {key: rounded(x) for key, x in value.items()}
  if isinstance(value, (list, tuple, np.ndarray)):
    return [rounded(x) for x in value]
  if isinstance(value, (float, np.floating)):
    return float(f'{value:.5g}') if np.isfinite(value) else None
  return value.item() if isinstance(value, np.integer) else value
