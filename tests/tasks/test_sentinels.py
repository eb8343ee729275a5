"""Twins of tasks that look like span corruption."""

import importlib
import sys

import seqio

from tasks import local_code, superglue  # noqa: F401
from tests.tasks.test_local_code import library  # noqa: F401


def _rows(name, inputs):
  lengths = {'inputs': inputs, 'targets': 16}
  data = seqio.get_mixture_or_task(name).get_dataset(lengths, split='train', shuffle=False)
  return list(data.take(5).as_numpy_iterator())


def test_the_answer_is_what_a_sentinel_stands_for(library):  # noqa: F811
  from tasks import sentinels

  first = seqio.ByteVocabulary(extra_ids=100).vocab_size - 1
  for inputs in (200, 12):  # roomy, and cut
    plain, twins = _rows('local_docstring_name', inputs), _rows('local_docstring_name_sentinels', inputs)
    for row, twin in zip(plain, twins, strict=True):
      text, eos = row['inputs'][:-1], row['inputs'][-1:]
      assert twin['inputs'].tolist() == [*text[: inputs - 2], first, *eos]
      assert twin['targets'].tolist() == [first, *row['targets']]
  before = seqio.TaskRegistry.names()
  importlib.reload(sys.modules[sentinels.__name__])
  assert seqio.TaskRegistry.names() == before, 'once is enough'


def test_metrics_do_not_see_it():
  from tasks import sentinels  # noqa: F401

  plain, twin = (seqio.TaskRegistry.get(f'super_glue_boolq_v102{suffix}') for suffix in ('', '_sentinels'))
  for text in ('True', '<extra_id_0> True', ' <extra_id_0>True', 'False', 'neither'):
    bare = text.split('>')[-1].strip()
    assert twin.postprocess_fn(text, example={}, is_target=False) == plain.postprocess_fn(
      bare, example={}, is_target=False
    )
  assert len(twin.metric_fns) == len(plain.metric_fns) == 1


def test_mixtures_have_twins_too():
  from tasks import sentinels  # noqa: F401

  plain = seqio.MixtureRegistry.get('super_glue_v102_proportional')
  twin = seqio.MixtureRegistry.get('super_glue_v102_proportional_sentinels')
  rates = {task.name: plain.get_rate(task) for task in plain.tasks}
  assert {task.name: twin.get_rate(task) for task in twin.tasks} == {f'{k}_sentinels': v for k, v in rates.items()}
  assert not any(name.startswith('local_text_lm_s') for name in seqio.TaskRegistry.names()), 'no inputs, no twin'
