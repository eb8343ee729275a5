"""Where files lie: in a folder, or in a bucket of Google Cloud Storage, whose paths answer as pathlib's do.

Nothing can be added to a file in a bucket, nor can one be locked or lie there open; a folder is there once a file is.
"""

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

BUCKETS = 'gs://'
if importlib.util.find_spec('gcsfs'):  # read at the first path of etils in this process, and never again
  os.environ.setdefault('EPATH_USE_TF', '0')


def to_path(path: str | os.PathLike[str]) -> Path:
  """The path that a user names: '~' is expanded.

  Raises:
    ConfigError: if it is remote, and not in a bucket or the library for that is missing.
  """
  text = os.fspath(path)
  if not is_remote(text):
    return Path(text).expanduser()
  from moe_jax.types import ConfigError  # here, so that what reads local files does not wait for jax

  if not text.startswith(BUCKETS):
    raise ConfigError(f'{text!r} is remote: of remote places {BUCKETS}BUCKET/... alone can be read and written.')
  if not importlib.util.find_spec('gcsfs'):
    raise ConfigError(f'{text!r} is in a bucket, which gcsfs reads and writes: pip install gcsfs.')
  import fsspec
  from etils import epath

  fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False  # other processes write there too
  return cast(Path, epath.Path(text))


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Whether a path is not on this machine's file systems."""
  return '://' in os.fspath(path)


def absolute(path: str | os.PathLike[str]) -> Path:
  """As `to_path`, from the root on."""
  found = to_path(path)
  return found if is_remote(found) else found.absolute()


def make_folder(path: Path) -> None:
  """Makes a folder, where there is none, so that things can be moved there."""
  path.mkdir(parents=True, exist_ok=True)
  if is_remote(path):
    (path / '.keep').write_text('')


def remove_folder(path: Path) -> None:
  """Removes a folder and all in it."""
  from etils import epath

  epath.Path(path).rmtree()


def append(path: Path, text: str) -> None:
  """Adds to a file's end, by writing all of it anew where it is remote."""
  if is_remote(path):
    path.write_text((path.read_text() if path.exists() else '') + text)
    return
  with path.open('a') as file:
    file.write(text)


def copy_files(source: Path, target: Path) -> None:
  """Copies a folder's files, and those of the folders in it, to another, either of which may be remote."""
  for path in source.iterdir():
    there = target / path.name
    if path.is_dir():
      copy_files(path, there)
      continue
    there.parent.mkdir(parents=True, exist_ok=True)
    there.write_bytes(path.read_bytes())


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[Path]:
  """For what writes local files alone: the folder, or one whose files are copied there in the end."""
  if not is_remote(folder):
    yield folder
    return
  with tempfile.TemporaryDirectory() as local:
    yield Path(local)
    copy_files(Path(local), folder)


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[Path]:
  """For what reads local files alone: the folder, or a copy of it for as long."""
  if not is_remote(folder):
    yield folder
    return
  with tempfile.TemporaryDirectory() as local:
    copy_files(folder, Path(local))
    yield Path(local)
