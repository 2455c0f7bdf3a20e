"""FSDP2 on CPUs with gloo: torch 2.13 trains there by itself, torch 2.5 with what is installed here."""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import Any

import torch

from colossal_bcd.fsdp.torch_private import VERSION, divide_sums, preserve_versions, replace_torch

_NEEDS_HELP, _NEEDS_NONE = (2, 5), (2, 13)


class _Event:
    """What a stream has recorded: on a CPU it is done."""

    def record(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class _Stream:
    """Work in order, as all of a CPU's is."""

    def __init__(self, priority: int = 0) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Any = None) -> _Event:
        """An event that is over."""
        return _Event()


class _Cuda:
    """The part of `torch.cuda` that FSDP2 calls."""

    Stream, Event = _Stream, _Event

    @staticmethod
    def is_available() -> bool:
        """FSDP2 asks before it makes streams."""
        return True

    @staticmethod
    def current_stream() -> _Stream:
        """The only one."""
        return _Stream()

    @staticmethod
    def stream(stream: Any) -> contextlib.AbstractContextManager[None]:
        """Work goes on in the only one."""
        return contextlib.nullcontext()


class _TorchOnCpu(ModuleType):
    """torch, but for `torch.cuda`."""

    cuda = _Cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_installed: list[_TorchOnCpu] = []


def enable_cpu() -> None:
    """Let `fully_shard` train on CPUs in this process; call it before the first forward pass, on every rank.

    torch 2.5 asks for CUDA's streams on any device, counts gathered weights as overwritten, and takes gloo's sums for
    averages, silently.  torch 2.13 does none of that, and nothing is changed there.

    Raises:
        RuntimeError: torch finds CUDA devices, which these stand-ins would break, or is of a version between.
    """
    if VERSION >= _NEEDS_NONE or _installed:
        return
    if VERSION != _NEEDS_HELP:
        raise RuntimeError(
            f"FSDP2 on CPUs: got torch {torch.__version__}, expected 2.5, or 2.13 and later, with which gradients are "
            "known to be averages. Install one of them, or train on accelerators."
        )
    if torch.cuda.is_available():
        raise RuntimeError(
            "FSDP2 on CPUs: torch 2.5 finds CUDA devices, whose streams would be taken away from FSDP2. Set "
            "CUDA_VISIBLE_DEVICES= to train on CPUs, or use torch 2.13 or later."
        )
    _installed.append(_TorchOnCpu("torch"))
    replace_torch(_installed[0])
    preserve_versions()
    divide_sums()
