"""The main job, interrupted under its launcher, killed and resumed, ends at the losses of a run that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from compare_losses import read_losses
from main import main, settings_of

from colossal_bcd.testing import RankError, run_ranks

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune" / "main.py"
FLAGS = [
    *["--hidden-size", "32", "--layers", "2", "--sequence-length", "16", "--batch-size", "8", "--no-save"],
    *["--steps", "48", "--eval-every", "24", "--switch-every", "5", "--checkpoint-every", "8"],
]
EARLY = 8
"""The checkpoint after which a run is ended, with most of its steps ahead."""


class Launched:
    """A run on two ranks, in a session of its own, as of a terminal."""

    def __init__(self, output: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        self.log = (output.parent / "log").open("a+")
        self.process = subprocess.Popen(
            [*command, str(SCRIPT), *FLAGS, "--output", str(output)],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ended_by(self, act: Callable[[], None], when: Path) -> int:
        """Act as soon as a file is there; the launcher's exit code."""
        deadline = time.monotonic() + 240
        while not when.exists():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.002)
        act()
        return self.process.wait(timeout=max(deadline - time.monotonic(), 1))

    def interrupt(self) -> None:
        """Ctrl-C: the terminal tells all processes."""
        os.killpg(self.process.pid, signal.SIGINT)

    def text(self) -> str:
        self.log.seek(0)
        return self.log.read()


def written(output: Path, step: int) -> Path:
    """The file that is there as soon as the step's checkpoint is complete."""
    return output / "checkpoints" / f"step-{step:08}" / "checkpoint.json"


def newest(output: Path) -> int:
    return max(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*"))


def losses(output: Path, *flags: str) -> dict[tuple[str, int], float]:
    """Of the same run, without the seconds that a launcher takes."""
    run_ranks(2, train, [*FLAGS, "--output", str(output), *flags])
    return read_losses(output / "losses.csv")


def train(flags: list[str]) -> None:
    from training import run

    run(settings_of(main.make_context("main.py", flags).params, world_size=2), started=0.0)


def train_and_die(flags: list[str], when: str) -> None:
    """The same, but the second rank is killed as soon as a file is there, wherever it is then."""
    if dist.get_rank() == 1:
        threading.Thread(target=kill_this_process, args=(Path(when),), daemon=True).start()
    train(flags)


def kill_this_process(when: Path) -> None:
    while not when.exists():
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_is_interrupted_and_killed_goes_on_to_the_losses_of_one_that_is_not(tmp_path: Path) -> None:
    straight = losses(tmp_path / "straight")
    output = tmp_path / "stopped"

    run = Launched(output)
    assert run.ended_by(run.interrupt, written(output, EARLY)) != 0
    taken = newest(output)
    assert EARLY <= taken < 40, "the last checkpoint is that of the interruption"
    assert "has what --resume goes on from" in run.text()

    following = taken // EARLY * EARLY + EARLY
    with pytest.raises(RankError, match="rank 1\nthe process ended without a result"):
        run_ranks(2, train_and_die, [*FLAGS, "--output", str(output), "--resume"], str(written(output, following)))
    assert following <= newest(output) < 48

    assert losses(output, "--resume") == straight
