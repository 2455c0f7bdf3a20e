"""Train a causal language model with block coordinate descent, or all of it at once, under a ColossalAI plugin.

    colossalai run --nproc_per_node 2 examples/finetune/main.py            # or: torchrun --nproc_per_node 2 ...
    python examples/finetune/main.py --reference --ranks 2 --no-save       # the same losses on one process

Without files it trains a small Llama from random weights on the text that ships with CPython; no GPU is needed.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import click

sys.path.append(str(Path(__file__).parents[1] / "tuning"))

from interrupt import stop_request
from settings import LOW_RANK, Settings, SettingsError

STARTED = time.monotonic()
DEFAULT_LR = {
    "adamw": 2e-3,
    "lamb": 1e-2,
    "adafactor": 3e-2,
    "came": 5e-4,
    "galore": 1e-2,
    "golore": 1e-2,
    "galore-8bit": 1e-2,
    "galore-sgd": 2e-1,
    "galore-adafactor": 3e-2,
}
BLOCK_LR = {"adamw": 6e-3, "lamb": 2e-2, "adafactor": 6e-2, "came": 1.5e-3}
"""Of a block's optimizer: blocks take turns, so that each has fewer steps."""
DEFAULT_STAGE = {"zero": 2, "hybrid": 1, "ddp": 0}


@click.command(context_settings={"show_default": True})
@click.option("--optimizer", type=click.Choice(["badam", *DEFAULT_LR]), default="badam")
@click.option("--base", type=click.Choice([*BLOCK_LR]), help="What trains a block (badam).  [default: adamw]")
@click.option("--rank", type=click.IntRange(1), help="Of the projections (galore, golore).  [default: 32]")
@click.option("--gap", type=click.IntRange(1), help="Steps between refreshes (galore, golore).  [default: 50]")
@click.option("--scale", type=click.FloatRange(0), help="Of projected updates (galore, golore).  [default: 0.25]")
@click.option("--plugin", type=click.Choice(["zero", "hybrid", "ddp"]), default="zero")
@click.option("--gather-images", is_flag=True, help="Gather low-rank updates, not weights (galore, golore; zero).")
@click.option("--tp", type=click.IntRange(1), default=1, help="Tensor-parallel ranks (hybrid).")
@click.option("--zero-stage", type=click.IntRange(0, 2), help="[default: 2 for zero, 1 for hybrid (0 in fp32)]")
@click.option("--precision", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16")
@click.option("--steps", type=click.IntRange(1), default=600, help="Optimizer steps.")
@click.option("--switch-every", type=click.IntRange(1), help="Steps on one block (badam).  [default: 10]")
@click.option("--switch-mode", type=click.Choice(["random", "ascending", "descending", "fixed"]), help="Block order.")
@click.option(
    "--embeddings/--no-embeddings", default=None, help="Blocks for embedding and head.  [default: yes, without --model]"
)
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="[default: by optimizer]")
@click.option("--batch-size", type=click.IntRange(1), default=16, help="Sequences per step, all ranks together.")
@click.option("--accumulate", type=click.IntRange(1), default=1, help="Backward passes per step.")
@click.option("--sequence-length", type=click.IntRange(2), default=128)
@click.option("--clip", type=click.FloatRange(0), default=0.0, help="Largest gradient norm; 0 does not clip.")
@click.option("--eval-every", type=click.IntRange(1), default=60, help="Steps between held-out losses.")
@click.option("--seed", type=int, default=0)
@click.option(
    "--model", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Local HF model directory."
)
@click.option("--text", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Local .txt or .jsonl file.")
@click.option("--tokenizer", type=click.Choice(["bpe", "byte"]), default="bpe", help="Trained on the text.")
@click.option("--vocab-size", type=click.IntRange(257), default=1024, help="Of the trained tokenizer.")
@click.option("--hidden-size", type=click.IntRange(32), default=160, help="Of the model from random weights.")
@click.option("--layers", type=click.IntRange(1), default=4, help="Of the model from random weights.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=Path("demo"))
@click.option(
    "--tensorboard", type=click.Path(path_type=Path, file_okay=False), help="Folder of events for TensorBoard."
)
@click.option("--save/--no-save", default=True, help="Write the trained model to OUTPUT/model.")
@click.option(
    "--checkpoint-every",
    type=click.IntRange(0),
    help="Steps between checkpoints in OUTPUT/checkpoints; 0: when interrupted.  [default: 100]",
)
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint, on any number of ranks.")
@click.option("--reference", is_flag=True, help="One process does the work of --ranks ranks, without ColossalAI.")
@click.option("--ranks", type=click.IntRange(1), help="Ranks that --reference stands for.  [default: 2]")
def main(**flags: Any) -> None:
    """Train a causal language model; results go to OUTPUT."""
    try:
        settings = settings_of(flags, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    except SettingsError as error:
        raise click.UsageError(str(error)) from error
    # ColossalAI and bitsandbytes announce optional kernels that they do without, once per rank.
    warnings.filterwarnings("ignore", module="colossalai")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Imported here, so that wrong flags are told at once.
    from events import require_tensorboard
    from training import run

    try:
        if settings.tensorboard is not None:
            require_tensorboard()
        run(settings, started=STARTED)
    except SettingsError as error:
        raise click.UsageError(str(error)) from error


def settings_of(flags: dict[str, Any], world_size: int) -> Settings:
    """Fill in the defaults that depend on other flags.

    Raises:
        SettingsError: flags contradict each other or the number of processes.
    """
    flags = dict(flags)
    ranks = flags.pop("ranks")
    if flags["reference"]:
        if world_size > 1:
            raise SettingsError(f"--reference runs on one process, got {world_size}. Start it with python.")
        world_size = ranks or 2
        if flags["resume"] or flags["checkpoint_every"] is not None:
            raise SettingsError("--reference keeps no checkpoints. Leave --resume and --checkpoint-every out.")
    elif ranks is not None:
        raise SettingsError("--ranks says what --reference stands for; give both, or start more processes.")
    if flags["checkpoint_every"] is None:
        flags["checkpoint_every"] = 100
    if flags["optimizer"] != "badam":
        for name in ("base", "switch_every", "switch_mode", "embeddings"):
            if flags[name] is not None:
                raise SettingsError(
                    f"--{name.replace('_', '-')} is about blocks, got --optimizer {flags['optimizer']}. Leave it out."
                )
    if flags["optimizer"] not in LOW_RANK:
        for name in ("rank", "gap", "scale"):
            if flags[name] is not None:
                raise SettingsError(
                    f"--{name} is about projections, got --optimizer {flags['optimizer']}. Leave it out, or use "
                    f"{' or '.join(LOW_RANK)}."
                )
    if flags["model"] is not None and flags["tokenizer"] == "byte":
        raise SettingsError("--tokenizer byte does not fit --model, which has its own tokenizer. Leave it out.")
    if flags["zero_stage"] is None:
        fp32_hybrid = flags["plugin"] == "hybrid" and flags["precision"] == "fp32"
        flags["zero_stage"] = 0 if fp32_hybrid else DEFAULT_STAGE[flags["plugin"]]
    if flags["embeddings"] is None:
        flags["embeddings"] = flags["model"] is None
    flags["switch_every"] = flags["switch_every"] or 10
    flags["rank"], flags["gap"] = flags["rank"] or 32, flags["gap"] or 50
    flags["scale"] = 0.25 if flags["scale"] is None else flags["scale"]
    flags["switch_mode"] = flags["switch_mode"] or "random"
    blockwise = flags["optimizer"] == "badam"
    flags["base"] = flags["base"] or ("adamw" if blockwise else flags["optimizer"])
    flags["lr"] = flags["lr"] or (BLOCK_LR if blockwise else DEFAULT_LR)[flags["base"]]
    return Settings(world_size=world_size, **flags)


def entry() -> int:
    """Run the command; errors in flags are shown once, by rank 0, and end every rank with the same code."""
    try:
        main.main(standalone_mode=False)
    except click.ClickException as error:
        if os.environ.get("RANK", "0") == "0":
            error.show()
        else:
            # The launcher ends all ranks when the first one fails: let rank 0 speak before that.
            time.sleep(3)
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    return 130 if stop_request.received else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop_request)
    signal.signal(signal.SIGTERM, stop_request)
    sys.exit(entry())
