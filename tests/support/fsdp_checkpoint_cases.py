"""What ranks run in test_fsdp_checkpoints.py: runs that are saved in the middle of a block, and go on elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsdp_block_cases as cases
import models
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsdp_block_cases import Case, whole
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from colossal_bcd import BlockOptimizer, fsdp
from colossal_bcd.checkpoint.save import agreed_state
from colossal_bcd.checkpoint.trained import EngineState
from colossal_bcd.fsdp.checkpoint import MANIFEST, Checkpointable, load_optimizer, save_optimizer

SAVED, STEPS = 5, 5
"""Steps before and after a checkpoint: the third block has had one of its two steps."""


def train(case: Case, model: nn.Module, optimizer: Any, first: int) -> list[float]:
    """Steps on the same batch on every rank, so that all meshes train alike; the losses."""
    losses = []
    for step in range(first, first + STEPS):
        loss = models.loss(model, cases.batch(step, 0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def result(case: Case, model: nn.Module, optimizer: Any) -> dict[str, Any]:
    losses = train(case, model, optimizer, SAVED)
    return {"losses": losses, "weights": [whole(param) for param in model.parameters()]}


def write(engine: Any, path: Path, way: str) -> None:
    """By this package's files, or by torch's."""
    if way == "files":
        save_optimizer(engine, path)
    else:
        dcp.save({"optim": Checkpointable(engine)}, checkpoint_id=path)


def read(engine: Any, path: Path, way: str) -> None:
    """What `write` has written."""
    if way == "files":
        load_optimizer(engine, path)
    else:
        state = Checkpointable(engine, resume_from=path)
        dcp.load({"optim": state}, checkpoint_id=path)
        # One that is kept for the next save has what trains, not the empty tensors into which it has loaded.
        assert state.state_dict()[MANIFEST]


def save(folder: Path, named: dict[str, Case], way: str = "files") -> dict[str, Any]:
    """Train, save, and go on."""
    found = {}
    for name, case in named.items():
        model, optimizer, engine = case.attached()
        train(case, model, optimizer, 0)
        weights = {key: whole(param) for key, param in model.named_parameters()}
        if dist.get_rank() == 0:
            (folder / name).mkdir()
            torch.save(weights, folder / name / "weights.pt")
        write(engine, folder / name / "optimizer", way)
        found[name] = result(case, model, optimizer)
    return found


def load(folder: Path, named: dict[str, Case], way: str = "files") -> dict[str, Any]:
    """Go on with what was saved."""
    dist.barrier()
    found = {}
    for name, case in named.items():
        model = case.build()
        model.load_state_dict(torch.load(folder / name / "weights.pt", weights_only=True), strict=False)
        case.sharded(model)
        optimizer = case.wrap(model)
        engine = cases.fsdp.attach(model, optimizer, max_norm=case.max_norm)
        read(engine, folder / name / "optimizer", way)
        assert optimizer.num_steps == SAVED
        found[name] = result(case, model, optimizer)
    return found


class Rows(nn.Module):
    """Weights of which the last of three ranks has no values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ParameterList([torch.ones(1, 5), torch.ones(1, 7), torch.ones(4, 5)])])

    def forward(self) -> torch.Tensor:
        return sum((param.square().sum() for param in self.layers[0]), torch.zeros(()))


def kinds_of_empty_ranks() -> set[str]:
    """Kinds of the state that a file has of torch's AdamW, but for its count."""
    fsdp.enable_cpu()
    model = Rows()
    fsdp.fully_shard(model, mesh=cases.mesh_of("fsdp"))
    base = torch.optim.AdamW(model.parameters())
    optimizer = BlockOptimizer(base, list(model.named_parameters()), [["layers.0."]], verbose=0)
    engine = fsdp.attach(model, optimizer)
    model().backward()
    optimizer.step()
    _, assembly, _ = agreed_state(EngineState(engine, engine.parameter_names))
    return {tensor.kind for tensor in assembly.tensors if tensor.state != "step"}


def message(call: Any) -> str:
    try:
        call()
    except (ValueError, CheckpointException) as error:
        return str(error)
    return ""


def without_resume_from(folder: Path) -> dict[str, Any]:
    """Errors of loads by a new optimizer: of its first block, of another, and of a file of something else."""
    case = Case(dtype=torch.bfloat16, mode="ascending")
    for name, steps in (("less", 1), ("other", 3)):
        model, optimizer, engine = case.attached()
        for step in range(steps):
            cases.advance(case, model, optimizer, step)
        write(engine, folder / name, "torch")
    dcp.save({"something": torch.ones(3)}, checkpoint_id=folder / "foreign")
    _, optimizer, engine = case.attached()

    def load_present(name: str) -> None:
        dcp.load({"optim": Checkpointable(engine)}, checkpoint_id=folder / name)

    found: dict[str, Any] = {
        "less": message(lambda: load_present("less")),
        "other": message(lambda: load_present("other")),
        "foreign": message(lambda: read(engine, folder / "foreign", "torch")),
    }
    return {**found, "steps": optimizer.num_steps}
