"""Names and signatures of the packages that this one replaces: change the import line, keep the call.

One file per predecessor.
"""

from colossal_bcd.compat.badam import BlockOptimizer, badam_partition
from colossal_bcd.compat.distributed import DistributedAdaFactor, DistributedCAME, DistributedLamb
from colossal_bcd.compat.galore import DistGaloreAwamW, get_galore_param_groups
from colossal_bcd.compat.golore import ReLoRaLinear, ReLoRaModel
from colossal_bcd.compat.ratio import BlockOptimizerRatio, SparseGradOptimizer

__all__ = [
    "BlockOptimizer",
    "DistGaloreAwamW",
    "BlockOptimizerRatio",
    "DistributedAdaFactor",
    "DistributedCAME",
    "DistributedLamb",
    "ReLoRaLinear",
    "ReLoRaModel",
    "SparseGradOptimizer",
    "badam_partition",
    "get_galore_param_groups",
]
