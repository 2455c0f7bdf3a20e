"""Layouts, statistics of sharded tensors, and the only collectives of an optimizer step."""

from colossal_bcd.sharding.collect import Collect
from colossal_bcd.sharding.layout import FlatSlice, Layout, TensorSplit, slice_length
from colossal_bcd.sharding.low_rank import LowRank
from colossal_bcd.sharding.low_rank_gradient import LowRankGradient
from colossal_bcd.sharding.low_rank_view import LowRankView
from colossal_bcd.sharding.matrix import Matrices, Means, matrices_of
from colossal_bcd.sharding.mesh import Mesh
from colossal_bcd.sharding.rounds import WAVE_BYTES, Combined, Request, Rounds, Sum, Task, resolve, run_rounds
from colossal_bcd.sharding.view import ShardView, square_sum, sum_of_squares, wide

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
    "matrices_of",
    "resolve",
    "run_rounds",
    "slice_length",
    "square_sum",
    "sum_of_squares",
    "wide",
]
