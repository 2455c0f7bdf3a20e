"""`explain()`: what an optimizer does with each parameter on this rank, as text; `estimate()`: the bytes it needs."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from colossal_bcd import memory
from colossal_bcd.block.trained import Trained, trained_of
from colossal_bcd.booster.fsdp import FSDP2Optimizer
from colossal_bcd.booster.zero import ZeroOptimizer
from colossal_bcd.fsdp.sharded_estimate import estimate as sharded_estimate
from colossal_bcd.memory import Estimate
from colossal_bcd.memory.traffic import rounds_of
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.sharding import Layout
from colossal_bcd.sharding.dtensor import local_values


def explain(optimizer: Any) -> str:
    """A table of the parameters that are trained now.

    Layout: the global shape and this rank's part of it.  Bytes: of state and a separate master on this rank; "?" where
    an optimizer of another package has no state yet.  Nothing is allocated, sent or changed.

    Args:
        optimizer: what `booster.boost` returned, or any `torch.optim.Optimizer`.
    Raises:
        TypeError: something else.
    """
    inner = getattr(optimizer, "optim", optimizer)
    if not isinstance(inner, Optimizer):
        raise TypeError(f"explain: got a {type(optimizer).__name__}, expected an optimizer, boosted or not")
    trained = _trained(optimizer)
    base = trained.base_optimizer
    held = [(param, group) for group in base.param_groups for param in group["params"]]
    names, weights = _names(optimizer, trained, [param for param, _ in held])
    rows, total = [("parameter", "rule", "layout", "rounds", "bytes", "lr")], 0
    for name, (param, group) in zip(names, held, strict=True):
        layout, rounds, state = _describe(optimizer, base, param, group)
        master = 0 if param.data_ptr() in weights else param.nbytes
        cost, total = "?" if state is None else str(state + master), total + (state or 0) + master
        rows.append((name, type(base).__name__, _text(layout), str(rounds), cost, _rate(group["lr"])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if not trained.plan.is_whole:
        active = ", ".join(block.name for block in trained.active_blocks())
        lines.append(f"step {trained.num_steps}: {active} of {len(trained.blocks)} blocks")
    return "\n".join([*lines, f"{len(held)} parameters, {total} bytes of states and masters on this rank"])


def estimate(optimizer: Any) -> Estimate:
    """What training holds on this rank beyond the weights (see `colossal_bcd.memory`).

    Under FSDP2Plugin, where these are sharded, too, it is a `ShardedEstimate`, which counts them.

    Args:
        optimizer: what `booster.boost` returned under a plugin of this package.
    Raises:
        TypeError: something else.
    """
    if isinstance(optimizer, FSDP2Optimizer):
        return sharded_estimate(optimizer.engine)
    if not isinstance(optimizer, ZeroOptimizer):
        raise TypeError(
            f"estimate: got a {type(optimizer).__name__}, expected what booster.boost returned under a plugin of "
            "colossal_bcd.booster. Of an optimizer that is not boosted ask colossal_bcd.estimate."
        )
    of = optimizer.layouts
    if optimizer.trained.plan.is_whole:
        of = {param: layout for param, layout in of.items() if param in optimizer.masters.of}
    return memory.estimate(
        optimizer.trained,
        num_shards=optimizer.masters.num_shards,
        partition_grad=optimizer.config.partition_grad,
        master_weights=optimizer.config.master_weights,
        layouts=of,
    )


def _trained(optimizer: Any) -> Trained:
    """What is trained by an optimizer, boosted or not."""
    engine = isinstance(optimizer, (ZeroOptimizer, FSDP2Optimizer))
    return optimizer.trained if engine else trained_of(getattr(optimizer, "optim", optimizer))


def _names(optimizer: Any, trained: Trained, held: list[Tensor]) -> tuple[list[str], set[int]]:
    """Name of every tensor that the optimizer holds, and the addresses of the model's own weights."""
    if isinstance(optimizer, (ZeroOptimizer, FSDP2Optimizer)):
        of, named = optimizer.masters.of, optimizer.model.unwrap(unwrap_peft=False).named_parameters()
        name_of = {of[param]: name for name, param in named if param in of}
        return [name_of[tensor] for tensor in held], {local_values(param).data_ptr() for param in of}
    weights = [param for param in trained.parameters() if isinstance(param, torch.nn.Parameter)]
    return list(chain(*trained.group_names(trained.num_steps))), {param.data_ptr() for param in weights}


def _describe(optimizer: Any, base: Optimizer, param: Tensor, group: dict[str, Any]) -> tuple[Layout, int, int | None]:
    """Layout, rounds of a step, and bytes of state."""
    if isinstance(base, ShardedOptimizer):
        layout, hyper = base.layout_of(param), base.hyper_of(group, base.key_of(param))
        specs = base.state_spec(layout, hyper).values()
        num_bytes = sum(spec.num_bytes(param.dtype) for spec in specs)
        return layout, len(rounds_of(base, layout, hyper, base.mesh.communicates)), num_bytes
    of = optimizer if isinstance(optimizer, (ZeroOptimizer, FSDP2Optimizer)) else None
    layout = of.masters.layout(of.master_to_working_param[id(param)]) if of else Layout.whole(tuple(param.shape))
    state = [value.nbytes for value in base.state.get(param, {}).values() if isinstance(value, Tensor)]
    return layout, 0, sum(state) if param in base.state else None


def _rate(lr: float | None) -> str:
    """The learning rate; Adafactor has none where its steps are relative to the weights."""
    return "relative" if lr is None else f"{lr:g}"


def _text(layout: Layout) -> str:
    shape, split, piece = "x".join(map(str, layout.shape)) or "scalar", layout.split, layout.slice
    over = "" if split is None else f", dim {split.dim} {split.axis} {split.rank}/{split.size}"
    return shape + over + ("" if piece is None else f", flat {piece.axis} {piece.rank}/{piece.size}")
