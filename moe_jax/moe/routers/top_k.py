"""Token-choice: every token picks its k best experts (Shazeer 2017, GShard, Switch, ST-MoE, GLaM, Mixtral, OLMoE)."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.moe import router_losses
from moe_jax.moe.routers.base import Router, RoutingContext, normalised
from moe_jax.moe.routing_plan import RoutingPlan, reroute
from moe_jax.types import Array, Aux, ConfigError, one_of

Gates = Literal['raw', 'renormalised', 'softmax', 'sigmoid']
SecondPolicy = Literal['all', 'threshold', 'random']
Priority = Literal['position', 'gate', 'random']
BalanceChoices = Literal['first', 'all']


class TopKRouter(Router):
  """A softmax over the experts, then the k best, each weighed by its gate.

  Subclasses change what the router looks at (`router_input`), how it scores (`logits`) or who gets a slot (`seat`).

  Attributes:
    num_selected: k.
    gates: 'raw' probabilities (Switch, V-MoE, OLMoE); 'renormalised', divided by their sum over the k before any is
      dropped (GShard, ST-MoE, GLaM, Qwen3); 'softmax' over the k logits (Mixtral), the same number by another road;
      'sigmoid' of the logits, divided by their sum over the k, with sigmoids for probabilities throughout.
    second_policy: which experts beside the best a token takes: 'all' of the k, those whose gate exceeds the threshold,
      or each with a 'random' chance of gate / threshold (GShard: threshold 0.5; ST-MoE: 0.2), drawn in training only;
      outside it takes all. Who is not taken takes no slot.
    second_threshold: see `second_policy`.
    priority: who goes first where slots run out: by 'position', by top 'gate' (Batch Prioritized Routing, Riquelme
      2021), or by 'random' (random token selection, Kim 2021) in training and by position outside it.
    balance_choices: whether the balance loss counts 'first' choices (GShard, Switch, ST-MoE) or 'all' (OLMoE, Mixtral).
    balance_loss_weight: of the load-balance loss; 1e-2 in Switch, ST-MoE and GLaM.
    z_loss_weight: of the router z-loss; 1e-3 in ST-MoE.
    jitter: in training the router sees tokens multiplied by uniform noise in [1 - jitter, 1 + jitter] (Switch: 1e-2).
  """

  num_selected: int = 2
  gates: Gates = 'renormalised'
  second_policy: SecondPolicy = 'all'
  second_threshold: float = 0.2
  priority: Priority = 'position'
  balance_choices: BalanceChoices = 'first'
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
    one_of(gates=(self.gates, Gates), second_policy=(self.second_policy, SecondPolicy))
    one_of(priority=(self.priority, Priority), balance_choices=(self.balance_choices, BalanceChoices))
    if not 1 <= self.num_selected <= self.num_experts:
      raise ConfigError(
        f'A token cannot pick {self.num_selected} of {self.num_experts} experts: raise NUM_EXPERTS or lower k.'
      )
    if self.num_selected == 1 and self.gates != 'raw':
      raise ConfigError("A renormalised top-1 gate is always 1 and teaches the router nothing: set gates = 'raw'.")

  @nn.compact
  def __call__(self, tokens: Array, context: RoutingContext) -> tuple[RoutingPlan, Aux]:
    valid, count, k = context.valid, context.token_count, self.num_selected
    logits = self.logits(self.router_input(tokens, context))
    probs = jax.nn.softmax(logits, axis=-1)
    scores = probs
    if self.gates == 'sigmoid':
      scores = jax.nn.sigmoid(logits)
      probs = normalised(scores)
    best, choices = jax.lax.top_k(scores, self.preferences)
    gates = best
    if self.gates == 'softmax':
      chosen = jnp.take_along_axis(logits, choices, axis=-1)
      gates = jnp.exp(chosen - jax.nn.logsumexp(chosen[..., :k], axis=-1, keepdims=True))
    elif self.gates != 'raw':
      gates = normalised(best, best[..., :k])
    plan = self.seat(choices, gates, context)

    counted = choices[..., : 1 if self.balance_choices == 'first' else k]
    balance = router_losses.load_balance_loss(probs, counted, valid, count)
    z = router_losses.router_z_loss(logits, valid, count)
    return plan, Aux(
      losses={'balance': self.balance_loss_weight * balance, 'z': self.z_loss_weight * z},
      metrics={
        'balance': balance,
        'z': z,
        'router_entropy': router_losses.router_entropy(probs, valid, count),
        **self.watched(plan, choices[..., :k], context),
      },
    )

  def watched(self, plan: RoutingPlan, choices: Array, context: RoutingContext) -> dict[str, Array]:
    """What was dropped, and the load of the k best experts, int32[G, S, k], taken or not."""
    valid, count = context.valid, context.token_count
    load = router_losses.expert_load(choices, self.num_experts, valid, count)
    return {**router_losses.plan_metrics(plan, valid, count), 'expert_load': load}

  @property
  def preferences(self) -> int:
    """How many experts a token ranks."""
    return self.num_selected

  def router_input(self, tokens: Array, context: RoutingContext) -> Array:
    """What the router goes by, float[G, S, M]: the tokens, with jitter in training."""
    if not self.jitter or not context.train:
      return tokens
    # In float32 like all of the router: between 0.99 and 1.01 bfloat16 has five values, and their mean is not 1.
    noise = jax.random.uniform(self.make_rng('router'), tokens.shape, jnp.float32, 1 - self.jitter, 1 + self.jitter)
    return tokens.astype(jnp.float32) * noise

  def seat(self, choices: Array, gates: Array, context: RoutingContext) -> RoutingPlan:
    """The plan of int32[G, S, K] experts, best first, with their gates."""
    policy, priority = self.second_policy, None
    if policy == 'threshold' or (policy == 'random' and context.train):
      chance = jax.random.uniform(self.make_rng('router'), gates.shape) if policy == 'random' else 1.0
      first = jnp.arange(gates.shape[-1])[None, None] == 0
      choices = jnp.where(first | (gates > self.second_threshold * chance), choices, -1)
    if self.priority == 'gate':
      priority = gates[..., 0]
    elif self.priority == 'random' and context.train:
      priority = jax.random.uniform(self.make_rng('router'), gates.shape[:2])
    return self.plan(choices, gates, context, priority)


class ReroutingRouter(TopKRouter):
  """No token left behind: who finds an expert full tries the next it prefers (Switch, Fedus et al. 2021, appendix B).

  Attributes:
    fallbacks: how many more experts a token may try.
  """

  fallbacks: int = 3

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.second_policy != 'all' or self.priority != 'position':
      raise ConfigError('Rerouting goes in token order and takes all experts: leave second_policy and priority alone.')

  @property
  def preferences(self) -> int:
    """See `TopKRouter`."""
    return min(self.num_selected + self.fallbacks, self.num_experts)

  def seat(self, choices: Array, gates: Array, context: RoutingContext) -> RoutingPlan:
    """See `TopKRouter`."""
    capacity = self.capacity(choices.shape[1], context.train)
    return self.plan(reroute(choices, self.num_experts, context.valid, capacity, self.num_selected), gates, context)

  def watched(self, plan: RoutingPlan, choices: Array, context: RoutingContext) -> dict[str, Array]:
    """See `TopKRouter`."""
    held = jnp.sum(plan.kept, axis=-1) / self.num_selected
    lost = router_losses.token_mean(1 - held, context.valid, context.token_count)
    return {**super().watched(plan, choices, context), 'dropped_choices': lost}
