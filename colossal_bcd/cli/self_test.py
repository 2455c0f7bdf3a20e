"""`doctor`: what is installed, and whether two processes on this machine train as one does."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import colossal_bcd
from colossal_bcd.sharding import Layout, Mesh
from colossal_bcd.testing import RankError, run_ranks

LIBRARIES = ("torch", "transformers", "colossalai", "accelerate", "peft", "bitsandbytes", "safetensors")
OPTIMIZERS = ("AdamW", "Lamb", "Adafactor", "CAME", "GaLoreAdamW")
STEPS, BOUND = 3, 1e-12
SHAPES = ((7, 5), (6, 9), (11,))
"""Of weights that two ranks do not divide evenly."""


def diagnosis(timeout: float) -> dict[str, Any]:
    """Versions, devices, and the largest error of each optimizer on two ranks in float64.

    Args:
        timeout: seconds that the ranks may take.
    """
    found: dict[str, Any] = {
        "version": colossal_bcd.__version__,
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "backends": [name for name in ("gloo", "nccl", "mpi", "ucc") if _has(name)],
        "errors": {},
        "failure": None,
    }
    try:
        found["errors"] = run_ranks(2, _errors_on_a_rank, timeout=timeout)[0]
        if torch.cuda.is_available():
            found["errors"] |= {f"{name}, cuda": _error(name, {}, Mesh(), "cuda") for name in OPTIMIZERS}
    except (RankError, RuntimeError, OSError) as error:
        found["failure"] = str(error).strip().splitlines()[-1]
    errors = found["errors"].values()
    found["passed"] = found["failure"] is None and all(error <= BOUND for error in errors)
    return found


def _errors_on_a_rank() -> dict[str, float]:
    """Largest difference from one process, over both ranks."""
    mesh = Mesh.world("zero")
    errors = {}
    for name in OPTIMIZERS:
        error = torch.tensor([_error(name, {"rank": mesh.rank("zero"), "size": mesh.size("zero")}, mesh, "cpu")])
        mesh.all_reduce(error, "zero")
        errors[name] = float(error)
    return errors


def _error(name: str, part: dict[str, int], mesh: Mesh, device: str) -> float:
    """Largest difference between this rank's part, or another device, and one process on the CPU."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    gradients = [
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES] for _ in range(STEPS)
    ]
    layouts = [Layout.whole(shape) for shape in SHAPES]
    if part:
        layouts = [layout.sliced("zero", part["rank"], part["size"], whole_rows=True) for layout in layouts]
    want = [nn.Parameter(weight.clone()) for weight in weights]
    got = [nn.Parameter(layout.shard(weight).to(device)) for layout, weight in zip(layouts, weights, strict=True)]
    alone, divided = _make(name, want), _make(name, got)
    if part:
        divided.bind(dict(zip(got, layouts, strict=True)), mesh)
    for step in gradients:
        for layout, ours, theirs, gradient in zip(layouts, got, want, step, strict=True):
            ours.grad, theirs.grad = layout.shard(gradient).to(device), gradient
        alone.step()
        divided.step()
    differences = [
        (ours.detach().cpu() - layout.shard(theirs.detach())).abs().amax()
        for layout, ours, theirs in zip(layouts, got, want, strict=True)
    ]
    error = torch.stack(differences).amax()
    return float(error) if bool(error.isfinite()) else float("inf")


def _make(name: str, params: Sequence[Tensor]) -> Any:
    options: dict[str, dict[str, Any]] = {
        "Adafactor": {"relative_step": False},
        "GaLoreAdamW": {"rank": 2, "update_proj_gap": 2},
    }
    return getattr(colossal_bcd, name)(params, lr=1e-2, **options.get(name, {}))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has(backend: str) -> bool:
    distributed = importlib.import_module("torch.distributed")
    if not distributed.is_available():
        return False
    return bool(getattr(distributed, f"is_{backend}_available", lambda: False)())
