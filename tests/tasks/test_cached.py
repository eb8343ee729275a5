"""Tasks that seqio has cached, and the same tasks read from their sources."""

import json

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import data
from moe_jax.types import ConfigError

MODULES = ('tasks.local_code',)


@pytest.fixture
def task(tmp_path, monkeypatch):
  """Twenty files with a function each, and no cache that another test knew of."""
  for number in range(20):
    (tmp_path / f'{number}.py').write_text(f'def name_{number}(x):\n  """Number {number * 17}."""\n')
  monkeypatch.setenv('LOCAL_TEXT_GLOB', f'{tmp_path}/*.py')
  task = data.provider('local_docstring_name', MODULES)
  yield task
  seqio.set_global_cache_dirs([])
  task._cache_dir = None


def _cache(task, folder, split):
  """Writes what `seqio_cache_tasks` does, which needs Apache Beam."""
  folder = folder / seqio.utils.get_task_dir_from_name(task.name)
  folder.mkdir()
  dataset = task.preprocess_precache(task.source.get_dataset(split, shuffle=False))
  examples = list(dataset.as_numpy_iterator())
  with tf.io.TFRecordWriter(f'{seqio.utils.get_cached_tfrecord_prefix(str(folder), split)}-00000-of-00001') as writer:
    for example in examples:
      writer.write(seqio.utils.dict_to_tfexample(example).SerializeToString())
  features = {
    name: {'shape': spec.shape.as_list(), 'dtype': spec.dtype.name} for name, spec in dataset.element_spec.items()
  }
  info = {'num_shards': 1, 'features': features, 'seqio_version': seqio.__version__}
  (folder / f'info.{split}.json').write_text(json.dumps(info))
  (folder / f'stats.{split}.json').write_text(json.dumps({'examples': len(examples)}))
  (folder / 'COMPLETED').touch()


def test_cached_and_uncached_are_the_same(task, tmp_path, mesh, monkeypatch):
  rows = NamedSharding(mesh(data=8), PartitionSpec('data'))

  def read(**choices):
    lengths = {'inputs': 24, 'targets': 8}  # of which inputs are cut, behind the cache
    options = {'converter': 'encoder_decoder', 'sharding': rows, 'modules': MODULES, 'shuffle': False, 'num_epochs': 1}
    return jax.device_get(list(data.batches(task.name, lengths, 8, 'train', **options, **choices)))

  uncached = read()
  with pytest.raises(ConfigError, match=f'USE_CACHED: {task.name} is not in {tmp_path}/cache: cache it there'):
    read(cache_dirs=[f'{tmp_path}/cache'])
  (tmp_path / 'cache').mkdir()
  _cache(task, tmp_path / 'cache', 'train')
  monkeypatch.setenv('LOCAL_TEXT_GLOB', f'{tmp_path}/none/*')  # the source is not looked at
  cached = read(cache_dirs=[f'{tmp_path}/cache'])
  assert len(cached) == len(uncached) > 0
  jax.tree.map(np.testing.assert_array_equal, cached, uncached)
