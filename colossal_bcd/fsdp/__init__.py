"""torch's own sharded weights (FSDP2, DTensor), which is ZeRO-3, without ColossalAI.

Plain optimizers of this package need nothing of this folder: made over the parameters of a sharded model they read
their layouts from the DTensors (see `sharding.dtensor`).

engine          `attach`: blocks on sharded weights; a picture of a step
masters         rows of what trains, in the precision in which they are updated
sharded_model   `shard`: groups of FSDP2 that are the blocks
checkpoint      `save_optimizer`, `load_optimizer`: files that load on any mesh, under every engine; `Checkpointable`:
                the same by torch.distributed.checkpoint
weights         whole tensors of a sharded model, for files that any mesh reads, and back
tensor_parallel   `parallelize`: layers are divided below FSDP2
sharded_estimate   `estimate`: bytes of a rank, with its part of the weights
cpu             `enable_cpu`: FSDP2 on CPUs with gloo, for versions of torch that need help there
torch_private   names of torch's FSDP that are not public, or not in one place in all versions
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colossal_bcd.fsdp.checkpoint import Checkpointable, load_optimizer, save_optimizer
    from colossal_bcd.fsdp.cpu import enable_cpu
    from colossal_bcd.fsdp.engine import FsdpEngine, attach
    from colossal_bcd.fsdp.sharded_estimate import estimate
    from colossal_bcd.fsdp.sharded_model import shard
    from colossal_bcd.fsdp.tensor_parallel import parallelize
    from colossal_bcd.fsdp.torch_private import fully_shard

_HOMES = {
    "Checkpointable": "colossal_bcd.fsdp.checkpoint",
    "FsdpEngine": "colossal_bcd.fsdp.engine",
    "attach": "colossal_bcd.fsdp.engine",
    "enable_cpu": "colossal_bcd.fsdp.cpu",
    "estimate": "colossal_bcd.fsdp.sharded_estimate",
    "fully_shard": "colossal_bcd.fsdp.torch_private",
    "load_optimizer": "colossal_bcd.fsdp.checkpoint",
    "parallelize": "colossal_bcd.fsdp.tensor_parallel",
    "save_optimizer": "colossal_bcd.fsdp.checkpoint",
    "shard": "colossal_bcd.fsdp.sharded_model",
}
__all__ = [
    "Checkpointable",
    "FsdpEngine",
    "attach",
    "enable_cpu",
    "estimate",
    "fully_shard",
    "load_optimizer",
    "parallelize",
    "save_optimizer",
    "shard",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
