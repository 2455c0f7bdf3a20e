"""GaLore and GoLore around every inner rule compute what textbook code computes on whole matrices, on every mesh."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import pickle
from typing import Any

import galore_rule_cases as cases
import galore_torch
import pytest
import torch
from bitsandbytes import functional
from conformance_cases import Sizes
from support.errors import largest_error
from support.signs import signed_svd
from torch import nn

import colossal_bcd
from colossal_bcd import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreSGD, GoLoreSGD
from colossal_bcd.optim.base import ShardedOptimizer
from colossal_bcd.optim.state.quantized import dequantize, quantize_into
from colossal_bcd.testing import run_ranks

KINDS = ("AdamW", "SGD", "Adafactor", "AdamW8bit")
SIDES: dict[str, dict[str, Any]] = {
    "std": {},
    "reverse_std": {"proj_type": "reverse_std"},
    "full": {"proj_type": "full"},
    "golore": cases.GOLORE,
    "golore-left": {"proj_type": "left", **cases.GOLORE},
}


def error(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return largest_error(ours, theirs)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rule", cases.RULES)
def test_galore_rule_equals_textbook_code(rule: str, side: str) -> None:
    assert error(cases.alone(rule, SIDES[side]), cases.by_reference(rule, SIDES[side])) <= 1e-12


@pytest.mark.parametrize("sizes", [Sizes(1, 3), Sizes(2, 2)], ids=str)
def test_galore_rule_on_a_mesh_equals_textbook_code(sizes: Sizes) -> None:
    """Through three refreshes, with square row-parallel weights, ragged rows, fused sections, padding, and divided dims
    of tensors of three dims."""
    for report in run_ranks(sizes.tp * sizes.zero, cases.all_rules, sizes):
        assert {variant: found for variant, (found, _) in report.items() if not found <= 1e-12} == {}
        for rule in cases.RULES:
            # The projection and, over ZeRO, the spread of a left one; Adafactor's means and its root mean square.
            own = 2 if rule.startswith("adafactor") else 0
            axes, zero = (sizes.tp > 1) + (sizes.zero > 1), sizes.zero > 1
            assert report[rule][1] == {"all_reduce": (1 + own) * axes + zero}


@pytest.mark.parametrize("momentum", [{}, {"momentum": 0.9, "dampening": 0.1}, {"momentum": 0.9, "nesterov": True}])
def test_galore_sgd_without_a_rank_is_torchs(momentum: dict[str, Any]) -> None:
    mine, theirs = (nn.Parameter(torch.ones(6, 5, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [mine]}, {"params": [nn.Parameter(torch.ones(6, 5))], "rank": 2}]
    optimizers = GaLoreSGD(groups, lr=0.1, **momentum), torch.optim.SGD([theirs], lr=0.1, **momentum)
    for step in range(5):
        for param, optimizer in zip((mine, theirs), optimizers, strict=True):
            param.grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.step()
    assert error([mine.detach()], [theirs.detach()]) <= 1e-14


def spectrum(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """A float32 gradient with well separated singular values."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, 8, generator=generator, dtype=torch.float64)).Q for n in shape)
    return (u @ torch.diag(2.0 ** -torch.arange(8, dtype=torch.float64)) @ v.T).float()


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
def test_galore_adafactor_equals_the_original(proj_type: str, beta1: float | None) -> None:
    """galore_torch's Adafactor on one process, in float32, through three refreshes."""
    shapes = [(24, 16), (16, 40)]
    hyper = {"lr": 1e-2, "relative_step": False, "beta1": beta1, "weight_decay": 0.1}
    ours, theirs = ([nn.Parameter(spectrum(shape, 99)) for shape in shapes] for _ in range(2))
    group = {"rank": 3, "update_proj_gap": 2, "scale": 0.5, "proj_type": proj_type}
    one: Any = GaLoreAdafactor([{"params": ours, **group}], **hyper)
    other: Any = galore_torch.GaLoreAdafactor([{"params": theirs, **group}], **hyper)
    for step in range(6):
        for params in (ours, theirs):
            for index, param in enumerate(params):
                param.grad = spectrum(shapes[index], 10 * index + step)
        one.step()
        with signed_svd():
            other.step()
    assert error([p.detach() for p in ours], [p.detach() for p in theirs]) <= 1e-5


def test_galore_8bit_equals_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    """galore_torch's AdamW8bit on one process.

    Both keep the same codes within one step of the map, so that an update differs by the quantisation error of the
    moments: at most 1.5 % of the first and half the widest gap of the second for the largest values, more for small
    ones; over six steps of 1e-2 the weights stay within 10 % of the way that they go.
    """
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    shapes = [(96, 64), (64, 128)]
    ours, theirs = ([nn.Parameter(spectrum(shape, 99)) for shape in shapes] for _ in range(2))
    group = {"rank": 8, "update_proj_gap": 3, "scale": 0.5, "proj_type": "std"}
    hyper = {"lr": 1e-2, "min_8bit_size": 256, "weight_decay": 0.1}
    one: Any = GaLoreAdamW8bit([{"params": ours, **group}], **hyper)
    other: Any = galore_torch.GaLoreAdamW8bit([{"params": theirs, **group}], **hyper)
    exact: Any = GaLoreAdamW8bit([{"params": (kept := [nn.Parameter(p.detach().clone()) for p in ours]), **group}],
                                 state_bits=32, **hyper)  # fmt: skip
    for step in range(6):
        for params, optimizer in ((ours, one), (theirs, other), (kept, exact)):
            for index, param in enumerate(params):
                noise = torch.randn(shapes[index], generator=torch.Generator().manual_seed(step))
                param.grad = spectrum(shapes[index], 10 * index) + 1e-3 * noise
            with signed_svd():
                optimizer.step()
    assert all(one.state[param]["exp_avg"].dtype == torch.uint8 for param in ours)
    assert all(other.state[param]["state1"].dtype == torch.uint8 for param in theirs)
    for mine, original, whole, shape in zip(ours, theirs, kept, shapes, strict=True):
        way = (whole.detach() - spectrum(shape, 99)).norm()
        assert (mine.detach() - original.detach()).norm() <= 0.1 * way
        assert (mine.detach() - whole.detach()).norm() <= 0.1 * way


def test_galore_8bit_stores_both_moments_in_8_bits_from_a_size_on() -> None:
    large, small, vector = (
        nn.Parameter(torch.ones(64, 32)),
        nn.Parameter(torch.ones(16, 32)),
        nn.Parameter(torch.ones(300)),
    )
    groups = [{"params": [large, small], "rank": 4, "scale": 1.0}, {"params": [vector]}]
    optimizer = GaLoreAdamW8bit(groups, min_8bit_size=256)
    for param in (large, small, vector):
        param.grad = torch.ones_like(param)
    optimizer.step()
    dtypes = {
        param: [optimizer.state[param][name].dtype for name in ("exp_avg", "exp_avg_sq")]
        for param in (large, small, vector)
    }
    assert dtypes == {large: [torch.uint8] * 2, small: [torch.float32] * 2, vector: [torch.uint8] * 2}
    assert optimizer.state[large]["exp_avg"].shape == (64, 4)
    held = [value.nbytes for name, value in optimizer.state[large].items() if name.startswith("exp_avg")]
    assert sum(held) == 2 * (64 * 4 + 4)


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adafactor"])
def test_galore_keeps_its_first_moment_in_8_bits_if_asked(kind: str) -> None:
    own: dict[str, Any] = {
        "AdamW": {}, "SGD": {"momentum": 0.9}, "Adafactor": {"beta1": 0.9, "relative_step": False}
    }[kind]  # fmt: skip
    entry = "momentum_buffer" if kind == "SGD" else "exp_avg"
    ways = []
    for bits in (32, 8):
        param = nn.Parameter(torch.zeros(64, 32))
        make: Any = getattr(colossal_bcd, f"GaLore{kind}")
        optimizer = make([{"params": [param], "rank": 4, "scale": 1.0}], lr=1e-2, moment_bits=bits, **own)
        for step in range(4):
            param.grad = spectrum((64, 32), 5) + 1e-3 * torch.randn(
                64, 32, generator=torch.Generator().manual_seed(step)
            )
            optimizer.step()
        assert optimizer.state[param][entry].dtype == (torch.uint8 if bits == 8 else torch.float32)
        ways.append(param.detach())
    assert 0 < (ways[0] - ways[1]).norm() <= 0.05 * ways[0].norm()


def test_unsigned_storage_keeps_every_value_and_never_makes_one_zero() -> None:
    """A second moment that became zero would leave a step of moment / eps: 1e5 times what it should be."""
    code = functional.create_dynamic_map(signed=False)
    values = torch.logspace(-12, 0, 700)
    values[::256] = 1.0
    codes, absmax = torch.zeros(700, dtype=torch.uint8), torch.zeros(3)
    quantize_into(codes, absmax, values, signed=False)
    back = dequantize(codes, absmax, signed=False)
    assert bool((back > 0).all())
    smallest = code[code > 0].min()
    nearest = (values.unsqueeze(1) - code).abs().amin(1)
    assert bool(((back - values).abs() <= torch.maximum(nearest, smallest) + 2**-15 * (values > 2**-10)).all())
    quantize_into(codes, absmax, torch.zeros(700), signed=False)
    assert dequantize(codes, absmax, signed=False).count_nonzero() == 0


@pytest.mark.parametrize("kind", ["AdamW", "AdamW8bit"])
def test_galore_8bit_state_comes_back_from_a_checkpoint(kind: str) -> None:
    cls: Any = getattr(colossal_bcd, f"GaLore{kind}")
    options = {"min_8bit_size": 0} if kind == "AdamW8bit" else {"moment_bits": 8}

    def run(optimizer: Any, param: nn.Parameter, steps: range) -> None:
        for step in steps:
            param.grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    straight, parted = nn.Parameter(torch.ones(24, 16)), nn.Parameter(torch.ones(24, 16))
    group = {"rank": 3, "update_proj_gap": 3}
    one, first = (cls([{"params": [param], **group}], **options) for param in (straight, parted))
    run(one, straight, range(6))
    run(first, parted, range(4))
    second = cls([{"params": [parted], **group}], **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, parted, range(4, 6))
    assert torch.equal(straight, parted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["GaLore", "GoLore"])
def test_galore_constructors_name_every_hyper_parameter(family: str, kind: str) -> None:
    """They are collected by name: one that is missing in the signature would be hidden from users."""
    cls: Any = getattr(colossal_bcd, family + kind)
    arguments = inspect.signature(cls).parameters
    assert not any(argument.kind == argument.VAR_KEYWORD for argument in arguments.values())
    defaults = {field.name: field.default for field in dataclasses.fields(cls.hyper_type)}
    fields = {key: defaults["gap" if key == "update_proj_gap" else key] for key in cls.hyper_keys()}
    assert len(fields) == len(defaults)
    named = {name: argument.default for name, argument in arguments.items() if name in fields}
    missing = set() if family == "GaLore" else {"reproject_momentum"}
    assert set(fields) - set(named) == missing
    assert {name: fields[name] for name in named} == named
    for name in named:
        assert name in cls.__doc__, f"{name} is not in the docstring"
    more = {"rand_ratio", "total_steps"} if family == "GoLore" else set()
    assert set(arguments) - set(fields) == {"params", "projection", "storage", "wave_bytes", "compile"} | more


@pytest.mark.parametrize("kind", KINDS)
def test_golore_is_galore_with_late_random_bases(kind: str) -> None:
    cls: Any = getattr(colossal_bcd, f"GoLore{kind}")
    own = {"relative_step": False, "lr": 1e-3} if kind == "Adafactor" else {}
    for options in ({"total_steps": 10, "rand_ratio": 0.35}, {"random_from_step": 4}):
        (group,) = cls([nn.Parameter(torch.ones(4, 4))], rank=2, **own, **options).param_groups
        assert (group["random_from_step"], group["reproject_momentum"]) == (4, True)
    for options in ({}, {"total_steps": 10, "random_from_step": 4}):
        with pytest.raises(ValueError, match=f"GoLore{kind}: got total_steps=.*expected exactly one"):
            cls([nn.Parameter(torch.ones(4, 4))], rank=2, **own, **options)
    with pytest.raises(ValueError, match="rand_ratio"):
        GoLoreSGD([nn.Parameter(torch.ones(4, 4))], total_steps=3, rand_ratio=1.5)


@pytest.mark.parametrize("kind", KINDS)
def test_galore_copies_go_on_training(kind: str) -> None:
    """A copy lost the owners of the bases and failed in its next refresh."""
    cls: Any = getattr(colossal_bcd, f"GaLore{kind}")
    own = {"relative_step": False, "lr": 1e-3} if kind == "Adafactor" else {}
    for duplicate in (copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))):
        param = nn.Parameter(torch.ones(8, 6))
        optimizer = duplicate(cls([{"params": [param], "rank": 2}], **own))
        (twin,) = optimizer.param_groups[0]["params"]
        twin.grad = torch.arange(48.0).view(8, 6)
        optimizer.step()
        assert not torch.equal(twin, torch.ones(8, 6))


def test_galore_rank_error_names_the_parameter() -> None:
    group = {"params": [nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(3, 8))], "rank": 4}
    with pytest.raises(
        ValueError, match=r"rank=4 for parameter number 1 of shape \(3, 8\), expected at most 3.*clamp=True"
    ):
        GaLoreAdamW([dict(group)])
    with pytest.raises(ValueError, match=r"rank=4 for parameter a\.weight of shape \(3, 8\)"):
        GaLoreAdamW([{**group, "param_names": ["b.weight", "a.weight"]}])
    optimizer = GaLoreAdamW([dict(group)], clamp=True)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.randn_like(param)
    optimizer.step()
    bases = [state["right" if "right" in state else "left"].shape for state in optimizer.state.values()]
    assert bases == [(8, 4), (3, 3)]


@pytest.mark.parametrize(
    ("kind", "hyper", "message"),
    [
        ("SGD", {"momentum": -1}, "momentum"),
        ("SGD", {"nesterov": True}, "nesterov"),
        ("SGD", {"moment_bits": 8}, "moment_bits: got 8, expected 32 where momentum is 0"),
        ("SGD", {"rank": True}, "rank: got True"),
        ("SGD", {"rank": 2.0}, "rank: got 2.0"),
        ("SGD", {"seed": "one"}, "seed"),
        ("Adafactor", {"lr": 1e-3}, "relative_step=True"),
        ("Adafactor", {"rank": 0}, "rank: got 0"),
        ("AdamW8bit", {"state_bits": 16}, "state_bits"),
        ("AdamW8bit", {"min_8bit_size": -1}, "min_8bit_size"),
        ("AdamW", {"update_proj_gap": 0}, "update_proj_gap"),
        ("AdamW", {"proj_type": "diagonal"}, "proj_type: got 'diagonal', expected one of std"),
    ],
)
def test_galore_refuses_wrong_hyper_parameters(kind: str, hyper: dict[str, Any], message: str) -> None:
    cls: Any = getattr(colossal_bcd, f"GaLore{kind}")
    with pytest.raises(ValueError, match=message):
        cls([nn.Parameter(torch.ones(8, 12))], **hyper)


def test_galore_says_which_parameters_are_not_projected(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "colossal_bcd"):
        optimizer = GaLoreAdamW([nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))], rank=2)
    assert "1 of the 2 parameters of a group with rank=2 have fewer than two dims and are not projected" in caplog.text
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert [set(state) - {"step"} for state in optimizer.state.values()] == [
        {"exp_avg", "exp_avg_sq", "right"},
        {"exp_avg", "exp_avg_sq"},
    ]
    assert isinstance(optimizer, ShardedOptimizer)


def test_galore_rounds_stochastically_if_asked() -> None:
    """Updates far below the step of bfloat16 are lost by nearest rounding, and kept on average by the other."""
    moved = {}
    for rounding in ("nearest", "stochastic"):
        param = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer: Any = GaLoreSGD([{"params": [param], "rank": 1, "scale": 1.0}], lr=1e-4, rounding=rounding)
        for _ in range(10):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved[rounding] = (1 - param.detach().double()).mean().item()
    assert moved["nearest"] == 0
    # 4096 weights, each rounded ten times with a deviation below 2^-9: five standard errors.
    assert abs(moved["stochastic"] - 1e-3) <= 5 * 10**0.5 * 2**-9 / 64
