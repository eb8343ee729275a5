"""What the library tells a person once: what it chose for them, and what that takes."""

import functools
import logging

import jax


@functools.cache
def notice(line: str) -> None:
  """Logs a line under 'moe_jax', on the first host, however often the program that says it is traced."""
  if jax.process_index() == 0:
    logging.getLogger('moe_jax').info(line)
