"""BAdam's parameter-ratio form: a share of the values of every parameter trains, drawn anew at each switch.

optimizer   `BlockOptimizerRatio`
rule        Adam on the selected values of one parameter
selection   which values are selected, and what they are in files
"""

from colossal_bcd.block.ratio.optimizer import BlockOptimizerRatio

__all__ = ["BlockOptimizerRatio"]
