"""A refresh of GoLore's ReLoRA form: merge, new basis, first moment carried over (arXiv 2410.11289, section 5).

out, in: shape of a layer's weight; q: rank.  The wide side of a layer's product A B is a basis, the other one, called
its factor, is trained.  On several ranks the layer's full gradient is averaged, one rank computes the basis, and first
moments, which may be sharded, are put together; every rank then does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.low_rank.projector import singular_bases
from colossal_bcd.low_rank.relora.layer import ReLoRaLinear
from colossal_bcd.optim.state.filed import FiledTensor, filed_like, read, write
from colossal_bcd.optim.state.spec import StateSpec
from colossal_bcd.sharding import WAVE_BYTES, Layout, Mesh, Rounds, Sum, Task, resolve, run_rounds, wide
from colossal_bcd.sharding.low_rank import cost_of_basis
from colossal_bcd.sharding.packing import least_loaded

DATA = "data"
"""Mesh axis of the ranks over which gradients are averaged."""
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
"""State entries that are averages of gradients, and so are carried over to a new basis."""


Draw = Callable[[str, ReLoRaLinear], Tensor]
"""A random basis of a layer, by its name."""


class AdapterAccess(Protocol):
    """Who trains the factors, as a refresh sees it."""

    mesh: Mesh
    """Has the axis `DATA` and every axis that a layout names."""

    def holds(self, factor: Parameter) -> bool:
        """Whether the optimizer trains this factor."""

    def layout(self, factor: Parameter) -> Layout:
        """Which part of the factor the tensors of `state` are."""

    def state(self, factor: Parameter) -> dict[str, Any]:
        """The optimizer's state of the factor; empty before its first step."""

    def restart(self, factor: Parameter, grad: Tensor) -> None:
        """Make the factor zero, its master too, and `grad`, of the factor's shape, its gradient in the next step."""


class LocalAdapters:
    """Factors that an optimizer trains as whole tensors: on one process, or on every rank under torch's DDP.

    Without an optimizer only the gradient is to be set.
    """

    def __init__(self, optimizer: Optimizer | None) -> None:
        self.mesh = Mesh.world(DATA)
        self._optimizer = optimizer
        # A BlockOptimizer keeps masters of low-precision weights apart, and follows weights that are written.
        self._masters: Mapping[Tensor, Tensor] = getattr(getattr(optimizer, "active_set", None), "masters", {})
        groups = optimizer.param_groups if optimizer is not None else []
        self._held = {param for group in groups for param in group["params"]}

    def holds(self, factor: Parameter) -> bool:
        return self._optimizer is None or self._masters.get(factor, factor) in self._held

    def layout(self, factor: Parameter) -> Layout:
        return Layout.whole(tuple(factor.shape))

    def state(self, factor: Parameter) -> dict[str, Any]:
        states: Mapping[Tensor, Any] = {} if self._optimizer is None else self._optimizer.state
        master = self._masters.get(factor, factor)
        return states.get(master, {})

    def restart(self, factor: Parameter, grad: Tensor) -> None:
        factor.zero_()
        factor.grad = grad.to(factor.dtype)


def site_of(optimizer: Any) -> AdapterAccess:
    """Where the factors are trained: found in the optimizer, or in what it wraps (accelerate's and ColossalAI's)."""
    outer = optimizer
    while True:
        if hasattr(optimizer, "adapter_access"):
            site: AdapterAccess = optimizer.adapter_access()
            return site
        inner = getattr(optimizer, "optimizer", getattr(optimizer, "optim", None))
        if inner is None:
            break
        optimizer = inner
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"merge_and_reinit: got a {type(outer).__name__}, expected the optimizer that trains the model")
    return LocalAdapters(optimizer)


def refresh_layers(layers: Sequence[tuple[str, ReLoRaLinear]], site: AdapterAccess, draw: Draw | None) -> None:
    """Merge every layer, give it a new basis and its factor the gradient of this step.

    Layers, the same on every rank, without a gradient on any rank are left alone.  A basis is singular vectors, or what
    `draw` returns.

    Raises:
        ValueError: no layer has a full gradient, or the optimizer does not train a factor, or keeps its first moment
            in a form that is not known here; nothing is changed then.
    """
    for name, layer in layers:
        if not site.holds(layer.trained):
            raise ValueError(
                f"merge_and_reinit: the optimizer does not train {name}.{layer.factor_name}.weight, expected the "
                "optimizer that does. Make it from the parameters of the ReLoRaModel, and under a plugin use those of "
                "colossal_bcd.booster and pass what booster.boost returned."
            )
        if "state1" in site.state(layer.trained):
            raise ValueError(
                f"merge_and_reinit: the state of {name} is of bitsandbytes, whose first moment cannot be carried over. "
                "Use colossal_bcd.AdamW(moment_bits=8) instead."
            )
    device = layers[0][1].weight.device
    had_grad = torch.tensor([layer.full_gradient is not None for _, layer in layers], device=device).float()
    (total,) = resolve([Sum(had_grad, (DATA,))], site.mesh)
    present = [layer for layer, count in zip(layers, total.tolist(), strict=True) if count]
    if not present:
        raise ValueError(
            "merge_and_reinit: no layer has a full gradient, expected one from backward. Set "
            "model._config.forward_type = True before the forward pass whose gradient the new bases are made of."
        )
    costs = {index: cost_of_basis(tuple(layer.weight.shape)) for index, (_, layer) in enumerate(present)}
    owners = least_loaded(costs, site.mesh.size(DATA))
    tasks = (
        Task(_refresh_layer(name, layer, site, draw, owners[index]), (DATA,), 2 * layer.weight.numel() * _item(layer))
        for index, (name, layer) in enumerate(present)
    )
    run_rounds(tasks, site.mesh, WAVE_BYTES)


def _refresh_layer(name: str, layer: ReLoRaLinear, site: AdapterAccess, draw: Draw | None, owner: int) -> Rounds:
    """The refresh of one layer in four steps: average, basis, merge, restart."""
    # `data`: ColossalAI's overlap_allgather gives parameters a class whose in-place operations are not in place.
    factor, basis = layer.trained, layer.basis.weight.data
    shape, dtype = tuple(layer.weight.shape), wide(layer.weight.dtype)
    grad = layer.full_gradient
    local = torch.zeros(shape, dtype=dtype, device=basis.device) if grad is None else grad.to(dtype)
    layer.drop_gradient()
    (grad,) = yield (Sum(local / site.mesh.size(DATA), (DATA,)),)
    del local
    old = basis.to(dtype, copy=True)
    moments = {entry: _whole(site, factor, entry) for entry in _moments(site.state(factor))}
    new = draw(name, layer) if draw else torch.zeros_like(old)
    if not draw and site.mesh.rank(DATA) == owner:
        new = _singular_basis(grad, layer, old)
    asked = yield (Sum(new, () if draw else (DATA,)), *moments.values())
    new, merged = asked[0], layer.merged_weight()
    layer.weight.data.copy_(merged)
    basis.copy_(new)
    new = basis.to(dtype)  # as the next forward pass sees it
    if layer.right:
        change = old @ new.T
        grad = grad @ new.T
    else:
        change = new.T @ old
        grad = new.T @ grad
    for entry, moment in zip(moments, asked[1:], strict=True):
        change = change.to(moment)
        _store(site, factor, entry, moment @ change if layer.right else change @ moment)
    site.restart(factor, grad.mul_(-layer.scale))


def _singular_basis(grad: Tensor, layer: ReLoRaLinear, old: Tensor) -> Tensor:
    """Leading singular vectors; the old basis where the gradient is not finite or the decomposition fails."""
    if not bool(grad.isfinite().all()):
        return old
    try:
        return layer.basis_of(singular_bases(grad, layer.r, layer.side))
    except torch.linalg.LinAlgError:
        return old


def _moments(state: Mapping[str, Any]) -> list[str]:
    return [entry for entry in FIRST_MOMENTS if isinstance(state.get(entry), Tensor)]


def _filed(site: AdapterAccess, factor: Parameter, name: str) -> FiledTensor:
    """How a first moment is stored."""
    state = site.state(factor)
    filed = filed_like(name, state[name], site.layout(factor))
    if f"{name}_absmax" not in state:
        return filed
    return replace(filed, dtype=torch.float32, spec=StateSpec(kind="elementwise", bits=8))


def _whole(site: AdapterAccess, factor: Parameter, name: str) -> Sum:
    """Request a first moment in the factor's shape, whichever part of it this rank has."""
    layout, values = site.layout(factor), read(_filed(site, factor, name), site.state(factor))
    whole = torch.zeros(layout.numel, dtype=values.dtype, device=values.device)
    whole[layout.positions(0, layout.num_local, values.device)] = values
    return Sum(whole.view(layout.shape), layout.axes)


def _store(site: AdapterAccess, factor: Parameter, name: str, whole: Tensor) -> None:
    layout = site.layout(factor)
    values = whole.reshape(-1)[layout.positions(0, layout.num_local, whole.device)]
    write(_filed(site, factor, name), site.state(factor), values)


def _item(layer: ReLoRaLinear) -> int:
    return wide(layer.weight.dtype).itemsize
