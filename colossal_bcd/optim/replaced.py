"""Parameters that `fully_shard`, or accelerate after it, has replaced behind an optimizer's back.

It puts new parameters into the model, which are DTensors.  An optimizer that was made before goes on with the old ones:
they never have a gradient, and nothing trains, silently.
"""

from __future__ import annotations

import gc
from collections.abc import Container, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from colossal_bcd.optim.options import members_with_names
from colossal_bcd.sharding import Layout
from colossal_bcd.sharding.dtensor import is_dtensor, local_values


def are_others(owner: str, params: Sequence[Tensor], known: Container[Tensor], state: Iterable[Tensor]) -> bool:
    """Whether param groups hold other parameters than at first: accelerate puts sharded ones into those that it gets.

    Args:
        owner: what refuses, for errors.
        params: in the groups now.
        known: in the groups before.
        state: parameters that have state.
    Raises:
        ValueError: a parameter is there twice, or state of others would be lost.
    """
    new = [param for param in params if param not in known]
    if not new or not all(map(is_dtensor, new)):
        return False  # flat shards of other libraries do not say which part they are, and are refused
    present = set(params)
    if len(present) < len(params):
        raise ValueError(
            f"{owner}: {len(params) - len(present)} of its {len(params)} parameters are there twice, expected none: "
            "accelerate finds sharded parameters by their memory, of which a rank without rows has none. Let it shard "
            "the model and make the optimizer of whole parameters, or prepare neither."
        )
    if lost := [param for param in state if param not in present]:
        raise ValueError(
            f"{owner}: it has state of {len(lost)} parameters that are in its groups no more, expected none. Load "
            "state after accelerate has prepared the model and the optimizer."
        )
    return True


def require_in_model(owner: str, groups: Iterable[dict[str, Any]]) -> None:
    """Refuse parameters that no module has any more, where a module has a DTensor of their shape instead.

    Args:
        owner: what refuses, for the error.
        groups: param groups, whose parameters without a gradient count.
    Raises:
        ValueError: there are such parameters.
    """
    named: list[tuple[str, Tensor]] = []
    for group in groups:
        named += members_with_names(group, len(named))
    plain = [(name, p) for name, p in named if p.grad is None and p.requires_grad and not is_dtensor(p)]
    if not plain:
        return
    gone, sharded = _gone(plain)
    if gone:
        gc.collect()  # a model that nobody has any more says nothing
        gone, sharded = _gone(plain)
    if gone:
        shapes = {tuple(param.shape) for _, param in gone}
        names = [name for shape, found in sharded.items() if shape in shapes for name in found]
        raise ValueError(
            f"{owner}: {len(gone)} of its parameters, such as {gone[0][0]} of shape {tuple(gone[0][1].shape)}, have no "
            f"gradient and are in no module any more, while {', '.join(names[:3])}{' ...' * (len(names) > 3)} of these "
            "shapes are DTensors: the model was sharded after the optimizer was made, or an evaluation unsharded it "
            "then. Call fully_shard first, reshard() after an evaluation, and then make the optimizer."
        )


def _gone(named: list[tuple[str, Tensor]]) -> tuple[list[tuple[str, Tensor]], dict[tuple[int, ...], list[str]]]:
    """Those in no module while a DTensor of their shape is in one, and names of all DTensors in modules by shape."""
    modules = [item for item in gc.get_objects() if issubclass(type(item), nn.Module)]
    present = {id(param) for module in modules for param in module.parameters(recurse=False)}
    children = {id(child) for module in modules for child in module.children()}
    sharded: dict[tuple[int, ...], list[str]] = {}
    for module in modules:
        for name, param in module.named_parameters() if id(module) not in children else ():
            if is_dtensor(param):
                sharded.setdefault(tuple(param.shape), []).append(name)
    gone = [(name, param) for name, param in named if id(param) not in present and tuple(param.shape) in sharded]
    return gone, sharded


def require_fits(owner: str, index: int, param: Tensor, layout: Layout) -> None:
    """Refuse a parameter that has another shape than its layout says.

    Args:
        owner: what refuses, for the error.
        index: of the parameter in the groups.
        param: of its `local_shape`, or a slice's data alone, flat; a DTensor of the whole shape.
        layout: which part of a parameter it is.
    Raises:
        ValueError: it has another shape.
    """
    shape, data = tuple(param.shape), (layout.num_local,)
    if is_dtensor(param):
        fits = shape == layout.shape and local_values(param).numel() == layout.num_local
    else:
        fits = shape == layout.local_shape or (layout.slice is not None and shape == data)
    if not fits:
        raise ValueError(
            f"{owner}: parameter {index} has shape {shape}, but its layout says {layout.local_shape} (part of "
            f"{layout.shape}). If another library sharded it after construction, use the plugins of "
            "colossal_bcd.booster, or call bind(layouts, mesh)."
        )
