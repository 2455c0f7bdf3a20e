"""The command `colossal-bcd`.

commands      what a user types, and how wrong input is said
models        MODEL: a preset, a config.json or a folder with one; built without memory
optimizers    names of optimizers, and what each trains
meshes        which part of which weight a GPU has, without any process
budget        `estimate`: bytes of one GPU, and what a step sends
explained     `partition` and `explain`: blocks, and a line for every parameter
self_test     `doctor`: versions, accelerators, and a step on two ranks
certificate   `verify`: local ranks against one process
tables        everything as rich tables and a plot
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command with the arguments of this process."""
    try:
        from colossal_bcd.cli.commands import cli
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        sys.exit(f"colossal-bcd: {error.name} is not installed. Run: pip install 'colossal_bcd[cli]'")
    cli()
