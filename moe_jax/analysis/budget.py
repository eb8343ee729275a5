"""Dense or sparse for a budget: the candidates, by the joint law, and what other laws say of the choice.

Candidates have the shape of the models that the joint law was fitted on (Ludziejewski et al. 2025): width d, d/64
layers and heads, gated MLPs of 3d hidden units, of which a sparse model has E in every layer and runs one.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

from moe_jax.analysis.published_laws import PUBLISHED
from moe_jax.analysis.scaling_laws import hoffmann_2022, ludziejewski_reduced
from moe_jax.analysis.scaling_optima import compute_optimal, effective_parameters
from moe_jax.types import ConfigError

JOINT = 'ludziejewski_2025'
HEAD = 64
EXPERTS = (1, 2, 4, 8, 16, 32)  # on which the joint law was fitted
TIE = 0.01  # nats: below this two losses are not told apart. The laws' own errors are larger (Krajewski et al.: 0.015)


@dataclasses.dataclass(frozen=True)
class Budget:
  """What there is.

  Attributes:
    flops: of training; sparse models may have others.
    sparse_flops: theirs, who use the same hours less well.
    training_bytes: of memory on all training devices, for weights, gradients and optimizer of a dense model.
    sparse_training_bytes: the same of a sparse one, which holds more besides.
    serving_bytes: of memory for weights where the model will serve; None for any.
    active_bytes: of weights that a served token may read, where it must not take too long; None for any.
    tokens: of text that there is to train on, each once; None for any.
    vocabulary: of the tokenizer.
    width_multiple: of which widths are multiples, and of 64: the devices that weights are split over.
    serving_bytes_per_parameter: 2 for bfloat16.
    training_bytes_per_parameter: 16 for float32 weights, gradients and AdamW's two moments.
  """

  flops: float
  sparse_flops: float
  training_bytes: float = math.inf
  sparse_training_bytes: float = math.inf
  serving_bytes: float | None = None
  active_bytes: float | None = None
  tokens: float | None = None
  vocabulary: int = 32128
  width_multiple: int = HEAD
  serving_bytes_per_parameter: float = 2.0
  training_bytes_per_parameter: float = 16.0


class Candidate(NamedTuple):
  """A model and how long it trains.

  Attributes:
    experts: E; 1 is dense.
    width: d.
    active: parameters that work on one token, with embeddings.
    total: all parameters.
    tokens: that it sees.
    flops: of training.
    loss: by the joint law, nats per token.
    limited_by: what keeps it from the size that the law would choose: 'serving memory', 'training memory' and 'latency'
      from a larger one, 'text' from a smaller one that reads more; or ''.
  """

  experts: int
  width: int
  active: int
  total: int
  tokens: float
  flops: float
  loss: float
  limited_by: str

  @property
  def layers(self) -> int:
    """d / 64; as many heads."""
    return self.width // HEAD


def parameters(width: Any, experts: int, vocabulary: int) -> Any:
  """All parameters of a model: 4d² of attention and 9d² an expert in each layer, and two embeddings; no norms."""
  return width // HEAD * (4 + 9 * experts) * width**2 + 2 * vocabulary * width


def candidates(budget: Budget, experts: Sequence[int] = EXPERTS) -> list[Candidate]:
  """The best model of each number of experts that meets every limit, best first.

  Raises:
    ConfigError: if no model meets them, naming the limit in the way of the smallest.
  """
  found = [best for count in experts if (best := _best(budget, count))]
  if not found:
    step = math.lcm(HEAD, budget.width_multiple)
    raise ConfigError(
      f'No model of the family fits: the smallest, dense and {step} wide, is limited by'
      f' {next(limits(budget, step, 1), "nothing")}. Give more memory, time or text.'
    )
  return sorted(found, key=lambda one: one.loss)


def _best(budget: Budget, experts: int) -> Candidate | None:
  """Of all widths. Sizes are few, so all are tried."""
  law = ludziejewski_reduced(experts, **PUBLISHED[JOINT].constants)
  flops = budget.flops if experts == 1 else budget.sparse_flops
  step = math.lcm(HEAD, budget.width_multiple)
  widths = np.arange(step, max(300 * HEAD, 8 * step), step)
  active = parameters(widths, 1, budget.vocabulary)
  wanted = flops / (6 * active)  # tokens
  tokens = np.minimum(wanted, budget.tokens or np.inf)
  loss = hoffmann_2022(active, tokens, **law)
  reasons = [list(limits(budget, int(width), experts)) for width in widths]
  allowed = np.array([not some for some in reasons])
  if not allowed.any():
    return None
  best, freest = np.argmin(np.where(allowed, loss, np.inf)), np.argmin(loss)
  unread = np.argmin(hoffmann_2022(active, wanted, **law))  # the best if there were no end of text
  limited_by = reasons[freest][0] if reasons[freest] else 'text' if wanted[unread] > tokens[unread] else ''
  return Candidate(
    experts=experts,
    width=int(widths[best]),
    active=int(active[best]),
    total=parameters(int(widths[best]), experts, budget.vocabulary),
    tokens=float(tokens[best]),
    flops=float(6 * active[best] * tokens[best]),
    loss=float(loss[best]),
    limited_by=limited_by,
  )


def limits(budget: Budget, width: int, experts: int) -> Iterator[str]:
  """Names of the limits that a model does not meet."""
  active, total = (parameters(width, count, budget.vocabulary) for count in (1, experts))
  room = budget.training_bytes if experts == 1 else budget.sparse_training_bytes
  if total * budget.training_bytes_per_parameter > room:
    yield 'training memory'
  if budget.serving_bytes is not None and total * budget.serving_bytes_per_parameter > budget.serving_bytes:
    yield 'serving memory'
  if budget.active_bytes is not None and active * budget.serving_bytes_per_parameter > budget.active_bytes:
    yield 'latency'


def dense_flops(loss: float) -> float:
  """Training FLOPs with which a dense model of the joint law, its size chosen freely, has this loss; inf if none do."""
  law = ludziejewski_reduced(1, **PUBLISHED[JOINT].constants)
  over = lambda log_flops: float(compute_optimal(math.exp(log_flops), **law).loss) - loss  # noqa: E731
  low, high = math.log(1e12), math.log(1e40)
  if over(high) > 0:
    return math.inf
  return math.exp(optimize.brentq(over, low, high))


class Opinion(NamedTuple):
  """What a law says of sparse against dense.

  Attributes:
    law: its key in `PUBLISHED`.
    gain: how many times the FLOPs, or by Clark's law the parameters, a dense model needs for the same loss.
    meaning: in words.
    outside: lines that say where it is asked beyond what it was fitted on.
  """

  law: str
  gain: float
  meaning: str
  outside: Sequence[str]


def opinions(sparse: Candidate, vocabulary: int) -> list[Opinion]:
  """Every law's view of a sparse candidate. Each counts and measures in its own way, so losses do not compare.

  Krajewski et al. speak of models of their own, of 64 times the parameters of an MLP, at the candidate's FLOPs.
  """
  joint = PUBLISHED[JOINT]
  points: dict[str, float] = {'active_parameters': sparse.active, 'parameters': sparse.total, 'experts': sparse.experts}
  gain = dense_flops(sparse.loss) / sparse.flops
  found = [Opinion(JOINT, gain, 'times the training FLOPs of a dense model of the same loss', joint.outside(points))]
  base = sparse.active - 2 * vocabulary * sparse.width
  for router in ('s_base', 'rl_r', 'hash'):
    law = PUBLISHED[f'clark_2022_{router}_refit']
    points = {'dense_parameters': base, 'experts': sparse.experts, 'tokens': sparse.tokens}
    gain = float(effective_parameters(base, sparse.experts, **law.constants)) / base
    meaning = 'times the parameters of a dense model of the same loss, at 130B tokens and half of the layers sparse'
    found.append(Opinion(f'clark_2022_{router}_refit', gain, meaning, law.outside(points)))
  gain = _krajewski_gain(sparse.flops)
  meaning = 'times the training FLOPs of a dense model of the same loss, of fine experts, 64 MLPs in all'
  note = () if sparse.experts == 64 else ('of other models than this one',)
  found.append(Opinion('krajewski_2024', gain, meaning, note))
  return found


def _krajewski_gain(flops: float) -> float:
  """By Krajewski et al. 2024: the best fine-grained model for the FLOPs, and what a dense one takes to equal it."""
  fine, dense = PUBLISHED['krajewski_2024'], PUBLISHED['krajewski_2024_dense']
  width = np.arange(4, 600)[:, None] * HEAD
  granularity = np.array([1, 2, 4, 8, 16, 32, 64])
  # Of a token: 12 d² parameters at 6 FLOPs each, and 14 for each of the router's d G E, in every layer (appendix).
  per_token = (12 * width**2 * 6 + width * 64 * granularity * 14) * (width / HEAD)
  shape = {'nonembedding_parameters': (8 * 64 + 4) * width**2 * (width / HEAD), 'granularity': granularity}
  best = float(np.min(fine.loss({**shape, 'tokens': flops / per_token})))
  over = lambda log_flops: float(compute_optimal(math.exp(log_flops), **dense.constants).loss) - best  # noqa: E731
  return math.exp(optimize.brentq(over, math.log(1e12), math.log(1e45))) / flops


def learning_rate(candidate: Candidate, vocabulary: int) -> float:
  """Peak rate of AdamW for the joint law's models (Ludziejewski et al. 2025): falls with size and with experts."""
  inside = candidate.active - 2 * vocabulary * candidate.width
  return math.exp(8.39 - 0.81 * math.log(inside) - 0.25 * math.log(candidate.experts))


def bindings(candidate: Candidate, batch_tokens: int, length: int, devices: int, vocabulary: int) -> Mapping[str, Any]:
  """What makes gin/experiments/advised.gin this model, trained for so long."""
  rows = max(round(batch_tokens / length / devices), 1) * devices
  steps = max(round(candidate.tokens / (rows * length)), 1)
  return {
    'NUM_LAYERS': candidate.layers,
    'EMBED_DIM': candidate.width,
    'EXPERT_MLP_DIM': 3 * candidate.width,
    'NUM_HEADS': candidate.layers,
    'NUM_KV_HEADS': candidate.layers,
    'NUM_EXPERTS': candidate.experts if candidate.experts > 1 else 2,  # a dense model has none of them
    'EXPERT_EVERY': int(candidate.experts > 1),
    'BATCH_SIZE': rows,
    'TRAIN_STEPS': steps,
    'WARMUP_STEPS': max(min(steps // 10, 1000), 1),
    'LEARNING_RATE': float(f'{learning_rate(candidate, vocabulary):.3g}'),
  }
