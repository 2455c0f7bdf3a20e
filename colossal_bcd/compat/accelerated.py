"""Blocks under accelerate's FSDP2, which Hugging Face's Trainer uses: it shards the model when both are prepared.

Accelerator.prepare        accelerate                            this file
before                                                           the optimizer lets go of the weights, and thaws them
shards                     upcasts what trains, fully_shard,
points an optimizer to the results    a stand-in is pointed
after                                                            `fsdp.attach`: blocks on the sharded weights
its optimizer checkpoint   torch.distributed.checkpoint          `fsdp.save_optimizer`, `fsdp.load_optimizer`
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from colossal_bcd.block import BlockOptimizer, BlockOptimizerRatio
from colossal_bcd.block.parameters import set_active
from colossal_bcd.fsdp import attach, enable_cpu, load_optimizer, save_optimizer

REMEDY = "call colossal_bcd.compat.enable_accelerate() before the Accelerator or the Trainer is made."


def blocks_of(optimizer: Any) -> BlockOptimizer | BlockOptimizerRatio | None:
    """The block optimizer within wrappers such as accelerate's; None of anything else."""
    while isinstance(optimizer, torch.optim.Optimizer):
        if isinstance(optimizer, (BlockOptimizer, BlockOptimizerRatio)):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


@functools.cache
def enable_accelerate() -> None:
    """Let accelerate's FSDP2, and Trainer's, train block optimizers in this process.

    `Accelerator.prepare(model, optimizer)` then attaches a `BlockOptimizer` to the sharded model, and the optimizer's
    checkpoints of accelerate and Trainer are this package's files.  Where there is no accelerator, FSDP2 runs on CPUs,
    on which accelerate by itself ignores it without a word.

    Raises:
        ImportError: there is no accelerate.
    """
    accelerator: Any = importlib.import_module("accelerate").Accelerator
    state: Any = importlib.import_module("accelerate.state")
    accelerator.prepare = _preparing(accelerator.prepare)
    state.AcceleratorState.__init__ = _sharding_on_cpus(state.AcceleratorState.__init__, state)
    enable_checkpoints(importlib.import_module("accelerate.accelerator"))
    if "transformers.trainer" in sys.modules:
        enable_checkpoints(sys.modules["transformers.trainer"])


def enable_checkpoints(module: ModuleType) -> None:
    """Let a module that has imported accelerate's functions write and read a block optimizer by this package's.

    Args:
        module: `accelerate.accelerator` or `transformers.trainer`; nothing is done twice.
    """
    for name, ours in (("save_fsdp_optimizer", save_optimizer), ("load_fsdp_optimizer", load_optimizer)):
        original = getattr(module, name, None)
        if original is not None and not hasattr(original, "__wrapped__"):
            setattr(module, name, _instead_of(original, ours))


def _instead_of(original: Any, ours: Any) -> Any:
    @functools.wraps(original)
    def function(plugin: Any, acc: Any, optimizer: Any, model: Any, folder: str, index: int = 0, **rest: Any) -> None:
        engine = getattr(blocks_of(optimizer), "engine", None)
        if engine is None:
            original(plugin, acc, optimizer, model, folder, index, **rest)
        else:
            ours(engine, Path(folder) / f"optimizer_{index}")

    return function


def _sharding_on_cpus(original: Any, state: ModuleType) -> Any:
    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        kinds, plugin = state.DistributedType, kwargs.get("fsdp_plugin")
        if plugin is None or plugin.fsdp_version != 2 or self.distributed_type != kinds.MULTI_CPU:
            return
        if torch.cuda.is_available():
            raise ValueError(
                "FSDP2 on CPUs: got a machine with CUDA devices, on which fully_shard would use them, expected none. "
                "Set CUDA_VISIBLE_DEVICES= in the environment, or train on the devices."
            )
        enable_cpu()
        if self._mixed_precision != "no":
            plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = plugin
        self.distributed_type = state.PartialState._shared_state["distributed_type"] = kinds.FSDP

    return init


def _preparing(original: Any) -> Any:
    @functools.wraps(original)
    def attaching(self: Any, *args: Any, **kwargs: Any) -> Any:
        blocks = [found for arg in args if (found := blocks_of(arg)) is not None]
        if not blocks or not _shards(self):
            return original(self, *args, **kwargs)
        models = [arg for arg in args if isinstance(arg, nn.Module)]
        optimizer = _require_alone(self, models, blocks)
        if optimizer.engine is None:
            _let_go(optimizer)
        # accelerate points the groups of what it is given to other tensors.
        stand_in = torch.optim.SGD(models[0].parameters(), lr=0.0)
        given = [arg if blocks_of(arg) is None else _replace(arg, optimizer, stand_in) for arg in args]
        try:
            results = original(self, *given, **kwargs)
        finally:
            for arg in args:  # wrappers that were prepared before are never left with the stand-in
                _replace(arg, stand_in, optimizer)
        for result in results:
            if isinstance(result, torch.optim.Optimizer):
                _replace(result, stand_in, optimizer)
        if optimizer.engine is None:
            attach(next(each for each in results if isinstance(each, nn.Module)), optimizer)
        return results

    return attaching


def _shards(accelerator: Any) -> bool:
    """Whether the accelerator shards weights by FSDP2.

    Raises:
        ValueError: it was asked to shard, and does not.
    """
    if accelerator.is_fsdp2:
        return True
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and kind != "NO"
    if kind == "FSDP" or asked:
        raise ValueError(
            f"FSDP: accelerate was asked for it and runs as {kind} without FSDP2, which would not train blocks of "
            "sharded weights; expected fsdp_version=2. Set that in its plugin or configuration, or fsdp_config="
            '{"version": 2} of TrainingArguments; transformers before 5 ignores that and needs FSDP_VERSION=2 in the '
            f"environment. On CPUs: {REMEDY}"
        )
    return False


def _require_alone(accelerator: Any, models: list[nn.Module], blocks: list[Any]) -> BlockOptimizer:
    """The one block optimizer, of the one model; what would train wrongly is refused."""
    if len(models) != 1 or len(blocks) != 1:
        raise ValueError(
            f"Accelerator.prepare: got {len(models)} models and {len(blocks)} block optimizers under FSDP2, expected "
            "one of each in one call, as the optimizer is pointed to the sharded weights. Prepare them together."
        )
    (optimizer,) = blocks
    if isinstance(optimizer, BlockOptimizerRatio):
        raise ValueError(
            "Accelerator.prepare: got a BlockOptimizerRatio, which does not go with FSDP2, expected a BlockOptimizer. "
            "Use that, or train the ratio form without FSDP."
        )
    if accelerator.scaler is not None:
        raise ValueError(
            'Accelerator.prepare: got mixed_precision="fp16", whose gradient scaler looks for gradients where a '
            'BlockOptimizer has none, expected "bf16" or "no". Set that.'
        )
    return optimizer


def _let_go(optimizer: BlockOptimizer) -> None:
    """Thaw the weights, which accelerate upcasts if they train, and keep none of them alive."""
    weights = list(optimizer.named_parameters.values())
    empty = {
        name: Parameter(param.detach().to("meta"), param.requires_grad)
        for param, name in optimizer.replica_names().items()
    }
    verbose, optimizer.verbose = optimizer.verbose, 0
    optimizer.point_to(empty)
    optimizer.verbose = verbose
    for param in weights:
        set_active(param, True)


def _replace(holder: Any, old: Any, new: Any) -> Any:
    """Let a wrapper, or wrappers in it, have another optimizer; the holder, or the other one where it is the old."""
    if holder is old:
        return new
    while (inner := getattr(holder, "optimizer", None)) is not None:
        if inner is old:
            holder.optimizer = new
            break
        holder = inner
    return holder
