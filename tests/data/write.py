"""Write the checkpoints of this folder anew, by the version of colossal_bcd that is imported.

    cd TREE && PYTHONPATH=TREE python .../tests/data/write.py

TREE is the checkout of the version whose checkpoints are to be kept; the folders here are of commit 98d9731.  The same
version on the same machine writes the same numbers.  A machine with kernels of the same digest may still round
otherwise: with `--next` a version that passes the tests elsewhere, here 9bce7c0, writes what it does next on this one,
where that is something else.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "support"))

import kept_cases as cases

from colossal_bcd.testing import run_ranks


def main() -> None:
    (cases.DATA / "kernels.txt").write_text(cases.kernels() + "\n")
    for name in cases.MAKE:
        for mesh in cases.WRITTEN[name]:
            folder = cases.DATA / f"{name}-{mesh}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            if mesh == "alone":
                ranks = [cases.write(name, mesh, str(folder))]
            else:
                ranks = run_ranks(2, cases.write, name, mesh, str(folder))
            (folder / "next.json").write_text(json.dumps(ranks, indent=1) + "\n")


def write_next() -> None:
    """Beside each next.json, what goes on otherwise on this machine."""
    for name in cases.MAKE:
        for mesh in cases.WRITTEN[name]:
            alone = mesh == "alone"
            ranks = [cases.alone(name)] if alone else run_ranks(2, cases.resume_each, [name], mesh, mesh)
            found = json.dumps(ranks if alone else [rank[name] for rank in ranks], indent=1) + "\n"
            path = cases.DATA / f"{name}-{mesh}" / "next.json"
            if found != path.read_text():
                path.with_stem(f"next-{cases.rounding()}").write_text(found)


if __name__ == "__main__":
    write_next() if "--next" in sys.argv[1:] else main()
