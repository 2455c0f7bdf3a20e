"""Runs whose checkpoints an earlier version has written to tests/data: how they are made, and how they go on.

A file under tests/data holds what the version that wrote it did next, so these runs must stay as they are.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from colossalai.booster import Booster
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import colossal_bcd
from colossal_bcd import BlockOptimizer, BlockOptimizerRatio
from colossal_bcd.block import MomentumCorrection, OptimizerCorrection
from colossal_bcd.booster import CheckpointFolder, HybridParallelPlugin, LowLevelZeroPlugin

DATA = Path(__file__).parents[1] / "data"
LR = 1e-2
BEFORE, AFTER = 5, 3
"""Steps before the checkpoint and after it; blocks switch at every third, so both lie in the middle of one."""
BATCH, LENGTH, VOCAB = 4, 8, 122
"""Tensor parallelism pads such a vocabulary to 128."""


def llama() -> nn.Module:
    """8,000 weights of bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).bfloat16()


def tokens(step: int) -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch).loss


def blocks(model: nn.Module, correction: Any = None) -> BlockOptimizer:
    return BlockOptimizer(
        torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1),
        list(model.named_parameters()),
        switch_block_every=3,
        switch_mode="random",
        seed=1,
        verbose=0,
        sgd_mode="all",
        correction=correction or MomentumCorrection(),
        residual="keep",
    )


def corrected_by_galore(model: nn.Module) -> BlockOptimizer:
    return blocks(model, OptimizerCorrection(colossal_bcd.GaLoreSGD, rank=4, update_proj_gap=4, momentum=0.9))


def galore(model: nn.Module) -> Any:
    matrices = [param for name, param in model.named_parameters() if param.dim() == 2 and "layers" in name]
    others = [param for name, param in model.named_parameters() if param.dim() != 2 or "layers" not in name]
    groups = [{"params": matrices, "rank": 4, "update_proj_gap": 4}, {"params": others}]
    return colossal_bcd.GoLoreAdamW(groups, lr=LR, random_from_step=3, moment_bits=8)


def came(model: nn.Module) -> Any:
    return colossal_bcd.CAME(model.parameters(), lr=LR, betas=(0.9, 0.99, 0.999))


def ratio(model: nn.Module) -> BlockOptimizerRatio:
    return BlockOptimizerRatio(
        model.parameters(),
        list(model.named_parameters()),
        update_ratio=0.3,
        switch_every=3,
        mask_mode="scatter",
        lr=LR,
        preserve_threshold=10,
        include_embedding=True,
        include_lm_head=True,
        verbose=0,
    )


MAKE: dict[str, Callable[[nn.Module], Any]] = {
    "blocks": blocks,
    "by_galore": corrected_by_galore,
    "galore": galore,
    "came": came,
    "ratio": ratio,
}
MESHES: dict[str, dict[str, Any]] = {
    "zero2": {"stage": 2},
    "tp2": {"tp_size": 2, "pp_size": 1, "zero_stage": 0},
}
"""Of two ranks."""
WRITTEN = {
    "blocks": ("alone", "zero2"),
    "by_galore": ("zero2",),
    "galore": ("alone", "zero2", "tp2"),
    "came": ("zero2",),
    "ratio": ("alone", "zero2"),
}
"""By optimizer the meshes that wrote its checkpoints; "alone": one process, by `state_dict` and `torch.save`."""


def digest(tensors: Any) -> str:
    """Of every bit of some tensors, in order."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def kernels() -> str:
    """A digest of a loss and gradients, which differs where this machine's kernels add in another order."""
    model = llama()
    loss = loss_of(model, tokens(0))
    loss.backward()
    return digest([loss, *(param.grad for param in model.parameters())])


@functools.cache
def rounding() -> str:
    """A digest of more than `kernels`: of the batches that the runs go on with, whole and halved, and of products.

    Machines of which `kernels` says the same may differ here in a last bit.
    """
    model, found = llama(), list[Tensor]()
    for step in range(BEFORE, BEFORE + AFTER):
        for batch in (tokens(step), *tokens(step).chunk(2)):
            loss = loss_of(model, batch)
            grads = torch.autograd.grad(loss, list(model.parameters()))
            left, *_ = torch.linalg.svd(grads[1].float())
            found += [loss, *grads, left, left[:, :4].T @ grads[1].float()]
    return digest(found)[:12]


class Alone:
    """A run of one process without a booster."""

    def __init__(self, name: str) -> None:
        self.model = llama()
        self.optimizer = MAKE[name](self.model)

    def step(self, number: int) -> float:
        loss = loss_of(self.model, tokens(number))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def save(self, folder: Path) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, folder / "state.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "state.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class Boosted:
    """A run under a plugin on this and the other ranks."""

    def __init__(self, name: str, mesh: str) -> None:
        options = MESHES[mesh]
        plugin = LowLevelZeroPlugin if "stage" in options else HybridParallelPlugin
        self.booster = Booster(plugin=plugin(precision="bf16", **options))
        model = llama()
        self.model, self.optimizer, *_ = self.booster.boost(model, MAKE[name](model))

    def step(self, number: int) -> float:
        group = self.booster.plugin.dp_group if hasattr(self.booster.plugin, "dp_group") else dist.group.WORLD
        batch = tokens(number).chunk(dist.get_world_size(group))[dist.get_rank(group)]
        loss = loss_of(self.model, batch)
        self.booster.backward(loss, self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        total = loss.detach().double()
        dist.all_reduce(total, group=group)
        return total.item() / dist.get_world_size(group)

    def save(self, folder: Path) -> None:
        CheckpointFolder(folder).save(self.booster, self.model, self.optimizer, step=BEFORE)

    def load(self, folder: Path) -> None:
        CheckpointFolder(folder).load(self.booster, self.model, self.optimizer)


def go_on(run: Alone | Boosted) -> dict[str, Any]:
    """Losses of the steps after the checkpoint, and a digest of this rank's weights after each."""
    losses, weights = [], []
    for step in range(BEFORE, BEFORE + AFTER):
        losses.append(run.step(step))
        weights.append(digest(run.model.parameters()))
    return {"losses": losses, "weights": weights}


def made(name: str, mesh: str) -> Alone | Boosted:
    return Alone(name) if mesh == "alone" else Boosted(name, mesh)


def write(name: str, mesh: str, folder: str) -> dict[str, Any]:
    """What this rank does after the checkpoint."""
    run = made(name, mesh)
    for step in range(BEFORE):
        run.step(step)
    run.save(Path(folder))
    return go_on(run)


def alone(name: str) -> dict[str, Any]:
    """What one process does when it goes on from its own state."""
    run = Alone(name)
    run.load(DATA / f"{name}-alone")
    return go_on(run)


def resume_each(names: list[str], mesh: str, source: str) -> dict[str, dict[str, Any]]:
    """By optimizer what this rank does when it goes on from the checkpoints that another mesh's ranks wrote."""
    found = {}
    for name in names:
        run = made(name, mesh)
        run.load(DATA / f"{name}-{source}")
        found[name] = go_on(run)
    return found


def expected(name: str, source: str) -> list[dict[str, Any]]:
    """What each of the ranks that wrote a checkpoint did next; on a machine that rounds otherwise, if it is known."""
    paths = [DATA / f"{name}-{source}" / f"next{end}.json" for end in (f"-{rounding()}", "")]
    ranks: list[dict[str, Any]] = json.loads(next(path for path in paths if path.is_file()).read_text())
    return ranks


def written_by_such_kernels() -> bool:
    """Whether this machine computes gradients bit for bit as the one did that wrote the files."""
    return (DATA / "kernels.txt").read_text().strip() == kernels()
