"""Every block of code in the documentation runs, and every command and error in it is one that there is."""

from __future__ import annotations

import ast
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import docs_cases
import pytest
from docs_cases import CASES, DOCS, blocks

from colossal_bcd.cli.commands import cli
from colossal_bcd.testing import run_ranks

ROOT = DOCS.parent
PAGES = sorted(page.name for page in DOCS.glob("*.md"))

ELSEWHERE = {
    "add_an_optimizer.md": "tests/test_docs.py",
    "galore.md": "tests/test_docs.py",
    "metrics.md": "tests/test_docs.py",
    "names.md": "tests/test_names.py",
    "ratio.md": "tests/block/test_ratio.py",
    "refreshes.md": "tests/low_rank/test_refresh.py",
    "trainer.md": "tests/compat/test_trainer.py",
}
"""Pages whose code another test runs; the parts of trainer.md need several versions, and run as programs."""

LANGUAGES = {"": "commands", "sh": "commands", "python": "code", "math": "equations", "text": "pictures and output",
             "toml": "configuration", "yaml": "configuration", "json": "configuration", "diff": "a change"}  # fmt: skip
"""Of the fences: only commands and code are run or looked at here."""

OUTPUT = {"docs/engine.md": ("backward ",), "docs/refreshes.md": ("bases of ",)}
"""How fences without a language begin that are no commands."""


def test_every_page_with_code_has_a_case() -> None:
    with_code = {page for page in PAGES if blocks(page)}
    assert with_code == set(CASES) | set(ELSEWHERE)
    assert not set(CASES) & set(ELSEWHERE)
    assert all((ROOT / test).is_file() for test in ELSEWHERE.values())


def test_every_fence_is_of_a_kind_that_is_known() -> None:
    for page in PAGES:
        languages = set(re.findall(r"^```([^`\n]*)\n.*?^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE))
        assert languages <= set(LANGUAGES), page


@pytest.mark.parametrize("page", PAGES)
def test_code_is_python(page: str) -> None:
    for line, block in blocks(page):
        compile("\n" * line + block, page, "exec")


@pytest.mark.parametrize("page", sorted(CASES))
def test_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = CASES[page][0]
    if ranks:
        run_ranks(ranks, docs_cases.run_page, page, str(tmp_path))
    else:
        monkeypatch.chdir(tmp_path)
        docs_cases.run_page(page, str(tmp_path))


def commands() -> list[tuple[str, str]]:
    """Page and line of every command."""
    found = []
    for page in PAGES:
        for language in ("", "sh"):
            for _, block in blocks(page, language):
                if not block.startswith(OUTPUT.get(f"docs/{page}", ("\0",))):
                    found += [(page, line) for line in block.splitlines() if shlex.split(line, comments=True)]
    return found


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: value[:60])
def test_command_is_one_that_there_is(page: str, line: str) -> None:
    """What it names exists, and takes its flags; the programs have tests of their own."""
    for part in line.partition(" #")[0].split("&&"):
        words = shlex.split(part)
        while "=" in words[0]:
            words = words[1:]
        check_command(*words)


def check_command(program: str, *words: str) -> None:
    if program == "colossal-bcd":
        command = cli
        while words and (found := getattr(command, "commands", {}).get(words[0])):
            command, words = found, words[1:]
        if "--help" not in words:
            command.make_context("colossal-bcd", list(words))
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[0] in targets
    elif program == "pip":
        extras = re.findall(r'^        "([a-z-]+)": ', (ROOT / "setup.py").read_text(), re.MULTILINE)
        asked = [extra for word in words for found in re.findall(r"\[(.*?)\]", word) for extra in found.split(",")]
        assert set(asked) <= set(extras)
    elif program in ("python", "torchrun", "colossalai"):
        if words[:2] == ("-m", "colossal_bcd"):
            return check_command("colossal-bcd", *words[2:])
        at = next(index for index, word in enumerate(words) if word.endswith(".py"))
        path = ROOT / words[at]
        assert path.is_file()
        source = "".join(each.read_text() for each in path.parent.glob("*.py"))
        for word in words[at + 1 :]:
            assert not word.startswith("--") or f'"{word}' in source or f"/{word}" in source, word
    else:
        assert (program, *words) in ((".", ".venv/bin/activate"), ("python3.11", "-m", "venv", ".venv")), program
    return None


@cache
def messages() -> list[str]:
    """Texts of the package's code, with a null byte for what they are filled with."""

    def text(node: ast.expr) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(text(value) for value in node.values)
        if isinstance(node, ast.Constant):
            return re.sub(r"%[sd]", "\0", node.value) if isinstance(node.value, str) else ""
        return "\0"

    strings = (ast.Constant, ast.JoinedStr)
    trees = [ast.parse(path.read_text()) for path in (ROOT / "colossal_bcd").rglob("*.py")]
    return [text(node) for tree in trees for node in ast.walk(tree) if isinstance(node, strings)]


def is_message(quoted: str) -> bool:
    """Whether a text of the code has the quoted parts, one after the other, around what fills it."""
    pattern = re.compile("\0+".join(map(re.escape, quoted.split("..."))))
    return any(pattern.search(text) for text in messages())


HEADINGS = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("quoted", HEADINGS, ids=lambda quoted: quoted[:50])
def test_error_of_the_troubleshooting_page_is_one_of_the_code(quoted: str) -> None:
    assert is_message(quoted)


def test_is_message_knows_what_is_none() -> None:
    assert len(HEADINGS) > 40
    assert not is_message("base_optimizer: ... of its ... parameters are in")


def test_public_names_are_on_the_api_page() -> None:
    """All that `colossal_bcd`, `booster`, `block`, `fsdp`, `checkpoint` and `compat` promise, but for aliases."""
    import colossal_bcd

    text = (DOCS / "api.md").read_text()
    names: Any = colossal_bcd.__all__  # type: ignore[attr-defined]
    assert [name for name in names if not re.search(rf"\b{name}\b", text) and not name.startswith("GoLore")] == []
