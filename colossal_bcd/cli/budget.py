"""`estimate`: the bytes of the GPU that needs most, and what a step sends."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block.trained import Trained, trained_of
from colossal_bcd.cli.meshes import MeshSize, layouts_of, stage_names
from colossal_bcd.cli.models import Model
from colossal_bcd.cli.optimizers import choice_of, ready
from colossal_bcd.low_rank.projection import Projection, is_projected, low_rank_layout
from colossal_bcd.memory import estimate
from colossal_bcd.memory.activations import Moment, Passes, passes
from colossal_bcd.memory.traffic import rounds_of_all
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.sharding import Layout, slice_length
from colossal_bcd.sharding.packing import pack

CARDS = (24, 40, 80, 141)
"""Memory of common GPUs in GB."""
GB = 10**9
"""Decimal, as in the papers.  A card of 24 GiB counts as 24 GB, which leaves 1.7 GB to CUDA and to fragmentation."""
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS = ("weights", "masters", "states", "gradients", "activations", "buffers")
BUCKET, BUCKET_OF_DDP = 12 * 2**20, 25 * 2**18
"""Values in one collective of ColossalAI's ZeRO plugins, and at stage 0."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained, and how."""

    model: Model
    optimizer: str = "adamw"
    rank: int = 128
    blocks: int | None = None
    lr: float = 1e-4
    mesh: MeshSize = dataclasses.field(default_factory=MeshSize)
    precision: str = "bf16"
    masters: bool = True
    """Whether 16-bit weights that train have float32 masters, as they have under the plugins unless told otherwise."""
    batch: int = 1
    length: int = 1
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "length", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: got {getattr(self, name)}, expected 1 or more.")
        choice = choice_of(self.optimizer)
        if not self.masters and (self.mesh.sharded_weights or (choice.blocks if self.blocks is None else self.blocks)):
            raise ValueError("--no-masters: got it with blocks or --sharded-weights, which have masters. Leave it out.")
        if choice.lora and self.mesh.tp > 1:
            raise ValueError("--tp: got it with lora, whose adapters the plugins do not divide. Leave one of them out.")
        longest = self.model.longest
        if longest is not None and self.length > longest:
            raise ValueError(f"--length: got {self.length}, expected at most the {longest} positions of the model.")

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def ready(self, model: nn.Module) -> tuple[nn.Module, Optimizer]:
        """The optimizer over a model, and the model, which LoRA wraps."""
        return ready(model, self.optimizer, rank=self.rank, blocks=self.blocks, lr=self.lr)


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Bytes on one GPU at one time, by what they are for."""

    weights: int = 0
    masters: int = 0
    states: int = 0
    gradients: int = 0
    activations: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in ROWS)


@dataclass(frozen=True, kw_only=True)
class Sent:
    """Collectives of one step, and bytes of their larger buffers on one rank."""

    collectives: int = 0
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one GPU needs and sends."""

    job: Job
    parameters: int
    trained: int
    """Parameters that train at once."""
    passes: Bytes
    """In forward and backward, when most is alive."""
    step: Bytes
    """In the optimizer's step."""
    traffic: Mapping[str, Sent]

    @property
    def peak(self) -> int:
        return max(self.passes.total, self.step.total)

    @property
    def fits(self) -> dict[int, bool]:
        """By GB of a card."""
        return {card: self.peak <= card * GB for card in CARDS}

    def as_json(self) -> dict[str, Any]:
        """Plain values; docs/command_line.md says what each is."""
        job = self.job
        return {
            "model": {"name": job.model.name, "parameters": self.parameters, "layers": job.model.num_layers},
            "optimizer": {"name": job.optimizer, "rank": job.rank, "trained_at_once": self.trained},
            "mesh": {**dataclasses.asdict(job.mesh), "dp": job.mesh.dp},
            "run": {
                "precision": job.precision,
                "masters": job.masters,
                "batch": job.batch,
                "length": job.length,
                "gradient_checkpointing": job.checkpointing,
            },
            "bytes": {
                name: {**dataclasses.asdict(each), "total": each.total}
                for name, each in (("forward_backward", self.passes), ("step", self.step))
            },
            "peak": self.peak,
            "fits": {str(card): fit for card, fit in self.fits.items()},
            "traffic": {name: dataclasses.asdict(each) for name, each in self.traffic.items()},
        }


def budget(job: Job, known: dict[frozenset[str], Passes] | None = None) -> Budget:
    """Bytes and traffic of the pipeline stage that needs most memory.

    Args:
        job: see `Job`.
        known: passes of other optimizers with the same model and mesh, by names of what they train; takes this one's.
    Raises:
        ValueError: what is asked for does not go together.
    """
    model, optimizer = job.ready(job.model.on_meta(job.dtype))
    layouts, trained = layouts_of(model, job.mesh), trained_of(optimizer)
    by_name = dict(model.named_parameters())
    names = [name for name, param in by_name.items() if param.requires_grad]
    known, trains = {} if known is None else known, frozenset(names)
    counted = known[trains] = known[trains] if trains in known else _passes(job, trains)
    found = []
    for index, stage in enumerate(stage_names(model, job.mesh)):
        on_stage = {by_name[name]: layouts[by_name[name]] for name in stage}
        active = [by_name[name] for name in names if name in stage]
        of_stage = _of_stage(counted, job.mesh, index)
        kind = _Sharded if job.mesh.sharded_weights else _Replicated
        found.append(kind(job, model, trained, on_stage, active).budget(of_stage))
    most = max(found, key=lambda each: each.peak)
    values = sum(param.numel() for param in by_name.values())
    return dataclasses.replace(most, parameters=values, trained=sum(by_name[name].numel() for name in names))


def _passes(job: Job, names: frozenset[str]) -> Passes:
    """What one rank's forward and backward pass keeps alive: those of a model with a rank's heads and columns."""
    tp, config = job.mesh.tp, job.model.config
    divided: dict[str, Any] = {}
    if tp > 1:
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        divided = {"head_dim": width, "vocab_size": -(-config.vocab_size // tp)}
        for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            if getattr(config, key, None) is not None:
                divided[key] = max(getattr(config, key) // tp, 1)
    first = max(choice_of(job.optimizer).blocks if job.blocks is None else job.blocks, 1)

    def build(num_layers: int, mask: bool) -> tuple[nn.Module, Callable[[], Tensor]]:
        model = job.model.changed(num_hidden_layers=num_layers, **divided).build(job.dtype)
        if choice_of(job.optimizer).lora:
            model, _ = job.ready(model)
        for name, param in model.named_parameters():
            param.requires_grad_(name in names)
        if job.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tokens = torch.zeros(job.batch, job.length, dtype=torch.long)
        given = {"attention_mask": torch.ones(job.batch, job.length, job.length, dtype=job.dtype)} if mask else {}
        return model, lambda: model(input_ids=tokens, labels=tokens, **given).loss

    layers = -(-job.model.num_layers // job.mesh.pp)
    # An encoder that is given no mask looks into the one that it makes, and these have no values.
    encoder = "bert" in job.model.config.model_type
    return passes(lambda num_layers: build(num_layers, encoder), layers, first)


def _of_stage(counted: Passes, mesh: MeshSize, index: int) -> Passes:
    """Passes of the first stage of a pipeline, which has as many micro-batches in flight as there are stages."""
    if mesh.pp == 1 or index > 0:
        return counted
    waiting = Moment((mesh.pp - 1) * counted.saved_per_layer * counted.num_layers)
    return dataclasses.replace(
        counted, moments={name: moment + waiting for name, moment in counted.moments.items() if name != "head"}
    )


class _Replicated:
    """ZeRO 0 to 2 under LowLevelZeroPlugin and HybridParallelPlugin, or one GPU.

    Args:
        job: see `Job`.
        model: without memory.
        trained: its optimizer.
        layouts: of the parameters on the stage.
        active: of these, what trains at once.
    """

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        trained: Trained,
        layouts: Mapping[Any, Layout],
        active: list[Parameter],
    ) -> None:
        self.job, self.model, self.trained, self.layouts, self.active = job, model, trained, layouts, active
        self.mesh, self.base = job.mesh, trained.base_optimizer
        self.whole_rows = isinstance(self.base, ShardedOptimizer) and not self.base.is_elementwise
        self.limit = BUCKET if self.mesh.zero else BUCKET_OF_DDP

    def budget(self, counted: Passes) -> Budget:
        """All of it."""
        trains = {param: layout for param, layout in self.layouts.items() if param.requires_grad or self._blocks}
        found = estimate(
            self.trained,
            num_shards=self.mesh.zero_ranks,
            partition_grad=self.mesh.zero == 2,
            master_weights=self.job.masters,
            layouts=trains,
        )
        kept = Bytes(
            weights=sum(layout.max_local * param.itemsize for param, layout in self.layouts.items()),
            masters=found.masters,
            states=found.state + found.residuals + found.correction_state,
        )
        step = dataclasses.replace(
            kept, gradients=found.step_gradients, buffers=max(found.temporaries, self._gathered())
        )
        at_most = [self._moment(kept, each) for each in counted.moments.values()]
        entire = sum(self._shard(param) * param.itemsize for param in self.active)
        at_most.append(self._moment(kept, Moment(0, entire)))
        most = max(at_most, key=lambda each: each.total)
        return Budget(job=self.job, parameters=0, trained=0, passes=most, step=step, traffic=self._traffic())

    @property
    def _blocks(self) -> bool:
        return not self.trained.plan.is_whole

    def _moment(self, kept: Bytes, moment: Moment) -> Bytes:
        """A rank packs a bucket while its gradients are there, and sends what it keeps until backward ends."""
        buffers = 0
        if self.mesh.dp > 1:
            largest = max((sum(self._shard(p) * p.itemsize for p in bucket) for bucket in self._buckets()), default=0)
            parts = moment.gradients // self.mesh.dp if self.mesh.zero == 2 else 0
            buffers = min(largest, moment.gradients) + parts
        return dataclasses.replace(kept, gradients=moment.gradients, activations=moment.activations, buffers=buffers)

    def _shard(self, param: Parameter) -> int:
        return self.layouts[param].max_local

    def _row(self, param: Parameter) -> int:
        """Values of a parameter that each data-parallel rank sends or keeps."""
        shape = self.layouts[param].shard_shape
        return slice_length(shape, self.mesh.dp, whole_rows=self.whole_rows)

    def _buckets(self) -> Iterator[list[Parameter]]:
        return pack(reversed(self.active), self._sent_values, self.limit, lambda param: param.dtype)

    def _sent_values(self, param: Parameter) -> int:
        """Values of a gradient that travel: of a projected one those of its low-rank gradient."""
        layout = self.layouts[param]
        for group, members in zip(self.base.param_groups, self.trained.members, strict=True):
            if group.get("rank") is not None and any(param is each for each in members):
                hyper: Projection = self.base.hyper_of(group)  # type: ignore[attr-defined]
                if is_projected(layout, hyper):
                    return low_rank_layout(layout, hyper).numel
        return layout.max_local

    def _gathered(self) -> int:
        """A rank's row and the rows of all, of the largest bucket of weights."""
        if self.mesh.zero_ranks == 1:
            return 0
        return max(
            (sum(self._row(p) * p.itemsize for p in bucket) * (self.mesh.dp + 1) for bucket in self._rows()), default=0
        )

    def _rows(self) -> Iterator[list[Parameter]]:
        limit = max(self.limit // self.mesh.dp, 1)
        return pack(self.active, self._row, limit, lambda param: param.dtype)

    def _traffic(self) -> dict[str, Sent]:
        """Gradients, weights, and the rounds of the rules."""
        dp, sent = self.mesh.dp, {"gradients": Sent(), "weights": Sent()}
        if dp > 1:
            buckets = list(self._buckets())
            low = sum(self._sent_values(param) * param.itemsize for param in self.active)
            sent["gradients"] = Sent(collectives=len(buckets), bytes=low)
        if self.mesh.zero_ranks > 1:
            buckets = list(self._rows())
            size = sum(self._row(param) * param.itemsize for param in self.active) * dp
            sent["weights"] = Sent(collectives=len(buckets), bytes=size)
        sent["rounds"] = self._rounds(self._sliced(), reduced=self.mesh.dp > 1)
        if self.mesh.gpus > 1:
            sent["norm"] = Sent(collectives=1, bytes=8 * len(self.active))
        return sent

    def _sliced(self) -> dict[Any, Layout]:
        if self.mesh.zero_ranks == 1:
            return {param: self.layouts[param] for param in self.active}
        return {
            param: self.layouts[param].sliced("zero", 0, self.mesh.dp, whole_rows=self.whole_rows)
            for param in self.active
        }

    def _rounds(self, layouts: Mapping[Any, Layout], *, reduced: bool) -> Sent:
        if not isinstance(self.base, ShardedOptimizer) or self.mesh.gpus == 1:
            return Sent()
        members = self.trained.members
        rounds = rounds_of_all(self.base, layouts, self.mesh.communicates, members, reduced=reduced)
        together = Counter[str]()
        for each in rounds:
            together.update(each)
        return Sent(collectives=sum(map(len, rounds)), bytes=together.total())


class _Sharded(_Replicated):
    """FSDP2, with groups as `fsdp.shard` makes them."""

    def budget(self, counted: Passes) -> Budget:
        from colossal_bcd.fsdp.sharded_estimate import estimate_groups

        found = estimate_groups(self.trained, self._groups(), self.layouts)
        kept = Bytes(
            weights=found.weights,
            masters=found.masters,
            states=found.state + found.residuals + found.correction_state,
        )
        step = dataclasses.replace(kept, gradients=found.step_gradients, buffers=found.temporaries)
        buffers = max(found.gathered_in_forward, found.gathered_in_backward) if self.mesh.dp > 1 else 0
        # Gradients leave as they come, but for this rank's rows.
        most = dataclasses.replace(
            kept, gradients=found.gradients, activations=counted.most_activations, buffers=buffers
        )
        return Budget(job=self.job, parameters=0, trained=0, passes=most, step=step, traffic=self._traffic())

    def _groups(self) -> list[Any]:
        from colossal_bcd.fsdp.sharded_estimate import Group
        from colossal_bcd.fsdp.sharded_model import separate_groups

        dp, known, groups = self.mesh.dp, set[Parameter](), list[Group]()
        for module in separate_groups(self.model):
            params = [param for param in module.parameters() if param not in known]
            known |= set(params)
            groups.append(Group(params=params, num_shards=dp, kept_over=dp))
        rest = [param for param in self.model.parameters() if param not in known]
        return [*groups, Group(params=rest, is_outermost=True, num_shards=dp)] if rest else groups

    def _traffic(self) -> dict[str, Sent]:
        sent = {"gradients": Sent(), "weights": Sent()}
        if self.mesh.dp > 1:
            groups = [group for group in self._groups() if group.params]
            trains = [any(param.requires_grad for param in group.params) for group in groups]
            whole = [sum(self._whole(param) for param in group.params) for group in groups]
            # Backward gathers down to the lowest group that trains, and not what has stayed.
            lowest = trains.index(True) if True in trains else len(groups)
            again = [index for index, group in enumerate(groups) if index >= lowest and not group.is_outermost]
            gathered = sum(whole) + sum(whole[index] for index in again)
            reduced = sum(self._whole(param) for group in groups for param in group.params if param.requires_grad)
            sent["gradients"] = Sent(collectives=sum(trains), bytes=reduced)
            sent["weights"] = Sent(collectives=len(groups) + len(again), bytes=gathered)
            sent["norm"] = Sent(collectives=1, bytes=16 * len(self.active))
        sent["rounds"] = self._rounds({param: self.layouts[param] for param in self.active}, reduced=False)
        return sent

    def _whole(self, param: Parameter) -> int:
        return self.layouts[param].max_local * self.mesh.dp * param.itemsize
