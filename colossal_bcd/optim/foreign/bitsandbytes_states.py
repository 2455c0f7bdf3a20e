"""What bitsandbytes keeps for a weight, where it holds a part of the weight: overrides, sizes, quantisation chunks.

Its optimizers decide by the size of the tensor that they hold whether its state has 8 bits, give every 256 values of
that tensor one scale, and look overrides up by the tensor's id or its place in the param groups.  An engine or a block
optimizer puts masters there instead, so that each of these would follow the mesh or the block.  Here they follow the
weight: slices begin with a chunk, and `GlobalOptimManager` is asked about the weight.  Nothing is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.sharding import Layout
from colossal_bcd.sharding.regions import Region, StackedRegion, chunks

CHUNK = 256
"""Values that share a scale (bitsandbytes/optim/optimizer.py, `init_state`)."""
TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}
"""State that is one table for all weights -> its name in `name2qmap`."""
CODES = {"state1": "qmap1", "state2": "qmap2"}
"""State that may have 8 bits -> its table."""
SCALES = ("absmax1", "absmax2")
WRAPPED = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes' `state_dict` puts most of a weight's state."""

Config = dict[str, Any]


def is_bitsandbytes(optimizer: Any) -> bool:
    """Whether the optimizer is one of bitsandbytes that may store its state in 8 bits."""
    return any(
        cls.__module__ == "bitsandbytes.optim.optimizer" and cls.__qualname__ == "Optimizer8bit"
        for cls in type(optimizer).__mro__
    )


def slice_chunk(optimizer: Any) -> int:
    """The `chunk` of `slice_length` with which an optimizer's slices quantise as the whole weight does."""
    return CHUNK if is_bitsandbytes(optimizer) else 1


def require_sound(optimizer: Any) -> None:
    """Refuse what cannot step in bitsandbytes itself: AdEMAMix32bit of 0.50 allocates one of its two first moments."""
    broken = is_bitsandbytes(optimizer) and getattr(optimizer, "optimizer_name", None) == "ademamix"
    if broken and not hasattr(optimizer, "_get_state_double_buffer"):
        name = type(optimizer).__name__
        raise ValueError(
            f"bitsandbytes.optim.{name}: got one whose state1 has room for one of its two first moments, so that its "
            f"step fails or writes beyond it, expected both. Use {name.removesuffix('32bit')}(optim_bits=32)."
        )


def remember_weights(optimizer: Any, groups: Sequence[Iterable[Parameter]]) -> None:
    """Let overrides follow the weights of each param group, before others take their places there.

    Only optimizers of bitsandbytes change.
    """
    if is_bitsandbytes(optimizer) and not isinstance(optimizer.mng, WeightManager):
        optimizer.mng = WeightManager(optimizer.mng, optimizer.args, groups)


def replace_weights(optimizer: Any, new: Mapping[Any, Parameter]) -> None:
    """Let overrides follow weights that others have taken the places of, as those that `fully_shard` makes.

    Args:
        optimizer: any; only those of bitsandbytes change.
        new: weight by the one that it replaces.
    """
    if is_bitsandbytes(optimizer):
        if not isinstance(optimizer.mng, WeightManager):
            remember_weights(optimizer, [group["params"] for group in optimizer.param_groups])
        optimizer.mng.replace(new)


def follow_weights(
    optimizer: Any, tensors: Mapping[Parameter, Tensor], layouts: Mapping[Parameter, Layout] | None = None
) -> None:
    """Say which tensor stands for which weight from now on, and with which layout (None: whole).

    Only optimizers of bitsandbytes take notice, once `remember_weights` has been called.
    """
    manager = getattr(optimizer, "mng", None)
    if isinstance(manager, WeightManager):
        sizes = {} if layouts is None else {param: layouts[param].numel for param in tensors}
        manager.follow(tensors, sizes)


class WeightManager(Mapping[int, Config]):
    """The `GlobalOptimManager` of one optimizer whose tensors stand for weights.

    bitsandbytes reads `index2config`, `pid2config` and `module_weight_config_triple` of it; everything else is the
    global one's.  As a mapping it is `pid2config`: id of a tensor that the optimizer holds -> what is overridden.

    Args:
        manager: the global one.
        args: of the optimizer, for the size from which it stores in 8 bits.
        groups: see `remember_weights`.
    """

    index2config: Mapping[tuple[int, int], Config] = {}
    """Empty: places in the param groups are those of what trains now."""
    module_weight_config_triple: Sequence[Any] = ()
    """Empty, so that the first step does not look for the modules' weights among masters."""

    def __init__(self, manager: Any, args: Any, groups: Sequence[Iterable[Parameter]]) -> None:
        self._global, self._args = manager, args
        self._places = {param: (i, j) for i, group in enumerate(groups) for j, param in enumerate(group)}
        self._weights: dict[int, Parameter] = {id(param): param for param in self._places}
        self._sizes: Mapping[Parameter, int] = {}
        self._replaced: dict[Parameter, Config] = {}
        """What was overridden for the weights that others have replaced, which are not kept alive."""

    @property
    def pid2config(self) -> Mapping[int, Config]:
        return self

    def follow(self, tensors: Mapping[Parameter, Tensor], sizes: Mapping[Parameter, int]) -> None:
        """See `follow_weights`; keeps no tensor alive."""
        self._weights = {id(tensor): param for param, tensor in tensors.items()}
        self._sizes = sizes

    def replace(self, new: Mapping[Any, Parameter]) -> None:
        """See `replace_weights`."""
        self._replaced = {new[param]: self.overrides(param) for param in self._places if param in new}
        self._places = {new.get(param, param): place for param, place in self._places.items()}
        self._weights = {id(param): param for param in self._places}

    def overrides(self, weight: Parameter) -> Config:
        """What the user has overridden for a weight, by its place, by itself, or by module and name."""
        config: Config = dict(self._replaced.get(weight, {}))
        if weight in self._places:
            config.update(self._global.index2config.get(self._places[weight], {}))
        config.update(self._global.pid2config.get(id(weight), {}))
        for module, name, override in self._global.module_weight_config_triple:
            if getattr(module, name) is weight:
                config.update(override)
        return config

    def least(self, weight: Parameter) -> int:
        """The number of values from which the weight's state has 8 bits, if it may."""
        least: int = self.overrides(weight).get("min_8bit_size", self._args.min_8bit_size)
        return least

    def is_quantised(self, weight: Parameter, numel: int) -> bool:
        """Whether the state of a weight of so many values has 8 bits."""
        bits = self.overrides(weight).get("optim_bits", self._args.optim_bits)
        return bits == 8 and numel >= self.least(weight)

    def norm_limit(self, weight: Parameter) -> float:
        """The largest norm of an update relative to that of the weight; 0: any."""
        limit: float = self.overrides(weight).get("max_unorm", self._args.max_unorm)
        return limit

    def __getitem__(self, key: int) -> Config:
        weight = self._weights[key]
        config = self.overrides(weight)
        if weight in self._sizes:
            # It compares with the size of the tensor that it holds.
            config["min_8bit_size"] = 0 if self._sizes[weight] >= self.least(weight) else sys.maxsize
        return config

    def __contains__(self, key: object) -> bool:
        return key in self._weights

    def __iter__(self) -> Iterator[int]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._global, name)


def require_whole_chunks(optimizer: Any, names: Mapping[int, str], divided: bool) -> None:
    """Refuse overrides that need whole weights, for limits by their norms, where ranks hold parts of weights.

    Only optimizers of bitsandbytes are looked at, once `remember_weights` has been called.
    """
    manager = getattr(optimizer, "mng", None)
    if not divided or not isinstance(manager, WeightManager):
        return
    limited = [param for param in manager._places if manager.norm_limit(param) > 0]
    if limited:
        raise ValueError(
            f"{type(optimizer).__name__}: got max_unorm={manager.norm_limit(limited[0])} for "
            f"{names.get(id(limited[0]), 'a weight')!r} and {len(limited) - 1} more, expected 0: ranks hold parts of "
            "weights, whose norms are others. Leave it at 0, or use HybridParallelPlugin(tp_size=1, zero_stage=0)."
        )


def misaligned(optimizer: Any, layouts: Mapping[Parameter, Layout]) -> list[Parameter]:
    """Weights in 8 bits whose chunks are not those of the whole weight on some rank, because ranks have parts."""
    manager = getattr(optimizer, "mng", None)
    if not isinstance(manager, WeightManager):
        return []
    return [
        param
        for param, layout in layouts.items()
        if param in manager._places and manager.is_quantised(param, layout.numel) and not _begin_at_chunks(layout)
    ]


def _begin_at_chunks(layout: Layout) -> bool:
    """Whether every rank's part begins at a chunk of the whole weight."""
    piece = layout.slice
    return chunks(layout, CHUNK) is not None and (piece is None or piece.size == 1 or piece.length % CHUNK == 0)


def describe_misaligned(optimizer: Any, params: Sequence[Parameter], names: Mapping[int, str]) -> str:
    """The warning about `misaligned` weights."""
    shown = ", ".join(f"{names[id(param)]} {tuple(param.shape)}" for param in params[:5])
    more = f" and {len(params) - 5} more" if len(params) > 5 else ""
    return (
        f"{type(optimizer).__name__}: ranks have parts of {len(params)} weights, {shown}{more}, "
        f"whose {CHUNK} values that share a scale are others than those of the whole weight, expected runs of a "
        f"multiple of {CHUNK}: these weights train a little differently on other numbers of ranks, and "
        "their state loads on the same number of them only. optim_bits=32, also for a weight alone by "
        "GlobalOptimManager.override_config, makes them equal."
    )


def scale_region(name: str, tensor: Tensor, layout: Layout) -> Region | None:
    """Which scales of the whole weight a rank's [*, number of its chunks] are; None: of none."""
    cut = chunks(layout, CHUNK)
    # Ranks store padding, or none, as under FSDP2.
    counts = (num_chunks(layout.max_local), num_chunks(layout.num_local))
    if name not in SCALES or cut is None or tensor.shape[-1] not in counts:
        return None
    return StackedRegion.of(cut, tuple(tensor.shape[:-1]))


def num_chunks(numel: int) -> int:
    """Chunks of so many values."""
    return -(-numel // CHUNK)


def completed(optimizer: Any, state: Mapping[str, Any], master: Tensor, layout: Layout) -> dict[str, Any]:
    """State of a weight as a file has it, with what no file has; only that of bitsandbytes' optimizers changes.

    The optimizer's own table takes the place of an equal one, and the padding gets the code of zero: code 0 is the
    largest negative value of a chunk, which would be the scale of the data beside it.

    Args:
        optimizer: whose state it is.
        state: of the weight.
        master: of the weight, with the layout's padding or without.
        layout: of both.
    """
    if not is_bitsandbytes(optimizer):
        return dict(state)
    result = dict(state)
    for name, table in CODES.items():
        codes = result.get(name)
        if isinstance(codes, Tensor) and codes.dtype == torch.uint8 and table in result:
            flat = codes.view(-1, master.numel())
            flat[:, layout.num_local :] = result[table].abs().argmin()
    for name, kind in TABLES.items():
        if isinstance(result.get(name), Tensor):
            if kind not in optimizer.name2qmap:
                optimizer.fill_qmap()
            table = optimizer.name2qmap[kind] = optimizer.name2qmap[kind].to(result[name].device)
            if torch.equal(table, result[name]):
                result[name] = table
    return result


def unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """A weight's state in a state dict, as the optimizer keeps it."""
    return {**{name: value for name, value in state.items() if name != WRAPPED}, **state.get(WRAPPED, {})}
