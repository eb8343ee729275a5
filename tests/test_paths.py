"""Files in buckets, with a folder in a bucket's place; `tests/runs/test_bucket.py` has a bucket."""

import json

import pytest

from moe_jax import paths
from moe_jax.training.metrics import MetricsLog
from moe_jax.types import ConfigError


@pytest.fixture
def remote(monkeypatch, tmp_path):
  monkeypatch.setattr(paths, 'is_remote', lambda path: str(path).startswith(str(tmp_path)))
  return tmp_path


def test_a_path_is_local_or_in_a_bucket(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert paths.to_path('~/runs') == tmp_path / 'runs' and paths.absolute('~') == tmp_path
  with pytest.raises(ConfigError, match=r"^'s3://bucket/x' is remote: of remote places gs://BUCKET/... alone"):
    paths.to_path('s3://bucket/x')
  monkeypatch.setattr(paths.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match=r"^'gs://bucket/x' is in a bucket, .*: pip install gcsfs."):
    paths.to_path('gs://bucket/x')


def test_what_only_knows_local_files_reads_and_writes_remote_ones(remote):
  with paths.writable(remote / 'there') as local:
    assert local != remote / 'there'
    (local / 'a').write_bytes(b'\xff')
    (local / 'deep').mkdir()
    (local / 'deep' / 'b').write_text('b')
  assert not local.exists()
  with paths.readable(remote / 'there') as local:
    assert local != remote / 'there'
    assert (local / 'a').read_bytes() == b'\xff' and (local / 'deep' / 'b').read_text() == 'b'
  with pytest.raises(OSError), paths.writable(remote / 'torn') as local:
    (local / 'a').write_text('half')
    raise OSError
  assert not (remote / 'torn').exists()


def test_remote_metrics_are_there_when_they_are_shown_or_closed(remote):
  folder = remote / 'run'
  folder.mkdir()

  def steps():
    return [json.loads(line)['step'] for line in (folder / 'metrics.jsonl').read_text().splitlines()]

  with MetricsLog(folder) as log:
    log.write(1, 'train', {'loss': 2.0})
    assert not list(folder.iterdir()), 'once a minute is enough'
    log.show()
    assert steps() == [1]
    log.write(2, 'train', {'loss': 1.0})
  assert steps() == [1, 2] and list(folder.glob('events*'))
  with MetricsLog(folder, resume_step=1) as log:
    log.write(2, 'train', {'loss': 1.5})
    log.write(3, 'train', {'loss': 1.0})
  assert steps() == [1, 2, 3]
  paths.append(folder / 'lines', 'a\n')
  paths.append(folder / 'lines', 'b\n')
  assert (folder / 'lines').read_text() == 'a\nb\n'


def test_of_several_hosts_one_writes_remote_metrics(remote, monkeypatch):
  """Another host's copy, made before the first host's newer lines, must not be put over them."""
  folder = remote / 'run'
  folder.mkdir()
  (folder / 'metrics.jsonl').write_text('{"step": 1}\n')
  monkeypatch.setattr('jax.process_index', lambda *backend: 1)
  with MetricsLog(folder):
    (folder / 'metrics.jsonl').write_text('{"step": 1}\n{"step": 2}\n')
  assert (folder / 'metrics.jsonl').read_text().count('step') == 2
