"""BREAD's adapters against a plain loop, on one process and under the plugins."""

import copy

import bread_lora_cases as cases
import models
import pytest
import torch
from bread_lora_cases import LAYERS, PERIOD

import colossal_bcd
from colossal_bcd.testing import run_ranks

STEPS = PERIOD * (2 * LAYERS)


def run(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        models.loss(model, cases.batches(1)(step)[0]).backward()
        optimizer.step()
        optimizer.zero_grad()


def compare(mine, theirs, atol):
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=atol, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["all", "partial", "adapter_only"])
def test_lora_equals_loop(mode, dtype):
    """Adapters go on with their moments when their turn comes again."""
    model = cases.peft_model(dtype)
    optimizer = cases.wrap(model, mode)
    run(model, optimizer, STEPS)
    want = cases.plain(cases.peft_model(dtype), mode, cases.batches(1), STEPS)
    compare(dict(model.named_parameters()), want, 0)


@pytest.mark.parametrize("mode", ["all", "partial", "adapter_only"])
def test_lora_around_an_optimizer_of_the_package_equals_loop(mode):
    """State that waits is put aside and given back by another way than torch's: its parts are declared and bound."""
    model = cases.peft_model(torch.float32)
    run(model, cases.wrap(model, mode, base=colossal_bcd.AdamW), STEPS)
    want = cases.plain(cases.peft_model(torch.float32), mode, cases.batches(1), STEPS)
    # Of 12 steps of Adam of 1e-3 each: float32's last places, in another order of operations.
    compare(dict(model.named_parameters()), want, 1e-5)


@pytest.mark.parametrize("mode", ["all", "partial", "adapter_only"])
def test_lora_reset_starts_adapters_anew_at_every_switch(mode):
    model = cases.peft_model(torch.float32)
    run(model, cases.wrap(model, mode, adapter_state="reset"), STEPS)
    want = cases.plain(cases.peft_model(torch.float32), mode, cases.batches(1), STEPS, reset=True)
    compare(dict(model.named_parameters()), want, 0)


@pytest.mark.parametrize("mode", ["all", "partial", "adapter_only"])
def test_lora_trains_what_the_mode_says(mode):
    model = cases.peft_model(torch.float32)
    optimizer = cases.wrap(model, mode)
    names = [name for name, _ in model.named_parameters()]
    for layer in (0, 1):
        want = set(cases.active_of(names, layer, mode))
        assert set(optimizer.active_names()) == want
        assert {name for name, param in model.named_parameters() if param.requires_grad} == want
        run(model, optimizer, PERIOD)


@pytest.mark.parametrize(
    ("mode", "plugin", "by_booster"),
    [("all", "zero", True), ("partial", "zero", False), ("adapter_only", "zero", True), ("all", "hybrid", True)],
)
def test_lora_under_plugins_equals_loop(mode, plugin, by_booster):
    results = run_ranks(2, cases.boosted, mode, plugin, STEPS, by_booster)
    want = cases.plain(cases.peft_model(torch.bfloat16), mode, cases.batches(2), STEPS)
    for result in results:
        compare(result["weights"], want, 0)
    # Masters are sharded: each of two ranks holds half of what the last step left active, padding aside.
    model = cases.peft_model(torch.bfloat16)
    names = cases.active_of([name for name, _ in model.named_parameters()], 0, mode)
    active = sum(model.get_parameter(name).numel() for name in names)
    assert abs(results[0]["held"] - active / 2) <= len(names)
    assert (max(results[0]["aside"]) > 0) == (mode != "all")


@pytest.mark.parametrize("mode", ["partial", "adapter_only"])
def test_lora_resumes_with_the_state_of_adapters_that_wait(mode):
    model = cases.peft_model(torch.bfloat16)
    optimizer = cases.wrap(model, mode)
    run(model, optimizer, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(model, optimizer, 6, start=5)
    again = cases.peft_model(torch.bfloat16)
    resumed = cases.wrap(again, mode)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    run(again, resumed, 6, start=5)
    compare(dict(again.named_parameters()), dict(model.named_parameters()), 0)


def test_lora_is_refused_where_the_model_is_divided():
    """Tensor parallelism would drop the adapters; a pipeline's layers were not found: AttributeError: embed_tokens."""
    for tp_size, pp_size in ((2, 1), (1, 2)):
        for message in run_ranks(2, cases.refused_by_division, tp_size, pp_size):
            assert "got a model with LoRA adapters, such as 'base_model.model." in message
            assert f"{'tp' if tp_size > 1 else 'pp'}_size=2" in message
    assert run_ranks(1, cases.refused_by_division, 1, 1) == ["no error"]


def test_lora_with_corrections_moves_everything():
    model = cases.peft_model(torch.float32)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = cases.wrap(model, "all", sgd_mode="all", sgd_lr_scaling=10.0)
    run(model, optimizer, 2)
    assert not [name for name, param in model.named_parameters() if torch.equal(param, before[name])]


def test_lora_needs_the_weights_below_the_adapters_in_the_base():
    model = cases.peft_model(torch.float32)
    base = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad])
    with pytest.raises(ValueError, match="it lacks .* parameters of blocks"):
        cases.BlockOptimizer(base, list(model.named_parameters()), lora_mode="all")
