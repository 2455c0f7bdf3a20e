"""FSDP2 on CPUs, on the version of torch that needs help and on the one that does not."""

import pytest
import torch
from support.fsdp_cases import gradients_on_cpu, refused_on_cpu

from colossal_bcd.fsdp import cpu, enable_cpu, torch_private
from colossal_bcd.testing import run_ranks

BY_ITSELF = torch_private.VERSION >= (2, 13)


@pytest.mark.parametrize(
    ("num_ranks", "hsdp", "num_batches", "bound"),
    # A sum of two is rounded once, on one process as on two ranks; longer ones in another order, by a few times 2^-24
    # of gradients below 1.
    [(2, False, 1, 0.0), (3, False, 2, 1e-6), (4, True, 2, 1e-6)],
    ids=["2", "3", "2x2"],
)
def test_gradients_on_cpus_are_averages(num_ranks, hsdp, num_batches, bound):
    """gloo's reduce-scatter takes torch 2.5's average for a sum without a word: gradients are N times too large."""
    assert max(run_ranks(num_ranks, gradients_on_cpu, torch.float32, hsdp, num_batches)) <= bound


@pytest.mark.skipif(BY_ITSELF, reason="this torch trains on CPUs by itself")
def test_torch_that_needs_help_does_not_train_without():
    """Guards the stand-ins: they can go when this fails."""
    assert run_ranks(2, refused_on_cpu) == ["FSDP requires CUDA for streams"] * 2


@pytest.mark.skipif(not BY_ITSELF, reason="this torch needs help")
def test_torch_that_needs_none_is_left_alone():
    collectives = torch_private.module_of_fsdp("_fsdp_collectives")
    before = dict(vars(collectives))
    enable_cpu()
    assert dict(vars(collectives)) == before


def test_version_in_which_gradients_may_be_sums_is_refused(monkeypatch):
    monkeypatch.setattr(cpu, "_installed", [])
    monkeypatch.setattr(cpu, "VERSION", (2, 8))
    with pytest.raises(RuntimeError, match="expected 2.5, or 2.13 and later.*Install one of them"):
        enable_cpu()


def test_streams_of_real_devices_are_not_taken_away(monkeypatch):
    monkeypatch.setattr(cpu, "_installed", [])
    monkeypatch.setattr(cpu, "VERSION", (2, 5))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="finds CUDA devices.*CUDA_VISIBLE_DEVICES="):
        enable_cpu()
