"""How compile plans are shown: tables in a terminal, and a page."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jinja2
from matplotlib.ticker import EngFormatter
from rich.console import Console
from rich.table import Table

from moe_jax.analysis.step_time import ASSUMPTIONS

Plan = Mapping[str, Any]
_PARTS = (('computation', 'compute'), ('links', 'ici'), ('network between slices', 'dcn'))


def size(count: float | None) -> str:
  """Bytes, for people."""
  if count is None:
    return '–'
  power = min(int(count).bit_length() // 10, 3)
  return f'{count / 1024**power:,.2f} {("B", "KiB", "MiB", "GiB")[power]}'


def number(value: float | None) -> str:
  """A large number, for people."""
  return '–' if value is None else EngFormatter(places=2, sep='')(value)


def milliseconds(seconds: float) -> str:
  """A time, for people."""
  return f'{1e3 * seconds:,.1f} ms'


def verdict(plan: Plan) -> str:
  """Does it fit, and by how much?"""
  total, memory = plan['bytes']['total'], plan['hbm_bytes']
  if memory is None:
    return size(total)
  if plan['fits']:
    return f'fits: {size(total)} of {size(memory)}, {size(memory - total)} to spare'
  short = f' by {size(total - memory)}' if total and total > memory else ''
  return f'does not fit{short}: {size(total)} of {size(memory)}'


def facts(plan: Plan) -> list[tuple[str, str]]:
  """Name and value of what the first table says, per chip."""
  held, seconds, mfu = plan['bytes'], plan['step_seconds'], plan['mfu']
  rows = [
    ('memory', verdict(plan)),
    ('  parameters', size(held['params'])),
    ('  optimizer', size(held['optimizer'])),
    ('  activations and other temporaries', size(held['temporaries'])),
    ('  of these, rows on the way to and from experts', size(held['dispatch_buffers'])),
    ('FLOPs', number(plan['flops'])),
    ('cycles, of matmuls', f'{number(plan.get("cycles"))}, {number(plan.get("matmul_cycles"))}'),
  ]
  if seconds:
    times = [f'{milliseconds(seconds[name])} {name}' for name in ('overlapped', 'serial')]
    parts = [f'{name} {milliseconds(seconds[key])}' for name, key in _PARTS]
    rows += [('step time, an estimate', ', '.join(times)), ('  of which', ', '.join(parts))]
  if mfu:
    rows.append(('MFU that it implies', f'{mfu:.1%} overlapped, {plan["mfu_serial"]:.1%} serial'))
  return [*rows, ('compiled in', f'{plan["compile_seconds"]:,.0f} s')]


def tables(plan: Plan) -> Iterator[tuple[str, Sequence[str], Sequence[Sequence[str]]]]:
  """Title, head and rows of the other tables, per chip and step."""
  if plan['collectives'] is not None:
    yield (
      'collectives',
      ('kind', 'mesh axes', 'link', 'group', 'times', 'bytes sent'),
      [
        (c['kind'], c['axis'], c['link'].upper(), str(c['group_size']), f'{c["count"]:,}', size(c['wire_bytes']))
        for c in plan['collectives']
      ],
    )
  if plan['uncosted']:
    # A loop that runs for who knows how long is counted once.
    uncosted = [
      (u['kind'], f'{u["count"]:,}', size(u['bytes']))
      for u in plan['uncosted']
      if u['bytes'] >= 1024 or u['kind'] == 'while'
    ]
    yield 'what the compiler gives no cycles for', ('kind', 'times', 'bytes of results'), uncosted
  if plan['top_operations']:
    costly = [
      (number(op['cycles']), f'{op["cycles"] / plan["cycles"]:.1%}', f'{op["count"]:,}', op['line'], op['operation'])
      for op in plan['top_operations']
    ]
    yield 'most cycles', ('cycles', 'share', 'times', 'line', 'operation'), costly


def _console() -> Console:
  """The terminal, or where there is none a page wide enough for the tables; quiet on all hosts but the first."""
  console = Console(quiet=jax.process_index() > 0, highlight=False)
  return console if console.is_terminal else Console(quiet=console.quiet, highlight=False, width=120)


def show(plan: Plan, console: Console | None = None) -> None:
  """Prints a plan, on the first host."""
  console = console or _console()
  style: dict[str, Any] = {'title_justify': 'left', 'box': None, 'padding': (0, 2, 0, 0)}
  table = Table(title=headline(plan), show_header=False, **style)
  for name, value in facts(plan):
    table.add_row(name, value)
  console.print(table)
  for title, head, rows in tables(plan):
    table = Table(*head, title=title, **style)
    for row in rows:
      table.add_row(*row)
    console.print(table)
  if plan['step_seconds']:
    console.print('The estimate assumes: ' + '; '.join(ASSUMPTIONS) + '.')
  if plan['advice']:
    console.print(f'What would make it fit: {"; ".join(plan["advice"])}.')


def headline(plan: Plan) -> str:
  """Which step of what, where."""
  mesh = ' x '.join(f'{axis} {n}' for axis, n in plan['mesh'].items() if n > 1) or 'one device'
  return f'{plan["step"]} step, {number(plan["parameters"])} parameters, {plan["topology"]}, {mesh}'


def show_search(plans: Sequence[Plan], console: Console | None = None) -> None:
  """Prints the ranking of a search."""
  console = console or _console()
  table = Table('changed', 'memory', 'overlapped', 'serial', 'MFU', title='search, best first', box=None)
  for plan in plans:
    changed = ' '.join(f'{name}={value}' for name, value in plan['candidate'].items()) or 'as asked'
    if 'error' in plan:
      table.add_row(changed, plan['error'])
      continue
    seconds, mfu = plan['step_seconds'], plan['mfu']
    times = [milliseconds(seconds[name]) if seconds else '–' for name in ('overlapped', 'serial')]
    fits = ', too much' if plan['fits'] is False else ''
    table.add_row(changed, size(plan['bytes']['total']) + fits, *times, f'{mfu:.1%}' if mfu else '–')
  console.print(table)


def write(plan: Plan, path: Path) -> None:
  """Writes the page."""
  jinja = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
  page = jinja.get_template('plan.html.j2').render(
    title=headline(plan), facts=facts(plan), tables=list(tables(plan)), plan=plan, assumptions=ASSUMPTIONS
  )
  path.write_text(page, encoding='utf-8')
