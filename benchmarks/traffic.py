"""Count what ranks send in a training step, and time its optimizer step: blocks and low-rank gradients against all.

    python benchmarks/traffic.py
    python benchmarks/traffic.py --ranks 4 --hidden 512 --layers 16

ZeRO-2 ranks train a Llama in bfloat16 under the same plugin, all sides in turn: AdamW on everything and on one block of
D, GaLore with whole gradients, with low-rank ones, and with low-rank updates in the place of gathered weights.  Bytes
are those of the larger buffer of every collective of rank 0, in a step between refreshes and switches.  It starts its
own ranks; no GPU is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from common import ONE_STREAM, Measured, Table, environment, in_turn, llama, ratio, to_file

from colossal_bcd import AdamW, BlockOptimizer, GaLoreAdamW, param_groups
from colossal_bcd.testing import CollectiveCounter, run_ranks

HEADER = (
    "method", "against", "bytes / its bytes", "expected at most", "step / its step", "step / its step, processor time",
    "of gradients, kB", "of the step, kB", "collectives", "its collectives", "step, ms", "its step, ms",
)  # fmt: skip
WHOLE, BLOCK = "AdamW", "BAdam"
GALORE, LOW_RANK, UPDATES = "GaLore, whole gradients", "GaLore, low-rank gradients", "GaLore, low-rank updates"
PAIRS = ((BLOCK, WHOLE), (LOW_RANK, GALORE), (UPDATES, GALORE))
VOCAB = 256
"""Embedding and head train in no block: they are small here, so that D blocks are the model."""
ALWAYS = 10**6
"""Steps without a refresh or a switch: more than any run has."""


def _model(hidden: int, layers: int) -> Any:
    return llama(hidden, layers, VOCAB).bfloat16()


def _rank(hidden: int) -> int:
    return hidden // 16


def _optimizer(side: str, model: Any, hidden: int) -> torch.optim.Optimizer:
    if side in (WHOLE, BLOCK):
        base = AdamW(model.parameters(), lr=1e-4)
        named = list(model.named_parameters())
        return base if side == WHOLE else BlockOptimizer(base, named, switch_block_every=ALWAYS, verbose=0)
    groups = param_groups(model, rank=_rank(hidden), update_proj_gap=ALWAYS, scale=0.25)
    rounding: dict[str, Any] = {"rounding": "stochastic"} if side == UPDATES else {}
    return GaLoreAdamW(groups, lr=1e-4, svd_method="random", **rounding)


def _plugin_options(side: str) -> dict[str, Any]:
    from colossal_bcd.booster import LowRankOptions

    options: dict[str, Any] = {"stage": 2, "precision": "bf16", **ONE_STREAM}
    if side == GALORE:
        options["low_rank"] = LowRankOptions(reduce=False)
    if side == UPDATES:
        options |= {"master_weights": False, "low_rank": LowRankOptions(gather=True)}
    return options


def measure(hidden: int, layers: int, steps: int, warm_up: int) -> dict[str, tuple[Measured, int, int]]:
    """What each rank runs: the steps of each side, and bytes and collectives of its backward pass."""
    from colossalai.booster import Booster

    from colossal_bcd.booster import LowLevelZeroPlugin

    boosters, boosted = {}, {}
    for side in (WHOLE, BLOCK, GALORE, LOW_RANK, UPDATES):
        boosters[side] = Booster(plugin=LowLevelZeroPlugin(**_plugin_options(side)))
        model = _model(hidden, layers)
        boosted[side] = boosters[side].boost(model, _optimizer(side, model, hidden))[:2]
    counters = {side: CollectiveCounter() for side in boosted}
    tokens = torch.randint(0, VOCAB, (1, 4), generator=torch.Generator().manual_seed(0))

    def backward(side: str, step: int) -> None:
        model, engine = boosted[side]
        engine.zero_grad()
        loss = model(tokens, labels=tokens).loss
        if step != warm_up - 1:
            boosters[side].backward(loss, engine)
            return
        with counters[side] as counter:
            boosters[side].backward(loss, engine)
        assert counter.total > 0, "gradients travel in backward"

    found = in_turn({side: engine.step for side, (_, engine) in boosted.items()}, steps, warm_up, backward)
    return {side: (found[side], sum(counters[side].bytes.values()), counters[side].total) for side in found}


def expected(side: str, shapes: Iterable[tuple[str, tuple[int, ...]]], layers: int, rank: int) -> float:
    """Largest share of the bytes of the whole: of a block what the targets say, of low rank what the shapes say."""
    if side == BLOCK:
        return 1.2 / layers
    whole = low = 0
    for name, shape in shapes:
        projected = len(shape) == 2 and "layers." in name
        whole += math.prod(shape)
        low += rank * max(shape) if projected else math.prod(shape)
    # Gradients and weights travel in equal bytes.
    return low / whole if side == UPDATES else (low + whole) / (2 * whole)


def cells(side: str, against: str, found: Mapping[str, tuple[Measured, int, int]], limit: float) -> list[Any]:
    """A row."""
    (step, sent, calls), (its_step, its_sent, its_calls) = found[side], found[against]
    return [
        side,
        against,
        ratio((sent + step.num_bytes) / (its_sent + its_step.num_bytes), digits=4),
        f"{limit:.4f}",
        f"{step.ms / its_step.ms:.3f}",
        f"{step.cpu_ms / its_step.cpu_ms:.3f}",
        f"{sent / 1e3:.1f}",
        f"{step.num_bytes / 1e3:.1f}",
        calls + step.collectives,
        its_calls + its_step.collectives,
        f"{step.ms:.1f}",
        f"{its_step.ms:.1f}",
    ]


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--ranks", type=click.IntRange(2), default=2, help="ZeRO ranks.")
@click.option("--hidden", type=click.IntRange(16), default=512, help="Width of the Llama; projections have a 16th.")
@click.option("--layers", type=click.IntRange(2), default=8, help="Layers of the Llama, each a block.")
@click.option("--steps", type=click.IntRange(1), default=7, help="Measured steps of each side.")
@click.option("--warm-up", type=click.IntRange(2), default=3, help="Steps before these.")
@to_file
def main(ranks: int, hidden: int, layers: int, steps: int, warm_up: int, output: Path | None) -> None:
    """Print one markdown table."""
    torch.set_num_threads(1)
    shapes = [(name, tuple(param.shape)) for name, param in _model(hidden, layers).named_parameters()]
    about = (
        f"{environment('colossalai', 'transformers')} {ranks} ranks of ZeRO-2, Llama of width {hidden} with D = "
        f"{layers} layers, {sum(math.prod(shape) for _, shape in shapes) / 1e6:.1f} M values in bf16, rank "
        f"{_rank(hidden)}; 1 kB = 1000. Medians of {steps} steps after {warm_up} of warm-up."
    )
    table = Table(about, HEADER, output)
    found = run_ranks(ranks, measure, hidden, layers, steps, warm_up, timeout=1200.0)[0]
    for side, against in PAIRS:
        table.add(cells(side, against, found, expected(side, shapes, layers, _rank(hidden))))


if __name__ == "__main__":
    main()
