"""Parameters that `fully_shard` has replaced behind an optimizer's back.

It puts new parameters into the model, which are DTensors.  An optimizer that was made before goes on with the old ones:
they never have a gradient, and nothing trains, silently.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

from torch import Tensor, nn

from colossal_bcd.sharding.dtensor import is_dtensor


def require_in_model(owner: str, named: Sequence[tuple[str, Tensor]]) -> None:
    """Refuse parameters that no module has any more, where a module has a DTensor of their shape instead.

    Args:
        owner: what refuses, for the error.
        named: parameters without a gradient, with a name or a number.
    Raises:
        ValueError: there are such parameters.
    """
    plain = [(name, param) for name, param in named if param.requires_grad and not is_dtensor(param)]
    if not plain:
        return
    modules = [item for item in gc.get_objects() if issubclass(type(item), nn.Module)]
    present = {id(param) for module in modules for param in module.parameters(recurse=False)}
    children = {id(child) for module in modules for child in module.children()}
    sharded: dict[tuple[int, ...], list[str]] = {}
    for module in modules:
        for name, param in module.named_parameters() if id(module) not in children else ():
            if is_dtensor(param):
                sharded.setdefault(tuple(param.shape), []).append(name)
    gone = [(name, param) for name, param in plain if id(param) not in present and tuple(param.shape) in sharded]
    if gone:
        shapes = {tuple(param.shape) for _, param in gone}
        names = [name for shape, found in sharded.items() if shape in shapes for name in found]
        raise ValueError(
            f"{owner}: {len(gone)} of its parameters, such as {gone[0][0]} of shape {tuple(gone[0][1].shape)}, have no "
            f"gradient and are in no module any more, while {', '.join(names[:3])}{' ...' * (len(names) > 3)} of these "
            "shapes are DTensors: the model was sharded after the optimizer was made, or an evaluation unsharded it "
            "then. Call fully_shard first, reshard() after an evaluation, and then make the optimizer."
        )
