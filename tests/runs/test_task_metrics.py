"""A task's own metrics: what the model writes and scores, and what becomes of it."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.decode import GREEDY
from moe_jax.layers.attention import CrossAttention, SelfAttention
from moe_jax.layers.embeddings import TokenEmbedding
from moe_jax.models.decoder_only import DecoderOnly
from moe_jax.models.encoder_decoder import EncoderDecoder
from moe_jax.models.stack import Stack
from moe_jax.moe.experts import Experts
from moe_jax.moe.moe_layer import MoELayer
from moe_jax.objectives import LanguageModeling
from moe_jax.runs import task_metrics
from moe_jax.runs.evaluate import evaluate
from moe_jax.runs.infer import compiled_decode, generate, variables_of
from moe_jax.runs.setup import Data, Devices, build
from moe_jax.runs.task_metrics import TaskMetrics, evaluator_of, per_byte, per_token, total
from moe_jax.training import optimizers
from moe_jax.training.checkpoints import Checkpointer
from moe_jax.types import ConfigError

DEVICES = Devices({'data': 4, 'expert': 2}, sharding.replicated_rules(), num_experts=2)
LENGTHS = {'inputs': 24, 'targets': 8}
MODULES = ('tasks.json_lines', 'tasks.local_code')
QUESTIONS = [  # inputs, choices, the right one
  *(('Is it hot?', ['yes', 'no'], 'no'), ('Which letter?', ['a', 'bcd', 'e'], 'bcd')),
  *((f'Number {number}?', ['one', 'many'], 'one') for number in range(9)),
]
CODE = 'def put_back(self):\n  """Puts it back."""\n\ndef take(x):\n  """Takes."""\n'


def make_model(kind):
  moe = partial(MoELayer, num_experts=2, group_size=8, experts=partial(Experts, hidden_dim=8))
  attention, cross = (partial(layer, num_heads=2, head_dim=4) for layer in (SelfAttention, CrossAttention))
  embedding = partial(TokenEmbedding, vocab_size=384, embed_dim=8)
  encoder = partial(Stack, {'attention': attention, 'moe': moe}, repeats=1)
  if kind == 'decoder_only':
    return DecoderOnly(embedding, [encoder])
  return EncoderDecoder(embedding, encoder, partial(Stack, {'attention': attention, 'cross': cross}, repeats=1))


@pytest.fixture(params=['decoder_only', 'encoder_decoder'])
def make_data(request, tmp_path, monkeypatch):
  """`make_data(task)`: questions with choices, and functions to be named, in files of their own."""
  (tmp_path / 'text').mkdir()
  lines = [{'inputs': inputs, 'targets': right, 'choices': choices} for inputs, choices, right in QUESTIONS]
  (tmp_path / 'text' / 'validation.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  for number in range(2):
    (tmp_path / 'text' / f'{number}.py').write_text(CODE)
  monkeypatch.setenv('JSON_LINES_GLOB', f'{tmp_path}/text/*.jsonl')
  monkeypatch.setenv('LOCAL_TEXT_GLOB', f'{tmp_path}/text/*.py')

  def make(task):
    import seqio

    if 'both' not in seqio.MixtureRegistry.names():
      from tasks import json_lines, local_code  # noqa: F401

      seqio.MixtureRegistry.add('both', ['json_lines_score_eval', 'local_docstring_name'], default_rate=1.0)
    return Data(task, MODULES, LENGTHS, batch_size=8, converter=request.param, vocab_size=384)

  return make


@pytest.fixture
def run(make_data):
  """Data, an objective that knows bytes, a program, and the state of a model that nothing has taught."""
  data = make_data('both')
  objective = data.tell_bytes(LanguageModeling(make_model(data.converter)))
  program = build(objective, partial(optimizers.adafactor, learning_rate=optimizers.inverse_sqrt()), data, DEVICES)
  with program.activate():
    return data, objective, program, program.make_state()


def test_scores_by_hand():
  log_likelihoods = jnp.array([[-1.0, -2.0, 0.0], [-3.0, -3.0, -6.0]])
  tokens = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
  lengths = jnp.array([[4.0, 0.0, 0.0], [1.0, 1.0, 0.0]])  # the EOS is no text
  assert total(log_likelihoods, tokens, lengths).tolist() == [-3, -12]
  assert per_token(log_likelihoods, tokens, lengths).tolist() == [-1.5, -4]
  assert per_byte(log_likelihoods, tokens, lengths).tolist() == [-0.75, -6]


def test_a_mixture_is_measured_task_by_task_and_on_average(make_data):
  """A stub plants the answers: the second name, and the likelihood of choices that begin with a vowel."""
  evaluator = evaluator_of(make_data('both'), 'validation', None)

  def predict(dataset):
    rows = list(dataset.as_numpy_iterator())
    answer = [token + 3 for token in b'take'] + [1, 0, 0, 0]
    return [(int(number), answer) for number, _ in reversed(rows)]  # in whatever order

  def score(dataset):
    rows = [(int(number), row['decoder_target_tokens'][row['decoder_loss_weights'] > 0]) for number, row in dataset]
    return [(number, float(chr(tokens[0] - 3) in 'aeiou')) for number, tokens in rows]

  found, outputs = evaluator.evaluate(compute_metrics=True, predict_fn=predict, score_fn=score)
  values = task_metrics.flattened(found.result())
  right = 9  # 'one' of 'one' and 'many'; 'yes' and 'no' tie, and the first counts; 'a' comes before 'bcd'
  assert values == {
    'json_lines_score_eval/accuracy': pytest.approx(100 * right / 11),
    'local_docstring_name/exact_match': 50,
    'local_docstring_name/word_f1': 50,
    'average': pytest.approx((100 * right / 11 + 50) / 2),
  }
  # 'one', 'a' and 'e' weigh e, the others 1; and names have no choices to be sure of.
  calibrated = task_metrics.calibrations(evaluator, outputs)
  assert list(calibrated) == ['json_lines_score_eval']
  number, letter = np.e / (np.e + 1), np.e / (2 * np.e + 1)
  expected = {'questions': 11, 'accuracy': right / 11, 'ece': (9 * (1 - number) + 0.5 + letter) / 11}
  expected['brier'] = (9 * 2 * (1 - number) ** 2 + 0.5 + 2 * letter**2 + (1 - letter / np.e) ** 2) / 11
  assert {name: calibrated['json_lines_score_eval'][name] for name in expected} == pytest.approx(expected)


def test_examples_can_be_fewer_and_there_need_be_none(make_data):
  datasets = evaluator_of(make_data('both'), 'validation', 3).cached_model_datasets
  assert len(list(datasets['json_lines_score_eval'])) == 3
  assert evaluator_of(make_data('both'), 'test', None) is None
  with pytest.raises(ConfigError, match='NUM_EXAMPLES=0'):
    TaskMetrics(num_examples=0).prepare(None, None, None, 'validation')


def test_what_a_model_writes_and_scores_does_not_depend_on_the_batch(run):
  data, objective, program, state = run
  variables, evaluator = variables_of(state), evaluator_of(data, 'validation', None)
  with program.activate():
    # Answers: those of `infer`, one by one.
    dataset = evaluator.cached_model_datasets['local_docstring_name']
    written = task_metrics.predictions(compiled_decode(program, data, GREEDY, 8), program, variables, data, dataset)
    assert [number for number, _ in written] == [0, 1]
    end = [] if data.converter == 'encoder_decoder' else [1]
    rows = [row for _, row in dataset.as_numpy_iterator()]
    for (_, tokens), row, text in zip(written, rows, (b'name: (self) Puts it back.', b'name: (x) Takes.')):
      given = [byte + 3 for byte in text[:23]] + end
      assert task_metrics.prompt(row, eos_id=1) == given
      ((expected, _),) = generate(program, variables, data, [given], GREEDY, 8)
      np.testing.assert_array_equal(tokens, expected)

    # Scores: the probabilities that the model gives, row by row.
    dataset = evaluator.cached_model_datasets['json_lines_score_eval']
    rates = jax.jit(partial(task_metrics.scores, objective=objective, score=total), out_shardings=program.everywhere)
    found = dict(task_metrics.ratings(rates, program, variables, data, dataset))
    rows = list(dataset.as_numpy_iterator())
    assert len(rows) == len(found) == sum(len(choices) for _, choices, _ in QUESTIONS)
    apply = jax.jit(lambda batch: jax.nn.log_softmax(objective.model.apply(variables, batch)[0]))
    for number, row in rows[:3]:
      alone = {name: np.repeat(row[name][None], 8, axis=0).astype(spec.dtype) for name, spec in data.spec().items()}
      log_probs = apply(alone)[0]
      targets = row['decoder_target_tokens']
      expected = sum(float(log_probs[i, targets[i]]) for i in np.flatnonzero(row['decoder_loss_weights']))
      np.testing.assert_allclose(found[int(number)], expected, rtol=1e-5)


@pytest.mark.parametrize('make_data', ['encoder_decoder'], indirect=True)
def test_evaluation_writes_them_beside_the_objective_s(run, tmp_path):
  data, objective, program, state = run
  with program.activate(), Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(state, data.batches(program.mesh, 'validation'))
  (tmp_path / 'calibration.json').write_text('{"another": 1, "json_lines_score_eval": 2}')
  (result,) = evaluate(str(tmp_path), objective, data, DEVICES, task_metrics=TaskMetrics(num_examples=4))
  assert json.loads((tmp_path / 'evaluation.jsonl').read_text()) == result
  assert {'cross_entropy', 'json_lines_score_eval/accuracy', 'local_docstring_name/word_f1', 'average'} <= set(result)
  name = 'json_lines_score_eval'
  written = np.mean([result[f'local_docstring_name/{of}'] for of in ('exact_match', 'word_f1')])
  assert result['average'] == pytest.approx(np.mean([result[f'{name}/accuracy'], written])), 'of percents alone'
  found = json.loads((tmp_path / 'calibration.json').read_text())
  assert found.keys() == {'another', name}, 'other evaluations keep theirs'
  assert found['another'] == 1 and (found[name]['step'], found[name]['split']) == (0, 'validation')
  assert [found[name][of] for of in ('ece', 'brier')] == [result[f'{name}/{of}'] for of in ('ece', 'brier')]
  assert found[name]['accuracy'] == pytest.approx(result[f'{name}/accuracy'] / 100)
  assert sum(found[name]['reliability']['questions']) == found[name]['questions'] == 2, 'of four choices'
