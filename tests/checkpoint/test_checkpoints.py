"""Saved on any mesh, loaded on any mesh, in fresh processes, in the middle of a block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoint_cases as cases
import pytest
import torch
from checkpoint_cases import MESHES, OPTIMIZERS, fitting
from safetensors import safe_open

from colossal_bcd.testing import run_ranks

QUICK = ["lamb", "came", "golore", "badam", "ratio"]
REPEATED = {"adamw", "galore", "galore-adafactor", "golore-sgd", "adamw-8bit", "came-8bit", "ratio-adjacent"}
"""Optimizers whose state is of kinds that others have, too."""
SAMPLE = {
    ("zero2 x2", "zero2 x2"): [name for name in OPTIMIZERS if name not in REPEATED],
    ("tp2+zero2 x4", "tp2+zero2 x4"): QUICK,
    ("tp2+zero2 x4", "zero2 x3"): QUICK,
    ("zero2 x2", "pp2"): QUICK,
    ("pp2", "1 rank"): QUICK,
    ("fsdp x2", "fsdp x2"): [*QUICK, "torch", "bread", "badam-residual", "bread-lora-came", "galore-8bit"],
    ("fsdp x2", "zero2 x2"): ["badam", "badam-came", "came"],
    ("fsdp x2", "fsdp x3"): ["badam", "badam-came", "came"],
    ("zero2 x2", "fsdp x2"): ["badam", "badam-came", "came"],
    ("tp2+zero2 x4", "tp2+fsdp x4"): ["badam", "came"],
    # Slices of its matrices begin in the middle of a row.
    ("zero2 x3", "zero2 x3"): ["golore"],
    ("zero2 x2", "1 rank"): ["bread-lora", "bread-lora-came"],
}
"""What runs in `make test`; `make test-full` runs all pairs with all optimizers."""
PAIRS = [
    *(pytest.param(*pair, names, id=f"{' to '.join(pair)}, {len(names)} optimizers") for pair, names in SAMPLE.items()),
    *(
        pytest.param(
            source, target, fitting(OPTIMIZERS, source, target), id=f"{source} to {target}", marks=pytest.mark.full
        )
        for source in MESHES
        for target in MESHES
    ),
]
TOLERANCE = 0.02
"""Of a loss of 5.5, between meshes that add bfloat16 activations, 2^-8 apart, in another order; 2e-4 is typical."""
PIPELINE = 2**-4
"""With a pipeline: ColossalAI adds losses of micro-batches in bfloat16, whose numbers here lie 2^-5 apart."""
QUANTISED = 0.0072
"""Of the largest of 256 neighbours: the error of 8-bit storage, where other ranks have other neighbours."""


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a mesh the folder of its checkpoints, and the losses of the runs that went on; trained once for all tests."""
    folders: dict[str, Path] = {}
    losses: dict[str, dict[str, list[float]]] = {}

    def make(mesh: str, names: list[str]) -> tuple[Path, dict[str, list[float]]]:
        folder = folders.setdefault(mesh, tmp_path_factory.mktemp("saved"))
        missing = [name for name in names if name not in losses.setdefault(mesh, {})]
        if missing:
            ranks = run_ranks(MESHES[mesh][0], cases.train_and_save_each, mesh, missing, str(folder))
            losses[mesh].update(known(ranks))
        return folder, losses[mesh]

    return make


def known(ranks: list[dict[str, list[Any]]]) -> dict[str, list[float]]:
    """Losses from a rank that knows them; all that do agree."""
    result = {}
    for name in ranks[0]:
        losses = [rank[name] for rank in ranks if rank[name][0] is not None]
        assert all(other == losses[0] for other in losses)
        result[name] = losses[0]
    return result


def tensors_of(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All tensors of an optimizer's checkpoint by the reader of safetensors, and the index."""
    index = json.loads((folder / "optimizer_index.json").read_text())
    tensors = {}
    for name in index["files"]:
        with safe_open(folder / name, framework="pt") as file:
            tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    return tensors, index


@pytest.mark.parametrize(("source", "target", "names"), PAIRS)
def test_a_run_goes_on_from_any_mesh_on_any_mesh(
    source: str, target: str, names: list[str], saved: Any, tmp_path: Path
) -> None:
    folder, straight = saved(source, names)
    ranks = run_ranks(MESHES[target][0], cases.resume_each, target, names, str(folder), str(tmp_path))
    losses = known(ranks)
    for name in names:
        if source == target:
            assert losses[name] == straight[name], name
        bound = PIPELINE if "pp2" in (source, target) else TOLERANCE
        assert losses[name] == pytest.approx(straight[name], abs=bound), name
        compare(name, tensors_of(folder / name / "optimizer"), tensors_of(tmp_path / name / "optimizer"))


def compare(name: str, before: Any, after: Any) -> None:
    """What was loaded and saved again is what was loaded: names, shapes, numbers, and every bit."""
    (tensors, index), (again, index_again) = before, after
    for said in (index, index_again):
        del said["files"]
        for entry in said["entries"].values():
            del entry["file"]
    assert index == index_again, name
    assert tensors.keys() == again.keys()
    for key, tensor in tensors.items():
        if name.endswith("8bit") and key.endswith("exp_avg"):
            assert (again[key] - tensor).abs().max() <= QUANTISED * tensor.abs().max(), (name, key)
        elif key.endswith("_total"):
            # Meshes that keep no such mean write that of the rows, which float32 adds in another order.
            torch.testing.assert_close(again[key], tensor, rtol=1e-5, atol=0)
        else:
            assert torch.equal(again[key], tensor), (name, key)


def test_files_have_masters_and_state_of_adapters_that_wait(saved: Any) -> None:
    tensors, index = tensors_of(saved("zero2 x2", ["bread-lora"])[0] / "bread-lora" / "optimizer")
    waiting = index["waiting"]
    assert {name.split(".layers.")[1][0] for name in waiting} == {"0", "1"}
    assert len(waiting) == 2 * 4
    assert not {name for group in index["groups"] for name in group["parameters"]} & set(waiting)
    for name in waiting:
        assert tensors[f"{name}.master"].dtype == torch.float32
        # Layer 0 has trained for two steps, layer 1 for four.
        assert tensors[f"{name}.step"] == (2 if ".layers.0." in name else 4)
        assert tensors[f"{name}.exp_avg"].abs().max() > 0


def test_files_do_not_depend_on_the_mesh(saved: Any) -> None:
    for name in QUICK:
        entries = []
        for mesh in ("zero2 x2", "tp2+zero2 x4"):
            tensors, index = tensors_of(saved(mesh, QUICK)[0] / name / "optimizer")
            entries.append({key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()})
            assert {key: tuple(said["shape"]) for key, said in index["entries"].items()} == {
                key: tuple(tensor.shape) for key, tensor in tensors.items()
            }
        assert entries[0] == entries[1], name


def test_files_have_masters_and_whole_shapes(saved: Any) -> None:
    tensors, index = tensors_of(saved("tp2+zero2 x4", QUICK)[0] / "came" / "optimizer")
    assert tensors["model.embed_tokens.weight.master"].shape == (250, 64)
    assert tensors["model.embed_tokens.weight.master"].dtype == torch.float32
    assert tensors["model.layers.0.mlp.down_proj.weight.exp_avg_sq_row"].shape == (64,)
    assert tensors["model.layers.0.mlp.down_proj.weight.exp_avg_sq_col"].shape == (96,)
    assert index["numbers"]["lm_head.weight"] == {"step": cases.BEFORE}
    block = tensors_of(saved("tp2+zero2 x4", QUICK)[0] / "badam" / "optimizer")
    active = {name.split(".")[2] for name in block[0]}
    assert len(active) == 1
    assert block[1]["block"]["num_steps"] == cases.BEFORE


def test_files_honour_the_size_limit(saved: Any) -> None:
    folder = saved("zero2 x2", QUICK)[0] / "lamb" / "optimizer"
    tensors, index = tensors_of(folder)
    assert len(index["files"]) > 3
    by_file: dict[str, list[int]] = {}
    for key, said in index["entries"].items():
        by_file.setdefault(said["file"], []).append(tensors[key].nbytes)
    assert all(sum(sizes) <= cases.SHARD * 2**20 or len(sizes) == 1 for sizes in by_file.values())
    assert sorted(path.name for path in folder.iterdir()) == sorted([*index["files"], "optimizer_index.json"])
