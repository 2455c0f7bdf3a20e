"""explain(): the table equals what a step does and what is allocated."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import torch.distributed as dist

from colossal_bcd import Adafactor, AdamW, BlockOptimizer, Lamb
from colossal_bcd.booster import explain
from colossal_bcd.testing import run_ranks


def rows(text: str) -> dict[str, list[str]]:
    """Name -> the other columns, which two spaces divide."""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    assert lines[0] == ["parameter", "rule", "layout", "rounds", "bytes", "lr"]
    return {line[0]: line[1:] for line in lines if len(line) == 6 and line[0] != "parameter"}


def test_explain_of_a_plain_optimizer_has_a_row_per_parameter() -> None:
    params = [torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones((), dtype=torch.float64))]
    optimizer = Lamb([{"params": params[:1]}, {"params": params[1:], "lr": 0.25}])
    text = explain(optimizer)
    assert rows(text) == {"0": ["Lamb", "3x4", "0", "96", "0.001"], "1": ["Lamb", "scalar", "0", "16", "0.25"]}
    assert text.endswith("2 parameters, 112 bytes of states and masters on this rank")
    assert not optimizer.state


def test_explain_of_an_adafactor_without_a_rate_says_that_steps_are_relative() -> None:
    """It ended in a TypeError about None, which Adafactor's learning rate is by default."""
    optimizer = Adafactor([torch.nn.Parameter(torch.ones(3, 4))])
    assert rows(explain(optimizer)) == {"0": ["Adafactor", "3x4", "0", "32", "relative"]}


def test_explain_of_another_packages_optimizer_learns_its_state_from_the_first_step() -> None:
    param = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = torch.optim.SGD([param], lr=0.5, momentum=0.9)
    assert rows(explain(optimizer)) == {"0": ["SGD", "3x4", "0", "?", "0.5"]}
    param.grad = torch.ones(3, 4)
    optimizer.step()
    assert rows(explain(optimizer)) == {"0": ["SGD", "3x4", "0", "48", "0.5"]}


def test_explain_of_a_block_optimizer_shows_the_active_block_with_its_masters() -> None:
    model = models.llama(layers=2).bfloat16()
    optimizer = BlockOptimizer(
        AdamW(model.parameters()), list(model.named_parameters()), switch_mode="ascending", verbose=0
    )
    text = explain(optimizer)
    table = rows(text)
    assert tuple(table) == optimizer.active_names()
    # A master and two moments, all float32.
    assert table["model.layers.0.mlp.up_proj.weight"] == ["AdamW", "96x64", "0", str(96 * 64 * 12), "0.001"]
    assert "step 0: model.layers.0 of 2 blocks" in text


def test_explain_refuses_what_is_no_optimizer() -> None:
    with pytest.raises(TypeError, match="got a Linear, expected an optimizer"):
        explain(torch.nn.Linear(1, 1))


def boosted(tp_size: int, kind: str) -> dict[str, Any]:
    from colossalai.booster import Booster

    from colossal_bcd.booster import HybridParallelPlugin

    model: Any = models.llama(layers=2, vocab=250)
    optimizer: Any = {"lamb": Lamb, "adam": Lamb, "torch": torch.optim.AdamW}[kind](model.parameters(), lr=1e-3)
    if kind == "adam":
        optimizer.param_groups[0]["adam"] = True
    booster = Booster(plugin=HybridParallelPlugin(tp_size=tp_size, pp_size=1, zero_stage=1, precision="bf16"))
    model, engine, *_ = booster.boost(model, optimizer)
    before = explain(engine)
    batch = models.tokens(0, vocab=250)
    booster.backward(model(input_ids=batch, labels=batch).loss, engine)
    engine.step()
    held = [*engine.masters.of.values()]
    for state in engine.optim.state.values():
        held += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return {
        "before": before,
        "after": explain(engine),
        "bytes": sum(tensor.nbytes for tensor in held),
        "rank": dist.get_rank(),
        "names": len(list(model.unwrap().named_parameters())),
    }


@pytest.mark.parametrize(("kind", "rounds"), [("lamb", "1"), ("adam", "0"), ("torch", "0")])
def test_explain_of_an_engine_gives_layouts_rounds_and_allocated_bytes(kind: str, rounds: str) -> None:
    for result in run_ranks(2, boosted, 1, kind):
        table = rows(result["after"])
        assert len(table) == result["names"]
        layout = f"250x64, flat zero {result['rank']}/2"
        half = 250 * 64 // 2
        assert table["model.embed_tokens.weight"][1:3] == [layout, rounds]
        # torch's AdamW also keeps its step as a float32 tensor.
        assert int(table["model.embed_tokens.weight"][3]) == half * 12 + (4 if kind == "torch" else 0)
        assert f" {result['bytes']} bytes of states and masters" in result["after"]
        assert (result["before"] == result["after"]) == (kind != "torch")


def test_explain_of_a_mesh_shows_both_axes() -> None:
    for result in run_ranks(4, boosted, 2, "lamb"):
        table = rows(result["after"])
        zero, tp = divmod(result["rank"], 2)
        assert table["lm_head.weight"][1:3] == [f"250x64, dim 0 tp {tp}/2, flat zero {zero}/2", "1"]
        assert table["model.norm.weight"][1:3] == [f"64, flat zero {zero}/2", "1"]
        assert f" {result['bytes']} bytes of states and masters" in result["after"]
