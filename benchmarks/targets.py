"""What the tables have to show: targets, and what was measured of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from common import MESHES, Written

Tables: TypeAlias = Mapping[str, Written]
"""By section of the page."""
Row: TypeAlias = Mapping[str, str]
SIZES = ("small", "tenths", "large")


@dataclass(frozen=True)
class Figure:
    """A number of a table with what it has to be."""

    label: str
    value: float
    good: bool


@dataclass(frozen=True)
class Target:
    """A promise."""

    text: str
    table: str
    """Section whose table tells."""
    figures: Callable[[Written], Iterable[Figure]]

    def judged(self, written: Written) -> list[str]:
        """Cells of the page's first table: the promise, whether it is kept, and the figures, worst first."""
        found = list(self.figures(written))
        bad = [figure for figure in found if not figure.good]
        if not found:
            return [self.text, "not measured", "-"]
        if not bad:
            return [self.text, "met", f"all {len(found)}: {_listed(found, 3)}"]
        return [self.text, "**not met**", f"{len(bad)} of {len(found)} miss it: {_listed(bad, 8)}"]


def _listed(figures: Sequence[Figure], most: int) -> str:
    shown = "; ".join(f"{figure.label} {figure.value:.4g}" for figure in figures[:most])
    return shown + (f"; and {len(figures) - most} more" if len(figures) > most else "")


def _number(row: Row, column: str) -> float | None:
    try:
        return float(row[column])
    except ValueError:
        return None  # "-" where theirs crashes


def _at_least(
    written: Written, column: str, least: Callable[[Row], float | None], label: Callable[[Row], str]
) -> list[Figure]:
    """Figures of the rows for which `least` names a number, smallest first."""
    found = []
    for row in written.rows:
        bound, value = least(row), _number(row, column)
        if bound is not None and value is not None:
            found.append(Figure(label(row), value, value >= bound))
    return sorted(found, key=lambda figure: figure.value)


def _at_most(
    written: Written, column: str, most: Callable[[Row], float | None], label: Callable[[Row], str]
) -> list[Figure]:
    """Figures of the rows for which `most` names a number, largest first."""
    found = []
    for row in written.rows:
        bound, value = most(row), _number(row, column)
        if bound is not None and value is not None:
            found.append(Figure(label(row), value, value <= bound))
    return sorted(found, key=lambda figure: -figure.value)


def _on_one_process(written: Written) -> list[Figure]:
    # The fused kernel of torch has a target of its own, and SGD's is not what SGD replaces.
    return _at_least(
        written,
        "theirs / ours, processor time",
        lambda row: 1.0 if row["where"] in SIZES and "fused" not in row["against"] else None,
        lambda row: f"{row['against']} {row['where']}",
    )


def _near_fused(written: Written) -> list[Figure]:
    return _at_most(
        written,
        "ours / fused AdamW, processor time",
        lambda row: (
            1.1 if row["optimizer"] == "adamw" and row["where"] in SIZES and "fused" in row["against"] else None
        ),
        lambda row: row["where"],
    )


COMPILED = {"lamb, compiled": 2.0, "came, compiled": 2.5, "adafactor, compiled": 2.0, "galore, compiled": 2.0}


def _compiled(written: Written) -> list[Figure]:
    return _at_most(
        written,
        "ours / fused AdamW, processor time",
        lambda row: COMPILED.get(row["optimizer"]) if row["where"] == "large" and "fused" in row["against"] else None,
        lambda row: row["optimizer"].partition(",")[0],
    )


LAMB = dict(zip(MESHES, (3.0, 4.0, 12.0), strict=True))


def _on_ranks(written: Written) -> list[Figure]:
    def least(row: Row) -> float | None:
        if row["step"] != "inner" or row["where"] not in MESHES:
            return None
        return {"lamb": LAMB[row["where"]], "adafactor": 10.0, "came": 10.0}.get(row["optimizer"])

    return _at_least(written, "theirs / ours", least, lambda row: f"{row['optimizer']} {row['where']}")


def _tenths(written: Written) -> list[Figure]:
    return _at_most(
        written,
        "processor time",
        lambda row: 1.5 if row["tensors"] == "750" and not row["optimizer"].startswith("torch") else None,
        lambda row: row["optimizer"],
    )


def _blocks(written: Written) -> list[Figure]:
    found = []
    for row in written.rows:
        if row["method"] == "BAdam":
            bound = float(row["expected at most"])
            for label, column in (("bytes", "bytes / its bytes"), ("step", "step / its step, processor time")):
                found.append(Figure(label, float(row[column]), float(row[column]) <= bound))
    return found


def _low_rank(written: Written) -> list[Figure]:
    return _at_most(
        written,
        "bytes / its bytes",
        # Padding, and flags that travel with gradients.
        lambda row: 1.01 * float(row["expected at most"]) if row["method"] != "BAdam" else None,
        lambda row: row["method"],
    )


TARGETS = (
    Target(
        "One process, eager: no optimizer is slower than the original that it replaces (theirs / ours is 1 or more).",
        "step",
        _on_one_process,
    ),
    Target("AdamW takes at most 1.1 times torch's fused kernel.", "step", _near_fused),
    Target(
        "With compile=True, on large tensors: LAMB, Adafactor and GaLore take at most 2.0 times, and CAME 2.5 times, "
        "torch's fused AdamW.",
        "compiled",
        _compiled,
    ),
    Target(
        "Inner steps against ColossalAI's: LAMB at least 3, 4 and 12 times as fast on the three meshes, Adafactor and "
        "CAME 10 times on all.",
        "step",
        _on_ranks,
    ),
    Target("Ten times as many tensors of a tenth of the size take less than 1.5 times as long.", "tensors", _tenths),
    Target("BAdam's bytes and optimizer step are at most 1.2/D of AdamW's.", "traffic", _blocks),
    Target("Low-rank gradients and updates send what rank and shapes say, and no more.", "traffic", _low_rank),
    Target(
        "A switch of blocks costs at most one optimizer step.",
        "switch",
        lambda written: _at_most(written, "switch / step, processor time", lambda row: 1.0, lambda row: row["mesh"]),
    ),
    Target(
        "The estimate of bytes between steps is right to 1 %.",
        "memory",
        lambda written: [
            Figure(f"{row['optimizer']} {row['mesh']}", value, abs(value - 1) <= 0.01)
            for row in written.rows
            if (value := float(row["measured / estimate, between steps"]))
        ],
    ),
    Target(
        "One rank of Llama-405B on tp8 x zero128 x pp16 is constructed in less than 10 s.",
        "scale",
        lambda written: _at_most(written, "construction, s", lambda row: 10.0, lambda row: row["optimizer"]),
    ),
    Target(
        "Its bookkeeping is less than 1 % of its state.",
        "scale",
        lambda written: _at_most(written, "bookkeeping / state", lambda row: 0.01, lambda row: row["optimizer"]),
    ),
)


def judged(tables: Tables) -> list[list[str]]:
    """One row for every target whose table is there."""
    return [target.judged(tables[target.table]) for target in TARGETS if target.table in tables]
