"""Documents of a corpus: lines of JSON, plain text, or what the installed packages hold."""

from __future__ import annotations

import gzip
import hashlib
import json
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from records import DataError, text_of

LINES = (".json.gz", ".jsonl.gz", ".json", ".jsonl")
"""Ends of the names of files that have an object, and so a document, in each line."""
WHOLE = (".txt", ".md", ".rst", ".py")
"""Those of files that are one document."""

Split = Literal["train", "held_out"]


@dataclass(frozen=True, order=True)
class Source:
    """A file of a corpus.

    Attributes:
        name: the same wherever the corpus is.
        path: where it is.
        size: bytes.
    """

    name: str
    path: Path
    size: int


def sources_of(paths: Sequence[Path]) -> list[Source]:
    """The files of a corpus, in the order of their names.

    Args:
        paths: files, and directories, of which all files with a name of `LINES` or `WHOLE` are taken; each once.
    Raises:
        DataError: a path is missing or of another kind, or there is no file.
    """
    found = []
    for path in paths:
        if path.is_dir():
            found += [
                Source(each.relative_to(path).as_posix(), each, each.stat().st_size)
                for each in path.rglob("*")
                if each.name.endswith((*LINES, *WHOLE)) and each.is_file()
            ]
        elif not path.is_file():
            raise DataError(f"{path}: got no such file, expected a file or a directory of a corpus. Give one.")
        elif not path.name.endswith((*LINES, *WHOLE)):
            raise DataError(f"{path}: expected a name that ends with {', '.join((*LINES, *WHOLE))}. Rename it.")
        else:
            found.append(Source(path.name, path, path.stat().st_size))
    if not found:
        raise DataError(f"{paths[0]}: got no file there that ends with {', '.join((*LINES, *WHOLE))}. Give another.")
    once = {source.path.resolve(): source for source in sorted(found, reverse=True)}
    return sorted(once.values())


def installed(roots: Sequence[Path] | None = None) -> list[Source]:
    """Texts and sources of the standard library and of installed packages.

    They come in an order that is as good as random and the same on every machine with these files, so that the first
    ones are a sample of all.

    Args:
        roots: folders in the place of the library's and the packages'.
    """
    if roots is None:
        roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    found = [
        source
        for root in roots
        for source in sources_of([root])
        if source.name.endswith(WHOLE)
        and source.size
        # Packages are in a folder of the library, unless the environment is a virtual one.
        and "site-packages" not in source.path.relative_to(root).parts
    ]
    return sorted(found, key=lambda source: (_hash(source.name), source.name))


def is_held_out(source: Source, number: int, share: float) -> bool:
    """Whether a document is among the share that is kept for evaluation; a file that is one is as a whole."""
    name = f"{source.name}:{number}" if source.name.endswith(LINES) else source.name
    return int(_hash(name)[:8], 16) < share * 2**32


def raw_documents(source: Source) -> Iterator[tuple[int, bytes]]:
    """Numbers, from 1, and bytes of the documents of a file; blank lines are none.

    Raises:
        DataError: the file cannot be read to its end; all documents before have been given out.
    """
    number = 0
    try:
        if source.name.endswith(WHOLE):
            yield 1, source.path.read_bytes()
            return
        with gzip.open(source.path) if source.name.endswith(".gz") else source.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{source.path}: got no line after line {number} ({error}), expected the rest of the file. Fetch it again "
            "and give the same command, or leave the rest out with --skip-damaged."
        ) from None


def text_in(source: Source, number: int, raw: bytes, field: str) -> str:
    """The text of a document.

    Raises:
        DataError: it is no UTF-8, or the line is no JSON or lacks the field.
    """
    where = f"{source.path}, line {number}" if source.name.endswith(LINES) else str(source.path)
    remedy = "Mend it and give the same command, or leave such documents out with --skip-damaged."
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: got {error.reason}, expected UTF-8. {remedy}") from None
    if source.name.endswith(WHOLE):
        return text
    try:
        record: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: got no JSON ({error.msg}), expected an object. {remedy}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: got {text[:40]!r}, expected an object. {remedy}")
    expected = f"the text of a document (--text_field says which field has it). {remedy.removesuffix('.')}"
    return text_of(where, record, field, expected)


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
