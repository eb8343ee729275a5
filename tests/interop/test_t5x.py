"""Under T5X a model computes what it does under our trainer. Skipped where T5X is not installed."""

import functools
import math
import os
import pathlib
import re
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest

from moe_jax import sharding
from moe_jax.decode import Sampling, decode
from moe_jax.interop.t5x_checkpoints import from_checkpoint, to_checkpoint
from moe_jax.moe.dispatchers.all_to_all import all_to_all
from moe_jax.moe.routers.bias_balanced import BiasBalancedRouter
from moe_jax.moe.routers.top_k import TopKRouter
from moe_jax.objectives import LanguageModeling
from moe_jax.training.checkpoints import Checkpointer
from moe_jax.training.optimizers import adafactor, inverse_sqrt
from moe_jax.training.state import TrainState, init_state
from moe_jax.training.step import eval_step, train_step
from moe_jax.types import ConfigError
from tests import tiny

REASON = 'T5X is on no package registry: README.md, "T5X as the engine", says how to install it'
ROOT = pathlib.Path(__file__).parents[2]
STEPS, SEED = 3, 5
ST_MOE = functools.partial(
  TopKRouter, second_policy='random', second_threshold=0.2, z_loss_weight=1e-3, capacity_factor=1.25, jitter=1e-2
)
ROUTERS = {'st_moe': ST_MOE, 'bias_balanced': BiasBalancedRouter}  # the latter remembers
KINDS = {'encoder_decoder': tiny.encoder_decoder, 'decoder_only': tiny.decoder_only}
OPTIMIZER = functools.partial(adafactor, learning_rate=inverse_sqrt(0.05, 100))


@pytest.fixture(scope='module')
def engine() -> Any:
  """Our side of T5X."""
  pytest.importorskip('t5x', reason=REASON)
  from moe_jax.interop import t5x

  return t5x


class Setup(NamedTuple):
  """The same model for both engines. T5X's `trainer` begins with `state`, as ours does."""

  model: Any
  trainer: Any
  axes: Any
  initializer: Any
  state: TrainState
  objective: LanguageModeling
  transform: optax.GradientTransformation
  mesh: Any
  rules: Any
  batches: Any


@pytest.fixture
def prepare(engine: Any, mesh: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
  """`prepare(kind, router)` on our mesh of 2 x 4 devices; with `own`, T5X on a mesh as it makes them itself."""
  import seqio
  from t5x import trainer as trainers
  from t5x import utils

  monkeypatch.setattr(engine.data, 'token_bytes', lambda vocabulary: ())

  def make(kind: str, router: str, own: bool = False, **options: Any) -> Setup:
    objective = LanguageModeling(KINDS[kind](router=ROUTERS[router], **options), z_loss=1e-4)
    ours, rules = mesh(data=2, expert=4), sharding.replicated_rules()

    class Devices:
      axis_rules = sharding.data_model_rules() if own else rules

      def make_mesh(self) -> Any:
        return jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ('data', 'model')) if own else ours

    partitioner = engine.Partitioner(Devices())
    vocabulary = seqio.ByteVocabulary()
    model = engine.LanguageModel(objective, OPTIMIZER, vocabulary, kind, Sampling(temperature=0))
    batches = [tiny.batch(encoder=kind == 'encoder_decoder', seed=seed) for seed in range(STEPS)]
    initializer = utils.TrainStateInitializer(
      model.optimizer_def, model.get_initial_variables, {k: x.shape for k, x in batches[0].items()}, partitioner
    )
    with sharding.activate(ours, rules):
      spec = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batches[0].items()}
      make_state, _, transform = init_state(objective, OPTIMIZER, spec, ours, SEED)
      state = make_state()
    theirs = initializer.from_scratch(jax.random.PRNGKey(0))
    theirs = theirs.replace_params(jax.tree.map(lambda _, x: x, theirs.params, jax.tree.map(np.asarray, frozen(state))))
    trainer = trainers.Trainer(
      model, theirs, partitioner, [], None, initializer.train_state_axes, jax.random.PRNGKey(0), lambda step: 0.0, None
    )
    return Setup(
      model, trainer, initializer.train_state_axes, initializer, state, objective, transform, ours,
      rules, batches,
    )  # fmt: skip

  return make


def frozen(state: TrainState) -> Any:
  from flax.core import freeze

  return freeze(state.params)


def assert_same(actual: Any, expected: Any) -> None:
  from flax.core import unfreeze

  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(unfreeze(actual)), jax.tree.leaves(unfreeze(expected)), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
  ('kind', 'router', 'own'),
  [('encoder_decoder', 'st_moe', False), ('decoder_only', 'st_moe', True), ('decoder_only', 'bias_balanced', False)],
)
def test_both_engines_train_alike(
  kind: str, router: str, own: bool, prepare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Losses, metrics, parameters and memories, step by step, with the same random draws."""
  setup = prepare(kind, router, own)
  draws = lambda step: jax.random.split(jax.random.fold_in(jax.random.key(SEED), step), 1)[0]  # noqa: E731
  monkeypatch.setattr(setup.trainer, '_get_step_rng', draws)  # as `train_step` and one microbatch draw
  with sharding.activate(setup.mesh, setup.rules):
    ours = jax.jit(functools.partial(train_step, objective=setup.objective, transform=setup.transform, seed=SEED))
    rows = sharding.named_sharding(setup.mesh, 'batch', None)
  state, expected = setup.state, []
  for batch in setup.batches:
    with sharding.activate(setup.mesh, setup.rules):
      state, metrics = ours(state, jax.device_put(batch, rows))
    expected.append(jax.device_get(metrics))
  for batch, ours_were in zip(setup.batches, expected, strict=True):
    theirs = setup.trainer.train(iter([batch]), 1).result()
    assert math.isclose(theirs['loss'].value, ours_were['loss'], rel_tol=1e-5), (theirs['loss'], ours_were['loss'])
    for name, value in ours_were.items():
      if name not in ('gradient_norm', 'parameter_norm'):
        np.testing.assert_allclose(theirs[name].value, np.mean(value), rtol=1e-4, atol=1e-5, err_msg=name)
  assert any('/moe/expert_load' in name for name in theirs) and (router != 'st_moe' or theirs['aux_loss'].value > 0)
  assert_same(setup.trainer.train_state.params, state.params)
  assert_same(setup.trainer.train_state.flax_mutables, state.variables)
  assert bool(state.variables) == (router == 'bias_balanced')


def test_constraints_hold_under_a_mesh_that_t5x_enters(prepare: Any) -> None:
  """The compiled step exchanges tokens with experts as our trainer's does, and gathers them nowhere."""
  setup = prepare('encoder_decoder', 'st_moe', dispatcher=all_to_all)
  theirs = setup.trainer._partitioned_train_step.lower(setup.trainer.train_state, setup.batches[0])
  with sharding.activate(setup.mesh, setup.rules):
    step = functools.partial(train_step, objective=setup.objective, transform=setup.transform)
    rows = jax.device_put(setup.batches[0], sharding.named_sharding(setup.mesh, 'batch', None))
    ours = jax.jit(step, out_shardings=(jax.tree.map(lambda x: x.sharding, setup.state), None)).lower(setup.state, rows)
  exchanges, gathers = moves(theirs.compile().as_text())
  assert len(exchanges) >= 2 * 2 * 2  # on either side there and back, forward and backward
  assert exchanges == moves(ours.compile().as_text())[0]
  assert not [shape for shape in gathers if shape[-1] == tiny.WIDTH], gathers


def moves(text: str) -> tuple[list[Any], list[Any]]:
  """Shapes of what is exchanged all to all, and of what is gathered, sorted."""
  found = re.findall(r'= \(?\w+\[([\d,]+)\].*? (all-to-all|all-gather)(?:-start)?\(', text)
  shapes = [(kind, tuple(map(int, shape.split(',')))) for shape, kind in found]
  return tuple(sorted(shape for name, shape in shapes if name == kind) for kind in ('all-to-all', 'all-gather'))


def test_evaluation_and_prediction(engine: Any, prepare: Any) -> None:
  """Of rows that are not packed, whose segments and positions seqio leaves out."""
  setup = prepare('encoder_decoder', 'st_moe')
  partitioner, axes, state = setup.trainer._partitioner, setup.axes, setup.trainer.train_state
  whole = setup.batches[0]
  real = np.arange(whole['decoder_target_tokens'].shape[1]) < 20
  rows = {
    **{f'{side}_segment_ids': np.broadcast_to(real, x.shape).astype(np.int32) for side, x in sides(whole)},
    **{f'{side}_positions': np.broadcast_to(np.arange(x.shape[1]), x.shape) for side, x in sides(whole)},
    **{name: np.where(real, np.maximum(x, 1), 0) for name, x in whole.items() if name.endswith('tokens')},
    'decoder_loss_weights': np.broadcast_to(real, whole['decoder_loss_weights'].shape).astype(np.float32),
  }
  rows['decoder_input_tokens'] = np.pad(rows['decoder_target_tokens'][:, :-1], ((0, 0), (1, 0))) * real
  unpacked = {name: x for name, x in rows.items() if not name.endswith(('segment_ids', 'positions'))}

  def theirs(function: Any) -> Any:
    in_axes = (axes.params, partitioner.data_partition_spec)
    return partitioner.partition(function, in_axes, None)(state.params, unpacked)

  with sharding.activate(setup.mesh, setup.rules):
    ours = jax.jit(functools.partial(eval_step, objective=setup.objective))(setup.state, rows)
    start = {
      **{name: x for name, x in rows.items() if name.startswith('encoder_')},
      'decoder_input_tokens': np.zeros((len(real), 1), np.int32),
      'decoder_segment_ids': np.ones((len(real), 1), np.int32),
    }
    options = {'max_new_tokens': len(real), 'strategy': Sampling(temperature=0), 'eos_id': 1, 'key': jax.random.key(0)}
    tokens, scores = jax.jit(functools.partial(decode, setup.objective.model, **options))(
      {'params': setup.state.params}, start
    )
  loss, metrics = theirs(setup.model.eval_fn)
  np.testing.assert_allclose(loss, ours['loss'], rtol=1e-5)
  np.testing.assert_allclose(metrics['accuracy'].compute(), ours['accuracy'], rtol=1e-5)
  log_probs = theirs(setup.model.score_batch)
  np.testing.assert_allclose(-np.sum(log_probs) / real.sum() / len(real), ours['cross_entropy'], rtol=1e-5)
  predicted, more = theirs(setup.model.predict_batch_with_aux)
  np.testing.assert_array_equal(predicted, tokens[:, 0])
  np.testing.assert_allclose(more['scores'], scores[:, 0], rtol=1e-5)
  assert np.unique(predicted).size > 1


def sides(batch: Any) -> Any:
  return [(side, batch[f'{side}_input_tokens']) for side in ('encoder', 'decoder')]


def test_a_decoder_alone_goes_on_from_its_inputs(engine: Any) -> None:
  """Where seqio marks the inputs, and the token before them, among the decoder's."""
  batch = {
    'decoder_input_tokens': np.array([[0, 5, 6, 7, 8]]),
    'decoder_target_tokens': np.array([[5, 6, 7, 8, 1]]),
    'decoder_causal_attention': np.array([[1, 1, 1, 0, 0]]),
  }
  made = engine.prompts(batch)
  np.testing.assert_array_equal(made['decoder_input_tokens'], [[0, 5, 6, 0, 0]])
  np.testing.assert_array_equal(made['decoder_segment_ids'], [[1, 1, 1, 0, 0]])


def test_checkpoints_there_and_back(engine: Any, prepare: Any, tmp_path: pathlib.Path) -> None:
  """T5X restores what we wrote, and we what T5X did, to the bit."""
  from t5x import utils

  setup = prepare('decoder_only', 'bias_balanced')
  state = setup.state.replace(step=np.int32(7), opt_state=None)
  state = state.replace(variables=jax.tree.map(lambda x: x + 1, state.variables))
  written = to_checkpoint(state, str(tmp_path / 'theirs'))
  assert written.name == 'checkpoint_7'

  # T5X's evaluation reads it.
  partitioner = setup.trainer._partitioner
  shapes = {name: x.shape for name, x in setup.batches[0].items()}
  initializer = utils.TrainStateInitializer(None, setup.model.get_initial_variables, shapes, partitioner)
  config = utils.RestoreCheckpointConfig(path=str(written), mode='specific', strict=False)
  restored, _ = utils.create_checkpoint_manager_and_restore(
    initializer, partitioner, config, str(written), None, use_orbax=True
  )
  assert int(restored.step) == 7
  assert_equal(restored.params, state.params)
  assert_equal(restored.flax_mutables, state.variables)

  # T5X's trainer writes, our checkpointer keeps what is read of it.
  setup.trainer.train(iter(setup.batches), 2).result()
  theirs = setup.trainer.train_state
  (tmp_path / 'more').mkdir()
  save = utils.SaveCheckpointConfig(period=1)
  config = utils.RestoreCheckpointConfig(path=[])
  manager = utils.create_orbax_checkpoint_manager(
    save_cfg=save, restore_cfg=config, train_state=theirs, partitioner=partitioner, model_dir=str(tmp_path / 'more')
  )
  manager.save(theirs)
  manager.close()
  read = from_checkpoint(str(tmp_path / 'more'))
  assert int(read.step) == 2 and read.opt_state is None
  assert_equal(theirs.params, read.params)
  assert_equal(theirs.flax_mutables, read.variables)
  with Checkpointer(tmp_path / 'ours') as checkpointer:
    checkpointer.save(read)
    checkpointer.wait()
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), setup.state)
    kept = checkpointer.restore(spec)
  assert int(kept.step) == 2
  assert_equal(theirs.params, kept.params)
  assert_equal(theirs.flax_mutables, kept.variables)


def assert_equal(actual: Any, expected: Any) -> None:
  from flax.core import unfreeze

  jax.tree.map(np.testing.assert_array_equal, unfreeze(actual), unfreeze(expected))


def test_no_checkpoint_gets_one_clear_line(tmp_path: pathlib.Path) -> None:
  with pytest.raises(ConfigError, match='No checkpoint of T5X in'):
    from_checkpoint(str(tmp_path))


def test_t5x_trains(engine: Any, tmp_path: pathlib.Path) -> None:
  """`python -m t5x.train`, 20 steps of the small ST-MoE on eight pretended devices: the loss falls."""
  bindings = {'TRAIN_STEPS': 20, 'LOG_PERIOD': 1, 'EVAL_PERIOD': 20, 'EVAL_STEPS': 1, 'CHECKPOINT_PERIOD': 20}
  bindings |= {'NUM_LAYERS': 4, 'MODEL_DIR': f"'{tmp_path}'"}
  command = [sys.executable, '-m', 't5x.train', '--gin_search_paths=.', '--gin_file=gin/t5x/st_moe_tiny.gin']
  command += [f'--gin.{name}={value}' for name, value in bindings.items()]
  environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
  assert run.returncode == 0, run.stderr[-2000:]
  losses = [float(x) for x in re.findall(r'\] \[\d+\] collection=train .*\bloss=([\d.]+)', run.stderr)]
  assert len(losses) == 20 and np.isfinite(losses).all(), run.stderr[-2000:]
  assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:2]), losses
  saved = from_checkpoint(str(tmp_path))
  assert int(saved.step) == 20 and 'encoder' in saved.params
