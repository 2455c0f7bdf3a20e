"""One algorithm a file: hyper-parameters, declared state, rule, thin class.

base      `ShardedOptimizer`: runs one rule for each parameter, or stack of parameters, on any mesh
register  `@register`: public names, and the classes of other packages that an optimizer replaces at boost
options   hyper-parameters: fields, keys of param groups, `Storage`, what is refused
math      the arithmetic of the rules, on flat tensors
metrics   what an optimizer says of its training when it is asked
replaced  parameters that are no longer the model's
factored  a second moment as row and column averages
adamw, sgd, lion, lamb, adafactor, came   the algorithms
state/    how state is declared, stored and filed
foreign/  optimizers of other packages
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from colossal_bcd.optim.base import ShardedOptimizer as ShardedOptimizer
from colossal_bcd.optim.options import Storage as Storage
from colossal_bcd.optim.state.spec import State as State
from colossal_bcd.optim.state.spec import StateSpec as StateSpec

if TYPE_CHECKING:
    from colossal_bcd.optim.adafactor import Adafactor as Adafactor
    from colossal_bcd.optim.adamw import AdamW as AdamW
    from colossal_bcd.optim.came import CAME as CAME
    from colossal_bcd.optim.lamb import Lamb as Lamb
    from colossal_bcd.optim.lion import Lion as Lion
    from colossal_bcd.optim.sgd import SGD as SGD


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        optimizers = importlib.import_module("colossal_bcd.optim.register").registered(__name__)
        if name in optimizers:
            found = globals()[name] = optimizers[name].cls
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
