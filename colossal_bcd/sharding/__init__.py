"""Layouts, statistics of sharded tensors, and the only collectives of an optimizer step.

layout    which part of which global tensor a rank has: pure values
mesh      axis name -> process group of this rank
rounds    rules ask, one collective per axis answers
lazy      elementwise arithmetic, a chunk at a time or as one compiled kernel
matrix    row and column statistics of a ragged slice (with a picture)
view      what a rule sees of a parameter or of its low-rank gradient
low_rank  projections of sharded gradients, and what travels instead of whole ones
dtensor   layouts and local values of torch's DTensors
packing   which items travel together, and which rank does what
regions   which part of a full tensor a rank's tensor is, for files
"""

from colossal_bcd.sharding.layout import FlatSlice, Layout, TensorSplit, slice_length
from colossal_bcd.sharding.lazy import Columns, Lazy, Number, Rows, square_sum, wide
from colossal_bcd.sharding.low_rank import LowRank, LowRankGradient, LowRankView, low_rank_of
from colossal_bcd.sharding.matrix import Matrices, Means, matrices_of
from colossal_bcd.sharding.mesh import Mesh
from colossal_bcd.sharding.rounds import WAVE_BYTES, Collect, Combined, Request, Rounds, Sum, Task, resolve, run_rounds
from colossal_bcd.sharding.view import ShardView, View, sum_of_squares

__all__ = [
    "WAVE_BYTES",
    "FlatSlice",
    "Collect",
    "Combined",
    "LowRankGradient",
    "LowRankView",
    "Layout",
    "LowRank",
    "Matrices",
    "Means",
    "Mesh",
    "Request",
    "Rounds",
    "ShardView",
    "Sum",
    "Task",
    "TensorSplit",
    "View",
    "Columns",
    "Lazy",
    "Number",
    "Rows",
    "low_rank_of",
    "matrices_of",
    "resolve",
    "run_rounds",
    "slice_length",
    "square_sum",
    "sum_of_squares",
    "wide",
]
