"""Block coordinate descent: which parameters are a block, which block trains when, and the optimizer that does it."""

from colossal_bcd.block.correction.by_optimizer import OptimizerCorrection
from colossal_bcd.block.correction.rules import (
    Correction,
    LionCorrection,
    MomentumCorrection,
    SgdCorrection,
    SignCorrection,
)
from colossal_bcd.block.masters import LocalMasters, Masters
from colossal_bcd.block.optimizer import BlockOptimizer
from colossal_bcd.block.partition import Block, partition
from colossal_bcd.block.ratio.optimizer import BlockOptimizerRatio
from colossal_bcd.block.schedule import Schedule

__all__ = [
    "Block",
    "BlockOptimizer",
    "BlockOptimizerRatio",
    "Correction",
    "LionCorrection",
    "LocalMasters",
    "Masters",
    "MomentumCorrection",
    "OptimizerCorrection",
    "Schedule",
    "SgdCorrection",
    "SignCorrection",
    "partition",
]
