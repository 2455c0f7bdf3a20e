"""BAdam's parameter-ratio form: a share of the values of every parameter trains, drawn anew at each switch.

optimizer   `BlockOptimizerRatio`: its hyper-parameters, its rule, and when a share ends
selection   which values of a tensor are a share, what a rank has of them, and where they are in files
"""

from colossal_bcd.block.ratio.optimizer import BlockOptimizerRatio

__all__ = ["BlockOptimizerRatio"]
