"""One algorithm a file: hyper-parameters, declared state, rule, thin class."""

from colossal_bcd.optim.adafactor import Adafactor
from colossal_bcd.optim.adamw import AdamW
from colossal_bcd.optim.base import ShardedOptimizer
from colossal_bcd.optim.came import CAME
from colossal_bcd.optim.galore_8bit import GaLoreAdamW8bit, GoLoreAdamW8bit
from colossal_bcd.optim.galore_adafactor import GaLoreAdafactor, GoLoreAdafactor
from colossal_bcd.optim.galore_adamw import GaLoreAdamW, GoLoreAdamW
from colossal_bcd.optim.galore_sgd import GaLoreSGD, GoLoreSGD
from colossal_bcd.optim.images import Descent, ImageOptimizer
from colossal_bcd.optim.lamb import Lamb
from colossal_bcd.optim.spec import StateSpec

__all__ = [
    "CAME",
    "Adafactor",
    "AdamW",
    "Descent",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreSGD",
    "GoLoreAdafactor",
    "GoLoreAdamW",
    "GoLoreAdamW8bit",
    "GoLoreSGD",
    "ImageOptimizer",
    "Lamb",
    "ShardedOptimizer",
    "StateSpec",
]
