"""One algorithm a file: hyper-parameters, declared state, rule, thin class.

base      `ShardedOptimizer`: runs one rule for each parameter, or stack of parameters, on any mesh
options   hyper-parameters: fields, keys of param groups, `Storage`, what is refused
math      the arithmetic of the rules, on flat tensors
factored  a second moment as row and column averages
adamw, sgd, lamb, adafactor, came
state/    how state is declared, stored and filed
foreign/  optimizers of other packages
"""

from colossal_bcd.optim.adafactor import Adafactor
from colossal_bcd.optim.adamw import AdamW
from colossal_bcd.optim.base import ShardedOptimizer
from colossal_bcd.optim.came import CAME
from colossal_bcd.optim.lamb import Lamb
from colossal_bcd.optim.options import Storage
from colossal_bcd.optim.sgd import SGD
from colossal_bcd.optim.state.spec import State, StateSpec

__all__ = [
    "CAME",
    "SGD",
    "Adafactor",
    "AdamW",
    "Lamb",
    "ShardedOptimizer",
    "State",
    "StateSpec",
    "Storage",
]
