"""The short examples: each is one idea in fewer than 60 lines, and trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from colossal_bcd.testing import run_ranks
from examples import badam, bread, fsdp_booster, galore, resume, tensor_parallel

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example_has_fewer_than_60_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60


@pytest.mark.parametrize("program", [badam, bread, galore], ids=lambda program: program.__name__)
def test_example_on_one_process_trains(program) -> None:
    losses = program.main()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_example_under_tensor_parallelism_trains(tp_size: int) -> None:
    for losses in run_ranks(2, tensor_parallel.main, 40, tp_size):
        assert losses[-1] < 0.9 * losses[0]


def test_example_of_sharded_weights_under_the_booster_trains() -> None:
    for losses in run_ranks(2, fsdp_booster.main):
        assert losses[-1] < 0.9 * losses[0]


def test_example_goes_on_where_it_stopped_on_another_number_of_ranks(tmp_path: Path) -> None:
    run_ranks(2, resume.main, tmp_path / "stopped", 15)
    run_ranks(2, resume.main, tmp_path / "straight", 15)
    straight = run_ranks(2, resume.main, tmp_path / "straight", 5)
    (resumed,) = run_ranks(1, resume.main, tmp_path / "stopped", 5)
    mean = [sum(losses) / 2 for losses in zip(*straight, strict=True)]
    # bfloat16 activations of a loss of 4, 2^-8 apart, on other ranks in another order.
    assert resumed == pytest.approx(mean, abs=0.03)


def test_quickstart_trains_as_a_program_without_colossalai() -> None:
    code = (
        "import sys; sys.modules['colossalai'] = None; import quickstart; losses = quickstart.main(); "
        "assert losses[-1] < 0.8 * losses[0], losses"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), str(EXAMPLES)])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)


def test_example_of_sharded_weights_runs_under_torchrun_without_colossalai() -> None:
    code = (
        "import sys, runpy; sys.modules['colossalai'] = None; runpy.run_path('examples/fsdp.py', run_name='__main__')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), str(EXAMPLES)])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    program = [sys.executable, "-c", code]
    subprocess.run([*command, *program], check=True, env=environment, cwd=EXAMPLES.parent, timeout=300)
