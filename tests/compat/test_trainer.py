"""Block coordinate descent in Hugging Face's Trainer on one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from seed_code import CALLBACK, renamed
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from colossal_bcd import AdamW, BlockOptimizer, BlockOptimizerRatio
from colossal_bcd.compat import BAdamCallback

STEPS, PERIOD, ACCUMULATION = 8, 3, 2


def dataset() -> list[dict[str, torch.Tensor]]:
    rows = [models.tokens(index, batch=1)[0] for index in range(2 * STEPS * ACCUMULATION)]
    return [{"input_ids": row, "labels": row} for row in rows]


UNSAFE = {"save_safetensors": False} if hasattr(TrainingArguments, "save_safetensors") else {}
"""transformers 5 writes safetensors only."""


def block_optimizer(model: Any, **options: Any) -> BlockOptimizer:
    base = AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    return BlockOptimizer(
        base, model.named_parameters(), switch_block_every=PERIOD, switch_mode="random", seed=1, verbose=0, **options
    )


def trainer_of(model: Any, optimizer: Any, folder: Path, callbacks: Any = (BAdamCallback,), **options: Any) -> Trainer:
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2, "use_cpu": True,
            "gradient_accumulation_steps": ACCUMULATION, "save_steps": 4, "logging_steps": 1, "report_to": [],
            "lr_scheduler_type": "linear", "warmup_steps": 2, "max_grad_norm": 0.5, "disable_tqdm": True,
            **UNSAFE, **options,
        }
    )  # fmt: skip
    return Trainer(
        model=model, args=arguments, train_dataset=dataset(), optimizers=(optimizer, None), callbacks=list(callbacks)
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Order(TrainerCallback):
    """The token ids of every batch, as the trainer gave them."""

    def __init__(self, model: nn.Module) -> None:
        self.batches: list[torch.Tensor] = []
        model.register_forward_pre_hook(
            lambda _, args, kwargs: self.batches.append(kwargs["input_ids"]), with_kwargs=True
        )


def test_trainer_equals_a_plain_loop(tmp_path: Path) -> None:
    """Gradient accumulation, clipping and a schedule included; two switches."""
    model: Any = models.llama()
    order = Order(model)
    trainer_of(model, block_optimizer(model), tmp_path, callbacks=(BAdamCallback, order)).train()
    plain: Any = models.llama()
    optimizer = block_optimizer(plain)
    factors = [min(step / 2, (STEPS - step) / (STEPS - 2)) for step in range(STEPS)]
    assert len(order.batches) == STEPS * ACCUMULATION
    for step in range(STEPS):
        for micro in range(ACCUMULATION):
            batch = order.batches[step * ACCUMULATION + micro]
            (plain(input_ids=batch, labels=batch).loss / ACCUMULATION).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * factors[step]
        optimizer.step()
        plain.zero_grad()
    for (name, got), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        # The trainer divides sums by the number of tokens: another order of the same float32 operations, of which Adam
        # makes up to 1e-4 where a gradient is close to zero.
        torch.testing.assert_close(got.detach(), want.detach(), rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainer_resumes_bit_for_bit_in_the_middle_of_a_block(dtype: torch.dtype, tmp_path: Path) -> None:
    model: Any = models.llama().to(dtype)
    trainer = trainer_of(model, block_optimizer(model), tmp_path)
    trainer.train()
    again: Any = models.llama(seed=9).to(dtype)
    optimizer = block_optimizer(again)
    resumed = trainer_of(again, optimizer, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert optimizer.num_steps == STEPS
    assert losses(resumed)[4:] == losses(trainer)[4:]
    for (name, got), want in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(got, want[1]), name


def test_trainer_resumes_the_ratio_form_bit_for_bit(tmp_path: Path) -> None:
    def made(seed: int) -> tuple[Any, Trainer]:
        model: Any = models.llama(seed=seed)
        optimizer = BlockOptimizerRatio(
            [{"params": list(model.parameters())}], list(model.named_parameters()), 0.3, switch_every=PERIOD, lr=1e-2,
            mask_mode="scatter", dense_gradients=True, verbose=0,
        )  # fmt: skip
        return model, trainer_of(model, optimizer, tmp_path)

    model, trainer = made(0)
    trainer.train()
    again, resumed = made(9)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for (name, got), want in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(got, want), name


def test_trainer_with_gradient_checkpointing_trains_the_same(tmp_path: Path) -> None:
    """The kind that Trainer chooses cuts the graph above frozen layers; the callback changes it."""
    results = []
    for options in ({}, {"gradient_checkpointing": True}):
        model: Any = models.llama()
        trainer = trainer_of(model, block_optimizer(model), tmp_path, save_strategy="no", **options)
        trainer.train()
        results.append([param.detach() for param in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_trainer_callback_lets_embeddings_output_be(tmp_path: Path) -> None:
    model: Any = models.llama()
    model.enable_input_require_grads()
    before = model.get_input_embeddings()._forward_hooks
    assert before
    trainer_of(model, block_optimizer(model), tmp_path, save_strategy="no", max_steps=1).train()
    assert not model.get_input_embeddings()._forward_hooks


class Callbacks(list[Any]):
    """The document writes `append` where it means a list with one more element."""

    def append(self, item: Any) -> Callbacks:  # type: ignore[override]
        return Callbacks([*self, item])


def test_callback_code_runs(tmp_path: Path) -> None:
    model: Any = models.llama()
    optimizer = block_optimizer(model)

    def your_trainer_class(_: Any, callbacks: Any) -> Trainer:
        return trainer_of(model, optimizer, tmp_path, callbacks=callbacks, save_strategy="no")

    names: dict[str, Any] = {"original_callbacks": Callbacks(), "YourTrainerClass": your_trainer_class}
    exec(renamed(CALLBACK), names)
    trainer = names["trainer"]
    assert any(type(callback) is BAdamCallback for callback in trainer.callback_handler.callbacks)
    trainer.train()
    assert optimizer.num_steps == STEPS
    assert BAdamCallback(init_loss_scale=10).init_loss_scale == 10


def test_callback_refuses_what_would_train_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = models.llama()
    with pytest.raises(ValueError, match=r"is a AdamW, expected a BlockOptimizer"):
        trainer_of(model, torch.optim.AdamW(model.parameters()), tmp_path, save_strategy="no").train()
    ratio = BlockOptimizerRatio([{"params": list(model.parameters())}], list(model.named_parameters()), verbose=0)
    with pytest.raises(ValueError, match=r"max_grad_norm=0.5.*dense_gradients=True"):
        trainer_of(model, ratio, tmp_path, save_strategy="no").train()
    blocks = block_optimizer(model)
    trainer = trainer_of(model, blocks, tmp_path, save_strategy="no")
    monkeypatch.setattr(trainer.args, "fp16", True)
    callback = BAdamCallback()
    with pytest.raises(ValueError, match="fp16=True"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model, optimizer=blocks)
    monkeypatch.setattr("colossal_bcd.compat.trainer.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="DeepSpeed"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model, optimizer=blocks)


def test_compat_imports_transformers_for_the_callback_alone() -> None:
    code = (
        "import sys; from colossal_bcd import compat; assert 'transformers' not in sys.modules; "
        "compat.BAdamCallback; assert 'transformers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
