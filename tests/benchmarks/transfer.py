"""Upstream to downstream: pretrain on text, fine-tune on a task, evaluate, infer; and the same without the first step.

  python tests/benchmarks/transfer.py
  python tests/benchmarks/transfer.py --pretrain_steps 800 --seeds 5 --gin.EXPERT_EVERY=0

Text and task are Python's own standard library: a model reads its files, and then learns to name a function by what it
says of itself. No file is both trained and tested on. Every command is printed as it would be typed. Exits with 1 if a
pretrained model is no better than one from scratch.
"""

import argparse
import contextlib
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import gin  # noqa: E402

import run  # noqa: E402

UPSTREAM = ['--gin_file=gin/experiments/quickstart.gin']
DOWNSTREAM = [*UPSTREAM, '--gin_file=gin/tasks/local_docstring_name.gin']
MEASURES = {
  'bits_per_byte': 'bits per byte of the name',
  'accuracy': 'share of its bytes told one by one',
}


def command(mode: str, *arguments: str, quiet: bool = True) -> None:
  """Runs one mode as the command line does, and shows how."""
  print('$ python run.py ' + shlex.join([f'--run_mode={mode}', *arguments]), flush=True)
  gin.clear_config()
  with contextlib.redirect_stdout(open(os.devnull, 'w') if quiet else sys.stdout):
    run.run(*run.parse_arguments([f'--run_mode={mode}', *arguments]))


def train(files: Sequence[str], folder: Path, steps: int, bindings: Sequence[str], **names: object) -> None:
  """Trains without stopping to look."""
  names = {'MODEL_DIR': str(folder), 'TRAIN_STEPS': steps, 'EVAL_PERIOD': steps, 'CHECKPOINT_PERIOD': steps, **names}
  command(
    'train', *files, *bindings, '--gin.STRATEGY=None', *(f'--gin.{key}={value!r}' for key, value in names.items())
  )


def main() -> int:
  """Runs all of it; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--pretrain_steps', type=int, default=250)
  parser.add_argument('--finetune_steps', type=int, default=120)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--folder', type=Path, default=ROOT / 'runs' / 'transfer')
  options, bindings = parser.parse_known_args()
  os.chdir(ROOT)
  started, folder = time.perf_counter(), options.folder

  train(UPSTREAM, folder / 'pretrained', options.pretrain_steps, bindings)
  starts = {'pretrained': str(folder / 'pretrained'), 'from scratch': None}
  results: dict[str, list[dict[str, float]]] = {name: [] for name in starts}
  for seed in range(options.seeds):
    for name, path in starts.items():
      place = folder / f'{name.replace(" ", "_")}_{seed}'
      names = {'SEED': seed, 'INITIAL_CHECKPOINT_PATH': path, 'WARMUP_STEPS': 20, 'LEARNING_RATE': 0.03}
      train(DOWNSTREAM, place, options.finetune_steps, bindings, **names)
      more = [f'--gin.MODEL_DIR={str(place)!r}', '--gin.EVAL_STEPS=4', '--gin.BATCH_SIZE=64', '--gin.NUM_EXAMPLES=64']
      command('eval', *DOWNSTREAM, *bindings, *more)
      results[name].append(json.loads((place / 'evaluation.jsonl').read_text().splitlines()[-1]))
  infer = [f'--gin.MODEL_DIR={str(folder / "pretrained_0")!r}', '--gin.NUM_EXAMPLES=3', '--gin.TEMPERATURE=0.0']
  command('infer', *DOWNSTREAM, *bindings, *infer, quiet=False)

  print(f'\n{options.seeds} seeds each, {options.finetune_steps} steps, on functions of files that were never seen')
  for key, what in MEASURES.items():
    print(f'  {what}')
    for name, rows in results.items():
      values = [row[key] for row in rows]
      deviation = statistics.stdev(values) if len(values) > 1 else 0.0
      each = ', '.join(f'{value:.3f}' for value in values)
      print(f'    {name:13s} {statistics.mean(values):.3f} +- {deviation:.3f}   ({each})')
  print(f'in {time.perf_counter() - started:.0f} s')
  pretrained, scratch = ([row['bits_per_byte'] for row in rows] for rows in results.values())
  return 0 if max(pretrained) < min(scratch) else 1


if __name__ == '__main__':
  sys.exit(main())
