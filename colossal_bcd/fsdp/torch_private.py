"""Names of torch's FSDP2 that are not public, or not in one place in all versions: the only file that has them.

Each private name is asked for by `private`, so that a torch without it says which one is missing and what for.
"""

from __future__ import annotations

import contextlib
import importlib
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

try:
    from torch.distributed.fsdp import (  # type: ignore[attr-defined]
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
    )
except ImportError:  # torch 2.5
    from torch.distributed._composable.fsdp import (  # type: ignore[attr-defined]
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
    )

__all__ = ["CPUOffloadPolicy", "FSDPModule", "MixedPrecisionPolicy", "fully_shard"]

VERSION = tuple(int(number) for number in torch.__version__.split(".")[:2])
"""Of torch: major, minor."""
_FOLDER = "torch.distributed._composable.fsdp" if VERSION < (2, 6) else "torch.distributed.fsdp._fully_shard"


def private(owner: Any, name: str, purpose: str) -> Any:
    """An attribute that torch does not promise to keep.

    Args:
        owner: module, class or object.
        name: of the attribute.
        purpose: what needs it, for the error.
    Raises:
        RuntimeError: this torch has no such attribute.
    """
    if hasattr(owner, name):
        return getattr(owner, name)
    where = getattr(owner, "__name__", type(owner).__name__)
    raise RuntimeError(
        f"torch {torch.__version__} has no {where}.{name}, which {purpose} needs. Use torch 2.5 or 2.13, with which "
        "this package is tested."
    )


def module_of_fsdp(name: str) -> ModuleType:
    """A module of torch's FSDP2, such as "_fsdp_collectives"."""
    return importlib.import_module(f"{_FOLDER}.{name}")


def replace_torch(stand_in: Any) -> None:
    """Let the modules of FSDP2 in torch 2.5, which name `torch.cuda` for whatever device, see another `torch`.

    Args:
        stand_in: has all of torch's names.
    """
    for name in ("_fsdp_param_group", "_fsdp_collectives", "_fsdp_state"):
        module = module_of_fsdp(name)
        private(module, "torch", "FSDP2 on CPUs")
        module.torch = stand_in  # type: ignore[attr-defined]


def preserve_versions() -> None:
    """Let torch 2.5 gather weights on CPUs without counting that as an in-place write, on which backward would fail."""
    module = module_of_fsdp("_fsdp_param_group")
    original = private(module, "foreach_all_gather_copy_out", "FSDP2 on CPUs")
    preserving = private(torch.autograd, "_unsafe_preserve_version_counter", "FSDP2 on CPUs")

    def copy_out(result: Any, fsdp_params: list[Any], group: dist.ProcessGroup) -> None:
        with contextlib.ExitStack() as stack:
            for param in fsdp_params:
                for output in private(param, "all_gather_outputs", "FSDP2 on CPUs"):
                    stack.enter_context(preserving(output))
            original(result, fsdp_params, group)

    module.foreach_all_gather_copy_out = copy_out  # type: ignore[attr-defined]


def divide_sums() -> None:
    """Let torch 2.5 divide sums of gradients where it asks for an average, of which its gloo makes a sum silently."""
    module = module_of_fsdp("_fsdp_collectives")
    original = private(module, "_get_gradient_divide_factors", "FSDP2 on CPUs")

    def divisors(scattered: dist.ProcessGroup, reduced: dist.ProcessGroup | None, dtype: torch.dtype) -> Any:
        found = original(scattered, reduced, dtype)
        if found != (None, None):
            return found
        return 1.0, float(scattered.size() * (1 if reduced is None else reduced.size()))

    module._get_gradient_divide_factors = divisors  # type: ignore[attr-defined]
