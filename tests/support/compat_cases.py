"""Rows of test_compat_originals.py: what a row is, and those of BAdam's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import badam
import badam.utils
import models
import pytest
import torch
from accelerate import Accelerator
from seed_code import BADAM_ASCENDING, CALLBACK, RATIO, SPARSE, renamed
from test_trainer import Callbacks, trainer_of
from torch import Tensor, nn

from colossal_bcd import compat

STEPS = 6
EXACT = 1e-12
"""Of float64, over a few steps."""


@dataclass
class Tools:
    """What pytest gives to a comparison."""

    patch: pytest.MonkeyPatch
    folder: Path


@dataclass(frozen=True)
class Row:
    """A name in `compat`."""

    original: str
    """What it is compared with."""
    code: str | None
    """Code of a document that imports it; the tutorial's runs on four ranks in test_seeds.py."""
    compare: Callable[[Tools], None]


ROWS: dict[str, Row] = {}


def row(name: str, original: str, code: str | None = None) -> Callable[..., Callable[[Tools], None]]:
    def add(compare: Callable[[Tools], None]) -> Callable[[Tools], None]:
        ROWS[name] = Row(original, code, compare)
        return compare

    return add


def assert_close(got: Any, want: Any, bound: float) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=0, atol=bound)


def run(code: str, **names: Any) -> dict[str, Any]:
    exec(code, names)
    return names


def steps_of(model: Any, optimizer: Any, steps: int) -> Iterator[list[Tensor]]:
    for step in range(steps):
        tokens = models.tokens(step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield [param.detach().clone() for param in model.parameters()]


def assert_same_bits(pairs: list[tuple[Any, Any]], steps: int) -> None:
    """Of two (model, optimizer), after every step; all matrices have changed in the end."""
    start = [param.detach().clone() for param in pairs[0][0].parameters()]
    for step, (one, other) in enumerate(zip(*(steps_of(*pair, steps) for pair in pairs), strict=True)):
        assert all(map(torch.equal, one, other)), f"step {step}"
    assert sum(not torch.equal(before, after) for before, after in zip(start, one, strict=True)) >= len(start) // 2


@row("BlockOptimizer", "badam.BlockOptimizer", BADAM_ASCENDING)
def block_optimizer(tools: Tools) -> None:
    """Over a switch, of a period that is cut to six steps.

    The original's first period is one step too short, which `num_steps = 1` makes ours.
    """
    pairs, code = [], BADAM_ASCENDING.replace("switch_block_every=50", "switch_block_every=6")
    for package in ("badam", "colossal_bcd.compat"):
        model: Any = models.llama().bfloat16()
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer = run(renamed(code, package), model=model, original_optimizer=base)["optimizer"]
        pairs.append((model, optimizer))
    assert type(pairs[1][1]) is compat.BlockOptimizer
    pairs[1][1].num_steps = 1
    first = set(pairs[1][1].active_names())
    assert_same_bits(pairs, 9)
    assert not first & set(pairs[1][1].active_names())


@row("badam_partition", "badam.BlockOptimizer with embedding and head, whose blocks are those of its first release")
def badam_partition(tools: Tools) -> None:
    period, layers = 2, 3
    options: dict[str, Any] = {"switch_block_every": period, "switch_mode": "ascending"}
    one, other = models.llama(layers=layers), models.llama(layers=layers)
    bases = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (one, other)]
    pairs = list(one.named_parameters())
    original = badam.BlockOptimizer(bases[0], pairs, **options, include_embedding=True, include_lm_head=True)
    blocks = compat.badam_partition(other.named_parameters())
    ours: Any = compat.BlockOptimizer(bases[1], other.named_parameters(), blocks, **options)
    assert [set(block) for block in blocks] == [
        {name for name, _ in pairs if any(prefix in name for prefix in prefixes)}
        for prefixes in original.block_prefix_list
    ]
    ours.num_steps = 1
    assert_same_bits([(one, original), (other, ours)], period * (layers + 2) + 1)


class Embedded(nn.Module):
    """Tensors of 100 values and more: below that the original's threshold has no effect, though documented."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.Sequential(nn.Linear(8, 110), nn.Tanh(), nn.Linear(110, 9, bias=False))
        self.lm_head = nn.Linear(9, 20, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.lm_head(self.layers(self.embed(input_ids % 20)))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten() % 20))


def ratio(code: str, name: str, original: str) -> None:
    """Over two switches, of a period that is cut to three steps."""
    code = code.replace("switch_every=100", "switch_every=3")
    weights = []
    for ours in (True, False):
        model = Embedded().double()
        groups = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0).param_groups
        code_of = renamed(code) if ours else renamed(code, "badam").replace(name, original)
        optimizer = run(code_of, param_groups=groups, self=SimpleNamespace(model=model))["optimizer"]
        assert type(optimizer) is getattr(compat if ours else badam, name if ours else original)
        weights.append(list(steps_of(model, optimizer, 8)))
    # The steps are of 1e-6 and 1e-5; float64 rounds the weights by 1e-17.
    for got, want in zip(*weights, strict=True):
        assert_close(got, want, 1e-15)
    changed = [(one != other).double().mean() for one, other in zip(Embedded().double().parameters(), got, strict=True)]
    assert changed == pytest.approx([0, 0.3, 0.3, 0.3, 0], abs=0.01)


@row("BlockOptimizerRatio", "badam.BlockOptimizerRatio", RATIO)
def block_optimizer_ratio(tools: Tools) -> None:
    ratio(RATIO, "BlockOptimizerRatio", "BlockOptimizerRatio")


@row("SparseGradOptimizer", "badam.BlockOptimizerRatio, the same class under its later name", SPARSE)
def sparse_grad_optimizer(tools: Tools) -> None:
    ratio(SPARSE, "SparseGradOptimizer", "BlockOptimizerRatio")


@row("BAdamCallback", "badam.utils.BAdamCallback around badam.BlockOptimizer in transformers.Trainer", CALLBACK)
def badam_callback(tools: Tools) -> None:
    """The same bits, with clipping, accumulation and a schedule, over two switches."""
    weights = []
    for ours, package in ((False, "badam.utils"), (True, "colossal_bcd.compat")):
        model: Any = models.llama()
        make: Any = compat.BlockOptimizer if ours else badam.BlockOptimizer
        base = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        optimizer = make(base, list(model.named_parameters()), switch_block_every=3, switch_mode="ascending")
        if ours:
            optimizer.num_steps = 1

        def your_trainer_class(_: Any, callbacks: Any, model: Any = model, optimizer: Any = optimizer) -> Any:
            return trainer_of(model, optimizer, tools.folder, callbacks=callbacks, save_strategy="no")

        names = run(renamed(CALLBACK, package), original_callbacks=Callbacks(), YourTrainerClass=your_trainer_class)
        callback = compat.BAdamCallback if ours else badam.utils.BAdamCallback
        assert any(type(one) is callback for one in names["trainer"].callback_handler.callbacks)
        names["trainer"].train()
        weights.append(list(model.parameters()))
    assert all(map(torch.equal, *weights))
    assert sum(not torch.equal(a, b) for a, b in zip(models.llama().parameters(), weights[0], strict=True)) > 10


@row("clip_grad_norm_old_version", "badam.utils.clip_grad_norm_old_version, a method of accelerate's Accelerator")
def clipping(tools: Tools) -> None:
    """Norm and gradients of whole tensors, clipped and not; shares are clipped in test_llamafactory.py."""
    for clip in (badam.utils.clip_grad_norm_old_version, compat.clip_grad_norm_old_version):
        for max_norm, factor in ((1e6, 1.0), (0.5, 0.5 / 5)):
            params = [nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(3)]
            params[0].grad, params[1].grad = (params[0] + 3).detach(), (params[1] + 4).detach()
            norm = clip(Accelerator(), params, max_norm)
            assert_close([norm], [torch.tensor(5.0, dtype=torch.float64)], EXACT)
            # torch adds 1e-6 to the norm by which it divides.
            grads = [param.grad for param in params[:2]]
            assert_close(grads, [torch.tensor([each * factor], dtype=torch.float64) for each in (3, 4)], 1e-6)
            assert params[2].grad is None
