"""Twins of mixtures: twins of their tasks at the same rates; `sentinels` and `few_shot` make those of tasks."""

import functools

import seqio


def add_mixtures(suffix: str) -> None:
  """Registers mixture+suffix for every mixture all of whose tasks have a task+suffix, unless it is there."""
  for name in sorted(seqio.MixtureRegistry.names()):
    mixture = seqio.MixtureRegistry.get(name)
    twins = {f'{task.name}{suffix}': task for task in mixture.tasks}
    if twins.keys() <= seqio.TaskRegistry.names() and f'{name}{suffix}' not in seqio.MixtureRegistry.names():
      # Rates are asked for when they are needed, since some count examples.
      rates = [(twin, functools.partial(_rate, mixture=mixture, task=task)) for twin, task in twins.items()]
      seqio.MixtureRegistry.add(f'{name}{suffix}', rates)


def _rate(twin: seqio.Task, mixture: seqio.Mixture, task: seqio.Task) -> float:
  return mixture.get_rate(task)
