"""Processes that join one another, as hosts do."""

import os
import pathlib
import socket
import subprocess
import sys

import jax

ROOT = pathlib.Path(__file__).parents[1]


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    return probe.getsockname()[1]


def join(port: str, process: str, devices: int) -> None:
  """What each of two processes does first."""
  jax.config.update('jax_num_cpu_devices', devices)
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'localhost:{port}', num_processes=2, process_id=int(process))


def run_two(module: str, folder: pathlib.Path, *arguments: str, seconds: float = 300) -> list[str]:
  """Calls `main(port, process, *arguments)` of a module in two processes, and gives what each of them said."""
  command = [sys.executable, '-c', f'import sys; from {module} import main; main(*sys.argv[1:])', str(free_port())]
  logs = [folder / f'{process}.log' for process in range(2)]  # a pipe would fill up, and stop who writes
  both = [
    subprocess.Popen(
      [*command, str(process), *arguments],
      cwd=ROOT,
      env={**os.environ, 'PYTHONPATH': str(ROOT)},
      stdout=log.open('w'),
      stderr=subprocess.STDOUT,
    )
    for process, log in enumerate(logs)
  ]
  try:
    for process in both:
      process.wait(seconds)
  finally:
    for process in both:
      process.kill()
  said = [log.read_text() for log in logs]
  assert [process.returncode for process in both] == [0, 0], '\n'.join(said)[-4000:]
  return said
