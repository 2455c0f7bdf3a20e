"""What ranks run in tests/fsdp: blocks on weights that `fully_shard` has sharded, against loops on one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import models
import plain_badam
import plain_bread
import torch
import torch.distributed as dist
from bread_rules import RULES
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from colossal_bcd import CAME, Adafactor, AdamW, BlockOptimizer, GaLoreSGD, Lamb, fsdp
from colossal_bcd.fsdp.torch_private import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from support.errors import largest_error

LAYERS, PERIOD, VOCAB = 3, 2, 250
LR = 1e-3
BASES: dict[str, Any] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "our adamw": lambda params: AdamW(params, lr=LR, weight_decay=0.1),
    "lamb": lambda params: Lamb(params, lr=LR, weight_decay=0.1),
    "came": lambda params: CAME(params, lr=LR, weight_decay=0.1),
    "adafactor": lambda params: Adafactor(params, beta1=0.9, weight_decay=0.1),
    "galore": lambda params: GaLoreSGD(params, lr=0.05, momentum=0.9, rank=4, update_proj_gap=2, clamp=True),
}
OFFLOAD = CPUOffloadPolicy(pin_memory=False)
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of `PERIOD` steps for each turn of a block."""

    dtype: torch.dtype = torch.float32
    mode: str = "random"
    base: str = "adamw"
    turns: int = 4
    max_norm: float = 0.0
    accumulate: int = 1
    sync: bool = True
    """Whether each micro-batch is reduced, or the last one with all."""
    checkpoint: bool | None = None
    """`use_reentrant` of gradient checkpointing; None: there is none."""
    evaluate: bool = False
    tied: bool = False
    mesh: str = "fsdp"
    by_user: bool = False
    """Sharded by layers alone, so that the outermost group has embedding, norm and head."""
    early: bool = False
    """Whether the optimizer was made before the model was sharded."""
    prefixes: tuple[str, ...] = tuple(f"model.layers.{layer}." for layer in range(LAYERS))
    rule: str = ""
    """BREAD's correction; none."""
    options: dict[str, Any] = field(default_factory=dict)
    shard: dict[str, Any] = field(default_factory=dict)

    @property
    def blocks(self) -> list[list[str]]:
        return [[prefix] for prefix in self.prefixes]

    def build(self) -> nn.Module:
        model = models.llama(vocab=VOCAB, layers=LAYERS, tied=self.tied).to(self.dtype).train()
        if self.checkpoint is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": self.checkpoint})
        return model

    def wrap(self, model: nn.Module) -> BlockOptimizer:
        bread = {"sgd_mode": "all", "sgd_lr_scaling": 2.0, "correction": RULES[self.rule]} if self.rule else {}
        if self.rule and self.accumulate > 1:
            bread["accumulation_steps"] = self.accumulate
        options = {"switch_block_every": PERIOD, "switch_mode": self.mode, "verbose": 0, **bread, **self.options}
        return BlockOptimizer(
            BASES[self.base](model.parameters()), list(model.named_parameters()), self.blocks, **options
        )

    def attached(self) -> tuple[nn.Module, BlockOptimizer, fsdp.FsdpEngine]:
        model = self.build()
        early = self.wrap(model) if self.early else None
        self.sharded(model)
        optimizer = early or self.wrap(model)
        return model, optimizer, fsdp.attach(model, optimizer, max_norm=self.max_norm)

    def sharded(self, model: nn.Module) -> nn.Module:
        fsdp.enable_cpu()
        mesh = mesh_of(self.mesh)
        if self.mesh in DIVIDED:
            parallelize(model, mesh["tp"])
            mesh = mesh[DIVIDED[self.mesh]]
        if self.by_user:
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh, **self.shard)
            return fully_shard(model, mesh=mesh, **self.shard)
        return fsdp.shard(model, mesh, **self.shard)


DIVIDED: dict[str, Any] = {"tp2": "dp", "hsdp_tp2": ("replicas", "dp")}
"""Meshes of which two ranks divide layers, and their other dims."""
_meshes: dict[str, DeviceMesh] = {}


def mesh_of(name: str) -> DeviceMesh:
    shapes = {
        "fsdp": ((dist.get_world_size(),), ("dp",)),
        "hsdp": ((2, 2), ("replicas", "dp")),
        "tp2": ((2, 2), ("dp", "tp")),
        "hsdp_tp2": ((2, 2, 2), ("replicas", "dp", "tp")),
    }
    if name not in _meshes:
        shape, names = shapes[name]
        _meshes[name] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return _meshes[name]


def parallelize(model: nn.Module, mesh: DeviceMesh) -> None:
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan = {
        **dict.fromkeys(columns, ColwiseParallel()),
        "self_attn.o_proj": RowwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    for layer in model.model.layers:
        parallelize_module(layer, mesh, {name: type(style)() for name, style in plan.items()})


def whole(param: Any) -> Tensor:
    return (param.full_tensor() if hasattr(param, "full_tensor") else param).detach()


def data_rank(case: Case) -> tuple[int, int]:
    """Number of this rank's batches, and how many there are."""
    divisor = 2 if case.mesh in DIVIDED else 1
    return dist.get_rank() // divisor, dist.get_world_size() // divisor


def batch(step: int, number: int) -> Tensor:
    return models.tokens(100 * step + number, vocab=VOCAB)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """As of `models.loss`, but in float64 where the model is, as transformers' own is in float32."""
    logits = model(input_ids=tokens).logits
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(wide[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def advance(case: Case, model: nn.Module, optimizer: Any, step: int) -> list[float]:
    rank, _ = data_rank(case)
    losses = []
    for micro in range(case.accumulate):
        if not case.sync:
            model.set_requires_gradient_sync(micro == case.accumulate - 1)
        loss = loss_of(model, batch(step, rank * case.accumulate + micro))
        (loss / case.accumulate).backward()
        losses.append(loss.item())
    if case.evaluate:
        with torch.no_grad():
            loss_of(model.eval(), batch(step, 50))
        model.train()
    optimizer.step()
    optimizer.zero_grad()
    return losses


def errors(*cases: Case) -> list[dict[str, Any]]:
    """Of each case: whether losses are equal bit for bit, and the largest difference of losses and of weights."""
    return [_errors(case) for case in cases]


def _errors(case: Case) -> dict[str, Any]:
    model, optimizer, engine = case.attached()
    order = [optimizer.schedule.active(turn * PERIOD)[0] for turn in range(case.turns)]
    losses = [advance(case, model, optimizer, step) for step in range(PERIOD * case.turns)]
    for group in engine.groups:
        group.reshard()
    got = [whole(param) for param in model.parameters()]
    _, size = data_rank(case)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, losses)
    if dist.get_rank() > 0:
        return {}
    every_rank = everyone[:: dist.get_world_size() // size]
    losses = [[loss for each in every_rank for loss in each[step]] for step in range(len(losses))]
    model = dataclasses.replace(case, checkpoint=None).build()
    plain: dict[str, Any] = {"max_norm": case.max_norm, "accumulate": case.accumulate}
    if case.rule and not case.sync:  # nothing waits in bfloat16
        plain["accumulate"] = 1
    train: Any = plain_badam.train
    if case.rule:
        train, plain = (
            plain_bread.train,
            {**plain, "rule": case.rule.replace("descent", "sgd"), "lr": 2 * optimizer.param_groups[0]["lr"]},
        )
    want = train(
        model,
        case.prefixes,
        order,
        PERIOD,
        lambda step: batches(case, step, size),
        BASES[case.base],
        loss_of,
        **plain,
    )
    weights = [param.detach() for param in model.parameters()]
    return {
        "equal": losses == want and all(map(torch.equal, got, weights)),
        "losses": largest_error(losses, want),
        "weights": largest_error(got, weights),
        "order": order,
    }


def batches(case: Case, step: int, size: int) -> Sequence[Tensor]:
    return [batch(step, number) for number in range(size * case.accumulate)]
