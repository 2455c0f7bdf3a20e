"""`--implementation original`: the packages that this one replaces, with the hyper-parameters of `methods.py`."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from records import DataError
from torch import Tensor, nn
from torch.optim import Optimizer

from colossal_bcd import param_groups
from colossal_bcd.block.schedule import Schedule
from colossal_bcd.names import role_of

if TYPE_CHECKING:
    from methods import Options

Maker: TypeAlias = "Callable[[nn.Module, Options], Optimizer]"


def refuse_without_original(flags: Mapping[str, Any]) -> None:
    """Refuse to run an original that there is none of, or that would not do the same.

    Raises:
        DataError: the flags ask for one.
    """
    if flags["implementation"] == "ours":
        return
    method, precisions = flags["method"], PRECISIONS.get(flags["method"], ("fp32",))
    if method not in ORIGINALS:
        raise DataError(f"--implementation original is of {', '.join(ORIGINALS)}, got {method}. Leave it out.")
    if dist.get_world_size() > 1 or flags["plugin"] != "zero":
        raise DataError(
            f"--implementation original: got {dist.get_world_size()} ranks and --plugin {flags['plugin']}, expected "
            "one process and no plugin. Run the program without a launcher."
        )
    if flags["precision"] not in precisions:
        raise DataError(
            f"--implementation original: got --precision {flags['precision']}, in which that of {method} rounds what "
            f"ours does not. Give --precision {precisions[0]}."
        )
    if flags["resume"]:
        raise DataError("--implementation original: got --resume, but originals write no checkpoints. Leave it out.")


def original_of(method: str, model: nn.Module, options: Options) -> Optimizer:
    """The original of a method.

    Raises:
        DataError: it is of a package that is not installed.
    """
    return ORIGINALS[method](model, options)


class Unboosted:
    """Stands in the place of ColossalAI's booster: neither model nor optimizer is wrapped or cast."""

    def boost(self, model: Any, optimizer: Any, lr_scheduler: Any) -> tuple[Any, Any, None, None, Any]:
        return model, optimizer, None, None, lr_scheduler

    def backward(self, loss: Tensor, optimizer: Any) -> None:
        loss.backward()

    def save_model(self, model: Any, folder: str, **options: Any) -> None:
        model.save_pretrained(folder)


def _class(package: str, name: str, install: str) -> Any:
    """A class by the name of its package at run time: examples/ has files of such names, too."""
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        raise DataError(f"the package {install} is not installed, expected it for its original. pip install {install}.")
    return getattr(importlib.import_module(package), name)


def _plain(package: str, name: str, install: str, **hyper: Any) -> Maker:
    def make(model: nn.Module, options: Options) -> Optimizer:
        params = [param for param in model.parameters() if param.requires_grad]
        given = {"lr": options.lr, "weight_decay": options.weight_decay, **hyper}
        made: Optimizer = _class(package, name, install)(params, **given)
        return made

    return make


def _galore(model: nn.Module, options: Options) -> Optimizer:
    build = _class("galore_torch", "GaLoreAdamW", "galore-torch")
    groups = param_groups(
        model, options.targets, rank=options.rank, update_proj_gap=options.period, scale=options.scale, clamp=True
    )
    made: Optimizer = build(groups, lr=options.lr, weight_decay=options.weight_decay, no_deprecation_warning=True)
    return made


def _badam(model: nn.Module, options: Options) -> Optimizer:
    """Its random order is torch's and another one in every run: it is given ours, written out, to go through."""
    build = _class("badam", "BlockOptimizer", "badam")
    named = list(model.named_parameters())
    layers = dict.fromkeys(layer for name, _ in named if (layer := role_of(name).layer) is not None)
    blocks = [[layer] for layer in layers] if options.blocks is None else options.blocks
    schedule = Schedule(num_blocks=len(blocks), period=options.period, mode=options.switch_mode, seed=options.seed)
    epochs = math.ceil(options.steps / options.period / len(blocks))
    order = [index for epoch in range(epochs) for index in schedule.order(0, epoch)]
    made: Any = build(
        torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay),
        named,
        # It looks for a prefix anywhere in a name: "layers.1" would match "layers.10", too.
        [[f"{prefix}." for prefix in blocks[index]] for index in order],
        switch_block_every=options.period,
        switch_mode="ascending",
        active_modules=[f"{prefix}." for prefix in options.always],
        verbose=0,
    )
    # It counts its first period from 1 on: one step less than the others have.
    made.global_step = -1
    optimizer: Optimizer = made
    return optimizer


ORIGINALS: Mapping[str, Maker] = {
    "badam": _badam,
    "galore": _galore,
    "came": _plain("came_pytorch", "CAME", "came-pytorch"),
    "adafactor": _plain("transformers", "Adafactor", "transformers", relative_step=False),
    "lamb": _plain("colossalai.nn.optimizer", "Lamb", "colossalai"),
    "adamw": _plain("torch.optim", "AdamW", "torch"),
}
"""By method."""
PRECISIONS: Mapping[str, tuple[str, ...]] = {"badam": ("fp32", "bf16")}
"""In which an original does what ours does: BAdam's has float32 masters, the others update the weights themselves."""
