"""What would make an accelerator wait for the host, or the host for it, found on a machine without one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = frozenset((
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "repeat_interleave", "_linalg_check_errors",
))  # fmt: skip
"""Operations whose result, or its shape, the host learns from the device."""


class NoHostWait(TorchDispatchMode):
    """Fails on what reads a device's values on the host, and on what touches tensors of two devices at once.

    Tensors of the meta device stand for those of an accelerator: code that asks for the kind of device goes the way of
    an accelerator, and a tensor that was made on the CPU in the middle of a step is found.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in READS, f"{func} waits for the device"
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        by = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        assert all(index is None or index.dtype not in (torch.bool, torch.uint8) for index in by), (
            f"{func} by a mask waits for the device, which alone knows how many values there are"
        )
        out = func(*args, **(kwargs or {}))
        found = [*given, *(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))]
        devices = {tensor.device.type for tensor in found}
        assert len(devices) <= 1, f"{func} of tensors on {sorted(devices)}: a copy between host and device"
        return out
