"""Eight CPU devices for every test, one seed a test, and no silent broadcasting."""

import gc
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterator
from importlib import metadata

# Read when jax and TensorFlow are imported, here and in the processes that tests start.
# Tests compile more than they compute, and much of it twice: what one process or one run compiled, the next one reads.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', 'true')
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(pathlib.Path(__file__).parents[1] / '.pytest_cache' / 'jax')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.01')
os.environ.setdefault(
  'XLA_FLAGS',
  '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
  if metadata.version('jaxlib').startswith('0.10.')  # 0.12 does not know the first flag, and stops at it
  else '',
)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('GRPC_VERBOSITY', 'ERROR')
os.environ.setdefault('NO_GCE_CHECK', 'true')  # TensorFlow Datasets looks for a cloud machine, and waits for it
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('TPU_SKIP_MDS_QUERY', 'true')  # the TPU compiler, where it is installed, looks for one too
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', 'true')

import gin
import hypothesis
import jax
import pytest

from moe_jax import sharding
from moe_jax.analysis.chips import topology_devices

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')

gc.freeze()  # what is imported stays, and tracing sets the collector off again and again
gc.set_threshold(200_000, 20, 20)

hypothesis.settings.register_profile(
  'moe_jax',
  deadline=None,  # the first example compiles
  derandomize=True,
  max_examples=20,
  suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile('moe_jax')

_CACHE = pathlib.Path(os.environ['JAX_COMPILATION_CACHE_DIR'])
_CACHE_LIMIT = 2**30  # bytes; jax keeps what it compiled for ever


def pytest_configure(config: pytest.Config) -> None:
  """Empties the cache when it has grown too large, before any worker reads it."""
  if hasattr(config, 'workerinput'):
    return
  if sum(file.stat().st_size for file in _CACHE.glob('*') if file.is_file()) > _CACHE_LIMIT:
    shutil.rmtree(_CACHE, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """The longest tests first, so that no worker is left alone with them at the end."""
  items.sort(
    key=lambda item: item.path.name not in ('test_hosts.py', 'test_kill.py', 'test_run.py', 'test_two_processes.py')
  )


@pytest.fixture
def fresh_gin(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
  """The repository's root, and no configuration from another test or for the next."""
  monkeypatch.chdir(request.config.rootpath)
  gin.clear_config()
  yield
  gin.clear_config()


@pytest.fixture
def getkey(request: pytest.FixtureRequest) -> Callable[[], jax.Array]:
  """`getkey()` is a fresh random key at each call; a test sees the same ones in every run."""

  def keys() -> Iterator[jax.Array]:
    key = jax.random.key(zlib.crc32(request.node.nodeid.encode()))
    while True:
      key, fresh = jax.random.split(key)
      yield fresh

  return keys().__next__


@pytest.fixture
def mesh() -> Callable[..., jax.sharding.Mesh]:
  """`mesh(data=2, expert=4)` is a mesh over the first eight devices."""

  def make(data: int = 1, expert: int = 1, model: int = 1, sequence: int = 1) -> jax.sharding.Mesh:
    shape = {'data': data, 'expert': expert, 'model': model, 'sequence': sequence}
    return sharding.make_mesh(shape, jax.devices()[: data * expert * model * sequence])

  return make


@pytest.fixture
def tpu() -> Iterator[Callable[..., jax.sharding.Mesh]]:
  """`tpu('v5e:16x16', data=4, expert=64)` is a mesh to compile for, with all optimizations; without libtpu, skips."""
  pytest.importorskip('libtpu', reason='needs the TPU compiler: pip install "jax[tpu]"')

  def make(topology: str, data: int = 1, expert: int = 1, model: int = 1) -> jax.sharding.Mesh:
    shape = {'data': data, 'expert': expert, 'model': model}
    return sharding.make_mesh(shape, topology_devices(topology))

  jax.config.update('jax_disable_most_optimizations', False)
  yield make
  jax.config.update('jax_disable_most_optimizations', True)
