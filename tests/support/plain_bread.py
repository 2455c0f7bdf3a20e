"""BREAD written out as a loop on one process; imports nothing of the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from support.signs import with_signs


def direction(rule: str, grad: Tensor, state: dict[str, Any]) -> Tensor:
    """Textbook update of one parameter; momentum and Lion keep their average in bfloat16."""
    if rule == "sgd":
        return grad
    if rule == "sign":
        return torch.sign(grad)
    if rule == "galore":
        return galore(grad, state)
    old = state.get("m", torch.zeros_like(grad, dtype=torch.bfloat16)).to(grad.dtype)
    if rule == "momentum":
        new = 0.9 * old + grad
        state["m"] = new.bfloat16()
        return new
    update = torch.sign(torch.lerp(old, grad, 1 - 0.9))
    state["m"] = torch.lerp(old, grad, 1 - 0.99).bfloat16()
    return update


def galore(grad: Tensor, state: dict[str, Any]) -> Tensor:
    """Rank 2 of every matrix, by the singular vectors of each third gradient; momentum of the projected gradients."""
    if grad.dim() < 2:
        state["m"] = 0.5 * state["m"] + grad if "m" in state else grad.clone()
        return state["m"]
    count = state["count"] = state.get("count", -1) + 1
    if count % 3 == 0:
        left, _, right = torch.linalg.svd(grad, full_matrices=False)
        state["basis"] = with_signs(right[:2].T).T if grad.shape[0] >= grad.shape[1] else with_signs(left[:, :2])
    basis = state["basis"]
    tall = grad.shape[0] >= grad.shape[1]
    image = grad @ basis.T if tall else basis.T @ grad
    state["m"] = 0.5 * state["m"] + image if "m" in state else image
    return 0.7 * (state["m"] @ basis if tall else basis @ state["m"])


def split(names: Sequence[str], blocks: Sequence[str], chosen: Sequence[int], mode: str) -> tuple[list[str], list[str]]:
    """Names of what trains and of what is corrected."""
    active = [name for name in names if any(name.startswith(blocks[index]) for index in chosen)]
    rest = names[names.index(active[0]) :] if mode == "partial" else names
    return active, [name for name in rest if name not in active] if mode != "disabled" else []


def train(
    model: nn.Module,
    blocks: Sequence[str],
    order: Sequence[int | Sequence[int]],
    period: int,
    micro_batches: Callable[[int], Sequence[Tensor]],
    make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    *,
    rule: str = "sgd",
    mode: str = "all",
    lr: float,
    accumulate: int = 1,
    max_norm: float = 0.0,
) -> list[list[float]]:
    """Train one block after another, correct the others, and return the losses of each step's micro-batches.

    Args:
        model, blocks, order, period, micro_batches, make_optimizer, loss_of, accumulate, max_norm: as of plain_badam.
        rule: "sgd", "sign", "momentum", "lion" or "galore".
        mode: "all" or "partial" inactive parameters are corrected.
        lr: of the corrections.
    """
    losses: list[list[float]] = []
    params = dict(model.named_parameters())
    names, states = list(params), {name: {} for name in params}
    for turn in order:
        active, corrected = split(names, blocks, [turn] if isinstance(turn, int) else turn, mode)
        for name, param in params.items():
            param.requires_grad_(name in active or name in corrected)
        wide = torch.float64 if next(iter(params.values())).dtype == torch.float64 else torch.float32
        masters = [params[name].detach().clone().to(wide) for name in active]
        optimizer = make_optimizer(masters)
        for _ in range(period):
            batches = micro_batches(len(losses))
            sums: dict[str, Tensor] = {}
            seen = []
            for first in range(0, len(batches), accumulate):
                seen += _one_rank(model, batches[first : first + accumulate], loss_of, params, corrected, accumulate)
                for name in [*active, *corrected]:
                    part = params[name].grad / (len(batches) // accumulate)
                    sums[name] = sums[name] + part if name in sums else part
                    params[name].grad = None
            losses.append(seen)
            with torch.no_grad():
                for name in corrected:
                    update = direction(rule, sums[name].to(wide), states[name])
                    params[name].copy_(torch.add(params[name].to(wide), update, alpha=-lr))
                _step(optimizer, [params[name] for name in active], masters, [sums[name] for name in active], max_norm)
    return losses


def _one_rank(model: Any, batches: Any, loss_of: Any, params: Any, corrected: Any, accumulate: int) -> list[float]:
    """Gradients of one rank's micro-batches; corrected ones wait in bfloat16 for the last one."""
    seen, waiting = [], {}
    for index, batch in enumerate(batches):
        loss = loss_of(model, batch)
        (loss / accumulate).backward()
        seen.append(loss.item())
        for name in corrected:
            grad, params[name].grad = params[name].grad, None
            if name in waiting:
                grad = waiting[name].to(grad.dtype) + grad
            if index < accumulate - 1:
                waiting[name] = grad.bfloat16()
            else:
                params[name].grad = grad
    return seen


def _step(optimizer: Any, active: Any, masters: Any, sums: Any, max_norm: float) -> None:
    for master, total in zip(masters, sums, strict=True):
        master.grad = total.to(master.dtype)
    if max_norm:
        norm = torch.stack([master.grad.square().sum() for master in masters]).sum().sqrt()
        for master in masters:
            master.grad *= (max_norm / (norm + 1e-6)).clamp(max=1.0)
    optimizer.step()
    for param, master in zip(active, masters, strict=True):
        param.copy_(master)
