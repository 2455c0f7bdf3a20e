"""One algorithm a file: hyper-parameters, declared state, rule, thin class."""

from colossal_bcd.optim.adamw import AdamW
from colossal_bcd.optim.base import ShardedOptimizer
from colossal_bcd.optim.lamb import Lamb
from colossal_bcd.optim.spec import StateSpec

__all__ = ["AdamW", "Lamb", "ShardedOptimizer", "StateSpec"]
