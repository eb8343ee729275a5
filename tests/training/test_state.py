"""Where the pieces of a training state live."""

import functools

import jax
import pytest

from moe_jax import sharding
from moe_jax.objectives import LanguageModeling
from moe_jax.training import optimizers
from moe_jax.training.state import Names, follow_params, init_state
from moe_jax.types import ConfigError
from tests import tiny

ADAFACTOR = functools.partial(optimizers.adafactor, learning_rate=lambda _: 0.1)
ADAMW = functools.partial(optimizers.adamw, learning_rate=lambda _: 0.1)


def prepare(mesh, optimizer, rules=None, **options):
  batch = tiny.batch()
  spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
  with sharding.activate(mesh, rules or sharding.fsdp_rules()):
    return init_state(LanguageModeling(tiny.decoder_only(**options)), optimizer, spec, mesh)


@pytest.mark.parametrize('optimizer', [ADAFACTOR, ADAMW], ids=['adafactor', 'adamw'])
def test_state_is_made_where_its_spec_says(mesh, optimizer):
  the_mesh = mesh(2, 2, 2)
  make_state, spec, _ = prepare(the_mesh, optimizer)
  with sharding.activate(the_mesh, sharding.fsdp_rules()):
    state = make_state()
  for array, expected in zip(jax.tree.leaves(state), jax.tree.leaves(spec), strict=True):
    assert array.shape == expected.shape and array.dtype == expected.dtype
    assert array.sharding.is_equivalent_to(expected.sharding, array.ndim)


def test_experts_lie_along_the_expert_axis_and_their_moments_beside_them(mesh):
  _, spec, _ = prepare(mesh(2, 2, 2), ADAMW)
  wi = spec.params['stack_0']['blocks']['moe']['experts']['wi_0']
  assert wi.shape == (2, 8, 32, 32)  # layers, experts, width, hidden
  assert tuple(wi.sharding.spec) == (None, 'expert', ('data', 'sequence'), 'model')
  mirrors = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(spec.opt_state)
    if "['experts']['wi_0']" in jax.tree_util.keystr(path)
  ]
  assert len(mirrors) == 2 and all(leaf.sharding == wi.sharding for leaf in mirrors)


def test_factored_moments_lose_the_axis_they_sum_over(mesh):
  the_mesh = mesh(2, 2, 2)
  names = {'wi': Names(('layers', 'expert', 'embed', 'expert_mlp'))}
  params = {'wi': jax.ShapeDtypeStruct((3, 4, 128, 160), 'float32')}
  with sharding.activate(the_mesh, sharding.fsdp_rules()):
    placed = {'wi': sharding.named_sharding(the_mesh, *names['wi'])}
  opt_state = jax.eval_shape(ADAFACTOR(names).init, params)
  specs = {
    leaf.shape: tuple(place.spec)
    for leaf, place in zip(
      jax.tree.leaves(opt_state), jax.tree.leaves(follow_params(opt_state, params, placed, the_mesh)), strict=True
    )
  }
  assert specs[3, 4, 128] == (None, 'expert', ('data', 'sequence'))
  assert specs[3, 4, 160] == (None, 'expert', 'model')


def test_experts_that_do_not_divide_get_one_clear_line(mesh):
  with pytest.raises(ConfigError, match=r'NUM_EXPERTS=8 does not divide over the mesh axis expert of 3') as error:
    prepare(
      sharding.make_mesh({'data': 1, 'expert': 3, 'model': 1}, jax.devices()[:3]), ADAMW, sharding.replicated_rules()
    )
  assert '\n' not in str(error.value)


def test_the_first_weights_do_not_depend_on_the_mesh(mesh):
  values = []
  for shape in [(1, 1, 1), (2, 2, 2)]:
    make_state, _, _ = prepare(mesh(*shape), ADAMW)
    with sharding.activate(mesh(*shape), sharding.fsdp_rules()):
      values.append(jax.device_get(make_state().params))
  jax.tree.map(lambda a, b: (a == b).all() or pytest.fail('differs'), *values)
