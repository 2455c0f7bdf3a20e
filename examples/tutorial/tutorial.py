"""ColossalAI's walk-through of distributed optimizers, on CPUs or GPUs: README.md goes through it line by line.

    colossalai run --nproc_per_node 4 examples/tutorial/tutorial.py --optimizer lamb      # or: torchrun ..., python ...

A small Llama with random weights trains under tensor parallelism and ZeRO-2, is saved, and goes on under ZeRO alone.
"""

from __future__ import annotations

import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

sys.path.append(str(Path(__file__).parents[1] / "tuning"))

from records import DataError
from transformers import LlamaConfig, LlamaModel
from tuning import CONTEXT, entry, launch

HEADS = 4
CLASSES = {
    "lamb": {
        "distributed": "colossalai.nn.optimizer:DistributedLamb",
        "single": "colossalai.nn.optimizer:Lamb",
        "compat": "colossal_bcd.compat:DistributedLamb",
    },
    "adafactor": {
        "distributed": "colossalai.nn.optimizer:DistributedAdaFactor",
        "single": "colossalai.nn.optimizer:Adafactor",
        "compat": "colossal_bcd.compat:DistributedAdaFactor",
    },
    "came": {
        "distributed": "colossalai.nn.optimizer:DistributedCAME",
        "single": "colossalai.nn.optimizer:CAME",
        "compat": "colossal_bcd.compat:DistributedCAME",
    },
    # ColossalAI's own passes arguments that bitsandbytes 0.50 does not take.
    "galore": {"compat": "colossal_bcd.compat:DistGaloreAwamW"},
    "adam": {"single": "torch.optim:Adam"},
}
"""What a user may have written, by `--optimizer` and `--classes`; the first one of each is the default."""


@dataclass(frozen=True)
class Boosted:
    """What training needs."""

    booster: Any
    model: Any
    optimizer: Any
    criterion: Any
    asked: type
    """Class of the user's optimizer."""


def network(seed: int) -> nn.Module:
    """A Llama whose weights depend on the seed alone."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    model: nn.Module = LlamaModel(LlamaConfig(vocab_size=128, use_cache=False, **shape))
    return model


def optimizer_of(model: nn.Module, name: str, classes: str) -> Optimizer:
    """The optimizer as the user has made it before boosting."""
    cls: Any = pkgutil.resolve_name(CLASSES[name][classes])
    if name == "came":
        made: Optimizer = cls(model.parameters(), lr=1e-3)
    elif name == "galore":
        from colossal_bcd.compat import get_galore_param_groups

        groups = get_galore_param_groups(model, weight_decay=1e-2, rank=8, update_proj_gap=5)
        made = cls(groups, lr=1e-2, nbits=8, percentile_clipping=100, block_wise=True, min_8bit_size=4096)
    else:
        made = cls(model.parameters())
    return made


def boosted(plugin: Any, name: str, classes: str, seed: int) -> Boosted:
    """A model and its optimizer under a plugin."""
    from colossalai.booster import Booster

    model, booster = network(seed), Booster(plugin=plugin)
    optimizer = optimizer_of(model, name, classes)
    asked = type(optimizer)
    # The mean of the hidden states, as in the walk-through: what it lowers means nothing, but goes down.
    wrapped, engine, criterion, *_ = booster.boost(model, optimizer, Tensor.mean)
    return Boosted(booster, wrapped, engine, criterion, asked)


def train(run: Boosted, steps: int) -> list[float]:
    """Take some steps; the loss of each."""
    from colossalai.utils import get_current_device

    losses = []
    for _ in range(steps):
        tokens = torch.ones(1, 100, dtype=torch.int, device=get_current_device())
        hidden = run.model(tokens, tokens.clone()).last_hidden_state
        loss = run.criterion(hidden)
        run.booster.backward(loss, run.optimizer)
        run.optimizer.step()
        run.optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def full_name(cls: type) -> str:
    """The package that a class is of, and its name."""
    return f"{cls.__module__.partition('.')[0]}'s {cls.__name__}"


def say(line: str) -> None:
    """Print on the first rank."""
    if dist.get_rank() == 0:
        click.echo(line)


@click.command(context_settings=CONTEXT)
@click.option("--optimizer", type=click.Choice(list(CLASSES)), default="adafactor")
@click.option(
    "--classes",
    type=click.Choice(["distributed", "single", "compat"]),
    help="ColossalAI's distributed class, its class for one process, or this package's of the same call.  "
    "[default: distributed; galore: compat; adam: single]",
)
@click.option("--tp", type=click.IntRange(1), help="Tensor-parallel ranks.  [default: 2; on one rank 1]")
@click.option("--steps", type=click.IntRange(1), default=10)
@click.option("--precision", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint, on any number of ranks.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=Path("tutorial"))
def main(**flags: Any) -> None:
    """Train on a mesh, save, load on another one, and go on there and here."""
    walk(**flags)


def walk(
    optimizer: str, classes: str | None, tp: int | None, steps: int, precision: str, resume: bool, output: Path
) -> dict[str, list[float]]:
    """Run the program on this rank.

    Args:
        optimizer: a key of `CLASSES`.
        classes: which class of it; None: its first.
        tp: tensor-parallel ranks; None: two, if there are.
        steps: to take before the checkpoint.
        precision: of the plugins.
        resume: begin with the newest checkpoint.
        output: folder of checkpoints.
    Returns:
        Losses before the checkpoint, and after it on the same mesh and on the other one.
    Raises:
        DataError: flags or checkpoints do not fit.
    """
    classes = classes or next(iter(CLASSES[optimizer]))
    if classes not in CLASSES[optimizer]:
        raise DataError(f"--classes {classes}: {optimizer} has {', '.join(CLASSES[optimizer])} alone. Give that.")
    launch()
    from colossal_bcd.booster import CheckpointFolder, HybridParallelPlugin, LowLevelZeroPlugin, explain

    size = dist.get_world_size()
    tp = tp or min(size, 2)
    if size % tp or HEADS % tp:
        raise DataError(f"--tp {tp} does not divide {size} ranks and {HEADS} heads. Give 1, 2 or 4 that does.")
    folder = CheckpointFolder(output / "checkpoints", keep_last=2)
    begin = first_step(folder, optimizer, resume)

    plugin = HybridParallelPlugin(
        tp_size=tp, zero_stage=2, pp_size=1, precision=precision, enable_all_optimization=torch.cuda.is_available()
    )
    run = boosted(plugin, optimizer, classes, seed=0)
    say(f"{full_name(run.asked)} is trained as {full_name(type(run.optimizer.optim))}, tp {tp} x zero {size // tp}")
    say(explain(run.optimizer))
    if begin:
        folder.load(run.booster, run.model, run.optimizer, step=begin)
    before = train(run, steps)
    for step, loss in enumerate(before, begin + 1):
        say(f"step {step}: loss {loss:.4f}")
    folder.save(run.booster, run.model, run.optimizer, step=begin + steps, extra={"optimizer": optimizer})
    say(f"saved {folder.folder(begin + steps)}")

    other = boosted(LowLevelZeroPlugin(stage=1, precision=precision), optimizer, classes, seed=1)
    folder.load(other.booster, other.model, other.optimizer)
    here, there = train(run, 3), train(other, 3)
    for step, losses in enumerate(zip(here, there, strict=True), begin + steps + 1):
        say(f"step {step}: loss {losses[0]:.4f}, from the checkpoint on zero {size} {losses[1]:.4f}")
    return {"before": before, "here": here, "there": there}


def first_step(folder: Any, optimizer: str, resume: bool) -> int:
    """Steps that the newest checkpoint has, 0 without one.

    Raises:
        DataError: there is one which is not asked for, or of another optimizer.
    """
    saved = folder.peek()
    if saved is None:
        return 0
    if not resume:
        raise DataError(
            f"{folder.path} has step {saved.step} of an earlier run. Go on with --resume, or give another --output."
        )
    if saved.extra["optimizer"] != optimizer:
        raise DataError(
            f"--resume: {folder.path} is of --optimizer {saved.extra['optimizer']}, got {optimizer}. Give the same, or "
            "another --output."
        )
    return int(saved.step)


if __name__ == "__main__":
    sys.exit(entry(main))
