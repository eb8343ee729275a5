"""Every router of gin/routers/ trains the quickstart, with the same data and seed, and a table says how it went.

  python tests/benchmarks/compare_routers.py --steps 100 --output routers.md
  python tests/benchmarks/compare_routers.py --steps 40 --routers hash soft --gin.NUM_LAYERS=2

top_2 runs first and again last: its step time is the unit, and how much the two differ is the noise. Routers that are
not causal look at later tokens: their losses are too good, and not to be compared. Some that are causal look ahead in
training all the same: compare those by validation. Exits with 1 if a loss did not fall.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import gin  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402

import run  # noqa: E402
from moe_jax.moe.moe_layer import MoELayer  # noqa: E402
from moe_jax.runs.report import curve, layer_curves, load_run  # noqa: E402

REFERENCE = 'top_2'
EXPERIMENT = 'gin/experiments/quickstart.gin'
LAST = 10  # steps that final numbers are means of
COLUMNS = ('router', 'causal', 'first loss', 'final loss', 'bits/byte', 'dropped', 'load CV', 'step time')
HEAD = """\
{steps} steps of the quickstart for each router. Losses are the task's cross-entropy in nats per byte; final numbers are
means over the last {last} steps and the sparse layers, bits per byte are of validation. Load CV is std / mean over
experts of the choices that fall on them. Step time is a median, {unit:.3f} s being 1.
"""


class Result(NamedTuple):
  """Attributes: as the table's columns, with seconds a step; NaN is unknown."""

  name: str
  causal: bool
  first_loss: float
  final_loss: float
  bits_per_byte: float
  dropped: float
  load_cv: float
  step_seconds: float


def train(name: str, steps: int, bindings: Sequence[str], model_dir: str) -> Result:
  """Trains with a file of gin/routers/, and reads what the run left."""
  gin.clear_config()
  jax.clear_caches()
  settings = {'TRAIN_STEPS': steps, 'EVAL_PERIOD': steps, 'CHECKPOINT_PERIOD': steps, 'LOG_PERIOD': 1, 'STRATEGY': None}
  settings |= {'MODEL_DIR': repr(model_dir), 'EVAL_STEPS': 8}
  arguments = [f'--gin_file={EXPERIMENT}', f'--gin_file={run.ROUTERS / name}.gin']
  arguments += [f'--gin.{key}={value}' for key, value in settings.items()]
  with contextlib.redirect_stdout(open(os.devnull, 'w')), warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='.* looks at later tokens')  # the column 'causal' says so
    run.run(*run.parse_arguments([*arguments, *bindings]))
  layer = gin.get_configurable(MoELayer)(parent=None)
  router = layer.router(num_experts=layer.num_experts)

  left = load_run(model_dir)
  losses, seconds = curve(left, 'cross_entropy').values, curve(left, 'step_seconds').values
  dropped = [layer.values[-LAST:].mean() for layer in layer_curves(left, 'dropped')]
  loads = [layer.values[-LAST:] for layer in layer_curves(left, 'expert_load')]
  return Result(
    name=name,
    causal=router.causal,
    first_loss=losses[0],
    final_loss=losses[-LAST:].mean(),
    bits_per_byte=curve(left, 'bits_per_byte', 'validation').last,
    dropped=float(np.mean(dropped)) if dropped else np.nan,
    load_cv=float(np.mean([load.std(1) / load.mean(1) for load in loads])) if loads else np.nan,
    step_seconds=float(np.median(seconds[min(20, steps // 2) :])),
  )


def table(results: Sequence[Result], unit: float) -> str:
  """Rows of markdown; `unit` is the seconds that a step time of 1 stands for."""

  def number(value: float, form: str) -> str:
    return format(value, form) if np.isfinite(value) else '—'

  lines = [COLUMNS, ('---', '---', *('---:',) * (len(COLUMNS) - 2))]
  for r in results:
    numbers = [number(value, '.3f') for value in (r.first_loss, r.final_loss, r.bits_per_byte)]
    numbers += [number(r.dropped, '.1%'), number(r.load_cv, '.2f'), number(r.step_seconds / unit, '.2f')]
    lines.append((r.name, 'yes' if r.causal else '**no**', *numbers))
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def main() -> int:
  """Runs them one after the other; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  every = sorted(path.stem for path in run.ROUTERS.glob('*.gin'))
  parser.add_argument('--steps', type=int, default=100)
  parser.add_argument('--routers', nargs='+', choices=every, default=every, metavar='NAME', help='default: all')
  parser.add_argument('--output', type=Path, help='a file for the table, which is printed anyhow')
  options, bindings = parser.parse_known_args()
  os.chdir(ROOT)

  results, failures = [], []
  names = [REFERENCE, *(name for name in options.routers if name != REFERENCE), REFERENCE]
  for number, name in enumerate(names, 1):
    started = time.perf_counter()
    try:
      with tempfile.TemporaryDirectory() as folder:
        result = train(name, options.steps, bindings, folder)
    except Exception as error:
      traceback.print_exc()
      failures.append(f'{name}: {run.first_line(error)}')
      continue
    results.append(result)
    if not result.final_loss < result.first_loss:
      failures.append(f'{name}: the loss went from {result.first_loss:.3f} to {result.final_loss:.3f}')
    took = time.perf_counter() - started
    print(f'{number}/{len(names)}  {name}  loss {result.final_loss:.3f}  {took:.0f}s', file=sys.stderr, flush=True)

  references = [result for result in results if result.name == REFERENCE]
  unit = float(np.mean([result.step_seconds for result in references])) if references else np.nan
  if len(references) == 2:
    results = [*results[:-1], results[-1]._replace(name=f'{REFERENCE}, again')]
  results = sorted(results, key=lambda result: result.name)
  text = HEAD.format(steps=options.steps, last=LAST, unit=unit) + '\n' + table(results, unit)
  print(text)
  if options.output:
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
  for failure in failures:
    print(f'FAILED {failure}', file=sys.stderr)
  return 1 if failures else 0


if __name__ == '__main__':
  sys.exit(main())
