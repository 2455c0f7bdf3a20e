"""Time what a switch of blocks costs, against an optimizer step of the same run without one.

    python benchmarks/switches.py
    python benchmarks/switches.py --case zero2 --hidden 1024 --layers 4 --switches 20

It starts its own ranks; no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import click
import torch
from common import environment, heading, llama, row, seconds, slowest
from torch import Tensor

from colossal_bcd import AdamW, BlockOptimizer
from colossal_bcd.testing import run_ranks

PERIOD = 3
"""Steps in a block: enough that a switch is not the usual case, few enough that there are many."""
HEADER = ("mesh", "ranks", "switch / step", "switch, ms", "optimizer step, ms", "forward and backward, ms")
HYBRID = {"tp_size": 2, "pp_size": 1, "precision": "bf16"}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "zero2": (2, {"stage": 2, "precision": "bf16"}),
    "tp2": (2, {**HYBRID, "zero_stage": 0}),
    "tp2+zero2": (4, {**HYBRID, "zero_stage": 2}),
}


@dataclass(frozen=True, kw_only=True)
class Times:
    """Milliseconds of the slowest rank."""

    passes: list[float]
    """Forward and backward."""
    steps: list[float]
    """`optimizer.step()` where the block stays."""
    switching: list[float]
    """`optimizer.step()` that ends with a switch."""

    def line(self, case: str, num_ranks: int) -> str:
        """One line of the table; a switch is what its step takes longer than the others."""
        step = median(self.steps)
        switch = median(self.switching) - step
        times = (f"{value:.1f}" for value in (switch, step, median(self.passes)))
        return row([case, num_ranks, f"**{switch / step:.2f}**", *times])


def measure(case: str, hidden: int, layers: int, switches: int) -> Times:
    """What each rank runs: block-trained AdamW on a Llama in bfloat16."""
    from colossalai.booster import Booster

    from colossal_bcd.booster import HybridParallelPlugin, LowLevelZeroPlugin

    model: Any = llama(hidden, layers).bfloat16()
    options = CASES[case][1]
    plugin = (LowLevelZeroPlugin if "stage" in options else HybridParallelPlugin)(**options)
    optimizer = BlockOptimizer(
        AdamW(model.parameters(), lr=1e-4), list(model.named_parameters()), switch_block_every=PERIOD, verbose=0
    )
    engine: Any
    booster = Booster(plugin=plugin)
    model, engine, *_ = booster.boost(model, optimizer)
    times = Times(passes=[], steps=[], switching=[])
    for step in range(PERIOD * (switches + 1)):
        tokens = torch.randint(0, 1024, (1, 32), generator=torch.Generator().manual_seed(step))
        passes = seconds(partial(_backward, booster, model, engine, tokens))
        stepped = seconds(engine.step)
        engine.zero_grad()
        if step < PERIOD:
            continue  # warm-up
        times.passes.append(passes)
        # The step after a switch also allocates the new block's state; it is one of the others.
        (times.switching if step % PERIOD == PERIOD - 1 else times.steps).append(stepped)
    return Times(**{name: [1000 * value for value in slowest(values)] for name, values in vars(times).items()})


def _backward(booster: Any, model: Any, engine: Any, tokens: Tensor) -> None:
    booster.backward(model(tokens, labels=tokens).loss, engine)


@click.command(help=(__doc__ or "").partition("\n")[0], context_settings={"show_default": True})
@click.option("--case", "cases", type=click.Choice(list(CASES)), multiple=True, help="[default: zero2 and tp2]")
@click.option("--hidden", type=click.IntRange(16), default=512)
@click.option("--layers", type=click.IntRange(2), default=8)
@click.option("--switches", type=click.IntRange(1), default=15, help="Measured ones, after one of warm-up.")
def main(cases: Sequence[str], hidden: int, layers: int, switches: int) -> None:
    """Print one markdown table."""
    torch.set_num_threads(1)
    model = f"Llama of {layers} layers of width {hidden}, medians over {switches} switches."
    click.echo(f"{environment('colossalai')} {model}\n\n{heading(HEADER)}")
    for case in cases or ("zero2", "tp2"):
        ranks = CASES[case][0]
        times = run_ranks(ranks, measure, case, hidden, layers, switches, timeout=1200.0)[0]
        click.echo(times.line(case, ranks))


if __name__ == "__main__":
    main()
