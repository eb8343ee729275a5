"""Meshes, and where the rules put what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from moe_jax import sharding
from moe_jax.types import ConfigError

SHARDS, FULL = ('data', 'sequence'), ('data', 'expert', 'sequence')  # of weights, experts' and others
GROUPS = ('replica', 'data', 'expert', 'sequence')
REPLICATED, FSDP = sharding.replicated_rules(), sharding.fsdp_rules()


@pytest.mark.parametrize(
  ('wish', 'devices', 'experts', 'shape'),
  [
    ({}, 1, 0, (1, 1, 1)),
    ({'data': -1}, 8, 0, (8, 1, 1)),
    ({'data': -1}, 8, 16, (8, 1, 1)),
    ({'data': -1, 'expert': -1}, 8, 16, (1, 8, 1)),
    ({'data': -1, 'expert': -1}, 8, 4, (2, 4, 1)),
    ({'data': -1, 'expert': -1}, 8, 6, (4, 2, 1)),
    ({'data': -1, 'expert': -1}, 6, 8, (3, 2, 1)),
    ({'data': -1, 'expert': -1}, 8, 5, (8, 1, 1)),
    ({'data': -1, 'expert': -1}, 8, 0, (8, 1, 1)),
    ({'data': -1, 'expert': -1}, 1, 64, (1, 1, 1)),
    ({'data': -1, 'expert': -1, 'model': 2}, 8, 16, (1, 4, 2)),
    ({'data': 2, 'expert': -1}, 8, 16, (2, 4, 1)),
    ({'expert': -1, 'model': 4}, 8, 16, (1, 2, 4)),
    ({'data': -1, 'expert': 2, 'model': 2}, 8, 16, (2, 2, 2)),
    ({'data': 2, 'expert': 4, 'model': 1}, 8, 16, (2, 4, 1)),
  ],
)
def test_mesh_shape(wish, devices, experts, shape):
  data, expert, model = shape
  expected = {'replica': 1, 'data': data, 'expert': expert, 'sequence': 1, 'model': model}
  assert sharding.mesh_shape(wish, devices, experts) == expected


@pytest.mark.parametrize(
  ('wish', 'devices', 'complaint'),
  [
    ({'data': 3}, 8, 'needs 3 devices and there are 8'),
    ({'data': 16}, 8, 'needs 16 devices and there are 8'),
    ({'data': -1, 'model': 3}, 8, 'needs 6 devices and there are 8'),
    ({'data': 3, 'expert': -1}, 8, 'needs 6 devices and there are 8'),
    ({'data': -1, 'model': 16}, 8, 'needs 16 devices and there are 8'),
    ({'data': 2, 'expert': -1, 'model': 8}, 8, 'needs 16 devices and there are 8'),
    ({'experts': 8}, 8, "unknown axis 'experts'.* data, expert, sequence, model"),
    ({'model': -1}, 8, 'positive, or -1 on data or expert'),
    ({'data': 0}, 8, 'positive'),
    ({'data': -2}, 8, 'positive'),
  ],
)
def test_mesh_shapes_that_cannot_be(wish, devices, complaint):
  with pytest.raises(ConfigError, match=complaint):
    sharding.mesh_shape(wish, devices, num_experts=4)


def test_mesh():
  mesh = sharding.make_mesh({'data': 1, 'expert': 2, 'model': 2})
  assert dict(mesh.shape) == {'replica': 1, 'data': 1, 'expert': 2, 'sequence': 1, 'model': 2}
  assert mesh.axis_names == sharding.MESH_AXES and set(mesh.axis_types) == {AxisType.Auto}
  assert list(mesh.devices.flat) == jax.devices()[:4]


def spec(rules, mesh, *names):
  with sharding.activate(mesh, rules):
    return sharding.spec(*names)


@pytest.mark.parametrize(
  ('names', 'replicated', 'fsdp'),
  [
    (('expert', 'embed', None, 'expert_mlp'), ('expert', None, None, 'model'), ('expert', SHARDS, None, 'model')),
    (('expert', 'expert_mlp', 'embed'), ('expert', 'model', None), ('expert', 'model', SHARDS)),
    (('layers', 'expert', 'expert_mlp', 'embed'), (None, 'expert', 'model', None), (None, 'expert', 'model', SHARDS)),
    (('embed', 'heads', 'head_dim'), (None, 'model', None), (FULL, 'model', None)),
    (('embed', None, 'mlp'), (None, None, 'model'), (FULL, None, 'model')),
    (('vocab', 'embed'), ('model', None), ('model', FULL)),
    (('embed',), (None,), (FULL,)),
    (('batch', None), (('replica', 'data', 'expert'), None), (('replica', 'data', 'expert'), None)),
    (('batch', 'length'), (('replica', 'data', 'expert'), 'sequence'), (('replica', 'data', 'expert'), 'sequence')),
    (('group', None), (GROUPS, None), (GROUPS, None)),
    (
      ('expert_group', 'expert'),
      (('replica', 'data', 'sequence'), 'expert'),
      (('replica', 'data', 'sequence'), 'expert'),
    ),
  ],
)
def test_rules(names, replicated, fsdp, mesh):
  assert spec(REPLICATED, mesh(2, 2, 2), *names) == PartitionSpec(*replicated)
  assert spec(FSDP, mesh(2, 2, 2), *names) == PartitionSpec(*fsdp)


def test_experts_and_dense_layers_split_the_same_devices_differently(mesh):
  rules = sharding.tensor_over_experts_rules()
  for names, where in [
    (('batch', None), (('replica', 'data'), None)),
    (('group', None), (('replica', 'data', 'sequence', 'expert'), None)),
    (('embed', 'heads', 'head_dim'), (SHARDS, ('expert', 'model'), None)),
    (('expert', 'embed', None, 'expert_mlp'), ('expert', SHARDS, None, 'model')),
  ]:
    assert spec(rules, mesh(2, 2, 2), *names) == PartitionSpec(*where)


def test_slices_differ_in_replicas_alone():
  shape = sharding.mesh_shape({'data': -1, 'expert': -1}, 64, 16, num_slices=2)
  assert shape == {'replica': 2, 'data': 2, 'expert': 16, 'sequence': 1, 'model': 1}
  with pytest.raises(ConfigError, match='there are 2 slices'):
    sharding.mesh_shape({'replica': 1, 'data': -1}, 64, 16, num_slices=2)


def test_where_texts_grow_nothing_is_split_along_them(mesh):
  with sharding.activate(mesh(data=2, sequence=4), FSDP), sharding.whole_sequences():
    assert sharding.spec('batch', 'length') == PartitionSpec(('replica', 'data', 'expert'), None)
    assert (sharding.shards('group'), sharding.shards('length')) == (2, 1)
    assert sharding.spec('embed') == PartitionSpec(FULL)
  with sharding.whole_sequences():
    assert sharding.shards('group') == 1
  other = jax.sharding.Mesh(np.asarray(jax.devices()).reshape(4, 2), ('data', 'model'))
  with sharding.activate(other, sharding.data_model_rules()), sharding.whole_sequences():
    assert (sharding.shards('group'), sharding.shards('length'), sharding.shards('mlp')) == (4, 1, 2)


def test_a_name_without_a_rule_is_refused(mesh):
  with pytest.raises(ConfigError, match="logical axis 'emebd'"):
    spec(REPLICATED, mesh(), 'emebd', None)


def test_without_a_mesh_nothing_is_split():
  x = jnp.ones((4, 2))
  assert sharding.constrain(x, 'batch', None) is x
  assert sharding.shards('batch') == 1
  assert sharding.spec('batch', None) == PartitionSpec(None, None)


def test_activation_is_whole_and_ends(mesh):
  """Constraints work inside, under jit and outside of it, and the mesh is gone afterwards."""
  with sharding.activate(mesh(2, 2, 2), REPLICATED):
    assert (sharding.shards('batch'), sharding.shards('expert'), sharding.shards('embed')) == (4, 2, 1)
    expected = sharding.named_sharding(jax.sharding.get_mesh(), 'batch', 'mlp')
    for constrain in (sharding.constrain, jax.jit(sharding.constrain, static_argnums=(1, 2))):
      x = constrain(jnp.ones((8, 4)), 'batch', 'mlp')
      assert x.sharding.is_equivalent_to(expected, 2)
      assert x.addressable_shards[0].data.shape == (2, 2)
  assert sharding.shards('batch') == 1


def test_partitioned_weights_carry_their_names():
  box = sharding.partitioned(lambda key, shape: jnp.ones(shape), 'embed', 'mlp')(None, (2, 3))
  assert box.names == ('embed', 'mlp')
  np.testing.assert_array_equal(box.value, np.ones((2, 3)))
