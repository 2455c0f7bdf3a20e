"""The factors of a ReLoRaModel, as the engine trains them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

from colossal_bcd.low_rank.relora.layer import ReLoRaLinear
from colossal_bcd.sharding import Layout, Mesh


class EngineAdapters:
    """The `AdapterAccess` of an engine; made between backward and the step.

    The engine does not know the full gradients: they are of weights that it does not train.  `merge_and_reinit`
    averages them over the engine's data-parallel ranks, and gives the engine the gradients of the factors that follow
    from them, averaged already, in place of those that backward has left.
    """

    def __init__(self, engine: Any, mesh: Mesh) -> None:
        self._engine, self.mesh = engine, mesh
        engine._force_wait_all_gather()
        engine._reducer.take_back()
        if engine._reducer.unfinished:
            engine._reducer.finish()

    def holds(self, factor: Parameter) -> bool:
        return factor in self._engine.masters.of

    def layout(self, factor: Parameter) -> Layout:
        return self._engine.masters.layout(factor)

    def state(self, factor: Parameter) -> dict[str, Any]:
        master, states = self._engine.masters.of[factor], self._engine.optim.state
        state: dict[str, Any] = states.get(master, {})
        return state

    def restart(self, factor: Parameter, grad: Tensor) -> None:
        factor.data.zero_()
        self._engine.masters.of[factor].zero_()
        factor.grad = None
        part = self.layout(factor).shard(grad) if self._engine.config.partition_grad else grad
        self._engine._reducer.grads[factor] = part.reshape(-1)


def has_adapters(model: nn.Module) -> bool:
    """Whether some layer trains in low rank while its weight is frozen and merged into."""
    return any(isinstance(module, ReLoRaLinear) for module in model.modules())


def refuse_adapters(model: nn.Module, tp_size: int) -> None:
    """Refuse a model that ColossalAI's sharding of layers would take for one with plain linear layers.

    Args:
        model: not sharded yet.
        tp_size: tensor-parallel ranks.
    Raises:
        ValueError: some layer trains in low rank, or has adapters of peft that tensor parallelism would drop.
    """
    if has_adapters(model):
        raise ValueError(
            "HybridParallelPlugin: got a model with ReLoRaLinear layers, which ColossalAI's ShardFormer cannot divide, "
            "expected one without. Use LowLevelZeroPlugin, or train the model as it is with colossal_bcd.GoLoreAdamW, "
            "which is the same method on any mesh."
        )
    adapted = next((name for name, module in model.named_modules() if hasattr(module, "lora_A")), None)
    if adapted is not None and tp_size > 1:
        raise ValueError(
            f"HybridParallelPlugin: got a model with LoRA adapters, such as {adapted!r}, and tp_size={tp_size}, whose "
            "layers ColossalAI replaces without their adapters; expected tp_size=1. Use LowLevelZeroPlugin, or "
            "tp_size=1 with zero_stage=1 or 2."
        )
