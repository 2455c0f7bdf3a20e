"""Lines of data files; what is wrong with one is told by file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class DataError(ValueError):
    """Data, flags or files that cannot be trained on; the same on every rank."""


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers, from 1, and text of the lines that are not blank.

    Lines end at line feeds alone: other characters that Unicode counts as ends of lines are in texts of real data.

    Raises:
        DataError: the file is missing or no UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}, expected a file of data. Give the path of one.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: got {error.reason}, expected UTF-8. Convert the file.") from None


def objects_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file that has one in each line, each after the words that say where it is.

    Raises:
        DataError: as of `lines_of`, or a line is no object.
    """
    for number, line in lines_of(path):
        where = f"{path}, line {number}"
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: got no JSON ({error.msg}), expected one object a line. Mend the line.") from None
        if not isinstance(found, dict):
            raise DataError(f"{where}: got {line[:40]!r}, expected an object. Mend the line.")
        yield where, found


def without_every_tenth(records: Sequence[T]) -> tuple[list[T], list[T]]:
    """Records but every tenth, and these, from the first on."""
    return [record for index, record in enumerate(records) if index % 10], list(records[::10])


def text_of(where: str, record: dict[str, Any], field: str, expected: str) -> str:
    """A field that has to be text.

    Raises:
        DataError: it is missing, empty or no text.
    """
    value = record.get(field)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: got no text in {field!r}, expected {expected}.")
    return value
