"""Which part of which weight one GPU has, computed without any process."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn import Parameter

from colossal_bcd.cli.models import layer_names
from colossal_bcd.names import role_of
from colossal_bcd.sharding import FlatSlice, Layout, TensorSplit

VOCABULARY = 64
"""ColossalAI pads a vocabulary to a multiple of so many rows for each tensor-parallel rank."""


@dataclass(frozen=True, kw_only=True)
class MeshSize:
    """How GPUs share the work."""

    gpus: int = 1
    tp: int = 1
    pp: int = 1
    zero: int = 0
    """Stage: 1 divides masters and state over data-parallel ranks, 2 gradients, too."""
    sharded_weights: bool = False
    """FSDP2: weights are divided, too."""

    def __post_init__(self) -> None:
        for name in ("gpus", "tp", "pp"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: got {getattr(self, name)}, expected 1 or more.")
        if self.gpus % (self.tp * self.pp):
            raise ValueError(
                f"--gpus: got {self.gpus}, expected a multiple of tp x pp = {self.tp * self.pp}. Take "
                f"--gpus {self.tp * self.pp * max(1, self.gpus // (self.tp * self.pp))}."
            )
        if self.sharded_weights and self.pp > 1:
            raise ValueError("--sharded-weights: got it with --pp, which FSDP2Plugin has not. Leave one of them out.")
        if self.sharded_weights and self.zero:
            raise ValueError("--sharded-weights: got it with --zero, of which it is stage 3. Leave --zero out.")
        if self.zero not in (0, 1, 2):
            raise ValueError(f"--zero: got {self.zero}, expected 0, 1 or 2. Stage 3 is --sharded-weights.")

    @property
    def dp(self) -> int:
        return self.gpus // (self.tp * self.pp)

    @property
    def zero_ranks(self) -> int:
        """Ranks over which masters and state are divided on top of layouts."""
        return self.dp if self.zero else 1

    def communicates(self, axes: tuple[str, ...]) -> bool:
        """Whether a sum over these axes of layouts needs another rank."""
        sizes = {"tp": self.tp, "zero": self.zero_ranks, "data": self.dp}
        return any(sizes[axis] > 1 for axis in axes)

    def __str__(self) -> str:
        kind = "FSDP2" if self.sharded_weights else f"ZeRO {self.zero}"
        sizes = {"data": self.dp, "tp": self.tp, "pp": self.pp}
        shown = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        gpus = f"{self.gpus} GPU{'s' * (self.gpus > 1)}"
        return f"{gpus}: {shown}, {kind}" if shown else gpus


def layouts_of(model: nn.Module, mesh: MeshSize) -> dict[Parameter, Layout]:
    """Layout of every parameter on the first rank.

    Args:
        model: in whole parameters.
        mesh: see `MeshSize`.
    Raises:
        ValueError: the model has no plan of tensor parallelism, or it does not divide.
    """
    splits: Mapping[str, int] = _divided_dims(model, mesh) if mesh.tp > 1 else {}
    layouts = {}
    for name, param in model.named_parameters():
        layout = Layout.whole(tuple(param.shape))
        if name in splits:
            length, multiple = param.shape[splits[name]], mesh.tp
            if role_of(name).kind in ("embedding", "head") and not mesh.sharded_weights:
                multiple *= VOCABULARY
            padded = -(-length // multiple) * multiple
            padding = padded if padded != length else None
            split = TensorSplit(axis="tp", dim=splits[name], rank=0, size=mesh.tp, padded=padding)
            layout = Layout(shape=tuple(param.shape), split=split)
        if mesh.sharded_weights:
            rows, rest = layout.shard_shape[0] if param.dim() else 1, math.prod(layout.shard_shape[1:])
            each = FlatSlice(axis="data", rank=0, size=mesh.dp, length=-(-rows // mesh.dp) * rest)
            layout = Layout(shape=layout.shape, split=layout.split, slice=each)
        layouts[param] = layout
    return layouts


def stage_names(model: nn.Module, mesh: MeshSize) -> list[set[str]]:
    """Names of the parameters on the first and on the last stage of a pipeline; on the only one without.

    Layers that do not divide evenly are counted to both.
    """
    names = [name for name, _ in model.named_parameters()]
    if mesh.pp == 1:
        return [set(names)]
    layers = layer_names(model)
    if mesh.pp > len(layers):
        raise ValueError(f"--pp: got {mesh.pp}, expected at most the {len(layers)} layers of the model.")
    size = -(-len(layers) // mesh.pp)
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    first, last = set[str](), set[str]()
    for name in names:
        role = role_of(name)
        if role.layer is not None:
            index = layers.index(role.layer)
            first |= {name} if index < size else set()
            last |= {name} if index >= len(layers) - size else set()
        elif role.kind == "embedding":
            first.add(name)
            last |= {name} if tied else set()
        else:
            last.add(name)
    return [first, last]


def _divided_dims(model: nn.Module, mesh: MeshSize) -> dict[str, int]:
    """Name of each parameter that tensor parallelism divides, and the dim."""
    # torch.distributed.tensor takes a second to import, which other commands need not wait for.
    from colossal_bcd.fsdp.tensor_parallel import DIVIDED, styles_of

    dims: dict[str, int] = {}
    for name, style in styles_of(model, mesh.tp).items():
        dim = next(dim for kind, dim in DIVIDED.items() if isinstance(style, kind))
        module: Any = model.get_submodule(name)
        is_table = isinstance(module, nn.Embedding)
        dims[f"{name}.weight"] = 1 - dim if is_table else dim
        if getattr(module, "bias", None) is not None and dim == 0:
            dims[f"{name}.bias"] = 0
    if not mesh.sharded_weights:
        # ColossalAI divides vocabularies, too.
        for name, _ in model.named_parameters():
            if role_of(name).kind in ("embedding", "head"):
                dims[name] = 0
    return dims
