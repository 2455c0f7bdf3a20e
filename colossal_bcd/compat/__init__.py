"""Names and signatures of the packages that this one replaces: change the import line, keep the call.

badam        the block optimizer of BAdam and BREAD, and how they divide a model
ratio        the parameter-ratio form of both
galore       param groups as of the GaLore repositories
golore       GoLore's ReLoRA form
trainer      blocks in the Trainer of transformers, and in what is built on it
accelerated  blocks under accelerate's FSDP2
"""

from typing import TYPE_CHECKING, Any

from colossal_bcd.booster.distributed import DistGaloreAwamW, DistributedAdaFactor, DistributedCAME, DistributedLamb
from colossal_bcd.compat.badam import BlockOptimizer, badam_partition
from colossal_bcd.compat.galore import get_galore_param_groups
from colossal_bcd.compat.golore import ReLoRaLinear, ReLoRaModel
from colossal_bcd.compat.ratio import BlockOptimizerRatio, SparseGradOptimizer

if TYPE_CHECKING:
    from colossal_bcd.compat.accelerated import enable_accelerate
    from colossal_bcd.compat.trainer import BAdamCallback, block_optimizer, clip_grad_norm_old_version

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
    "block_optimizer",
    "clip_grad_norm_old_version",
    "enable_accelerate",
    "get_galore_param_groups",
]


def __getattr__(name: str) -> Any:
    """What needs transformers or torch.distributed is imported when it is asked for."""
    if name in ("BAdamCallback", "block_optimizer", "clip_grad_norm_old_version"):
        from colossal_bcd.compat import trainer

        return getattr(trainer, name)
    if name == "enable_accelerate":
        from colossal_bcd.compat.accelerated import enable_accelerate

        return enable_accelerate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
