"""One model's weights made into another's: sparse upcycling, expert pruning and merging, a student's start, averages.

Each of `upcycle`, `shared_start`, `prune` and `merge` is an INITIAL_TRANSFORM: (saved, fresh) -> parameters, of the
parameters that were saved and of those that the new model would begin with by itself. Layers are found by number, so
that models may differ in EXPERT_EVERY, in NUM_LAYERS and in whether layers are scanned.
"""

import collections
import itertools
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from moe_jax.paths import to_path
from moe_jax.types import Array, ConfigError, path_name

PyTree = Any
Flat = Mapping[str, Array]
_LAYER = re.compile(r'(.*?)blocks(?:_(\d+))?/([^/]+)/(.+)')  # stack, block if not stacked, sublayer, rest


class Place(NamedTuple):
  """Where an array stands: 'decoder/', 3, 'moe', 'experts/wo'; or, in no layer, '', -1, '', 'embedding/table'."""

  stack: str
  layer: int
  sublayer: str
  rest: str

  def __str__(self) -> str:
    return f'{self.stack}layer {self.layer}/{self.sublayer}/{self.rest}' if self.sublayer else self.rest


class _Address(NamedTuple):
  path: str
  repeat: int | None  # of a stacked array

  def read(self, flat: Flat) -> Array:
    return flat[self.path] if self.repeat is None else flat[self.path][self.repeat]


def places(flat: Flat) -> dict[Place, _Address]:
  """Where each array of a model stands, stacks taken apart; `models.stack.interleaved_stack` makes the names."""
  inside = {path: _LAYER.fullmatch(path) for path in flat}
  dense: dict[str, set[int]] = collections.defaultdict(set)  # stack -> which layers of its pattern have an 'mlp_i'
  period: dict[str, int] = collections.defaultdict(lambda: 1)
  for found in inside.values():
    if found and (numbered := re.fullmatch(r'(.+)_(\d+)', found[3].removesuffix('_norm'))):
      period[found[1]] = max(period[found[1]], int(numbered[2]) + 1)
      if numbered[1] == 'mlp':
        dense[found[1]].add(int(numbered[2]))
  result = {}
  for path, found in inside.items():
    if not found:
      result[Place('', -1, '', path)] = _Address(path, None)
      continue
    stack, block, name, rest = found[1], found[2], found[3].removesuffix('_norm'), found[4]
    norm = '_norm' if found[3] != name else ''
    numbered = re.fullmatch(r'(.+)_(\d+)', name)
    if numbered:
      name, within = numbered[1], int(numbered[2])
    else:  # the sparse layer's, whose number is the one that is missing
      within = min(set(range(period[stack])) - dense[stack])
    stacked = block is None
    for repeat in range(flat[path].shape[0]) if stacked else [int(block)]:
      place = Place(stack, repeat * period[stack] + within, name + norm, rest)
      result[place] = _Address(path, repeat if stacked else None)
  return result


def rebuilt(fresh: PyTree, choose: Callable[[Place, Array], Array]) -> PyTree:
  """A model like `fresh`, each array of which is what `choose` gives for its place and its fresh values."""
  flat = flatten_dict(fresh, sep='/')
  made: dict[str, Any] = collections.defaultdict(list)
  for place, address in places(flat).items():
    value = choose(place, address.read(flat))
    if value.shape != address.read(flat).shape:
      raise ConfigError(
        f'{place} has shape {value.shape} in the saved model, {address.read(flat).shape} here: make their sizes agree.'
      )
    made[address.path].append((address.repeat, value))
  arrays = {
    path: values[0][1] if values[0][0] is None else jnp.stack([value for _, value in sorted(values, key=_first)])
    for path, values in made.items()
  }
  return unflatten_dict(arrays, sep='/')


def _first(pair: tuple[Any, Any]) -> Any:
  return pair[0]


class Reader:
  """Reads the arrays of a model by place, and knows which it has read."""

  def __init__(self, saved: PyTree):
    """Takes its parameters."""
    self._flat = flatten_dict(saved, sep='/')
    self._places = places(self._flat)
    self._read: set[Place] = set()

  def __call__(self, place: Place) -> Array | None:
    """The array, or None where there is none."""
    if place not in self._places:
      return None
    self._read.add(place)
    return self._places[place].read(self._flat)

  def check_all_read(self) -> None:
    """Raises ConfigError, naming an array that the new model has no use for."""
    if left := sorted(set(self._places) - self._read):
      raise ConfigError(f'The new model has no use for {left[0]} of the saved one: make them agree (ACTIVATIONS).')


def upcycle(saved: PyTree, fresh: PyTree, noise: float = 0.0, seed: int = 0) -> PyTree:
  """Sparse upcycling (Komatsuzaki et al. 2022): every expert begins as the dense layer's MLP, routers begin fresh.

  The new model computes what the dense one did where combine weights sum to one and nothing is dropped, as in
  renormalised top-2; not with Switch's single gate, which scales each output by its probability.

  Args:
    saved: of a dense model, or of one with fewer sparse layers.
    fresh: of the sparse model; its EXPERT_MLP_DIM is the dense MLP_DIM.
    noise: relative size of normal noise on each expert's copy (0 was as good).
    seed: of the noise.

  Raises:
    ConfigError: if the dense model lacks a layer, or sizes differ.
  """
  read = Reader(saved)

  def choose(place: Place, new: Array) -> Array:
    if (value := read(place)) is not None:
      return value
    if place.sublayer == 'moe_norm':
      value = read(place._replace(sublayer='mlp_norm'))
    elif place.sublayer == 'moe' and place.rest.startswith('experts/'):
      value = read(place._replace(sublayer='mlp', rest=place.rest.removeprefix('experts/')))
      if value is not None and new.ndim > value.ndim:  # else it is an optimizer's count
        value = jnp.broadcast_to(value, (new.shape[0], *value.shape))
        if noise:
          key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(str(place).encode()))
          value *= 1 + noise * jax.random.normal(key, value.shape, value.dtype)
    elif place.sublayer == 'moe':
      return new
    if value is None:
      raise ConfigError(f'The dense model has nothing for {place}: upcycle one with as many layers.')
    return value

  upcycled = rebuilt(fresh, choose)
  read.check_all_read()
  return upcycled


def upcycle_optimizer(saved: PyTree, fresh: PyTree) -> PyTree:
  """The optimizer's state of an upcycled model: experts begin with the dense layer's statistics, routers with none.

  Of our Adafactor and AdamW, and of whatever keeps arrays under the names of parameters; counts of steps go on. This
  helped Komatsuzaki et al. (2022) on images; on text they began anew.

  Args:
    saved: state of the dense model's optimizer.
    fresh: first state of the sparse model's, the same optimizer.

  Raises:
    ConfigError: if optimizers differ, or as `upcycle`.
  """
  counts = {path for path, x in _by_name(fresh).items() if jnp.ndim(x) == 0}
  before, after = (_per_layer(_by_name(tree)) for tree in (saved, fresh))
  loose = [{path for path in flat if not _LAYER.fullmatch(path)} for flat in (before, after)]
  if differing := sorted(loose[0] ^ loose[1]):
    raise ConfigError(f'Only one of the two optimizers has {differing[0]}: train with the OPTIMIZER that was saved.')
  made = flatten_dict(upcycle(unflatten_dict(before, sep='/'), unflatten_dict(after, sep='/')), sep='/')
  values = [made[path].reshape(-1)[0] if path in counts else made[path] for path in _by_name(fresh)]
  return jax.tree.unflatten(jax.tree.structure(fresh), values)


def _by_name(tree: PyTree) -> dict[str, Array]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_name(path): x for path, x in leaves}


def _per_layer(flat: Flat) -> dict[str, Array]:
  """Repeats the one count of a stacked parameter for each of its layers, so that it has places as arrays do."""
  repeats: dict[str, int] = {}
  for path, x in flat.items():
    if (found := _LAYER.fullmatch(path)) and found[2] is None and jnp.ndim(x):
      repeats[found[1]] = x.shape[0]

  def spread(path: str, x: Array) -> Array:
    found = _LAYER.fullmatch(path)
    return jnp.broadcast_to(x, repeats[found[1]]) if found and found[2] is None and not jnp.ndim(x) else x

  return {path: spread(path, x) for path, x in flat.items()}


def shared_start(saved: PyTree, fresh: PyTree) -> PyTree:
  """A student's start: what the teacher has at the same place in the same shape, and the rest fresh.

  Of a sparse teacher, a dense student takes all weights but those of expert layers (Switch, section 4.2); a shallower
  sparse student takes its layers, experts and all (Mixture-of-Students, Rajbhandari et al. 2022).
  """
  read = Reader(saved)

  def choose(place: Place, new: Array) -> Array:
    value = read(place)
    if value is None and place.sublayer == 'mlp_norm':
      value = read(place._replace(sublayer='moe_norm'))
    return value if value is not None and value.shape == new.shape else new

  return rebuilt(fresh, choose)


def prune(
  saved: PyTree,
  fresh: PyTree,
  loads: Mapping[str, Array] | None = None,
  seed: int | None = None,
  keep: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> PyTree:
  """Keeps as many experts of each layer as the new model has, and the router's weights for them (Kim et al. 2021).

  Args:
    saved: of the model with more experts.
    fresh: of the one with fewer.
    loads: as of `measured_loads`: the most used are kept.
    seed: keeps experts drawn at random instead. With neither, the first are kept.
    keep: keeps these instead: stack, such as 'decoder/' -> the experts' numbers for each sparse layer.

  Raises:
    ConfigError: if the new model has more experts, or differs otherwise; if `keep` names too few, or one twice.
  """

  def kept(place: Place, sparse: int, before: int, after: int) -> Array:
    if keep is not None:
      chosen = list(keep[place.stack][sparse])
      if len(set(chosen) & set(range(before))) != after or len(chosen) != after:
        raise ConfigError(f'keep={chosen} of {place}: name {after} different experts of 0 to {before - 1}.')
      return jnp.asarray(chosen)
    if seed is not None:
      key = jax.random.fold_in(jax.random.key(seed), place.layer)
      return jnp.sort(jax.random.permutation(key, before)[:after])
    if loads is not None:
      return jnp.sort(jnp.argsort(-jnp.asarray(loads[place.stack][sparse]))[:after])
    return jnp.arange(after)

  def pick(place: Place, sparse: int, value: Array, axis: int, after: int) -> Array:
    return jnp.take(value, kept(place, sparse, value.shape[axis], after), axis=axis)

  return _fewer_experts(saved, fresh, pick)


def measured_loads(model_dir: str, last: int = 20) -> dict[str, Array]:
  """How a run's experts shared its choices of late: stack, such as 'decoder/' -> float[sparse layers, E].

  Args:
    model_dir: of the run, whose metrics.jsonl is read.
    last: how many of its newest training lines are averaged.

  Raises:
    ConfigError: if it has told of no loads.
  """
  path = to_path(model_dir) / 'metrics.jsonl'
  lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
  found: dict[str, list[Any]] = collections.defaultdict(list)
  for line in [line for line in lines if line['split'] == 'train'][-last:]:
    for key, value in line.items():
      if key.endswith('/moe/expert_load'):
        stack = key.removesuffix('moe/expert_load')
        found[stack.removeprefix('decoder/') if '/stack_' in stack else stack].append(value)
  if not found:
    raise ConfigError(f'{path} tells of no loads of experts: train that model first, or prune without loads.')
  return {stack: jnp.mean(jnp.asarray(values), axis=0) for stack, values in found.items()}


def merge(
  saved: PyTree,
  fresh: PyTree,
  loads: Mapping[str, Array] | None = None,
  groups: Mapping[str, Sequence[Sequence[Sequence[int]]]] | None = None,
) -> PyTree:
  """Averages experts, by groups that become one each, and the router's weights for them.

  Where the new model is dense (EXPERT_EVERY = 0) all experts become its MLP. Experts of one seed alone can be averaged
  with sense: others have permuted units.

  Args:
    saved: of the model with more experts.
    fresh: of the one with fewer, or none.
    loads: as of `prune`, by which experts are weighed; None weighs all alike.
    groups: stack, such as 'decoder/' -> for each sparse layer, the experts' numbers of each group; None: E / E' that
      stand side by side.

  Raises:
    ConfigError: if the experts do not fall evenly into as many groups as the new model has experts, or not each into
      one of those that are given, or the models differ otherwise.
  """

  def members(place: Place, sparse: int, before: int, after: int) -> Sequence[Sequence[int]]:
    if groups is None:
      if before % after:
        raise ConfigError(f'{before} experts do not merge into {after} evenly: use a divisor.')
      return [range(i, i + before // after) for i in range(0, before, before // after)]
    try:
      given = groups[place.stack][sparse]
    except LookupError as error:
      raise ConfigError(f'groups says nothing of {place}: give a list for each sparse layer of each stack.') from error
    if len(given) != after or sorted(itertools.chain(*given)) != list(range(before)) or not all(given):
      raise ConfigError(f'groups={given} of {place}: name each of {before} experts in one of {after} groups.')
    return given

  def pick(place: Place, sparse: int, value: Array, axis: int, after: int) -> Array:
    before = value.shape[axis]
    load = jnp.ones(before) if loads is None else jnp.asarray(loads[place.stack][sparse])
    one_hot = [jnp.zeros(before).at[jnp.asarray(group)].set(1.0) for group in members(place, sparse, before, after)]
    shares = jnp.stack(one_hot) * load[None]
    shares = shares / jnp.sum(shares, axis=1, keepdims=True)
    return jnp.moveaxis(jnp.tensordot(shares, value, axes=(1, axis), precision='highest'), 0, axis)

  return _fewer_experts(saved, fresh, pick)


def _fewer_experts(saved: PyTree, fresh: PyTree, pick: Callable[[Place, int, Array, int, int], Array]) -> PyTree:
  read, flat = Reader(saved), flatten_dict(saved, sep='/')
  dense = not any('/moe/' in path for path in flatten_dict(fresh, sep='/'))
  sparse = collections.defaultdict(set)
  for place in places(flat):
    if place.sublayer == 'moe':
      sparse[place.stack].add(place.layer)
      if dense and place.rest.startswith('router/'):
        read(place)  # of no use to it

  def choose(place: Place, new: Array) -> Array:
    value, merged = read(place), False
    if value is None and place.sublayer in ('mlp', 'mlp_norm'):
      rest = place.rest if place.sublayer == 'mlp_norm' else f'experts/{place.rest}'
      value = read(place._replace(sublayer=place.sublayer.replace('mlp', 'moe'), rest=rest))
      merged = place.sublayer == 'mlp'
    if value is None:
      raise ConfigError(f'The saved model has nothing for {place}: use one with as many layers.')
    if value.shape == new.shape and not merged:
      return value
    wanted = (1, *new.shape) if merged else new.shape
    differ = [axis for axis, sizes in enumerate(zip(value.shape, wanted)) if sizes[0] != sizes[1]] or [0]
    if len(value.shape) != len(wanted) or len(differ) > 1 or value.shape[differ[0]] < wanted[differ[0]]:
      return value  # whose shape is then complained of
    layer = sorted(sparse[place.stack]).index(place.layer)
    value = pick(place, layer, value, differ[0], wanted[differ[0]])
    return value[0] if merged else value

  smaller = rebuilt(fresh, choose)
  read.check_all_read()
  return smaller


def average(models: Sequence[PyTree], weights: Sequence[float] | None = None) -> PyTree:
  """The weighted mean of models alike, such as checkpoints of one run.

  Raises:
    ConfigError: naming the first array that is not in all, or not of one shape.
  """
  flats = [flatten_dict(model, sep='/') for model in models]
  for flat in flats[1:]:
    for path in sorted({*flats[0], *flat}):
      shapes = [f[path].shape if path in f else 'missing' for f in (flats[0], flat)]
      if shapes[0] != shapes[1]:
        raise ConfigError(f'Models to average differ: {path} is {shapes[0]} in one and {shapes[1]} in another.')
  shares = [1 / len(models)] * len(models) if weights is None else [weight / sum(weights) for weight in weights]
  return unflatten_dict(
    {path: sum(share * flat[path] for share, flat in zip(shares, flats, strict=True)) for path in flats[0]}, sep='/'
  )
