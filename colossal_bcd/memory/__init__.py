"""What training needs on one rank, and what a step sends; from layouts and declared state, nothing is allocated.

optimizer    `estimate`: bytes of an optimizer beyond the weights
activations  bytes that a forward and a backward pass keep alive
traffic      collectives and bytes of an optimizer step
"""

from colossal_bcd.memory.optimizer import Estimate, estimate

__all__ = ["Estimate", "estimate"]
