"""Optimizers and gradients for the tests of casts."""

from __future__ import annotations

import math
from typing import Any

import colossalai.nn.optimizer as theirs
import torch
from torch import Tensor

SHAPES = ((8, 6), (6,), (3, 2, 4))
STEPS = 6


def weights(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def param_groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": params[:1], "lr": 0.02, "weight_decay": 0.1},
        {"params": params[1:], "betas": (0.8, 0.95), "eps": 1e-5, "note": "mine"},
    ]


def fused_lamb(groups: Any, *, max_grad_norm: float = math.inf, adam_w_mode: int = 1, **options: Any) -> Any:
    """ColossalAI's FusedLAMB, whose constructor needs CUDA kernels, with the attributes that it would have."""
    use_nvlamb = options.pop("use_nvlamb", False)
    optimizer = theirs.FusedLAMB.__new__(theirs.FusedLAMB)
    defaults = {"lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}
    defaults |= {"grad_averaging": True, "max_grad_norm": max_grad_norm, **options}
    torch.optim.Optimizer.__init__(optimizer, groups, defaults)
    optimizer.adam_w_mode, optimizer.use_nvlamb, optimizer.set_grad_none = adam_w_mode, use_nvlamb, True
    return optimizer


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def trained(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> list[Tensor]:
    for step in range(STEPS):
        set_gradients(params, step)
        optimizer.step()
    return [param.detach().clone() for param in params]
