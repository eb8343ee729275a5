"""The training loop: restore or begin, train, evaluate, save, and tell how it went."""

import contextlib
import functools
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax import sharding
from moe_jax.analysis import compression
from moe_jax.analysis.flops import forward_flops
from moe_jax.analysis.forward_pass import trace_forward
from moe_jax.analysis.parameters import bytes_per_device, count_parameters, exchanged_bytes_per_token
from moe_jax.decode import Strategy
from moe_jax.objectives import LanguageModeling
from moe_jax.runs import infer
from moe_jax.runs.hosts import Preemption
from moe_jax.runs.initial import Initial
from moe_jax.runs.progress import Profiler, Progress, describe_loss, say
from moe_jax.runs.report import report
from moe_jax.runs.roll_back import LossWatch
from moe_jax.runs.setup import (
  Data,
  Devices,
  Program,
  at_least_one,
  build,
  compiled_step,
  locked,
  open_model_dir,
  use_compilation_cache,
  variables_of,
)
from moe_jax.runs.teacher import Taught, Teacher, check_vocabularies
from moe_jax.training.checkpoints import Checkpointer
from moe_jax.training.emergency import LocalCheckpoints, forget_local_checkpoints
from moe_jax.training.metrics import MetricsLog, averaged, with_bits_per_byte
from moe_jax.training.state import OptimizerFactory, TrainState
from moe_jax.training.step import eval_step
from moe_jax.types import Batch, ConfigError, Preempted


def train(
  model_dir: str,
  objective: LanguageModeling,
  optimizer: OptimizerFactory,
  data: Data,
  devices: Devices,
  train_steps: int,
  eval_steps: int,
  eval_period: int,
  checkpoint_period: int,
  log_period: int = 10,
  checkpoints_to_keep: int = 2,
  microbatches: int = 1,
  initial: Initial | None = None,
  trainable: Sequence[str] = (),
  roll_back: float | None = None,
  teacher: Teacher | None = None,
  soft_steps: int | None = None,
  seed: int = 0,
  strategy: Strategy | None = None,
  max_new_tokens: int = 128,
  async_checkpoints: bool = True,
  local_checkpoint_dir: str | None = None,
  local_checkpoint_period: int = 100,
  compilation_cache: str | None = None,
  profile_steps: str | None = None,
  dry_run: bool = False,
  config: str = '',
) -> dict[str, Any]:
  """Trains a model, or goes on with one that was interrupted in `model_dir`.

  Args:
    model_dir: where the run lives; holds config.gin, metrics.jsonl, TensorBoard files, checkpoints/ and report.html,
      and where they were needed damaged_checkpoints/ and places/ (in the data, of local checkpoints).
    objective: model and loss.
    optimizer: makes the optimizer.
    data: what to train on.
    devices: where to train.
    train_steps: steps in all, counted from the first start; 0 saves what a run would begin with.
    eval_steps: validation batches at each evaluation.
    eval_period, checkpoint_period, log_period: in steps.
    checkpoints_to_keep: the newest so many.
    microbatches: pieces of each batch, to save memory.
    initial: weights to begin with, where there is nothing to go on with; None draws them at random.
    trainable: which parameters, see `optimizers.trainable_mask`, to tell of to the optimizer too; () is all.
    roll_back: goes back to an earlier checkpoint, and on with other batches, when losses exceed the recent ones by so
      many standard deviations, see `LossWatch`; None stops at a loss that is no number.
    teacher: whose predictions the batches have too, for the objective to make something of.
    soft_steps: so many batches of the run have them; None is all.
    seed: of weights, dropout and jitter; `data` has its own.
    strategy: how to go on from a validation text at the end, to show what was learnt; None does not.
    max_new_tokens: how far.
    async_checkpoints: writes them while training goes on.
    local_checkpoint_dir: on each host's own disk, for checkpoints in between, see `LocalCheckpoints`; None has none.
    local_checkpoint_period: of these, in steps.
    compilation_cache: folder where what is compiled is kept for the next start; None does not.
    profile_steps: 'first:last', steps to trace with JAX's profiler into `model_dir`/profile.
    dry_run: builds everything, says how large it is, and stops.
    config: the operative configuration, kept beside the results.

  Returns:
    What `summary.json` holds.

  Raises:
    ConfigError: if the pieces do not fit together, another process trains in `model_dir`, or the loss is no longer a
      number.
    Preempted: on SIGTERM, when all is saved.
  """
  at_least_one(
    EVAL_STEPS=eval_steps, EVAL_PERIOD=eval_period, CHECKPOINT_PERIOD=checkpoint_period,
    LOG_PERIOD=log_period, MICROBATCHES=microbatches, BATCH_SIZE=data.batch_size,
    LOCAL_CHECKPOINT_PERIOD=local_checkpoint_period,
  )  # fmt: skip
  if not isinstance(train_steps, int) or train_steps < 0:
    raise ConfigError(f'TRAIN_STEPS={train_steps!r}: a whole number is wanted; 0 saves what a run would begin with.')
  started = time.perf_counter()
  profiler = Profiler(profile_steps)
  use_compilation_cache(compilation_cache)
  program = build(objective, optimizer, data, devices, seed, microbatches)
  summary = describe(program)
  say(f'{summary["parameters"]:,} parameters, {summary["active_parameters"]:,} active per token')
  say(f'{summary["devices"]} {summary["platform"]} devices, mesh {summary["mesh"]}')
  say('bytes per device: ' + ', '.join(f'{name} {size:,}' for name, size in summary['bytes_per_device'].items()))
  if dry_run:
    with program.activate():  # traces the whole step, where what does not fit shows
      compiled_step(program, objective, microbatches).eval_shape(program.state_spec, program.batch_spec)
    return summary

  folder, main = open_model_dir(model_dir), jax.process_index() == 0
  objective = data.tell_bytes(objective)

  saving: dict[str, Any] = {'keep': checkpoints_to_keep, 'asynchronous': async_checkpoints}
  with contextlib.ExitStack() as stack:
    stack.enter_context(program.activate())
    stack.enter_context(locked(folder))
    local = stack.enter_context(LocalCheckpoints(local_checkpoint_dir, folder)) if local_checkpoint_dir else None
    checkpointer = stack.enter_context(Checkpointer(folder, **saving))  # whole before the local ones go
    # ---- Begin, or go on --------------------------------------------------------------------------------------------
    begin = functools.partial(data.batches, program.mesh, 'train')
    newest = checkpointer.latest_step()
    if local and (found := local.restore(program.state_spec, begin, after=newest)):
      state, batches = found
      say(f'Going on from step {int(state.step)} in {local.directory}, local checkpoints of each host')
    else:
      batches = begin()
      if newest is None:
        state = (initial or Initial()).state(program)
      else:
        state = checkpointer.restore(program.state_spec, batches)
        if state.opt_state is None:
          state, batches = program.with_fresh_optimizer(state), begin()
        say(f'Going on from step {int(state.step)} in {checkpointer.directory}')
      if local:  # only now: what does not fit the run leaves them alone
        local.clear()
    if not local:
      forget_local_checkpoints(folder)
    first = step = int(state.step)
    if teacher:
      check_vocabularies(teacher, data.vocab_size)
      batches = Taught(batches, teacher, soft_steps, first)
    if main:  # only now: what does not fit the run leaves its configuration alone
      (folder / 'config.gin').write_text(config)

    # ---- Compile ----------------------------------------------------------------------------------------------------
    update = compiled_step(program, objective, microbatches, trainable, seed)
    evaluate = jax.jit(functools.partial(eval_step, objective=objective), out_shardings=program.everywhere)

    def validate(state: TrainState) -> dict[str, Any]:
      held_out = data.held_out(program.mesh)
      return with_bits_per_byte(averaged(evaluate(state, batch) for batch in itertools.islice(held_out, eval_steps)))

    # ---- Train ------------------------------------------------------------------------------------------------------
    outputs = MetricsLog(folder, resume_step=first), Progress(first, train_steps)
    with outputs[0] as log, outputs[1] as progress, Preemption(checkpointer) as preemption:
      logged, productive = time.perf_counter(), 0.0
      compiled, waiting = False, []
      watch = LossWatch(roll_back) if roll_back is not None else None
      while step < train_steps:
        step += 1
        profiler.before(step, folder)
        called = time.perf_counter()
        state, metrics = update(state, next(batches))
        if not compiled:  # the call did, which is no work on the model
          logged += time.perf_counter() - called
          compiled = True
        waiting.append((step, metrics))
        profiler.after(step, state)
        preempted = preemption.reached(step)
        last = step == train_steps or preempted
        saves, saves_locally = step % checkpoint_period == 0 or last, local and step % local_checkpoint_period == 0
        if step % log_period == 0 or step % eval_period == 0 or saves or saves_locally:
          waiting = [(number, jax.device_get(values)) for number, values in waiting]
          if (bad := diverged(waiting, watch, checkpointer)) is not None:
            state = go_back(program, checkpointer, local, watch, bad)
            step = int(state.step)
            log.drop_after(step)
            progress.note(f'The loss diverged at step {bad}: back to step {step}, and on with other batches')
            waiting, logged = [], time.perf_counter()
            if preempted:
              raise Preempted(f'SIGTERM: stopped. The same command goes on from step {step}.')
            continue
          now = time.perf_counter()
          seconds, tokens = (now - logged) / len(waiting), sum(values['target_tokens'] for _, values in waiting)
          productive += now - logged
          values = {**waiting[-1][1], 'step_seconds': seconds, 'tokens_per_second': tokens / (now - logged)}
          values['goodput'] = productive / (now - started)
          values |= {'roll_backs': watch.times} if watch else {}
          values = with_bits_per_byte(values)
          log.write(step, 'train', values)
          progress.update(step, values)
          waiting, logged = [], now
        if (step % eval_period == 0 or last) and not preempted:
          values = validate(state)
          log.write(step, 'validation', values)
          progress.note(f'step {step}: validation {describe_loss(values)}')
          summary['validation_bits_per_byte'] = values.get('bits_per_byte')
          logged = time.perf_counter()
        if keeper := checkpointer if saves else local if saves_locally else None:
          log.show()  # a run that goes on from here has no more of its lines than are there
          keeper.save(state, batches)
          logged = time.perf_counter()
        if preempted:
          checkpointer.wait()
          raise Preempted(f'SIGTERM: saved at step {step} and stopped. The same command goes on from there.')
    if first >= train_steps:
      if checkpointer.latest_step() != first:
        checkpointer.save(state, batches)
      if first == 0:
        say(f'TRAIN_STEPS=0: saved what a run would begin with in {checkpointer.directory}')
        return summary
      say(f'Nothing left to train: TRAIN_STEPS={train_steps} and the run is at step {first}.')
      summary['validation_bits_per_byte'] = validate(state).get('bits_per_byte')

    # ---- Tell -------------------------------------------------------------------------------------------------------
    summary |= baselines(program, data, eval_steps)
    if strategy:
      try:
        summary['sample'] = sample(program, variables_of(state), data, strategy, max_new_tokens)
      except ConfigError as error:  # some routers cannot generate, and the run is none the worse for it
        say(f'No sample: {error}')
  if main:
    (folder / 'summary.json').write_text(json.dumps(summary, indent=2))
    summary['report'] = str(report([str(folder)]))
    say_results(summary)
  return summary


def describe(program: Program) -> dict[str, Any]:
  """Sizes of a program, from shapes alone."""
  spec = program.state_spec
  with program.activate():
    forward = trace_forward(program.objective.model, program.batch_spec)
    count, flops, tokens = count_parameters(forward), forward_flops(forward), forward.tokens['decoder']
    sent = exchanged_bytes_per_token(forward.exchanges, tokens // sharding.shards('group'))
  sizes = {'parameters': spec.params, 'optimizer': spec.opt_state, 'gradients': spec.params}
  return {
    'parameters': count.total,
    'active_parameters': count.active,
    'forward_flops_per_token': {'active': flops.active, 'total': flops.total, **flops.by_part},
    'exchanged_bytes_per_token': sent,
    'tokens_per_step': tokens,
    'devices': program.mesh.size,
    'platform': program.mesh.devices.flat[0].platform,
    'mesh': program.mesh_axes,
    'bytes_per_device': {name: bytes_per_device(tree) for name, tree in sizes.items()},
  }


def say_results(summary: dict[str, Any]) -> None:
  """The end of the story, for a person."""
  if summary.get('validation_bits_per_byte'):
    say('\nvalidation, in bits per byte')
    for name, key in [('this model', 'validation'), ('zlib -9', 'zlib'), ('byte unigrams', 'unigram')]:
      if f'{key}_bits_per_byte' in summary:
        say(f'  {summary[f"{key}_bits_per_byte"]:6.3f}  {name}')
  if 'sample' in summary:
    say(f'\na text it has not seen\n{summary["sample"]["prompt"]}')
    say(f'\n... and how it goes on\n{summary["sample"]["continuation"]}')
  say(f'\nreport: {summary["report"]}')


def diverged(losses: Sequence[tuple[int, Any]], watch: LossWatch | None, checkpointer: Checkpointer) -> int | None:
  """The step where the run began to diverge, of steps and their metrics, or None; without a watch such a run stops."""
  for step, values in losses:
    if values.get('skipped'):
      continue
    if watch is None:
      check_finite(step, values, checkpointer)
    elif (began := watch.diverged(step, float(values['loss'] + 0 * values['parameter_norm']))) is not None:
      return began
  return None


def go_back(
  program: Program, checkpointer: Checkpointer, local: LocalCheckpoints | None, watch: Any, diverged_at: int
) -> TrainState:
  """The state of the newest checkpoint before a divergence; those after it are deleted.

  Raises:
    ConfigError: if there is none, or the run went back too often.
  """
  checkpointer.wait()
  if local:  # these may be of the steps in between, and a run that stops here must not go on from them
    local.clear()
  watch.count(diverged_at)
  before = [step for step in checkpointer.all_steps() if step < diverged_at]
  if not before:
    raise ConfigError(
      f'The loss diverged at step {diverged_at}, and no checkpoint is older: stopped. Lower the learning rate, or set a'
      ' shorter CHECKPOINT_PERIOD and more CHECKPOINTS_TO_KEEP.'
    )
  checkpointer.delete_after(before[-1])
  return checkpointer.restore(program.state_spec, step=before[-1])


def check_finite(step: int, values: Any, checkpointer: Checkpointer) -> None:
  """Stops a run whose loss or gradient is no longer a number, before that is saved."""
  for name in ('loss', 'gradient_norm', 'parameter_norm'):
    if not np.isfinite(values[name]):
      checkpointer.wait()
      saved = checkpointer.latest_step()
      safe = f'the checkpoint of step {saved} is whole' if saved is not None else 'nothing was saved yet'
      raise ConfigError(
        f'The {name.replace("_", " ")} is {values[name]} at step {step}: stopped; {safe}. Lower the learning rate.'
      )


def baselines(program: Program, data: Data, eval_steps: int) -> dict[str, float]:
  """What a byte-unigram model and `zlib -9` need for the bytes that validation measured, where tokens are bytes."""
  from moe_jax.data import bytes_of

  vocabulary = data.vocabulary()
  fetch = jax.jit(lambda rows: rows, out_shardings=program.everywhere)  # whole, on every host

  def text(batches: Iterator[Batch]) -> bytes:
    targets = (fetch(batch['decoder_target_tokens']) for batch in itertools.islice(batches, eval_steps))
    return b''.join(bytes_of(np.asarray(rows), vocabulary) for rows in targets)

  held_out, seen = text(data.held_out(program.mesh)), text(data.batches(program.mesh, 'train'))
  if not held_out:
    return {}
  return {
    'unigram_bits_per_byte': compression.unigram_bits_per_byte(seen, held_out),
    'zlib_bits_per_byte': compression.zlib_bits_per_byte(held_out),
  }


def sample(program: Program, variables: Any, data: Data, strategy: Strategy, max_new_tokens: int) -> dict[str, str]:
  """A text that was held out, and how the model goes on from it."""
  example = next(infer.task_examples(program, data, 'validation'))
  written = infer.continue_example(program, variables, data, example, strategy, max_new_tokens)
  return {'prompt': example.text, 'continuation': written}
