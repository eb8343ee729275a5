"""Token-choice: every token picks its k best experts (Shazeer 2017, GShard, Switch, ST-MoE, GLaM, Mixtral, OLMoE)."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.moe import router_losses
from moe_jax.moe.routers.base import Router, RoutingContext
from moe_jax.moe.routing_plan import RoutingPlan, reroute
from moe_jax.types import Array, Aux, ConfigError, one_of

Gates = Literal['raw', 'renormalised', 'softmax', 'sigmoid']
Others = Literal['all', 'threshold', 'random']
Priority = Literal['position', 'gate', 'random']


class TopKRouter(Router):
  """A softmax over the experts, then the k best, each weighed by its gate.

  Subclasses change what the router looks at (`seen`) or how it scores (`logits`).

  Attributes:
    num_selected: k.
    gates: 'raw' probabilities (Switch, V-MoE, OLMoE); 'renormalised', divided by their sum over the k before any is
      dropped (GShard, ST-MoE, GLaM, Qwen3); 'softmax' over the k logits (Mixtral), the same number by another road;
      'sigmoid' of the logits, divided by their sum over the k, with sigmoids for probabilities throughout.
    others: which experts beside the best a token asks for: 'all' of the k, those whose gate exceeds the 'threshold', or
      each with a 'random' chance of gate / threshold (GShard: threshold 0.5; ST-MoE: 0.2), drawn in training only and
      all outside it. Who is not asked takes no slot.
    threshold: see `others`.
    priority: who goes first where slots run out: by 'position', by top 'gate' (Batch Prioritized Routing, Riquelme
      2021), or by 'random' (random token selection, Kim 2021) in training and by position outside it.
    fallbacks: how many more experts, next in preference, a token may try that finds one full (Switch, appendix B).
    balance_choices: whether the balance loss counts 'first' choices (GShard, Switch, ST-MoE) or 'all' (OLMoE, Mixtral).
    balance_loss_weight: of the load-balance loss; 1e-2 in Switch, ST-MoE and GLaM.
    z_loss_weight: of the router z-loss; 1e-3 in ST-MoE.
    jitter: in training the router sees tokens multiplied by uniform noise in [1 - jitter, 1 + jitter] (Switch: 1e-2).
  """

  num_selected: int = 2
  gates: Gates = 'renormalised'
  others: Others = 'all'
  threshold: float = 0.2
  priority: Priority = 'position'
  fallbacks: int = 0
  balance_choices: Literal['first', 'all'] = 'first'
  balance_loss_weight: float = 1e-2
  z_loss_weight: float = 0.0
  jitter: float = 0.0

  @property
  def choices_per_token(self) -> float:
    return self.num_selected

  @property
  def causal(self) -> bool:
    return self.priority != 'gate'

  def __post_init__(self) -> None:
    super().__post_init__()
    one_of(gates=(self.gates, Gates), others=(self.others, Others), priority=(self.priority, Priority))
    if not 1 <= self.num_selected <= self.num_experts:
      raise ConfigError(
        f'A token cannot pick {self.num_selected} of {self.num_experts} experts: raise NUM_EXPERTS or lower k.'
      )
    if self.num_selected == 1 and self.gates != 'raw':
      raise ConfigError("A renormalised top-1 gate is always 1 and teaches the router nothing: set gates = 'raw'.")

  @nn.compact
  def __call__(self, tokens: Array, context: RoutingContext) -> tuple[RoutingPlan, Aux]:
    valid, count, k = context.valid, context.token_count, self.num_selected
    logits = self.logits(self.seen(tokens, context))
    probs = jax.nn.softmax(logits, axis=-1)
    scores = probs
    if self.gates == 'sigmoid':
      scores = jax.nn.sigmoid(logits)
      probs = scores / jnp.sum(scores, axis=-1, keepdims=True)
    best, choices = jax.lax.top_k(scores, min(k + self.fallbacks, self.num_experts))
    gates, expert_index = best, choices
    if self.gates == 'softmax':
      chosen = jnp.take_along_axis(logits, choices, axis=-1)
      gates = jnp.exp(chosen - jax.nn.logsumexp(chosen[..., :k], axis=-1, keepdims=True))
    elif self.gates != 'raw':
      gates = best / jnp.sum(best[..., :k], axis=-1, keepdims=True)
    if self.fallbacks:
      expert_index = reroute(choices, self.num_experts, valid, self.capacity(valid.shape[1], context.train), k)
    expert_index = self.asked(expert_index, gates, context.train)
    plan = self.plan(expert_index, gates, context, self.urgency(best, context.train))

    counted = choices[..., : 1 if self.balance_choices == 'first' else k]
    balance = router_losses.load_balance_loss(probs, counted, valid, count)
    z = router_losses.router_z_loss(logits, valid, count)
    return plan, Aux(
      losses={'balance': self.balance_loss_weight * balance, 'z': self.z_loss_weight * z},
      metrics={
        'balance': balance,
        'z': z,
        'router_entropy': router_losses.router_entropy(probs, valid, count),
        **router_losses.plan_metrics(plan, valid, count, k),
      },
    )

  def seen(self, tokens: Array, context: RoutingContext) -> Array:
    """What the router goes by, float[G, S, M]: the tokens, with jitter in training."""
    if not self.jitter or not context.train:
      return tokens
    # In float32 like all of the router: between 0.99 and 1.01 bfloat16 has five values, and their mean is not 1.
    noise = jax.random.uniform(self.make_rng('router'), tokens.shape, jnp.float32, 1 - self.jitter, 1 + self.jitter)
    return tokens.astype(jnp.float32) * noise

  def asked(self, expert_index: Array, gates: Array, train: bool) -> Array:
    """Puts -1 for the experts beside the best that a token does without: int32[G, S, K]."""
    if self.others == 'all' or (self.others == 'random' and not train):
      return expert_index
    bar: Array | float = self.threshold
    if self.others == 'random':
      bar *= jax.random.uniform(self.make_rng('router'), gates.shape)
    best = jnp.arange(gates.shape[-1])[None, None] == 0
    return jnp.where(best | (gates > bar), expert_index, -1)

  def urgency(self, best: Array, train: bool) -> Array | None:
    """Who goes first, float32[G, S], the highest; None where position says."""
    if self.priority == 'gate':
      return best[..., 0]
    if self.priority == 'random' and train:
      return jax.random.uniform(self.make_rng('router'), best.shape[:2])
    return None
