"""Small models whose graph is recomputed or compiled, and every optimizer that freezes; for one process and ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import peft
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from colossal_bcd import AdamW, BlockOptimizer, BlockOptimizerRatio
from colossal_bcd.compat import SparseGradOptimizer

LAYERS, PERIOD = 2, 2


class Layer(nn.Module):
    """A matrix that grows, one that shrinks, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(5, 7), nn.Linear(7, 5, bias=False), nn.LayerNorm(5)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.norm(hidden + self.down(self.up(hidden).tanh()))
        return out


class Net(nn.Module):
    """Embedding, layers, head; `way` says how the layers are checkpointed."""

    def __init__(self, way: str = "none", layers: int = LAYERS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.embed_tokens = nn.Embedding(11, 5)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm, self.lm_head = nn.LayerNorm(5), nn.Linear(5, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed_tokens(tokens)
        if self.way == "sequential":
            hidden = checkpoint_sequential(list(self.layers), 2, hidden, use_reentrant=True)
        elif self.way == "nested":
            hidden = checkpoint(self._checkpointed, hidden, use_reentrant=True)
        elif self.way == "reentrant":
            hidden = self._checkpointed(hidden)
        else:
            for layer in self.layers:
                hidden = layer(hidden)
        logits = self.lm_head(self.norm(hidden)).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(1).flatten())

    def _checkpointed(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=True)
        return hidden


def net(way: str) -> nn.Module:
    """The small model, or for ways of transformers a Llama, with adapters of peft where the way says "lora"."""
    if way.startswith("hf"):
        llama: Any = models.llama(vocab=64, layers=LAYERS).train()
        if way == "hf_before":
            llama.gradient_checkpointing_enable()
        return llama
    model = Net(way)
    if way == "wrapper":
        for index, layer in enumerate(model.layers):
            model.layers[index] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.REENTRANT)
    return model


COMPILED = ("before", "ran_before", "after", "in_place", "layers")
"""When and how a model is compiled; "ran_before": with a pass in which everything trains."""


def compiled_before(how: str, model: Any, backend: Any) -> Any:
    """The model as the optimizer or the booster gets it."""
    if how not in ("before", "ran_before"):
        return model
    compiled: Any = torch.compile(model, backend=backend)
    if how == "ran_before":
        loss(compiled, 0).backward()
        model.zero_grad()
    return compiled


def compiled_after(how: str, model: Any, backend: Any) -> Any:
    if how == "after":
        return torch.compile(model, backend=backend)
    if how == "in_place":
        model.compile(backend=backend)
    if how == "layers":
        for module in model.modules():
            if isinstance(module, Layer):
                module.compile(backend=backend)
    return model


def enable_after(way: str, model: Any) -> None:
    """What comes after the optimizer was made or the model was boosted."""
    if way == "hf_after":
        model.gradient_checkpointing_enable()


def with_adapters(model: nn.Module) -> nn.Module:
    names = ["q_proj", "down_proj"] if hasattr(model, "config") else ["up", "down"]
    config = peft.LoraConfig(target_modules=names, r=2, lora_alpha=4, init_lora_weights=False)
    torch.manual_seed(1)
    adapted: Any = peft.get_peft_model(model, config)
    return adapted


def block(model: nn.Module, **options: Any) -> BlockOptimizer:
    base = AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    said = {"switch_block_every": PERIOD, "switch_mode": "ascending", "verbose": 0, **options}
    return BlockOptimizer(base, list(model.named_parameters()), **said)


def ratio(model: nn.Module, cls: Any = BlockOptimizerRatio, **options: Any) -> Any:
    groups = [{"params": list(model.parameters())}]
    said = {"update_ratio": 0.3, "switch_every": PERIOD, "preserve_threshold": 20, "verbose": 0, "lr": 1e-2, **options}
    return cls(groups, list(model.named_parameters()), **said)


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "block": block,
    "block_head": lambda model: block(model, active_modules=["lm_head."]),
    "block_corrected": lambda model: block(model, sgd_mode="all"),
    "ratio": ratio,
    "sparse": lambda model: ratio(model, SparseGradOptimizer),
    "lora": block,
    "lora_all": lambda model: block(model, lora_mode="all"),
    "lora_partial": lambda model: block(model, lora_mode="partial"),
    "lora_adapter_only": lambda model: block(model, lora_mode="adapter_only"),
}
"""Every optimizer that freezes; those whose name begins with "lora" in a model with adapters."""


def prepared(optimizer: str, way: str) -> tuple[nn.Module, Any]:
    model = net(way)
    if optimizer.startswith("lora"):
        model = with_adapters(model)
    return model, OPTIMIZERS[optimizer](model)


def loss(model: nn.Module, step: int, rank: int = 0) -> Tensor:
    if any("Llama" in type(module).__name__ for module in model.modules()):
        return models.loss(model, models.tokens(2 * step + rank, length=4, vocab=64))
    result: Tensor = model(models.tokens(2 * step + rank, length=4, vocab=11))
    return result


def train(model: nn.Module, optimizer: Any, steps: int = PERIOD * (LAYERS + 1)) -> None:
    for step in range(steps):
        loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]
