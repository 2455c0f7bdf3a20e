"""Figures in the table that a run of the example leaves."""

from __future__ import annotations

from measure import RankFigures, StepMemory, Traffic
from report import MIB, Curve, Report, _direction_rows
from test_example import settings

from colossal_bcd.testing import CollectiveCounter


def rows(*flags: str) -> dict[str, str]:
    """Of two ordinary steps and one that ends a block, each with the same collectives."""
    counter = CollectiveCounter()
    counter.bytes.update({"reduce_scatter_tensor": MIB, "all_reduce": 4, "all_gather_into_tensor": 2 * MIB})
    ordinary, switching = Traffic(), Traffic()
    for traffic in (ordinary, ordinary, switching):
        traffic.add(counter)
    memory = StepMemory(block="", num_active=1, measured=1, expected=1)
    rank = RankFigures(memory=memory, num_parameters=4 * MIB, peak=1, ordinary=ordinary, switching=switching)
    return dict(_direction_rows(Report(settings=settings(*flags), curve=Curve(), ranks=[rank], seconds=1.0)))


def test_report_compares_bytes_per_direction_with_adamw() -> None:
    """AdamW sends every gradient and every weight once, 2 bytes each in bf16."""
    assert rows() == {
        "gradients reduced per step": "1.000 MiB (12.5% of AdamW's 8.000 MiB)",
        "weights gathered per step": "2.000 MiB (25.0% of AdamW's 8.000 MiB)",
    }
    assert "of AdamW's 16.000 MiB" in rows("--precision", "fp32")["weights gathered per step"]


def test_report_leaves_out_directions_that_do_not_exist_or_cannot_be_told_apart() -> None:
    hybrid = ("--plugin", "hybrid")
    assert list(rows(*hybrid, "--zero-stage", "0")) == ["gradients reduced per step"]
    assert list(rows(*hybrid, "--zero-stage", "1", "--tp", "2")) == ["weights gathered per step"]
