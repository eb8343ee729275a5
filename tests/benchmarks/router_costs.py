"""What routers cost before any token moves: compiled FLOPs a token, and rounds of the auction.

  python tests/benchmarks/router_costs.py

Of the router alone in training (scores, choices, slots, losses), at width 128, 8 groups of 128 tokens and the number of
experts of its test, 8 unless the name says otherwise. XLA counts a loop's body once, and a sort as nothing.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.moe.routers.base import RoutingContext
from moe_jax.moe.routers.base_layers import auction_of_group, balanced_assignment
from moe_jax.moe.routers.sinkhorn import sinkhorn
from tests.moe.test_routers import CASES

GROUPS, TOKENS, WIDTH = 8, 128, 128
REAL = jnp.ones((GROUPS, TOKENS), bool)
ONES = jnp.ones((GROUPS, TOKENS), jnp.int32)


def flops(function, *arguments) -> float:
  """Of the compiled function, a token."""
  return jax.jit(function).lower(*arguments).compile().cost_analysis()['flops'] / (GROUPS * TOKENS)


def of_router(name: str) -> float:
  """FLOPs a token of one router of the tests' table."""
  router = CASES[name].router(num_experts=CASES[name].num_experts)
  told = RoutingContext(REAL, jnp.float32(REAL.size), ONES, ONES, ONES, ONES, row_length=TOKENS, train=True)
  tokens = jax.ShapeDtypeStruct((GROUPS, TOKENS, WIDTH), jnp.float32)
  keys = {'params': jax.random.key(0), 'router': jax.random.key(1)}
  variables = jax.eval_shape(lambda tokens: nn.unbox(router.init(keys, tokens, told)), tokens)
  return flops(lambda v, t: router.apply(v, t, told, rngs=keys, mutable=['state']), variables, tokens)


def main() -> None:
  """Prints two tables."""
  print('| router | FLOPs a token |\n| --- | ---: |')
  for name in CASES:
    print(f'| {name} | {of_router(name):,.0f} |')
  print('\n| experts | scores | rounds | from Sinkhorn | FLOPs a token and round | of a Sinkhorn iteration |')
  print('| ---: | --- | ---: | ---: | ---: | ---: |')
  rounds = jax.jit(jax.vmap(lambda *group: auction_of_group(*group, tolerance=0.02, max_rounds=2000)[1]))
  for experts in (8, 64):
    for kind, skew in (('normal', 0), ('all prefer the same', 3)):
      scores = jax.random.normal(jax.random.key(2), (GROUPS, TOKENS, experts)) + jnp.linspace(skew, 0, experts)
      price = -0.1 * sinkhorn(scores / 0.1, REAL, 30)
      counts = [int(rounds(scores, REAL, start).max()) for start in (jnp.zeros((GROUPS, experts)), price)]
      costs = flops(balanced_assignment, scores, REAL), flops(functools.partial(sinkhorn, iterations=30), scores, REAL)
      print(f'| {experts} | {kind} | {counts[0]} | {counts[1]} | {costs[0]:,.0f} | {costs[1]:,.0f} |')


if __name__ == '__main__':
  main()
