"""Scaling laws with the constants that papers found.

What is marked "as remembered" was not compared with the paper's text. Losses of two papers are not comparable, nor are
their entropies of text: their data and tokenizers differ.
"""

from moe_jax.analysis.scaling_laws import CLARK, HOFFMANN, KAPLAN, KRAJEWSKI, KRAJEWSKI_DENSE, LUDZIEJEWSKI, Calibrated

_CLARK_RANGES = {'dense_parameters': (1.6527360e7, 1.308819456e9), 'experts': (1, 512), 'tokens': (1.3e11, 1.3e11)}
_HOFFMANN_RANGES = {'parameters': (7e7, 1.6e10), 'tokens': (5e9, 5e11)}


def _clark(source: str, *constants: float) -> Calibrated:
  return Calibrated(
    CLARK, dict(zip(('a', 'b', 'c', 'd', 'E_start', 'E_max'), constants, strict=True)), _CLARK_RANGES, source
  )


_ROUNDED = 'Clark et al. 2022, as remembered; rounded: good for losses, of no use for the cut-off'
_REFITTED = "fitted here to the losses that Clark et al. 2022 released (DeepMind's scaling_laws_for_routing, CC-BY 4.0)"

PUBLISHED = {
  'kaplan_2020': Calibrated(
    KAPLAN,
    {'N_c': 6.4e13, 'alpha_N': 0.076, 'D_c': 1.8e13, 'alpha_D': 0.103},
    {'nonembedding_parameters': (768, 1.5e9), 'tokens': (2.2e7, 2.3e10)},
    'Kaplan et al. 2020, as remembered; one learning rate schedule for all D, which Hoffmann et al. corrected',
  ),
  'hoffmann_2022': Calibrated(
    HOFFMANN,
    {'E': 1.69, 'A': 406.4, 'alpha': 0.34, 'B': 410.7, 'beta': 0.28},
    _HOFFMANN_RANGES,
    "Hoffmann et al. 2022, approach 3, rounded; its optimum is not the 20 tokens a parameter of the paper's other two",
  ),
  'besiroglu_2024': Calibrated(
    HOFFMANN,
    {'E': 1.8172, 'A': 482.01, 'alpha': 0.3478, 'B': 2085.43, 'beta': 0.3658},
    _HOFFMANN_RANGES,
    'Besiroglu et al. 2024, "Chinchilla Scaling: A Replication Attempt": refitted to the same runs, read off a figure',
  ),
  'clark_2022_s_base': _clark(_ROUNDED, -0.082, -0.108, 0.009, 1.104, 1.847, 314.478),
  'clark_2022_rl_r': _clark(_ROUNDED, -0.083, -0.126, 0.012, 1.111, 1.880, 469.982),
  'clark_2022_hash': _clark(_ROUNDED, -0.087, -0.136, 0.012, 1.157, 4.175, 477.741),
  'clark_2022_s_base_refit': _clark(_REFITTED, -0.08333, -0.12020, 0.01013, 1.11682, 2.2035, 229.70),
  'clark_2022_rl_r_refit': _clark(_REFITTED, -0.08303, -0.12525, 0.01142, 1.10995, 1.8281, 450.28),
  'clark_2022_hash_refit': _clark(_REFITTED, -0.08787, -0.14148, 0.01294, 1.16476, 4.5462, 402.53),
  'krajewski_2024': Calibrated(
    KRAJEWSKI,
    {'c': 0.47, 'g': 2.1, 'gamma': 0.58, 'a': 18.1, 'alpha': 0.115, 'b': 30.8, 'beta': 0.147},
    {'experts': (64, 64)},
    'Krajewski et al. 2024, at 64 times the parameters of an MLP; rounded, which makes losses about 0.02 too low',
  ),
  'krajewski_2024_dense': Calibrated(
    KRAJEWSKI_DENSE,
    {'E': 0.47, 'A': 16.3, 'alpha': 0.126, 'B': 26.7, 'beta': 0.127},
    {'experts': (1, 1)},
    'Krajewski et al. 2024, their dense models, on the same data',
  ),
  'ludziejewski_2025': Calibrated(
    LUDZIEJEWSKI,
    {
      **{'a': 35.91, 'alpha': -0.1889, 'delta': -0.2285, 'gamma': 0.0098},
      **{'b': 35.98, 'beta': -0.1775, 'omega': 0.5529, 'zeta': -0.0259},
      **{'E_start': 2.0732, 'E_max': 290.4521, 'c': 1.3637},
    },
    {'active_parameters': (0, 2.7e9), 'parameters': (0, 5e9), 'experts': (1, 32)},
    'Ludziejewski et al. 2025, one expert a token in every layer',
  ),
}
