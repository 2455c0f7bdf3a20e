"""Every name in `compat` against what it replaces, on one process: code of the documents run with either import.

Where the original differs from its own documentation, which of its rules is compared is said at the comparison.
"""

from __future__ import annotations

import ast
import copy
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes.optim.optimizer as bitsandbytes_optimizer
import came_pytorch
import colossalai.nn.optimizer as theirs
import models
import plain_relora
import pytest
import seed_code
import test_relora
import torch
import transformers
from compat_cases import EXACT, ROWS, STEPS, Tools, assert_close, row, run, steps_of
from registry_cases import set_gradients
from seed_code import FORWARD_TYPE, GALORE, REFRESH, TUTORIAL, WRAP, renamed
from test_seeds_golore import Accelerated
from torch import nn

from colossal_bcd import compat

SHAPES = ((8, 6), (6,), (5, 16))


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def trained(make: Callable[[list[nn.Parameter]], Any], dtype: torch.dtype = torch.float64, steps: int = STEPS) -> Any:
    """Weights after some steps of an optimizer that `make` makes."""
    params = parameters(dtype)
    optimizer = make(params)
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
    return params


def alone(make: Callable[[list[nn.Parameter]], Any], **options: Any) -> Callable[[list[nn.Parameter]], Any]:
    """ColossalAI's distributed classes have to be told that there is one process."""

    def made(params: list[nn.Parameter]) -> Any:
        optimizer = make(params)
        optimizer.setup_distributed(**options)
        return optimizer

    return made


def two_groups(params: list[nn.Parameter], **options: Any) -> list[dict[str, Any]]:
    return [{"params": params[:1], "weight_decay": 0.1, **options}, {"params": params[1:]}]


@row("DistributedLamb", "colossalai.nn.optimizer.DistributedLamb")
def distributed_lamb(tools: Tools) -> None:
    for options in ({}, {"bias_correction": False}, {"betas": (0.8, 0.9), "eps": 1e-4}):
        got = trained(lambda params: compat.DistributedLamb(two_groups(params, lr=0.02), lr=0.01, **options))  # noqa: B023
        want = trained(alone(lambda params: theirs.DistributedLamb(two_groups(params, lr=0.02), lr=0.01, **options)))  # noqa: B023
        assert_close(got, want, EXACT)


@row("DistributedAdaFactor", "colossalai.nn.optimizer.DistributedAdaFactor, transformers.Adafactor", TUTORIAL)
def distributed_adafactor(tools: Tools) -> None:
    """ColossalAI's takes the weight's root mean square for 0 and discards its `lr`.

    So it is compared without the first and with a `lr` in every group, and the tutorial's call, where both matter, with
    transformers' class, whose factors are of float32: less than 16 roundings of an update and two of a weight, a step.
    """
    for options in (
        {"relative_step": False, "lr": 0.01},
        {"relative_step": False, "lr": 0.01, "beta1": 0.9, "clip_threshold": 0.5},
        {"warmup_init": True, "decay_rate": -0.6},
        {},
    ):
        groups = {"scale_parameter": False, **options}
        both: Any = (compat.DistributedAdaFactor, theirs.DistributedAdaFactor)
        ours, original = (
            (lambda params, c=cls, o=groups: c([{"params": params[:2], **o}, {"params": params[2:], **o}]))
            for cls in both
        )
        assert_close(trained(ours), trained(alone(original, use_zero=False)), EXACT)
    got, want = (
        trained(cls, torch.float32) for cls in (compat.DistributedAdaFactor, transformers.optimization.Adafactor)
    )
    for before, ours, reference in zip(parameters(torch.float32), got, want, strict=True):
        change = (reference - before).abs().max().item()
        assert change > 1e-3
        bound = STEPS * 2**-24 * (2 * reference.abs().max().item() + 16 * change)
        assert (ours - reference).abs().max().item() <= bound


@row("DistributedCAME", "came_pytorch.CAME; the first step also colossalai.nn.optimizer.DistributedCAME")
def distributed_came(tools: Tools) -> None:
    """ColossalAI's mixes two of its moments up from the second step on; it was written after the other one."""
    options = {"lr": 0.01, "betas": (0.8, 0.9, 0.95), "clip_threshold": 0.7}
    ours, package, original = (
        (lambda params, c=cls: c(two_groups(params, lr=0.02), **options))
        for cls in (compat.DistributedCAME, came_pytorch.CAME, theirs.DistributedCAME)
    )
    assert_close(trained(ours), trained(package), EXACT)
    assert_close(trained(ours, steps=1), trained(alone(original, use_zero=False), steps=1), EXACT)


def let_colossalais_galore_run(tools: Tools) -> None:
    """It needs an older bitsandbytes, a device and a process group, on one process for nothing but their presence."""
    init = bitsandbytes_optimizer.Optimizer2State.__init__

    def with_options(self: Any, *given: Any, percentile_clipping: int, block_wise: bool, **options: Any) -> None:
        init(self, *given, **options)

    tools.patch.setattr(bitsandbytes_optimizer.Optimizer2State, "__init__", with_options)
    tools.patch.setattr(torch.cuda, "synchronize", lambda: None)
    setup = theirs.DistGaloreAwamW.setup_distributed

    def with_group(self: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed, "is_initialized", lambda: True)
            setup(self)

    tools.patch.setattr(theirs.DistGaloreAwamW, "setup_distributed", with_group)


def galores(nbits: int) -> tuple[Any, Any, Any]:
    """The tutorial's block with our import and with the original's, and the weights before.

    The tutorial writes `decay`, where the original has `weight_decay`.
    """
    model = models.llama(vocab=1024, layers=1)
    given = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    code = GALORE.replace("nbits=8", f"nbits={nbits}")
    ours = run(renamed(code), model=(one := copy.deepcopy(model)), **given)["optim"]
    original = run(code.replace("decay=", "weight_decay="), model=(other := copy.deepcopy(model)), **given)["optim"]
    original.setup_distributed()
    return (one, ours), (other, original), list(model.parameters())


@row("DistGaloreAwamW", "colossalai.nn.optimizer.DistGaloreAwamW", GALORE)
def dist_galore_adamw(tools: Tools) -> None:
    """With moments of 32 bits, where float32 rounds what is divided by small moments, and of 8, where codes round.

    Within a share of the way that the weights go, that of 8 bits as in test_galore_rules.py.  The two differ in tensors
    that are not projected: bitsandbytes' kernel for CPUs shrinks a weight before its update, that for CUDA, like GaLore
    and ours, after it; a step of at most lr is shrunk by lr * decay more, every step.
    """
    let_colossalais_galore_run(tools)
    for nbits, share in ((32, 1e-4), (8, 0.1)):
        ours, original, start = galores(nbits)
        list(zip(*(steps_of(*pair, STEPS) for pair in (ours, original)), strict=True))
        kinds = {getattr(state["state1"], "dtype", None) for state in original[1].state.values()}
        assert kinds == ({torch.float32} if nbits == 32 else {torch.float32, torch.uint8})
        for (name, got), want, before in zip(ours[0].named_parameters(), original[0].parameters(), start, strict=True):
            order = 0 if want.dim() == 2 else STEPS * 1e-2 * 1e-2 * 1e-2 * want.numel() ** 0.5
            assert (got - want).norm() <= share * (want - before).norm() + order, name
            assert (want - before).abs().max() > 1e-3


@row("get_galore_param_groups", "colossalai.nn.optimizer.galore.get_galore_param_groups", GALORE)
def get_galore_param_groups(tools: Tools) -> None:
    """The groups of the tutorial's block; the original's empty third one is left out."""
    let_colossalais_galore_run(tools)
    ours, original, _ = galores(32)
    names = [{id(param): name for name, param in model.named_parameters()} for model in (ours[0], original[0])]
    full = [group for group in original[1].param_groups if group["params"]]
    assert len(full) == len(ours[1].param_groups) == 2
    for mine, group in zip(ours[1].param_groups, full, strict=True):
        keys = group.keys() & {"rank", "update_proj_gap", "scale", "proj_type", "weight_decay", "lr", "betas", "eps"}
        assert ("rank" in keys) is (mine["rank"] is not None)
        assert {key: mine[key] for key in keys} == {key: group[key] for key in keys}
        assert [names[0][id(p)] for p in mine["params"]] == [names[1][id(p)] for p in group["params"]]


@row("ReLoRaModel", "the rule as a plain loop over whole matrices, as its package is not to be had", WRAP)
def relora_model(tools: Tools) -> None:
    """Refreshes by SVD, then random ones, whose bases are handed to the loop."""
    steps, gap = 11, test_relora.GAP
    args = {"rank": test_relora.RANK, "scale": test_relora.SCALE, "quantize": None, "use_double_quant": False}
    loop = (
        "for step, batch in enumerate(train_dataloader):\n{}\n    loss_of(model, batch).backward()\n{}\n"
        "    optimizer.step()\n    optimizer.zero_grad()\n    completed_steps += 1\n"
    )
    names = run(
        renamed(WRAP),
        model=test_relora.Net().double(),
        args=SimpleNamespace(
            **args, gradient_accumulation_steps=1, update_proj_gap=gap, max_train_steps=12, rand_ratio=2 * gap / 12
        ),
        need_linear_weight=True,
    )
    assert type(names["model"]) is compat.ReLoRaModel
    code = loop.format(*(textwrap.indent(block, "    ") for block in (FORWARD_TYPE, REFRESH)))
    optimizer = Accelerated(torch.optim.AdamW(names["model"].parameters(), lr=1e-2, weight_decay=0.1))
    run(
        code,
        **{key: names[key] for key in ("model", "args", "ReLoRaModel")},
        train_dataloader=range(steps),
        loss_of=test_relora.loss_of,
        logger=SimpleNamespace(info=str),
        optimizer=optimizer,
        completed_steps=0,
        n_lora_restarts=0,
    )
    want = test_relora.plain(plain_relora.adamw, 2 * gap, steps)
    got = test_relora.effective(names["model"])
    assert_close(got.values(), want.values(), EXACT)


@row("ReLoRaLinear", "the rule as a plain loop over one matrix, as its package is not to be had", WRAP)
def relora_linear(tools: Tools) -> None:
    """A wide and a tall layer between two refreshes."""
    for rows, columns in ((3, 5), (5, 3)):
        torch.manual_seed(0)
        weight, scale = torch.randn(rows, columns).double(), 0.7
        layer = compat.ReLoRaLinear(
            columns, rows, 2, scale=scale, lora_dropout=0, bias=False, weight_data=weight.clone()
        )
        plain = plain_relora.PlainReLoRA(weight, 2, scale)
        side = "right_side" if layer.right else "left_side"
        setattr(plain, side, layer.basis.weight.detach().clone())
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)
        for _ in range(STEPS):
            x = torch.randn(4, columns).double()
            out = layer(x)
            torch.testing.assert_close(out.detach(), x @ plain.effective.T, rtol=0, atol=EXACT)
            out.square().sum().backward()
            plain.step(2 * (x @ plain.effective.T).T @ x, plain_relora.sgd)
            optimizer.step()
            optimizer.zero_grad()
        assert_close([layer.merged_weight()], [plain.effective], EXACT)
        assert (layer.merged_weight() - weight).abs().max() > 1e-2


def imported(code: str) -> set[str]:
    """Names that the code imports from this package."""
    found = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in found if node.module == "colossal_bcd.compat" for alias in node.names}


def test_every_name_in_compat_has_a_row_and_every_document_finds_its_names() -> None:
    # They make accelerate follow sharded weights, and a Trainer make blocks, which no predecessor does:
    # test_fsdp_trainers.py and test_trainer.py train by them.
    assert set(ROWS) == set(compat.__all__) - {"enable_accelerate", "block_optimizer"}
    blocks = [code for name, code in vars(seed_code).items() if name.isupper() and isinstance(code, str)]
    asked = set().union(*(imported(renamed(code)) for code in blocks))
    assert asked == {name for name, row in ROWS.items() if row.code is not None}
    for name, entry in ROWS.items():
        assert entry.code is None or name in imported(renamed(entry.code)), name


@pytest.mark.parametrize("name", ROWS)
def test_compat_name_trains_as_what_it_replaces(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ROWS[name].compare(Tools(monkeypatch, tmp_path))
