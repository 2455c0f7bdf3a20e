"""The documentation's code runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from added_optimizer import conform_on_one_process, conform_on_ranks
from conformance_cases import TOLERANCE, Sizes

from colossal_bcd.testing import run_ranks

DOCS = Path(__file__).parents[1] / "docs"


def test_optimizer_of_the_page_conforms_from_an_empty_file(tmp_path: Path) -> None:
    """The page promises that a file and a row are all: it is public, and right on one process and on two ranks."""
    folders = [str(tmp_path / str(rank)) for rank in range(2)]
    for folder in folders:
        Path(folder).mkdir()
    (found,) = run_ranks(1, conform_on_one_process, str(tmp_path))
    assert found["is public"]
    assert max(error for errors in found["errors"].values() for error in errors) <= TOLERANCE
    sizes = Sizes(2, 1)
    reports: list[dict[str, Any]] = [
        json.loads(text) for text in run_ranks(2, conform_on_ranks, str(tmp_path), folders, sizes)
    ]
    for report in reports:
        for variant in found["errors"]:
            assert all(error <= TOLERANCE for error in report[variant]["errors"]), variant
            assert all(error <= TOLERANCE for error in report[variant]["wave_errors"]), variant
            assert all(calls == [found["rounds"], found["rounds"]] for calls in report[variant]["calls"]), variant
            assert report[variant]["padding_is_untouched"], variant
            assert report[variant]["replicated"] == reports[0][variant]["replicated"], variant
        assert not report["scaled_sgd"]["padding_counts"]


def test_galore_page_makes_an_optimizer_that_trains() -> None:
    names: dict[str, Any] = {}
    code = re.search(r"```python\n(.*?)```", (DOCS / "galore.md").read_text(), re.DOTALL)
    assert code is not None
    exec(code[1], names)
    model, optimizer = names["model"], names["optimizer"]
    before = [param.detach().clone() for param in model.parameters()]
    model(torch.arange(8)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    bases = ["left" in state or "right" in state for state in optimizer.state.values()]
    assert bases == [True, True, False, False, False]


def test_metrics_page_records_steps() -> None:
    names: dict[str, Any] = {}
    code = re.search(r"```python\n(.*?)```", (DOCS / "metrics.md").read_text(), re.DOTALL)
    assert code is not None
    exec(code[1], names)
    assert names["scalars"].keys() == {"weight_norm", "gradient_norm", "update_rms", "bytes_sent"}


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+\.md)\)", page.read_text()):
        assert (page.parent / target).is_file(), target


def test_index_lists_every_page() -> None:
    listed = set(re.findall(r"\(([a-z_]+\.md)\)", (DOCS / "index.md").read_text()))
    assert listed == {page.name for page in DOCS.glob("*.md")} - {"index.md"}
