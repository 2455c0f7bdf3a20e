"""What ranks run in test_plugin_errors.py: mistakes, each of which must be found before the first collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import block_cases
import models
import torch
from colossalai.booster import Booster
from torch import nn

from colossal_bcd import BlockOptimizer, Lamb
from colossal_bcd.booster import FSDP2Plugin, HybridParallelPlugin, LowLevelZeroPlugin, TorchDDPPlugin
from colossal_bcd.testing import CollectiveCounter

ZERO = {"stage": 2, "precision": "bf16"}


def block(**options: Any) -> Any:
    model = models.llama()
    return BlockOptimizer(torch.optim.AdamW(model.parameters()), list(model.named_parameters()), verbose=0, **options)


def boost(plugin: Any, optimizer: Callable[[nn.Module], Any], model: nn.Module | None = None) -> Any:
    model = models.llama() if model is None else model
    return Booster(plugin=plugin).boost(model, optimizer(model))


def unmatched_prefix() -> None:
    block(block_prefix_list=[["model.layers.7."]])


def overlapping_blocks() -> None:
    block(block_prefix_list=[["model.layers.0."], ["model.layers.0.mlp."]])


def empty_block_list() -> None:
    block(block_prefix_list=[])


def unknown_switch_mode() -> None:
    block(switch_mode="sideways")


def duplicated_parameters() -> None:
    model = models.llama()
    names = [*model.named_parameters(), next(model.named_parameters())]
    BlockOptimizer(torch.optim.AdamW(model.parameters()), names, verbose=0)


def no_optimizer() -> None:
    boost(LowLevelZeroPlugin(**ZERO), lambda model: "adamw")


def base_is_no_optimizer() -> None:
    model = models.llama()
    BlockOptimizer("adamw", list(model.named_parameters()))


def sparse_embedding() -> None:
    model = nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Linear(4, 4))
    boost(LowLevelZeroPlugin(stage=2, precision="fp32"), lambda model: Lamb(model.parameters()), model)


def sparse_adam() -> None:
    boost(FSDP2Plugin(), lambda model: torch.optim.SparseAdam(list(model.parameters())))


def sparse_adam_under_ddp() -> None:
    boost(TorchDDPPlugin(), lambda model: torch.optim.SparseAdam(list(model.parameters())))


def overlap_allgather_with_tp() -> None:
    HybridParallelPlugin(tp_size=2, pp_size=1, zero_stage=1, overlap_allgather=True)


def fp8_communication() -> None:
    LowLevelZeroPlugin(fp8_communication=True)


def unknown_plugin_argument() -> None:
    LowLevelZeroPlugin(sage=2)


def ddp_static_graph() -> None:
    boost(TorchDDPPlugin(static_graph=True), lambda model: block_cases.wrap(model))


def whole_matrix_optimizer() -> None:
    boost(LowLevelZeroPlugin(**ZERO), lambda model: torch.optim.LBFGS(model.parameters()))


def stepped_optimizer() -> None:
    def stepped(model: nn.Module) -> Any:
        optimizer = block_cases.wrap(model)
        model(input_ids=models.tokens(0), labels=models.tokens(0)).loss.backward()
        optimizer.step()
        return optimizer

    boost(LowLevelZeroPlugin(**ZERO), stepped)


def optimizer_of_another_model() -> None:
    boost(
        HybridParallelPlugin(tp_size=2, pp_size=1, zero_stage=0, precision="bf16"),
        lambda model: Lamb(models.llama().parameters()),
    )


def never_bound() -> None:
    """Shards put into the param groups by another library, as ColossalAI's stock plugin does without install()."""
    model = models.llama()
    optimizer = Lamb(model.parameters())
    optimizer.param_groups[0]["params"] = [param.detach().reshape(-1)[::2].clone() for param in model.parameters()]
    for shard in optimizer.param_groups[0]["params"]:
        shard.grad = torch.ones_like(shard)
    optimizer.step()


def no_sync_at_stage_2() -> None:
    model, engine, _ = block_cases.boosted("zero", ZERO)
    loss = models.loss(model, models.tokens(0))
    with engine.no_sync():
        engine.backward(loss)


def closure() -> None:
    _, engine, _ = block_cases.boosted("zero", ZERO)
    engine.step(lambda: None)


def message_of(case: str) -> tuple[str, int]:
    """The error of a case and the collectives before it; boosting a block optimizer compares fingerprints."""
    with CollectiveCounter() as counter:
        try:
            globals()[case]()
        except (ValueError, TypeError) as error:
            return f"{type(error).__name__}: {error}", counter.total
    return "no error", counter.total
