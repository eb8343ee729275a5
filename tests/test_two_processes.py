"""Two processes of four devices each compute what one process of eight does."""

import functools

import jax
import numpy as np
import pytest

from tests.processes import join, run_two


def one_step(dispatcher):
  """Gradients and metrics of one batch on a mesh of 2 x 4, on every host whole; the same weights wherever it runs."""
  from moe_jax import sharding
  from moe_jax.objectives import LanguageModeling
  from moe_jax.training.state import abstract_variables
  from moe_jax.training.step import gradients
  from tests import tiny

  objective, batch = LanguageModeling(tiny.decoder_only(dispatcher), z_loss=1e-4), tiny.batch()
  mesh = sharding.make_mesh({'data': 2, 'expert': 4, 'model': 1})
  with sharding.activate(mesh, sharding.replicated_rules()):
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    shapes, names = abstract_variables(objective, spec)
    rng = np.random.default_rng(0)

    def place(values, where):
      return jax.make_array_from_callback(values.shape, where, lambda index: values[index])

    def weight(shape, axes):
      values = rng.normal(0, 0.3, shape.shape).astype(np.float32)
      return place(values, sharding.named_sharding(mesh, *axes))

    params = jax.tree.map(weight, shapes['params'], names['params'])
    batch = {name: place(x, sharding.named_sharding(mesh, 'batch', None)) for name, x in batch.items()}
    step = jax.jit(
      functools.partial(gradients, objective=objective),
      out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
    )
    grads, _, metrics = jax.device_get(step(params, {}, batch, jax.random.key(0)))
  leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
  return leaves | metrics


def dispatchers():
  from moe_jax.moe.dispatchers.all_to_all import all_to_all
  from moe_jax.moe.dispatchers.ragged import ragged

  return {'all_to_all': all_to_all, 'ragged': ragged}


def main(port, process, name, output):
  """What each of the two processes does."""
  join(port, process, devices=4)
  assert (jax.device_count(), jax.local_device_count()) == (8, 4)
  result = one_step(dispatchers()[name])
  if process == '0':
    np.savez(output, **result)


@pytest.mark.parametrize('name', ['all_to_all', 'ragged'])
def test_two_processes(name, tmp_path):
  output = tmp_path / 'result.npz'
  run_two('tests.test_two_processes', tmp_path, name, str(output))
  expected = one_step(dispatchers()[name])
  with np.load(output) as actual:
    assert set(actual) == set(expected)
    for key, value in expected.items():
      error = np.linalg.norm(actual[key] - value) / max(np.linalg.norm(value), 1e-6)
      assert error <= 1e-5, f'{key}: {error}'
