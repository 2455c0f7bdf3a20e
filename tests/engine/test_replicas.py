"""Blocks on several processes without an engine: plain loops, torch's DDP, accelerate; equal to one process."""

from __future__ import annotations

import re
from typing import Any

import pytest
import replica_cases as cases
import torch

from colossal_bcd.testing import run_ranks

KINDS = cases.KINDS
MODES = ("ascending", "descending", "random", "fixed", "importance")

SIGNS = {"sgd_mode": "all", "sgd_use_sign": True, "sgd_lr_scaling": 0.1}

TABLE: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    **{f"{mode}-{kind}": ((kind, {"switch_mode": mode}), {}) for mode in MODES for kind in KINDS},
    **{f"always-{kind}": ((kind, {"active_modules": ["lm_head."]}), {"evaluate": kind != "plain"}) for kind in KINDS},
    **{f"clip-{kind}": ((kind, {}), {"clip": 0.05, "accumulate": 3}) for kind in KINDS},
    **{
        f"{mode} corrected {correction}-{kind}": ((kind, {"sgd_mode": mode, "correction": correction}), {})
        for mode in ("all", "partial")
        for correction in (None, "momentum", "optimizer")
        for kind in KINDS
    },
    # Gradients wait in bfloat16, of which signs are exact.
    "corrected micro-batches": (("ddp", {**SIGNS, "accumulation_steps": 2}), {"accumulate": 2}),
    "fewer than declared": (("ddp", {**SIGNS, "accumulation_steps": 3}), {"accumulate": 2}),
    **{
        f"{miss} miss {fixed}-{kind}": (
            (kind, {"switch_mode": "fixed", "start_block": 1} if fixed else {"active_modules": ["lm_head."]}),
            {"miss": miss, "accumulate": 2, "clip": 0.05},
        )
        for miss in ("some", "all")
        for fixed in (True, False)
        for kind in KINDS
    },
    **{
        f"ratio {mask} {dense}-{kind}": (
            (kind, {"ratio": True, "mask_mode": mask, "dense_gradients": dense}),
            {"clip": 0.05, "accumulate": 2},
        )
        for mask in ("adjacent", "scatter")
        for dense in (False, True)
        for kind in KINDS
    },
    **{
        f"lora {mode}-{kind}": ((kind, {"lora_mode": mode}), {"lora": True})
        for mode in ("all", "partial", "adapter_only")
        for kind in KINDS
    },
    "every pass averaged": (("ddp", {}), {"clip": 0.05, "accumulate": 2, "no_sync": False}),
}


def compare(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], bound: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("world", [2, 3])
def test_replicas_equal_one_process(world: int) -> None:
    table = {name: case for name, case in TABLE.items() if world == 2 or case[0][0] in ("plain", "ddp unused")}
    results = run_ranks(world, cases.many, table)
    for name, (args, options) in table.items():
        want = cases.whole(
            world, args[1], **{k: v for k, v in options.items() if k in ("accumulate", "clip", "miss", "lora")}
        )
        for result in results:
            compare(result[name]["weights"], want, 1e-12)
            assert all(call.keys() == {"all_reduce"} for call in result[name]["calls"])
            if "sgd_mode" not in args[1]:
                assert [call["all_reduce"] for call in result[name]["calls"]] == collectives(args[0], options)


def collectives(kind: str, options: dict[str, Any]) -> list[int]:
    """All-reduces of every step: one a synchronised backward pass, one a switch, and one check of the replicas."""
    passes = options.get("accumulate", 1) if kind == "plain" or "no_sync" in options else 1
    return [passes + (step % cases.PERIOD == 1) + (step == 0) for step in range(cases.STEPS)]


@pytest.fixture(scope="module")
def others() -> list[dict[str, Any]]:
    return run_ranks(2, cases.one_after_the_other)


REFUSED = {
    "weights": r"got other weights in \d+ of \d+ parameters, such as 'embed_tokens.weight', on ranks \[1\] and on "
    r"rank 0, expected equal replicas\. Seed before",
    "ratio weights": r"got other weights in \d+ of \d+ parameters",
    "dtypes": r"got other parameters .*float32.* instead of .*float64",
    "blocks": "got other blocks, or another schedule or progress in it, on ranks",
    "a group that is none": "data_group: got 'all', expected 'auto', a process group",
    "alone in a DDP": r"got None and a model in a DistributedDataParallel over 2 processes.*Leave data_group",
    "static": r"with static_graph=True: it configures DDP's reducer.*Leave it out",
    "hook": r"with a communication hook: it configures",
    "another group": r"data_group: got .* and a model in a DistributedDataParallel over 2 processes",
    "join": r"DistributedDataParallel.join .* expected as many batches on every process.*Drop the last",
    "drift": r"weights of replicas at a switch: ranks \[1\] differ from rank 0.*random numbers, clipping",
    "DTensor": r"'lm_head.weight' is a DTensor of which this process has a part, expected whole.*booster.boost",
    "DeepSpeed": r"the model is in a DeepSpeedEngine, expected whole weights.*booster.boost",
    "ratio DeepSpeed": r"the model is in a DeepSpeedEngine",
}


def test_what_cannot_be_averaged_is_refused_on_all_ranks(others: list[dict[str, Any]]) -> None:
    for name, pattern in REFUSED.items():
        for result in others:
            assert re.search(pattern, result["refusals"][name]), (name, result["refusals"][name])
    assert others[0]["refusals"].keys() == REFUSED.keys()


def test_plain_optimizers_are_averaged_by_ddp_alone(others: list[dict[str, Any]]) -> None:
    for name, want in others[0]["plain"].items():
        compare(others[1]["plain"][name], want, 0)
        model = cases.Net(torch.float32)
        optimizer = cases.optimizer_named(name, model)
        for step in range(cases.STEPS):
            sum(model(cases.batch(step, rank))["loss"] / 2 for rank in range(2)).backward()
            optimizer.step()
            optimizer.zero_grad()
        # Steps of 1e-3, seven of them: where a float32 gradient is near zero its sign is rounding's.
        compare(want, cases.weights(model), 2e-4)


def test_models_wrapped_again_or_together_are_averaged_once(others: list[dict[str, Any]]) -> None:
    want = {f"{index}.{name}": value for index in range(2) for name, value in cases.whole(2, {}, seed=index).items()}
    for result in others:
        compare(result["two"], want, 1e-12)


def test_low_precision_masters_follow_the_weights_that_ddp_copies(others: list[dict[str, Any]]) -> None:
    want = cases.whole(2, {}, dtype=torch.bfloat16, apart=True)
    for kind in KINDS:
        for result in others:
            compare(result["low"][kind]["weights"], want, 0)


def test_loss_scaling_skips_a_step_on_all_ranks(others: list[dict[str, Any]]) -> None:
    want = cases.whole(2, {}, clip=0.05)
    for result in others:
        assert result["scaled"]["steps"] == cases.STEPS
        compare(result["scaled"]["weights"], want, 1e-12)


def test_groups_of_replicas_and_processes_on_their_own() -> None:
    results = run_ranks(3, cases.groups)
    pair = cases.whole(2, {})
    compare(results[0]["pair"], pair, 1e-12)
    compare(results[1]["pair"], pair, 1e-12)
    compare(results[2]["pair"], results[2]["search"], 0)
    compare(results[0]["search"], cases.whole(1, {}), 1e-12)
    assert not torch.equal(results[0]["search"]["layers.0.up.weight"], results[1]["search"]["layers.0.up.weight"])
