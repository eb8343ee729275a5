"""Learning from another model."""

import itertools

import gin
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import run
from moe_jax.objectives import LanguageModeling, divergence
from moe_jax.runs.teacher import Taught, Teacher, check_vocabularies
from moe_jax.types import ConfigError
from tests import tiny
from tests.test_run import _clean, arguments, lines  # noqa: F401


def test_the_divergence_and_its_gradient(getkey):
  """Zero where they agree; the gradient on the student's logits is T (q - p) (Hinton et al. 2015, section 2.1)."""
  student, teacher = jax.random.normal(getkey(), (2, 5, 7)) * 3
  np.testing.assert_allclose(divergence(teacher, teacher, 2.0), 0, atol=1e-6)
  assert np.all(divergence(student, teacher) > 0)
  for temperature in (1.0, 4.0):
    grads = jax.grad(lambda x: jnp.sum(divergence(x, teacher, temperature)))(student)  # noqa: B023
    p, q = (jax.nn.softmax(x / temperature) for x in (teacher, student))
    np.testing.assert_allclose(grads, temperature * (q - p), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('hard, soft', [(1.0, 0.0), (0.75, 0.25), (0.0, 1.0)])
def test_the_loss_is_the_weighted_sum_over_real_targets(getkey, hard, soft):
  model, batch = tiny.decoder_only(), tiny.batch()
  variables = {'params': jax.jit(model.init)(jax.random.key(0), batch)['params']}
  teacher = jax.random.normal(getkey(), (*batch['decoder_target_tokens'].shape, tiny.VOCAB))

  def loss(objective, batch):
    keys = {'dropout': jax.random.key(1), 'router': jax.random.key(2)}
    return jax.jit(lambda: objective.loss(variables, objective.counted(batch), keys, train=True))()

  plain, (metrics, _) = loss(LanguageModeling(model), batch)
  taught, (told, _) = loss(
    LanguageModeling(model, hard_weight=hard, soft_weight=soft), {**batch, 'teacher_logits': teacher}
  )
  logits, _ = jax.jit(lambda: model.apply(variables, batch, train=True, rngs={'router': jax.random.key(2)}))()
  real = batch['decoder_loss_weights']
  expected = np.sum(divergence(logits, teacher) * real) / real.sum()
  assert float(told['teacher_divergence']) == pytest.approx(float(expected), rel=1e-5)
  cross_entropy = float(plain - metrics['aux_loss'])
  assert float(taught - told['aux_loss']) == pytest.approx(hard * cross_entropy + soft * float(expected), rel=1e-5)


def test_towards_the_end_a_student_is_left_alone():
  batches = Taught(itertools.repeat({'x': 1}), Teacher(lambda batch: batch['x'] + 1, 8), steps=5, first=3)
  assert [next(batches).get('teacher_logits') for _ in range(4)] == [2, 2, None, None]
  with pytest.raises(ConfigError, match='VOCAB_SIZE=8, its student 16'):
    check_vocabularies(Teacher(lambda batch: batch, 8), 16)


@pytest.mark.usefixtures('_clean')
def test_a_dense_run_is_upcycled_from_the_command_line(tmp_path, capsys):
  dense, sparse = tmp_path / 'dense', tmp_path / 'sparse'
  gated = "--gin.experts.Experts.activations=('gelu', 'linear')"
  assert run.main(arguments(dense, '--debug', '--gin.STRATEGY=None', '--gin.EXPERT_EVERY=0', gated)) == 0
  gin.clear_config()
  more = [f"--gin.INITIAL_CHECKPOINT_PATH='{dense}'", '--gin_file=gin/surgery/upcycle.gin', '--gin.TRAIN_STEPS=0']
  assert run.main(arguments(sparse, '--debug', '--gin.STRATEGY=None', gated, *more)) == 0
  assert 'saved what a run would begin with' in capsys.readouterr().out and (sparse / 'checkpoints' / '0').exists()
  losses = []
  for folder in (dense, sparse):
    gin.clear_config()
    assert run.main(['--debug', '--run_mode=eval', f'--gin_file={folder / "config.gin"}']) == 0
    losses.append(lines(folder / 'evaluation.jsonl')[-1]['cross_entropy'])
  assert losses[1] == pytest.approx(losses[0], rel=1e-6)

  gin.clear_config()
  more = [f"--gin.INITIAL_CHECKPOINT_PATH='{sparse}'", '--gin_file=gin/surgery/prune.gin', '--gin.TRAIN_STEPS=0']
  assert run.main(arguments(tmp_path / 'pruned', '--gin.NUM_EXPERTS=4', gated, *more)) == 1
  assert 'tells of no loads of experts' in capsys.readouterr().err, 'since it was never trained'


@pytest.mark.usefixtures('_clean')
def test_a_dense_student_of_a_sparse_teacher(tmp_path, capsys):
  teacher, student = tmp_path / 'teacher', tmp_path / 'student'
  quiet = ['--debug', '--gin.STRATEGY=None']
  assert run.main(arguments(teacher, *quiet, '--gin.TRAIN_STEPS=24')) == 0
  gin.clear_config()
  more = ['--gin_file=gin/distill.gin', f'--teacher={teacher}', f"--gin.INITIAL_CHECKPOINT_PATH='{teacher}'"]
  more += ['--gin.EXPERT_EVERY=0', '--gin.SOFT_STEPS=6']
  assert run.main(arguments(student, *quiet, *more)) == 0
  metrics = [line for line in lines(student / 'metrics.jsonl') if line['split'] == 'train']
  told = [line.get('teacher_divergence') for line in metrics]
  assert told[5] < told[0] and told[6:] == [None, None]
  for at in (0, 5):
    mixed = 0.75 * metrics[at]['cross_entropy'] + 0.25 * told[at]
    assert metrics[at]['loss'] == pytest.approx(mixed, abs=0.02), 'but for the z-loss'
  saved = ocp.PyTreeCheckpointer().restore(student / 'checkpoints' / '8' / 'state')
  assert not any('moe' in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(saved))
  config = (student / 'config.gin').read_text()
  assert 'EXPERT_EVERY = 0' in config and 'teacher.teacher' not in config

  gin.clear_config()
  capsys.readouterr()
  assert run.main(['--run_mode=eval', f'--teacher={teacher}', *arguments(student)]) == 1
  assert '--teacher goes with --run_mode=train' in capsys.readouterr().err
