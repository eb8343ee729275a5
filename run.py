"""The one door: python run.py --run_mode=train --gin_file=gin/experiments/quickstart.gin --gin.TRAIN_STEPS=300

Gin lives here and nowhere else. Files compose in the order given, `--gin.NAME=VALUE` comes last, and later wins.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import json
import logging
import multiprocessing
import os
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import gin

from moe_jax.paths import BUCKETS, to_path
from moe_jax.types import ConfigError, Preempted

MODES = {  # mode -> module:function
  'train': 'moe_jax.runs.train:train',
  'eval': 'moe_jax.runs.evaluate:evaluate',
  'infer': 'moe_jax.runs.infer:infer',
  'plan': 'moe_jax.runs.plan:plan',
  'convert': 'moe_jax.runs.convert:convert',
  'sweep': 'moe_jax.runs.sweep:sweep',
  'advise': 'moe_jax.runs.advise:advise',
  'report': 'moe_jax.runs.report:report',
}
PACKAGES = ('moe_jax', 'tasks', 'jax', 'flax', 'optax', 'seqio', 't5x')  # whose functions gin may name
HERE = pathlib.Path(__file__).resolve().parent
ROUTERS = HERE / 'gin' / 'routers'
gin.config.register_file_reader(
  lambda path: to_path(path).open(), lambda path: path.startswith(BUCKETS) and to_path(path).exists()
)


class Printer(logging.Handler):
  """Prints what the library has to say (`moe_jax.notices`) among what the run prints."""

  def emit(self, record: logging.LogRecord) -> None:
    """Prints a record's message."""
    print(record.getMessage(), flush=True)


def parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
  """Splits the command line into flags and gin bindings."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--run_mode', choices=MODES, default='train')
  parser.add_argument('--gin_file', action='append', default=[], help='may be given several times; later wins')
  parser.add_argument('--gin_search_paths', default='.', help='comma-separated folders that gin files are found in')
  parser.add_argument('--dry_run', action='store_true', help='build everything, say how large it is, and stop')
  parser.add_argument('--search', action='store_true', help='plan: try other meshes too; advise: plan the two best')
  parser.add_argument('--teacher', help='train: the MODEL_DIR of a model to learn from, see gin/distill.gin')
  parser.add_argument('--from', dest='source', help='convert: the library whose weights to read: hf, t5x')
  parser.add_argument('--to', dest='target', help='convert: the library to write weights for: hf, t5x')
  parser.add_argument('--path', help='convert: the folder of theirs')
  parser.add_argument('--prompt', action='append', help='infer: a text to continue, instead of the task')
  parser.add_argument('--model_dirs', nargs='+', help='report: the runs to compare')
  parser.add_argument('--routers', action='store_true', help='report: a picture of who goes where, for each router')
  parser.add_argument('--sweep', action='append', default=[], help='sweep: an axis, "NUM_EXPERTS=[4,8,16]"')
  parser.add_argument(
    '--sweep_gin', action='append', default=[], help='sweep: an axis of gin files, "gin/routers/*.gin"'
  )
  parser.add_argument('--hold', help='sweep: what runs have alike: flops (as usual), parameters, time, steps')
  parser.add_argument('--jobs', type=int, help='sweep: runs at a time, each on its share of the cores')
  parser.add_argument('--commands', help='sweep: write the command lines there, - prints them, and run nothing')
  parser.add_argument('--output', help='infer, report: where to write')
  parser.add_argument('--profile_steps', help='train: FIRST:LAST, steps to trace with the profiler')
  parser.add_argument('--distributed', action='store_true', help='one process of several, on Cloud TPU, SLURM or MPI')
  parser.add_argument('--coordinator_address', help='HOST:PORT of process 0, where nothing else tells')
  parser.add_argument('--num_processes', type=int, help='of the run, with --coordinator_address')
  parser.add_argument('--process_id', type=int, help='of this process, from 0, with --coordinator_address')
  parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
  flags, rest = parser.parse_known_args(arguments)
  bindings = []
  for argument in rest:
    if not (match := re.fullmatch(r'--gin\.([^=]+)=(.*)', argument, re.DOTALL)):
      raise ConfigError(f'Unknown argument {argument!r}: bindings look like --gin.NAME=VALUE; --help lists the flags.')
    bindings.append(f'{match[1]} = {match[2]}')
  return flags, bindings


def parse_gin(mode: str, files: list[str], bindings: list[str], search_paths: list[str]) -> None:
  """Reads `gin/runs/<mode>.gin`, then the user's files, then the command line's bindings.

  Raises:
    ConfigError: on a name that nothing reads, with the nearest one that something does.
  """
  for path in (*search_paths, str(HERE)):
    gin.add_config_file_search_path(path)
  try:
    gin.parse_config_files_and_bindings([f'gin/runs/{mode}.gin', *files], [], finalize_config=False)
    for binding in bindings:
      try:
        gin.parse_config(binding)
      except SyntaxError as error:
        name, value = binding.split(' = ', 1)
        raise ConfigError(
          f'--gin.{name}={value} is not a value that gin can read. Text needs quotes: --gin.{name}="\'{value}\'"'
        ) from error
    check_imports(gin.config_str(), search_paths)
    check_names(gin.config_str(), HERE / 'gin')
    gin.finalize()
  except OSError as error:
    raise ConfigError(f'{first_line(error)} (gin files are searched in {", ".join(search_paths)}).') from error
  except (ValueError, SyntaxError) as error:
    raise ConfigError(_explain(error)) from error


def check_imports(config: str, search_paths: list[str]) -> None:
  """Sees that a configuration names functions of this library, of those it builds on, and of the user's own files only.

  Raises:
    ConfigError: naming another module, whose functions might do anything.
  """
  own = [os.path.realpath(path) for path in (*search_paths, str(HERE))]
  for module in set(re.findall(r'^(?:from|import) ([\w.]+)', config, re.MULTILINE)) - {'gin', '__gin__'}:
    top = module.split('.')[0]
    origin = os.path.realpath(str(getattr(sys.modules.get(top), '__file__', None) or os.sep))
    installed = re.search(rf'{os.sep}(site|dist)-packages{os.sep}', origin)
    if top in PACKAGES or (not installed and any(origin.startswith(path + os.sep) for path in own)):
      continue
    raise ConfigError(
      f'A gin file imports {module!r}, which is none of {", ".join(PACKAGES)}, nor a module of yours under'
      f' --gin_search_paths ({", ".join(search_paths)}).'
    )


def check_names(config: str, folder: pathlib.Path) -> None:
  """Sees that every name that is set is read by something, and that every name that is read is set.

  Raises:
    ConfigError: naming the first that is not, and the nearest that would be.
  """
  read = set(re.findall(r'%(\w+)', config)) - {'gin'}
  read_somewhere = read.union(*(re.findall(r'%(\w+)', path.read_text()) for path in folder.rglob('*.gin')))
  values = dict(re.findall(r'^(\w+) = (.*)', config, re.MULTILINE))
  for name in values:
    if name not in read_somewhere:  # what other modes read is no mistake
      raise ConfigError(f'Nothing reads {name}{_nearest(name, read)} gin/README.md lists the names.')
  for name in sorted(read):
    if values.get(name, '%gin.REQUIRED') == '%gin.REQUIRED':
      raise ConfigError(f'{name} is not set: gin/experiments/ holds whole recipes, gin/README.md lists the names.')


def _explain(error: Exception) -> str:
  """Gin's complaint in one line, with the nearest name where a parameter is misspelt."""
  message = first_line(error)
  if match := re.search(r"Configurable '(\S+)' doesn't have a parameter named '(\w+)'", message):
    target = inspect.unwrap(gin.get_configurable(match[1]))
    names = target.__dataclass_fields__ if dataclasses.is_dataclass(target) else inspect.signature(target).parameters
    return f'{match[1]} has no parameter {match[2]!r}{_nearest(match[2], names)}'
  return message


def _nearest(name: str, known: Iterable[str]) -> str:
  near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  return f': did you mean {near[0]}?' if near else '.'


def first_line(error: BaseException) -> str:
  """The message without gin's account of where it was called from."""
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def main(arguments: list[str]) -> int:
  """Runs one mode; returns the exit code. Bad input gets one line, unless --debug."""
  debug = '--debug' in arguments
  library = logging.getLogger('moe_jax')
  library.setLevel(logging.INFO)
  library.propagate = False
  if not library.handlers:
    library.addHandler(Printer())
  joined: Any = None  # what serves a process that is one of several
  try:
    flags, bindings = parse_arguments(arguments)
    if flags.distributed or flags.coordinator_address or flags.num_processes or flags.process_id is not None:
      from moe_jax.runs import hosts

      if (code := hosts.watched()) is not None:
        return code
      joined = hosts
      hosts.join(flags.coordinator_address, flags.num_processes, flags.process_id)
    run(flags, bindings)
  except KeyboardInterrupt:
    print('Interrupted.', file=sys.stderr)
    return 130
  except Preempted as notice:
    print(notice)
    return 128 + signal.SIGTERM
  except Exception as error:
    if debug and not joined:
      raise
    if debug:
      traceback.print_exc()
    line = first_line(error)
    if not isinstance(error, ConfigError):
      line = (joined and joined.explain(error)) or f'{type(error).__name__}: {line} (--debug shows where)'
    print(line, file=sys.stderr)
    if joined:
      joined.leave(1)
    return 1
  return 0


def run(flags: argparse.Namespace, bindings: list[str]) -> None:
  """Configures and calls the function of a mode."""
  if flags.routers:
    if flags.run_mode != 'report':
      raise ConfigError('--routers goes with --run_mode=report.')
    print(draw_routers(flags, bindings))
    return
  module, name = MODES[flags.run_mode].split(':')
  function = getattr(importlib.import_module(module), name)
  if flags.run_mode == 'report':
    if not flags.model_dirs:
      raise ConfigError('--run_mode=report needs --model_dirs DIR [DIR ...], or --routers.')
    swept = [folder for folder in flags.model_dirs if (to_path(folder) / 'sweep.jsonl').exists()]
    if swept and len(flags.model_dirs) > 1:
      raise ConfigError(f'{swept[0]} is a sweep, which has a page of its own: give it alone.')
    if swept:
      from moe_jax.runs.sweep_page import sweep_report as function
    print(function(flags.model_dirs[0] if swept else flags.model_dirs, output=flags.output))
    return
  if not flags.gin_file and flags.run_mode not in ('convert', 'advise'):
    raise ConfigError('Which model? Give --gin_file=gin/experiments/quickstart.gin, or another of that folder.')
  if flags.search and flags.run_mode not in ('plan', 'advise'):
    raise ConfigError('--search goes with --run_mode=plan and --run_mode=advise.')
  if flags.teacher and flags.run_mode != 'train':
    raise ConfigError('--teacher goes with --run_mode=train.')
  check_sweep_flags(flags)
  if flags.run_mode == 'sweep':
    run_sweep(flags, bindings)
    return
  parse_gin(flags.run_mode, flags.gin_file, bindings, flags.gin_search_paths.split(','))
  learned_from = load_teacher(flags, bindings) if flags.teacher else None
  given = {'dry_run': flags.dry_run or None, 'prompts': flags.prompt, 'output': flags.output}
  given['teacher'] = learned_from
  if flags.search and flags.run_mode == 'advise':
    from moe_jax.runs.advise import EXPERIMENT

    folder = to_path(gin.query_parameter('%MODEL_DIR'))
    given['plan'] = functools.partial(planned, [EXPERIMENT], [], flags, folder)
  given |= {'source': flags.source, 'target': flags.target, 'path': flags.path}
  given['profile_steps'] = flags.profile_steps
  given = {name: value for name, value in given.items() if value is not None}
  accepted = inspect.signature(function).parameters
  if unused := sorted(set(given) - set(accepted)):
    flag = {'source': 'from', 'target': 'to'}.get(unused[0], unused[0].removesuffix('s'))
    raise ConfigError(f'--{flag} says nothing to --run_mode={flags.run_mode}.')
  if 'config' in accepted:
    given['config'] = gin.config_str()
  result = gin.get_configurable(function)(**given)
  if flags.search and flags.run_mode == 'plan':
    search_plans(flags, bindings, result)


def load_teacher(flags: argparse.Namespace, bindings: list[str]) -> Any:
  """The teacher, under its own configuration but for the data and devices, which are those of the one at hand."""
  from moe_jax.runs.teacher import teacher

  shared = ['BATCH_SIZE', 'MIXTURE_OR_TASK_NAME', 'TASK_MODULES', 'TASK_FEATURE_LENGTHS', 'MESH', 'AXIS_RULES']
  values = {name: gin.query_parameter(f'%{name}') for name in (*shared, 'FAKE_DEVICES')}
  more = [f'{name} = {value!r}' for name, value in values.items()]
  gin.clear_config()
  config = to_path(flags.teacher) / 'config.gin'
  parse_gin('teacher', [str(config)], [*more, f'MODEL_DIR = {flags.teacher!r}'], flags.gin_search_paths.split(','))
  made = gin.get_configurable(teacher)()
  gin.clear_config()
  parse_gin(flags.run_mode, flags.gin_file, bindings, flags.gin_search_paths.split(','))
  return made


def search_plans(flags: argparse.Namespace, bindings: list[str], first: dict[str, Any]) -> None:
  """Plans again and again, each time with other bindings behind the user's, and ranks what comes of it."""
  from moe_jax.runs import plan, plan_page

  model_dir, remat = to_path(gin.query_parameter('%MODEL_DIR')), gin.query_parameter('%REMAT')

  def again(candidate: Mapping[str, Any]) -> dict[str, Any]:
    return planned(flags.gin_file, bindings, flags, model_dir, candidate)

  ranked = plan.search(first, again, remat)
  (model_dir / 'search.json').write_text(json.dumps(ranked, indent=2))
  plan_page.show_search(ranked)
  print(f'search: {model_dir / "search.json"}')


def planned(
  files: list[str], bindings: list[str], flags: argparse.Namespace, folder: pathlib.Path, bound: Mapping[str, Any]
) -> dict[str, Any]:
  """One more compile plan, with other bindings behind the user's, in a place of its own."""
  from moe_jax.runs import plan

  gin.clear_config()
  place = folder / f'candidate_{len(list(folder.glob("candidate_*")))}'
  more = [f'{name} = {value!r}' for name, value in {**bound, 'MODEL_DIR': str(place)}.items()]
  parse_gin('plan', files, [*bindings, *more], flags.gin_search_paths.split(','))
  return gin.get_configurable(plan.plan)(config=gin.config_str())


def check_sweep_flags(flags: argparse.Namespace) -> None:
  """Raises ConfigError where flags of sweeps and of single runs are mixed."""
  own = [name for name in ('sweep', 'sweep_gin', 'hold', 'jobs', 'commands') if getattr(flags, name)]
  others = ('dry_run', 'profile_steps', 'prompt', 'output', 'distributed', 'coordinator_address')
  if flags.run_mode != 'sweep' and own:
    raise ConfigError(f'--{own[0]} goes with --run_mode=sweep.')
  if flags.run_mode == 'sweep' and (bad := [name for name in others if getattr(flags, name)]):
    raise ConfigError(f'--{bad[0]} says nothing to --run_mode=sweep; --commands=- shows what it would run.')


def sized(files: list[str], bindings: list[str], paths: list[str]) -> dict[str, Any]:
  """What a dry run tells of a model, and its 'train_steps'."""
  from moe_jax.runs.train import train

  gin.clear_config()
  parse_gin('train', files, bindings, paths)
  try:
    with contextlib.redirect_stdout(None):
      sizes = gin.get_configurable(train)(dry_run=True)
  except Exception as error:  # as gin raises it, it does not reach another process
    raise ConfigError(first_line(error)) from None
  return {**sizes, 'train_steps': gin.query_parameter('%TRAIN_STEPS')}


def run_sweep(flags: argparse.Namespace, bindings: list[str]) -> None:
  """Trains the experiment under many overrides.

  Sizes are told by a process of its own, which leaves accelerators to the runs when it is done. This one has none.
  """
  import jax

  from moe_jax.runs import sweep, sweep_grid

  jax.config.update('jax_platforms', 'cpu')
  paths = flags.gin_search_paths.split(',')
  experiment = sweep_grid.Experiment(str(HERE / 'run.py'), flags.gin_file, bindings, flags.gin_search_paths)

  @contextlib.contextmanager
  def sizes() -> Iterator[Callable[[Mapping[str, Any]], dict[str, Any]]]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as process:
      yield lambda overrides: process.submit(sized, *experiment.under(overrides), paths).result()

  parse_gin('train', flags.gin_file, bindings, paths)
  sweep.sweep(
    gin.query_parameter('%MODEL_DIR'),
    flags.sweep,
    flags.sweep_gin,
    sizes(),
    experiment.command,
    gin.config_str(),
    hold=flags.hold or 'flops',
    jobs=1 if flags.jobs is None else flags.jobs,
    commands=flags.commands,
  )


def draw_routers(flags: argparse.Namespace, bindings: list[str]) -> pathlib.Path:
  """A page with a picture of each router of gin/routers/, in the quickstart or whatever experiment is given.

  Raises:
    ConfigError: naming the first router's file that does not do.
  """
  from moe_jax.runs import gallery

  experiment = flags.gin_file or ['gin/experiments/quickstart.gin']
  pictures = []
  for path in sorted(ROUTERS.glob('*.gin')):
    gin.clear_config()
    try:
      files = [*experiment, str(path), 'gin/runs/gallery_size.gin']
      parse_gin('gallery', files, bindings, flags.gin_search_paths.split(','))
      caption = re.search(r'^# *(.*)', path.read_text(), re.MULTILINE)
      draw = gin.get_configurable(gallery.picture)
      pictures.append(draw(name=path.stem, caption=caption[1] if caption else ''))
    except Exception as error:
      raise ConfigError(f'{path}: {first_line(error)}') from error
  return gallery.gallery(pictures, **({'output': flags.output} if flags.output else {}))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
