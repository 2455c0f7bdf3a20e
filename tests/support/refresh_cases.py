"""What ranks run in test_refresh.py: staggered and lazy refreshes on shards of the same matrices, and a plain loop."""

from __future__ import annotations

import math
from typing import Any

import torch
from conformance_cases import Case, Sizes, process_mesh
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from colossal_bcd import GaLoreAdamW
from colossal_bcd.testing import CollectiveCounter
from support.errors import largest_error
from support.signs import with_signs

STEPS, RANK, LR = 17, 3, 1e-2
CASES = [
    Case(shape=(20, 24), dim=0),
    Case(shape=(30, 14), dim=1),
    Case(shape=(33, 7)),
    Case(shape=(7,)),
    Case(shape=(48, 16), dim=0, sections=(16, 16, 16)),
    Case(shape=(8, 4, 3, 3), dim=0),
]
STABLE = 2
"""Index of the matrix whose gradient has a steady subspace; the others' are new draws at every step."""


def weight(index: int) -> Tensor:
    return torch.randn(CASES[index].shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)


def gradient(index: int, step: int, nan_at: int | None = None) -> Tensor:
    """The steady matrix turns at step 12; `nan_at` puts a value that is no number into its gradient."""
    shape = CASES[index].shape
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * index + step), dtype=torch.float64)
    if index != STABLE:
        return noise
    turned = torch.Generator().manual_seed(5 if step < 12 else 6)
    left = torch.randn(shape[0], RANK, generator=turned, dtype=torch.float64)
    right = torch.randn(RANK, shape[1], generator=turned, dtype=torch.float64)
    grad = left @ right + 0.01 * noise
    if step == nan_at:
        grad[4, 2] = float("nan")
    return grad


class Waits(TorchFunctionMode):
    """Counts reads of tensors by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in {"item", "tolist", "__bool__", "__float__", "__int__", "numpy"}:
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


def optimizer_of(params: list[Any], hyper: dict[str, Any]) -> GaLoreAdamW:
    matrices = [param for param, case in zip(params, CASES, strict=True) if len(case.shape) > 1]
    vectors = [param for param, case in zip(params, CASES, strict=True) if len(case.shape) == 1]
    return GaLoreAdamW([{"params": matrices, "rank": RANK, **hyper}, {"params": vectors}], lr=LR)


def sharded(sizes: Sizes, hyper: dict[str, Any], nan_at: int | None = None) -> dict[str, Any]:
    """Everything that a rank can say about a run; by step, and of matrices by index."""
    mesh, tp_rank, zero_rank = process_mesh(sizes)
    layouts = [case.layout(sizes, tp_rank, zero_rank) for case in CASES]
    params = [nn.Parameter(layout.shard(weight(i))) for i, layout in enumerate(layouts)]
    optimizer = optimizer_of(params, hyper)
    optimizer.bind(dict(zip(params, layouts, strict=True)), mesh)
    log: dict[str, list[Any]] = {"due": [], "changed": [], "calls": [], "waits": [], "energy": [], "counters": []}
    before: dict[int, Tensor] = {}
    for step in range(STEPS):
        for index, (param, layout) in enumerate(zip(params, layouts, strict=True)):
            param.grad = layout.shard(gradient(index, step, nan_at))
        images = optimizer.low_rank_wanted()
        log["due"].append([i for i, param in enumerate(params) if param not in images and len(CASES[i].shape) > 1])
        with CollectiveCounter() as counter, Waits() as waits:
            optimizer.step()
        states = [optimizer.state[param] for param in params]
        bases = {i: _bases(state) for i, state in enumerate(states) if _bases(state) is not None}
        log["changed"].append([i for i in bases if i not in before or not torch.equal(bases[i], before[i])])
        log["calls"].append(dict(counter.calls))
        log["waits"].append(waits.calls)
        energy = optimizer.captured_energy()
        log["energy"].append({i: energy[param] for i, param in enumerate(params) if param in energy})
        log["counters"].append([{k: v for k, v in state.items() if isinstance(v, int)} for state in states])
        before = bases
    values = [param.detach().view(-1)[: layout.num_local] for param, layout in zip(params, layouts, strict=True)]
    return {**log, "values": values, "bases": before}


def shards_of(sizes: Sizes, values: list[Tensor]) -> list[Tensor]:
    """What this rank should hold of whole tensors."""
    _, tp_rank, zero_rank = process_mesh(sizes)
    layouts = [case.layout(sizes, tp_rank, zero_rank) for case in CASES]
    return [layout.shard(value).view(-1)[: layout.num_local] for layout, value in zip(layouts, values, strict=True)]


def errors(sizes: Sizes, hyper: dict[str, Any]) -> dict[str, Any]:
    """A run, and its largest error against the plain loop."""
    report = sharded(sizes, hyper)
    plain = plain_loop(report["due"] if hyper.get("lazy_threshold") is None else None, hyper)
    return {**report, "error": largest_error(report["values"], shards_of(sizes, plain["values"])), "plain": plain}


def _bases(state: dict[str, Any]) -> Tensor | None:
    parts = [state[name] for name in ("left", "right") if name in state]
    return torch.cat([part.reshape(-1) for part in parts]).clone() if parts else None


def plain_loop(due: list[list[int]] | None, hyper: dict[str, Any]) -> dict[str, Any]:
    """AdamW on projections of whole matrices: the published rule, written out without the package.

    Args:
        due: matrices to refresh, by step; None: those that the lazy rule says, found here.
        hyper: of `GaLoreAdamW`; std projection, exact singular vectors.
    """
    gap, threshold = hyper["update_proj_gap"], hyper.get("lazy_threshold")
    values = [weight(index) for index in range(len(CASES))]
    states: list[dict[str, Any]] = [{"m": 0.0, "v": 0.0, "at": 0, "wait": 1, "stable": 0} for _ in CASES]
    done: list[list[int]] = []
    for step in range(STEPS):
        done.append([])
        for index, (value, state) in enumerate(zip(values, states, strict=True)):
            grad = gradient(index, step)
            matrix = grad.reshape(len(grad), -1)
            if grad.dim() == 1:
                _adam(value, grad, state, step, 1.0)
                continue
            tall = matrix.shape[0] >= matrix.shape[1]
            wanted = index in due[step] if due is not None else step % gap == 0 and step // gap >= state["at"]
            if wanted:
                done[-1].append(index)
                u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
                new = with_signs(vh[:RANK].T if tall else u[:, :RANK])
                if due is None:
                    _lazily(state, step // gap, new, threshold, hyper["lazy_patience"])
                if hyper.get("reproject_momentum") and step:
                    turn = state["basis"].T @ new
                    state["m"] = state["m"] @ turn if tall else turn.T @ state["m"]
                state["basis"] = new
            low = matrix @ state["basis"] if tall else state["basis"].T @ matrix
            state["energy"] = (low.norm() / matrix.norm()).item() ** 2 if wanted else state["energy"]
            direction = _direction(low, state, step)
            back = direction @ state["basis"].T if tall else state["basis"] @ direction
            value.sub_(0.25 * back.view(value.shape))
    return {"values": values, "done": done, "energy": [state.get("energy") for state in states]}


def _lazily(state: dict[str, Any], number: int, new: Tensor, threshold: float, patience: int) -> None:
    """By the principal angles themselves."""
    if "basis" in state:
        cosines = torch.linalg.svdvals(state["basis"].T @ new)
        chance = RANK / len(new)
        alike = (cosines.square().mean().item() - chance) / (1 - chance)
        state["stable"] = state["stable"] + 1 if alike >= threshold else 0
        if alike < threshold:
            state["wait"] = 1
        if state["stable"] == patience:
            state["wait"], state["stable"] = 2 * state["wait"], 0
    state["at"] = number + state["wait"]


def _adam(value: Tensor, grad: Tensor, state: dict[str, Any], step: int, scale: float) -> None:
    value.sub_(scale * _direction(grad, state, step))


def _direction(grad: Tensor, state: dict[str, Any], step: int) -> Tensor:
    state["m"] = 0.9 * state["m"] + 0.1 * grad
    state["v"] = 0.999 * state["v"] + 0.001 * grad**2
    size = LR * math.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
    return size * state["m"] / (state["v"].sqrt() + 1e-6)
