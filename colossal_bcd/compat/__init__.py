"""Names and signatures of the packages that this one replaces: change the import line, keep the call.

badam    the block optimizer of BAdam and BREAD, and how they divide a model
ratio    the parameter-ratio form of both
galore   param groups as of the GaLore repositories
golore   GoLore's ReLoRA form
trainer  callbacks for the Trainer of transformers
"""

from typing import TYPE_CHECKING, Any

from colossal_bcd.booster.distributed import DistGaloreAwamW, DistributedAdaFactor, DistributedCAME, DistributedLamb
from colossal_bcd.compat.badam import BlockOptimizer, badam_partition
from colossal_bcd.compat.galore import get_galore_param_groups
from colossal_bcd.compat.golore import ReLoRaLinear, ReLoRaModel
from colossal_bcd.compat.ratio import BlockOptimizerRatio, SparseGradOptimizer

if TYPE_CHECKING:
    from colossal_bcd.compat.trainer import BAdamCallback

__all__ = [
    "BAdamCallback",
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


def __getattr__(name: str) -> Any:
    """The callback derives from a class of transformers, which is imported when it is asked for."""
    if name == "BAdamCallback":
        from colossal_bcd.compat.trainer import BAdamCallback

        return BAdamCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
