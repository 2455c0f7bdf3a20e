"""A learning rate that is a tensor trains like the number, and nobody but its owner and schedulers writes it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import optim_cases
import outside_cases
import pytest
import torch
from torch import Tensor, nn

import colossal_bcd.compat
from colossal_bcd import BlockOptimizer, BlockOptimizerRatio
from colossal_bcd.block import OptimizerCorrection
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.testing import run_ranks

PROJECTED = {"rank": 2, "clamp": True, "update_proj_gap": 2}
LATE = {**PROJECTED, "total_steps": 4}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "AdamW": {"weight_decay": 0.1},
    "Lamb": {"weight_decay": 0.1, "bias_correction": "step_size"},
    "Adafactor": {"relative_step": False, "weight_decay": 0.1},
    "CAME": {"weight_decay": 0.1},
    "SGD": {"weight_decay": 0.1, "momentum": 0.9},
    "Lion": {"weight_decay": 0.1},
    "GaLoreAdamW": PROJECTED,
    "GaLoreAdamW8bit": PROJECTED,
    "GaLoreAdafactor": {**PROJECTED, "relative_step": False},
    "GaLoreSGD": {**PROJECTED, "momentum": 0.9, "weight_decay": 0.1},
    "GaLoreLion": PROJECTED,
    "GoLoreLion": LATE,
    "GoLoreAdamW": LATE,
    "GoLoreAdamW8bit": LATE,
    "GoLoreAdafactor": {**LATE, "relative_step": False},
    "GoLoreSGD": {**LATE, "momentum": 0.9},
    "DistributedLamb": {"weight_decay": 0.1},
    "DistributedAdaFactor": {"relative_step": False},
    "DistributedCAME": {},
    "DistGaloreAwamW": {"weight_decay": 0.1},
}
RATE = 1e-2
STEPS = 5


def public() -> Iterator[type[ShardedOptimizer]]:
    """Every optimizer that a user can construct, but those that choose by ratio, which take a model."""
    for module in (colossal_bcd, colossal_bcd.compat):
        for name in module.__all__:
            cls = getattr(module, name)
            if (
                not isinstance(cls, type)
                or not issubclass(cls, ShardedOptimizer)
                or issubclass(cls, BlockOptimizerRatio)
            ):
                continue
            if hasattr(cls, "hyper_type"):  # which the bases lack
                yield cls


CLASSES = {cls.__name__: cls for cls in public()}


def made(name: str, params: list[Any], lr: Any) -> torch.optim.Optimizer:
    groups: list[Any] = params
    if name == "DistGaloreAwamW":  # which takes the rank from its groups alone
        matrices = [param for param in params if param.dim() == 2]
        rest = [param for param in params if param.dim() != 2]
        projection = {"rank": 2, "update_proj_gap": 2, "scale": 0.25, "proj_type": "std"}
        groups = [{"params": matrices, **projection}, {"params": rest}]
    return CLASSES[name](groups, lr=lr, **ARGUMENTS[name])


def tensor(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(RATE, dtype=dtype)


def trained(make: Callable[[Any, Any], torch.optim.Optimizer], rate: Any, scheduled: bool = False) -> list[Tensor]:
    params = optim_cases.make_params(dtype=torch.float32)
    optimizer = make(params, rate)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) if scheduled else None
    for step in range(STEPS):
        optim_cases.set_grads(params, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return [param.detach() for param in params]


def test_tensor_rate_table_has_every_optimizer() -> None:
    assert set(ARGUMENTS) == set(CLASSES)


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_tensor_rate_trains_like_the_number(name: str, scheduled: bool) -> None:
    """GaLore and GoLore, and Lamb's third form, multiplied the user's tensor in place: 1.5e-4 after 3 steps."""

    def make(params: Any, lr: Any) -> torch.optim.Optimizer:
        return made(name, params, lr)

    rate = tensor()
    got, want = trained(make, rate, scheduled), trained(make, RATE, scheduled)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    if not scheduled:
        assert rate.item() == RATE


@pytest.mark.parametrize("name", ARGUMENTS)
def test_tensor_rate_is_the_users_own(name: str) -> None:
    """As under torch's optimizers: what the user writes into it counts at the next step, and groups share it."""
    params, rate = optim_cases.make_params(dtype=torch.float32), tensor()
    optimizer = made(name, params, rate)
    assert all(group["lr"] is rate for group in optimizer.param_groups)
    rate.zero_()
    before = [param.detach().clone() for param in params]
    optim_cases.set_grads(params, 0)
    optimizer.step()
    torch.testing.assert_close([param.detach() for param in params], before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_tensor_rate_survives_a_state_dict(name: str) -> None:
    def half(rate: Any) -> list[Tensor]:
        params = optim_cases.make_params(dtype=torch.float32)
        optimizer = made(name, params, rate)
        optim_cases.train(optimizer, params, 2)
        other = made(name, params, RATE if isinstance(rate, float) else tensor())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return optim_cases.train(other, params, 2, first=2)

    torch.testing.assert_close(half(tensor()), half(RATE), rtol=0, atol=0)


BLOCKS: dict[str, dict[str, Any]] = {
    "warm-up": {"lr_warmup_step_afterswitch": 2},
    "correction": {"sgd_mode": "all"},
    "sign": {"sgd_mode": "all", "sgd_use_sign": True, "sgd_lr_scaling": 0.5},
    "optimizer": {"sgd_mode": "all", "correction": OptimizerCorrection(colossal_bcd.Lamb), "sgd_lr_scaling": 0.5},
}


def stack() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(6, 6) for _ in range(3))})


def descended(wrap: Callable[[nn.Module, Any], torch.optim.Optimizer], rate: Any) -> list[Tensor]:
    model = stack()
    optimizer = wrap(model, rate)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(2 * STEPS):
        values = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        for layer in model["layers"]:
            values = layer(values).tanh()
        values.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("options", BLOCKS)
@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD, colossal_bcd.AdamW])
def test_tensor_rate_under_blocks(base: Any, options: str) -> None:
    def wrap(model: nn.Module, rate: Any) -> torch.optim.Optimizer:
        named = list(model.named_parameters())
        inside = base(model.parameters(), lr=rate)
        return BlockOptimizer(
            inside, named, switch_block_every=3, switch_mode="ascending", verbose=0, **BLOCKS[options]
        )

    torch.testing.assert_close(descended(wrap, tensor()), descended(wrap, RATE), rtol=0, atol=1e-7)


def test_tensor_rate_of_the_ratio_form() -> None:
    def wrap(model: nn.Module, rate: Any) -> torch.optim.Optimizer:
        named = list(model.named_parameters())
        return BlockOptimizerRatio(list(model.parameters()), named, 0.5, verbose=0, switch_every=3, lr=rate)

    torch.testing.assert_close(descended(wrap, tensor()), descended(wrap, RATE), rtol=0, atol=0)


def test_tensor_rate_under_plugins() -> None:
    """Agreement of ranks, casts, schedulers on the engine, and a checkpoint."""
    for result in run_ranks(2, outside_cases.tensor_rates):
        assert result == dict.fromkeys(result, 0.0)
