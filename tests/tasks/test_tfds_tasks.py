"""Tasks made of TFDS: its true builders write small datasets, and what becomes of them is what T5's papers print."""

import numpy as np
import pytest
import seqio
import tensorflow as tf
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import data
from moe_jax.runs import task_metrics
from moe_jax.runs.setup import Data
from moe_jax.types import ConfigError
from tasks import generation, glue, multiple_choice, preprocessors, superglue, upstream, vocabularies  # noqa: F401

IDX = {'idx': 0}
LENGTHS = {'inputs': 400, 'targets': 100}
SENTENCE = {'sentence': 'John made Bill master of himself.', 'label': 1, **IDX}
PAIR = {'sentence1': 'A dog runs.', 'sentence2': 'An animal moves.', **IDX}
WSC = {
  'text': 'The stable was very roomy, with four good stalls; a large swinging window made it pleasant and airy.',
  **{'span1_index': 0, 'span1_text': 'The stable', 'span2_index': 13, 'span2_text': 'it', 'label': 1, **IDX},
}
RECORD = {
  'passage': 'Ann met Bob.\n@highlight\nThey spoke\n@highlight\nBob left',
  **{'query': 'Then @placeholder went.', 'entities': ['Ann', 'Bob'], 'answers': ['Bob', 'Ann']},
  'idx': {'passage': 7, 'query': 8},
}
ARC = {
  **{'id': 'a', 'question': 'Which is hot?', 'answerKey': 'B'},
  'choices': {'text': ['ice', 'fire', 'rain'], 'label': ['A', 'B', 'C']},
}
WMT = {'en': 'That is good.', 'de': 'Das ist gut.'}

# task -> (dataset of TFDS, one of its examples, the inputs, the targets)
GOLDEN = {
  'glue_cola_v002': (
    'glue/cola:2.0.0',
    SENTENCE,
    'cola sentence: John made Bill master of himself.',
    'acceptable',
  ),
  'glue_sst2_v002': (
    'glue/sst2:2.0.0',
    {'sentence': 'a joy ', 'label': 1, **IDX},
    'sst2 sentence: a joy ',
    'positive',
  ),
  'glue_mrpc_v002': (
    'glue/mrpc:2.0.0',
    {**PAIR, 'label': 0},
    'mrpc sentence1: A dog runs. sentence2: An animal moves.',
    'not_equivalent',
  ),
  'glue_qqp_v002': (
    'glue/qqp:2.0.0',
    {'question1': 'Why?', 'question2': 'What for?', 'label': 1, **IDX},
    'qqp question1: Why? question2: What for?',
    'duplicate',
  ),
  'glue_stsb_v002': (
    'glue/stsb:2.0.0',
    {**PAIR, 'label': 3.25},
    'stsb sentence1: A dog runs. sentence2: An animal moves.',
    '3.2',
  ),
  'glue_mnli_v002': (
    'glue/mnli:2.0.0',
    {'premise': 'It rains.', 'hypothesis': 'It is wet.', 'label': 2, **IDX},
    'mnli hypothesis: It is wet. premise: It rains.',
    'contradiction',
  ),
  'glue_mnli_matched_v002': (
    'glue/mnli_matched:2.0.0',
    {'premise': 'It rains.', 'hypothesis': 'It is wet.', 'label': 0, **IDX},
    'mnli hypothesis: It is wet. premise: It rains.',
    'entailment',
  ),
  'glue_qnli_v002': (
    'glue/qnli:2.0.0',
    {'question': 'Where?', 'sentence': 'Here.', 'label': 0, **IDX},
    'qnli question: Where? sentence: Here.',
    'entailment',
  ),
  'glue_rte_v002': (
    'glue/rte:2.0.0',
    {**PAIR, 'label': 1},
    'rte sentence1: A dog runs. sentence2: An animal moves.',
    'not_entailment',
  ),
  'glue_wnli_v002': (
    'glue/wnli:2.0.0',
    {**PAIR, 'label': 1},
    'wnli sentence1: A dog runs. sentence2: An animal moves.',
    'entailment',
  ),
  'super_glue_boolq_v102': (
    'super_glue/boolq:1.0.2',
    {'passage': 'Persian is spoken.', 'question': 'do they speak', 'label': 1, **IDX},
    'boolq passage: Persian is spoken. question: do they speak',
    'True',
  ),
  'super_glue_cb_v102': (
    'super_glue/cb:1.0.2',
    {'premise': 'It rains.', 'hypothesis': 'It is wet.', 'label': 2, **IDX},
    'cb hypothesis: It is wet. premise: It rains.',
    'neutral',
  ),
  'super_glue_copa_v102': (
    'super_glue/copa:1.0.2',
    {'premise': 'It fell.', 'choice1': 'It broke.', 'choice2': 'It flew.', 'question': 'effect', 'label': 0, **IDX},
    'copa choice1: It broke. choice2: It flew. premise: It fell. question: effect',
    'choice1',
  ),
  'super_glue_multirc_v102': (
    'super_glue/multirc:1.0.2',
    {
      **{'paragraph': '<b>Sent 1: </b>It fell.<br>', 'question': 'What fell?', 'answer': 'It', 'label': 0},
      'idx': {'paragraph': 3, 'question': 4, 'answer': 5},
    },
    'multirc question: What fell? answer: It paragraph: Sent 1: It fell. ',
    'False',
  ),
  'super_glue_record_v102': (
    'super_glue/record:1.0.2',
    RECORD,
    'record query: Then @placeholder went. entities: Ann, Bob passage: Ann met Bob. They spoke. Bob left',
    'Bob',
  ),
  'super_glue_rte_v102': (
    'super_glue/rte:1.0.2',
    {'premise': 'It rains.', 'hypothesis': 'It is wet.', 'label': 0, **IDX},
    'rte hypothesis: It is wet. premise: It rains.',
    'entailment',
  ),
  'super_glue_wic_v102': (
    'super_glue/wic:1.0.2',
    {
      **{'word': 'bank', 'sentence1': 'A bank.', 'sentence2': 'To bank.', 'label': 0, **IDX},
      **{'start1': 2, 'start2': 3, 'end1': 6, 'end2': 7},
    },
    'wic sentence1: A bank. sentence2: To bank. word: bank',
    'False',
  ),
  'super_glue_wsc_v102_simple_train': (
    'super_glue/wsc.fixed:1.0.2',
    WSC,
    f'wsc: {WSC["text"].replace(" it ", " *it* ")}',
    'The stable',
  ),
  'super_glue_wsc_v102_simple_eval': (
    'super_glue/wsc.fixed:1.0.2',
    WSC,
    f'wsc: {WSC["text"].replace(" it ", " *it* ")}',
    'The stable',
  ),
  'squad_v010_allanswers': (
    'squad/v1.1:3.0.0',
    {
      **{'id': '1', 'title': 'A', 'context': 'The “cell” (1665) is\nbasic.', 'question': "What's basic?"},
      'answers': {'text': ['cell', 'The cell.'], 'answer_start': [5, 0]},
    },
    "question: What ' s basic ?  context: The “ cell ” ( 1665 ) is basic . ",
    'cell',
  ),
  'cnn_dailymail_v002': (
    'cnn_dailymail:3.4.0',
    {'article': 'A long text.', 'highlights': 'Short .\nBold .', 'publisher': 'CNN', 'id': '1'},
    'summarize: A long text.',
    'Short .\nBold .',
  ),
  'xsum_v110': ('xsum:1.1.0', {'document': 'A long text.', 'summary': 'Short.'}, 'summarize: A long text.', 'Short.'),
  'wmt_t2t_ende_v003': (
    'wmt_t2t_translate/de-en:1.0.0',
    WMT,
    'translate English to German: That is good.',
    'Das ist gut.',
  ),
  'wmt16_enro_v003': (
    'wmt16_translate/ro-en:1.0.0',
    {'en': 'Yes.', 'ro': 'Da.'},
    'translate English to Romanian: Yes.',
    'Da.',
  ),
  'arc_easy_train': ('ai2_arc/ARC-Easy:1.0.0', ARC, 'question: Which is hot? answer:', 'fire'),
  'arc_challenge_score_eval': ('ai2_arc/ARC-Challenge:1.0.0', ARC, 'question: Which is hot? answer:', 'ice'),
}
CORPORA = {
  'c4_v310': 'c4/en:3.1.0',
  'mc4.de': 'c4/multilingual:3.1.0',
  'wikipedia_20230601.en_v100': 'wikipedia/20230601.en:1.0.0',
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tensorflow_datasets')
  seqio.set_tfds_data_dir_override(str(folder))
  yield folder
  seqio.set_tfds_data_dir_override(None)


@pytest.fixture
def prepared(folder, monkeypatch):
  """`prepared(task, examples)` has the true builder of the task's dataset write these as each split of the task."""

  def write(name, examples):
    source = seqio.TaskRegistry.get(name).source
    builder = source.tfds_dataset.builder
    splits = {source.tfds_dataset._map_split(split).partition('[')[0] for split in source.splits} | {'train'}
    splits |= {'validation', 'test'} if 'wsc' in name else set()  # which two tasks share
    if not builder.info.splits:
      generators = {split: list(enumerate(examples)) for split in splits}
      monkeypatch.setattr(type(builder), '_split_generators', lambda self, *_: generators, raising=False)
    return seqio.TaskRegistry.get(name)

  return write


def _text(tokens):
  assert tokens[-1] == 1
  return bytes(int(token) - 3 for token in tokens[:-1]).decode()


def _examples(task, split=None, lengths=LENGTHS):
  dataset = task.get_dataset(lengths, split or next(iter(task.splits)), shuffle=False)
  return list(dataset.as_numpy_iterator())


@pytest.mark.parametrize('name', GOLDEN)
def test_text_is_that_of_t5(prepared, name):
  tfds_name, example, inputs, targets = GOLDEN[name]
  task = prepared(name, [example])
  assert task.source.tfds_dataset.name == tfds_name
  first = _examples(task)[0]
  assert (_text(first['inputs']), _text(first['targets'])) == (inputs, targets)
  assert task.supports_caching


def _dataset(**columns):
  """One example, a list being a tensor of rank 1."""
  return tf.data.Dataset.from_tensors(columns)


# ---- SuperGLUE -------------------------------------------------------------------------------------------------------
def test_record_is_an_example_for_each_answer_and_knows_them_all(prepared):
  examples = _examples(prepared('super_glue_record_v102', [RECORD]))
  assert [_text(example['targets']) for example in examples] == ['Bob', 'Ann']
  assert [example['answers'].tolist() for example in examples] == [[b'Bob', b'Ann']] * 2
  assert {(example['idx/passage'], example['idx/query']) for example in examples} == {(7, 8)}
  secret = _dataset(**{**RECORD, 'answers': tf.constant([], tf.string)})
  (example,) = superglue.fill_placeholder(secret).as_numpy_iterator()
  assert example['targets'] == b'<unk>' and example['answers'].tolist() == []


@pytest.mark.parametrize(
  ('text', 'pronoun', 'index', 'starred'),
  [
    ('Ann asked Bob if he knew he was late.', 'he', 6, 'Ann asked Bob if he knew *he* was late.'),
    ('She laughed. "Good for him," she said. ', 'him', 4, 'She laughed. "Good for *him*," she said. '),
    ('He might use it , he said.', 'it', 2, 'He might use *it* , he said.'),  # the index of another word
  ],
)
def test_the_pronoun_gets_stars(text, pronoun, index, starred):
  example = {'text': text, 'span2_text': pronoun, 'span2_index': index, 'span1_text': 'Ann', 'label': 0}
  (found,) = superglue.star_pronoun(_dataset(**example), correct_only=False).as_numpy_iterator()
  assert found == {'inputs': f'wsc: {starred}'.encode(), 'targets': b'Ann', 'label': 0}
  assert not list(superglue.star_pronoun(_dataset(**example), correct_only=True))


@pytest.mark.parametrize(
  ('answer', 'asked', 'same'),
  [
    ('stable', 'The stable', 1),
    ('the brown rabbit', 'rabbit', 1),
    ('The yard', 'The stable', 0),
    ("the man's coat", 'the coat', 0),
    ("The man's", "man's", 1),
    ('the', 'The stable', 0),
  ],
)
def test_a_noun_is_the_same_with_and_without_its_article(answer, asked, same):
  example = {'targets_pretokenized': asked.encode(), 'label': 1}
  assert superglue.is_referent(answer, example=example, is_target=False) == same
  assert superglue.is_referent(asked, example=example, is_target=True) == 1


def test_secret_labels_are_no_class(prepared):
  example = dict(zip(('passage', 'question', 'label', 'idx'), ('A.', 'b', -1, 0)))
  (found,) = glue.classify(_dataset(**example), 'boolq', ('False', 'True'), ('passage', 'question')).as_numpy_iterator()
  assert found['targets'] == b'<unk>'


def test_mixtures_are_weighted_by_size():
  superglue_tasks = seqio.MixtureRegistry.get('super_glue_v102_proportional').rate_per_task_name
  assert len(superglue_tasks) == 9 and superglue_tasks['super_glue_record_v102'] == 138854
  assert superglue_tasks['super_glue_wsc_v102_simple_train'] == 259
  glue_tasks = seqio.MixtureRegistry.get('glue_v002_proportional').rate_per_task_name
  assert 'glue_wnli_v002' not in glue_tasks and glue_tasks['glue_mnli_v002'] == 392702


def test_superglue_is_mixed_and_its_right_answers_are_right(prepared, mesh):
  """One example a task. Of CB one class in three is there, and of MultiRC no answer that is right."""
  for name in GOLDEN:
    if name.startswith('super_glue'):
      prepared(name, [GOLDEN[name][1]])
  converter = 'encoder_decoder'
  task, modules, lengths = 'super_glue_v102_proportional', ('tasks.superglue',), {'inputs': 160, 'targets': 32}
  rows = NamedSharding(mesh(data=8), PartitionSpec('data'))
  batch = next(data.batches(task, lengths, 8, 'train', converter=converter, sharding=rows, modules=modules))
  answers = {vocabularies.vocabulary().decode(row.tolist()) for row in np.asarray(batch['decoder_target_tokens'])}
  assert answers and answers <= {'Ann', *(targets for *_, targets in GOLDEN.values())}

  def predict(dataset):
    found = []
    for number, row in dataset.as_numpy_iterator():
      targets = row['decoder_target_tokens'][row['decoder_loss_weights'] > 0]
      found.append((number, [*targets, *(0,) * (32 - len(targets))]))
    return found

  evaluator = task_metrics.evaluator_of(Data(task, modules, lengths, 8, converter, 384), 'validation', None)
  found, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict, score_fn=None)
  values = task_metrics.flattened(found.result())
  partly = {'super_glue_cb_v102/f1': pytest.approx(100 / 3), 'super_glue_multirc_v102/f1': 0}
  assert len(values) == 12 and {name: value for name, value in values.items() if value != 100} == {
    **partly,
    'average': pytest.approx((6 * 100 + (100 + 100 / 3) / 2 + (100 + 0) / 2) / 8),
  }


# ---- Multiple choice -------------------------------------------------------------------------------------------------
def test_every_choice_is_an_example_and_the_right_ones_are_learned():
  other = {**ARC, 'question': 'Which is cold?', 'answerKey': 'A'}
  questions = multiple_choice.ask_arc(_dataset(**ARC).concatenate(_dataset(**other)))
  examples = list(multiple_choice.rank_choices(questions).as_numpy_iterator())
  hot, cold = examples[0]['question'], examples[3]['question']
  assert hot != cold
  assert [(example['question'], example['targets'], example['worth']) for example in examples] == [
    *((hot, b'ice', 0), (hot, b'fire', 1), (hot, b'rain', 0)),
    *((cold, b'ice', 1), (cold, b'fire', 0), (cold, b'rain', 0)),
  ]
  (again, *_) = multiple_choice.rank_choices(multiple_choice.ask_arc(_dataset(**other))).as_numpy_iterator()
  assert again['question'] == cold  # in whatever shard it is found
  right = multiple_choice.rank_choices(questions, correct_only=True).as_numpy_iterator()
  assert [(example['inputs'], example['targets']) for example in right] == [
    (b'question: Which is hot? answer:', b'fire'),
    (b'question: Which is cold? answer:', b'ice'),
  ]


# ---- Corpora ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('corpus', CORPORA)
def test_documents_are_there_for_three_objectives(prepared, corpus):
  document = {'text': 'abcdefghij' * 4, 'title': 'T', **dict.fromkeys(('content-type', 'url', 'timestamp'), '')}
  document |= {'content-length': ''}
  name = f'{corpus}_autoregressive_language_modeling'
  features = seqio.TaskRegistry.get(name).source.tfds_dataset.builder.info.features
  task = prepared(name, [{name: value for name, value in document.items() if name in features}] * 100)
  assert task.source.tfds_dataset.name == CORPORA[corpus]
  assert set(task.splits) == {'train', 'validation'}
  chunks = [example['targets'].tolist() for example in _examples(task, 'validation', {'targets': 32})]
  tokens = [token + 3 for token in document['text'].encode()]
  assert chunks[0] == tokens[:32] and [*tokens[32:], 1] in chunks

  pairs = _examples(seqio.TaskRegistry.get(f'{corpus}_prefix_lm'), 'validation', {'inputs': 24, 'targets': 24})
  wholes = [pair['inputs'].tolist()[:-1] + pair['targets'].tolist() for pair in pairs]
  assert {tuple(whole) for whole in wholes} == {(*tokens[:23], 1), (*tokens[23:], 1)}

  pairs = _examples(seqio.TaskRegistry.get(f'{corpus}_span_corruption'), 'validation', {'inputs': 32, 'targets': 32})
  assert all(pair['inputs'][-1] == pair['targets'][-1] == 1 and max(pair['inputs']) >= 259 for pair in pairs)


def test_prefixes_are_of_every_length():
  documents = tf.data.Dataset.from_tensors({'targets': tf.range(3, 11)}).repeat(400)
  with seqio.map_seed_manager(0):
    pairs = list(preprocessors.split_prefix(documents, {'inputs': 9, 'targets': 9}).as_numpy_iterator())
  lengths, counts = np.unique([len(pair['inputs']) for pair in pairs], return_counts=True)
  assert lengths.tolist() == [*range(8)] and counts.min() > 25
  assert all([*pair['inputs'], *pair['targets']] == [*range(3, 11)] for pair in pairs)


def test_glam_is_weighted_as_published():
  rates = seqio.MixtureRegistry.get('glam_prefix_lm').rate_per_task_name
  assert rates == {'c4_v310_prefix_lm': 0.42, 'wikipedia_20230601.en_v100_prefix_lm': 0.06}
  np.testing.assert_allclose(sum(upstream.GLAM_WEIGHTS.values()), 1)


# ---- What is not there -----------------------------------------------------------------------------------------------
def test_the_c4_of_t5_is_read_where_it_is_and_not_made(folder):
  with pytest.raises(ConfigError, match=r'c4/en:2\.2\.0 is not in .* too old'):
    seqio.TaskRegistry.get('c4_v220_span_corruption').source.list_shards('train')


def test_a_dataset_that_cannot_be_had_is_said_in_one_line(folder, monkeypatch):
  source = seqio.TaskRegistry.get('wmt19_ende_v003').source

  def fail(self):
    raise OSError('no network\nat all')

  monkeypatch.setattr(type(source.tfds_dataset.builder), 'download_and_prepare', fail)
  for read in (source.get_dataset, source.list_shards, source.num_input_examples):
    with pytest.raises(ConfigError, match=r'wmt19_translate/de-en:1\.0\.0 is not in .*: no network') as error:
      read('train')
    assert '\n' not in str(error.value)
