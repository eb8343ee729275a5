"""How pages draw: placeholder colours that become CSS variables, so that a figure suits a light page and a dark one."""

import io
import re
from typing import Any

from markupsafe import Markup

_INKS = ('ink', 'muted', 'rule', *(f'run-{i}' for i in range(8)), *(f'depth-{i}' for i in range(8)))
COLOR = {name: f'#fe01{i:02x}' for i, name in enumerate(_INKS)}
STYLE: dict[Any, Any] = {'svg.fonttype': 'none', 'svg.hashsalt': 'moe_jax', 'text.parse_math': False, 'font.size': 8.5}
STYLE |= {key: COLOR['muted'] for key in ('axes.labelcolor', 'axes.titlecolor', 'xtick.color', 'ytick.color')}
STYLE |= {'text.color': COLOR['ink'], 'xtick.major.size': 0, 'ytick.major.size': 0, 'axes.xmargin': 0}


def svg(figure: Any) -> Markup:
  """The drawing: CSS variables for placeholder colours, and no ids that another figure of the page may have too."""
  figure.savefig(buffer := io.StringIO(), format='svg', transparent=True, metadata={'Date': None})
  text = buffer.getvalue()
  text = re.sub(r' id="\w+_\d+"|<metadata>.*?</metadata>', '', text[text.index('<svg') :], flags=re.DOTALL)
  return Markup(re.sub('|'.join(COLOR.values()), lambda hex: f'var(--{_INKS[int(hex[0][-2:], 16)]})', text))
