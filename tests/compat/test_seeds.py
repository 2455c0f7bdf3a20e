"""Code of the documents whose systems this package replaces, run as it stands with only the import changed.

Document 004 is in test_seeds_golore.py, the parameter-ratio form of 001 and 002 in test_seeds_ratio.py, the callback of
002 in test_trainer.py.
"""

from __future__ import annotations

import logging
import os
import socket
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
import transformers
from colossalai.booster import Booster
from on_ranks import equal_on_ranks, heard
from seed_code import (
    BADAM_ASCENDING,
    BADAM_MATRICES,
    BADAM_MATRICES_RANDOM,
    BADAM_MODULES,
    BADAM_RANDOM,
    BREAD_BADAM,
    BREAD_LORA,
    BREAD_PEFT,
    BREAD_SGD,
    GALORE,
    TUTORIAL,
    ZERO3,
    renamed,
)
from torch import nn

from colossal_bcd import BlockOptimizer, compat
from colossal_bcd.booster import LowLevelZeroPlugin
from colossal_bcd.testing import run_ranks

CASES = {
    "bread-badam": (BREAD_BADAM, 3, 3, 100, "random"),
    "badam-ascending": (BADAM_ASCENDING, 3, 3, 50, "ascending"),
    "badam-matrices": (BADAM_MATRICES, 32, 31 * 7, 50, "ascending"),
    "badam-random": (BADAM_RANDOM, 3, 3, 100, "random"),
    "badam-modules": (BADAM_MODULES, 32, 32 * 2, 100, "random"),
    "badam-matrices-random": (BADAM_MATRICES_RANDOM, 32, 32 * 7, 100, "random"),
}
"""Code, layers of the model, and the number of blocks, the period and the order that the code asks for."""


def wrapped(code: str, model: Any) -> BlockOptimizer:
    """Run the code on a model; blocks without an import line use that of the block before them."""
    # Two documents write `model.named_parameters_list` where they mean `model.named_parameters()`.
    model.named_parameters_list = list(model.named_parameters())
    names: dict[str, Any] = {"model": model, "original_optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2)}
    names["BlockOptimizer"] = compat.BlockOptimizer
    exec(renamed(code), names)
    return names["optimizer"]


def changed(before: dict[str, torch.Tensor], module: nn.Module) -> set[str]:
    return {name for name, param in module.named_parameters() if not torch.equal(param.detach(), before[name])}


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in module.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_badam_code_trains_the_block_that_it_says(case: str, caplog: pytest.LogCaptureFixture) -> None:
    code, num_layers, num_blocks, period, mode = CASES[case]
    model = models.llama(layers=num_layers)
    with caplog.at_level(logging.INFO):
        optimizer = wrapped(code, model)
    assert (len(optimizer.blocks), optimizer.schedule.period, optimizer.schedule.mode) == (num_blocks, period, mode)
    first = set(optimizer.active_names())
    assert (f"trainable: {', '.join(optimizer.active_names())}" in caplog.messages) == ("verbose=2" in code)
    before = weights(model)
    model(input_ids=models.tokens(0), labels=models.tokens(0)).loss.backward()
    for _ in range(period):
        assert set(optimizer.active_names()) == first
        optimizer.step()
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.full_like(param, 0.1)
    assert changed(before, model) == first
    second = set(optimizer.active_names())
    assert not second & first
    if mode == "ascending":
        assert [first, second] == [set(block.parameters) for block in optimizer.blocks[:2]]


def boosted_badam(case: str) -> dict[str, Any]:
    from colossalai.booster import Booster

    from colossal_bcd.booster import LowLevelZeroPlugin

    code, num_layers, *_ = CASES[case]
    model: Any = models.llama(layers=num_layers).bfloat16()
    optimizer: Any = wrapped(code, model)
    before = weights(model)
    booster = Booster(plugin=LowLevelZeroPlugin(stage=2, precision="bf16"))
    model, optimizer, *_ = booster.boost(model, optimizer)
    losses = []
    for step in range(2):
        batch = models.tokens(2 * step + dist.get_rank())
        loss = model(input_ids=batch, labels=batch).loss
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {
        "active": set(optimizer.optim.active_names()),
        "changed": changed(before, model.unwrap()),
        "equal": equal_on_ranks(model.parameters()),
        "finite": all(map(torch.isfinite, map(torch.tensor, losses))),
    }


@pytest.mark.parametrize("case", CASES)
def test_badam_code_runs_under_zero(case: str) -> None:
    for result in run_ranks(2, boosted_badam, case):
        assert result["equal"]
        assert result["finite"]
        assert result["changed"] == result["active"]


TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 250,
    "max_position_embeddings": 128,
}


def tutorial(optimizer: str, port: int) -> dict[str, Any]:
    """The tutorial with this package's optimizer and plugin; its model of 7 billion parameters becomes a tiny one."""
    code = renamed(TUTORIAL).replace("DistributedAdaFactor", optimizer)
    code = code.replace("colossalai.booster.plugin", "colossal_bcd.booster")
    code = code.replace("LlamaConfig()", f"LlamaConfig(**{TINY})")
    if not torch.cuda.is_available():
        code = code.replace(".cuda()", "").replace('"cuda"', '"cpu"')
    # The tutorial makes the process group itself.  No rank may leave this one before all have joined it.
    dist.barrier()
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    names: dict[str, Any] = {}
    with heard(logging.WARNING) as messages:
        exec(code, names)
    torch.manual_seed(1024)  # what launch_from_torch() does
    untrained = transformers.LlamaModel(names["configuration"])
    with torch.no_grad():
        start = untrained(torch.ones(1, 100, dtype=torch.int)).last_hidden_state.mean()
    engine = names["dist_optim"]
    return {
        "class": type(engine.optim).__name__,
        "steps": {state["step"] for state in engine.optim.state.values()},
        "precision": names["plugin"].precision,
        "kernels": names["plugin"].shard_config.enable_flash_attention,
        "warnings": messages,
        "loss": names["loss"].item(),
        "start": start.item(),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="run_ranks gives the ranks gloo; on a device use torchrun")
@pytest.mark.parametrize("optimizer", ["DistributedAdaFactor", "DistributedLamb"])
def test_tutorial_of_distributed_optimizers_runs(optimizer: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for result in run_ranks(4, tutorial, optimizer, port):
        assert result["class"] == optimizer
        # The loss scaler may skip the first steps.
        assert len(result["steps"]) == 1
        assert max(result["steps"]) >= 5
        assert result["precision"] == "fp16"
        assert not result["kernels"]
        assert len(result["warnings"]) == 1
        assert "enable_all_optimization" in result["warnings"][0]
        assert "switched off" in result["warnings"][0]
        # The criterion is the mean of the hidden state, which ten steps lower.
        assert result["loss"] < result["start"] - 1e-3


def test_bread_sgd_code_corrects_what_it_says() -> None:
    model = models.llama(layers=3)
    optimizer = wrapped(BREAD_SGD, model)
    before = weights(model)
    model(input_ids=models.tokens(0), labels=models.tokens(0)).loss.backward()
    for name in optimizer.corrected_names():
        assert not torch.equal(model.get_parameter(name).detach(), before[name])
    assert changed(before, model) == set(before) - set(optimizer.active_names()), "the block waits for the step"
    optimizer.step()
    assert changed(before, model) == set(before)


def galore_of_the_tutorial() -> dict[str, Any]:
    """The block with our names, and training under ZeRO stage 2, whose support the document says is underway."""
    model = models.llama(vocab=1024)
    names: dict[str, Any] = {"model": model, "lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    exec(renamed(GALORE), names)
    optimizer = names["optim"]
    booster = Booster(plugin=LowLevelZeroPlugin(stage=2, precision="bf16"))
    model, engine, *_ = booster.boost(model, optimizer)
    losses = []
    for _ in range(8):
        loss = models.loss(model, models.tokens(0))
        booster.backward(loss, engine)
        engine.step()
        engine.zero_grad()
        losses.append(loss.item())
    dtypes = {entry.dtype for state in engine.optim.state.values() for name, entry in state.items()
              if name.startswith("exp_avg")}  # fmt: skip
    return {"class": type(engine.optim).__name__, "losses": losses, "dtypes": dtypes}


def test_tutorials_galore_block_runs_and_trains_under_zero() -> None:
    for result in run_ranks(2, galore_of_the_tutorial):
        assert result["class"] == "DistGaloreAwamW"
        assert result["losses"][-1] < result["losses"][0] - 0.5
        # Large images in 8 bits with scales of 32, small ones in 32.
        assert result["dtypes"] == {torch.uint8, torch.float32}


def test_bread_lora_code_trains_adapters_everywhere() -> None:
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=64, decoder_start_token_id=0
    )
    names: dict[str, Any] = {"original_model": transformers.T5ForConditionalGeneration(config)}
    exec(BREAD_PEFT, names)
    model = names["model"]
    optimizer = wrapped(BREAD_LORA, model)
    before = weights(model)
    tokens = models.tokens(0, vocab=64)
    for _ in range(2):  # at first the gradient of one factor is zero, as the other one is
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    adapters = {name for name in before if ".lora_" in name}
    base = {name for block in optimizer.active_blocks() for name in block.parameters}
    assert adapters
    assert changed(before, model) == adapters | base


class DeepSpeed:
    """As much of DeepSpeed as document 002 calls."""

    def __init__(self) -> None:
        self.calls = 0

    def initialize(self, model: Any, optimizer: Any, config: Any) -> tuple[Any, Any]:
        self.calls += 1
        return model, SimpleNamespace(optimizer=optimizer)


@pytest.mark.parametrize(("argument", "calls"), [("ds_zero3_enabled", 0), ("ds_optimizer", 1)])
def test_zero3_code_says_what_to_use_instead(argument: str, calls: int) -> None:
    """Whether it asks for ZeRO-3 by the argument or, as later releases let it, by the reference alone."""
    code = ZERO3 if argument == "ds_zero3_enabled" else ZERO3.replace("ds_zero3_enabled=True #", "#")
    model = models.llama()
    before, deepspeed = weights(model), DeepSpeed()
    names: dict[str, Any] = {"model": model, "original_optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2)}
    with pytest.raises(
        ValueError,
        match=rf"^{argument}: got .*, expected None.*DeepSpeed.*not supported.*colossal_bcd\.booster.*"
        r"FSDP2Plugin\(\) shards weights.*ZeRO-3.*LowLevelZeroPlugin\(stage=2\).*HybridParallelPlugin\(tp_size=",
    ):
        exec(renamed(code), {**names, "deepspeed": deepspeed, "ds_config": {"zero_optimization": {"stage": 3}}})
    assert deepspeed.calls == calls
    assert not changed(before, model)


def test_zero3_arguments_that_ask_for_nothing_are_taken() -> None:
    """As trainers pass them: the flag always, and the reference where there is one."""
    code = ZERO3.replace("=True #", "=False #").replace("deepspeed.initialize(", "(lambda **_: (model, None))(")
    model = models.llama()
    names: dict[str, Any] = {"model": model, "original_optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2)}
    exec(renamed(code), {**names, "ds_config": None})
