"""The project's own files: pins, Makefile, tree."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
PYTHONS = ('3.11', '3.12', '3.13')
TOP_LEVEL = {
  *('moe_jax', 'gin', 'tasks', 'run.py', 'tests', 'requirements.txt', 'README.md'),
  *('pyproject.toml', 'Makefile', 'LICENSE', 'CONTRIBUTING.md'),
}


def _environment(python: str) -> dict[str, str]:
  return {'python_version': python, 'python_full_version': f'{python}.0', 'sys_platform': 'linux', 'extra': ''}


def _applies(requirement: Requirement, python: str) -> bool:
  return requirement.marker is None or requirement.marker.evaluate(_environment(python))


@pytest.mark.parametrize('python', PYTHONS)
def test_requirements_pin_every_dependency(python):
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  lines = [line for line in (ROOT / 'requirements.txt').read_text().splitlines() if not line.startswith('#')]
  pins = {}
  for pin in filter(lambda pin: _applies(pin, python), map(Requirement, lines)):
    (specifier,) = pin.specifier
    assert specifier.operator == '==' and pin.url is None, pin
    assert canonicalize_name(pin.name) not in pins, f'{pin.name} is pinned twice'
    pins[canonicalize_name(pin.name)] = specifier.version
  wanted = map(Requirement, project['dependencies'] + project['optional-dependencies']['dev'])
  for requirement in filter(lambda requirement: _applies(requirement, python), wanted):
    version = pins.get(canonicalize_name(requirement.name))
    assert version is not None, f'{requirement.name} is not pinned: make lock'
    assert requirement.specifier.contains(version, prereleases=True), f'{requirement}, and {version} is pinned'


def test_the_same_pythons_everywhere():
  requires = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['requires-python']
  supported = re.search(r'^SUPPORTED := (.*)$', (ROOT / 'Makefile').read_text(), re.MULTILINE)
  assert supported and tuple(supported[1].split()) == PYTHONS
  minors = [f'3.{minor}' for minor in range(20) if Requirement(f'x{requires}').specifier.contains(f'3.{minor}')]
  assert tuple(minors) == PYTHONS


def test_requirements_name_no_place():
  text = (ROOT / 'requirements.txt').read_text()
  assert not re.search(r'://|index-url|find-links|file:|/', text)
  assert 'make lock' in text.splitlines()[1]


def test_the_gin_folder_does_not_hide_gin_config():
  code = 'import gin, sys; print(gin.__file__ or list(gin.__path__)); gin.parse_config'
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert not pathlib.Path(done.stdout.strip()).is_relative_to(ROOT / 'gin')
  assert not (ROOT / 'gin' / '__init__.py').exists()


def test_nothing_but_the_agreed_names_at_the_top():
  if not (ROOT / '.git').exists() or not shutil.which('git'):
    pytest.skip('not a git checkout')
  listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
  if listed.returncode:
    pytest.skip(f'git does not say: {listed.stderr}')
  names = {path.partition('/')[0] for path in listed.stdout.splitlines()}
  assert {name for name in names if not name.startswith('.')} <= TOP_LEVEL


# A Python that says its version, 'makes' a .venv, and 'installs' nothing, or fails to when the file `fail` exists.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
  *version_info*) echo {version} ;;
  "-m venv .venv") test ! -e no-venv || exit 1; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *"uv pip install"*) echo {version} installs >> log; test ! -e fail ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
  """A folder with the Makefile, whose name has a space in it."""
  if not shutil.which('make'):
    pytest.skip('no make')
  folder = tmp_path / 'a checkout'
  folder.mkdir()
  for name in ('Makefile', 'requirements.txt'):
    shutil.copy(ROOT / name, folder)
  for version in ('3.9', '3.11', '3.12', '3.14'):
    fake = tmp_path / f'python{version}'
    fake.write_text(FAKE_PYTHON.format(version=version))
    fake.chmod(0o755)
  (tmp_path / 'uv').write_text('#!/bin/sh\nexit 1\n')  # the way out where Python lacks its venv module
  (tmp_path / 'uv').chmod(0o755)
  return folder


def _make(checkout: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
  environment = {name: value for name, value in os.environ.items() if name not in ('MAKEFLAGS', 'MAKELEVEL', 'PYTHON')}
  environment |= {'MFLAGS': '', 'PATH': f'{checkout.parent}:{environment["PATH"]}'}
  return subprocess.run(['make', *arguments], cwd=checkout, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize('target', ['quickstart', 'test', 'check', 'format', 'lock'])
@pytest.mark.parametrize('version', ['3.9', '3.14', '2'])
def test_an_unfit_python_gets_one_line(checkout, target, version):
  done = _make(checkout, target, f'PYTHON=python{version}' if version != '2' else 'PYTHON=no-such-python')
  assert done.returncode != 0
  assert done.stdout == ''
  (line,) = done.stderr.splitlines()
  assert 'needs Python 3.11, 3.12 or 3.13' in line
  assert ('not there' if version == '2' else version) in line
  assert f'make {target} PYTHON=' in line
  assert sorted(path.name for path in checkout.iterdir()) == ['Makefile', 'requirements.txt']


def test_installs_once(checkout):
  log = checkout / 'log'
  assert _make(checkout, 'test', 'PYTHON=python3.11').returncode == 0
  assert log.read_text() == '3.11 installs\n'
  _make(checkout, 'test', 'PYTHON=python3.11')
  _make(checkout, 'check')  # whatever python3 is: .venv is whole
  assert log.read_text() == '3.11 installs\n'


def test_another_python_makes_another_venv(checkout):
  _make(checkout, 'test', 'PYTHON=python3.11')
  (checkout / '.venv' / 'left over').touch()
  assert _make(checkout, 'test', 'PYTHON=python3.12').returncode == 0
  assert (checkout / 'log').read_text() == '3.11 installs\n3.12 installs\n'
  assert not (checkout / '.venv' / 'left over').exists()


def test_new_pins_are_installed_into_the_same_venv(checkout):
  _make(checkout, 'test', 'PYTHON=python3.11')
  (checkout / '.venv' / 'mine').touch()
  stamp = (checkout / '.venv' / '.installed').stat()
  os.utime(checkout / 'requirements.txt', (stamp.st_atime + 9, stamp.st_mtime + 9))
  assert _make(checkout, 'test').returncode == 0
  assert (checkout / 'log').read_text() == '3.11 installs\n' * 2
  assert (checkout / '.venv' / 'mine').exists()


def test_a_failed_install_is_not_taken_for_done(checkout):
  (checkout / 'fail').touch()
  done = _make(checkout, 'test', 'PYTHON=python3.11')
  assert done.returncode != 0 and 'The install did not finish' in done.stderr
  assert not (checkout / '.venv' / '.installed').exists()
  (checkout / 'fail').unlink()
  assert _make(checkout, 'test', 'PYTHON=python3.11').returncode == 0
  assert (checkout / 'log').read_text() == '3.11 installs\n' * 2


def test_a_python_without_venv_gets_one_line(checkout):
  (checkout / 'no-venv').touch()
  done = _make(checkout, 'test', 'PYTHON=python3.11')
  assert done.returncode != 0
  line, _ = done.stderr.splitlines()  # the second is make's own
  assert 'python3.11 cannot make a virtual environment' in line and 'python3.11-venv' in line
  assert not (checkout / '.venv').exists()


def test_help_names_every_target(checkout):
  done = _make(checkout)
  assert done.returncode == 0
  targets = [line.split()[1] for line in done.stdout.splitlines()]
  assert targets == ['help', 'quickstart', 'test', 'check', 'format', 'lock', 'clean']
