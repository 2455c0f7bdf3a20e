"""One algorithm a file: hyper-parameters, declared state, rule, thin class."""

from colossal_bcd.optim.adafactor import Adafactor
from colossal_bcd.optim.adamw import AdamW
from colossal_bcd.optim.base import ShardedOptimizer
from colossal_bcd.optim.came import CAME
from colossal_bcd.optim.lamb import Lamb
from colossal_bcd.optim.state.spec import StateSpec

__all__ = [
    "CAME",
    "Adafactor",
    "AdamW",
    "Lamb",
    "ShardedOptimizer",
    "StateSpec",
]
