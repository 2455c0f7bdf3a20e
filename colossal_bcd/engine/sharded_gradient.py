"""What stands in `param.grad` for an average that this rank has only a part of, or that has no norm of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ShardedGradient(Tensor):
    """Says that there is a gradient, without memory; what reads or changes its values raises.

    None would let `torch.nn.utils.clip_grad_norm_` return 0.0 and clip nothing.

    Args:
        param: whose gradient it is; it has its shape, dtype and device.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, param: Tensor) -> ShardedGradient:
        zero = torch.zeros((), dtype=param.dtype, device=param.device)
        return Tensor._make_subclass(cls, zero.expand(param.shape))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise ValueError(
            f"param.grad: got {func.overloadpacket.__name__} on a gradient that is divided over ranks (ZeRO stage 2, "
            "tensor or pipeline parallelism), held in low rank, or multiplied by a loss scale (fp16), expected nothing "
            "to read or change it. Clip with "
            "optimizer.clip_grad_by_norm(...) or the plugin's max_norm, read optimizer.get_grad_norm() after the step, "
            "drop gradients with optimizer.zero_grad(), and call backward through the booster."
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"ShardedGradient(shape={tuple(self.shape)}, dtype={self.dtype})"
