"""The code of the documentation's pages, each with what its reader has: a model, data, ranks.

A case is a generator: what stands before a `yield` is there when the page's next block runs, what follows looks at what
the block has done.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import colossalai
import models
import torch
import transformers
from colossalai.booster import Booster
from torch import nn

import colossal_bcd
from colossal_bcd.booster import LowLevelZeroPlugin

DOCS = Path(__file__).parents[2] / "docs"
Names = dict[str, Any]
Case = Callable[[Names], Iterator[None]]
CASES: dict[str, tuple[int, Case]] = {}
"""Page -> on how many ranks its code runs, 0 without a process group, and the case."""


def case(*pages: str, ranks: int = 0) -> Callable[[Case], Case]:
    def add(function: Case) -> Case:
        CASES.update(dict.fromkeys(pages, (ranks, function)))
        return function

    return add


def blocks(page: str, language: str = "python") -> list[tuple[int, str]]:
    """Line and text of every fence of a language on a page."""
    text = (DOCS / page).read_text()
    found = re.finditer(r"^```([a-z]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: match.start(2)].count("\n"), match[2]) for match in found if match[1] == language]


def run_page(page: str, folder: str) -> None:
    """Run the code of a page in a folder, one block after the other in the same namespace.

    A line of three dots is what the case calls `between`, if it does.
    """
    os.chdir(folder)
    names: Names = {"__name__": "page"}
    running = CASES[page][1](names)
    for line, block in blocks(page):
        next(running)
        if "between" in names:
            block = block.replace("\n...\n", "\nbetween()\n")
        exec(compile("\n" * line + block, page, "exec"), names)
    assert next(running, "finished") == "finished", f"{page} has fewer blocks than its case"


def batch(index: int = 0) -> dict[str, Any]:
    tokens = models.tokens(index)
    return {"input_ids": tokens, "labels": tokens}


def trained(model: nn.Module, optimizer: Any, steps: int = 2) -> set[str]:
    """Names of the weights that some steps have moved."""
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for step in range(steps):
        loss = model(**batch(step)).loss
        assert math.isfinite(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.isfinite(param).all() for param in model.parameters())
    return {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}


def all_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def boosted(model: nn.Module, optimizer: Any, **options: Any) -> tuple[Any, Any, Any]:
    booster = Booster(plugin=LowLevelZeroPlugin(**{"stage": 1, "precision": "bf16", **options}))
    model, optimizer, *_ = booster.boost(model.bfloat16(), optimizer)
    return booster, model, optimizer


@case("adamw.md", "sgd.md", "lion.md", "lamb.md", "adafactor.md", "came.md")
def one_optimizer(names: Names) -> Iterator[None]:
    names["model"] = model = models.llama()
    yield
    assert trained(model, names["optimizer"]) == all_names(model)


@case("badam.md")
def badam(names: Names) -> Iterator[None]:
    names["model"] = model = models.llama(layers=4)
    yield
    assert trained(model, names["optimizer"]) == set(names["optimizer"].active_names())


@case("bread.md")
def bread(names: Names) -> Iterator[None]:
    names["model"] = model = models.llama(layers=3)
    yield
    assert trained(model, names["optimizer"]) == all_names(model)
    yield
    model = models.llama(layers=3)
    optimizer = colossal_bcd.BlockOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        model.named_parameters(),
        sgd_mode="all",
        correction=names["correction"],
    )
    assert trained(model, optimizer) == all_names(model)


@case("getting_started.md", ranks=2)
def getting_started(names: Names) -> Iterator[None]:
    colossalai.launch_from_torch = lambda: None  # the ranks are there
    names.update(model=models.llama(layers=3).bfloat16(), batches=[batch(index) for index in range(2)])
    yield
    assert math.isfinite(names["loss"].item())


@case("checkpoints.md", ranks=1)
def checkpoints(names: Names) -> Iterator[None]:
    model = models.llama()
    booster, model, optimizer = boosted(model, colossal_bcd.AdamW(model.parameters()))
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    names.update(booster=booster, model=model, optimizer=optimizer, lr_scheduler=schedule, num_steps=1000, position=7)
    yield
    assert names["checkpoints"].steps() == [500, 1000]
    assert names["checkpoints"].load(booster, model, optimizer, schedule).extra == {"position": 7}


@case("drop_in.md", ranks=1)
def drop_in(names: Names) -> Iterator[None]:
    yield
    model = models.llama()
    _, model, optimizer = boosted(model, colossal_bcd.AdamW(model.parameters()))
    masters = optimizer.get_working_to_master_map()
    average = {name: torch.zeros_like(masters[id(param)]) for name, param in model.unwrap().named_parameters()}
    names.update(model=model, optimizer=optimizer, average=average, decay=0.9)
    yield
    assert any(value.any() for value in average.values())


@case("engine.md", ranks=1)
def engine(names: Names) -> Iterator[None]:
    model: Any = models.llama()
    model.lm_head.requires_grad_(False)
    model.model.layers[1].requires_grad_(False)
    trainable = [param for name, param in model.named_parameters() if "layers.1." not in name]
    booster, model, optimizer = boosted(model, colossal_bcd.AdamW(trainable, lr=1e-2))
    names.update(model=model, optimizer=optimizer)
    yield
    model.unwrap().model.layers[1].requires_grad_(True)
    before = [model.unwrap().lm_head.weight.clone(), model.unwrap().model.layers[1].mlp.up_proj.weight.clone()]
    for step in range(2):
        booster.backward(model(**batch(step)).loss, optimizer)
        optimizer.step()
    after = [model.unwrap().lm_head.weight, model.unwrap().model.layers[1].mlp.up_proj.weight]
    assert not any(map(torch.equal, before, after))
    names.update(torch=torch, LlamaForCausalLM=transformers.LlamaForCausalLM, config=model.unwrap().config)
    yield
    yield
    assert names["plugin"].low_rank.clip_by_image


@case("fsdp.md", ranks=2)
def fsdp(names: Names) -> Iterator[None]:
    def whole() -> Any:
        return models.llama(layers=3)

    whole_model = whole()
    names["model"] = whole_model.model
    yield
    names["model"](input_ids=models.tokens(0)).last_hidden_state.float().square().mean().backward()
    plain, names["optimizer"] = names["model"], names["optimizer"]
    names["optimizer"].step()
    plain_optimizer = names["optimizer"]
    names.update(model=whole(), data=[batch(index) for index in range(2)])
    yield
    blocks_model, blocks_engine = names["model"], names["engine"]
    names["model"] = whole()
    yield
    names.update(model=plain, optimizer=plain_optimizer)
    yield
    names.update(model=blocks_model, engine=blocks_engine)
    yield


@case("relora.md", ranks=1)
def relora(names: Names) -> Iterator[None]:
    # Its layers are narrower than the page's rank.
    options = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    wide = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=256, **options))
    names.update(model=wide, batches=[batch(index) for index in range(3)])
    yield
    assert names["model"].num_refreshes.item() == 1
    wide = transformers.LlamaForCausalLM(wide.config)
    names.update(model=wide.bfloat16(), use_rand=False)
    names["booster"] = booster = Booster(plugin=LowLevelZeroPlugin(stage=1, precision="bf16"))

    def between() -> None:
        names["relora"]._config.forward_type = True
        booster.backward(names["model"](**batch()).loss, names["optimizer"])

    names["between"] = between
    yield
    assert names["relora"].num_refreshes.item() == 1


@case("migration.md", ranks=1)
def migration(names: Names) -> Iterator[None]:
    names["model"] = model = models.llama(layers=3)
    yield
    assert trained(model, names["optimizer"]) == set(names["optimizer"].active_names())
    model = models.llama()
    matrices = [param for name, param in model.named_parameters() if "proj" in name]
    names.update(matrices=matrices, others=[param for name, param in model.named_parameters() if "proj" not in name])
    yield
    assert trained(model, names["optimizer"]) == all_names(model)
    for _ in range(3):
        names["model"] = model = models.llama()
        yield
        assert trained(model, names["optimizer"]) == all_names(model)


@case("numerics.md")
def numerics(names: Names) -> Iterator[None]:
    yield
    yield
