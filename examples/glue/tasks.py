"""Tasks of GLUE and SuperGLUE as rows of a table, the reader of their files, and their metrics.

n: records of a file.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from records import DataError, lines_of, objects_of, text_of
from torch import Tensor

Metric: TypeAlias = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A row of the table.  Texts are patterns over the fields of a record, such as "{word}: {sentence1}"."""

    folder: str
    """As the benchmark's archive has it."""
    first: str
    """The first text."""
    second: tuple[str, ...] = ()
    """Nothing, the second text, or several, of which the label says the one that goes with the first."""
    label: str = "label"
    """Field of the label."""
    labels: tuple[str, ...] = ()
    """What a label may be, in the order of the outputs; nothing: it is a number."""
    span: tuple[float, float] = (-math.inf, math.inf)
    """Where it is, if it is a number."""
    metrics: tuple[str, ...] = ("accuracy",)
    header: tuple[str, ...] = ()
    """Columns of a tsv file that has no line with their names."""
    held_out: tuple[str, ...] = ("dev", "val")
    """Names of files with held-out records, without what follows the dot; all that are there are read."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Field of jsonl files -> that of tsv files."""
    phrases: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Field -> what stands in the text for its values."""

    @property
    def choices(self) -> int:
        """Texts of which the label says one; 1: there are no choices."""
        return max(len(self.second), 1)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the model's outputs: one for each label, or a score alone."""
        return self.labels if self.labels and self.choices == 1 else ("score",)

    @property
    def fields(self) -> list[str]:
        """Fields that a record has to have besides the label."""
        patterns = (self.first, *self.second)
        found = [name for pattern in patterns for _, name, _, _ in string.Formatter().parse(pattern) if name]
        return list(dict.fromkeys(found))


TASKS = {
    "cola": Task(
        folder="CoLA",
        first="{sentence}",
        labels=("0", "1"),
        metrics=("matthews",),
        header=("source", "label", "mark", "sentence"),
    ),
    "sst2": Task(folder="SST-2", first="{sentence}", labels=("0", "1")),
    "mrpc": Task(
        folder="MRPC",
        first="{#1 String}",
        second=("{#2 String}",),
        label="Quality",
        labels=("0", "1"),
        metrics=("accuracy", "f1"),
    ),
    "qqp": Task(
        folder="QQP",
        first="{question1}",
        second=("{question2}",),
        label="is_duplicate",
        labels=("0", "1"),
        metrics=("accuracy", "f1"),
    ),
    "stsb": Task(
        folder="STS-B",
        first="{sentence1}",
        second=("{sentence2}",),
        label="score",
        span=(0.0, 5.0),
        metrics=("pearson", "spearman"),
    ),
    "mnli": Task(
        folder="MNLI",
        first="{sentence1}",
        second=("{sentence2}",),
        label="gold_label",
        labels=("entailment", "neutral", "contradiction"),
        held_out=("dev_matched", "dev_mismatched"),
    ),
    "qnli": Task(folder="QNLI", first="{question}", second=("{sentence}",), labels=("entailment", "not_entailment")),
    "rte": Task(
        folder="RTE",
        first="{sentence1}",
        second=("{sentence2}",),
        labels=("entailment", "not_entailment"),
        renamed={"premise": "sentence1", "hypothesis": "sentence2"},
    ),
    "boolq": Task(folder="BoolQ", first="{question}", second=("{passage}",), labels=("false", "true")),
    "copa": Task(
        folder="COPA",
        first="{premise} {question}",
        second=("{choice1}", "{choice2}"),
        labels=("0", "1"),
        phrases={"question": {"cause": "What was the cause?", "effect": "What happened as a result?"}},
    ),
    "wic": Task(folder="WiC", first="{word}: {sentence1}", second=("{sentence2}",), labels=("false", "true")),
    # Made by make_data.py.
    "stdlib": Task(
        folder="stdlib",
        first="{sentence}",
        labels=("code", "concurrency", "files", "internet", "numbers", "screen", "text"),
    ),
}


@dataclass(frozen=True)
class Record:
    """What a line says."""

    first: str
    second: tuple[str, ...]
    label: float
    """Index of the label, or the number that it is."""


def read(task: Task, folder: Path, skip_incomplete: bool = False) -> tuple[list[Record], dict[str, list[Record]]]:
    """Records to train on, and held-out ones by the name of their file.

    Args:
        task: a row of `TASKS`.
        folder: has train.tsv or train.jsonl and the files that are held out, or a folder of the task's name that has.
        skip_incomplete: leave lines of tsv files out that lack a text or have too many columns.
    Raises:
        DataError: a file is missing or empty, or a line is wrong.
    """
    for where in (folder, folder / task.folder):
        for form in ("tsv", "jsonl"):
            if (where / f"train.{form}").is_file():
                held_out = {name: where / f"{name}.{form}" for name in task.held_out}
                there = {name: path for name, path in held_out.items() if path.is_file()}
                if not there:
                    raise DataError(
                        f"{where}: got none of {', '.join(path.name for path in held_out.values())}, expected one to "
                        "evaluate on. Put it there."
                    )
                paths = {"train": where / f"train.{form}", **there}
                found = {name: _records(task, path, skip_incomplete) for name, path in paths.items()}
                return found.pop("train"), found
    raise DataError(
        f"{folder}: got neither train.tsv nor train.jsonl there or in {task.folder}/, expected the files of "
        f"{task.folder} as the benchmark has them. Give --data the folder that has them."
    )


def _records(task: Task, path: Path, skip_incomplete: bool) -> list[Record]:
    rows = _table(task, path, skip_incomplete) if path.suffix == ".tsv" else objects_of(path)
    found = [_record(task, where, row) for where, row in rows]
    if not found:
        raise DataError(f"{path}: got no records, expected one or more. Give the whole file.")
    return found


def _table(task: Task, path: Path, skip_incomplete: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a tsv file, in which quotes are text and every column is there."""
    columns = list(task.header)
    for number, line in lines_of(path):
        values = line.split("\t")
        if not columns:
            columns = values
            missing = [name for name in (*task.fields, task.label) if name not in columns]
            if missing:
                raise DataError(
                    f"{path}, line {number}: got columns {', '.join(columns)}, expected also {', '.join(missing)}. "
                    f"Give {task.folder}'s file with its first line."
                )
            continue
        row = dict(zip(columns, values, strict=False))
        if skip_incomplete and (len(values) != len(columns) or not all(row[name] for name in task.fields)):
            continue
        if len(values) != len(columns):
            raise DataError(
                f"{path}, line {number}: got {len(values)} columns, expected {len(columns)}: {', '.join(columns)}. "
                "Mend the line, or leave such lines out with --skip-incomplete."
            )
        yield f"{path}, line {number}", row


def _record(task: Task, where: str, row: dict[str, Any]) -> Record:
    row = {task.renamed.get(name, name): value for name, value in row.items()}
    expected = f"the fields of {task.folder}: {', '.join((*task.fields, task.label))}. Mend the line"
    texts = {name: text_of(where, row, name, expected) for name in task.fields}
    for name, phrases in task.phrases.items():
        if texts[name] not in phrases:
            raise DataError(
                f"{where}: got {texts[name]!r} in {name!r}, expected one of {', '.join(phrases)}. Mend the line."
            )
        texts[name] = phrases[texts[name]]
    # JSON's true is the label "true", and its 1 the label "1".
    said = row.get(task.label)
    label = said if isinstance(said, str) else json.dumps(said)
    return Record(
        task.first.format_map(texts),
        tuple(pattern.format_map(texts) for pattern in task.second),
        _index(task, where, label) if task.labels else _number(task, where, label),
    )


def _index(task: Task, where: str, label: str) -> float:
    if label not in task.labels:
        raise DataError(
            f"{where}: got {label!r} in {task.label!r}, expected one of {', '.join(task.labels)}. Mend the line, or "
            "give the --task of the file."
        )
    return task.labels.index(label)


def _number(task: Task, where: str, label: str) -> float:
    low, high = task.span
    try:
        found = float(label)
    except ValueError:
        found = math.nan
    if not low <= found <= high:
        raise DataError(
            f"{where}: got {label!r} in {task.label!r}, expected a number from {low:g} to {high:g}. Mend the line, or "
            "give the --task of the file."
        )
    return found


def accuracy(found: Tensor, wanted: Tensor) -> float:
    """Share of [n] labels that are found."""
    return (found == wanted).double().mean().item()


def f1(found: Tensor, wanted: Tensor) -> float:
    """Harmonic mean of precision and recall of label 1; 0 where nothing is 1."""
    both, either = ((found == 1) & (wanted == 1)).sum().item(), ((found == 1).sum() + (wanted == 1).sum()).item()
    return 2 * both / either if either else 0.0


def pearson(found: Tensor, wanted: Tensor) -> float:
    """Correlation of [n] numbers; of labels 0 and 1 it is Matthews' coefficient.  0 where one side is constant."""
    left, right = (values.double() - values.double().mean() for values in (found, wanted))
    scale = left.norm().item() * right.norm().item()
    constant = any((values == values[0]).all() for values in (found, wanted))
    return 0.0 if constant else (left @ right).item() / scale


def spearman(found: Tensor, wanted: Tensor) -> float:
    """Correlation of ranks; equal numbers have the mean of theirs."""
    return pearson(_ranks(found), _ranks(wanted))


def _ranks(values: Tensor) -> Tensor:
    _, index, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[index]


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": pearson,
    "pearson": pearson,
    "spearman": spearman,
}


def constant_answer(task: Task, labels: Tensor) -> Tensor:
    """[n] labels of a file as they are best guessed without reading: all the commonest, or all the mean."""
    guess = labels.long().bincount().argmax().item() if task.labels else labels.mean().item()
    return torch.full_like(labels, guess)
