"""Adafactor against transformers.Adafactor itself, its refusals, and transformers' AdafactorSchedule."""

from __future__ import annotations

import json
from typing import Any

import factored_cases
import pytest
import torch
from conformance_cases import Sizes
from transformers import optimization

from colossal_bcd import Adafactor, BlockOptimizer
from colossal_bcd.booster.casts.registry import cast
from colossal_bcd.testing import run_ranks

# Weights of magnitude 1 move by up to 0.01 a step; float64 has 16 digits, of which the sums of both lose two.
TOLERANCE = 1e-12


@pytest.mark.parametrize("options", factored_cases.OPTIONS["Adafactor"], ids=json.dumps)
def test_adafactor_equals_transformers(options: dict[str, Any]) -> None:
    assert factored_cases.on_one_process("Adafactor", options) <= TOLERANCE


@pytest.mark.parametrize("sizes", factored_cases.MESHES, ids=str)
def test_adafactor_and_came_equal_the_originals_on_meshes(sizes: Sizes) -> None:
    for rank, errors in enumerate(run_ranks(sizes.tp * sizes.zero, factored_cases.on_mesh, sizes)):
        assert {what: error for what, error in errors.items() if not error <= TOLERANCE} == {}, f"rank {rank}"


def test_adafactor_equals_transformers_in_bf16_within_its_rounding() -> None:
    """Both round the weight to bf16 once a step, from updates that differ in float32's last digits only.

    A sum that lies within those digits of a tie is rounded to either side: a step then differs by one bf16 step, of
    2^-8 of the weight, and the scale of later steps by as little.  That happens to few of the values.
    """
    torch.manual_seed(0)
    start = [torch.randn(shape).bfloat16() for shape in ((30, 50), (64,))]
    ours, theirs = ([torch.nn.Parameter(weight.clone()) for weight in start] for _ in range(2))
    optimizers = Adafactor(ours), optimization.Adafactor(theirs)
    for step in range(20):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            for index, param in enumerate(params):
                generator = torch.Generator().manual_seed(10 * step + index)
                param.grad = torch.randn(param.shape, generator=generator).bfloat16()
            optimizer.step()
    for mine, other, before in zip(ours, theirs, start, strict=True):
        assert (mine == other).float().mean() > 0.98
        torch.testing.assert_close(mine, other, rtol=2**-7, atol=2**-16)
        assert not torch.equal(mine, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 1e-3}, "lr=0.001 and relative_step=True"),
        ({"relative_step": False}, "lr: got None, expected a number where relative_step is False"),
        ({"lr": 1e-3, "relative_step": False, "warmup_init": True}, "warmup_init: got True"),
        ({"lr": -1e-3, "relative_step": False}, "lr: got -0.001, expected None or a non-negative number"),
        ({"eps": (1e-30,)}, "eps: got .*expected two non-negative numbers"),
        ({"eps": (-1.0, 1e-3)}, "eps: got .*expected two non-negative numbers"),
        ({"clip_threshold": 0.0}, "clip_threshold: got 0.0"),
        ({"decay_rate": 0.8}, "decay_rate: got 0.8, expected a number that is not positive"),
        ({"beta1": 1.0}, "beta1: got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay: got -0.1"),
        ({"min_dim_size_to_factor": -1}, "min_dim_size_to_factor: got -1"),
    ],
)
def test_adafactor_refuses(options: dict[str, Any], message: str) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=message):
        Adafactor([weight], **options)
    with pytest.raises(ValueError, match=message):
        Adafactor([{"params": [weight], **options}])


def test_adafactor_group_may_have_an_lr_where_the_default_has_none() -> None:
    weights = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = Adafactor([{"params": weights[:1], "lr": 0.5, "relative_step": False}, {"params": weights[1:]}])
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, None]


def model_groups(seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((6, 4), (3, 5), (7,))
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).double()) for shape in shapes]
    return [{"params": params[:2]}, {"params": params[2:], "warmup_init": True}]


def lrs_of(optimizer: torch.optim.Optimizer, schedule: Any, groups: list[dict[str, Any]]) -> list[list[float]]:
    """What the schedule says after each step; the second group has no gradient at step 2."""
    seen = [[float(lr) for lr in schedule.get_lr()]]
    for step in range(5):
        for number, group in enumerate(groups):
            for index, param in enumerate(group["params"]):
                generator = torch.Generator().manual_seed(100 * step + 10 * number + index)
                param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
                if step == 2 and number == 1:
                    param.grad = None
        optimizer.step()
        schedule.step()
        seen.append([float(lr) for lr in schedule.get_lr()])
    return seen


def original_lrs() -> list[list[float]]:
    groups = model_groups()
    optimizer = optimization.Adafactor(groups)
    return lrs_of(optimizer, optimization.AdafactorSchedule(optimizer, 0.25), groups)


def assert_same_lrs(ours: list[list[float]]) -> None:
    want = original_lrs()
    assert want[0] == [0.25, 0.25]
    assert [len(lrs) for lrs in want] == [2, 2, 2, 1, 2, 2]
    for mine, theirs in zip(ours, want, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-14)


def test_adafactor_schedule_gives_the_originals_learning_rates() -> None:
    groups = model_groups()
    optimizer = Adafactor(groups)
    assert_same_lrs(lrs_of(optimizer, optimization.AdafactorSchedule(optimizer, 0.25), groups))


def test_adafactor_schedule_made_before_a_cast_follows_it() -> None:
    """The schedule reads the state of the optimizer that it was made on, where the cast left none: a KeyError."""
    groups = model_groups()
    source = optimization.Adafactor(groups)
    schedule = optimization.AdafactorSchedule(source, 0.25)
    ours = cast(source)
    assert type(ours) is Adafactor
    assert [group["lr"] for group in ours.param_groups] == [0.25, 0.25], "what the schedule wrote is the user's"
    assert_same_lrs(lrs_of(ours, schedule, groups))


def test_adafactor_schedule_follows_a_loaded_state() -> None:
    groups = model_groups()
    source = optimization.Adafactor(groups)
    schedule = optimization.AdafactorSchedule(source)
    ours: Any = cast(source)
    lrs_of(ours, schedule, groups)
    ours.load_state_dict(ours.state_dict())
    for param in groups[0]["params"]:
        param.grad = torch.ones_like(param)
    ours.step()
    schedule.step()
    assert float(schedule.get_last_lr()[0]) == ours._get_lr(ours.param_groups[0], ours.state[groups[0]["params"][0]])


@pytest.mark.parametrize("where", ["wrapper", "base", "cast"])
def test_adafactor_schedule_in_a_block_optimizer_does_not_crash(where: str) -> None:
    """A block optimizer's step consumes the gradients, so that a schedule after it says the initial lr.

    Asked before the step, with gradients of a block whose state is yet to come, it once found no `step`, and on the
    wrapper no `_get_lr`.
    """
    layers = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))})
    cls = optimization.Adafactor if where == "cast" else Adafactor
    base: Any = cls(layers.parameters())
    made_on = base if where != "wrapper" else None
    wrapped = BlockOptimizer(base, list(layers.named_parameters()), switch_block_every=2, verbose=0)
    schedule = optimization.AdafactorSchedule(made_on or wrapped, 0.25)
    cast(wrapped)
    for step in range(5):
        for param in layers.parameters():
            if param.requires_grad:
                param.grad = torch.ones_like(param)
        first = wrapped.param_groups[0]["params"][0]
        rms = first.detach().square().mean().sqrt().item()
        if step % 2:
            assert schedule.get_lr() == pytest.approx([wrapped.state[first]["RMS"].item() * 1e-2])
        else:
            assert schedule.get_lr() == [0.25]
        wrapped.step()
        if step % 2 == 0:
            assert wrapped.state[first]["RMS"].item() == pytest.approx(rms)
        schedule.step()
        assert schedule.get_last_lr() == [0.25]
