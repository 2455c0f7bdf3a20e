"""How a batch becomes a step: on the ranks of a ColossalAI booster, or in one process that stands for all of them.

T: tokens in a sequence.
"""

from __future__ import annotations

import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import colossalai
import torch
import torch.distributed as dist
from colossalai.booster import Booster
from colossalai.utils import get_current_device
from settings import LOW_RANK, Settings, SettingsError
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from colossal_bcd import (
    CAME,
    Adafactor,
    AdamW,
    BlockOptimizer,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreSGD,
    GoLoreAdamW,
    Lamb,
    param_groups,
)
from colossal_bcd.booster import (
    CheckpointFolder,
    HybridParallelPlugin,
    LowLevelZeroPlugin,
    LowRankOptions,
    TorchDDPPlugin,
)
from colossal_bcd.booster.cpu_accelerator import install_cpu_accelerator

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Trainer(Protocol):
    """What the training loop needs."""

    rank: int
    model: nn.Module
    optimizer: Any
    """The optimizer that the user made."""

    def step(self, batch: Tensor) -> float:
        """One optimizer step on [sequences, T]; the mean loss of the sequences of this rank."""

    def loss(self, sequences: Tensor) -> Tensor:
        """Mean loss of [sequences, T]."""

    def share(self, batches: Tensor) -> Tensor:
        """The part of [batches, ...] that this rank evaluates."""

    def mean(self, values: list[float]) -> list[float]:
        """Mean over the data-parallel ranks, in float64."""

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank."""

    def save(self, folder: Path) -> None:
        """Write the model in HF format."""

    def checkpoint(self, step: int, extra: dict[str, Any]) -> None:
        """Save everything that a run needs to go on after `step` steps."""

    def resume(self) -> tuple[int, dict[str, Any]]:
        """Go on from the newest checkpoint: the steps taken and what `checkpoint` was given; 0 if there is none."""

    def close(self) -> None:
        """End communication."""


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model from a local directory, or a small Llama with random weights that depend on the seed alone."""
    torch.manual_seed(settings.seed)
    dtype = DTYPES[settings.precision]
    if settings.model is not None:
        model = AutoModelForCausalLM.from_pretrained(settings.model, torch_dtype=dtype, local_files_only=True)
        # Buffers, too: ColossalAI's plugins cast them, and runs without them must not differ.
        return model.to(dtype)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.hidden_size * 5 // 2,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        # Blocks are trained one at a time: with the usual 0.02 the others would pass on next to nothing.
        initializer_range=settings.hidden_size**-0.5,
        max_position_embeddings=max(settings.sequence_length, 512),
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config).to(dtype)


def build_optimizer(settings: Settings, model: nn.Module) -> Optimizer:
    """The same call on one process and under every plugin."""
    if settings.optimizer in LOW_RANK:
        return build_low_rank_optimizer(settings, model)
    make: dict[str, Any] = {
        "adamw": AdamW,
        "lamb": Lamb,
        "adafactor": partial(Adafactor, relative_step=False),
        "came": CAME,
    }
    base: Optimizer = make[settings.base](model.parameters(), lr=settings.lr)
    if settings.optimizer != "badam":
        return base
    return BlockOptimizer(
        base,
        list(model.named_parameters()),
        switch_block_every=settings.switch_every,
        switch_mode=settings.switch_mode,
        include_embedding=settings.embeddings,
        include_lm_head=settings.embeddings and not model.config.tie_word_embeddings,
        seed=settings.seed,
        verbose=0,
    )


def build_low_rank_optimizer(settings: Settings, model: nn.Module) -> Optimizer:
    """All matrices but embedding and head are projected; a side below the rank is the rank."""
    groups = param_groups(model, rank=settings.rank, update_proj_gap=settings.gap, scale=settings.scale, clamp=True)
    make: dict[str, Any] = {
        "galore": GaLoreAdamW,
        "golore": partial(GoLoreAdamW, total_steps=settings.steps),
        "galore-8bit": partial(GaLoreAdamW8bit, weight_decay=0.0),
        "galore-sgd": partial(GaLoreSGD, momentum=0.9),
        "galore-adafactor": partial(GaLoreAdafactor, relative_step=False),
    }
    # Without float32 masters rounding to nearest would lose small updates.
    rounding = "stochastic" if settings.gather_images and settings.precision != "fp32" else "nearest"
    optimizer: Optimizer = make[settings.optimizer](groups, lr=settings.lr, seed=settings.seed, rounding=rounding)
    return optimizer


def build_scheduler(settings: Settings, optimizer: Optimizer) -> LambdaLR:
    """Linear warm-up over 5 % of the steps, then a cosine down to a tenth."""
    warm_up = max(settings.steps // 20, 1)

    def factor(step: int) -> float:
        progress = max(step - warm_up, 0) / max(settings.steps - warm_up, 1)
        return min((step + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * min(progress, 1.0)))

    return LambdaLR(optimizer, factor)


def build_plugin(settings: Settings) -> Any:
    """The plugins take the arguments of ColossalAI's plugins of the same names."""
    if settings.plugin == "ddp":
        return TorchDDPPlugin()
    common: dict[str, Any] = {"precision": settings.precision, "max_norm": settings.clip, "initial_scale": 2.0**16}
    if settings.plugin == "zero":
        common["low_rank"] = LowRankOptions(gather=settings.gather_images)
        return LowLevelZeroPlugin(stage=settings.zero_stage, master_weights=not settings.gather_images, **common)
    return HybridParallelPlugin(tp_size=settings.tp, pp_size=1, zero_stage=settings.zero_stage, **common)


class BoostedTrainer:
    """One rank of a run under a ColossalAI plugin."""

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
        self.settings = settings
        self.rank = dist.get_rank()
        # ColossalAI lays tensor-parallel ranks side by side.
        self._data_rank = self.rank // settings.tp
        model = build_model(settings, tokenizer)
        self.optimizer = build_optimizer(settings, model)
        scheduler = build_scheduler(settings, self.optimizer)
        self._booster = Booster(plugin=build_plugin(settings))
        self._boosted, self._wrapper, _, _, self._scheduler = self._booster.boost(
            model, self.optimizer, lr_scheduler=scheduler
        )
        self.model = self._boosted.unwrap()
        self._checkpoints = CheckpointFolder(settings.output / "checkpoints", keep_last=2)
        self._stale = not settings.resume

    def step(self, batch: Tensor) -> float:
        settings = self.settings
        parts = batch.view(settings.accumulate, settings.data_ranks, settings.micro_batch, -1)
        total = 0.0
        for part in parts[:, self._data_rank]:
            loss = self.loss(part) / settings.accumulate
            self._booster.backward(loss, self._wrapper)
            total += loss.item()
        self._wrapper.step()
        self._wrapper.zero_grad()
        self._scheduler.step()
        return total

    def loss(self, sequences: Tensor) -> Tensor:
        sequences = sequences.to(get_current_device())
        return self._boosted(input_ids=sequences, labels=sequences).loss

    def share(self, batches: Tensor) -> Tensor:
        return batches[self._data_rank :: self.settings.data_ranks]

    def mean(self, values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=get_current_device())
        dist.all_reduce(total)
        return (total / dist.get_world_size()).tolist()

    def gather(self, value: Any) -> list[Any]:
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    def save(self, folder: Path) -> None:
        self._booster.save_model(self._boosted, str(folder), shard=True, use_safetensors=True)

    def checkpoint(self, step: int, extra: dict[str, Any]) -> None:
        if self._stale and self.rank == 0:
            # Those of an earlier run, which this one replaces like its other results.
            shutil.rmtree(self._checkpoints.path, ignore_errors=True)
        self._stale = False
        dist.barrier()
        extra = {"run": self.settings.run, **extra}
        self._checkpoints.save(self._booster, self._boosted, self._wrapper, self._scheduler, step=step, extra=extra)

    def resume(self) -> tuple[int, dict[str, Any]]:
        saved = self._checkpoints.peek()
        if saved is None:
            return 0, {}
        ours, theirs = self.settings.run, saved.extra["run"]
        different = [
            f"--{name.replace('_', '-')} {theirs.get(name)}" for name in ours if theirs.get(name) != ours[name]
        ]
        if different:
            raise SettingsError(
                f"--resume: the checkpoint is of a run with {', '.join(different)}. Give the same flags."
            )
        self._checkpoints.load(self._booster, self._boosted, self._wrapper, self._scheduler, step=saved.step)
        return saved.step, saved.extra

    def close(self) -> None:
        dist.barrier()
        dist.destroy_process_group()


class ReferenceTrainer:
    """One process that runs every rank's micro-batch one after the other, divides the gradients, and adds them."""

    rank = 0

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
        self.settings = settings
        self.model = build_model(settings, tokenizer).to(get_current_device())
        self.optimizer = build_optimizer(settings, self.model)
        if not isinstance(self.optimizer, BlockOptimizer) and settings.precision != "fp32":
            # One block that holds everything and never ends: float32 masters, as the plugins make them.
            self.optimizer = BlockOptimizer(
                self.optimizer,
                list(self.model.named_parameters()),
                [[name for name, _ in self.model.named_parameters()]],
                switch_block_every=settings.steps + 1,
                switch_mode="fixed",
                verbose=0,
            )
        self._scheduler = build_scheduler(settings, self.optimizer)

    def step(self, batch: Tensor) -> float:
        settings = self.settings
        losses = [0.0] * settings.data_ranks
        trained = [param for param in self.model.parameters() if param.requires_grad]
        sums: list[Tensor | None] = [None] * len(trained)
        for parts in batch.view(settings.accumulate, settings.data_ranks, settings.micro_batch, -1):
            averages = self._averages(parts, trained, losses)
            sums = [a if s is None else s if a is None else s + a for s, a in zip(sums, averages, strict=True)]
        for param, grad in zip(trained, sums, strict=True):
            param.grad = grad
        if settings.clip:
            nn.utils.clip_grad_norm_(trained, settings.clip)
        del sums, averages
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._scheduler.step()
        return sum(losses) / settings.data_ranks

    def _averages(self, parts: Tensor, trained: list[nn.Parameter], losses: list[float]) -> list[Tensor | None]:
        """Mean gradients over the ranks of [ranks, sequences, T]; each rank's loss is added to its entry."""
        averages: list[Tensor | None] = [None] * len(trained)
        for rank, part in enumerate(parts):
            loss = self.loss(part) / self.settings.accumulate
            loss.backward()
            losses[rank] += loss.item()
            for index, param in enumerate(trained):
                if param.grad is not None:
                    share = param.grad.div_(self.settings.data_ranks)
                    before = averages[index]
                    averages[index] = share if before is None else before.add_(share)
                    param.grad = None
        return averages

    def loss(self, sequences: Tensor) -> Tensor:
        sequences = sequences.to(get_current_device())
        return self.model(input_ids=sequences, labels=sequences).loss

    def share(self, batches: Tensor) -> Tensor:
        return batches

    def mean(self, values: list[float]) -> list[float]:
        return values

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def checkpoint(self, step: int, extra: dict[str, Any]) -> None:
        """Nothing: it is run for its losses."""

    def resume(self) -> tuple[int, dict[str, Any]]:
        return 0, {}

    def close(self) -> None:
        pass


def make_trainer(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Trainer:
    """Build model, optimizer and plugin."""
    return (ReferenceTrainer if settings.reference else BoostedTrainer)(settings, tokenizer)


def launch(settings: Settings) -> int:
    """Join the process group unless this is the reference; the rank of this process."""
    install_cpu_accelerator()
    if get_current_device().type == "cpu":
        torch.set_num_threads(1)
    if settings.reference:
        return 0
    if not dist.is_initialized():
        colossalai.launch_from_torch(seed=settings.seed, verbose=False)
    return dist.get_rank()
