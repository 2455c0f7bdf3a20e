"""Schedulers on param groups of which nothing is active."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from transformers.optimization import AdafactorSchedule, get_cosine_schedule_with_warmup, get_scheduler

from colossal_bcd import Adafactor, AdamW, BlockOptimizer

SCHEDULERS = {
    "AdafactorSchedule": AdafactorSchedule,
    "transformers cosine": lambda optimizer: get_cosine_schedule_with_warmup(optimizer, 2, 8),
    "transformers inverse_sqrt": lambda optimizer: get_scheduler("inverse_sqrt", optimizer, 2, 8),
    "OneCycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1e-1, total_steps=20),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 1e-3, 1e-1, step_size_up=2),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)], [3]
    ),
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, [lambda t: 0.9**t, lambda t: 0.8**t]),
    "MultiplicativeLR": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda t: 0.9),
    "CosineWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
}


def net():
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})


def run(scheduler, empty):
    """Learning rates by step, and the final weights, with blocks of one group each or of both groups."""
    model = net()
    groups = [list(layer.parameters()) for layer in model["layers"]]
    if not empty:
        groups = [[a[0], b[0]] for a, b in [groups]] + [[a[1], b[1]] for a, b in [groups]]
    make = Adafactor if scheduler == "AdafactorSchedule" else lambda groups: AdamW(groups, lr=1e-2)
    base = make([{"params": group} for group in groups])
    optimizer = BlockOptimizer(
        base, list(model.named_parameters()), switch_block_every=2, switch_mode="ascending", verbose=0
    )
    schedule = SCHEDULERS[scheduler](optimizer)
    rates = []
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            if param.requires_grad:
                param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
        arguments = (1.0,) if scheduler == "ReduceLROnPlateau" else ()
        schedule.step(*arguments)
        rates.append([group["lr"] for group in optimizer.param_groups])
    return rates, model


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_work_where_a_group_has_nothing_active(scheduler):
    """transformers' AdafactorSchedule looks at the first parameter of every group: IndexError."""
    (rates, model), (expected, twin) = run(scheduler, True), run(scheduler, False)
    assert rates == expected
    if scheduler != "LambdaLR":  # whose two groups have different rates
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_group_with_nothing_active_is_empty():
    model = net()
    base = AdamW([{"params": list(layer.parameters())} for layer in model["layers"]])
    optimizer = BlockOptimizer(base, list(model.named_parameters()), switch_mode="ascending", verbose=0)
    params = optimizer.param_groups[1]["params"]
    assert (len(params), list(params), bool(params)) == (0, [], False)
    assert params[0].grad is None
    with pytest.raises(IndexError):
        params[1]
    assert params[:1] == []
    assert params == []
