"""What ranks run in test_fsdp_traps.py: what FSDP2 does by itself and blocks must not fall into."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import fsdp_block_cases as cases
import models
import plain_importance
import torch
import torch.distributed as dist
from fsdp_block_cases import BASES, LAYERS, PERIOD, VOCAB, Case, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from colossal_bcd import BlockOptimizer, BlockOptimizerRatio, fsdp
from colossal_bcd.fsdp.torch_private import ShardGroup, fully_shard, shard_groups
from colossal_bcd.testing import CollectiveCounter, live_bytes
from support.errors import largest_error


def message(call: Callable[[], Any]) -> str:
    """What a call raises."""
    try:
        call()
    except (ValueError, TypeError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def many(*names: str) -> list[Any]:
    """Results of functions of this file, by one start of ranks."""
    return [globals()[name]() for name in names]


def mixed_precision() -> dict[str, Any]:
    """float32 weights, frozen at the first forward pass, which compute in bfloat16 and reduce in float32."""
    case = Case(shard={"mp_policy": cases.BF16}, turns=LAYERS + 1, prefixes=("model.embed_tokens.", *Case().prefixes))
    model, optimizer, _ = case.attached()
    order = [optimizer.schedule.active(turn * PERIOD)[0] for turn in range(case.turns)]
    seen = set()
    for step in range(PERIOD * case.turns):
        models.loss(model, cases.batch(step, dist.get_rank())).backward()
        seen |= {param.grad.to_local().dtype for param in optimizer.active_set.masters}
        optimizer.step()
    got = [whole(param) for param in model.parameters()]
    reference = case.build()
    params = dict(reference.named_parameters())
    for turn, index in enumerate(order):
        active = [name for name in params if name.startswith(case.prefixes[index])]
        base = BASES[case.base]([params[name] for name in active])
        for step in range(turn * PERIOD, (turn + 1) * PERIOD):
            total: dict[str, Tensor] = {}
            for rank in range(dist.get_world_size()):
                low = case.build()
                for param, wide in zip(low.parameters(), reference.parameters(), strict=True):
                    param.data = wide.detach().bfloat16()
                models.loss(low, cases.batch(step, rank)).backward()
                for name in active:
                    grad = dict(low.named_parameters())[name].grad.float()
                    total[name] = total[name] + grad if name in total else grad
            for name in active:
                params[name].grad = total[name] / dist.get_world_size()
            base.step()
    return {"equal": all(map(torch.equal, got, params.values())), "dtypes": [str(dtype) for dtype in seen]}


def gathers(by_user: bool = False) -> list[dict[str, Any]]:
    """Collectives of forward, backward and step of the first step of every turn, and what is gathered in vain."""
    case = Case(by_user=by_user, mode="ascending", prefixes=("model.embed_tokens.", *Case().prefixes, "lm_head."))
    model, optimizer, engine = case.attached()
    found = []
    for step in range(PERIOD * len(case.prefixes)):
        with CollectiveCounter() as forward:
            loss = models.loss(model, cases.batch(step, dist.get_rank()))
        with CollectiveCounter() as backward:
            loss.backward()
        waiting = sum(group._group._all_gather_result is not None for group in engine.groups)
        with CollectiveCounter() as stepping:
            optimizer.step()
        optimizer.zero_grad()
        counted = [dict(each.calls) for each in (forward, backward, stepping)]
        found.append({"calls": counted, "waiting": waiting, "bytes": dict(backward.bytes)})
    return found


def stale() -> bool:
    """Whether a run is right where backward is let gather what no pass will use."""
    keep = ShardGroup.end_prefetch
    ShardGroup.end_prefetch = lambda self: lambda: None  # type: ignore[method-assign]
    try:
        result = cases.errors(Case(mode="descending", by_user=True))[0]
    finally:
        ShardGroup.end_prefetch = keep  # type: ignore[method-assign]
    return result.get("equal", True)


def made_before_sharding() -> list[str]:
    """Errors of optimizers whose parameters are not in the model."""
    model, other = cases.Case().build(), models.llama(vocab=VOCAB, layers=LAYERS + 1)
    foreign, unsharded = Case().wrap(other), Case().wrap(model)
    errors = [message(lambda: fsdp.attach(model, unsharded))]
    Case().sharded(model)
    return [*errors, message(lambda: fsdp.attach(model, foreign))]


def rounded_gradients() -> dict[str, Any]:
    """Dtype of gradients of bfloat16 weights that are reduced in float32, and whether two passes add up in it."""
    policy = dataclasses.replace(cases.BF16, param_dtype=None)
    model, optimizer, _ = Case(dtype=torch.bfloat16, shard={"mp_policy": policy}).attached()
    param = next(iter(optimizer.active_set.masters))
    parts = []
    for step in range(2):
        models.loss(model, cases.batch(step, dist.get_rank())).backward()
        parts.append(param.grad.to_local().clone())
        param.grad = None
    for step in range(2):
        models.loss(model, cases.batch(step, dist.get_rank())).backward()
    return {"dtype": str(parts[0].dtype), "equal": torch.equal(parts[0] + parts[1], param.grad.to_local())}


def attached_after_evaluation() -> dict[str, Any]:
    """An optimizer made while the outermost group is whole, as an evaluation leaves it."""
    case = Case(by_user=True, prefixes=("model.embed_tokens.", "model.layers.0."), mode="ascending", turns=2)
    keep = Case.wrap

    def wrap(self: Case, model: nn.Module) -> BlockOptimizer:
        if hasattr(model, "reshard"):
            with torch.no_grad():
                models.loss(model, cases.batch(0, 0))
            assert not hasattr(model.model.embed_tokens.weight, "to_local")
        return keep(self, model)

    Case.wrap = wrap  # type: ignore[method-assign]
    try:
        return cases.errors(case)[0]
    finally:
        Case.wrap = keep  # type: ignore[method-assign]


def replaced() -> list[str]:
    """Errors of steps after weights were replaced, converted, or written in place."""
    found = []
    for replace in (
        lambda model: model._apply(torch.clone),
        lambda model: model.to(torch.float64),
        lambda model: model.load_state_dict({n: p * 1 for n, p in model.state_dict().items()}, assign=True),
    ):
        model, optimizer, _ = Case(mode="ascending").attached()
        cases.advance(Case(), model, optimizer, 0)
        replace(model)
        found.append(message(optimizer.step))
    return found


def moved() -> bool:
    """Whether training goes on as if nothing had happened where other memory holds the same float32 weights."""
    results = []
    for move in (False, True):
        model, optimizer, _ = Case(mode="ascending").attached()
        for step in range(2 * PERIOD):
            cases.advance(Case(), model, optimizer, step)
            if move and step == 0:
                model._apply(torch.clone)
        results.append([whole(param) for param in model.parameters()])
    return all(map(torch.equal, *results))


def written() -> bool:
    """Whether bfloat16 weights that are loaded in place between two steps count, as on one process."""
    model, optimizer, _ = Case(dtype=torch.bfloat16, mode="ascending", base="sgd").attached()
    cases.advance(Case(), model, optimizer, 0)
    before = {name: param.detach().clone() for name, param in model.state_dict().items()}
    cases.advance(Case(), model, optimizer, 1 - PERIOD % 2)
    model.load_state_dict(before)
    masters = optimizer.active_set.masters
    optimizer.active_set.follow()
    return all(torch.equal(master.bfloat16(), param.to_local().view(-1)) for param, master in masters.items())


def importance(by: str) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Blocks that were drawn, and those of a plain loop."""
    options = {"importance": by, "importance_floor": 0.1}
    case = Case(dtype=torch.float64, mode="importance", options=options, base="sgd")
    model, optimizer, _ = case.attached()
    drawn = []
    turns = 2 * LAYERS + 1
    for step in range(PERIOD * turns):
        if step % PERIOD == 0:
            drawn.append(tuple(optimizer.schedule.active(step)))
        cases.advance(case, model, optimizer, step)
    reference = case.build()
    size = dist.get_world_size()
    want, _ = plain_importance.train(
        reference,
        case.prefixes,
        [(0, LAYERS)],
        PERIOD,
        turns,
        lambda step: cases.batches(case, step, size),
        BASES["sgd"],
        models.loss,
        by=by,
        floor=0.1,
        seed=0,
    )
    return drawn, want


def disagreeing() -> list[str]:
    """Errors where ranks differ: at the beginning, and at a switch."""
    model = Case().build()
    Case().sharded(model)
    optimizer = Case(options={"seed": dist.get_rank()}).wrap(model)
    first = message(lambda: fsdp.attach(model, optimizer))
    model, optimizer, _ = Case().attached()
    cases.advance(Case(), model, optimizer, 0)
    optimizer.plan = dataclasses.replace(
        optimizer.plan, schedule=dataclasses.replace(optimizer.plan.schedule, seed=dist.get_rank())
    )
    return [first, message(lambda: cases.advance(Case(), model, optimizer, 1))]


def pinned() -> str:
    """Error of corrections by gradients that are copied to pinned memory while backward goes on."""
    case = Case(rule="sgd", shard={"offload_policy": cases.OFFLOAD})
    model = case.build()
    case.sharded(model)
    for module in model.modules():
        state = getattr(module, "_get_fsdp_state", lambda: None)()
        groups = [] if state is None else getattr(state, "_fsdp_param_groups", [state._fsdp_param_group])
        for param in [param for group in groups for param in group.fsdp_params]:
            param.pin_memory = True
    return message(lambda: fsdp.attach(model, case.wrap(model)))


def embeddings_output_needs_no_gradient() -> list[bool]:
    """Whether the embeddings' output needs a gradient: as transformers asks for it, and with an engine."""
    case = Case(checkpoint=False, mode="descending")
    model = case.build()
    if not hasattr(model, "_require_grads_hook"):  # else transformers has called it when checkpointing was enabled
        model.enable_input_require_grads()
    found: list[bool] = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: found.append(out.requires_grad))
    model.requires_grad_(False)
    models.loss(model, cases.batch(0, 0))
    model.requires_grad_(True)
    case.sharded(model)
    fsdp.attach(model, case.wrap(model))
    models.loss(model, cases.batch(0, dist.get_rank()))
    return found


def norms() -> tuple[float, float]:
    """The norm by which the engine clips, and the plain one."""
    case = Case(dtype=torch.float64, max_norm=1e-3, mode="fixed")
    model, optimizer, engine = case.attached()
    for param in [param for param in model.parameters() if param.requires_grad]:
        param.grad = param.detach().clone()
    squares = [whole(param).square().sum() for param in optimizer.active_set.masters]
    optimizer.step()
    return engine.get_grad_norm() or 0.0, torch.stack(squares).sum().sqrt().item()


def tied_groups() -> list[str]:
    """Groups of a tied model, by the modules that they are of."""
    model = Case(tied=True).build()
    Case().sharded(model)
    names = {id(module): name for name, module in model.named_modules()}
    tied = model.lm_head.weight
    return [names[id(group.module)] for group in shard_groups(model) if any(p is tied for p in group.params)]


class Fickle(nn.Module):
    """Layers one of whose weights is used as a batch says."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(Gated(generator) for _ in range(2))

    def forward(self, x: Tensor, gate: bool) -> Tensor:
        for layer in self.layers:
            x = layer(x, gate)
        return x.square().mean()


class Gated(nn.Module):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5, generator=generator, dtype=torch.float64))
        self.gate = nn.Parameter(torch.randn(3, 5, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor, gate: bool) -> Tensor:
        y = torch.tanh(x @ self.weight)
        return y + (torch.tanh(x @ self.gate.T)).sum(-1, keepdim=True) if gate else y


def unused(*patterns: tuple[int, ...]) -> list[float]:
    """Errors of runs in which the gates are used at a step by so many of the ranks, by every pattern."""
    rank, size = dist.get_rank(), dist.get_world_size()
    found = []
    for pattern in patterns:
        for late in (False, True):
            model = Fickle()
            fsdp.enable_cpu()
            for layer in model.layers:
                fully_shard(layer, mesh=cases.mesh_of("fsdp"))
            fully_shard(model, mesh=cases.mesh_of("fsdp"))
            make = lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)  # noqa: E731
            blocks = [["layers.0."], ["layers.1."]]
            options = {"switch_block_every": 50, "switch_mode": "fixed", "verbose": 0}
            optimizer = BlockOptimizer(make(model.parameters()), list(model.named_parameters()), blocks, **options)
            fsdp.attach(model, optimizer)
            reference = Fickle()
            active = list(reference.layers[optimizer.schedule.active(0)[0]].parameters())
            plain = make(active)
            data = torch.randn(
                len(pattern), size, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64
            )
            for step, used in enumerate(pattern):
                if late:
                    model.set_requires_gradient_sync(False)
                    model(data[step, rank] + 1, rank == 0).backward()
                    model.set_requires_gradient_sync(True)
                model(data[step, rank], rank < used).backward()
                optimizer.step()
                optimizer.zero_grad()
                plain.zero_grad()
                for each in range(size):
                    (reference(data[step, each], each < used) / size).backward()
                    if late:
                        (reference(data[step, each] + 1, each == 0) / size).backward()
                plain.step()
            found.append(
                largest_error([whole(p) for p in model.parameters()], [p.detach() for p in reference.parameters()])
            )
    return found


def guards() -> list[str]:
    """Errors of what would train wrongly."""
    model = Case().build()
    forgotten = Case().wrap(model)
    Case().sharded(model)
    found = [message(lambda: models.loss(model, cases.batch(0, dist.get_rank())))]
    del forgotten
    model = Case().sharded(Case().build())
    optimizer = Case().wrap(model)
    models.loss(model, cases.batch(0, dist.get_rank())).backward()
    found.append(message(optimizer.step))
    optimizer.zero_grad()
    found.append(message(lambda: fsdp.attach(model, torch.optim.AdamW(model.parameters()))))  # type: ignore[arg-type]
    found.append(message(lambda: fsdp.attach(model, optimizer, max_norm=-1.0)))
    fsdp.attach(model, optimizer)
    found.append(message(lambda: fsdp.attach(model, optimizer)))
    found.append(message(lambda: fsdp.shard(model)))
    found.append(message(lambda: optimizer.step(lambda: 0.0)))
    model.set_requires_gradient_sync(False)
    models.loss(model, cases.batch(0, dist.get_rank())).backward()
    found.append(message(optimizer.step))
    optimizer.zero_grad()
    model.set_requires_gradient_sync(True)
    cases.advance(Case(), model, optimizer, 0)
    found.append(message(lambda: optimizer.point_to(dict(model.named_parameters()))))
    named = list(model.named_parameters())
    found.append(message(lambda: BlockOptimizerRatio(model.parameters(), named)))
    found.append(message(optimizer.state_dict))
    found.append(message(lambda: get_optimizer_state_dict(model, optimizer)))
    return found


def not_finite() -> list[str]:
    """Errors of three steps, the first of which has an infinite gradient on one rank."""
    model, optimizer, _ = Case(mode="fixed").attached()
    found = []
    for step in range(3):
        factor = float("inf") if step == 0 and dist.get_rank() == 0 else 1.0
        (models.loss(model, cases.batch(step, dist.get_rank())) * factor).backward()
        found.append(message(optimizer.step))
    return found


def used_up() -> list[int]:
    """How often it is said that a step uses gradients up, with and without `zero_grad` between steps."""
    records: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger("colossal_bcd")
    handler.emit = records.append  # type: ignore[method-assign]
    before, found = logger.level, []
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        for forgets in (True, False):
            model, optimizer, _ = Case(mode="fixed").attached()
            records.clear()
            for step in range(3):
                models.loss(model, cases.batch(step, dist.get_rank())).backward()
                optimizer.step()
                if forgets:
                    optimizer.zero_grad()
            found.append(sum("uses gradients up" in record.getMessage() for record in records))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    return found


def compiled() -> list[float]:
    """Largest differences that compiling layers before they are sharded, and the sharded model, make."""
    results = []
    for how in ("", "layers", "model"):
        case = Case(dtype=torch.float64, base="sgd", mode="ascending")
        torch._dynamo.reset()
        model: Any = case.build()
        if how == "layers":
            for layer in model.model.layers:
                layer.compile(backend="aot_eager")
        case.sharded(model)
        optimizer = case.wrap(model)
        fsdp.attach(model, optimizer)
        run: Any = torch.compile(model, backend="aot_eager") if how == "model" else model
        for step in range(PERIOD * (LAYERS + 1)):
            cases.advance(case, run, optimizer, step)
        results.append([whole(param) for param in model.parameters()])
    return [largest_error(got, results[0]) for got in results[1:]]


def bytes_by_phase(dtype: torch.dtype) -> dict[str, float]:
    """Bytes beyond the sharded weights by phase of a step; values of the active block here, and in all."""
    case = Case(dtype=dtype, mode="ascending")
    model = case.build()
    case.sharded(model)
    before = live_bytes()
    optimizer = case.wrap(model)
    fsdp.attach(model, optimizer)
    masters = optimizer.active_set.masters
    phases: dict[str, float] = {"values": sum(master.numel() for master in masters.values())}
    cases.advance(case, model, optimizer, 0)
    phases["between steps"] = live_bytes() - before
    optimizer.base_optimizer.register_step_pre_hook(
        lambda *_: phases.update({"in step": live_bytes() - before}) or None
    )
    models.loss(model, cases.batch(1, dist.get_rank())).backward()
    phases["after backward"] = live_bytes() - before
    optimizer.step()
    optimizer.zero_grad()
    phases["after switch"] = live_bytes() - before
    return phases


def bread_bytes() -> dict[str, float]:
    """Bytes that a backward pass leaves with and without corrections, and those of all gradients."""
    found = {}
    for rule in ("", "sgd"):
        model, optimizer, _ = Case(rule=rule, mode="ascending").attached()
        cases.advance(Case(), model, optimizer, 0)
        before = live_bytes()
        models.loss(model, cases.batch(1, dist.get_rank())).backward()
        found[rule or "none"] = float(live_bytes() - before)
    found["all"] = 4.0 * sum(param.to_local().numel() for param in model.parameters())
    return found
