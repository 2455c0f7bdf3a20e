"""Block coordinate descent: which parameters are a block, which block trains when, and the optimizer that does it.

optimizer               BlockOptimizer: a base optimizer and a plan; its docstring shows a step
trained                 what engines and checkpoints know of any optimizer; a plain one has a plan of one block
options                 the options as values, and the flat keywords for them
plan                    what trains after how many steps, as a value: blocks, schedule, what always trains
partition, schedule     which parameters are a block; the order of the blocks, and rates after a switch
parameters              the model's parameters by name, and which of them may be trained
importance              norms by which "importance" draws blocks
active_set              masters and state of what trains now, and what survives a switch
masters, residual       masters on one process; what rounding cuts off them, kept between two turns
correction/             BREAD's cheap updates of what is not active
ratio/                  the form that trains a share of the values of every tensor
replicas                several processes without an engine
state_dict              state dict on one process; copies and pickles of a block optimizer
checks, untrained, log  refusals; warnings of what nothing trains; lines for users
compiled, gradient_checkpointing    graphs of torch.compile and checkpoints follow what trains
"""

from colossal_bcd.block.correction.by_optimizer import OptimizerCorrection
from colossal_bcd.block.correction.rules import (
    Correction,
    LionCorrection,
    MomentumCorrection,
    SgdCorrection,
    SignCorrection,
)
from colossal_bcd.block.importance import ImportanceOptions
from colossal_bcd.block.optimizer import BlockOptimizer
from colossal_bcd.block.options import BlockOptions, CorrectionOptions, LoraOptions
from colossal_bcd.block.partition import Block, partition
from colossal_bcd.block.ratio.optimizer import BlockOptimizerRatio
from colossal_bcd.block.residual import ResidualOptions
from colossal_bcd.block.schedule import Schedule

__all__ = [
    "Block",
    "BlockOptimizer",
    "BlockOptimizerRatio",
    "BlockOptions",
    "Correction",
    "CorrectionOptions",
    "ImportanceOptions",
    "LionCorrection",
    "LoraOptions",
    "MomentumCorrection",
    "OptimizerCorrection",
    "ResidualOptions",
    "Schedule",
    "SgdCorrection",
    "SignCorrection",
    "partition",
]
