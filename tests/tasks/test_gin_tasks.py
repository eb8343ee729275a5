"""Every file of gin/tasks names a task that is there, and lengths and a number of ids that suit it."""

import pathlib

import gin
import pytest
import seqio
from jax.sharding import NamedSharding, PartitionSpec

import run
from moe_jax import data
from moe_jax.decode import GREEDY
from moe_jax.runs.evaluate import evaluate
from moe_jax.runs.train import train
from tasks import big_bench

FILES = sorted(pathlib.Path(__file__).parents[2].glob('gin/tasks/*.gin'))


@pytest.mark.parametrize('file', FILES, ids=lambda path: path.stem)
def test_a_file_names_a_task_and_lengths_that_suit_it(file, fresh_gin, mesh, tmp_path):
  if file.stem == 'bigbench' and 'bigbench' not in seqio.MixtureRegistry.names():
    (tmp_path / 'task.json').write_text('{"examples": [{"input": "Say hi.", "target": "hi"}]}')
    big_bench.register_big_bench(f'{tmp_path}/task.json')
  kinds = [
    (kind, converter)
    for kind, converter in (('quickstart', 'decoder_only'), ('st_moe_tiny', 'encoder_decoder'))
    if converter.replace('_', '-') in file.read_text()
  ]
  assert kinds, 'say for which models'
  for experiment, converter in kinds:
    gin.clear_config()
    run.parse_gin('train', [f'gin/experiments/{experiment}.gin', str(file)], [], ['.'])
    bound = gin.get_bindings(train)['data']
    assert bound.converter == converter
    split = 'validation' if file.stem in ('bigbench', 'local_next_text') else 'train'
    rows = NamedSharding(mesh(data=8), PartitionSpec('data'))
    data.check(bound.task, bound.lengths, 8, split, converter, rows, bound.modules, bound.vocab_size)
    if converter == 'decoder_only':
      assert (bound.lengths['targets'] + bound.lengths.get('inputs', 0)) % 128 == 0, 'groups of tokens fill rows'


@pytest.mark.parametrize('score', ['total', 'per_token', 'per_byte'])
def test_a_command_line_chooses_how_choices_are_compared(score, fresh_gin):
  files = ['gin/experiments/quickstart.gin', 'gin/tasks/arc.gin']
  run.parse_gin('eval', files, [f'SCORE = @task_metrics.{score}'], ['.'])
  chosen = gin.get_bindings(evaluate)['task_metrics']
  assert chosen.score.__name__ == score and chosen.strategy == GREEDY
