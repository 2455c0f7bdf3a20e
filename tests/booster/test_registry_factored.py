"""Casts of other libraries' Adafactor and CAME, and the names in `compat`."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import came_pytorch
import colossalai.nn.optimizer as theirs
import pytest
import references
import torch
import transformers.optimization
from registry_cases import STEPS, set_gradients, trained, weights

from colossal_bcd import CAME, Adafactor, compat
from colossal_bcd.booster.casts.registry import cast

ADAFACTORS = {
    "transformers": transformers.optimization.Adafactor,
    "colossalai": theirs.Adafactor,
    "distributed": theirs.DistributedAdaFactor,
}
CAMES = {"came_pytorch": came_pytorch.CAME, "colossalai": theirs.CAME, "distributed": theirs.DistributedCAME}
ADAFACTOR_NUMBERS = {
    "eps": (1e-20, 1e-2),
    "clip_threshold": 0.7,
    "decay_rate": -0.6,
    "beta1": 0.8,
    "weight_decay": 0.02,
    "scale_parameter": False,
    "relative_step": True,
    "warmup_init": True,
}
CAME_NUMBERS = {"eps": (1e-20, 1e-12), "clip_threshold": 0.7, "betas": (0.8, 0.9, 0.95), "weight_decay": 0.02}


def two_groups(params: list[torch.nn.Parameter], **first: Any) -> list[dict[str, Any]]:
    return [{"params": params[:1], **first}, {"params": params[1:], "weight_decay": 0.5, "note": "mine"}]


def options_of_ours(cls: Any, old: dict[str, Any]) -> dict[str, Any]:
    """What the originals do not have is off."""
    defaults = cls(weights(), **({"lr": 1.0} if cls is CAME else {})).defaults
    return {key: value for key, value in defaults.items() if key not in old}


def assert_carried(source: Any, cls: type, numbers: dict[str, Any], first: dict[str, Any]) -> Any:
    """Every hyper-parameter of the original is ours, in the very same dicts; a later group gets the defaults."""
    groups, before = list(source.param_groups), [dict(group) for group in source.param_groups]
    ours = cast(source)
    assert type(ours) is cls
    assert all(ours.param_groups[i] is group for i, group in enumerate(groups))
    for group, old in zip(ours.param_groups, before, strict=True):
        assert {key: group[key] for key in old} == old
        assert {key: group[key] for key in group if key not in old} == options_of_ours(cls, old)
    assert {key: ours.param_groups[0][key] for key in first} == first
    assert {key: ours.defaults[key] for key in source.defaults} == source.defaults
    ours.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert {key: ours.param_groups[2][key] for key in numbers} == numbers
    return ours


@pytest.mark.parametrize("name", ADAFACTORS)
def test_cast_of_adafactor_carries_every_number(name: str) -> None:
    first = {"lr": 0.3, "relative_step": False, "warmup_init": False, "scale_parameter": True}
    source = ADAFACTORS[name](two_groups(weights(), **first), **ADAFACTOR_NUMBERS)
    assert_carried(source, Adafactor, ADAFACTOR_NUMBERS, first)


@pytest.mark.parametrize("name", ADAFACTORS)
def test_cast_of_adafactor_carries_the_defaults(name: str) -> None:
    source = ADAFACTORS[name](two_groups(weights()))
    assert_carried(source, Adafactor, {}, {"lr": None, "relative_step": True})
    assert {key: Adafactor(weights()).defaults[key] for key in source.defaults} == source.defaults


def test_cast_keeps_the_lr_of_transformers_adafactor() -> None:
    options = {"lr": 1e-3, "relative_step": False, "scale_parameter": False}
    source = transformers.optimization.Adafactor(weights(), **options)
    assert {key: cast(source).param_groups[0][key] for key in options} == options


@pytest.mark.parametrize("name", CAMES)
def test_cast_of_came_carries_every_number(name: str) -> None:
    source = CAMES[name](two_groups(weights(), lr=0.3), lr=0.5, **CAME_NUMBERS)
    assert_carried(source, CAME, {"lr": 0.5, **CAME_NUMBERS}, {"lr": 0.3})


@pytest.mark.parametrize("name", CAMES)
def test_cast_of_came_carries_the_defaults(name: str) -> None:
    source = CAMES[name](two_groups(weights()), lr=0.5)
    assert_carried(source, CAME, {"lr": 0.5}, {})
    assert {key: CAME(weights(), lr=0.5).defaults[key] for key in source.defaults} == source.defaults


def adafactor_groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """Group learning rates are the only ones that ColossalAI's class does not discard."""
    numbers = {"relative_step": False, "scale_parameter": False}
    return [{"params": params[:1], "lr": 0.02, "beta1": 0.9, **numbers}, {"params": params[1:], "lr": 0.01, **numbers}]


MAKERS: dict[str, Any] = {
    "transformers.Adafactor": lambda params: ADAFACTORS["transformers"](adafactor_groups(params)),
    "colossalai.Adafactor": lambda params: ADAFACTORS["colossalai"](adafactor_groups(params)),
    "colossalai.CAME": lambda params: CAMES["colossalai"](two_groups(params, lr=0.02), lr=0.01),
    "came_pytorch.CAME": lambda params: CAMES["came_pytorch"](two_groups(params, lr=0.02), lr=0.01),
}


@pytest.mark.parametrize("name", MAKERS)
def test_cast_of_factored_optimizers_gives_their_numbers(name: str) -> None:
    """Both in float32 in another order: less than 16 roundings of a step's update and two of the weight, a step."""
    params, cast_params = weights(), weights()
    want = trained(MAKERS[name](params), params)
    got = trained(cast(MAKERS[name](cast_params)), cast_params)
    for before, ours, reference in zip(weights(), got, want, strict=True):
        change = (reference - before).abs().max().item()
        assert change > 1e-3
        bound = STEPS * 2**-24 * (2 * reference.abs().max().item() + 16 * change)
        assert (ours - reference).abs().max().item() <= bound


def test_cast_of_colossalais_adafactor_scales_by_the_weights_root_mean_square() -> None:
    """As in the paper: theirs takes it for 0 and its steps are eps[1] times rho, whatever the weight."""
    params = weights(torch.float64)
    want, states = [param.detach().clone() for param in params], [{} for _ in params]
    ours = cast(theirs.Adafactor(params))
    for step in range(STEPS):
        set_gradients(params, step)
        ours.step()
        want = [
            references.adafactor(weight, param.grad, state, lr=None)
            for weight, param, state in zip(want, params, states, strict=True)
        ]
    for param, reference in zip(params, want, strict=True):
        torch.testing.assert_close(param.detach(), reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls", [theirs.Adafactor, theirs.DistributedAdaFactor])
def test_cast_says_once_that_colossalais_scale_parameter_is_dead(cls: Any, caplog: pytest.LogCaptureFixture) -> None:
    cast(cls(two_groups(weights()), eps=(1e-30, 0.125)))
    (message,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "takes the root mean square of every weight for 0" in message
    assert "eps[1]=0.125" in message


@pytest.mark.parametrize(
    "optimizer",
    [
        theirs.Adafactor(weights(), scale_parameter=False),
        transformers.optimization.Adafactor(weights()),
        theirs.DistributedCAME(weights(), lr=1.0),
    ],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_cast_says_nothing_where_nothing_differs(optimizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    cast(optimizer)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(
    "optimizer",
    [
        theirs.Adafactor(weights(), lr=1e-3, relative_step=False),
        transformers.optimization.Adafactor(weights(), relative_step=False),
        theirs.DistributedCAME(weights()),
    ],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_cast_refuses_a_missing_lr(optimizer: Any) -> None:
    """ColossalAI's Adafactor sets the lr that it is given to None and then multiplies by it."""
    with pytest.raises(ValueError, match=r"lr=None, expected a number.*colossal_bcd\.compat"):
        cast(optimizer)


def test_cast_takes_an_lr_that_every_group_brings_and_later_groups_must() -> None:
    ours = cast(theirs.DistributedCAME([{"params": weights(), "lr": 0.25}]))
    assert (ours.param_groups[0]["lr"], ours.defaults["lr"]) == (0.25, None)
    with pytest.raises(ValueError, match="lr: got None"):
        ours.add_param_group({"params": weights()})


def test_cast_of_adafactor_ignores_a_groups_lr_under_relative_step_as_the_original_does() -> None:
    ours = cast(transformers.optimization.Adafactor(two_groups(weights(), lr=0.5)))
    assert [group["lr"] for group in ours.param_groups] == [0.5, None]
    set_gradients(ours.param_groups[0]["params"], 0)
    before = ours.param_groups[0]["params"][0].detach().clone()
    ours.step()
    assert (ours.param_groups[0]["params"][0] - before).abs().max() < 0.1


@pytest.mark.parametrize("name", MAKERS)
def test_cast_of_factored_optimizers_refuses_state(name: str) -> None:
    params = weights()
    source = MAKERS[name](params)
    trained(source, params)
    with pytest.raises(ValueError, match=r"state of 3 parameters.*Boost before the first step"):
        cast(source)


def test_cast_refuses_torchs_adafactor_by_its_differences() -> None:
    with pytest.raises(ValueError, match=r"min\(lr, 1 / sqrt\(t\)\).*colossal_bcd\.Adafactor.*transformers\.Adafactor"):
        cast(torch.optim.Adafactor(weights()))


class OtherScale(transformers.optimization.Adafactor):
    @staticmethod
    def _get_lr(param_group: Any, param_state: Any) -> float:
        return 0.5


def test_cast_leaves_a_subclass_with_another_step_size(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = OtherScale(weights())
    assert cast(optimizer) is optimizer
    assert "OtherScale overrides the step of transformers.optimization.Adafactor, so it is not cast" in caplog.text


NAMES = {compat.DistributedAdaFactor: theirs.DistributedAdaFactor, compat.DistributedCAME: theirs.DistributedCAME}


@pytest.mark.parametrize("ours", NAMES)
def test_compat_has_colossalais_signature_and_groups(ours: Any) -> None:
    original: Any = NAMES[ours]
    own, other = (inspect.signature(cls).parameters for cls in (ours, original))
    assert [(p.name, p.default) for p in own.values()] == [(p.name, p.default) for p in other.values()]
    numbers = ADAFACTOR_NUMBERS if ours is compat.DistributedAdaFactor else {"lr": 0.5, **CAME_NUMBERS}
    got, want = (cls(params=weights(), **numbers).param_groups[0] for cls in (ours, original))
    assert {key: got[key] for key in want if key != "params"} == {k: v for k, v in want.items() if k != "params"}
    assert cast(boosted := ours(weights(), **numbers)) is boosted


def test_compat_adafactor_keeps_its_lr() -> None:
    optimizer = compat.DistributedAdaFactor(weights(), lr=0.25, relative_step=False)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert theirs.DistributedAdaFactor(weights(), lr=0.25, relative_step=False).param_groups[0]["lr"] is None
    with pytest.raises(ValueError, match=r"lr=0\.25 and relative_step=True"):
        compat.DistributedAdaFactor(weights(), lr=0.25)


@pytest.mark.parametrize(
    ("cls", "options"), [(compat.DistributedAdaFactor, {"relative_step": False}), (compat.DistributedCAME, {})]
)
def test_compat_takes_an_lr_that_every_group_brings(cls: Any, options: dict[str, Any]) -> None:
    params = weights()
    optimizer = cls(({"params": [param], "lr": 0.25} for param in params), **options)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25] * 3
    with pytest.raises(ValueError, match="lr: got None"):
        optimizer.add_param_group({"params": weights()})
    with pytest.raises(ValueError, match=r"lr.*got None|got lr=None"):
        cls(params, **options)
    with pytest.raises(ValueError, match=r"lr.*got None|got lr=None"):
        cls([{"params": params[:1], "lr": 0.25}, {"params": params[1:]}], **options)
