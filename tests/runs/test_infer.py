"""Inference and evaluation of a run, from its checkpoint to lines of JSON."""

import json
from functools import partial

import jax
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.decode import GREEDY, Beam
from moe_jax.layers.attention import CrossAttention, SelfAttention
from moe_jax.layers.embeddings import TokenEmbedding
from moe_jax.models.decoder_only import DecoderOnly
from moe_jax.models.encoder_decoder import EncoderDecoder
from moe_jax.models.stack import Stack
from moe_jax.moe.experts import Experts
from moe_jax.moe.moe_layer import MoELayer
from moe_jax.objectives import LanguageModeling
from moe_jax.runs import infer as inference
from moe_jax.runs.evaluate import evaluate
from moe_jax.runs.infer import infer
from moe_jax.runs.setup import Data, Devices, build
from moe_jax.training import optimizers
from moe_jax.training.checkpoints import Checkpointer
from moe_jax.training.metrics import averaged
from moe_jax.training.step import eval_step
from moe_jax.types import ConfigError

DEVICES = Devices({'data': 4, 'expert': 2}, sharding.replicated_rules(), num_experts=2)
TASKS = {
  'decoder_only': ('local_text_lm', {'targets': 16}),
  'encoder_decoder': ('local_text_span_corruption', {'inputs': 16, 'targets': 16}),
}
PROMPTS = ['abcd', 'x', 'naïve text']


def make_model(kind):
  moe = partial(MoELayer, num_experts=2, group_size=16, experts=partial(Experts, hidden_dim=8))
  attention, cross = (partial(layer, num_heads=2, head_dim=4) for layer in (SelfAttention, CrossAttention))
  embedding = partial(TokenEmbedding, vocab_size=384, embed_dim=8)
  encoder = partial(Stack, {'attention': attention, 'moe': moe}, repeats=1)
  if kind == 'decoder_only':
    return DecoderOnly(embedding, [encoder])
  return EncoderDecoder(embedding, encoder, partial(Stack, {'attention': attention, 'cross': cross}, repeats=1))


@pytest.fixture
def corpus(tmp_path, monkeypatch):
  """Twenty documents, the alphabet from another letter on each."""
  (tmp_path / 'text').mkdir()
  for number in range(20):
    (tmp_path / 'text' / f'{number}').write_text(''.join(chr(97 + (number + i) % 26) for i in range(40)))
  monkeypatch.setenv('LOCAL_TEXT_GLOB', f'{tmp_path}/text/*')


@pytest.fixture(params=TASKS)
def run(request, tmp_path, corpus):
  """A run's folder with a checkpoint of step 0, and what it was made of."""
  task, lengths = TASKS[request.param]
  data = Data(task, ('tasks.local_text',), lengths, batch_size=8, converter=request.param, vocab_size=384)
  objective = LanguageModeling(make_model(request.param))
  program = build(objective, partial(optimizers.adafactor, learning_rate=optimizers.inverse_sqrt()), data, DEVICES)
  with program.activate(), Checkpointer(tmp_path) as checkpointer:
    state = program.make_state()
    checkpointer.save(state, data.batches(program.mesh, 'train'))
  return tmp_path, objective, data, program, state


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_is_decoded_and_measured(run, capsys):
  folder, objective, data, program, state = run
  decode = partial(infer, str(folder), objective, data, DEVICES, max_new_tokens=4)

  with pytest.raises(ConfigError, match=r'STRATEGY=None chooses no tokens: give one, such as'):
    decode(strategy=None, prompts=PROMPTS)

  # Prompts: three on eight devices, each as it is alone.
  path = decode(strategy=GREEDY, prompts=PROMPTS, output=str(folder / 'out.jsonl'))
  assert path == folder / 'out.jsonl'
  written = lines(path)
  assert [line['inputs'] for line in written] == PROMPTS
  assert all(set(line) == {'inputs', 'prediction', 'score'} and line['score'] < 0 for line in written)
  variables = inference.variables_of(state)
  first, *_, last = written
  assert first['prediction'] == inference.continue_example(
    program, variables, data, inference.example_of(first['inputs'], data), GREEDY, 4
  )
  with program.activate():
    tokens = inference.example_of(last['inputs'], data).tokens
    ((_, score),) = inference.generate(program, variables, data, [tokens], GREEDY, 4)
  np.testing.assert_allclose(last['score'], score, atol=1e-5)
  assert repr(PROMPTS[2]) in capsys.readouterr().out

  # The task's own examples.
  path = decode(strategy=Beam(2), split='train', num_examples=9)  # two batches
  assert path == folder / 'inference.jsonl'
  written = lines(path)
  assert len(written) == 9 and all(line['inputs'] and line['target'] for line in written)

  # Metrics.
  (result,) = evaluate(str(folder), objective, data, DEVICES)
  assert lines(folder / 'evaluation.jsonl') == [result]
  with program.activate():
    measure = jax.jit(partial(eval_step, objective=objective))
    expected = averaged(measure(state, batch) for batch in data.held_out(program.mesh))
  assert result['step'] == 0 and result['split'] == 'validation' and result['bits_per_byte'] > 0
  np.testing.assert_allclose(result['cross_entropy'], expected['cross_entropy'], rtol=1e-5)


def test_the_optimizer_is_not_read(run):
  folder, objective, data, _, state = run
  program, checkpointer = inference.trained(str(folder), objective, data, DEVICES)
  with program.activate(), checkpointer:
    restored = inference.restore(program, checkpointer)
    assert restored.opt_state is None
    jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
    with pytest.raises(ConfigError, match=r'No checkpoint of step 7 in .*: there are \[0\]'):
      inference.restore(program, checkpointer, 7)


def test_examples_of_a_task_are_inputs_and_targets(run):
  _, _, data, program, _ = run
  with program.activate():
    examples = list(inference.task_examples(program, data, 'train'))
  assert examples
  for example in examples:
    if 'inputs' in data.lengths:  # spans were taken out of the inputs, whose sentinels have no text
      assert any(token >= 259 for token in example.tokens)
      assert example.tokens[-1] != 1
    else:
      whole = example.text + example.target
      assert whole in 'abcdefghijklmnopqrstuvwxyz' * 3 and 0 <= len(example.target) - len(example.text) <= 2
      assert bytes(token - 3 for token in example.tokens).decode() == example.text


def test_what_cannot_be_is_refused_in_one_line(tmp_path, corpus):
  task, lengths = TASKS['decoder_only']
  data = Data(task, ('tasks.local_text',), lengths, batch_size=8, converter='decoder_only', vocab_size=384)
  objective = LanguageModeling(make_model('decoder_only'))
  with pytest.raises(ConfigError, match=r'No checkpoints in .*: train there first'):
    infer(str(tmp_path), objective, data, DEVICES, GREEDY, 4)
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(ConfigError, match=r'No whole checkpoint in'):
    evaluate(str(tmp_path), objective, data, DEVICES)
  with pytest.raises(ConfigError, match='A prompt of 5 tokens does not fit into 4'):
    inference.padded('encoder', [[1], [1, 2, 3, 4, 5]], rows=8, length=4)
