"""Every optimizer of bitsandbytes on a mesh, in blocks and through files, against the package itself on one process.

Of 8-bit ones the numbers depended on the mesh, as slices had their own quantisation chunks and their own size: matrices
of 67x131 and 64x65 were off by up to 3.5e-2 on two ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes_cases as cases
import pytest
import torch
from bitsandbytes_cases import BLOCKS, PERIOD, SAVED, STEPS, Net, by_module, by_place, by_weight, make, names

from colossal_bcd.testing import run_ranks

NORMS = {"LAMB8bit", "LARS", "LARS8bit", "LARS32bit", "PytorchLARS"}
"""Updates limited by norms of whole weights."""
HALF = {"AdEMAMix32bit", "PagedAdEMAMix32bit"}
"""Have room for one of two first moments, and cannot take a step."""
CAST = {"LAMB", "LAMB32bit"}
"""Become this package's, with a warning."""
SOUND = [name for name in names() if name not in NORMS | HALF | CAST]
MISALIGNED = {"o_proj", "down_proj"}
"""Weights that tensor parallelism divides along dim 1, into rows of no multiple of 256 values."""
FEW = ["Adam8bit", "AdEMAMix8bit", "Lion8bit", "PagedAdamW8bit", "RMSprop"]
MESHES = {
    "data-parallel": [("zero1", False, names()), ("zero2", True, names())],
    "others": [
        *(("hybrid0", True, FEW), ("zero1-bf16", False, FEW), ("zero2-low", False, FEW), ("hybrid1", False, FEW)),
        ("tp2", False, [*FEW, "LAMB8bit", "LAMB"]),
    ],
    "tensor-parallel": [("tp2", False, names())],
}


def walk_all(meshes: list[tuple[str, bool, list[str]]]) -> list[dict[str, Any]]:
    return [cases.walk(*mesh) for mesh in meshes]


@pytest.mark.parametrize("kind", MESHES)
def test_every_optimizer_equals_itself_on_one_process_or_is_refused_by_name(kind: str) -> None:
    assert len(SOUND) >= 30
    ranks = run_ranks(2, walk_all, MESHES[kind])
    for index, (mesh, *_) in enumerate(MESHES[kind]):
        for name, (found, warned) in ranks[0][index].items():
            other, warned_there = ranks[1][index][name]
            case = mesh, name
            assert not any("chunk" in text or "share a scale" in text for text in warned_there), case
            if isinstance(found, str):
                assert name in NORMS | HALF, (case, found)
                assert found == other
                assert f"bitsandbytes.optim.{name}" in found, case
                assert ("Use AdEMAMix(" in found or "Use PagedAdEMAMix(" in found) == (name in HALF), case
            elif name in CAST:
                assert any("it is cast to the LAMB of the paper" in text for text in warned), case
            else:
                different = {key for errors in (found, other) for key, error in errors.items() if error != 0}
                expected = mesh == "tp2" and name.endswith("8bit")
                assert {key.split(".")[-2] for key in different} == (MISALIGNED if expected else set()), case
                assert [f"{name}: ranks have parts of 4 weights" in text for text in warned] == [True] * expected
                assert all(key in warned[0] for key in different), case


OVERRIDDEN = ["Adam8bit", "AdEMAMix8bit", "Lion8bit", "PagedAdamW", "RMSprop8bit"]
COMBINATIONS = [
    ("zero1", False, "weight"),
    ("zero2", False, "place"),
    ("zero1", False, "module"),
    ("zero2", True, "weight"),
    ("zero1", True, "module"),
    ("hybrid0", True, "place"),
]


def override_all(combinations: list[tuple[str, bool, str]]) -> list[dict[str, dict[str, float]]]:
    return [cases.overridden(*combination, OVERRIDDEN) for combination in combinations]


def test_overrides_follow_their_weights() -> None:
    """They were looked up by the tensor's id or place: lost under ZeRO, at another weight after a switch."""
    for rank in run_ranks(2, override_all, COMBINATIONS):
        for combination, found in zip(COMBINATIONS, rank, strict=True):
            for name, errors in found.items():
                if combination[2] == "module":
                    errors.pop(
                        "small.weight", None
                    )  # `by_module` leaves it alone, a new optimizer's reference does not
                assert not any(errors.values()), (combination, name, errors)


@pytest.mark.parametrize("override", [by_weight, by_module, by_place])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overrides_follow_their_weights_through_blocks_on_one_process(override: Any, dtype: torch.dtype) -> None:
    manager = cases.clean()
    model = Net().to(dtype)
    base = make("AdamW8bit", list(model.parameters()))
    override(model, manager)
    optimizer = cases.block_optimizer(base, model)
    found = {}
    for step in range(3 * PERIOD):
        for name, param in model.named_parameters():
            if param.requires_grad:
                param.grad = cases.gradient(name, tuple(param.shape), step).to(dtype)
        active = {name: param for name, param in model.named_parameters() if param.requires_grad}
        tensors = dict(zip(active, [p for group in base.param_groups for p in group["params"]], strict=True))
        if step % PERIOD == 0:
            optimizer.step()
            found.update({name: base.state[tensors[name]]["state1"].dtype for name in active})
        else:
            optimizer.step()
    assert found["square.weight"] == torch.float32
    assert found["wide.weight"] == found["last.weight"] == torch.uint8
    assert found["small.weight"] == (torch.float32 if override is by_module else torch.uint8)
    # What other optimizers in the process read is as it was.
    assert set(manager.index2config) == ({(0, 2), (0, 3), (0, 5)} if override is by_place else set())


def test_a_limit_by_whole_norms_is_refused_where_weights_are_divided() -> None:
    text = run_ranks(2, cases.limited)[0]
    assert "max_unorm=0.5 for 'square.weight'" in text
    assert "Leave it at 0" in text


CHECKPOINTS = [
    ("zero2", True),
    ("zero1-bf16", False),
    ("hybrid0", True),
    ("tp2", False),
    ("fsdp2", True),
    ("fsdp2-rows", False),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("bitsandbytes")
    return folder, run_ranks(2, save_all, CHECKPOINTS, str(folder))


def save_all(checkpoints: list[tuple[str, bool]], folder: str) -> list[dict[str, bool | str]]:
    chosen = {"zero2": SOUND}
    few = ["Adam8bit", "AdEMAMix8bit", "PagedLion8bit", "AdEMAMix", "SGD8bit"]
    return [cases.saves(mesh, blocks, chosen.get(mesh, few), f"{folder}/{mesh}") for mesh, blocks in checkpoints]


def test_every_optimizer_goes_on_bit_for_bit_on_the_same_mesh(saved: Any) -> None:
    """Saving raised for state with another shape than the weight: scales of chunks, tables, two moments in one."""
    for rank in saved[1]:
        for checkpoint, found in zip(CHECKPOINTS, rank, strict=True):
            assert all(value is True for value in found.values()), (checkpoint, found)
        assert set(rank[0]) == set(SOUND)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_every_optimizer_goes_on_on_another_mesh_as_on_one_process(num_ranks: int, saved: Any) -> None:
    chosen = SOUND if num_ranks == 3 else ["Adam8bit", "AdEMAMix8bit", "Lion8bit"]
    for rank in run_ranks(num_ranks, cases.goes_on, "zero1", True, chosen, f"{saved[0]}/zero2"):
        for name in chosen:
            assert not isinstance(rank[name], str), rank[name]
            assert not any(rank[name].values()), (name, rank[name])


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_chunks_of_whole_rows_go_on_under_fsdp2_and_zero(num_ranks: int, saved: Any) -> None:
    """The last rank of FSDP2 has fewer rows and no padding: it raised alone, and the others waited."""
    chosen, folder = ["Adam8bit", "AdEMAMix8bit"], f"{saved[0]}/fsdp2-rows"
    for mesh in ("fsdp2-rows", "zero1-rows"):
        for rank in run_ranks(num_ranks, cases.goes_on, mesh, False, chosen, folder, timeout=600):
            for name in chosen:
                assert rank[name] == {"wide.weight": 0.0, "last.weight": 0.0}, (mesh, rank[name])


def test_chunks_of_shards_load_on_the_same_shards_only(saved: Any) -> None:
    text = run_ranks(1, cases.load_tensor_parallel, f"{saved[0]}/tp2/Adam8bit")[0]
    assert "'absmax1' of parameter 'model.layers.0.self_attn.o_proj.weight' is that of shard 0 of 2 along dim 1" in text
    assert "on the number of ranks that saved it" in text


def test_a_block_optimizer_goes_on_on_one_process(tmp_path: Path) -> None:
    for name in SOUND:
        cases.clean()
        runs = [plain_blocks(name) for _ in range(2)]
        for step in range(SAVED):
            advance(*runs[0], step)
        torch.save(runs[0][1].state_dict(), tmp_path / "state")
        runs[1][0].load_state_dict(runs[0][0].state_dict())
        runs[1][1].load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        for step in range(SAVED, STEPS):
            for run in runs:
                advance(*run, step)
        assert cases.same(dict(runs[0][0].state_dict()), dict(runs[1][0].state_dict())), name


def plain_blocks(name: str) -> tuple[Net, Any]:
    model = Net()
    return model, cases.block_optimizer(make(name, list(model.parameters())), model)


def advance(model: Net, optimizer: Any, step: int) -> None:
    for name, param in model.named_parameters():
        if name.startswith(tuple(BLOCKS[step // PERIOD % len(BLOCKS)])):
            param.grad = cases.gradient(name, tuple(param.shape), step)
    optimizer.step()
