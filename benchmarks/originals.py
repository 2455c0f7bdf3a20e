"""Optimizers of this package beside the ones that they replace, on one process."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import colossalai.nn.optimizer
import torch
import transformers
from torch import Tensor, nn
from torch.optim import Optimizer

import colossal_bcd
from colossal_bcd import BlockOptimizer

Parameters: TypeAlias = Sequence[tuple[str, nn.Parameter]]
"""Parameters with their names."""
Make: TypeAlias = Callable[..., Optimizer]
"""Makes an optimizer of `Parameters` and of the rank of projections."""
FUSED = "torch AdamW, fused"
ALWAYS = 10**6
"""Steps without a refresh or a switch: more than any run has."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Ours and what it replaces, with hyper-parameters that mean the same."""

    ours: Make
    """Takes `compile`, too."""
    originals: Mapping[str, Make]
    """By the name that tables have."""
    floors: Mapping[str, Make] = field(default_factory=dict)
    """Parts of a step that have to be computed, however the rest is arranged."""
    dtype: torch.dtype = torch.float32
    """Of the weights."""


def tensors(parameters: Parameters) -> list[nn.Parameter]:
    """The parameters without their names."""
    return [param for _, param in parameters]


def _ours(name: str, **hyper: Any) -> Make:
    build = getattr(colossal_bcd, name)
    return lambda parameters, rank, **options: build(tensors(parameters), **hyper, **options)


def _original(build: Any, **hyper: Any) -> Make:
    return lambda parameters, rank: build(tensors(parameters), **hyper)


def _galore_groups(parameters: Parameters, rank: int) -> list[dict[str, Any]]:
    params = tensors(parameters)
    options = {"rank": rank, "update_proj_gap": ALWAYS, "scale": 0.25, "proj_type": "std"}
    matrices = [param for param in params if param.dim() == 2]
    rest = [param for param in params if param.dim() < 2]
    return [{"params": matrices, **options}, *([{"params": rest}] if rest else [])]


def _our_galore(parameters: Parameters, rank: int, **options: Any) -> Optimizer:
    groups = _galore_groups(parameters, rank)
    return colossal_bcd.GaLoreAdamW(groups, lr=1e-3, svd_method="random", clamp=True, **options)


def _their_galore(parameters: Parameters, rank: int) -> Optimizer:
    """As in galore_torch, but for bases that are drawn, as ours are: steps between refreshes are timed."""
    module: Any = importlib.import_module("galore_torch.adamw")
    made: Optimizer = module.AdamW(_galore_groups(parameters, rank), lr=1e-3, no_deprecation_warning=True)
    projected = made.param_groups[0]
    options = {name: projected[name] for name in ("update_proj_gap", "scale", "proj_type")}
    for param in projected["params"]:
        # What is there already it does not make.
        made.state[param]["projector"] = _drawn_projector()(rank, **options)
    return made


@functools.cache
def _drawn_projector() -> Any:
    """galore_torch's projector on a basis of orthonormal columns ("left") or rows that is drawn, not decomposed."""
    original: Any = importlib.import_module("galore_torch.galore_projector").GaLoreProjector

    def drawn(projector: Any, weights: Tensor, rank: int, type: str) -> Tensor:
        length = weights.shape[0] if type == "left" else weights.shape[1]
        basis = torch.linalg.qr(torch.randn(length, min(rank, *weights.shape)))[0]
        return basis if type == "left" else basis.T.contiguous()

    return type("DrawnProjector", (original,), {"get_orthogonal_matrix": drawn})


class _Products(Optimizer):
    """The two matrix products of a GaLore step, to the low-rank gradient and back."""

    def __init__(self, parameters: Parameters, rank: int) -> None:
        matrices = [param for param in tensors(parameters) if param.dim() == 2]
        super().__init__(matrices, {})
        self._bases = [torch.randn(min(param.shape), rank) for param in matrices]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param, basis in zip(self.param_groups[0]["params"], self._bases, strict=True):
            if param.grad.shape[0] >= param.grad.shape[1]:
                _ = param.grad @ basis @ basis.T
            else:
                _ = basis @ (basis.T @ param.grad)


def _our_blocks(parameters: Parameters, rank: int, **options: Any) -> Optimizer:
    base = colossal_bcd.AdamW(tensors(parameters), lr=1e-3, **options)
    return BlockOptimizer(base, list(parameters), switch_block_every=ALWAYS, switch_mode="ascending", verbose=0)


def _their_blocks(parameters: Parameters, rank: int) -> Optimizer:
    base = torch.optim.AdamW(tensors(parameters), lr=1e-3)
    # By its name at run time: examples/ has a file of this name, too.
    build: Any = importlib.import_module("badam").BlockOptimizer
    with contextlib.redirect_stdout(io.StringIO()):  # it says which block it trains
        made: Optimizer = build(base, list(parameters), switch_block_every=ALWAYS, switch_mode="ascending", verbose=0)
    return made


def _lion(parameters: Parameters, rank: int) -> Optimizer:
    made: Optimizer = importlib.import_module("lion_pytorch").Lion(tensors(parameters), lr=1e-4)
    return made


def _came(parameters: Parameters, rank: int) -> Optimizer:
    made: Optimizer = importlib.import_module("came_pytorch").CAME(tensors(parameters), lr=1e-3)
    return made


fused_adamw = partial(torch.optim.AdamW, lr=1e-3, fused=True)
"""The yardstick."""

CONTESTS: Mapping[str, Contest] = {
    "adamw": Contest(
        ours=_ours("AdamW", lr=1e-3),
        originals={
            "torch AdamW": _original(torch.optim.AdamW, lr=1e-3),
            "torch AdamW, foreach": _original(torch.optim.AdamW, lr=1e-3, foreach=True),
            FUSED: _original(torch.optim.AdamW, lr=1e-3, fused=True),
        },
    ),
    "sgd": Contest(
        ours=_ours("SGD", lr=1e-3, momentum=0.9),
        originals={
            "torch SGD": _original(torch.optim.SGD, lr=1e-3, momentum=0.9),
            "torch SGD, foreach": _original(torch.optim.SGD, lr=1e-3, momentum=0.9, foreach=True),
            "torch SGD, fused": _original(torch.optim.SGD, lr=1e-3, momentum=0.9, fused=True),
        },
    ),
    "lion": Contest(ours=_ours("Lion", lr=1e-4), originals={"lion_pytorch": _lion}),
    "lamb": Contest(
        ours=_ours("Lamb", lr=1e-3),
        originals={"colossalai Lamb": _original(colossalai.nn.optimizer.Lamb, lr=1e-3)},
    ),
    "adafactor": Contest(
        ours=_ours("Adafactor"),
        originals={"transformers": _original(transformers.Adafactor, scale_parameter=True, relative_step=True)},
    ),
    "came": Contest(ours=_ours("CAME", lr=1e-3), originals={"came_pytorch": _came}),
    "galore": Contest(
        ours=_our_galore, originals={"galore_torch": _their_galore}, floors={"its matrix products alone": _Products}
    ),
    "badam": Contest(ours=_our_blocks, originals={"badam": _their_blocks}, dtype=torch.bfloat16),
}
"""By the name that the command line takes."""
