"""How figures of a report are drawn: by matplotlib, in placeholder colours that become the page's CSS variables."""

import io
import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

_INKS = ('ink', 'muted', 'rule', *(f'run-{i}' for i in range(8)), *(f'depth-{i}' for i in range(8)))
COLOR = {name: f'#fe01{i:02x}' for i, name in enumerate(_INKS)}
STYLE: dict[Any, Any] = {'svg.fonttype': 'none', 'svg.hashsalt': 'moe_jax', 'text.parse_math': False, 'font.size': 8.5}
STYLE |= {key: COLOR['muted'] for key in ('axes.labelcolor', 'axes.titlecolor', 'xtick.color', 'ytick.color')}
STYLE |= {'text.color': COLOR['ink'], 'xtick.major.size': 0, 'ytick.major.size': 0, 'axes.xmargin': 0}
BLUE, ORANGE = (0.13, 0.44, 0.71), (0.85, 0.37, 0.08)  # of heat maps, light and dark alike


def si(value: float, places: int = 2) -> str:
  """A number as people say it: 2.71M, 1.2B."""
  return EngFormatter(places=places, sep='')(value).replace('G', 'B')


def spread(heights: Sequence[float], gap: float) -> np.ndarray:
  """Moves labels, given from the lowest up, to be at least `gap` apart and no higher on average."""
  spread = np.array([*itertools.accumulate(heights, lambda below, height: max(height, below + gap))])
  return spread - np.mean(spread - heights) if len(spread) else spread


def note(axes: Axes, text: str, x: float, y: float, offset: tuple[float, float], **style: Any) -> None:
  """Writes at x of the axes' width and height y of the data, moved by an offset in points."""
  style = {'color': COLOR['muted'], 'va': 'center', 'textcoords': 'offset points'} | style
  axes.annotate(text, (x, y), xycoords=axes.get_yaxis_transform(), xytext=offset, **style)


def svg(figure: Any) -> Markup:
  """The drawing: CSS variables for placeholder colours, and no ids that another figure of the page may have too."""
  figure.savefig(buffer := io.StringIO(), format='svg', transparent=True, metadata={'Date': None})
  text = buffer.getvalue()
  text = re.sub(r' id="\w+_\d+"|<metadata>.*?</metadata>', '', text[text.index('<svg') :], flags=re.DOTALL)
  return Markup(re.sub('|'.join(COLOR.values()), lambda hex: f'var(--{_INKS[int(hex[0][-2:], 16)]})', text))
