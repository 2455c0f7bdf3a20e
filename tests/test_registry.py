"""Casts: which optimizer becomes what, with which numbers, and what is refused."""

from __future__ import annotations

import functools
import importlib
import logging
import math
import warnings
from typing import Any

import bitsandbytes.optim
import colossalai.nn.optimizer as theirs
import galore_torch
import pytest
import torch
import transformers.optimization
from torch import Tensor

import colossal_bcd
from colossal_bcd import BlockOptimizer, Lamb
from colossal_bcd.booster import registry
from colossal_bcd.booster.registry import cast
from colossal_bcd.compat import DistributedLamb

SHAPES = ((8, 6), (6,), (3, 2, 4))
STEPS = 6


def weights(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def param_groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": params[:1], "lr": 0.02, "weight_decay": 0.1},
        {"params": params[1:], "betas": (0.8, 0.95), "eps": 1e-5, "note": "mine"},
    ]


def fused_lamb(groups: Any, *, max_grad_norm: float = math.inf, adam_w_mode: int = 1, **options: Any) -> Any:
    """ColossalAI's FusedLAMB, whose constructor needs CUDA kernels, with the attributes that it would have."""
    use_nvlamb = options.pop("use_nvlamb", False)
    optimizer = theirs.FusedLAMB.__new__(theirs.FusedLAMB)
    defaults = {"lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}
    defaults |= {"grad_averaging": True, "max_grad_norm": max_grad_norm, **options}
    torch.optim.Optimizer.__init__(optimizer, groups, defaults)
    optimizer.adam_w_mode, optimizer.use_nvlamb, optimizer.set_grad_none = adam_w_mode, use_nvlamb, True
    return optimizer


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def trained(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> list[Tensor]:
    for step in range(STEPS):
        set_gradients(params, step)
        optimizer.step()
    return [param.detach().clone() for param in params]


def assert_equal_training(make: Any, *, distributed: bool = False) -> None:
    """The cast against the original itself on one process.

    Either rounds the two moments, the direction and the weight in float32, in another order: less than 8 roundings of
    a step's change and one of the weight, a step.
    """
    params, cast_params = weights(), weights()
    original = make(param_groups(params))
    if distributed:
        original.setup_distributed()
    want = trained(original, params)
    got = trained(cast(make(param_groups(cast_params))), cast_params)
    for before, ours, reference in zip(weights(), got, want, strict=True):
        change = (reference - before).abs().max().item()
        assert change > 1e-3
        bound = STEPS * 2**-24 * (reference.abs().max().item() + 8 * change)
        assert (ours - reference).abs().max().item() <= bound


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_cast_of_colossalai_lamb_gives_its_numbers(bias_correction: bool, adam: bool) -> None:
    assert_equal_training(functools.partial(theirs.Lamb, bias_correction=bias_correction, adam=adam))


@pytest.mark.parametrize("bias_correction", [False, True])
def test_cast_of_colossalai_distributed_lamb_gives_its_numbers(bias_correction: bool) -> None:
    make = functools.partial(theirs.DistributedLamb, bias_correction=bias_correction)
    assert_equal_training(make, distributed=True)


@pytest.mark.parametrize("bias_correction", [False, True])
def test_compat_distributed_lamb_gives_colossalais_numbers(bias_correction: bool) -> None:
    params, our_params = weights(), weights()
    original = theirs.DistributedLamb(param_groups(params), bias_correction=bias_correction)
    original.setup_distributed()
    ours = DistributedLamb(param_groups(our_params), bias_correction=bias_correction)
    assert ours.defaults["bias_correction"] is bias_correction
    for got, want in zip(trained(ours, our_params), trained(original, params), strict=True):
        torch.testing.assert_close(got, want, rtol=STEPS * 2**-23, atol=STEPS * 2**-23)


def test_compat_distributed_lamb_has_the_defaults_and_refuses_nonsense() -> None:
    group = DistributedLamb(weights()).param_groups[0]
    expected = theirs.DistributedLamb(weights()).param_groups[0]
    assert all(group[key] == value for key, value in expected.items() if key != "params")
    with pytest.raises(ValueError, match="bias_correction"):
        DistributedLamb(weights(), bias_correction="no")  # type: ignore[arg-type]
    assert cast(ours := DistributedLamb(weights())) is ours


def fused_reference(weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], nv: bool) -> Tensor:
    """The lines of multi_tensor_lamb_kernel.cu, stage 1 in mode 1 and stage 2, without clipping."""
    beta1, beta2 = group["betas"]
    state["t"] = state.get("t", 0) + 1
    state["m"] = state.get("m", 0) * beta1 + (1 - beta1) * grad
    state["v"] = state.get("v", 0) * beta2 + (1 - beta2) * grad * grad
    corrections = (1 - beta1 ** state["t"], 1 - beta2 ** state["t"]) if group["bias_correction"] else (1, 1)
    denom = (state["v"] / corrections[1]).sqrt() + group["eps"]
    update = state["m"] / corrections[0] / denom + group["weight_decay"] * weight
    ratio = group["lr"]
    if nv or group["weight_decay"] != 0:
        ratio = ratio * (weight.norm() / update.norm())
    return weight - ratio * update


@pytest.mark.parametrize("use_nvlamb", [False, True])
@pytest.mark.parametrize("bias_correction", [0, 1, True])
def test_cast_of_fused_lamb_gives_its_kernels_numbers(bias_correction: int, use_nvlamb: bool) -> None:
    params = weights(torch.float64)
    groups = [{"params": params[:1], "lr": 0.02, "weight_decay": 0.1}, {"params": params[1:], "weight_decay": 0.0}]
    optimizer = cast(fused_lamb(groups, bias_correction=bias_correction, use_nvlamb=use_nvlamb))
    states: list[dict[str, Any]] = [{} for _ in params]
    for step in range(STEPS):
        set_gradients(params, step)
        settings = [optimizer.param_groups[0], *[optimizer.param_groups[1]] * 2]
        want = [
            fused_reference(
                param.detach(), param.grad, state, {**group, "bias_correction": bias_correction}, use_nvlamb
            )
            for param, state, group in zip(params, states, settings, strict=True)
        ]
        optimizer.step()
        for param, reference in zip(params, want, strict=True):
            torch.testing.assert_close(param.detach(), reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 1.0}, r"max_grad_norm=math.inf\) and a plugin with max_norm=1.0"),
        ({"adam_w_mode": 0}, "adam_w_mode=0"),
        ({"grad_averaging": False}, "grad_averaging=False"),
    ],
)
def test_cast_refuses_fused_lamb_that_differs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cast(fused_lamb(weights(), **options))


def test_cast_of_fused_lamb_says_what_a_norm_of_zero_did(caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(cast(fused_lamb(param_groups(weights()), max_grad_norm=0.0)), Lamb)
    assert sum("makes every gradient zero" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("name", ["LAMB", "LAMB32bit"])
def test_cast_of_bitsandbytes_lamb_warns_that_the_rule_differs(name: str, caplog: pytest.LogCaptureFixture) -> None:
    ours = cast(getattr(bitsandbytes.optim, name)(param_groups(weights()), lr=0.5))
    assert type(ours) is Lamb
    assert [group["lr"] for group in ours.param_groups] == [0.02, 0.5]
    assert ours.param_groups[0]["eps"] == 1e-8
    assert sum("cast to the LAMB of the paper" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("options", [{"optim_bits": 8}, {"max_unorm": 0.5}])
def test_cast_refuses_bitsandbytes_lamb_that_differs(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="have no equal here"):
        cast(bitsandbytes.optim.LAMB(weights(), **options))


MAKERS = {
    "Lamb": lambda groups: theirs.Lamb(groups, lr=0.5, bias_correction=True, adam=True),
    "DistributedLamb": lambda groups: theirs.DistributedLamb(groups, lr=0.5, bias_correction=False),
    "FusedLAMB": lambda groups: fused_lamb(groups, lr=0.5),
    "LAMB": lambda groups: bitsandbytes.optim.LAMB(groups, lr=0.5),
    "LAMB32bit": lambda groups: bitsandbytes.optim.LAMB32bit(groups, lr=0.5),
}


@pytest.mark.parametrize("name", MAKERS)
def test_cast_carries_groups_and_defaults(name: str) -> None:
    source = MAKERS[name](param_groups(weights()))
    groups, before = list(source.param_groups), [dict(group) for group in source.param_groups]
    ours = cast(source)
    assert type(ours) is Lamb
    assert all(ours.param_groups[i] is group for i, group in enumerate(groups)), "a scheduler holds the old dicts"
    for group, old in zip(ours.param_groups, before, strict=True):
        for key in ("lr", "betas", "eps", "weight_decay", "params"):
            assert group[key] == old[key], key
    assert ours.param_groups[1]["note"] == "mine"
    ours.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    added = ours.param_groups[2]
    assert (added["lr"], added["eps"]) == (0.5, source.defaults["eps"])
    assert added["bias_correction"] == {"Lamb": "step_size", "DistributedLamb": False}.get(name, True)
    assert added["adam"] is (name == "Lamb")


@pytest.mark.parametrize("name", MAKERS)
def test_cast_refuses_state(name: str) -> None:
    source = MAKERS[name](weights())
    source.state[source.param_groups[0]["params"][0]]["step"] = 1
    with pytest.raises(ValueError, match=r"state of 1 parameters.*Boost before the first step"):
        cast(source)


def test_cast_keeps_hooks_and_their_handles() -> None:
    source = theirs.Lamb(weights())
    seen: list[str] = []
    kept = source.register_step_pre_hook(lambda *_: seen.append("pre"))
    source.register_step_post_hook(lambda *_: seen.append("post"))
    ours = cast(source)
    set_gradients(ours.param_groups[0]["params"], 0)
    ours.step()
    assert seen == ["pre", "post"]
    kept.remove()
    ours.step()
    assert seen == ["pre", "post", "post"]


def test_cast_keeps_a_scheduler_going_without_a_warning() -> None:
    source = theirs.Lamb(weights(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(source, lambda step: 0.5**step)
    ours = cast(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            assert ours.param_groups[0]["lr"] == 0.5**step
            set_gradients(ours.param_groups[0]["params"], step)
            ours.step()
            scheduler.step()


def test_cast_of_a_block_optimizer_casts_its_base() -> None:
    layer = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))})
    wrapped = BlockOptimizer(theirs.Lamb(layer.parameters(), adam=True), list(layer.named_parameters()), verbose=0)
    groups = wrapped.param_groups
    assert cast(wrapped) is wrapped
    assert type(wrapped.base_optimizer) is Lamb
    assert wrapped.param_groups[0] is groups[0]
    assert wrapped.param_groups[0]["adam"] is True


class NewName(theirs.Lamb):
    """Does not touch the update."""


class OtherStep(theirs.Lamb):
    def step(self, closure: Any = None) -> None:
        """Another update."""


class OtherUpdate(bitsandbytes.optim.LAMB):
    def update_step(self, *args: Any) -> None:
        """Another update, in bitsandbytes' way."""


class Grandchild(OtherStep):
    """Inherits the overridden step."""


class AdamChild(torch.optim.Adam):
    """Does not touch the update."""


class Unknown(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None: ...  # type: ignore[override]


def test_cast_takes_a_subclass_that_keeps_the_step() -> None:
    assert type(cast(NewName(weights()))) is Lamb


@pytest.mark.parametrize(
    ("cls", "parent"),
    [
        (OtherStep, "colossalai.nn.optimizer.Lamb"),
        (Grandchild, "colossalai.nn.optimizer.Lamb"),
        (OtherUpdate, "bitsandbytes.optim.LAMB"),
    ],
)
def test_cast_leaves_a_subclass_that_overrides_the_step(
    cls: Any, parent: str, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = cls(weights())
    assert cast(optimizer) is optimizer
    assert f"{cls.__name__} overrides the step of {parent}, so it is not cast" in caplog.text


def test_cast_warns_about_an_unknown_optimizer(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = Unknown(weights())
    assert cast(optimizer) is optimizer
    assert "test_registry.Unknown is unknown here" in caplog.text


@pytest.mark.parametrize(
    "make",
    [
        colossal_bcd.Lamb,
        colossal_bcd.AdamW,
        AdamChild,
        *(getattr(torch.optim, name) for name in sorted(registry.ELEMENTWISE["torch.optim"])),
        *(getattr(bitsandbytes.optim, name) for name in ("AdamW8bit", "PagedAdam", "Lion32bit", "AdEMAMix")),
    ],
)
def test_cast_leaves_elementwise_optimizers_alone(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    optimizer = make(weights(), lr=1e-3)
    with caplog.at_level(logging.INFO):
        assert cast(optimizer) is optimizer
    assert caplog.messages == []


def instance(cls: Any) -> Any:
    """An object of the class without its constructor, which may need kernels, ranks or a model."""
    optimizer = cls.__new__(cls)
    torch.optim.Optimizer.__init__(optimizer, weights(), {"lr": 0.1})
    return optimizer


WHOLE = [
    *(getattr(torch.optim, name) for name in ("Adafactor", "LBFGS")),
    transformers.optimization.Adafactor,
    *(getattr(theirs, name) for name in sorted(registry.WHOLE_MATRIX["colossalai.nn.optimizer"])),
    galore_torch.GaLoreAdamW,
    galore_torch.GaLoreAdamW8bit,
    galore_torch.GaLoreAdafactor,
    *(getattr(bitsandbytes.optim, name) for name in sorted(registry.WHOLE_MATRIX["bitsandbytes.optim"])),
]


@pytest.mark.parametrize("cls", WHOLE)
def test_cast_refuses_whole_matrix_optimizers_without_an_equal(cls: Any) -> None:
    with pytest.raises(ValueError, match="computes with whole matrices and would train wrongly on shards"):
        cast(instance(cls))


@pytest.mark.parametrize("name", ["BlockOptimizer", "BlockOptimizerRatio"])
def test_cast_refuses_badams_own_wrapper(name: str) -> None:
    cls = getattr(importlib.import_module("badam.block_optim"), name)
    with pytest.raises(ValueError, match=r"Import BlockOptimizer from colossal_bcd\.compat"):
        cast(instance(cls))


def test_every_name_in_the_tables_that_is_installed_is_a_class_of_that_name() -> None:
    """The tables named galore_torch's classes by what the package exports, so that none of them was recognised."""
    tables = (registry.ELEMENTWISE, registry.WHOLE_MATRIX, {"colossalai.nn.optimizer": set(), **registry.BLOCKWISE})
    known, missing = set(), set()
    for package in {package for table in tables for package in table}:
        try:
            module = importlib.import_module(package)
        except ImportError:
            continue
        exported = {id(cls): cls for cls in vars(module).values() if isinstance(cls, type)}.values()
        found = {name for cls in exported if (name := registry._known(cls)) is not None}
        named = {f"{package}.{name}" for table in tables for name in table.get(package, ())}
        known |= found
        missing |= named - found
    # Muon came with torch 2.9; AdamW has left transformers.
    assert missing <= {"torch.optim.Muon", "transformers.optimization.AdamW"}
    assert known >= set(registry.CASTS)
