"""Low-rank projections of gradients: GaLore, GoLore and GoLore's ReLoRA form.

galore             the transformation of a rule
optimizers         the eight optimizers that it makes of AdamW, SGD and Adafactor
projection         `Projection`: which gradients are projected, and how
projector          how a basis is computed: exact or by subspace iteration, or drawn
refresh            the step at which a projector is recomputed
refresh_schedule   when each matrix is refreshed, and by which rank
reduced_gradients  low-rank gradients that an engine has averaged instead of whole ones
param_groups       param groups from a model and patterns of names
relora/            adapters that are merged into the weights at each refresh
"""

from colossal_bcd.low_rank.galore import GaLore, GoLore
from colossal_bcd.low_rank.optimizers import (
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreSGD,
    GoLoreAdafactor,
    GoLoreAdamW,
    GoLoreAdamW8bit,
    GoLoreSGD,
)
from colossal_bcd.low_rank.projection import Projection
from colossal_bcd.low_rank.reduced_gradients import ReducedGradientOptimizer, ReplicatedUpdate

__all__ = [
    "GaLore",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreSGD",
    "GoLore",
    "GoLoreAdafactor",
    "GoLoreAdamW",
    "GoLoreAdamW8bit",
    "GoLoreSGD",
    "Projection",
    "ReducedGradientOptimizer",
    "ReplicatedUpdate",
]
