"""The command line from end to end: a run and its files, a run that is killed, and bad input."""

import itertools
import json
import math
import os
import pathlib
import time

import gin
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import run
from moe_jax.runs.setup import compiled_step

ROOT = pathlib.Path(__file__).parents[1]
QUICKSTART = ['--gin_file=gin/experiments/quickstart.gin']
SMALL = [
  '--gin.NUM_LAYERS=2',
  '--gin.EMBED_DIM=32',
  '--gin.MLP_DIM=64',
  '--gin.EXPERT_MLP_DIM=64',
  '--gin.NUM_HEADS=2',
  '--gin.HEAD_DIM=16',
  '--gin.BATCH_SIZE=8',
  "--gin.TASK_FEATURE_LENGTHS={'targets': 64}",
  '--gin.GROUP_SIZE=64',
  '--gin.TRAIN_STEPS=8',
  '--gin.EVAL_STEPS=2',
  '--gin.EVAL_PERIOD=4',
  '--gin.CHECKPOINT_PERIOD=3',
  '--gin.LOG_PERIOD=1',
  '--gin.MAX_NEW_TOKENS=8',
]


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
  """A small corpus, and no configuration left from another test."""
  monkeypatch.chdir(ROOT)
  corpus = tmp_path / 'corpus'
  corpus.mkdir()
  for i in range(8):
    (corpus / f'{i}.py').write_text(f'def f{i}(x):\n  return x + {i}\n\n\n' * 200)
  monkeypatch.setenv('LOCAL_TEXT_GLOB', str(corpus / '*.py'))
  gin.clear_config()
  yield
  gin.clear_config()


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def arguments(folder, *more):  # of training
  return [*QUICKSTART, *SMALL, f"--gin.MODEL_DIR='{folder}'", *more]


def test_a_run_leaves_what_it_should_and_other_modes_take_it(tmp_path, capsys):
  folder = tmp_path / 'run'
  assert run.main(['--run_mode=train', '--debug', *arguments(folder)]) == 0
  assert {'config.gin', 'metrics.jsonl', 'checkpoints', 'report.html', 'summary.json'} <= set(os.listdir(folder))
  assert list(folder.glob('events.out.tfevents*'))
  metrics = lines(folder / 'metrics.jsonl')
  assert [m['step'] for m in metrics if m['split'] == 'train'] == list(range(1, 9))
  assert [m['step'] for m in metrics if m['split'] == 'validation'] == [4, 8]
  assert metrics[-2]['loss'] < metrics[0]['loss']
  assert len(metrics[0]['decoder/stack_0/moe/expert_load'][0]) == 8
  summary = json.loads((folder / 'summary.json').read_text())
  assert summary['mesh'] == {'data': 1, 'expert': 8, 'model': 1}
  assert summary['unigram_bits_per_byte'] > summary['zlib_bits_per_byte'] > 0
  assert 'bits per byte' in capsys.readouterr().out

  # The configuration that the run kept is all that other modes need, and training on.
  kept = ['--debug', f'--gin_file={folder / "config.gin"}']
  gin.clear_config()
  assert run.main(['--run_mode=eval', *kept, '--gin.EVAL_STEPS=2', '--gin.SPECIALIZATION=1']) == 0
  assert lines(folder / 'evaluation.jsonl')[-1]['bits_per_byte'] == pytest.approx(
    metrics[-1]['bits_per_byte'], rel=1e-6
  )
  assert json.loads((folder / 'specialization.json').read_text())['sides']['decoder']['tokens'] > 0
  gin.clear_config()
  assert run.main(['--run_mode=infer', *kept, '--prompt=def f', '--gin.MAX_NEW_TOKENS=4']) == 0
  assert lines(folder / 'inference.jsonl')[0]['inputs'] == 'def f'
  gin.clear_config()
  assert run.main(['--run_mode=train', *kept, '--gin.TRAIN_STEPS=9']) == 0
  assert [m['step'] for m in lines(folder / 'metrics.jsonl') if m['split'] == 'train'] == list(range(1, 10))

  # Another model does not take its checkpoint, and says so in one line.
  gin.clear_config()
  before, config = sorted(os.listdir(folder / 'checkpoints')), (folder / 'config.gin').read_text()
  capsys.readouterr()
  assert run.main(['--run_mode=train', *arguments(folder, '--gin.EMBED_DIM=64')]) == 1
  message = capsys.readouterr().err.strip()
  assert 'is of another model' in message and message.count('\n') == 0
  assert sorted(os.listdir(folder / 'checkpoints')) == before and (folder / 'config.gin').read_text() == config


def test_an_encoder_decoder_runs_too_scanned_and_rematerialised(tmp_path):
  folder = tmp_path / 'run'
  more = ["--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 32}", '--gin.GROUP_SIZE=32', '--gin.EXPERT_EVERY=1']
  more += ['--gin.SCAN=True', "--gin.REMAT='full'", f"--gin.MODEL_DIR='{folder}'", '--gin.TRAIN_STEPS=4']
  more += ['--gin.STRATEGY=None', '--gin.EVAL_STEPS=1']
  small = [a for a in SMALL if not a.startswith(('--gin.TASK', '--gin.GROUP', '--gin.EXPERT_MLP', '--gin.TRAIN'))]
  assert run.main(['--debug', '--gin_file=gin/experiments/st_moe_tiny.gin', *small, *more]) == 0
  gin.clear_config()
  sampled = ['--gin.TRAIN_STEPS=6', '--gin.STRATEGY=@decode.Sampling()']
  assert run.main(['--debug', f'--gin_file={folder / "config.gin"}', *sampled]) == 0
  losses = [m['loss'] for m in lines(folder / 'metrics.jsonl') if m['split'] == 'train']
  assert len(losses) == 6 and losses[-1] < losses[0]


def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved(tmp_path, capsys):
  folder = tmp_path / 'run'
  more = ['--gin_file=gin/optimizers/adamw.gin', '--gin.LEARNING_RATE=1e30', '--gin.WARMUP_STEPS=4']
  assert run.main(['--run_mode=train', *arguments(folder, *more)]) == 1
  message = capsys.readouterr().err.strip()
  assert 'at step' in message and ('nan' in message or 'inf' in message) and message.count('\n') == 0
  for step in (name for name in os.listdir(folder / 'checkpoints') if name.isdigit()):
    state = ocp.PyTreeCheckpointer().restore(folder / 'checkpoints' / step / 'state')
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state['params'])), step


def test_it_goes_back_where_it_diverges_and_counts_that(tmp_path, monkeypatch):
  folder, calls = tmp_path / 'run', itertools.count(1)

  def spoilt(*args):
    step = compiled_step(*args)

    def one(state, batch):
      state, metrics = step(state, batch)
      return state, {**metrics, 'loss': metrics['loss'] * (math.nan if next(calls) == 6 else 1.0)}

    return one

  monkeypatch.setattr('moe_jax.runs.train.compiled_step', spoilt)
  more = ['--gin.ROLL_BACK=6.0', '--gin.SKIP_ABOVE=1e30', "--gin.TRAINABLE=('^(?!.*/moe/)',)", '--gin.STRATEGY=None']
  assert run.main(['--debug', *arguments(folder, *more)]) == 0
  metrics = [line for line in lines(folder / 'metrics.jsonl') if line['split'] == 'train']
  assert [line['step'] for line in metrics] == list(range(1, 9)), 'each step is told of once'
  assert [line['roll_backs'] for line in metrics] == [0] * 3 + [1] * 5, 'step 6 went back to step 3'
  assert all(line['skipped_batches'] == 0 for line in metrics) and next(calls) == 12
  saved = ocp.PyTreeCheckpointer().restore(folder / 'checkpoints' / '8' / 'state')
  assert sum(np.size(x) for x in jax.tree.leaves(saved['opt_state'])) < 0.5 * sum(
    np.size(x) for x in jax.tree.leaves(saved['params'])
  )

  # Its weights are what another run may begin with.
  gin.clear_config()
  monkeypatch.undo()
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv('LOCAL_TEXT_GLOB', str(tmp_path / 'corpus' / '*.py'))
  more = [f"--gin.INITIAL_CHECKPOINT_PATH='{folder}'", '--gin.TRAIN_STEPS=1', '--gin.STRATEGY=None']
  assert run.main(['--debug', *arguments(tmp_path / 'second', *more)]) == 0
  assert lines(tmp_path / 'second' / 'metrics.jsonl')[0]['loss'] < metrics[0]['loss'] - 0.1


def test_a_run_that_crashes_goes_on_from_its_local_checkpoint(tmp_path, monkeypatch, capsys):
  folder, disk, calls = tmp_path / 'run', tmp_path / 'disk', itertools.count(1)

  def crashing(*args):
    step = compiled_step(*args)

    def one(state, batch):
      if next(calls) == 6:
        raise RuntimeError('crash')
      return step(state, batch)

    return one

  monkeypatch.setattr('moe_jax.runs.train.compiled_step', crashing)
  more = [f"--gin.LOCAL_CHECKPOINT_DIR='{disk}'", '--gin.LOCAL_CHECKPOINT_PERIOD=2', '--gin.CHECKPOINT_PERIOD=100']
  more += ['--gin.EVAL_PERIOD=100', '--gin.STRATEGY=None']
  with pytest.raises(RuntimeError, match='crash'):
    run.main(['--debug', *arguments(folder, *more)])
  while not list(disk.glob('*/process_0/4')):  # is written by a thread
    time.sleep(0.01)
  assert not list((folder / 'checkpoints').glob('[0-9]*'))
  told = {line['step']: line['loss'] for line in lines(folder / 'metrics.jsonl')}

  # There is nothing left to train for one that wants less, and the steps in between are not lost.
  gin.clear_config()
  assert run.main(['--debug', *arguments(folder, *more, '--gin.TRAIN_STEPS=4')]) == 0
  said = capsys.readouterr().out
  assert f'Going on from step 4 in {disk}' in said and 'Nothing left to train: TRAIN_STEPS=4' in said
  assert not list(disk.glob('*/process_0/[0-9]*')), 'it ended well'
  gin.clear_config()
  assert run.main(['--debug', *arguments(folder, *more, '--gin.TRAIN_STEPS=5')]) == 0
  again = {line['step']: line['loss'] for line in lines(folder / 'metrics.jsonl') if line['split'] == 'train'}
  assert again == told and len(told) == 5


def test_gin_reaches_what_it_may(tmp_path, capsys):
  """This library, what it builds on, and files of the user's own; neither a file nor a binding gets further."""
  (tmp_path / 'mine.py').write_text('def four(): return 4\n')
  begin = 'from __gin__ import dynamic_registration\n'
  (tmp_path / 'mine.gin').write_text(f'{begin}import mine\nGROUP_SIZE = 64\nmine.four.x = 1\n')
  (tmp_path / 'bad.gin').write_text(f'{begin}import os\nMODEL_DIR = @os.getcwd()\n')
  trained = arguments(tmp_path / 'run', '--dry_run')
  assert run.main([*trained, f'--gin_file={tmp_path / "bad.gin"}']) == 1
  assert "A gin file imports 'os', which is none of moe_jax" in capsys.readouterr().err
  gin.clear_config()
  assert run.main([*trained, "--gin.MODEL_DIR='x'\nimport os\nSPLIT=@os.getcwd()"]) == 1
  error = capsys.readouterr().err.strip()
  assert error.count('\n') == 0 and not (tmp_path / 'run').exists()
  gin.clear_config()
  assert run.main([*trained, '--gin.MODEL_DIR=@os.getcwd()']) == 1
  assert capsys.readouterr().err.count('\n') == 1


@pytest.mark.parametrize(
  'more, message',
  [
    (['--gin.NUM_EXPERTS=6', "--gin.MESH={'data': 2, 'expert': 4}"], 'NUM_EXPERTS=6 does not divide'),
    (['--gin.NUM_EXPERT=6'], 'did you mean NUM_EXPERTS?'),
    (['--gin.mlp.Mlp.hiden_dim=6'], 'did you mean hidden_dim?'),
    (['--gin.BATCH_SIZE=30'], 'BATCH_SIZE=30 does not divide over 8'),
    (['--gin.BATCH_SIZE=8', '--gin.MICROBATCHES=3'], 'in 3 microbatches: use a multiple of 24'),
    (['--gin.MICROBATCHES=0'], 'MICROBATCHES=0: a whole number of at least 1'),
    (['--gin.EVAL_PERIOD=0'], 'EVAL_PERIOD=0'),
    (['--gin.NUM_LAYERS=0'], 'NUM_LAYERS=0'),
    (['--gin.MODEL_DIR=/tmp/x'], 'Text needs quotes'),
    (['--prompt=hello'], '--prompt says nothing to --run_mode=train'),
    (["--gin.MODEL_DIR='s3://bucket/x'"], 'is remote'),
    (["--gin.REMAT='some'"], "REMAT='some' is none of none, dots, full"),
    (['--gin.GROUP_SIZE=48'], 'GROUP_SIZE=48 does not divide sequences of 64: 32 and 64 would.'),
    (["--gin.MESH={'data': 3}"], 'needs 3 devices and there are 8'),
    (["--gin.MESH={'date': 8}"], "unknown axis 'date'"),
    (["--gin.MESH={'expert': 2, 'sequence': 4}"], 'GROUP_SIZE=64 does not divide the 16 tokens of a sequence'),
    (
      ["--gin.MESH={'sequence': 8}", "--gin.TASK_FEATURE_LENGTHS={'targets': 60}"],
      'do not divide over the mesh axis seq',
    ),
    (['--gin.EXPERT_EVERY=3'], 'EXPERT_EVERY=3 does not divide NUM_LAYERS=2'),
    (["--gin.MODEL_DIR='/dev/null/here'"], "MODEL_DIR '/dev/null/here' cannot be written to"),
    (["--gin.MIXTURE_OR_TASK_NAME='local_text_ml'"], "did you mean 'local_text_lm'?"),
    (['--gin.VOCAB_SIZE=128'], 'VOCAB_SIZE=128 is less than'),
    (['--gin_file=gin/experiments/nothing.gin'], 'nothing.gin'),
    (['--gin.NUM_EXPERTS=)'], 'NUM_EXPERTS'),
    (["--gin.TRAINABLE=('exprts',)"], "no parameter has 'exprts' in its path"),
    (['--gin.SKIP_ABOVE=0.5'], 'SKIP_ABOVE=0.5: a multiple'),
    (["--gin.INITIAL_CHECKPOINT_PATH='nowhere'"], "INITIAL_CHECKPOINT_PATH='nowhere' holds no checkpoint"),
    (['--quick'], "Unknown argument '--quick'"),
  ],
)
def test_bad_input_gets_one_line(tmp_path, capsys, more, message):
  assert run.main(['--run_mode=train', *arguments(tmp_path / 'run', *more)]) != 0
  error = capsys.readouterr().err.strip()
  assert message in error
  assert error.count('\n') == 0 and 'Traceback' not in error


def test_every_macro_works_alone(tmp_path):
  """Each can be overridden by itself on the command line."""
  overrides = ['NUM_EXPERTS=4', 'EXPERT_EVERY=1', 'EXPERT_EVERY=0', 'CAPACITY_FACTOR=1.0', 'EMBED_DIM=64', 'MLP_DIM=96']
  overrides += ['NUM_LAYERS=8', "MESH={'data': 2, 'expert': 2, 'model': 2}", 'BATCH_SIZE=16', 'DROPOUT_RATE=0.1']
  overrides += ["DTYPE='bfloat16'", 'SCAN=False', "REMAT='none'", "MESH={'data': 2, 'expert': 2, 'sequence': 2}"]
  cases = [('quickstart', override) for override in overrides]
  cases += [('st_moe_tiny', override) for override in ('EXPERT_EVERY=2', 'EXPERT_EVERY=0', 'NUM_LAYERS=8')]
  for experiment, override in cases:
    gin.clear_config()
    flags = [f'--gin_file=gin/experiments/{experiment}.gin', '--gin.NUM_LAYERS=2', f'--gin.{override}']
    assert run.main(['--debug', '--dry_run', *flags]) == 0
