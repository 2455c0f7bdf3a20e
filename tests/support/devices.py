"""Devices of the tests in tests/gpu, which are tried on the CPU as far as that can be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from host_waits import NoHostWait

from colossal_bcd.optim.register import registered

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", CUDA]
WITHOUT_VALUES = ["meta", CUDA]
"""Where nothing is computed, tensors of the meta device stand for those of an accelerator."""
OPTIMIZERS = registered("colossal_bcd.optim", "colossal_bcd.low_rank")


def options_of(name: str) -> dict[str, Any]:
    """Hyper-parameters with which all of a rule runs; refreshes need no decomposition."""
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    if name.startswith(("GaLore", "GoLore")):
        options.update(rank=3, clamp=True, update_proj_gap=100, svd_method="random")
    if name.startswith("GoLore"):
        options.update(random_from_step=0)
    if name.endswith("Adafactor"):
        options.update(relative_step=False, beta1=0.9)
    if name.endswith("SGD"):
        options.update(momentum=0.9)
    return options


@contextlib.contextmanager
def no_host_wait(device: str) -> Iterator[None]:
    """Fails on what waits for the device, and, of tensors of the meta device, on copies to and from it."""
    if device != "cuda":
        with NoHostWait():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
