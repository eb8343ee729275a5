"""What a person sees, in a terminal and without one."""

import io

import numpy as np
from rich.console import Console

from moe_jax.runs.progress import Progress, describe_loss, summarize

VALUES = {
  'loss': 2.5,
  'bits_per_byte': 3.25,
  'tokens_per_second': 12345.6,
  'a/expert_load': np.array([[0.5, 0.25, 0.25]]),
}


def test_facts():
  assert summarize(VALUES) == 'loss 2.500  3.250 bits/byte  12,346 tokens/s  busiest expert 1.50x'
  assert summarize({'loss': 2.5, 'tokens_per_second': 10}) == 'loss 2.500  10 tokens/s'
  assert describe_loss({'cross_entropy': 1.5}) == 'cross-entropy 1.500 nats per token'


def test_plain_lines_without_a_terminal():
  output = io.StringIO()
  with Progress(0, 20, Console(file=output, width=40)) as progress:
    progress.update(10, VALUES)
    progress.note('a note')
  first, second = output.getvalue().splitlines()
  assert first.startswith('step 10/20  loss 2.500') and first.endswith('s left')
  assert second == 'a note'


def test_a_bar_in_a_terminal():
  output = io.StringIO()
  with Progress(0, 20, Console(file=output, width=120, force_terminal=True)) as progress:
    progress.update(10, VALUES)
  assert '10/20' in output.getvalue() and 'busiest expert 1.50x' in output.getvalue()
