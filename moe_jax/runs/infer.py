"""Inference: texts given by hand, or a task's examples, gone on from by a trained model and written as JSON lines."""

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax import sharding
from moe_jax.decode import Strategy, decode
from moe_jax.objectives import Objective
from moe_jax.paths import to_path
from moe_jax.runs.setup import Data, Devices, Program, at_least_one, restore, trained, variables_of
from moe_jax.types import ConfigError

Variables = Mapping[str, Any]
SHOWN = 4  # predictions that are printed


class Example(NamedTuple):
  """Attributes: text, and tokens, to go on from, BOS and EOS aside; target, the text that a task expects, if any."""

  text: str
  tokens: Sequence[int]
  target: str | None = None


def infer(
  model_dir: str,
  objective: Objective,
  data: Data,
  devices: Devices,
  strategy: Strategy,
  max_new_tokens: int,
  split: str = 'validation',
  num_examples: int | None = 16,
  step: int | None = None,
  seed: int = 0,
  prompts: Sequence[str] | None = None,
  output: str | None = None,
) -> Path:
  """Decodes with the parameters of a checkpoint; optimizer state is not read.

  Args:
    model_dir: where the run lives.
    objective: holds the model.
    data: the task, for its vocabulary and its examples.
    devices: where to run.
    strategy: how tokens are chosen.
    max_new_tokens: after each prompt, at most.
    split: of the task.
    num_examples: of the task; None for all of the split.
    step: of the checkpoint; None is the newest.
    seed: of what is drawn at random.
    prompts: texts to go on from, instead of the task's examples.
    output: file to write; None is inference.jsonl in `model_dir`. One object a line: inputs, prediction, score, target.

  Returns:
    The file written.

  Raises:
    ConfigError: if there is no such checkpoint, or an input is too long for the model.
  """
  from moe_jax.data import text_of  # imports TensorFlow

  at_least_one(MAX_NEW_TOKENS=max_new_tokens, **({} if num_examples is None else {'NUM_EXAMPLES': num_examples}))
  program, checkpointer = trained(model_dir, objective, data, devices)
  vocabulary = data.vocabulary()
  path = to_path(output or to_path(model_dir) / 'inference.jsonl')
  with program.activate(), checkpointer:
    state = restore(program, checkpointer, step)
    given = [example_of(text, data) for text in prompts or ()]
    examples = given or list(itertools.islice(task_examples(program, data, split), num_examples))
    results = generate(program, variables_of(state), data, [e.tokens for e in examples], strategy, max_new_tokens, seed)
    lines: list[dict[str, Any]] = []
    for example, (tokens, score) in zip(examples, results, strict=True):
      line = {'inputs': example.text, 'prediction': text_of(tokens.tolist(), vocabulary), 'score': float(score)}
      lines.append(line if example.target is None else {**line, 'target': example.target})
  if jax.process_index() == 0:
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    for line in lines[:SHOWN]:
      print(*(f'{name:>10}  {value!r}' for name, value in line.items()), '', sep='\n')
    print(f'{len(lines)} predictions of step {int(state.step)} in {path}')
  return path


def continue_example(
  program: Program,
  variables: Variables,
  data: Data,
  example: Example,
  strategy: Strategy,
  max_new_tokens: int,
  seed: int = 0,
) -> str:
  """What the model writes after an example's tokens, or as its output where it has an encoder."""
  from moe_jax.data import text_of

  with program.activate():
    ((tokens, _),) = generate(program, variables, data, [example.tokens], strategy, max_new_tokens, seed)
  return text_of(tokens.tolist(), data.vocabulary())


def example_of(text: str, data: Data) -> Example:
  """A text given by hand."""
  return Example(text, data.vocabulary().encode(text))


def task_examples(program: Program, data: Data, split: str) -> Iterator[Example]:
  """A task's examples in order. A text without inputs is cut in two halves: inputs and target."""
  from moe_jax.data import text_of

  vocabulary = data.vocabulary()
  fetch = jax.jit(lambda batch: batch, out_shardings=program.everywhere)  # whole, on every host
  for batch in data.batches(program.mesh, split, shuffle=False, num_epochs=1, pack=False, num_shards=1):
    rows = {name: np.asarray(value) for name, value in fetch(batch).items()}
    for targets, weights, *inputs in zip(
      rows['decoder_target_tokens'],
      rows['decoder_loss_weights'],
      *([rows['encoder_input_tokens']] if 'encoder_input_tokens' in rows else []),
    ):
      targets = targets[targets > 0]
      if not targets.size:
        continue  # the last batch is filled up with empty rows
      start = int(np.argmax(weights > 0)) or len(targets) // 2
      prompt, targets = (inputs[0][inputs[0] > 0], targets) if inputs else (targets[:start], targets[start:])
      if inputs and prompt[-1] == vocabulary.eos_id:
        prompt = prompt[:-1]
      yield Example(text_of(prompt.tolist(), vocabulary), prompt.tolist(), text_of(targets.tolist(), vocabulary))


def generate(
  program: Program,
  variables: Variables,
  data: Data,
  prompts: Sequence[Sequence[int]],
  strategy: Strategy,
  max_new_tokens: int,
  seed: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Decodes token ids, batch by batch, compiled once. Call it inside `program.activate`.

  Yields:
    For each prompt the best int32[N] tokens that follow it, and their score float32[].
  """
  yield from decoded(compiled_decode(program, data, strategy, max_new_tokens), program, variables, data, prompts, seed)


def compiled_decode(program: Program, data: Data, strategy: Strategy | None, max_new_tokens: int) -> Callable[..., Any]:
  """The jitted `decode` of the program's model, for `decoded`."""
  if strategy is None:  # as a run may have kept that wants no sample
    raise ConfigError('STRATEGY=None chooses no tokens: give one, such as --gin.STRATEGY=@decode.Sampling().')
  options = {'max_new_tokens': max_new_tokens, 'strategy': strategy, 'eos_id': data.vocabulary().eos_id}
  return jax.jit(functools.partial(decode, program.objective.model, **options), out_shardings=program.everywhere)


def decoded(
  run: Callable[..., Any],
  program: Program,
  variables: Variables,
  data: Data,
  prompts: Sequence[Sequence[int]],
  seed: int = 0,
  prompt_length: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """As `generate`, by what `compiled_decode` made; with a `prompt_length` it need not be compiled for others."""
  eos_id = data.vocabulary().eos_id
  size, ways = data.batch_size, sharding.shards('batch')
  spec, begin = data.spec(), [[0]] * len(prompts)
  if 'encoder_input_tokens' in spec:
    features = {'encoder': [[*tokens, eos_id] for tokens in prompts], 'decoder': begin}
    lengths = {'encoder': spec['encoder_input_tokens'].shape[1], 'decoder': 1}
  else:
    features = {'decoder': [[0, *tokens] for tokens in prompts]}
    lengths = {'decoder': prompt_length or max(map(len, features['decoder']), default=1)}
    size = size if prompt_length else min(size, -(-len(prompts) // ways) * ways)
  rows = sharding.named_sharding(program.mesh, 'batch', None)
  for start in range(0, len(prompts), size):
    batch = {}
    for side, sequences in features.items():
      batch |= padded(side, sequences[start : start + size], size, lengths[side])
    key = jax.random.fold_in(jax.random.key(seed), start)
    tokens, scores = run(variables, jax.device_put(batch, rows), key=key)
    count = len(prompts) - start
    yield from zip(np.asarray(tokens)[:count, 0], np.asarray(scores)[:count, 0], strict=True)


def padded(side: str, sequences: Sequence[Sequence[int]], rows: int, length: int) -> dict[str, np.ndarray]:
  """Token ids as the features int32[rows, length] of one side, 'encoder' or 'decoder'; rows are filled up with padding.

  Raises:
    ConfigError: if a sequence is too long.
  """
  if (longest := max(map(len, sequences))) > length:
    raise ConfigError(
      f'A prompt of {longest} tokens does not fit into {length}: shorten it, or raise TASK_FEATURE_LENGTHS.'
    )
  tokens, segments = np.zeros((2, rows, length), np.int32)
  for row, sequence in enumerate(sequences):
    tokens[row, : len(sequence)] = sequence
    segments[row, : len(sequence)] = 1
  positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
  return {f'{side}_input_tokens': tokens, f'{side}_segment_ids': segments, f'{side}_positions': positions}
