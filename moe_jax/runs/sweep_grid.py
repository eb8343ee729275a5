"""What a sweep runs: every combination of values, the dense twin of each, and a name for each."""

import ast
import dataclasses
import glob
import hashlib
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_jax.types import ConfigError

Overrides = Mapping[str, Any]
FILE = 'gin_file'  # the name of an axis whose values are gin files
ABOUT_EXPERTS = {  # what makes no difference to a dense model
  *('NUM_EXPERTS', 'NUM_SELECTED', 'EXPERT_MLP_DIM', 'EXPERT_DROPOUT_RATE', 'EXPERTS', 'SHARED', 'GROUP_SIZE'),
  *('CAPACITY_FACTOR', 'EVAL_CAPACITY_FACTOR', 'ROUTER', 'DISPATCHER', 'AUX_LOSS_SCALE'),
}


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What all runs of a sweep share, as the command line gave it.

  Attributes:
    script: run.py.
    files: of gin.
    bindings: 'NAME = VALUE'.
    search_paths: where gin files are found, separated by commas.
  """

  script: str
  files: Sequence[str]
  bindings: Sequence[str]
  search_paths: str = '.'

  def under(self, overrides: Overrides) -> tuple[list[str], list[str]]:
    """Its gin files and its bindings, with overrides behind them."""
    files = [overrides[FILE]] if FILE in overrides else []
    more = [f'{name} = {value!r}' for name, value in overrides.items() if name != FILE]
    return [*self.files, *files], [*self.bindings, *more]

  def command(self, overrides: Overrides) -> list[str]:
    """The command line that trains it under overrides."""
    files, bindings = self.under(overrides)
    options = [f'--gin_file={path}' for path in files]
    options += ['--gin.' + binding.replace(' = ', '=', 1) for binding in bindings]
    return [sys.executable, self.script, f'--gin_search_paths={self.search_paths}', *options]


def parse_axis(text: str) -> tuple[str, list[Any]]:
  """'NUM_EXPERTS=[4, 8]' -> ('NUM_EXPERTS', [4, 8])."""
  name, _, values = text.partition('=')
  with suppress(ValueError, SyntaxError):
    parsed = ast.literal_eval(values)
    if re.fullmatch(r'[\w./]+', name) and isinstance(parsed, (list, tuple)) and parsed:
      return name, list(dict.fromkeys(parsed)) if all(map(_hashable, parsed)) else list(parsed)
  raise ConfigError(f'--sweep={text} is not like NUM_EXPERTS=[4,8,16], a name and a list of Python values.')


def _hashable(value: Any) -> bool:
  return isinstance(value, (int, float, str, bool, type(None)))


def files_axis(pattern: str) -> tuple[str, list[str]]:
  """A pattern -> ('gin_file', the files that it matches)."""
  if not (files := sorted(glob.glob(pattern))):
    raise ConfigError(f'--sweep_gin={pattern} matches no file.')
  return FILE, files


def grid(axes: Sequence[tuple[str, Sequence[Any]]]) -> list[Overrides]:
  """Every combination, none twice, and before each its dense twin, which needs nothing of what is about experts."""
  names = [name for name, _ in axes]
  if not axes:
    raise ConfigError('--run_mode=sweep needs --sweep="NAME=[VALUE, ...]" or --sweep_gin=PATTERN.')
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise ConfigError(f'{twice[0]} is swept twice: give all its values in one list.')
  if mine := sorted({'TRAIN_STEPS', 'MODEL_DIR'} & set(names)):
    raise ConfigError(f'{mine[0]} is what a sweep sets by itself (--hold), so it cannot be swept.')
  found: dict[str, Overrides] = {}
  for values in itertools.product(*(values for _, values in axes)):
    overrides = dict(zip(names, values, strict=True))
    dense = overrides.get('EXPERT_EVERY') == 0
    for one in (dense_twin(overrides), *([] if dense else [overrides])):
      found.setdefault(name_of(one), one)
  return sorted(found.values(), key=lambda one: one.get('EXPERT_EVERY') != 0)


def dense_twin(overrides: Overrides) -> dict[str, Any]:
  """The same without experts: {'NUM_EXPERTS': 8, 'SEED': 1} -> {'SEED': 1, 'EXPERT_EVERY': 0}."""
  kept = {k: v for k, v in overrides.items() if k not in ABOUT_EXPERTS and not (k == FILE and _about_experts(v))}
  return {**kept, 'EXPERT_EVERY': 0}


def _about_experts(path: str) -> bool:
  return Path(path).parent.name in ('routers', 'dispatchers', 'experts')


def name_of(overrides: Overrides) -> str:
  """A folder's name that tells the overrides apart, whatever their order."""
  values = {k: Path(v).stem if k == FILE else v for k, v in sorted(overrides.items())}
  name = ','.join(f'{k.lower()}={v}' for k, v in values.items())
  plain = re.sub(r'[^\w=,.+-]+', '_', name)
  if plain != name or len(plain) > 120 or FILE in overrides or any(map(_looks_like_another, values.values())):
    plain = f'{plain[:110]}-{hashlib.sha256(repr(sorted(overrides.items())).encode()).hexdigest()[:8]}'
  return plain


def _looks_like_another(value: Any) -> bool:
  """Whether a text reads like a number or None."""
  if isinstance(value, str):
    with suppress(ValueError, SyntaxError):
      ast.literal_eval(value)
      return True
  return False
