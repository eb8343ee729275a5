"""The floors of the house: who may import whom, and what stays in one place."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LIBRARY = {p.relative_to(ROOT): ast.parse(p.read_text()) for p in sorted((ROOT / 'moe_jax').rglob('*.py'))}
TASKS = {p.relative_to(ROOT): ast.parse(p.read_text()) for p in sorted((ROOT / 'tasks').rglob('*.py'))}
DOOR = {pathlib.Path('run.py'): ast.parse((ROOT / 'run.py').read_text())}

GROUND = {'types', 'sharding', 'notices', 'paths'}
MAY_IMPORT = {  # room -> rooms; a room is a file or folder of moe_jax, and may always import itself
  'quiet': set(),
  'types': set(),
  'notices': set(),
  'paths': {'types'},
  'sharding': {'types'},
  'batch': GROUND,
  'layers': GROUND,
  'moe': GROUND | {'layers'},
  'models': GROUND | {'batch', 'layers'},
  'objectives': GROUND | {'batch', 'layers', 'models'},
  'training': GROUND | {'batch', 'objectives'},
  'data': GROUND | {'batch', 'quiet'},
  'decode': GROUND | {'batch', 'layers', 'models', 'objectives'},
  'analysis': GROUND | {'batch', 'layers', 'moe', 'models'},
  'interop': GROUND | {'batch', 'layers', 'moe', 'models', 'objectives', 'training', 'data', 'decode'},
}
MAY_IMPORT['runs'] = set(MAY_IMPORT)
# Within moe/ the router and the dispatcher do not know each other, and the experts neither.
STRANGERS = {
  'moe_jax/moe/routers': ('moe_jax.moe.dispatchers', 'moe_jax.moe.experts', 'moe_jax.moe.moe_layer'),
  'moe_jax/moe/dispatchers': ('moe_jax.moe.routers', 'moe_jax.moe.moe_layer'),
  'moe_jax/moe/experts.py': tuple(
    f'moe_jax.moe.{name}' for name in ('routers', 'dispatchers', 'routing_plan', 'moe_layer')
  ),
}
TENSORFLOW = {'clu', 'seqio', 't5x', 'tensorflow', 'tensorflow_datasets'}  # slow to import, and not needed to train
ABOUT_TENSORFLOW = {'moe_jax/data.py', 'moe_jax/interop/t5x.py'}
MESH_AXES = {'replica', 'data', 'expert', 'sequence', 'model'}


def imports(tree, deep=True):
  """Full names of what is imported, with `deep` inside functions too."""
  found, nodes = [], [tree]
  while nodes:
    node = nodes.pop()
    if isinstance(node, ast.Import):
      found += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'a relative import in line {node.lineno}'
      found += [f'{node.module}.{alias.name}' for alias in node.names]
    elif deep or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      nodes += ast.iter_child_nodes(node)
  return found


def room(path):
  return path.parts[1].removesuffix('.py')


def roots(names):
  return {name.split('.')[0] for name in names}


@pytest.mark.parametrize('path', [p for p in LIBRARY if p.name != '__init__.py'], ids=str)
def test_imports_go_down(path):
  assert room(path) in MAY_IMPORT, 'a new room: give it its floor'
  names = imports(LIBRARY[path])
  allowed = MAY_IMPORT[room(path)] | {room(path)}
  assert {name.split('.')[1] for name in names if name.startswith('moe_jax.')} <= allowed
  for place, strangers in STRANGERS.items():
    if path.is_relative_to(place):
      assert not [name for name in names if f'{name}.'.startswith(strangers)]
  if room(path) == 'analysis':
    assert roots(names) <= {'numpy', 'scipy', 'jax', 'flax', 'moe_jax'} | sys.stdlib_module_names
  assert 'tasks' not in roots(names), 'gin names the tasks, nobody imports them'
  assert 'gin' not in roots(names), 'gin stays in run.py'


def test_the_door_and_the_tasks():
  (door,) = map(imports, DOOR.values())
  assert 'gin' in roots(door) and 'tasks' not in roots(door)
  assert {name.split('.')[1] for name in door if name.startswith('moe_jax.')} <= {'quiet', 'types', 'paths', 'runs'}
  for tree in TASKS.values():
    names = imports(tree)
    assert 'gin' not in roots(names)
    assert all(name.startswith('moe_jax.types.') for name in names if name.startswith('moe_jax'))


def test_tensorflow_is_imported_late():
  for path, tree in {**LIBRARY, **DOOR}.items():
    assert not TENSORFLOW & roots(imports(tree, deep=False)) or str(path) in ABOUT_TENSORFLOW, path
    assert 't5x' not in roots(imports(tree)) or path.name == 't5x.py', "only T5X's own file imports it"
  others = [path for path in LIBRARY if str(path) not in ABOUT_TENSORFLOW and path.name != '__init__.py']
  modules = ['.'.join(path.with_suffix('').parts) for path in others]
  check = f'import sys, {", ".join(modules)}; print(*{TENSORFLOW} & sys.modules.keys())'
  run = subprocess.run([sys.executable, '-c', check], cwd=ROOT, capture_output=True, text=True)
  assert (run.returncode, run.stdout.strip()) == (0, ''), run.stderr


@pytest.mark.parametrize('path', LIBRARY, ids=str)
def test_what_stays_in_one_place(path):
  assert len((ROOT / path).read_text().splitlines()) <= 400, 'one file, one idea'
  words = set()
  for node in ast.walk(LIBRARY[path]):
    if isinstance(node, ast.Attribute):
      words.add(node.attr)
    elif isinstance(node, ast.Name):
      words.add(node.id)
    elif isinstance(node, ast.keyword):
      words.add(node.arg)
      assert node.arg not in ('check_vma', 'check_rep'), 'what shard_map checks is checked'
    elif isinstance(node, ast.alias):
      words.update(node.name.split('.'))
  assert 'shard_map' not in words or path.name == 'by_device.py', 'one file knows how journeys by device are entered'
  if path.name != 'sharding.py':
    assert not axes_named(LIBRARY[path]), 'logical names, please: the rules say which mesh axis'


def axes_named(tree):
  """Mesh axes given by name to what takes mesh axes. Elsewhere 'expert' and 'data' are logical axes, and English."""
  takers = {'P', 'PartitionSpec', 'psum', 'pmean', 'pmax', 'psum_scatter', 'all_gather', 'all_to_all', 'ppermute'}
  takers |= {'axis_index', 'axis_size', 'pvary', 'pcast', 'Mesh', 'make_mesh'}
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      taker = getattr(node.func, 'attr', getattr(node.func, 'id', None))
      given = [*node.args, *(keyword.value for keyword in node.keywords)] if taker in takers else []
    elif isinstance(node, ast.Subscript):
      given = [node.slice] if getattr(node.value, 'attr', None) == 'shape' else []  # mesh.shape['data']
    else:
      continue
    found += [n.value for arg in given for n in ast.walk(arg) if isinstance(n, ast.Constant) and n.value in MESH_AXES]
  return found


def test_axes_are_recognised():
  assert axes_named(ast.parse("P(('data', 'expert'), None)")) == ['data', 'expert']
  assert axes_named(ast.parse("jax.lax.psum(x, axis_name='model')")) == ['model']
  assert axes_named(ast.parse("mesh.shape['expert']")) == ['expert']
  assert not axes_named(ast.parse("spec('expert'); features['data']; jax.lax.psum(x, hidden_axis)"))
