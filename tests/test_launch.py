"""The launch script against a gcloud that only remembers what it was asked for, and hosts that are this machine."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / 'moe_jax' / 'scripts' / 'tpu_vm.sh'
WHERE = ['--name', 'moe', '--zone', 'us-central2-b']
WHERE_IT_IS = ['moe', '--zone=us-central2-b']
NODE = ['--node-id', 'moe', '--accelerator-type']
ASKED = ['compute', 'tpus', 'queued-resources']
GCLOUD = f"""#!{sys.executable}
import json, os, sys
with open(os.environ['CALLS'], 'a') as calls:
  calls.write(json.dumps(sys.argv[1:]) + '\\n')
if 'describe' in sys.argv:
  states = os.environ.get('STATES', 'ACTIVE').split()
  asked = sum('"describe"' in line for line in open(os.environ['CALLS']))
  print(states[min(asked, len(states)) - 1])
"""


@pytest.fixture
def launch(tmp_path):
  """`launch('run', ...)` gives the finished process, and the arguments of every call of gcloud."""
  stub = tmp_path / 'bin' / 'gcloud'
  stub.parent.mkdir()
  stub.write_text(GCLOUD)
  stub.chmod(0o755)
  calls = tmp_path / 'calls'

  def call(*arguments, **environment):
    calls.write_text('')
    environment = {**os.environ, 'PATH': f'{stub.parent}:{os.environ["PATH"]}', 'CALLS': str(calls), **environment}
    done = subprocess.run(
      [SCRIPT, *arguments], env={'POLL_SECONDS': '0', **environment}, capture_output=True, text=True, timeout=60
    )
    return done, [json.loads(line) for line in calls.read_text().splitlines()]

  return call


def test_shellcheck_finds_nothing():
  shellcheck = shutil.which('shellcheck', path=f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}')
  assert shellcheck, 'make test installs it'
  subprocess.run([shellcheck, SCRIPT], check=True)


@pytest.mark.parametrize(
  ('more', 'asked'),
  [
    (['--type', 'v5litepod-16'], [*NODE, 'v5litepod-16', 'v2-alpha-tpuv5-lite']),
    (
      ['--type', 'v4-128', '--spot'],
      [*NODE, 'v4-128', 'tpu-ubuntu2204-base', '--spot'],
    ),
    (
      ['--type', 'v6e-256', '--slices', '2', '--version', 'mine', '--project', 'ours'],
      ['--project=ours', '--node-count', '2', '--node-prefix', 'moe', '--accelerator-type', 'v6e-256', 'mine'],
    ),
  ],
)
def test_create_asks_and_waits(launch, more, asked):
  done, calls = launch('create', *WHERE, *more, STATES='WAITING_FOR_RESOURCES PROVISIONING ACTIVE')
  assert done.returncode == 0, done.stderr
  create, *waited = calls
  assert [argument for argument in create if argument != '--runtime-version'] == [
    *ASKED, 'create', 'moe', '--zone=us-central2-b', *asked
  ]  # fmt: skip
  assert len(waited) == 3 and all(call[3] == 'describe' for call in waited)


def test_create_says_when_there_will_be_none(launch):
  done, _ = launch('create', *WHERE, '--type', 'v4-8', STATES='WAITING_FOR_RESOURCES FAILED')
  assert done.returncode == 2 and done.stderr.strip() == 'moe is FAILED: delete it, and create it anew.'


def test_install_copies_the_checkout_and_nothing_heavy(launch):
  done, calls = launch('install', *WHERE, '--bucket', 'my bucket')
  assert done.returncode == 0, done.stderr
  scp, *commands = calls
  assert scp[3] == 'scp' and scp[5] == 'moe:' and {'--node=all', '--worker=all'} <= set(scp)
  names = subprocess.run(['tar', 'tzf', scp[4]], capture_output=True, text=True, check=True).stdout.splitlines()
  code = {
    f'./{path.relative_to(ROOT)}' for folder in ('moe_jax', 'gin', 'tasks') for path in (ROOT / folder).rglob('*.*')
  }
  assert {name for name in code if '__pycache__' not in name} | {'./run.py', './requirements.txt'} <= set(names)
  assert not any(name.startswith(('./.', './runs')) or '__pycache__' in name for name in names)
  assert all({'--node=all', '--worker=all'} <= set(call) for call in commands)
  for call in commands:
    subprocess.run(['bash', '-n', '-c', call[-1].removeprefix('--command=')], check=True)
  assert 'echo my\\ bucket > run.bucket' in commands[-1][-1] and 'gcsfuse --implicit-dirs' in commands[-1][-1]


@pytest.fixture
def host(launch, tmp_path):
  """`host(call)` does here what gcloud would do on a host, whose Python notes its arguments, and runs until SIGTERM."""
  folder = tmp_path / 'home' / 'moe_jax'
  python = folder / '.venv' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  python.write_text(
    f'#!{sys.executable}\nimport json, os, signal, sys, time\n'
    'print(json.dumps([os.getpid(), *sys.argv[1:]]), flush=True)\n'
    "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), print('saved', flush=True), os._exit(143)))\n"
    "print('trains', flush=True)\ntime.sleep(600)\n"
  )
  python.chmod(0o755)

  def call(remote):
    remote = remote[-1].removeprefix('--command=')
    return subprocess.run(['bash', '-c', remote], cwd=folder.parent, capture_output=True, text=True, timeout=60)

  yield call, folder
  if (folder / 'run.pid').exists():
    with contextlib.suppress(ProcessLookupError):
      os.kill(int((folder / 'run.pid').read_text()), signal.SIGKILL)


def wait_for(path, text):
  for _ in range(600):
    if path.exists() and text in path.read_text():
      return
    time.sleep(0.1)
  raise AssertionError(f'{path} lacks {text!r}')


def test_run_gives_every_host_the_arguments_as_they_are_and_stop_waits(launch, host):
  on_host, folder = host
  given = [
    '--gin_file=gin/experiments/quickstart.gin',
    "--gin.MODEL_DIR='gs://x'",
    '--gin.MESH={"data": -1}',
    'a  b $HOME `id` \\ * \n !',
    '',
  ]
  done, (start,) = launch('run', *WHERE, '--', *given)
  assert done.returncode == 0 and {'--node=all', '--worker=all'} <= set(start)
  _, (_, status) = launch('status', *WHERE)
  _, (stop,) = launch('stop', *WHERE)

  assert 'does not run' in on_host(status).stdout
  assert on_host(start).returncode == 0
  wait_for(folder / 'run.log', 'trains')
  process, *received = json.loads((folder / 'run.log').read_text().splitlines()[0])
  assert received == ['-u', 'run.py', '--distributed', *given]
  assert int((folder / 'run.pid').read_text()) == process

  again = on_host(start)
  assert again.returncode == 1 and 'runs already' in again.stderr
  assert int((folder / 'run.pid').read_text()) == process and 'does not' not in on_host(status).stdout

  done = on_host(stop)
  assert done.returncode == 0 and 'does not run' in done.stdout, done.stderr
  assert (folder / 'run.log').read_text().splitlines()[-1] == 'saved'
  assert on_host(stop).returncode == 0
  assert 'does not run' in on_host(status).stdout


def test_a_reboot_does_not_part_a_run_from_its_bucket(launch, host, tmp_path):
  on_host, folder = host
  (folder / 'run.bucket').write_text('my bucket')
  (tmp_path / 'bin' / 'gcsfuse').write_text('#!/bin/sh\necho "$@"; exit 7\n')
  (tmp_path / 'bin' / 'gcsfuse').chmod(0o755)
  _, (start,) = launch('run', *WHERE, '--', 'x')
  done = on_host([f'PATH={tmp_path / "bin"}:$PATH\n{start[-1].removeprefix("--command=")}'])
  assert (done.returncode, done.stdout) == (7, '--implicit-dirs my bucket runs\n')
  assert not (folder / 'run.pid').exists()


@pytest.mark.parametrize(
  ('command', 'expected'),
  [
    (
      ['logs'],
      ['ssh', *WHERE_IT_IS, '--node=0', '--worker=0', '--command=tail -n 100 -F moe_jax/run.log'],
    ),
    (['delete'], ['delete', 'moe', '--zone=us-central2-b', '--force', '--quiet']),
    (
      ['fetch', '--', 'runs/it'],
      ['scp', 'moe:moe_jax/runs/it', '.', '--recurse', '--node=0', '--worker=0', '--zone=us-central2-b'],
    ),
  ],
)
def test_the_other_commands(launch, command, expected):
  done, (call,) = launch(command[0], *WHERE, *command[1:])
  assert done.returncode == 0, done.stderr
  assert call == [*ASKED, *expected]


@pytest.mark.parametrize('command', ['create', 'install', 'run', 'logs', 'status', 'stop', 'fetch', 'delete'])
def test_a_dry_run_prints_and_calls_nothing(launch, command):
  done, calls = launch(command, *WHERE, '--type', 'v4-8', '--dry-run', '--', 'x')
  assert (done.returncode, calls) == (0, []), done.stderr
  assert 'gcloud compute tpus queued-resources' in done.stdout


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['crate', *WHERE], 'Unknown command crate'),
    (['logs', '--zone', 'z'], 'logs needs --name.'),
    (['logs', '--name', 'n'], 'logs needs --zone.'),
    (['logs', '--nane', 'n'], 'Unknown argument --nane'),
    (['logs', '--name'], '--name needs a value.'),
    (['create', *WHERE], 'create needs --type'),
    (['create', *WHERE, '--type', 'v9-8'], 'No software is known for --type v9-8'),
    (['create', *WHERE, '--type', 'v4-8', '--slices', 'two'], '--slices two is no number'),
    (['run', *WHERE], 'run needs arguments'),
  ],
)
def test_bad_input_gets_one_line(launch, arguments, message):
  done, calls = launch(*arguments)
  assert done.returncode == 2 and calls == []
  (line,) = done.stderr.splitlines()
  assert message in line


def test_help(launch):
  done, _ = launch('--help')
  assert done.returncode == 0 and 'usage: tpu_vm.sh COMMAND' in done.stdout and 'set -euo' not in done.stdout
