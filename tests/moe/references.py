"""Routers in NumPy and float64, one token after another, as the papers' equations read. Slow, and meant to be.

A reference takes a `Group` and the router's fields, and gives the combine weights of one group, float64[S, E]: the
gates of the choices that found a slot. Random draws, where a router makes any, come from the group's key.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import expit, softmax
from scipy.stats import norm


@dataclasses.dataclass
class Group:
  """One group of tokens, and what its router knows.

  Attributes:
    params: of the router, float64.
    x: float64[S, M].
    valid: bool[S].
    ids, tasks: int[S].
    experts: E.
    train: whether in training.
    index, shape: which group of how many, (G, S), for random draws.
    keys: of the random draws, first to last.
    state: the router's memories before.
  """

  params: dict[str, Any]
  x: np.ndarray
  valid: np.ndarray
  ids: np.ndarray
  tasks: np.ndarray
  experts: int
  train: bool
  index: int
  shape: tuple[int, int]
  keys: Any
  state: dict[str, Any]

  def draw(self, kind, *features, number=0, **options):
    """This group's part of the draw jax.random.<kind>(key, [G, S, *features])."""
    drawn = getattr(jax.random, kind)(self.keys[number], (*self.shape, *features), **options)
    return np.asarray(drawn, np.float64)[self.index]

  def capacity(self, factor, choices=1, least=1, multiple=4, per_choice=False, up=False):
    """Slots an expert has."""
    if factor is None or not self.train:
      return len(self.x)
    slots = factor * len(self.x) * (choices if per_choice else 1) / self.experts
    slots = max(math.ceil(slots - 1e-9) if up else math.floor(slots + 1e-9), least)
    return min(len(self.x), math.ceil(slots / multiple) * multiple)


def seat(group, choices, gates, capacity, order=None):
  """First choices before second, then in order; who finds no slot gets nothing. choices[s]: experts, None for none."""
  combine, taken = np.zeros((len(group.x), group.experts)), np.zeros(group.experts, int)
  for k in range(max(len(c) for c in choices)):
    for s in order if order is not None else range(len(group.x)):
      expert = choices[s][k]
      if group.valid[s] and expert is not None and taken[expert] < capacity:
        combine[s, expert] = gates[s][k]
        taken[expert] += 1
  return combine


def best(values, k):
  """Indices of the k largest, the lower index first among equals."""
  return sorted(range(len(values)), key=lambda i: -values[i])[:k]


def top_k(
  group, k=2, gates='renormalised', others='all', threshold=0.2, priority='position', fallbacks=0, jitter=0.0,
  factor=2.0, logits=None, **rule
):  # fmt: skip
  x = group.x
  if jitter and group.train:
    x = x * group.draw('uniform', x.shape[1], minval=1 - jitter, maxval=1 + jitter)
  h = x @ group.params['kernel'] if logits is None else logits
  p = expit(h) if gates == 'sigmoid' else softmax(h, axis=-1)
  chosen = [best(row, min(k + fallbacks, group.experts)) for row in p]
  weights = []
  for s, row in enumerate(chosen):
    if gates == 'raw':
      weights.append([p[s, e] for e in row])
    elif gates == 'softmax':
      total = sum(math.exp(h[s, e]) for e in row[:k])
      weights.append([math.exp(h[s, e]) / total for e in row])
    else:
      weights.append([p[s, e] / sum(p[s, i] for i in row[:k]) for e in row])
  capacity = group.capacity(factor, k, **rule)
  if fallbacks:
    return rerouted(group, chosen, weights, k, capacity)
  asked = [list(row) for row in chosen]
  if others == 'random' and group.train:
    chance = group.draw('uniform', k)
  for s, row in enumerate(asked):
    for i in range(1, k):
      if others == 'threshold' and not weights[s][i] > threshold:
        row[i] = None
      if others == 'random' and group.train and not weights[s][i] / threshold > chance[s, i]:
        row[i] = None
  order = None
  if priority == 'gate':
    order = sorted(range(len(x)), key=lambda s: -p[s].max())
  if priority == 'random' and group.train:
    lot = group.draw('uniform')
    order = sorted(range(len(x)), key=lambda s: -lot[s])
  return seat(group, asked, weights, capacity, order)


def rerouted(group, chosen, weights, k, capacity):
  """Round after round, whoever holds too few asks for its next preference."""
  combine, taken, held = np.zeros((len(group.x), group.experts)), np.zeros(group.experts, int), [0] * len(group.x)
  for choice in range(len(chosen[0])):
    for s, expert in enumerate(row[choice] for row in chosen):
      if group.valid[s] and held[s] < k and taken[expert] < capacity:
        combine[s, expert] = weights[s][choice]
        taken[expert] += 1
        held[s] += 1
  return combine


def cosine(group, **options):
  p = group.params
  projected, centroids = group.x @ p['projection'], p['centroids']
  unit = projected / np.linalg.norm(projected, axis=-1, keepdims=True)
  logits = unit @ (centroids / np.linalg.norm(centroids, axis=0)) / p['temperature']
  return top_k(group, logits=logits, **options)


def task(group, **options):
  return top_k(group, logits=group.params['tasks'][group.tasks - 1] @ group.params['kernel'], **options)


def sentence(group, **options):
  mean = np.where(group.valid[:, None], group.x, 0).sum(0) / max(group.valid.sum(), 1)
  return top_k(group, logits=np.broadcast_to(mean @ group.params['kernel'], (len(group.x), group.experts)), **options)


def noisy(group, kernel, noise_kernel, x):
  h = x @ kernel.reshape(kernel.shape[0], -1)
  scale = np.log1p(np.exp(x @ noise_kernel.reshape(kernel.shape[0], -1))) + 1e-2
  return h.reshape(len(x), *kernel.shape[1:]), scale.reshape(len(x), *kernel.shape[1:])


def noisy_top_k(group, k=2, factor=2.0):
  h, scale = noisy(group, group.params['kernel'], group.params['noise_kernel'], group.x)
  if group.train:
    h = h + scale * group.draw('normal', group.experts)
  chosen = [best(row, k) for row in h]
  weights = [softmax(h[s, row]) for s, row in enumerate(chosen)]
  return seat(group, chosen, weights, group.capacity(factor, k))


def two_levels(group, groups):
  """Clean logits, noisy ones and the noise's scale, of groups [S, a] and of the experts in them [S, a, b]."""
  p, levels = group.params, []
  for number, (prefix, features) in enumerate([('', (groups,)), ('expert_', (groups, group.experts // groups))]):
    h, scale = noisy(group, p[f'{prefix}kernel'], p[f'{prefix}noise_kernel'], group.x)
    levels.append((h, h + scale * (group.draw('normal', *features, number=number) if group.train else 0), scale))
  return levels


def hierarchical(group, groups=4, k=2, k_in=2, factor=2.0):
  """`y = sum_i sum_j G(x)_i G_i(x)_j E_ij(x)`."""
  (_, h, _), (_, h_in, _) = two_levels(group, groups)
  each = group.experts // groups
  chosen, weights = [], []
  for s in range(len(group.x)):
    outer = best(h[s], k)
    outer_gates = softmax(h[s, outer])
    chosen.append([]), weights.append([])
    for i, gate in zip(outer, outer_gates, strict=True):
      inner = best(h_in[s, i], k_in)
      for j, inner_gate in zip(inner, softmax(h_in[s, i, inner]), strict=True):
        chosen[s].append(i * each + j)
        weights[s].append(gate * inner_gate)
  return seat(group, chosen, weights, group.capacity(factor, k * k_in))


def hierarchical_load(group, groups=4, k=2, k_in=2):
  """Load_H(i, j) = Load_primary(i) Load_i(X_i)_j / |X_i|, float64[a, b], over the tokens X_i that chose group i."""

  def load(clean, noisy_, scale, k, s):
    return [norm.cdf((clean[s][i] - np.sort(np.delete(noisy_[s], i))[-k]) / scale[s][i]) for i in range(len(clean[s]))]

  outer, (clean, noisy_, scale) = two_levels(group, groups)
  real = np.flatnonzero(group.valid)
  primary = np.sum([load(*outer, k, s) for s in real], axis=0)
  total = np.zeros((groups, group.experts // groups))
  for i in range(groups):
    chose = [s for s in real if i in best(outer[1][s], k)]
    for s in chose:
      total[i] += np.array(load(clean[:, i], noisy_[:, i], scale[:, i], k_in, s)) / len(chose)
  return primary[:, None] * total


def prototype(group, k=2, factor=2.0):
  p = softmax((group.x @ group.params['kernel']).reshape(len(group.x), k, -1), axis=-1)
  each = group.experts // k
  chosen = [[z * each + int(np.argmax(row[z])) for z in range(k)] for row in p]
  return seat(group, chosen, p.max(-1), group.capacity(factor, k))


def bias_balanced(group, k=2, groups=1, kept=1, scale=1.0, factor=2.0):
  s = expit(group.x @ group.params['kernel'])
  biased = s + np.asarray(group.state['bias'], np.float64)
  chosen, weights = [], []
  for score, row in zip(s, biased, strict=True):
    if groups > 1:
      worth = [np.sort(part)[-2:].sum() for part in np.split(row, groups)]
      allowed = best(worth, kept)
      row = np.where(np.isin(np.arange(group.experts) // (group.experts // groups), allowed), row, -np.inf)
    chosen.append(best(row, k))
    weights.append(scale * score[chosen[-1]] / score[chosen[-1]].sum())
  return seat(group, chosen, weights, group.capacity(factor, k))


def expert_choice(group, factor=2.0):
  p, real = softmax(group.x @ group.params['kernel'], axis=-1), np.flatnonzero(group.valid)
  slots = min(len(p), math.ceil(math.floor(factor * len(p) / group.experts) / 4) * 4)
  combine = np.zeros_like(p)
  for expert in range(group.experts):
    for i in best(p[real, expert], slots):
      combine[real[i], expert] = p[real[i], expert]
  return combine


def mixture_of_depths(group, factor=0.5):
  r, real = (group.x @ group.params['kernel'])[:, 0], np.flatnonzero(group.valid)
  picked = real[best(r[real], group.capacity(factor))] if group.train else real[r[real] > 0]
  combine = np.zeros((len(r), 1))
  combine[picked, 0] = r[picked]
  return combine


def base(group):
  """Within what the auction may miss of the optimum; the test of the assignment itself is elsewhere."""
  scores, real = group.x @ group.params['kernel'], np.flatnonzero(group.valid)
  chosen = scores.argmax(-1)
  if group.train and len(real):
    part = -(-len(real) // group.experts)
    rows, places = linear_sum_assignment(-np.repeat(scores[real], part, axis=1))
    chosen[real[rows]] = places // part
  combine = np.zeros_like(scores)
  for s in real:
    combine[s, chosen[s]] = expit(scores[s, chosen[s]])
  return combine


def sinkhorn(group, factor=1.0, iterations=30):
  """u and v of diag(u) exp(h) diag(v), alternately, until rows sum to 1/n and columns to 1/E."""
  h, real = group.x @ group.params['kernel'], np.flatnonzero(group.valid)
  scores = h
  if group.train and len(real):
    k, v = np.exp(h[real]), np.ones(group.experts)
    for _ in range(iterations):
      u = 1 / len(real) / (k @ v)
      v = 1 / group.experts / (k.T @ u)
    scores = np.zeros_like(h)
    scores[real] = u[:, None] * k * v
  chosen = [[int(row.argmax())] for row in scores]
  return seat(group, chosen, [[expit(h[s, c])] for s, (c,) in enumerate(chosen)], group.capacity(factor))


def drawn(group, factor=2.0):
  h = group.x @ group.params['kernel']
  chosen = h.argmax(-1)
  if group.train:
    logits = np.zeros((*group.shape, group.experts), np.float32)
    logits[group.index] = h
    chosen = np.asarray(jax.random.categorical(group.keys[0], logits))[group.index]
  return seat(group, [[int(c)] for c in chosen], np.ones((len(h), 1)), group.capacity(factor))


def bernoulli(group, tau=0.25, factor=2.0):
  p = expit(group.x @ group.params['kernel'] + math.log(tau / (1 - tau)))
  on = [np.isin(np.arange(group.experts), best(row, round(tau * group.experts))) for row in p]
  if group.train:
    on = group.draw('uniform', group.experts) < p
  chosen = [[e if yes else None for e, yes in enumerate(row)] for row in on]
  return seat(group, chosen, np.ones_like(p), group.capacity(factor))


def hashed(group, table, factor=2.0):
  return seat(group, [[int(table[i])] for i in group.ids], np.ones((len(group.x), 1)), group.capacity(factor))


def by_place(group, factor=2.0):
  return seat(group, [[s % group.experts] for s in range(len(group.x))], np.ones((len(group.x), 1)),
              group.capacity(factor))  # fmt: skip


def randomly(group, factor=2.0):
  if not group.train:
    return by_place(group, factor)
  chosen = group.draw('randint', minval=0, maxval=group.experts).astype(int)
  return seat(group, [[int(c)] for c in chosen], np.ones((len(chosen), 1)), group.capacity(factor))


def thor(group):
  if not group.train:
    return by_place(group, None)
  one = int(jax.random.randint(group.keys[0], (1, 1), 0, group.experts)[0, 0])
  return seat(group, [[one]] * len(group.x), np.ones((len(group.x), 1)), len(group.x))


def domain(group):
  return seat(group, [[int(t - 1) % group.experts] for t in group.tasks], np.ones((len(group.x), 1)), len(group.x))


def stable(group, factor=2.0):
  """Stage 1: the token's own best."""
  scores = group.x @ group.params['kernel']
  chosen = [[int(row.argmax())] for row in scores]
  return seat(group, chosen, [[expit(scores[s, c])] for s, (c,) in enumerate(chosen)], group.capacity(factor))


def dense(group):
  hidden = np.maximum(group.x @ group.params['hidden'], 0)
  return softmax(hidden @ group.params['kernel'], axis=-1) * group.valid[:, None]


def dselect_k(group, k=2, gamma=1.0):
  x, p = group.x, group.params
  mix, bits = softmax(x @ p['mix'], axis=-1), p['code'].shape[-1]
  combine = np.zeros((len(x), group.experts))
  for s, j in itertools.product(range(len(x)), range(k)):
    z = x[s] @ p['code'][:, j]
    step = [0 if v <= -gamma / 2 else 1 if v >= gamma / 2 else -2 * v**3 / gamma**3 + 1.5 * v / gamma + 0.5 for v in z]
    for expert in range(group.experts):
      digits = [(expert >> (bits - 1 - b)) & 1 for b in range(bits)]
      selector = math.prod(w if digit else 1 - w for w, digit in zip(step, digits, strict=True))
      combine[s, expert] += mix[s, j] * selector * group.valid[s]
  return combine


def soft(group, factor=1.0):
  """(dispatch, combine), float64[S, E, C]: softmax over tokens, and over all slots."""
  phi, real = group.params['kernel'], group.valid[:, None, None]
  x = group.x / np.linalg.norm(group.x, axis=-1, keepdims=True)
  logits = np.einsum('sm,mec->sec', x, group.params['scale'] * phi / np.linalg.norm(phi, axis=0))
  dispatch = np.where(real, np.exp(logits), 0)
  dispatch = dispatch / np.maximum(dispatch.sum(0), 1e-30)
  combine = np.where(real, softmax(logits.reshape(len(x), -1), axis=-1).reshape(logits.shape), 0)
  return dispatch, combine
