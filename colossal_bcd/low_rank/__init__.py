"""Low-rank projections of gradients: GaLore, GoLore and GoLore's ReLoRA form.

galore             the transformation of an optimizer, and (galore_*) its eight optimizers
projector          how a basis is computed: exact or by subspace iteration, or drawn
refresh            the step at which a projector is recomputed
refresh_schedule   when each matrix is refreshed, and by which rank
reduced_gradients  low-rank gradients that an engine has averaged instead of whole ones
param_groups       param groups from a model and patterns of names
relora/            adapters that are merged into the weights at each refresh
"""

from colossal_bcd.low_rank.galore_8bit import GaLoreAdamW8bit, GoLoreAdamW8bit
from colossal_bcd.low_rank.galore_adafactor import GaLoreAdafactor, GoLoreAdafactor
from colossal_bcd.low_rank.galore_adamw import GaLoreAdamW, GoLoreAdamW
from colossal_bcd.low_rank.galore_sgd import GaLoreSGD, GoLoreSGD
from colossal_bcd.low_rank.reduced_gradients import ReducedGradientOptimizer, ReplicatedUpdate

__all__ = [
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreSGD",
    "GoLoreAdafactor",
    "GoLoreAdamW",
    "GoLoreAdamW8bit",
    "GoLoreSGD",
    "ReducedGradientOptimizer",
    "ReplicatedUpdate",
]
