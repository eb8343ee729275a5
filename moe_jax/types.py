"""The words every floor of the library shares.

`Aux` is what a layer reports besides its output. Everything in it is *additive*: a sum over the tokens at hand divided
by the token count of the whole batch. So microbatches, groups and devices add up, and nothing is averaged twice.
"""

from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array
Dtype = Any
Batch = Mapping[str, Array]  # seqio's feature names, e.g. 'decoder_input_tokens': int32[B, L]
Metrics = dict[str, Array]
Initializer = Callable[..., Any]


class Preempted(Exception):
  """The machine is taken away, and everything is saved."""


class ConfigError(ValueError):
  """A wish that cannot be met. Its message is one line: what is wrong, and what to do about it."""


class Damaged(ConfigError):
  """What was saved is not what is read."""


def path_name(path: Any) -> str:
  """The place of a leaf in a tree, as JAX has it, in words: 'decoder/blocks/moe/experts/wo'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def one_of(**choices: tuple[Any, Any]) -> None:
  """Raises ConfigError, naming the first of `name=(value, Literal[...])` whose value is none of the literals."""
  for name, (value, literals) in choices.items():
    if value not in get_args(literals):
      raise ConfigError(f'{name}={value!r}: choose among {", ".join(map(repr, get_args(literals)))}.')


@struct.dataclass
class Aux:
  """What a layer reports besides its output.

  Attributes:
    losses: float32[...] each, already weighted by their coefficients; all of them are added to the training loss.
    metrics: watched, never trained on.
    token_terms: float32[..., B, L] each, divided by the token count like all else. The objective multiplies each by the
      token's own task loss, through which no gradient flows, and adds the sum to the training loss: so a router learns
      by reinforcement from what its choice led to.
  """

  losses: dict[str, Array] = struct.field(default_factory=dict)
  metrics: dict[str, Array] = struct.field(default_factory=dict)
  token_terms: dict[str, Array] = struct.field(default_factory=dict)


def nest(**children: Aux) -> Aux:
  """Files each child under its name: `nest(moe=aux)` turns the key 'balance' into 'moe/balance'."""

  def filed(field: str) -> dict[str, Array]:
    return {f'{name}/{key}': value for name, aux in children.items() for key, value in getattr(aux, field).items()}

  return Aux(filed('losses'), filed('metrics'), filed('token_terms'))


def total_loss(aux: Aux) -> Array:
  """The sum of all auxiliary losses over all layers, float32[]."""
  return sum((jnp.sum(loss, dtype=jnp.float32) for loss in aux.losses.values()), jnp.float32(0))
