"""Dense or sparse, and which, for a budget: ranked candidates, the reasons, and the command of the winner."""

import dataclasses
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from moe_jax.analysis import budget as budgets
from moe_jax.analysis.budget import JOINT, TIE, Budget, Candidate, Opinion
from moe_jax.analysis.chips import CHIPS, Chip, read_topology
from moe_jax.analysis.published_laws import PUBLISHED
from moe_jax.paths import to_path
from moe_jax.types import ConfigError

DOWNSTREAM = ('pretraining', 'knowledge', 'reasoning', 'fine_tuning')
ROOM = 0.7  # of memory for weights, gradients and optimizer; what is left is for activations, or the cache of a server
BATCH_TOKENS, LENGTH, VOCABULARY = 2**20, 2048, 32128  # of gin/experiments/advised.gin
PIECE = 4096  # tokens of a device in a microbatch
ATTEMPTS, SMALLER = 4, 0.9  # at models that fit, by their plans; and how much smaller the next is than in proportion
ROOMS = {'dense': 'training_bytes', 'sparse': 'sparse_training_bytes'}  # of `Budget`
SURVEY = 'Fedus, Dean and Zoph 2022, section 6'
EXPERIMENT = 'gin/experiments/advised.gin'
Bindings = Mapping[str, Any]


class Reason(NamedTuple):
  """Attributes: text; source, the law, plan, rule or input that it is from."""

  text: str
  source: str


def advise(
  model_dir: str,
  topology: str | None = None,
  hours: float | None = None,
  flops: float | None = None,
  serving_chip: str | None = None,
  serving_devices: int = 1,
  serving_gib: float | None = None,
  serving_speed: float | None = None,
  latency_ms: float | None = None,
  tokens: float | None = None,
  downstream: str = 'pretraining',
  sweep: str | None = None,
  mfu: float = 0.4,
  sparse_mfu: float = 0.3,
  plan: Callable[[Bindings], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
  """Ranks dense and sparse models for a budget, and says why.

  Args:
    model_dir: where advice.json goes.
    topology: what trains, such as 'v5e:2x4'.
    hours: for how long.
    flops: of training instead, dense and sparse alike.
    serving_chip: a TPU that will serve the model, such as 'v5e'.
    serving_devices: how many.
    serving_gib: GiB of memory of what serves, all together, where it is another device.
    serving_speed: bytes/s of that memory.
    latency_ms: for each token of one reader at most; a model reads the weights that work on a token once for each.
    tokens: of text to train on, each once; None for any.
    downstream: what it is for, one of `DOWNSTREAM`.
    sweep: MODEL_DIR of a sweep, whose fits are told too.
    mfu, sparse_mfu: shares of peak FLOP/s, of dense and sparse models, where there are no plans.
    plan: compiles EXPERIMENT under bindings for the topology, see `runs.plan.plan`; the two best are, and their plans
      take the place of the assumed shares.

  Returns:
    What advice.json holds.

  Raises:
    ConfigError: if an input makes no sense, or no model meets all limits.
  """
  check(
    HOURS=hours, FLOPS=flops, SERVING_DEVICES=serving_devices, SERVING_GIB=serving_gib, SERVING_SPEED=serving_speed,
    LATENCY_MS=latency_ms, TOKENS=tokens, MFU=mfu, SPARSE_MFU=sparse_mfu,
  )  # fmt: skip
  if downstream not in DOWNSTREAM:
    raise ConfigError(f'DOWNSTREAM={downstream!r} is none of {", ".join(DOWNSTREAM)}.')
  if flops is None and (topology is None or hours is None):
    raise ConfigError("What is the budget? Give TOPOLOGY, such as 'v5e:2x4', and HOURS; or FLOPS.")
  if flops is not None and hours is not None:
    raise ConfigError('HOURS and FLOPS are both set: which is it?')
  if plan and (topology is None or hours is None):
    raise ConfigError('--search compiles for a TOPOLOGY, and counts HOURS: give both.')
  chip, devices = read_topology(topology) if topology else (None, 1)
  memory, speed = server(serving_chip, serving_devices, serving_gib, serving_speed)
  if latency_ms is not None and speed is None:
    raise ConfigError('LATENCY_MS needs the speed of the memory that serves: give SERVING_CHIP, or SERVING_SPEED.')
  limits: dict[str, Any] = {
    **dict.fromkeys(ROOMS.values(), ROOM * devices * chip.memory if chip else math.inf),
    'serving_bytes': memory and ROOM * memory,
    'active_bytes': latency_ms and speed and latency_ms / 1000 * speed,
    'tokens': tokens,
    'vocabulary': VOCABULARY,
    'width_multiple': devices,
  }

  def budget(dense_share: float, sparse_share: float) -> Budget:
    if flops is not None:
      return Budget(flops, flops, **limits)
    assert chip and hours
    peak = devices * chip.peak * hours * 3600
    return Budget(peak * dense_share, peak * sparse_share, **limits)

  spent = budget(mfu, sparse_mfu)
  ranked = budgets.candidates(spent)
  plans: dict[str, Any] = {}
  misfits: list[Reason] = []
  for _ in range(ATTEMPTS if plan else 0):
    assert plan and chip
    for kind, best in bests(ranked).items():
      if kind not in plans or plans[kind]['fits'] is False:
        found = summary_of(best, plan({**bindings_of(best, devices), 'TOPOLOGY': topology}))
        plans[kind] = found
        if found['fits'] is False:
          misfits.append(does_not_fit(kind, found))
          share = min(chip.memory / found['bytes'], 1.0) if found['bytes'] else SMALLER
          limits[ROOMS[kind]] = SMALLER * share * best.total * Budget.training_bytes_per_parameter
    ranked = budgets.candidates(budget(mfu, sparse_mfu))
    if all(found['fits'] is not False for found in plans.values()):
      break
  if plan:
    spent = budget(plans.get('dense', {}).get('mfu') or mfu, plans.get('sparse', {}).get('mfu') or sparse_mfu)
    ranked = [one for one in budgets.candidates(spent) if not known_too_large(one, plans)]
    if not ranked:
      raise ConfigError('Neither the best dense nor the best sparse model fits, by their plans: take more chips.')
  kinds = bests(ranked)
  winner = choose(ranked, downstream)
  opinions = budgets.opinions(kinds['sparse'], VOCABULARY) if 'sparse' in kinds else []
  reasons = [
    *(Reason(*line) for line in said_of_inputs(spent, flops, topology, hours, mfu, sparse_mfu, plans)),
    *misfits,
    *rules(spent, ranked, winner, opinions, devices, downstream, chip),
    *own_sweep(sweep),
  ]
  result = {
    'winner': described(winner),
    'candidates': [described(one) for one in ranked],
    'budget': {k: v for k, v in dataclasses.asdict(spent).items() if v not in (None, math.inf)},
    'opinions': [{**one._asdict(), 'source': PUBLISHED[one.law].source} for one in opinions],
    'reasons': [reason._asdict() for reason in reasons],
    'plans': plans,
    'command': command_of(winner, devices),
  }
  folder = to_path(model_dir)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'advice.json').write_text(json.dumps(result, indent=2))
  show(ranked, winner, opinions, reasons, command_of(winner, devices))
  return result


# ---- What is given --------------------------------------------------------------------------------------------------


def check(**numbers: float | None) -> None:
  """Raises ConfigError, naming the first number that is given and is not a positive one."""
  for name, value in numbers.items():
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
      raise ConfigError(f'{name}={value!r}: a positive number is wanted.')


def server(chip: str | None, devices: int, gib: float | None, speed: float | None) -> tuple[float | None, float | None]:
  """Bytes and bytes/s of the memory that serves; None where nothing is said of it."""
  if chip is None:
    return gib and gib * 2**30, speed
  known = {one.name: one for one in CHIPS.values()}
  if chip not in known:
    raise ConfigError(f'SERVING_CHIP={chip!r} is none of {", ".join(sorted(known))}: for others give SERVING_GIB.')
  if gib is not None or speed is not None:
    raise ConfigError('SERVING_CHIP says its memory by itself: leave SERVING_GIB and SERVING_SPEED out.')
  return devices * known[chip].memory, devices * known[chip].memory_speed


def bests(ranked: Sequence[Candidate]) -> dict[str, Candidate]:
  """The best 'dense' and the best 'sparse' candidate, if there are any."""
  found: dict[str, Candidate] = {}
  for one in ranked:
    found.setdefault('sparse' if one.experts > 1 else 'dense', one)
  return found


def choose(ranked: Sequence[Candidate], downstream: str) -> Candidate:
  """Of what cannot be told from the best: the simplest, or for knowledge, which profits most of experts, the best.

  For reasoning and fine-tuning twice the difference counts for nothing: there fewer experts do better than their loss
  says (Fedus, Dean and Zoph 2022, section 6).
  """
  width = {'knowledge': 0.0, 'pretraining': TIE}.get(downstream, 2 * TIE)
  return min((one for one in ranked if one.loss <= ranked[0].loss + width), key=lambda one: (one.experts, one.loss))


def does_not_fit(kind: str, found: Mapping[str, Any]) -> Reason:
  """Of a plan, and what is done about it."""
  size = f'{(found["bytes"] or 0) / 2**30:.0f} GiB a chip'
  text = f'The {kind} model of {found["name"]} does not fit: {size}. The next is smaller in proportion.'
  return Reason(text, f'plan of {found["name"]}')


def known_too_large(one: Candidate, plans: Mapping[str, Mapping[str, Any]]) -> bool:
  """Whether a model of as many experts and no more parameters did not fit, by its plan."""
  misfits = [found for found in plans.values() if found['fits'] is False]
  return any(one.experts == found['experts'] and one.total >= 0.99 * found['parameters'] for found in misfits)


# ---- Reasons --------------------------------------------------------------------------------------------------------


def said_of_inputs(
  budget: Budget,
  flops: float | None,
  topology: str | None,
  hours: float | None,
  mfu: float,
  sparse_mfu: float,
  plans: Mapping[str, Any],
) -> list[tuple[str, str]]:
  """How the inputs became FLOPs."""
  if flops is not None:
    return [(f'{flops:.3g} training FLOPs, dense and sparse alike.', 'input')]
  lines = []
  for kind, assumed, total in (('dense', mfu, budget.flops), ('sparse', sparse_mfu, budget.sparse_flops)):
    found = plans.get(kind, {})
    share = found.get('mfu') or assumed
    source = f'plan of {found["name"]}' if found.get('mfu') else 'assumed; --search compiles'
    lines.append((f'{topology} for {hours:g} hours at {100 * share:.0f}% of peak: {total:.3g} FLOPs, {kind}.', source))
  return lines


def rules(
  budget: Budget,
  ranked: Sequence[Candidate],
  winner: Candidate,
  opinions: Sequence[Opinion],
  devices: int,
  downstream: str,
  chip: Chip | None,
) -> list[Reason]:
  """What the laws and limits make of dense against sparse, and the rules of Fedus, Dean and Zoph 2022, section 6."""
  found = bests(ranked)
  dense, sparse = found.get('dense'), found.get('sparse')
  lines = []
  if dense and sparse:
    margin, gain = dense.loss - sparse.loss, opinions[0].gain
    verdict = 'below' if margin > 0 else 'above'
    lines.append(Reason(
      f'The best sparse model, {sparse.experts} experts, is {abs(margin):.3f} nats {verdict} the best dense one; less'
      f' than {TIE} counts as nothing.', JOINT,
    ))  # fmt: skip
    lines.append(Reason(
      f'A dense model needs {gain:.2f} times its FLOPs for the same loss: sparse wins while it runs at more than'
      f' {100 / gain:.0f}% of the dense model’s share of peak.', JOINT,
    ))  # fmt: skip
  gains = [one.gain for one in opinions]
  if gains:
    agree = (
      'All laws find that sparse is worth more per FLOP'
      if min(gains) > 1
      else 'Laws disagree on whether sparse is worth more'
    )
    lines.append(Reason(
      f'{agree}: {min(gains):.1f} to {max(gains):.1f} times the FLOPs, or by Clark’s the parameters, of a dense'
      ' model. They differ in data, routers and in what grows with the budget: so far is any of them to be trusted.',
      ', '.join(one.law for one in opinions),
    ))  # fmt: skip
  for one in ranked:
    if one.limited_by:
      name = f'{one.experts} experts' if one.experts > 1 else 'The dense model'
      sizes = f'{one.active / 1e9:.2g}B active of {one.total / 1e9:.3g}B'
      other = (
        'smaller, and read more, with more text' if one.limited_by == 'text' else f'larger with more {one.limited_by}'
      )
      other = other.replace('more latency', 'more time for a token')
      lines.append(Reason(f'{name} would be {other}: {sizes} is what there is room for.', 'input'))
  if budget.serving_bytes is not None:
    lines.append(Reason(
      'Experts are chosen by the least memory in the life of the model, which is that of serving: per parameter dense'
      ' models are better, per FLOP sparse ones.', SURVEY,
    ))  # fmt: skip
  if sparse and devices < sparse.experts:
    lines.append(Reason(
      f'{devices} devices hold {sparse.experts} experts, several each: one a device is what exchanges best, so'
      f' {devices} experts or fewer are the natural choice if losses tie.', SURVEY,
    ))  # fmt: skip
  if devices <= 4 and chip:
    lines.append(Reason('Few devices, bound by memory: dense models suit them.', SURVEY))
  elif devices >= 64:
    lines.append(Reason('Many devices in data parallel: what sparse models are made for.', SURVEY))
  if downstream in ('reasoning', 'fine_tuning'):
    lines.append(Reason(
      'Reasoning, shifts of distribution and small sets to fine-tune on profit less of experts than of FLOPs a token:'
      f' losses within {2 * TIE} of the best count as equal, and the fewest experts win.', SURVEY,
    ))  # fmt: skip
  if downstream == 'knowledge':
    lines.append(Reason('Tasks heavy on knowledge profit most of experts: the least loss wins.', SURVEY))
  if budget.tokens:
    lines.append(Reason(f'No more than {budget.tokens:.3g} tokens, each seen once.', 'input'))
  lines.append(Reason(
    'Experts in every layer give the least loss to pretrain; every other layer is the usual choice where steps must be'
    ' quick: sweep EXPERT_EVERY.', 'Clark et al. 2022, frequency of routing',
  ))  # fmt: skip
  for opinion in opinions:
    lines += [Reason(line, opinion.law) for line in opinion.outside if opinion.law == JOINT]
  return lines


def own_sweep(folder: str | None) -> list[Reason]:
  """What a sweep of the user's own found."""
  if folder is None:
    return []
  path = to_path(folder) / 'fits.json'
  if not path.exists():
    raise ConfigError(f'SWEEP={folder!r} has no fits.json: it is the MODEL_DIR of a sweep, whose report writes it.')
  return [
    Reason(
      f'{one["which"]}: twice the {one["column"]} change the loss by {100 * one["doubling"]:+.1f}%'
      f' ({100 * one["doubling_interval"][0]:+.1f} to {100 * one["doubling_interval"][1]:+.1f}), at that size.',
      str(path),
    )
    for one in json.loads(path.read_text())
    if 'constants' in one
  ]


# ---- What comes of it -----------------------------------------------------------------------------------------------


def bindings_of(one: Candidate, devices: int) -> dict[str, Any]:
  """What makes EXPERIMENT this model on so many devices."""
  found = dict(budgets.bindings(one, BATCH_TOKENS, LENGTH, devices, VOCABULARY))
  rows = found['BATCH_SIZE'] // devices  # of a device
  pieces = [n for n in range(1, rows + 1) if rows % n == 0 and rows // n * LENGTH <= max(PIECE, LENGTH)]
  return {**found, 'MICROBATCHES': pieces[0]}


def command_of(one: Candidate, devices: int) -> str:
  """The command line that trains it."""
  options = [f'--gin.{name}={value!r}' for name, value in bindings_of(one, devices).items()]
  return shlex.join(['python', 'run.py', '--run_mode=train', f'--gin_file={EXPERIMENT}', *options])


def described(one: Candidate) -> dict[str, Any]:
  """For advice.json."""
  return {'kind': 'sparse' if one.experts > 1 else 'dense', **one._asdict(), 'layers': one.layers, 'law': JOINT}


def summary_of(one: Candidate, found: Mapping[str, Any]) -> dict[str, Any]:
  """Of a plan: what advice is made of."""
  kept = ('topology', 'parameters', 'fits', 'mfu', 'mfu_serial', 'cycles', 'compile_seconds')
  name = f'{found["parameters"] / 1e9:.3g}B on {found["topology"]}'
  return {
    'name': name, 'experts': one.experts, **{key: found[key] for key in kept}, 'bytes': found['bytes']['total'],
  }  # fmt: skip


def show(
  ranked: Sequence[Candidate],
  winner: Candidate,
  opinions: Sequence[Opinion],
  reasons: Sequence[Reason],
  command: str,
  console: Console | None = None,
) -> None:
  """Prints all of it."""
  console = console or Console(width=None if Console().is_terminal else 120)
  table = Table(box=None, header_style='dim')
  for title in ('', 'experts', 'width', 'layers', 'active', 'total', 'tokens', 'FLOPs', 'loss', 'limited by'):
    table.add_column(title, justify='left' if title in ('', 'limited by') else 'right')
  for one in ranked:
    sizes = (f'{one.active / 1e9:.2f}B', f'{one.total / 1e9:.1f}B', f'{one.tokens / 1e9:.0f}B', f'{one.flops:.2g}')
    shape = (str(one.experts) if one.experts > 1 else 'dense', str(one.width), str(one.layers))
    table.add_row('→' if one is winner else '', *shape, *sizes, f'{one.loss:.3f}', one.limited_by)
  console.print(table)
  console.print(f'losses are in nats per token of the data of {JOINT}: they compare, and promise nothing for yours\n')
  views = Table(box=None, header_style='dim')
  for title in ('law', 'gain', 'what that is'):
    views.add_column(title)
  for view in opinions:
    note = f' ({"; ".join(view.outside)})' if view.outside else ''
    views.add_row(view.law, f'{view.gain:.2f}', view.meaning + note)
  console.print(views)
  console.print()
  for reason in reasons:
    console.print(f'- {reason.text} [dim]\\[{reason.source}][/dim]', highlight=False)
  what = f'{winner.experts} experts' if winner.experts > 1 else 'dense'
  console.print(f'\n{what}:\n')
  console.print(command, soft_wrap=True, highlight=False)
