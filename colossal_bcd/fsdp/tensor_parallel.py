"""`parallelize`: tensor parallelism below FSDP2, by the plan that a model of transformers brings along."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from colossal_bcd.names import role_of

logger = logging.getLogger(__name__)

STYLES: dict[str, Any] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
}
"""Names in plans of transformers -> torch's styles; "rep": its inputs or outputs are whole on every rank."""
DIVIDED = {ColwiseParallel: 0, RowwiseParallel: 1}
"""The dim of a linear layer's weight that a style divides."""


def parallelize(model: nn.Module, mesh: DeviceMesh, plan: Mapping[str, Any] | None = None) -> nn.Module:
    """Divide layers over tensor-parallel ranks by torch's `parallelize_module`, before `shard`.

    Args:
        model: in whole parameters, equal on all ranks; divided in place.
        mesh: of one dim, a part of that whose other dims `shard` gets.
        plan: see `styles_of`.
    Returns:
        The model.
    Raises:
        ValueError: see `styles_of`.
    """
    return parallelize_module(model, mesh, styles_of(model, mesh.size(), plan))


def styles_of(model: nn.Module, size: int, plan: Mapping[str, Any] | None = None) -> dict[str, ParallelStyle]:
    """The style of each module that is divided, by name.

    A head stays whole where it is tied to the embedding, which tensor parallelism would part, or its rows do not
    divide.

    Args:
        model: in whole parameters.
        size: tensor-parallel ranks.
        plan: name of a module, with '*' for any component, -> a name in `STYLES` or a style of torch; None: the plan
            of the model itself, as those of transformers have one.
    Raises:
        ValueError: there is no plan, or it has names or styles that are unknown, or ranks do not divide a layer.
    """
    given, plan = plan is not None, getattr(model, "_tp_plan", None) if plan is None else plan
    if not plan:
        raise ValueError(
            f"tp_size={size}: got a {type(model).__name__} without a plan of tensor parallelism, expected one in "
            "config.base_model_tp_plan. Pass tp_plan={'layers.*.up_proj': 'colwise', 'layers.*.down_proj': "
            "'rowwise', ...} with the names of its modules, or tp_size=1."
        )
    _require_heads(model, size)
    modules, names = dict(model.named_modules()), list[str]()
    owners: dict[int, int] = {}
    for module in modules.values():
        for param in module.parameters(recurse=False):
            owners[id(param)] = owners.get(id(param), 0) + 1
    styles: dict[str, ParallelStyle] = {}
    for text, style in plan.items():
        expression = re.compile(r"[^.]+".join(map(re.escape, text.split("*"))))
        names = [name for name in modules if expression.fullmatch(name)]
        # That of a model may have the names of the model inside, too.
        if not names and given:
            raise ValueError(
                f"tp_plan: {text!r} matches no module of {type(model).__name__}. Write whole names as of "
                "model.named_modules(), with '*' for a component."
            )
        for name in names:
            made = _style(text, style)
            is_head, module = role_of(f"{name}.weight").kind == "head", modules[name]
            tied = any(owners[id(param)] > 1 for param in module.parameters(recurse=False))
            if (tied or not _divides(module, made, size)) and is_head:
                logger.info("tp_size=%s: %s stays whole: it is tied, or its rows do not divide", size, name)
                continue
            if tied or not _divides(module, made, size):
                why = "is tied to another module" if tied else f"has a weight of {tuple(module.weight.shape)}"
                raise ValueError(
                    f"tp_size={size}: module {name!r} {why}, expected {type(made).__name__} to divide it evenly. Leave "
                    "it out of tp_plan, or choose another tp_size."
                )
            styles[name] = made
    if not styles:
        raise ValueError(
            f"tp_size={size}: the plan of {type(model).__name__} matches none of its modules, expected some. Pass a "
            "tp_plan with names as of model.named_modules()."
        )
    return styles


def _style(text: str, style: Any) -> ParallelStyle:
    if isinstance(style, ParallelStyle):
        return style
    if not isinstance(style, str) or style not in STYLES:
        raise ValueError(
            f"tp_plan[{text!r}]: got {style!r}, expected one of {', '.join(STYLES)}, or a ParallelStyle of "
            "torch.distributed.tensor.parallel. Pass a tp_plan with these."
        )
    made: ParallelStyle = STYLES[style]()
    return made


def _divides(module: Any, style: ParallelStyle, size: int) -> bool:
    """Whether parts of a module's weight are equal; styles that are not known here are the user's."""
    kind = next((kind for kind in DIVIDED if isinstance(style, kind)), None)
    if kind is None:
        return True
    dim = DIVIDED[kind]
    if isinstance(module, nn.Embedding):
        dim = 1 - dim
    elif not isinstance(module, nn.Linear):
        return False
    return module.weight.shape[dim] % size == 0


def _require_heads(model: nn.Module, size: int) -> None:
    """Refuse to divide attention heads: their number would be a fraction."""
    config = getattr(model, "config", None)
    for name in ("num_attention_heads", "num_key_value_heads"):
        number = getattr(config, name, None)
        if isinstance(number, int) and number % size:
            raise ValueError(
                f"tp_size={size}: the model has {name}={number}, expected a multiple. Choose a tp_size that divides it."
            )
