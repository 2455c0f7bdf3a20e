"""Two small tasks from the docstrings of the Python standard library, in GLUE's file formats.

    python examples/glue/make_data.py glue_data

`glue_data/stdlib` asks which family of modules a docstring is of; `glue_data/QNLI`, in the format of that task, whether
a docstring belongs to a function.  Whole modules are held out, so that no function or class beside one that was trained
on is asked for.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

sys.path.append(str(Path(__file__).parents[1] / "tuning"))

from docstrings import pairs

FAMILIES = {
    "code": "ast bdb dis doctest importlib inspect pdb pkgutil pydoc symtable tokenize trace traceback typing unittest",
    "concurrency": "asynchat asyncio asyncore concurrent multiprocessing queue sched selectors subprocess threading",
    "files": "_pyio bz2 filecmp fileinput fnmatch genericpath glob gzip lzma ntpath os pathlib posixpath shutil stat "
    "tarfile tempfile zipfile",
    "internet": "cgi email ftplib http imaplib mailbox nntplib poplib smtplib socket socketserver ssl telnetlib urllib "
    "wsgiref xmlrpc",
    "numbers": "_pydecimal bisect calendar datetime fractions heapq numbers random statistics",
    "screen": "curses tkinter turtle",
    "text": "codecs configparser csv difflib encodings gettext html json locale re string textwrap xml",
}
EVERY = 4
"""Of the modules of a family, in the order of their names, every fourth is held out."""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def main(folder: Path) -> None:
    """Write both tasks below FOLDER."""
    records = list(pairs())
    for name, files in {"stdlib": families(records), "QNLI": belonging(records)}.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for part, (header, *lines) in zip(("train", "dev"), files, strict=True):
            path = folder / name / f"{part}.tsv"
            # So that the first lines are a sample.
            random.Random(0).shuffle(lines)
            lines.insert(0, header)
            path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
            click.echo(f"{path}: {len(lines) - 1} records")


def families(records: Iterable[dict[str, Any]]) -> tuple[list[list[str]], list[list[str]]]:
    """Lines of a docstring and its family to train on, and held-out ones; no docstring is in both."""
    family = {module: name for name, modules in FAMILIES.items() for module in modules.split()}
    of_family: dict[str, list[dict[str, Any]]] = {name: [] for name in FAMILIES}
    for record in records:
        if name := family.get(record["module"].partition(".")[0]):
            of_family[name].append(record)
    train, held_out = dict[str, str](), dict[str, str]()
    for name, found in of_family.items():
        for record, is_held_out in _divided(found):
            (held_out if is_held_out else train).setdefault(_line(record["output"]), name)
    header = ["sentence", "label"]
    return (
        [header, *([text, name] for text, name in train.items())],
        [header, *([text, name] for text, name in held_out.items() if text not in train)],
    )


def belonging(records: Iterable[dict[str, Any]], seed: int = 0) -> tuple[list[list[str]], list[list[str]]]:
    """Lines of QNLI's columns to train on, and held-out ones: each function with its docstring or another's.

    The others are of the same module where it has some, so that what a module is about does not tell.
    """
    draw, header = random.Random(seed), ["index", "question", "sentence", "label"]
    lines: tuple[list[list[str]], list[list[str]]] = ([header], [header])
    of_module: dict[str, list[dict[str, Any]]] = {}
    divided = list(_divided(list(records)))
    for record, _ in divided:
        of_module.setdefault(record["module"], []).append(record)
    for record, is_held_out in divided:
        others = [each for each in of_module[record["module"]] if each["output"] != record["output"]]
        answer, label = record["output"], "entailment"
        if others and draw.random() < 0.5:
            answer, label = draw.choice(others)["output"], "not_entailment"
        part = lines[is_held_out]
        part.append([str(len(part) - 1), _line(answer), _line(record["input"]), label])
    return lines


def _divided(records: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], bool]]:
    """Each record, and whether its module is held out."""
    held_out = set(sorted({record["module"] for record in records})[::EVERY])
    return ((record, record["module"] in held_out) for record in records)


def _line(text: str) -> str:
    """Without what would end a column or a line."""
    return " ".join(text.split())


if __name__ == "__main__":
    main()
