"""Block coordinate descent in Hugging Face's Trainer on one process."""

from __future__ import annotations

import functools
import sys
import types
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from seed_code import CALLBACK, renamed
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from colossal_bcd import CAME, AdamW, BlockOptimizer, BlockOptimizerRatio, GaLoreAdamW, Lamb, compat, param_groups
from colossal_bcd.compat import BAdamCallback

STEPS, PERIOD, ACCUMULATION = 8, 3, 2


def dataset() -> list[dict[str, torch.Tensor]]:
    rows = [models.tokens(index, batch=1)[0] for index in range(2 * STEPS * ACCUMULATION)]
    return [{"input_ids": row, "labels": row} for row in rows]


UNSAFE = {"save_safetensors": False} if hasattr(TrainingArguments, "save_safetensors") else {}
"""transformers 5 writes safetensors only."""


BLOCKS: dict[str, Any] = {"switch_block_every": PERIOD, "switch_mode": "random", "seed": 1, "verbose": 0}
decaying = functools.partial(AdamW, weight_decay=0.1)


def block_optimizer(model: Any, **options: Any) -> BlockOptimizer:
    return BlockOptimizer(decaying(model.parameters(), lr=1e-2), model.named_parameters(), **BLOCKS, **options)


def trainer_of(model: Any, optimizer: Any, folder: Path, callbacks: Any = (BAdamCallback,), **options: Any) -> Trainer:
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2, "use_cpu": True,
            "gradient_accumulation_steps": ACCUMULATION, "save_steps": 4, "logging_steps": 1, "report_to": [],
            "lr_scheduler_type": "linear", "warmup_steps": 2, "max_grad_norm": 0.5, "disable_tqdm": True,
            **UNSAFE, **options,
        }
    )  # fmt: skip
    how: Any = {"optimizer_cls_and_kwargs" if isinstance(optimizer, tuple) else "optimizers": optimizer}
    if "optimizers" in how:
        how["optimizers"] = (optimizer, None)
    return Trainer(model=model, args=arguments, train_dataset=dataset(), callbacks=list(callbacks), **how)


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


def weights_by(how: Any, folder: Path, callbacks: Any) -> list[torch.Tensor]:
    """Weights after training with `how(model)`, an optimizer or a class and its arguments."""
    model: Any = models.llama()
    trainer_of(model, how(model), folder, callbacks=callbacks, save_strategy="no").train()
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("name", ["came", "lamb", "galore", "blocks", "decaying blocks"])
def test_optimizer_cls_and_kwargs_train_as_the_optimizer_itself(name: str, tmp_path: Path) -> None:
    """A class in both versions of transformers; a function that makes blocks, which version 5 calls twice."""

    def galore(model: Any) -> dict[str, Any]:
        return {"params": param_groups(model, rank=4, update_proj_gap=3), "lr": 1e-2}

    def decay(model: Any) -> list[dict[str, Any]]:
        params = list(model.parameters())
        vectors = [param for param in params if param.dim() < 2]
        return [{"params": [p for p in params if p.dim() > 1]}, {"params": vectors, "weight_decay": 0.0}]

    def decaying_blocks(model: Any) -> BlockOptimizer:
        base = Lamb(decay(model), lr=1e-2, weight_decay=0.2)
        return BlockOptimizer(base, model.named_parameters(), **BLOCKS)

    pairs: dict[str, tuple[Any, Any]] = {
        "came": (lambda model: (CAME, {"lr": 1e-3}), lambda model: CAME(model.parameters(), lr=1e-3)),
        "lamb": (lambda model: (Lamb, {"lr": 1e-3}), lambda model: Lamb(model.parameters(), lr=1e-3)),
        "galore": (
            lambda model: (GaLoreAdamW, galore(model)),
            lambda model: GaLoreAdamW(galore(model)["params"], lr=1e-2),
        ),
        "blocks": (
            lambda model: (compat.block_optimizer, {"model": model, "base": decaying, "lr": 1e-2, "blocks": BLOCKS}),
            block_optimizer,
        ),
        "decaying blocks": (
            lambda model: (
                compat.block_optimizer,
                {"model": model, "base": Lamb, "lr": 1e-2, "weight_decay": 0.2, "blocks": BLOCKS},
            ),
            decaying_blocks,
        ),
    }
    callbacks = (BAdamCallback,) if "blocks" in name else ()
    by_class, by_hand = (weights_by(how, tmp_path, callbacks) for how in pairs[name])
    start: Any = models.llama()
    # CAME and LAMB get the trainer's groups, of which they keep the order.
    assert all(torch.equal(one, other) for one, other in zip(by_class, by_hand, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(by_class, start.parameters(), strict=True))


def test_block_optimizer_without_a_model(tmp_path: Path) -> None:
    """transformers 5 gives it; before, groups without names come, of which no blocks can be made."""

    def how(model: Any) -> Any:
        return compat.block_optimizer, {"base": decaying, "lr": 1e-2, "blocks": BLOCKS}

    if int(transformers.__version__.split(".")[0]) >= 5:
        by_class, by_hand = (weights_by(each, tmp_path, (BAdamCallback,)) for each in (how, block_optimizer))
        assert all(torch.equal(one, other) for one, other in zip(by_class, by_hand, strict=True))
    else:
        with pytest.raises(ValueError, match=r'got a list, expected a model.*Put "model": model'):
            weights_by(how, tmp_path, (BAdamCallback,))


def blocks_of_page(heading: str) -> str:
    """Code of a section of docs/trainer.md."""
    text = (Path(__file__).parents[2] / "docs" / "trainer.md").read_text()
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return section.partition("```python\n")[2].partition("```")[0]


def test_code_by_class_and_arguments_runs(tmp_path: Path) -> None:
    model: Any = models.llama()
    made: list[Trainer] = []

    def trainer(model: Any, args: Any, **options: Any) -> None:
        made.append(Trainer(model, args, **options))
        made[-1].train()

    args = trainer_of(model, None, tmp_path, callbacks=(), save_strategy="no").args
    exec(
        blocks_of_page("By class and arguments"), {"Trainer": trainer, "model": model, "args": args, "data": dataset()}
    )
    kinds = [type(getattr(each.optimizer, "optimizer", each.optimizer)) for each in made]
    assert kinds == [CAME, GaLoreAdamW, BlockOptimizer]


def test_axolotl_plugin_gives_the_trainer_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base: Any = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = object
    monkeypatch.setitem(sys.modules, "axolotl", types.ModuleType("axolotl"))
    monkeypatch.setitem(sys.modules, "axolotl.integrations", types.ModuleType("axolotl.integrations"))
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
    names: dict[str, Any] = {}
    exec(blocks_of_page("axolotl"), names)
    model: Any = models.llama()
    trainer = trainer_of(model, None, tmp_path, callbacks=(), save_strategy="no")
    for callback in names["BlockPlugin"]().add_callbacks_post_trainer(
        types.SimpleNamespace(learning_rate=1e-2), trainer
    ):
        trainer.add_callback(callback)
    trainer.train()
    found = compat.accelerated.blocks_of(trainer.optimizer)  # type: ignore[attr-defined]
    assert isinstance(found, BlockOptimizer)
    assert found.num_steps == STEPS


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
