"""accelerate and Hugging Face's Trainer on weights that FSDP2 has sharded over two processes, against one process."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import fsdp_trainer_cases as cases
import pytest
import torch
import trainer_fsdp
from accelerate import FullyShardedDataParallelPlugin
from replica_trainer_cases import launched
from support.errors import largest_error
from test_replicas import compare

from colossal_bcd.compat import accelerated
from colossal_bcd.fsdp.torch_private import VERSION
from colossal_bcd.testing import run_ranks

shards = pytest.mark.skipif(VERSION < (2, 13), reason=f"accelerate's FSDP2 on CPUs needs torch 2.13, got {VERSION}")


@shards
def test_accelerate_on_two_processes_equals_one_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    results = run_ranks(2, cases.many_accelerated, str(tmp_path))
    for name, case in cases.CASES.items():
        for result in results:
            compare(result[name]["again"], result[name]["weights"], 0)
        compare(results[1][name]["weights"], results[0][name]["weights"], 0)
        if "dtype" not in case:
            want = cases.one_process(case["name"], 2)
            compare(results[0][name]["weights"], want["weights"], 1e-12)
            assert largest_error(results[0][name]["norms"], want["norms"]) <= 1e-12
            assert min(want["norms"]) > cases.MAX_NORM


@shards
def test_trainer_on_two_processes_equals_one_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    results = run_ranks(2, cases.trained_and_resumed, str(tmp_path))
    replicas, whole = results[0].pop("replicas"), results[0]["float32"][0]
    for name, (first, again) in results[0].items():
        compare(again, first, 0)
        compare(results[1][name][0], first, 0)
        assert {weight.dtype for weight in first.values()} == {torch.bfloat16 if name == "bfloat16" else torch.float32}
    compare(results[0]["checkpointing"][0], whole, 0)
    compare(results[0]["factory"][0], whole, 0)
    # Sums in another order, of which Adam makes up to 1e-4 where a gradient is close to zero.
    compare(whole, replicas["weights"], 2e-4)


def example(folder: str) -> list[float]:
    launched()
    trainer = trainer_fsdp.train(Path(folder), steps=40)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@shards
def test_example_learns_on_two_processes(tmp_path: Path) -> None:
    losses = run_ranks(2, example, str(tmp_path))
    assert losses[0][-1] < losses[0][0] - 0.5


@shards
def test_accelerate_refuses_what_would_train_wrongly() -> None:
    found = run_ranks(2, cases.refused)[0]
    assert re.search("got 0 models and 1 block optimizers.*Prepare them together", found["apart"])
    assert re.search("BlockOptimizerRatio, which does not go with FSDP2", found["ratio"])
    assert re.search('mixed_precision="fp16"', found["scaler"])
    assert re.search(r"got parameters after the blocks were made.*enable_accelerate\(\)", found["pointed elsewhere"])


@pytest.mark.skipif(VERSION >= (2, 6), reason="accelerate has FSDP2 with this torch")
def test_accelerate_itself_refuses_an_older_torch() -> None:
    with pytest.raises(ImportError, match="FSDP2 requires PyTorch"):
        FullyShardedDataParallelPlugin(fsdp_version=2)


def test_accelerator_that_shards_by_other_means_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP of version 1, and on CPUs accelerate ignores what it was asked for."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for kind in ("FSDP", "MULTI_CPU"):
        accelerator = SimpleNamespace(is_fsdp2=False, distributed_type=f"DistributedType.{kind}")
        with pytest.raises(ValueError, match=f"runs as {kind} without FSDP2.*fsdp_version=2"):
            accelerated._shards(accelerator)
    assert not accelerated._shards(SimpleNamespace(is_fsdp2=False, distributed_type="DistributedType.NO"))


def test_optimizer_whose_groups_are_changed_before_its_first_step_follows_or_refuses() -> None:
    for found in run_ranks(2, cases.groups_changed):
        assert found["followed"] <= 1e-12
        assert "1 of its 2 parameters are there twice" in found["twice"]
        assert "state of 1 parameters that are in its groups no more" in found["state of others"]
