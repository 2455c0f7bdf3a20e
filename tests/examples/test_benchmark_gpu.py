"""The benchmark of one GPU, tried on the CPU at small sizes; what cannot run elsewhere is not called there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gpu
import pytest
from click.testing import CliRunner

SMALL = ["--device", "cpu", "--size", "small"]


def test_every_section_but_the_compiled_one_writes_its_part(tmp_path: Path) -> None:
    sections = [name for name in gpu.SECTIONS if name != "compiled"]
    chosen = [argument for name in sections for argument in ("--section", name)]
    outcome = CliRunner().invoke(gpu.main, [*SMALL, *chosen, "--output", str(tmp_path / "new" / "report.md")])
    report = (tmp_path / "new" / "report.md").read_text()
    assert outcome.exit_code == 0, report
    titles = [line for line in report.splitlines() if line.startswith("## ")]
    assert titles == [f"## {gpu.SECTIONS[name][0]}" for name in sections]
    assert "Traceback" not in report
    assert "23.5 GB" in report
    for name in ("AdamW", "torch AdamW, fused", "CAME", "GaLoreAdamW"):
        assert f"\n| {name}" in report
    assert "nan" not in report


def test_a_section_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: gpu.Bench) -> Iterator[str]:
        """Break."""
        yield "| before |"
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "SECTIONS", {"broken": ("Broken", broken), "copy": ("Copy", gpu.bandwidth)})
    outcome = CliRunner().invoke(gpu.main, [*SMALL, "--output", str(tmp_path / "report.md")])
    report = (tmp_path / "report.md").read_text()
    assert outcome.exit_code == 1
    assert "| before |" in report
    assert "RuntimeError: no such kernel" in report
    assert "GB/s**" in report


def test_bytes_of_galore_are_those_of_its_shapes() -> None:
    # A weight of 8 x 4 on rank 2: 12 bytes a value, 28 a value of the [8, 2] gradient, a [4, 2] basis read twice.
    assert gpu.galore_bytes([(8, 4), (3,)], 2) == 12 * 32 + 28 * 16 + 2 * 4 * 8 + 28 * 3
