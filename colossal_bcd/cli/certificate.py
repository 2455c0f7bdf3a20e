"""`verify`: local ranks against one process, in float64, on gradients that are given.

Gradients are drawn, not computed by the model, so that nothing is compared but what this package does: averages over
ranks, blocks, the rules with their rounds, and the weights that come back.  A model's own arithmetic, of which a Llama
does part in float32, would hide differences of the size that is looked for.  Data-parallel ranks have other gradients.

    loss = sum over all weights that train of (weight * given gradient)        its gradient is the given one, exactly
"""

from __future__ import annotations

import math
import platform
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import colossal_bcd
from colossal_bcd.block.trained import is_plain
from colossal_bcd.cli.budget import Job
from colossal_bcd.cli.meshes import MeshSize
from colossal_bcd.cli.models import Model
from colossal_bcd.cli.optimizers import choice_of, ready
from colossal_bcd.sharding.dtensor import MeshAxes, is_dtensor, layout_of, local_values
from colossal_bcd.testing import run_ranks

BOUND = 1e-12
"""Of the largest difference of a weight, in units of the tensor's largest weight, or of 1."""
MOST = 20_000_000
"""Parameters of a model that this machine is asked to train in float64 on every rank."""
PERIOD = 2
"""Steps of a block, so that a short run switches."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the ranks train; it pickles."""

    name: str
    config: dict[str, Any]
    optimizer: str
    rank: int
    blocks: int | None
    lr: float
    mesh: MeshSize
    steps: int
    seed: int

    def model(self) -> nn.Module:
        import transformers

        values = dict(self.config)
        torch.manual_seed(self.seed)
        return Model(self.name, transformers.AutoConfig.for_model(values.pop("model_type"), **values)).build(
            torch.float64
        )

    def ready(self, model: nn.Module) -> tuple[nn.Module, Any]:
        return ready(model, self.optimizer, rank=self.rank, blocks=self.blocks, lr=self.lr, period=PERIOD)

    def gradient(self, name: str, shape: tuple[int, ...], step: int, rank: int) -> Tensor:
        """The gradient of one data-parallel rank, the same wherever it is drawn."""
        seed = zlib.crc32(f"{self.seed} {name} {step} {rank}".encode())
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def certificate(job: Job, *, steps: int, seed: int, timeout: float) -> dict[str, Any]:
    """Train on local ranks and on one process, and compare every tensor.

    Args:
        job: model, optimizer and mesh count.
        steps: of the run.
        seed: of weights and gradients.
        timeout: seconds that each of the two runs may take.
    Raises:
        ValueError: the model is too large, or the mesh is none that local ranks can make.
        RankError: a rank failed.
    """
    case, values = _case_of(job, steps, seed)
    mesh = case.mesh
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "weights.pt"))
        (moved,) = run_ranks(1, _alone, case, path, timeout=timeout)
        errors = run_ranks(mesh.gpus, _divided, case, path, timeout=timeout)
    tensors = {name: {**each, "error": max(error[name] for error in errors)} for name, each in moved.items()}
    worst = max(tensors, key=lambda name: tensors[name]["error"] / max(1.0, tensors[name]["largest"]))
    passed = all(each["error"] <= BOUND * max(1.0, each["largest"]) for each in tensors.values())
    trained = any(each["moved"] > 0 for each in tensors.values())
    return {
        "versions": {
            "colossal_bcd": colossal_bcd.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "model": {"name": case.name, "parameters": values, "config": case.config},
        "optimizer": {"name": case.optimizer, "rank": case.rank, "blocks": case.blocks, "lr": case.lr},
        "mesh": {
            "ranks": mesh.gpus,
            "dp": mesh.dp,
            "tp": mesh.tp,
            "zero": mesh.zero,
            "sharded_weights": mesh.sharded_weights,
        },
        "run": {
            "steps": steps,
            "seed": seed,
            "dtype": "float64",
            "gradients": "given, other ones on each data-parallel rank",
        },
        "bound": BOUND,
        "tensors": tensors,
        "largest": {"tensor": worst, "error": tensors[worst]["error"]},
        "verdict": "equal" if passed and trained else "different",
    }


def _case_of(job: Job, steps: int, seed: int) -> tuple[Case, int]:
    """What the ranks train, and the number of its parameters."""
    mesh = job.mesh
    if mesh.gpus < 2 or mesh.pp > 1:
        raise ValueError("verify: expected a mesh of two or more ranks without a pipeline. Take --gpus 2 --zero 2.")
    if choice_of(job.optimizer).lora:
        raise ValueError("--optimizer: verify trains weights, not adapters. Take adamw, which lora trains them with.")
    values = sum(param.numel() for param in job.model.on_meta(torch.float64).parameters())
    if values > MOST:
        raise ValueError(
            f"MODEL: has {values:,} parameters, expected at most {MOST:,} for a run in float64 on this machine. Shrink "
            "it: --layers 2 --vocab 1000 --width 16 keeps 2 layers and a sixteenth of every width."
        )
    case = Case(
        name=job.model.name,
        config=job.model.config.to_dict(),
        optimizer=job.optimizer,
        rank=job.rank,
        blocks=job.blocks,
        lr=job.lr,
        mesh=mesh,
        steps=steps,
        seed=seed,
    )
    return case, values


def _alone(case: Case, path: str) -> dict[str, dict[str, Any]]:
    """Train on one process, with the averages of the ranks' gradients, and save the weights."""
    model, optimizer = case.ready(case.model())
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for step in range(case.steps):
        for name, param in model.named_parameters():
            if param.requires_grad:
                shape = tuple(param.shape)
                parts = [case.gradient(name, shape, step, rank) for rank in range(case.mesh.dp)]
                param.grad = torch.stack(parts).sum(0) / case.mesh.dp
        optimizer.step()
        optimizer.zero_grad()
    after = {name: param.detach() for name, param in model.named_parameters()}
    torch.save(after, path)
    return {
        name: {
            "shape": list(weight.shape),
            "largest": float(weight.abs().amax()),
            "moved": float((weight - before[name]).abs().amax()),
        }
        for name, weight in after.items()
    }


def _divided(case: Case, path: str) -> dict[str, float]:
    """Train on this rank of the mesh; the largest difference of each tensor here."""
    model = case.model()
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    train = _under_fsdp if case.mesh.sharded_weights else _under_plugin
    found = train(case, model, shapes)
    want = torch.load(path, weights_only=True)
    errors = {}
    for name, (layout, local) in found.items():
        theirs = layout.shard(want[name]).reshape(-1)[: layout.num_local]
        ours = local.detach().reshape(-1)[: layout.num_local]
        error = float((ours - theirs).abs().amax()) if theirs.numel() else 0.0
        errors[name] = error if math.isfinite(error) else math.inf
    return errors


def _under_plugin(case: Case, model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    try:
        from colossal_bcd.booster import HybridParallelPlugin, LowLevelZeroPlugin
    except ImportError:
        raise ImportError(
            "this mesh needs ColossalAI: pip install 'colossal_bcd[colossalai]', or --sharded-weights"
        ) from None
    mesh, (model, optimizer) = case.mesh, case.ready(model)
    plugin: Any
    if mesh.tp == 1 and mesh.zero:
        plugin = LowLevelZeroPlugin(stage=mesh.zero, precision="fp32")
    else:
        plugin = HybridParallelPlugin(tp_size=mesh.tp, pp_size=1, zero_stage=mesh.zero, precision="fp32")
    boosted, engine, *_ = plugin.configure(model, optimizer)
    rank = torch.distributed.get_rank(plugin.dp_group) if mesh.tp > 1 else torch.distributed.get_rank()
    names = {param: name for name, param in boosted.unwrap().named_parameters()}
    for step in range(case.steps):
        products = [
            (param * layout.shard(case.gradient(names[param], layout.shape, step, rank))).sum()
            for param, layout in engine.layouts.items()
            if param.requires_grad
        ]
        engine.backward(torch.stack(products).sum())
        engine.step()
        engine.zero_grad()
    return {names[param]: (layout, param) for param, layout in engine.layouts.items()}


def _under_fsdp(case: Case, model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    from colossal_bcd import fsdp
    from colossal_bcd.fsdp.sharded_model import separate_groups

    size = case.mesh
    fsdp.enable_cpu()
    mesh = init_device_mesh("cpu", (size.dp, size.tp), mesh_dim_names=("dp", "tp"))
    if size.tp > 1:
        fsdp.parallelize(model, mesh["tp"])
    names = {module: prefix for prefix, module in model.named_modules()}
    groups = {
        module: [f"{names[module]}.{name}" for name, _ in module.named_parameters()]
        for module in separate_groups(model)
    }
    rest = [name for name in shapes if all(name not in inside for inside in groups.values())]
    fsdp.shard(model, mesh["dp"])
    model, optimizer = case.ready(model)
    if not is_plain(optimizer):
        fsdp.attach(model, optimizer)
    rank = mesh["dp"].get_local_rank()
    now = {"step": 0}

    def loss_of(inside: list[str]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for name in inside:
            param = model.get_parameter(name)
            if param.requires_grad:
                gradient = case.gradient(name, shapes[name], now["step"], rank)
                local: Any = param.to_local() if is_dtensor(param) else param
                part = layout_of(param, MeshAxes()).shard(gradient).view(local.shape)
                total = total + (local * part).sum()
        return total

    for module, inside in groups.items():
        module.forward = lambda inside=inside: loss_of(inside)
    model.forward = lambda: sum((module() for module in groups), loss_of(rest))
    for step in range(case.steps):
        now["step"] = step
        model().backward()
        optimizer.step()
        optimizer.zero_grad()
    axes = MeshAxes()
    return {name: (layout_of(param, axes), local_values(param)) for name, param in model.named_parameters()}
