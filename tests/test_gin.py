"""Every gin file is good for something."""

import dataclasses
import pathlib
import re
import warnings

import gin
import jax
import numpy as np
import pytest

import run
from moe_jax import sharding
from moe_jax.runs.setup import build, compiled_step
from moe_jax.runs.train import train

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / 'gin'
EXPERIMENTS = sorted(FOLDER.glob('experiments/*.gin'))
KINDS = 'routers', 'experts', 'dispatchers', 'meshes', 'optimizers'
MODELS = sorted(FOLDER.glob('models/*/*.gin'))
TASKS = sorted(FOLDER.glob('tasks/*.gin'))
CHOICES = sorted(path for kind in KINDS for path in FOLDER.glob(f'{kind}/*.gin'))


pytestmark = pytest.mark.usefixtures('fresh_gin')


@pytest.mark.parametrize('experiment', EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_build_and_trace(experiment):
  # One is made for one device, and here are eight.
  more = ['--gin.BATCH_SIZE=128', '--gin.FAKE_DEVICES=8'] if experiment.stem == 'sweep_tiny' else []
  assert run.main(['--debug', '--dry_run', f'--gin_file={experiment}', *more]) == 0


SAME_BUT_FOR_SIZE = {  # experiment -> one that is the same at toy size, and stands for it
  **dict.fromkeys(['glam_1_7b_64e', 'glam_8b_64e', 'glam_64b_64e'], 'glam_0_1b_64e'),
  'st_moe_l': 'st_moe_32b',
  'switch_large': 'switch_base',
}
SOON = 'glam_0_1b_64e', 'st_moe_32b', 'switch_base', 'mixtral_8x7b', 'deepseek_moe_16b', 'pyramid'  # of each kind one
STEPPED = [
  pytest.param(path.stem, marks=() if path.stem in SOON else pytest.mark.slow)
  for path in EXPERIMENTS
  if path.stem not in SAME_BUT_FOR_SIZE
]


def toy(name, *files):
  """The configuration of an experiment at toy size, as gin has it, but for what a step does not depend on."""
  gin.clear_config()
  run.parse_gin('train', [f'gin/experiments/{name}.gin', 'tests/toy.gin', *files], [], ['.'])
  loop = r'(MODEL_DIR|EVAL_\w+|CHECKPOINT_\w+|LEARNING_RATE|WARMUP_STEPS|TASK_FEATURE_LENGTHS) = .*\n'
  return re.sub(loop, '', re.sub(r'^#.*\n', '', gin.config_str(), flags=re.MULTILINE))


@pytest.mark.parametrize('experiment', SAME_BUT_FOR_SIZE)
def test_some_experiments_differ_in_size_alone(experiment):
  assert toy(experiment) == toy(SAME_BUT_FOR_SIZE[experiment])


assert set(SOON) <= {path.stem for path in EXPERIMENTS} - set(SAME_BUT_FOR_SIZE)


def take_two_steps():
  """All that gin says, on eight devices and random tokens: two steps, and a loss of about that of a guess."""
  bound = gin.get_bindings(train)
  data = dataclasses.replace(bound['data'], lengths=dict.fromkeys(bound['data'].lengths, 32))
  program = build(bound['objective'], bound['optimizer'], data, bound['devices'])
  assert program.mesh.size == 8
  rng = np.random.default_rng(0)
  with program.activate():
    rows = sharding.named_sharding(program.mesh, 'batch', None)
    batch = {}
    for name, spec in program.batch_spec.items():
      whole = np.ones(spec.shape) if 'segment' in name or 'weights' in name else np.arange(spec.shape[1])[None]
      values = rng.integers(1, 300, spec.shape) if 'tokens' in name else np.broadcast_to(whole, spec.shape)
      batch[name] = jax.device_put(values.astype(spec.dtype), rows)
    state, step = program.make_state(), compiled_step(program, bound['objective'])
    for _ in range(2):
      state, metrics = jax.block_until_ready(step(state, batch))
  assert int(state.step) == 2
  assert 4 < float(metrics['cross_entropy']) < 12 and float(metrics['gradient_norm']) > 0


@pytest.mark.parametrize('experiment', STEPPED)
def test_experiments_take_a_step_at_toy_size(experiment):
  toy(experiment)
  take_two_steps()


@pytest.mark.parametrize('choice', CHOICES, ids=lambda path: str(path.relative_to(FOLDER).with_suffix('')))
def test_every_choice_goes_with_the_quickstart(choice):
  files = [f'--gin_file={FOLDER}/experiments/quickstart.gin', f'--gin_file={choice}']
  assert run.main(['--debug', '--dry_run', *files, '--gin.NUM_LAYERS=2']) == 0  # of each kind one


@pytest.mark.slow
@pytest.mark.parametrize('choice', CHOICES, ids=lambda path: str(path.relative_to(FOLDER).with_suffix('')))
def test_every_choice_takes_a_step_at_toy_size(choice):
  toy('quickstart', choice)
  take_two_steps()


@pytest.mark.slow
@pytest.mark.parametrize('model', MODELS, ids=lambda path: path.stem)
def test_every_model_takes_a_step_at_toy_size(model):
  experiment = {'decoder_only': 'quickstart', 'encoder_decoder': 'st_moe_tiny'}[model.parent.name]
  toy(experiment, model, 'gin/routers/top_2.gin', 'gin/at_scale.gin', 'gin/optimizers/adafactor.gin', 'tests/toy.gin')
  take_two_steps()


@pytest.mark.slow
@pytest.mark.parametrize('task', TASKS, ids=lambda path: path.stem)
def test_every_task_has_what_a_step_takes(task):
  toy('st_moe_tiny' if 'encoder-decoder' in task.read_text() else 'quickstart', task)
  take_two_steps()


def parameters(capsys, *flags):
  """What a dry run says that there are: in all, and active per token."""
  gin.clear_config()
  assert run.main(['--debug', '--dry_run', *flags]) == 0
  found = re.search(r'([\d,]+) parameters, ([\d,]+) active', capsys.readouterr().out)
  return [int(number.replace(',', '')) for number in found.groups()]


def test_kinds_of_experts_have_the_parameters_they_should(capsys):
  """The quickstart has 2 sparse layers of 8 experts, 128 to 512 to 128, 2 of them active."""
  quickstart = '--gin_file=gin/experiments/quickstart.gin'
  total, active = parameters(capsys, quickstart)
  expert, gated, router = 2 * 128 * 512, 3 * 128 * 512, 128 * 8
  shared = parameters(capsys, quickstart, '--gin_file=gin/experts/shared.gin')
  assert shared == [total + 2 * gated, active + 2 * gated]
  fine = parameters(capsys, quickstart, '--gin_file=gin/experts/fine_grained.gin')
  assert fine == [total + 2 * 3 * router, active + 2 * 3 * router]
  extra = parameters(capsys, quickstart, '--gin_file=gin/experts/extra_mlp.gin')  # and its norm's scale
  assert extra == [total + 2 * (3 * 128 * 384 + 128), active + 2 * (3 * 128 * 384 + 128)]
  linear = parameters(capsys, quickstart, '--gin_file=gin/experts/linear.gin')
  assert linear == [total + 2 * 8 * (128 * 128 - expert), active + 2 * 2 * (128 * 128 - expert)]
  attention = parameters(capsys, quickstart, '--gin_file=gin/experts/attention.gin')  # 4 layers, 3 projections
  assert attention == [total + 12 * (7 * 128 * 128 + router), active + 12 * (128 * 128 + router)]
  pyramid = parameters(capsys, '--gin_file=gin/experiments/pyramid.gin')
  assert pyramid == [total + 8 * expert + router, active + router]


def test_an_encoder_has_a_router_of_its_own_where_a_file_gives_one():
  """A router that looks ahead for the encoder, and the next file's for the decoder."""
  files = ['gin/experiments/st_moe_tiny.gin', 'gin/routers/expert_choice.gin', 'gin/routers/top_2.gin']
  with warnings.catch_warnings():
    warnings.simplefilter('error', UserWarning)  # of a router that looks ahead in a decoder
    assert run.main(['--debug', '--dry_run', *(f'--gin_file={file}' for file in files)]) == 0
  gin.clear_config()
  with pytest.warns(UserWarning, match='looks at later tokens'):
    assert run.main(['--debug', '--dry_run', *(f'--gin_file={file}' for file in files[:2])]) == 0


def test_a_name_that_nothing_reads_is_an_error_in_a_file_too(tmp_path, capsys):
  (tmp_path / 'mine.gin').write_text("include 'gin/experiments/quickstart.gin'\nEVAL_STEP = 3\n")
  assert run.main(['--dry_run', f'--gin_file={tmp_path / "mine.gin"}']) == 1
  assert 'Nothing reads EVAL_STEP: did you mean EVAL_STEPS?' in capsys.readouterr().err


def test_the_folder_is_no_package():
  assert not (FOLDER / '__init__.py').exists()
  assert 'site-packages' in gin.__file__
