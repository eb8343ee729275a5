"""A picture a router of who goes where: `python run.py --run_mode=report --routers`.

One real text, the same for all; numbers are made here, words and drawings in `gallery.html.j2`.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jinja2
import numpy as np

from moe_jax.moe.routers.base import Router
from moe_jax.moe.routing_plan import RoutingPlan
from moe_jax.objectives import Objective
from moe_jax.paths import to_path
from moe_jax.runs.setup import Data, Devices, build, variables_of
from moe_jax.training.state import OptimizerFactory
from moe_jax.training.step import train_step
from moe_jax.types import Array, Batch, ConfigError

SHOWN = 40  # tokens in a picture
_MARKS = {' ': '·', '\n': '⏎', '\t': '→', '': '□'}  # of tokens without a letter; '' is an end, or half a letter


class Picture(NamedTuple):
  """What a router did with T consecutive tokens, and with the whole batch that they are of.

  Attributes:
    name, caption: of the router.
    text: T characters.
    weights: float[T, E], how much of each expert's answer a token gets.
    turned_away: bool[T, E], experts that a token chose and found full.
    dropped: bool[T], tokens that no expert saw.
    load: float[E], of the whole batch, in multiples of the mean.
    dropped_share: of the whole batch.
    group_size: S, tokens routed together.
    train_steps: before the picture was taken.
    causal: no token's way depends on later ones.
  """

  name: str
  caption: str
  text: Sequence[str]
  weights: np.ndarray
  turned_away: np.ndarray
  dropped: np.ndarray
  load: np.ndarray
  dropped_share: float
  group_size: int
  train_steps: int = 0
  causal: bool = True


def picture(
  name: str,
  caption: str,
  objective: Objective,
  optimizer: OptimizerFactory,
  data: Data,
  devices: Devices,
  train_steps: int,
  seed: int = 0,
) -> Picture:
  """Trains a model for a few steps, and watches its first router at a batch it has not seen, in training mode.

  The tokens shown are the last of a full group, where experts are fullest.

  Args:
    name, caption: of the router.
    objective: model and loss.
    optimizer: makes the optimizer.
    data: what to train on.
    devices: where.
    train_steps: how many; routers have few opinions at 0.
    seed: of weights, dropout, jitter and whatever routers draw.

  Raises:
    ConfigError: if the model has no router, or its layers are scanned or rematerialised.
  """
  from moe_jax.data import text_of  # imports TensorFlow

  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='.* looks at later tokens')  # the page says so
    router, seen = _observe(objective, optimizer, data, devices, train_steps, seed)
  group = int(np.argmax(np.sum(seen['valid'], axis=1)))
  tokens = np.flatnonzero(seen['valid'][group])[-SHOWN:]
  vocabulary = data.vocabulary()
  text = [text_of([token], vocabulary) for token in seen['token_ids'][group, tokens]]
  dispatched = np.sum(seen['dispatch'], axis=-1) > 0
  load = seen['load'] / max(np.mean(seen['load']), 1e-20)
  return Picture(
    name=name,
    caption=caption,
    text=[_MARKS.get(letters, letters[:1]) for letters in text],
    weights=seen['weights'][group, tokens],
    turned_away=seen['turned_away'][group, tokens],
    dropped=~dispatched[group, tokens],
    load=load,
    dropped_share=1 - np.sum(dispatched & seen['valid']) / max(np.sum(seen['valid']), 1),
    group_size=seen['valid'].shape[1],
    train_steps=train_steps,
    causal=router.causal,
  )


def _observe(
  objective: Objective, optimizer: OptimizerFactory, data: Data, devices: Devices, train_steps: int, seed: int
) -> tuple[Router, dict[str, np.ndarray]]:
  """The first router of a model after a few steps, and the arrays of `_watch` for a validation batch."""
  program = build(objective, optimizer, data, devices, seed)
  with program.activate():
    state, batches = program.make_state(), data.batches(program.mesh, 'train')
    update = jax.jit(
      functools.partial(train_step, objective=objective, transform=program.transform, seed=seed),
      donate_argnums=0,
      out_shardings=(jax.tree.map(lambda x: x.sharding, program.state_spec), program.everywhere),
    )
    for _ in range(train_steps):
      state, _ = update(state, next(batches))
    routers: list[Router] = []
    watch = jax.jit(functools.partial(_watch, objective=objective, routers=routers), out_shardings=program.everywhere)
    try:
      seen = watch(variables_of(state), next(data.held_out(program.mesh)), jax.random.key(seed))
    except jax.errors.UnexpectedTracerError as error:
      raise ConfigError("Routers can be watched with SCAN = False and REMAT = 'none' only.") from error
  return routers[0], {key: np.asarray(value) for key, value in seen.items()}


def _watch(variables: Any, batch: Batch, key: Array, objective: Objective, routers: list[Router]) -> dict[str, Array]:
  """What the model's first router sees and answers: arrays [G, S] and [G, S, E], and the load [E].

  The router itself is left in `routers`. Everything behind it is left out by the compiler.
  """
  seen: dict[str, Array] = {}

  def intercept(call: Callable, args: Any, kwargs: Any, method: nn.module.InterceptorContext) -> Any:
    module, answer = method.module, call(*args, **kwargs)
    inner = isinstance(module.parent, Router)  # a router may ask another
    if isinstance(module, Router) and not inner and method.method_name == '__call__' and not seen:
      (plan, aux), (_, context) = answer, args
      routers.append(module)
      dispatch = jnp.sum(plan.dispatch_array(jnp.float32), axis=-1)
      seen.update(
        token_ids=context.token_ids,
        valid=context.valid,
        dispatch=dispatch,
        weights=jnp.sum(plan.combine_array(jnp.float32), axis=-1),
        turned_away=turned_away(plan) if isinstance(plan, RoutingPlan) else jnp.zeros(dispatch.shape, bool),
        load=aux.metrics.get('expert_load', jnp.sum(dispatch, axis=(0, 1))),
      )
    return answer

  with nn.intercept_methods(intercept):
    rngs = dict(zip(('dropout', 'router'), jax.random.split(key), strict=True))
    objective.loss(variables, objective.counted(batch), rngs, train=True)
  if not seen:
    raise ConfigError('This model has no router to watch: set EXPERT_EVERY to 1 or more.')
  return seen


def turned_away(plan: RoutingPlan) -> Array:
  """bool[G, S, E], experts that a token chose and found full. Slots from S * K on were never asked for."""
  full = (plan.slot_index >= plan.capacity) & (plan.slot_index < np.prod(plan.slot_index.shape[1:]))
  return jnp.any(jax.nn.one_hot(plan.expert_index, plan.num_experts, dtype=bool) & full[..., None], axis=2)


def gallery(pictures: Sequence[Picture], output: str | Path = 'runs/routers.html') -> Path:
  """Writes one HTML page of all pictures, and returns its path."""
  jinja = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
  )
  page = jinja.get_template('gallery.html.j2').render(pictures=pictures)
  path = to_path(output)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(page, encoding='utf-8')
  return path
