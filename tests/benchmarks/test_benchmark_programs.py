"""The benchmark programs at toy sizes: tables have the promised columns, and what follows from layouts is exact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import common
import memory
import pytest
import refresh
import scale
import step
import switch
import tensors
import traffic
from click.testing import CliRunner
from common import Measured, Written

Rows = tuple[Mapping[str, str], ...]


def run(program: Any, *arguments: str, output: Path | None = None) -> Written:
    """Its table, as printed and as written."""
    path = [] if output is None else ["--output", str(output)]
    outcome = CliRunner().invoke(program.main, [*arguments, *path], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    written = Written.read(outcome.stdout)
    assert all(tuple(row) == program.HEADER for row in written.rows)
    if output is not None:
        assert output.read_text() == outcome.stdout
    return written


def numbers(row: Mapping[str, str], *columns: str) -> list[float]:
    return [float(row[column]) for column in columns]


@pytest.mark.parametrize("program", [step, tensors, memory, switch, refresh, traffic, scale], ids=lambda p: p.__name__)
def test_program_teaches_its_use(program: Any) -> None:
    assert isinstance(program.main, click.Command)
    outcome = CliRunner().invoke(program.main, ["--help"])
    assert outcome.exit_code == 0
    assert f"python benchmarks/{program.__name__}.py" in outcome.output
    assert "--output" in outcome.output
    # The ratio is the first column of numbers: names and meshes come before it.
    texts = {"optimizer", "where", "step", "against", "mesh", "method", "refresh", "of", "tensors", "of values"}
    assert " / " in next(name for name in program.HEADER if name not in texts)


def test_table_gives_back_what_was_written() -> None:
    lines = ["about", "", common.heading(("a", "b / c")), common.row(["x | y", common.ratio(1.234)])]
    written = Written.read("\n".join(lines))
    assert written.about == "about"
    assert written.rows == ({"a": "x | y", "b / c": "1.23"},)


STEP = ("--hidden", "64", "--layers", "1", "--steps", "1", "--warm-up", "2")


def test_steps_on_one_process_are_compared_with_every_original(tmp_path: Path) -> None:
    sizes = ("--size", "small", "--size", "tenths", "--size", "large")
    written = run(step, *STEP, *sizes, output=tmp_path / "new" / "step.md")
    assert "small are 12 tensors" in written.about
    assert "tenths are 120 tensors" in written.about
    assert "large are 8 tensors" in written.about
    originals = [(name, theirs) for name, contest in step.CONTESTS.items() for theirs in contest.originals]
    assert [(row["optimizer"], row["against"]) for row in written.rows] == 3 * originals
    for row in written.rows:
        assert all(value > 0 for value in numbers(row, "theirs / ours", "ours, ms", "theirs, processor ms"))
        assert row["collectives, ours"] == row["collectives, theirs"] == "0"


def test_steps_on_ranks_count_collectives_of_both_sides() -> None:
    inner, whole = run(step, *STEP, "--mesh", "zero2 x2", "--optimizer", "came").rows
    assert [row["step"] for row in (inner, whole)] == ["inner", "whole"]
    # Three rounds of CAME; a whole step adds the norm of the gradients and the gather of the weights.
    assert (inner["collectives, ours"], whole["collectives, ours"]) == ("3", "5")
    # ColossalAI's sends for every tensor: 2 for each of 9 matrices here, 3 of them twice, and more.
    assert int(inner["collectives, theirs"]) > 20


def test_row_of_steps_has_medians_ratios_and_collectives() -> None:
    found = {
        "ours": Measured(wall=(0.001, 0.002, 0.09), cpu=(0.001,), collectives=2),
        "theirs": Measured(wall=(0.03, 0.025, 0.024), cpu=(0.02,), collectives=133),
        step.FUSED: Measured(wall=(0.003,), cpu=(0.002,)),
    }
    start = ["adafactor", "zero2 x2", "inner"]
    got = step.cells(start, found, "theirs", "-")
    assert got == [*start, "theirs", "**12.50**", "20.00", "2.0", "25.0", "1.0", "20.0", "0.50", "-", 2, 133]
    del found["theirs"]
    got = step.cells(start, found, "theirs", "-", error="RuntimeError: a")
    assert got == [*start, "theirs", "-", "-", "2.0", "crashes: RuntimeError: a", "1.0", "-", "0.50", "-", 2, "-"]


def test_compile_is_for_one_process() -> None:
    outcome = CliRunner().invoke(step.main, ["--compile", "--mesh", "zero2 x2"])
    assert outcome.exit_code == 2
    assert "Leave --mesh or --compile out" in outcome.output


def test_tensors_are_compared_with_a_tenth_as_many() -> None:
    toy = ("--number", "2", "--number", "20", "--values", "10240", "--steps", "1", "--warm-up", "1")
    rows = run(tensors, *toy, "--optimizer", "lamb", "--optimizer", "torch AdamW, fused").rows
    assert [(row["optimizer"], row["tensors"], row["of values"]) for row in rows] == [
        (name, *numbers) for name in ("lamb", "torch AdamW, fused") for numbers in (("2", "5120"), ("20", "512"))
    ]
    few, many = rows[:2]
    assert few["processor time"] == "-"
    want = float(many["processor ms"]) / float(few["processor ms"])
    assert float(many["processor time"]) == pytest.approx(want, rel=0.05, abs=0.1)


def test_memory_is_what_the_estimate_says() -> None:
    toy = ("--mesh", "zero2 x2", "--hidden", "64", "--layers", "2", "--optimizer", "adamw", "--optimizer", "badam")
    adamw, badam = run(memory, *toy).rows
    layer = 4 * 64 * 64 + 3 * 64 * 176 + 2 * 64
    everything = 2 * layer + 2 * 1024 * 64 + 64
    # 12 bytes a value for master and moments, of half of the values.
    assert numbers(adamw, "estimate between steps, kB", "between steps, kB") == pytest.approx(
        [6e-3 * everything] * 2, abs=0.3
    )
    assert numbers(badam, "estimate between steps, kB", "between steps, kB") == pytest.approx(
        [6e-3 * layer] * 2, abs=0.3
    )
    assert adamw["measured / estimate, between steps"] == badam["measured / estimate, between steps"] == "1.00"
    assert float(badam["between steps / AdamW's"]) == pytest.approx(layer / everything, abs=1e-3)


def test_switch_is_what_its_step_takes_longer() -> None:
    toy = ("--mesh", "zero2 x2", "--hidden", "16", "--layers", "2", "--switches", "2")
    (row,) = run(switch, *toy).rows
    assert row["mesh"] == "zero2 x2"
    assert all(value > 0 for value in numbers(row, "step, ms", "step, processor ms", "forward and backward, ms"))
    steps = Measured(wall=(0.010, 0.012, 0.018, 0.012, 0.090, 0.020), cpu=(0.01, 0.01, 0.015) * 2)
    passes = Measured(wall=(0.05,), cpu=(0.05,))
    got = switch.cells("zero2 x2", passes, steps)
    assert got == ["zero2 x2", "**0.58**", "0.50", "7.0", "12.0", "5.0", "10.0", "50.0"]


def test_traffic_of_blocks_and_low_rank_gradients_is_what_shapes_say() -> None:
    hidden, layers, rank, vocab = 64, 2, 4, traffic.VOCAB
    inner = hidden * 11 // 4
    rows = run(traffic, "--hidden", "64", "--layers", "2", "--steps", "1", "--warm-up", "2").rows
    block, low, updates = rows
    matrices = 4 * hidden * hidden + 3 * hidden * inner
    rest = layers * 2 * hidden + hidden + 2 * vocab * hidden
    low_rank = layers * rank * (4 * hidden + 3 * inner)
    layer, whole = matrices + 2 * hidden, layers * matrices + rest
    # Two bytes a value, a flag a tensor, and the norm of the gradients.  The steps of down_proj, which is projected
    # from the left, travel in float32 where ranks have columns of them and need rows.
    strips = 4 * layers * rank * inner
    gradients, steps = "of gradients, kB", "of the step, kB"
    assert numbers(block, gradients, steps) == pytest.approx([2e-3 * layer] * 2, abs=0.15)
    assert numbers(low, gradients, steps) == pytest.approx(
        [2e-3 * (low_rank + rest), 2e-3 * whole + 1e-3 * strips], abs=0.35
    )
    assert numbers(updates, gradients, steps) == pytest.approx([2e-3 * (low_rank + rest)] * 2, abs=0.35)
    assert float(block["expected at most"]) == 1.2 / layers
    for row in rows:
        assert float(row["bytes / its bytes"]) <= 1.01 * float(row["expected at most"])
        assert int(row["collectives"]) <= int(row["its collectives"]) <= 6


def test_refreshes_are_one_table_of_methods_ranks_and_staggering() -> None:
    toy = ("--shape", "128x64", "--rank", "8", "--repeats", "1", "--train-steps", "0", "--tokens", "256")
    written = run(refresh, *toy, "--hidden", "32", "--layers", "1", "--gap", "3", "--method", "subspace")
    assert "7 matrices are those" in written.about
    methods, (ranks, staggered) = written.rows[:12], written.rows[12:]
    assert [row["refresh"] for row in methods[:4]] == ["exact", "subspace", "subspace, from the last", "random"]
    # Ours and galore_torch's singular vectors are the same; no method keeps more.
    assert all(row["energy / exact energy"] == "1.0000" for row in methods if row["refresh"] == "exact")
    assert all(0 < float(row["energy / exact energy"]) <= 1 for row in methods)
    assert float(methods[1]["energy / exact energy"]) > 0.95
    assert ranks["refresh"] == "subspace, 2 ranks"
    # The gradients to their owners, projectors back, and a strip of those that slices divide.
    assert ranks["collectives"] == "4"
    assert staggered["refresh"] == "subspace, 2 ranks, largest step of 3"
    taken = refresh.largest(Measured(wall=(3, 4, 1, 2), cpu=(1, 2, 5, 0)), 2)
    assert (taken.wall, taken.cpu) == ((4, 2), (2, 5))


def test_rank_of_a_large_job_counts_collectives_and_bytes() -> None:
    rows = run(scale, "--model", "tiny", "--tp", "2", "--zero", "4", "--pp", "2", "--steps", "2").rows
    by_name = {row["optimizer"]: row for row in rows}
    counted = {name: row["collectives"] for name, row in by_name.items()}
    # Rounds times the two axes; GaLore's are of gradients that no axis has whole.
    assert counted == {"adamw": "0", "lamb": "2", "adafactor": "4", "came": "6", "galore": "3", "badam": "0"}
    # Embedding and two layers of nine; two float64 norms each over zero, and of the divided ones over tp.
    assert by_name["lamb"]["tensors"] == "19"
    assert float(by_name["lamb"]["sent, kB"]) == pytest.approx(8e-3 * 2 * (19 + 15), abs=0.06)
    assert by_name["badam"]["tensors"] == "9"
    assert by_name["adamw"]["sent, kB"] == by_name["badam"]["sent, kB"] == "0.0"
    assert by_name["galore"]["largest owner / least possible"] == "1.00"
    assert all(float(row["construction, s"]) < 10 for row in rows)


def test_ranks_of_a_large_job_have_parts_of_its_weights() -> None:
    """All ranks together have every value once, the last stage its norm and head."""
    sizes, total = scale.MODELS["tiny"], 0
    for weight in scale.weights(sizes, 2):
        for tp_rank in range(2) if weight.dim is not None else (0,):
            at = scale.Position(tp=2, zero=4, pp=2, tp_rank=tp_rank, stage=weight.stage)
            layout = scale.layout_of(weight, at, whole_rows=False)
            total += sum(layout.at(slice_rank=rank).num_local for rank in range(4))
    hidden, inner, keys = sizes.hidden, sizes.inner, sizes.key_width
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner + 2 * hidden
    assert total == sizes.layers * layer + 2 * sizes.vocab * hidden + hidden
    assert [weight.stage for weight in scale.weights(sizes, 2)] == [0] * 19 + [1] * 20
