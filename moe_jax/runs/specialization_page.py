"""What a run's specialization.json tells, drawn for its report: figures here, words in `specialization.html.j2`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from moe_jax.paths import to_path
from moe_jax.runs.drawing import BLUE, COLOR, note, spread, svg

TITLES = {'token': 'token', 'previous': 'token before', 'kind': 'kind of token', 'position': 'place in text'}
TITLES |= {'task': 'task'}
EXPERTS_SHOWN = 8
_HEAT = LinearSegmentedColormap.from_list('heat', [(*BLUE, 0.0), (*BLUE, 0.9)])
_MARKS = str.maketrans({' ': '·', '\n': '⏎', '\t': '→', '\r': '␍', '\f': '␌', '\0': '␀'})

Found = Mapping[str, Any]  # specialization.json


def panels(model_dir: str | Path) -> dict[str, Any] | None:
  """What the page shows of a run; None where nobody has looked (SPECIALIZATION)."""
  path = to_path(model_dir) / 'specialization.json'
  if not path.exists():
    return None
  found = json.loads(path.read_text('utf-8'))
  dropped = any(layer['dropped_share'] for layer in found['layers'].values())
  return {
    'run': to_path(model_dir).resolve().name,
    'found': found,
    'tokens': {side: x['tokens'] for side, x in found['sides'].items()},
    'associations': association_panel(found),
    'experts': most_specialised(found),
    'overlaps': [overlap_panel(found, side) for side, x in found['sides'].items() if len(x['layers']) > 1],
    'stability': stability_panel(found) if len(found['stability']['steps']) > 1 else None,
    'dropped': dropped_panel(found, 'kind') if dropped else None,
    'dropped_late': dropped_panel(found, 'position') if dropped else None,
  }


def label(name: str) -> str:
  """A layer's name as other figures write it."""
  return ' · '.join(name.split('/'))


def association_panel(found: Found) -> dict[str, Any]:
  """A bar a layer, for each thing that may tell its experts: the share of their entropy beyond chance."""
  layers = found['layers']
  told = [(x['associations'][key], key, name) for name, x in layers.items() for key in x['associations']]
  keys = [key for key in TITLES if any(key == other for _, other, _ in told)]
  colors = [COLOR['run-0' if layer['side'] == 'encoder' else 'run-1'] for layer in layers.values()]
  best = max(told, key=lambda item: item[0]['share'])
  right = 1.3 * max(0.02, best[0]['share'])
  figure = Figure(figsize=(6.6, 0.5 + 0.22 * len(layers)), layout='constrained')
  for axes, key in zip(figure.subplots(1, len(keys), sharey=True, squeeze=False)[0], keys):
    shares = [layer['associations'].get(key, {}).get('share', np.nan) for layer in layers.values()]
    axes.barh(range(len(layers)), np.maximum(shares, 0), height=0.6, color=colors)
    for row, share in enumerate(shares):
      text = f'{round(100 * share)}%' if np.isfinite(share) else ''
      axes.annotate(text, (max(share, 0), row), xytext=(3, 0), textcoords='offset points', va='center', size=7.5)
    axes.set(xlim=(0, right), xticks=[], yticks=range(len(layers)), yticklabels=map(label, layers))
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_title(TITLES[key], size=8.5, loc='left')
    axes.spines[:].set_visible(False)
    axes.axvline(0, color=COLOR['rule'], linewidth=0.8)
  chance = max(told, key=lambda item: item[0]['baseline_bits'])
  return {
    'best': best[0],
    'best_key': TITLES[best[1]],
    'best_layer': label(best[2]),
    'chance_bits': chance[0]['baseline_bits'],
    'chance_key': TITLES[chance[1]],
    'svg': svg(figure),
  }


def most_specialised(found: Found) -> list[dict[str, Any]]:
  """Experts of all layers by what their tokens tell, those with less than a quarter of the uniform share left out."""
  experts = [
    {'layer': label(name), **expert}
    for name, layer in found['layers'].items()
    for expert in layer['most_specialised_experts']
    if expert['share_of_tokens'] * layer['experts'] >= 0.25
  ]
  chosen = sorted(experts, key=lambda expert: -expert['divergence_bits'])[:EXPERTS_SHOWN]
  for expert in chosen:
    for key in ('top_by_lift', 'top_by_share'):
      expert[key] = [{**token, 'token': token['token'].translate(_MARKS)} for token in expert[key]]
  return chosen


def heat(matrix: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> Markup:
  """A heat map of shares float[R, C] between 0 and 1; numbers in the cells where they fit."""
  height = 0.55 + (0.23 if max(matrix.shape) <= 16 else 0.15) * len(rows)
  axes = Figure(figsize=(6.6, height), layout='constrained').subplots()
  axes.imshow(matrix, _HEAT, vmin=0, vmax=max(np.nanmax(matrix), 0.05), aspect='auto', interpolation='none')
  for (row, column), share in np.ndenumerate(matrix if max(matrix.shape) <= 16 else matrix[:0]):
    axes.text(column, row, f'{round(100 * share)}%' if np.isfinite(share) else '', ha='center', va='center', size=8)
  axes.set(yticks=range(len(rows)), yticklabels=rows, xticks=range(len(columns)), xticklabels=columns)
  axes.spines[:].set_visible(False)
  return svg(axes.figure)


def overlap_panel(found: Found, side: str) -> dict[str, Any]:
  """How much a token's expert in one layer tells of that in another, of the layers of a side."""
  names, matrix = found['sides'][side]['layers'], np.array(found['between_layers'][side]['association_share'], float)
  apart = np.where(np.eye(len(names), dtype=bool), np.nan, matrix)
  row, column = np.unravel_index(np.nanargmax(apart), apart.shape)
  cosines = np.array(found['between_layers'][side]['matched_token_cosine'], float)
  numbers = [name.removeprefix(f'{side}/') for name in names]
  return {
    'side': side,
    'most': np.nanmax(apart),
    'from_layer': label(names[row]),
    'to_layer': label(names[column]),
    'mean': np.nanmean(apart),
    'cosine': np.mean(cosines[~np.eye(len(names), dtype=bool)]),
    'svg': heat(matrix, [label(name) for name in names], [label(number) for number in numbers]),
  }


def stability_panel(found: Found) -> dict[str, Any]:
  """A line a layer: the tokens that go to the same expert as at the last checkpoint."""
  steps, layers = found['stability']['steps'], found['stability']['layers']
  axes = Figure(figsize=(6.6, 2.6), layout='constrained').subplots()
  ends = []
  for i, (name, layer) in enumerate(layers.items()):
    color = COLOR[f'depth-{round(7 * i / max(len(layers) - 1, 1))}']
    dashes = '--' if name.startswith('encoder') else '-'
    axes.plot(steps, layer['same_expert_share'], color=color, linewidth=1.3, linestyle=dashes)
    ends.append((layer['same_expert_share'][0], label(name), color))
  ends = [sorted(ends)[i] for i in sorted({*np.linspace(0, len(ends) - 1, 8).astype(int)})]
  axes.set_ylim(0, 1.02)
  for (_, name, color), height in zip(ends, spread([end for end, _, _ in ends], 0.065)):
    note(axes, name, 0, height, (-8, 0), color=color, ha='right')
  axes.yaxis.tick_right()
  axes.yaxis.set_major_formatter(PercentFormatter(1))
  axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
  axes.xaxis.set_major_formatter(EngFormatter(sep=''))
  axes.spines[:].set_visible(False)
  axes.grid(axis='y', color=COLOR['rule'], linewidth=0.6)
  first = {name: layer['same_expert_share'][0] for name, layer in layers.items()}
  return {
    'first_step': steps[0],
    'least': min(first.values()),
    'least_layer': label(min(first, key=lambda name: first[name])),
    'most': max(first.values()),
    'chance': np.mean([layer['same_expert_share_by_chance'][0] for layer in layers.values()]),
    'svg': svg(axes.figure),
  }


def dropped_panel(found: Found, key: str) -> dict[str, Any]:
  """Of each layer, the choices that found their expert full, by 'kind' of token or by 'position'."""
  layers = found['layers']
  shares = [layer[f'dropped_share_by_{key}'] for layer in layers.values()]
  columns = list(shares[0]) if key == 'kind' else [str(part) for part in range(1, len(shares[0]) + 1)]
  matrix = np.array([list(row.values()) if key == 'kind' else row for row in shares], float)
  there = np.any(np.isfinite(matrix), axis=0)
  matrix, columns = matrix[:, there], [column for column, some in zip(columns, there) if some]
  row, column = np.unravel_index(np.nanargmax(matrix), matrix.shape)
  return {
    'most': np.nanmax(matrix),
    'where': columns[column],
    'layer': label(list(layers)[row]),
    'mean': np.mean([layer['dropped_share'] for layer in layers.values()]),
    'means': np.nanmean(matrix, axis=0),
    'svg': heat(matrix, [label(name) for name in layers], columns),
  }
