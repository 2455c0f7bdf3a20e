"""What a user types.  Wrong input is one line on standard error that says what to do, and exit code 2."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console

import colossal_bcd

VERSION_OF_JSON = 1
"""Of the form of what `--json` prints; it grows when a key goes or changes its meaning."""


class OneLine(click.Group):
    """A group of commands whose errors are one line."""

    def main(self, *args: Any, **options: Any) -> NoReturn:
        """Run, and end the process: 0 for success, 1 for a verdict that is not good, 2 for wrong input."""
        options["standalone_mode"] = False
        try:
            code = super().main(*args, **options)
        except click.ClickException as error:
            _end(error.format_message(), getattr(error, "ctx", None))
        except click.Abort:
            sys.exit(130)
        except (ValueError, TypeError, ImportError, OSError) as error:
            _end(str(error))
        sys.exit(code if isinstance(code, int) else 0)


def _end(message: str, context: click.Context | None = None) -> NoReturn:
    line = " ".join(message.split())
    if context is not None:
        line = f"{line.rstrip('.')}. See: {context.command_path} --help"
    click.echo(f"colossal-bcd: {line}", err=True)
    sys.exit(2)


@click.group(cls=OneLine, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(colossal_bcd.__version__, prog_name="colossal-bcd")
def cli() -> None:
    r"""Bytes, blocks and parity of memory-efficient optimizers, before a run and without a GPU.

    MODEL is a preset (llama-3-8b, qwen3-8b, roberta-large, ...), a config.json, or a folder with one. Nothing is
    downloaded and nothing as large as a model is allocated.

    \b
    colossal-bcd doctor
    colossal-bcd estimate llama-3-8b --optimizer badam --batch 2 --checkpointing
    colossal-bcd estimate llama-3-8b --compare adamw,lora,galore,badam --plot memory.png
    colossal-bcd verify llama-3-8b --layers 2 --vocab 1000 --width 32 --gpus 2 --zero 2
    """
    warnings.filterwarnings("ignore")


def _options(*names: str) -> Callable[[Any], Any]:
    """The options of these names, in this order."""

    def add(command: Any) -> Any:
        for name in reversed(names):
            command = OPTIONS[name](command)
        return command

    return add


OPTIONS: dict[str, Callable[[Any], Any]] = {
    "model": click.argument("model"),
    "optimizer": click.option(
        "--optimizer", "-o", default="adamw", show_default=True,
        help="badam, galore, golore, galore-8bit, adamw-8bit, lora, or a class in lower case: lamb, came, ...",
    ),
    "blocks": click.option(
        "--blocks", type=click.IntRange(0),
        help="Layers of a block of block coordinate descent; 0: no blocks. [default: 1 for badam, else 0]",
    ),
    "layers_of_a_block": click.option(
        "--blocks", type=click.IntRange(1), default=1, show_default=True, help="Layers of a block."
    ),
    "rank": click.option(
        "--rank", type=click.IntRange(1), default=128, show_default=True, help="Of low-rank gradients and adapters."
    ),
    "lr": click.option("--lr", type=float, default=1e-4, show_default=True, help="Learning rate."),
    "gpus": click.option("--gpus", type=int, default=1, show_default=True, help="All of them: data x tp x pp."),
    "tp": click.option("--tp", type=int, default=1, show_default=True, help="Tensor-parallel ranks."),
    "pp": click.option("--pp", type=int, default=1, show_default=True, help="Pipeline stages."),
    "zero": click.option("--zero", type=int, default=0, show_default=True, help="ZeRO stage: 0, 1 or 2."),
    "sharded_weights": click.option(
        "--sharded-weights", is_flag=True, help="FSDP2, which is ZeRO 3: weights are divided, too."
    ),
    "precision": click.option(
        "--precision", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True,
        help="Of weights, gradients and activations.",
    ),
    "masters": click.option(
        "--masters/--no-masters", default=True, show_default=True, help="float32 masters of 16-bit weights that train."
    ),
    "batch": click.option(
        "--batch", "-b", type=int, default=1, show_default=True, help="Sequences of a GPU's (micro-)batch."
    ),
    "length": click.option(
        "--length", "-l", type=int, help="Tokens of a sequence. [default: 1024, or what the model takes]"
    ),
    "checkpointing": click.option("--checkpointing", "-c", is_flag=True, help="Gradient checkpointing of every layer."),
    "json": click.option("--json", "as_json", is_flag=True, help="Print JSON, as docs/command_line.md describes it."),
}  # fmt: skip
MESH = ("gpus", "tp", "pp", "zero", "sharded_weights")


@cli.command()
@_options("model", "optimizer", "rank", "blocks", *MESH, "precision", "masters", "batch", "length", "checkpointing")
@click.option("--compare", help="Several optimizers by name, separated by commas, in one table.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Write a picture: .png, .svg or .pdf.")
@_options("json")
def estimate(model: str, compare: str | None, plot: Path | None, as_json: bool, **options: Any) -> None:
    """Bytes of one GPU, what they fit on, and what a step sends.

    The model's own code runs on tensors without memory, so that activations are those of this model; masters, states
    and gradients follow from what the optimizer declares. Not counted are CUDA's context and the allocator's gaps.
    """
    from colossal_bcd.cli import tables
    from colossal_bcd.cli.budget import budget

    job = _job(model, **options)
    names = [job.optimizer] if compare is None else [name.strip() for name in compare.split(",") if name.strip()]
    if not names:
        raise ValueError("--compare: got no name, expected some, such as adamw,galore,badam.")
    jobs = [dataclasses.replace(job, optimizer=name) for name in names]
    known: dict[Any, Any] = {}
    found = [budget(each, known) for each in jobs]
    if plot is not None:
        tables.plot(found, plot)
    if as_json:
        _print_json({"estimates": [each.as_json() for each in found]})
    elif compare is None:
        tables.show_budget(Console(), found[0])
    else:
        tables.show_comparison(Console(), found)


@cli.command()
@_options("model", "layers_of_a_block")
@click.option("--embedding", is_flag=True, help="Also make a block of the embeddings.")
@click.option("--head", is_flag=True, help="Also make a block of the head.")
@_options("json")
def partition(model: str, blocks: int, embedding: bool, head: bool, as_json: bool) -> None:
    """The blocks that block coordinate descent makes of a model, and their sizes."""
    from colossal_bcd.cli import explained, tables

    found = explained.blocks_of(_job(model, blocks=blocks), embedding=embedding, head=head)
    if as_json:
        _print_json(found)
    else:
        tables.show_blocks(Console(), found)


@cli.command()
@_options("model", "optimizer", "rank", "blocks", "lr", *MESH, "precision", "masters")
@click.option("--match", default="", help="Only parameters whose name has this text.")
@_options("json")
def explain(model: str, match: str, as_json: bool, **options: Any) -> None:
    """What an optimizer does with each parameter on the first GPU.

    Rounds are the collectives in which it takes part in a step; bytes are its state and its master's.
    """
    from colossal_bcd.cli import explained, tables

    rows = explained.parameters_of(_job(model, **options))
    chosen = [row for row in rows if match in row["parameter"]]
    if not chosen:
        raise ValueError(
            f"--match: {match!r} is in no name; the first is {rows[0]['parameter']!r}. Take a part of one."
        )
    if as_json:
        _print_json({"parameters": chosen})
    else:
        tables.show_parameters(Console(), chosen)


@cli.command()
@click.option("--timeout", type=click.FloatRange(1), default=120, show_default=True, help="Seconds for the two ranks.")
@_options("json")
def doctor(timeout: float, as_json: bool) -> int:
    """Versions, accelerators, and a step of five optimizers on two ranks; exit code 1 if one is wrong."""
    from colossal_bcd.cli import self_test, tables

    _quiet_ranks()
    found = self_test.diagnosis(timeout)
    if as_json:
        _print_json(found)
        return int(not found["passed"])
    libraries = [(name, version or "not installed") for name, version in found["libraries"].items()]
    console, devices = Console(), ", ".join(found["devices"]) or "none that torch finds; everything runs on the CPU"
    rows = [("colossal_bcd", found["version"]), ("python", found["python"]), *libraries]
    tables.show_rows(
        console, "Installed", [*rows, ("accelerators", devices), ("backends", ", ".join(found["backends"]))]
    )
    errors = [(name, f"{error:.1e}") for name, error in found["errors"].items()]
    if errors:
        tables.show_rows(console, "Largest difference from one process, two ranks, float64", errors)
    if found["failure"]:
        console.print(f"failed: {found['failure']}", markup=False)
    console.print(
        "[green]passed[/green]" if found["passed"] else "[red]failed[/red]: do not train with this installation"
    )
    return int(not found["passed"])


@cli.command()
@_options("model", "optimizer", "rank", "blocks", "lr", *MESH)
@click.option("--layers", type=click.IntRange(1), help="Keep so many layers.")
@click.option("--vocab", type=click.IntRange(2), help="Keep so many tokens of the vocabulary.")
@click.option("--width", type=click.IntRange(1), default=1, show_default=True, help="Divide every width by this.")
@click.option(
    "--steps", type=click.IntRange(1), default=6, show_default=True, help="Of the run; blocks switch every 2."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights and gradients.")
@click.option(
    "--timeout", type=click.FloatRange(1), default=600, show_default=True, help="Seconds for each of two runs."
)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("certificate.json"), show_default=True,
    help="The certificate.",
)  # fmt: skip
@_options("json")
def verify(
    model: str, layers: int | None, vocab: int | None, width: int, output: Path, as_json: bool, **options: Any
) -> int:
    """Train on local CPU ranks and on one process, and compare every tensor; exit code 1 if one differs.

    Everything is float64, with gradients that are drawn and given to both, other ones on each data-parallel rank. The
    certificate says versions, config, mesh, optimizer, and the largest error of each tensor.
    """
    from colossal_bcd.cli import tables
    from colossal_bcd.cli.certificate import certificate
    from colossal_bcd.testing import RankError

    run = {name: options.pop(name) for name in ("steps", "seed", "timeout")}
    job = _job(model, **options)
    job = dataclasses.replace(job, model=job.model.shrunk(layers=layers, vocab=vocab, width=width))
    _quiet_ranks()
    try:
        found = {"version": VERSION_OF_JSON, **certificate(job, **run)}
    except RankError as error:
        raise ValueError(f"verify: a rank failed: {str(error).strip().splitlines()[-1]}") from None
    output.write_text(json.dumps(found, indent=2) + "\n")
    if as_json:
        _print_json(found)
    else:
        moved = sum(each["moved"] > 0 for each in found["tensors"].values())
        rows = [
            ("model", f"{found['model']['name']}, {found['model']['parameters']:,} parameters"),
            ("optimizer", f"{job.optimizer} on {job.mesh}"),
            ("run", f"{run['steps']} steps in float64; {moved} of {len(found['tensors'])} tensors trained"),
            ("largest error", f"{found['largest']['error']:.1e} in {found['largest']['tensor']}"),
            ("bound", f"{found['bound']:.0e} of the largest weight, or of 1"),
            ("verdict", found["verdict"]),
            ("certificate", str(output)),
        ]
        tables.show_rows(Console(), "Local ranks against one process", rows)
    return int(found["verdict"] != "equal")


def _job(model: str, **options: Any) -> Any:
    from colossal_bcd.cli.budget import Job
    from colossal_bcd.cli.meshes import MeshSize
    from colossal_bcd.cli.models import read_model

    mesh = MeshSize(**{name: options.pop(name) for name in MESH if name in options})
    chosen = read_model(model)
    if options.get("length", 0) is None:
        options["length"] = min(1024, chosen.longest or 1024)
    return Job(model=chosen, mesh=mesh, **options)


def _print_json(values: dict[str, Any]) -> None:
    click.echo(json.dumps({"version": VERSION_OF_JSON, **values}, indent=2))


def _quiet_ranks() -> None:
    """What libraries warn of while ranks import them is nothing that a user of these commands could change."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
