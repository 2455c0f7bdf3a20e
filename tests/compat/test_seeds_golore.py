"""Usage of document 004 (README of GoLore), run as it stands with only the import changed."""

from __future__ import annotations

import logging
import textwrap
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from seed_code import FORWARD_TYPE, REFRESH, WRAP, renamed

from colossal_bcd import AdamW
from colossal_bcd.compat import ReLoRaLinear, ReLoRaModel

# What the document leaves to the reader between its blocks, as in its run_glue.py: a loop for accelerate.
LOOP = """
optimizer = Accelerated(make(model.parameters()))
for step, batch in enumerate(train_dataloader):
{forward_type}
    loss = model(input_ids=batch, labels=batch).loss / args.gradient_accumulation_steps
    loss.backward()
{refresh}
    if step % args.gradient_accumulation_steps == 0 or step == len(train_dataloader) - 1:
        optimizer.step()
        optimizer.zero_grad()
        completed_steps += 1
    losses.append(loss.item() * args.gradient_accumulation_steps)
"""


class Accelerated:
    """What accelerate makes of an optimizer, as far as the document's code sees it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.step, self.zero_grad = optimizer, optimizer.step, optimizer.zero_grad


def make_adamw(params: Any) -> torch.optim.Optimizer:
    return AdamW(params, lr=1e-2)


def make_torch_adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([param for param in params if param.requires_grad], lr=1e-2)


def make_sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.3, momentum=0.9)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("make", [make_adamw, make_torch_adamw, make_sgd])
def test_golore_code_trains(make: Any, accumulation: int, caplog: pytest.LogCaptureFixture) -> None:
    args = SimpleNamespace(
        rank=8, scale=1.0, quantize=None, use_double_quant=True, gradient_accumulation_steps=accumulation,
        update_proj_gap=4, max_train_steps=20, rand_ratio=0.6,
    )  # fmt: skip
    names: dict[str, Any] = {
        "model": models.llama(),
        "args": args,
        "need_linear_weight": True,
        "train_dataloader": [models.tokens(0)] * (19 * accumulation + 1),
        "logger": logging.getLogger("golore"),
        "completed_steps": 0,
        "n_lora_restarts": 0,
        "losses": [],
        "make": make,
        "Accelerated": Accelerated,
    }
    exec(renamed(WRAP), names)
    model = names["model"]
    assert isinstance(model, ReLoRaModel)
    assert len(model.layers()) == 2 * 7
    assert names["ReLoRaLinear"] is ReLoRaLinear
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    blocks = {"forward_type": FORWARD_TYPE, "refresh": REFRESH}
    with caplog.at_level(logging.INFO, logger="golore"):
        exec(LOOP.format(**{name: textwrap.indent(code, "    ") for name, code in blocks.items()}), names)
    said = [message for message in caplog.messages if "lora reset" in message]
    assert names["n_lora_restarts"] == len(said) == 5
    assert [message.rpartition(" ")[2] for message in said] == ["svd", "svd", "svd", "rand", "rand"]
    assert names["losses"][-1] < names["losses"][0] - 0.5
    changed = {name for name, param in model.named_parameters() if not torch.equal(param.detach(), before[name])}
    assert changed == set(before)


def test_golore_code_with_values_that_cannot_be_honoured() -> None:
    for wrong, message in ({"quantize": "8bit"}, "quantize"), ({"need_linear_weight": False}, "lora_only"):
        values = {"rank": 8, "scale": 1.0, "quantize": None, "use_double_quant": False, **wrong}
        names: dict[str, Any] = {"model": models.llama(), "args": SimpleNamespace(**values)}
        names["need_linear_weight"] = values.get("need_linear_weight", True)
        with pytest.raises(ValueError, match=message):
            exec(renamed(WRAP), names)
