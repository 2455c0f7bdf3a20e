"""Time what a switch of blocks costs, against an optimizer step of the same run without one.

    python benchmarks/switch.py
    python benchmarks/switch.py --mesh "zero2 x2" --hidden 1024 --layers 4 --switches 20

Ranks train AdamW on blocks of one layer of a Llama each.  A switch is what the step that ends with one takes longer
than the others of the same run.  It starts its own ranks; no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from common import MESHES, Measured, Table, environment, in_turn, llama, ratio, to_file

from colossal_bcd import AdamW, BlockOptimizer
from colossal_bcd.testing import run_ranks

PERIOD = 3
"""Steps in a block: enough that a switch is not the usual case, few enough that there are many."""
HEADER = (
    "mesh", "switch / step", "switch / step, processor time", "switch, ms", "step, ms", "switch, processor ms",
    "step, processor ms", "forward and backward, ms",
)  # fmt: skip


def measure(mesh: str, hidden: int, layers: int, switches: int) -> dict[str, Measured]:
    """What each rank runs: every forward and backward pass, and every step of block-trained AdamW in bfloat16."""
    from colossalai.booster import Booster

    import colossal_bcd.booster

    model: Any = llama(hidden, layers).bfloat16()
    plugin = getattr(colossal_bcd.booster, MESHES[mesh].plugin)(**{**MESHES[mesh].options, "precision": "bf16"})
    optimizer = BlockOptimizer(
        AdamW(model.parameters(), lr=1e-4), list(model.named_parameters()), switch_block_every=PERIOD, verbose=0
    )
    engine: Any
    booster = Booster(plugin=plugin)
    model, engine, *_ = booster.boost(model, optimizer)

    def backward() -> None:
        engine.zero_grad()
        tokens = torch.randint(0, 1024, (1, 4), generator=torch.Generator().manual_seed(0))
        booster.backward(model(tokens, labels=tokens).loss, engine)

    return in_turn({"passes": backward, "steps": engine.step}, PERIOD * switches, PERIOD)


def cells(mesh: str, passes: Measured, steps: Measured) -> list[Any]:
    """A row, from all steps after the warm-up, of which every third ends with a switch."""

    def split(seconds: Sequence[float]) -> tuple[float, float]:
        """Milliseconds of a switch and of a step without one."""
        with_switch = median(seconds[PERIOD - 1 :: PERIOD])
        # The step after a switch also allocates the new block's state; it is one of the others.
        without = median(value for index, value in enumerate(seconds) if index % PERIOD != PERIOD - 1)
        return 1000 * (with_switch - without), 1000 * without

    (switch, step), (cpu_switch, cpu_step) = split(steps.wall), split(steps.cpu)
    times = (f"{value:.1f}" for value in (switch, step, cpu_switch, cpu_step, passes.ms))
    return [mesh, ratio(switch / step), f"{cpu_switch / cpu_step:.2f}", *times]


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--mesh", "meshes", type=click.Choice(list(MESHES)), multiple=True, help="Ranks.  [default: all]")
@click.option("--hidden", type=click.IntRange(16), default=512, help="Width of the Llama.")
@click.option("--layers", type=click.IntRange(2), default=8, help="Layers of the Llama, each a block.")
@click.option("--switches", type=click.IntRange(1), default=8, help="Measured ones, after one of warm-up.")
@to_file
def main(meshes: Sequence[str], hidden: int, layers: int, switches: int, output: Path | None) -> None:
    """Print one markdown table."""
    torch.set_num_threads(1)
    model = f"Llama of {layers} layers of width {hidden} in bf16, medians over {switches} switches."
    table = Table(f"{environment('colossalai', 'transformers')} {model}", HEADER, output)
    for mesh in meshes or MESHES:
        ranks = MESHES[mesh].num_ranks
        found = run_ranks(ranks, measure, mesh, hidden, layers, switches, timeout=1200.0)[0]
        table.add(cells(mesh, found["passes"], found["steps"]))


if __name__ == "__main__":
    main()
