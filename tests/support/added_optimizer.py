"""An optimizer that a page of the documentation adds to the package, and to the conformance table."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import conformance_cases
import references

PAGE = Path(__file__).parents[2] / "docs" / "add_an_optimizer.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def add(folder: str) -> Any:
    """Follow the page: write the file, import it, add the reference and the row.

    The last two blocks are for the tests; those before them are the file.  Of the table only the new row stays.
    """
    *file, reference, row = blocks()
    path = Path(folder) / "scaled_sgd.py"
    path.write_text("\n\n".join(block.strip() + "\n" for block in file))
    spec = importlib.util.spec_from_file_location("colossal_bcd.optim.scaled_sgd", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    exec(reference, vars(references))
    conformance_cases.TABLE.clear()
    exec(row, {**vars(conformance_cases), "ScaledSGD": module.ScaledSGD})
    table = conformance_cases.TABLE
    conformance_cases.VARIANTS[:] = [f"{name}-{decay}" for name, each in table.items() for decay in each.decays]
    return module


def conform_on_one_process(folder: str) -> dict[str, Any]:
    """Errors of each case on one process, and whether the class is public; writes what ranks compare with."""
    import colossal_bcd
    from support.errors import largest_error

    add(folder)
    expected, errors = {}, {}
    for variant in conformance_cases.VARIANTS:
        weights = {
            "reference": conformance_cases.train_by_reference(variant),
            "one process": conformance_cases.train_on_one_process(variant),
        }
        expected[variant] = weights
        pairs = zip(weights["one process"], weights["reference"], strict=True)
        errors[variant] = [largest_error(got, want[-1]) for got, want in pairs]
    conformance_cases.torch.save(expected, Path(folder) / "expected.pt")
    return {
        "errors": errors,
        "is public": colossal_bcd.ScaledSGD is sys.modules["colossal_bcd.optim.scaled_sgd"].ScaledSGD,
        "rounds": conformance_cases.TABLE["scaled_sgd"].rounds,
    }


def conform_on_ranks(folder: str, rank_folders: list[str], sizes: conformance_cases.Sizes) -> str:
    import torch.distributed as dist

    add(rank_folders[dist.get_rank()])
    return conformance_cases.conform(sizes, str(Path(folder) / "expected.pt"))
