"""A run whose MODEL_DIR is in a bucket is the run that it would be in a folder."""

import json
import logging

import gin
import pytest

import run
from moe_jax.paths import to_path
from tests.processes import free_port
from tests.test_run import _clean, arguments  # noqa: F401 (a fixture)

TIMING = ('step_seconds', 'tokens_per_second', 'goodput')


@pytest.fixture
def bucket(monkeypatch):
  """A bucket of an emulator, which all clients of Google Cloud Storage in this process take for the real one."""
  # The emulator has no such buckets, and gcsfs asks for them when it is imported.
  monkeypatch.setenv('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
  why = 'pip install gcsfs gcp-storage-emulator'
  pytest.importorskip('gcsfs', reason=why)
  server = pytest.importorskip('gcp_storage_emulator.server', reason=why)
  port = free_port()
  for name in ('STORAGE_EMULATOR_HOST', 'TENSORSTORE_GCS_HTTP_URL'):
    monkeypatch.setenv(name, f'http://localhost:{port}')
  logging.getLogger('gcp_storage_emulator').setLevel(logging.CRITICAL)
  objects = server.objects
  download = objects.download

  def download_with_generation(request, response, storage, *args, **kwargs):
    download(request, response, storage, *args, **kwargs)
    if response.status in (200, 206):  # TensorStore asks which version it has read, and the emulator does not say
      found = storage.get_file_obj(request.params['bucket_name'], request.params['object_id'])
      response['X-Goog-Generation'] = found['generation']

  monkeypatch.setattr(objects, 'download', download_with_generation)
  emulator = server.create_server('localhost', port, in_memory=True, default_bucket='bucket')
  emulator.start()
  yield 'gs://bucket'
  emulator.stop()


def train(folder, steps, *more):
  gin.clear_config()
  more = ['--gin.CHECKPOINT_PERIOD=2', '--gin.EVAL_PERIOD=100', '--gin.STRATEGY=None', *more]
  return run.main(['--debug', *arguments(folder, f'--gin.TRAIN_STEPS={steps}', *more)])


def lines(path):
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def test_a_run_in_a_bucket_is_the_same(bucket, tmp_path, capsys):
  folder = to_path(f'{bucket}/runs/mine')
  assert train(folder, 4, '--profile_steps=2:2') == 0
  assert 'cannot be locked' in capsys.readouterr().out
  assert train(folder, 6) == 0
  assert f'Going on from step 4 in {folder}/checkpoints' in capsys.readouterr().out
  assert {path.name for path in (folder / 'checkpoints').iterdir()} == {'4', '6'}, 'older ones are gone'
  assert train(tmp_path / 'run', 6) == 0
  rows = [[row for row in lines(x / 'metrics.jsonl') if row['split'] == 'train'] for x in (folder, tmp_path / 'run')]
  assert rows[0] == rows[1] and len(rows[0]) == 6
  names = {path.name.split('.')[0] for path in folder.iterdir()}
  assert {'events', 'report', 'summary', 'config', 'profile'} <= names

  for _ in range(2):
    gin.clear_config()
    assert run.main(['--debug', '--run_mode=eval', f'--gin_file={folder}/config.gin', '--gin.EVAL_STEPS=1']) == 0
  first, second = lines(folder / 'evaluation.jsonl')
  assert first == second and first['step'] == 6
  gin.clear_config()
  kept = f'--gin_file={folder}/config.gin'
  assert run.main(['--debug', '--run_mode=infer', kept, '--prompt=def f', '--gin.STRATEGY=@decode.Sampling()']) == 0
  assert lines(folder / 'inference.jsonl')[0]['inputs'] == 'def f'
  (folder / 'report.html').unlink()
  assert run.main(['--debug', '--run_mode=report', '--model_dirs', str(folder)]) == 0
  assert '<html' in (folder / 'report.html').read_text()

  begun = [f"--gin.INITIAL_CHECKPOINT_PATH='{folder}/checkpoints/4'"]
  assert train(tmp_path / 'second', 1, *begun) == 0
  assert lines(tmp_path / 'second' / 'metrics.jsonl')[0]['loss'] < rows[0][0]['loss']


def test_a_bucket_that_is_not_there(bucket, capsys):
  gin.clear_config()
  assert run.main(arguments('gs://nobody/has/this')) == 1
  error = capsys.readouterr().err.strip()
  assert "MODEL_DIR 'gs://nobody/has/this' cannot be written to (" in error and error.count('\n') == 0
