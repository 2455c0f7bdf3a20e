"""What ranks run in test_outside.py: weights and gradients that user code writes between two calls of the engine."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import models
import torch
import torch.distributed as dist
from colossalai.booster import Booster
from colossalai.nn.optimizer import Lamb as StockLamb
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter

from colossal_bcd import CAME, BlockOptimizer, GaLoreAdamW, GoLoreAdamW, Lamb
from colossal_bcd.booster import FSDP2Plugin, HybridParallelPlugin, LowLevelZeroPlugin, TorchDDPPlugin
from colossal_bcd.booster.casts.registry import cast
from colossal_bcd.checkpoint.assembly import MASTER
from colossal_bcd.sharding import Layout
from colossal_bcd.sharding.dtensor import MeshAxes, is_dtensor, layout_of, local_values
from support.errors import largest_error

LR, BETAS, EPS = 1e-3, (0.9, 0.999), 1e-8
PLUGINS = {"zero": LowLevelZeroPlugin, "hybrid": HybridParallelPlugin, "ddp": TorchDDPPlugin, "fsdp": FSDP2Plugin}


def boost(
    options: dict[str, Any], optimizer_of: Callable[[Any], torch.optim.Optimizer]
) -> tuple[nn.Module, Any, Booster]:
    """Options: those of the plugin, `plugin`, `dtype` of the model, and `blocks`: train one block and the head."""
    options = dict(options)
    plugin, dtype, blocks = options.pop("plugin"), options.pop("dtype", None), options.pop("blocks", False)
    dtype = dtype or {"fp32": torch.float32}.get(options.get("precision", ""), torch.bfloat16)
    model = models.llama(vocab=128).to(dtype).train()
    optimizer = optimizer_of(model.parameters())
    if blocks:
        optimizer = BlockOptimizer(
            optimizer, list(model.named_parameters()), switch_mode="ascending", active_modules=["lm_head."], verbose=0
        )
    booster = Booster(plugin=PLUGINS[plugin](**options))
    model, engine, *_ = booster.boost(model, optimizer)
    return model, engine, booster


Write = Callable[[nn.Module, Sequence[Parameter]], None]


def load_half(module: nn.Module, params: Sequence[Parameter]) -> None:
    module.load_state_dict({name: value * 0.5 for name, value in module.state_dict().items()})


def clamp(module: nn.Module, params: Sequence[Parameter]) -> None:
    with torch.no_grad():
        for param in params:
            param.clamp_(-0.02, 0.02)


def initialise(module: nn.Module, params: Sequence[Parameter]) -> None:
    torch.manual_seed(5)
    for param in params:
        nn.init.normal_(param, 0.0, 0.02)


def assign_data(module: nn.Module, params: Sequence[Parameter]) -> None:
    for param in params:
        param.data = param.data * 0.75


def add_to_data(module: nn.Module, params: Sequence[Parameter]) -> None:
    for param in params:
        param.data += 0.125


def copy_into_data(module: nn.Module, params: Sequence[Parameter]) -> None:
    for param in params:
        param.data.copy_(param.data.flip(0))


def scale_data(module: nn.Module, params: Sequence[Parameter]) -> None:
    for param in params:
        param.data.mul_(0.5)


def write_vector(module: nn.Module, params: Sequence[Parameter]) -> None:
    vector = torch.nn.utils.parameters_to_vector(params).detach()
    torch.nn.utils.vector_to_parameters(vector * 0.875, params)


def one_value(module: nn.Module, params: Sequence[Parameter]) -> None:
    for param in params:
        param.data.view(-1)[-1] = 0.25


def swap(module: nn.Module, params: Sequence[Parameter]) -> None:
    """Evaluate other weights, then put these back: nothing has changed, and masters keep what rounding cut off."""
    kept = [param.data.clone() for param in params]
    for param in params:
        param.data.copy_(torch.zeros_like(param.data))
    for param, values in zip(params, kept, strict=True):
        param.data.copy_(values)


def copy_whole(module: nn.Module, params: Sequence[Any]) -> None:
    for param in params:
        whole = param.full_tensor().detach().flip(0)
        param.data.copy_(distribute_tensor(whole, param.device_mesh, param.placements))


def scale_local(module: nn.Module, params: Sequence[Any]) -> None:
    for param in params:
        param.to_local().data.mul_(0.5)


def set_whole(module: nn.Module, params: Sequence[Parameter]) -> None:
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(module, options=options)
    set_model_state_dict(module, {name: value * 0.75 for name, value in state.items()}, options=options)


def evaluated(write: Write) -> Write:
    """Write after an evaluation, after which torch leaves weights of the outermost group gathered."""

    def evaluate_and_write(module: nn.Module, params: Sequence[Parameter]) -> None:
        with torch.no_grad():
            module(input_ids=models.tokens(0, vocab=128))
        assert {*map(id, module.parameters())} == {*map(id, params)}, "what users write into is not the weights"
        write(module, params)

    return evaluate_and_write


WRITES: dict[str, Write] = {
    "nothing": lambda module, params: None,
    "load_state_dict": load_half,
    "swap": swap,
    "clamp_": clamp,
    "init_": initialise,
    "data =": assign_data,
    "swap after data =": swap,
    "data +=": add_to_data,
    "data.copy_": copy_into_data,
    "data.mul_": scale_data,
    "vector_to_parameters": write_vector,
    "one value": one_value,
}
REFUSED_BY_TORCH = ("data.copy_", "vector_to_parameters", "one value")
OF_DTENSORS: dict[str, Write] = {
    # torch has no rule for the others; assigning to `data` of a DTensor does nothing, in torch itself.
    **{name: write for name, write in WRITES.items() if name not in REFUSED_BY_TORCH},
    "data.copy_ of a whole": copy_whole,
    "to_local": scale_local,
    "set_model_state_dict": set_whole,
    **{f"{name} after an evaluation": evaluated(WRITES[name]) for name in ("swap", "clamp_", "data +=", "data.mul_")},
}


def gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    """Full gradient by name and step: small multiples of 3/32, whose average over ranks is exact."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}{step}".encode()))
    return torch.randint(1, 41, shape, generator=generator) * (3 / 32)


class Textbook:
    """AdamW of one tensor in float64."""

    def __init__(self, values: Tensor) -> None:
        self.values = values.double().clone()
        self._exp_avg, self._exp_avg_sq, self._step = torch.zeros_like(self.values), torch.zeros_like(self.values), 0

    def step(self, grad: Tensor) -> None:
        self._step += 1
        self._exp_avg.lerp_(grad, 1 - BETAS[0])
        self._exp_avg_sq.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
        root = (self._exp_avg_sq / (1 - BETAS[1] ** self._step)).sqrt() + EPS
        self.values -= LR * self._exp_avg / (1 - BETAS[0] ** self._step) / root

    def follow(self, before: Tensor, after: Tensor) -> None:
        self.values = torch.where(before == after, self.values, after.double())


def written_weights(options: dict[str, Any]) -> dict[str, float]:
    """Largest error of this rank's masters against the textbook, after a step that follows each write."""
    model, engine, booster = boost(
        options, lambda params: torch.optim.AdamW(params, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    )
    module, masters, sharded = model.unwrap(), engine.masters, isinstance(booster.plugin, FSDP2Plugin)
    # As the wrapper of FSDP2Plugin has them.
    layouts = engine.engine.layouts if sharded else engine.layouts
    wait = (lambda: None) if sharded else engine.wait_for_weights
    params = list(layouts)
    books = {param: Textbook(master) for param, master in masters.of.items()}
    errors, step = {}, 0
    for write, write_into in (OF_DTENSORS if sharded else WRITES).items():
        for turn in range(2):
            if turn:
                wait()
                before = {param: masters.weight_of(param).clone() for param in books}
                write_into(module, params)
                for param, book in books.items():
                    book.follow(before[param].view_as(book.values), masters.weight_of(param).view_as(book.values))
            if sharded:  # FSDP2 gives weights another memory in the first pass
                booster.backward(models.loss(model, models.tokens(step, vocab=128)), engine)
            for param, book in books.items():
                grad = gradient(engine.parameter_names[id(param)], layouts[param].shape, step)
                param.grad = placed(layouts[param].shard(grad).to(param.dtype), param, layouts[param])
                part = masters.layout(param).shard(grad).double().view(-1)[: book.values.numel()]
                book.step(part.view_as(book.values))
            engine.step()
            engine.zero_grad()
            step += 1
        wait()
        errors[write] = max(_error(engine, param, book) for param, book in books.items())
    return errors


def whole(param: Any) -> Tensor:
    return (param.full_tensor() if is_dtensor(param) else param).detach()


def placed(values: Tensor, param: Parameter, layout: Layout) -> Tensor:
    """A shard, or slice, of a full tensor as a gradient of the parameter."""
    if not is_dtensor(param):
        return values
    local = values.view(-1)[: layout.num_local].view(local_values(param).shape)
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def _error(engine: Any, param: Parameter, book: Textbook) -> float:
    """Of master and weight; inf for NaN."""
    data = engine.masters.layout(param).num_local
    master, want = engine.masters.of[param].reshape(-1)[:data], book.values.reshape(-1)[:data]
    weight = engine.masters.weight_of(param).reshape(-1)[:data]
    off = (master.double() - want).abs()
    rounded = (master.to(param.dtype) - weight).abs().double()
    worst = torch.cat([off, rounded, torch.zeros(1)]).max().item()
    return worst if worst == worst else float("inf")


def each(case: Callable[..., Any], configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A case under several plugins, in one start."""
    return {name: case(options) for name, options in configs.items()}


def torch_norm(params: Sequence[Parameter], optimizer: Any) -> Any:
    return torch.nn.utils.clip_grad_norm_(params, 0.5)


def torch_value(params: Sequence[Parameter], optimizer: Any) -> None:
    torch.nn.utils.clip_grad_value_(params, 1e-3)


def scale(params: Sequence[Parameter], optimizer: Any) -> None:
    for param in params:
        param.grad.mul_(0.5)


def replace(params: Sequence[Parameter], optimizer: Any) -> None:
    for param in params:
        param.grad = param.grad * 0.5


def noise(params: Sequence[Parameter], optimizer: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for param in params:
        param.grad += 1e-2 * torch.randn(param.grad.shape, generator=generator)


def drop_one(params: Sequence[Parameter], optimizer: Any) -> None:
    params[0].grad = None


def own_norm(params: Sequence[Parameter], optimizer: Any) -> Any:
    return optimizer.clip_grad_by_norm(0.5)


def own_norm_as_torch(params: Sequence[Parameter], optimizer: Any) -> Any:
    return optimizer.clip_grad_by_norm(max_norm=0.25, norm_type=2.0, error_if_nonfinite=True)


def own_value(params: Sequence[Parameter], optimizer: Any) -> None:
    optimizer.clip_grad_by_value(1e-3)


OWN: dict[str, Callable[[Sequence[Parameter], Any], Any]] = {
    "nothing": lambda params, optimizer: None,
    "clip_grad_by_norm": own_norm,
    "clip_grad_by_norm, as torch": own_norm_as_torch,
    "clip_grad_by_value": own_value,
}
EDITS: dict[str, Callable[[Sequence[Parameter], Any], Any]] = {
    **OWN,
    "clip_grad_norm_": torch_norm,
    "clip_grad_value_": torch_value,
    "mul_": scale,
    "grad =": replace,
    "noise": noise,
    "grad = None": drop_one,
}


class Plain(torch.optim.SGD):
    """The reference on one process."""

    def clip_grad_by_norm(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], max_norm)

    def clip_grad_by_value(self, value: float) -> None:
        torch.nn.utils.clip_grad_value_(self.param_groups[0]["params"], value)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def _train(
    params: Sequence[Parameter],
    optimizer: Any,
    backward: Callable[[int], None],
    edit: Callable[..., Any],
    micro_batches: int,
    zero_grad: bool,
) -> list[float]:
    """Three steps; the edit follows each backward pass.  Returns what it returned."""
    said = []
    for step in range(3):
        if zero_grad:
            optimizer.zero_grad()
        for micro in range(micro_batches):
            backward(step * micro_batches + micro)
            norm = edit(params, optimizer)
            # Of a DTensor torch returns this rank's part, until it is asked for all of it.
            said += [] if norm is None else [float(norm.full_tensor() if is_dtensor(norm) else norm)]
        optimizer.step()
    return said


def edited_gradients(options: dict[str, Any]) -> dict[str, float]:
    """Largest difference of weights and norms from one process, by edit.

    Further options: `edits`, names; `max_norm`; `accumulates`: also without `zero_grad`.
    """
    options = dict(options)
    names, accumulates = options.pop("edits", list(EDITS)), options.pop("accumulates", False)
    cases = {name: (EDITS[name], 1, True) for name in names}
    cases |= {f"{name}, twice": (EDITS[name], 2, True) for name in names}
    if accumulates:
        cases |= {f"{name}, no zero_grad": (EDITS[name], 1, False) for name in names}
    return {name: _difference(options, *case) for name, case in cases.items()}


def _difference(options: dict[str, Any], edit: Any, micro_batches: int, zero_grad: bool) -> float:
    model, engine, booster = boost(options, sgd)
    layouts = getattr(engine, "layouts", None)
    reference = models.llama(vocab=128).train()
    named = dict(reference.named_parameters())
    ours = {engine.parameter_names[id(p)]: p for p in model.unwrap().parameters()}
    group = getattr(booster.plugin, "dp_group", dist.group.WORLD)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    trained = [name for name in named if name not in ours or ours[name].requires_grad]
    for name, param in named.items():
        param.requires_grad_(name in trained)

    def backward(index: int) -> None:
        if getattr(engine, "pp_pg", None) is not None:
            batch = models.tokens(10 * index + rank, vocab=128)
            data = iter([{"input_ids": batch, "labels": batch}])
            booster.execute_pipeline(data, model, lambda out, _: out.loss, engine, return_loss=True)
        else:
            booster.backward(models.loss(model, models.tokens(10 * index + rank, vocab=128)), engine)

    def reference_backward(index: int) -> None:
        losses = [models.loss(reference, models.tokens(10 * index + other, vocab=128)) for other in range(size)]
        torch.stack(losses).mean().backward()

    plain = Plain([named[name] for name in trained], lr=0.05, momentum=0.9)
    max_norm = options.get("max_norm", 0.0)
    if max_norm:
        plain.register_step_pre_hook(
            lambda *_: torch.nn.utils.clip_grad_norm_(plain.param_groups[0]["params"], max_norm) and None
        )
    trained_here = [ours[name] for name in trained if name in ours]
    said = _train(trained_here, engine, backward, edit, micro_batches, zero_grad)
    want = _train([named[name] for name in trained], plain, reference_backward, edit, micro_batches, zero_grad)
    moved = largest_error(named, dict(models.llama(vocab=128).named_parameters()))
    assert 1e-4 < moved < torch.inf, "the reference must move, or nothing is shown"
    errors = [torch.tensor(said).sub(torch.tensor(want)).abs()]
    for name, param in ours.items():
        expected = named[name].detach()
        layout = layout_of(param, MeshAxes()) if is_dtensor(param) else (layouts or {}).get(param)
        expected = expected if layout is None else layout.shard(expected)
        data = slice(None if layout is None else layout.num_local)
        errors.append((local_values(param).view(-1)[data] - expected.view(-1)[data]).abs())
    worst = torch.cat(errors).max().item()
    return worst if worst == worst else float("inf")


def _message(call: Callable[[], Any]) -> str:
    try:
        return f"no error: {call()}"
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def refused(options: dict[str, Any]) -> dict[str, str]:
    """What is said where gradients are parts, whatever reads or writes them."""
    options = dict(options)
    low_rank = options.pop("galore", False)
    galore = lambda params: GaLoreAdamW(params, lr=1e-2, rank=4, clamp=True)  # noqa: E731
    model, engine, booster = boost(options, galore if low_rank else sgd)
    batch = models.tokens(0, vocab=128)
    for _ in range(2):  # the first step of a projection takes whole gradients
        engine.zero_grad()
        booster.backward(models.loss(model, batch), engine)
        if low_rank and not _:
            engine.step()
    params = [param for param in engine.masters.of if param.dim() == 2]
    before = [param.detach().clone() for param in params]
    said = {
        "norm": _message(lambda: torch.nn.utils.clip_grad_norm_(params, 0.5)),
        "value": _message(lambda: torch.nn.utils.clip_grad_value_(params, 0.5)),
        "read": _message(lambda: params[1].grad.norm().item()),
        "write": _message(lambda: params[1].grad.mul_(2)),
        "past": _message(lambda: models.loss(model, batch).backward()),
        "clip_grad_by_value": _message(lambda: engine.clip_grad_by_value(1.0)),
        "clip_grad_by_norm": _message(lambda: engine.clip_grad_by_norm(1.0)),
        "repr": repr(params[1].grad),
    }
    params[1].grad = torch.zeros_like(params[1])
    said["given"] = _message(engine.step)
    engine.zero_grad()
    booster.backward(models.loss(model, batch), engine)
    model.zero_grad()
    engine.step()
    same = all(map(torch.equal, before, params))
    return {**said, "model.zero_grad": f"unchanged: {same}"}


def said_once(options: dict[str, Any]) -> dict[str, int]:
    """Lines about gradients that are not added to, with and without `zero_grad`."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("colossal_bcd").addHandler(handler)
    counts = {}
    for zero_grad in (True, False):
        lines.clear()
        model, engine, booster = boost(options, sgd)
        for step in range(3):
            if zero_grad:
                engine.zero_grad()
            booster.backward(models.loss(model, models.tokens(step, vocab=128)), engine)
            engine.step()
        counts[f"zero_grad={zero_grad}"] = sum("without optimizer.zero_grad()" in line for line in lines)
    return counts


def scaled_norm(options: dict[str, Any]) -> dict[str, float]:
    """`clip_grad_by_norm` under a loss scale, and of low-rank gradients: what it says, and the norm afterwards."""
    options = dict(options)
    galore = options.pop("galore", False)
    make = (lambda params: GaLoreAdamW(params, lr=1e-3, rank=4, clamp=True)) if galore else sgd
    model, engine, booster = boost(options, make)
    result = {}
    for step in range(2):
        booster.backward(models.loss(model, models.tokens(step, vocab=128)), engine)
        before = engine.clip_grad_by_norm(0.125).item()
        again = engine.clip_grad_by_norm(10.0).item()
        engine.step()
        engine.zero_grad()
        result |= {f"before {step}": before, f"again {step}": again, f"step {step}": engine.get_grad_norm()}
    return result


def saved_masters(options: dict[str, Any]) -> dict[str, bool]:
    """Whether the state that is saved after a write belongs to the weights that are saved with it."""
    model, engine, booster = boost(options, lambda params: torch.optim.AdamW(params, lr=LR))
    result = {}
    for name in ("clamp_", "data.mul_"):
        booster.backward(models.loss(model, models.tokens(0, vocab=128)), engine)
        engine.step()
        engine.zero_grad()
        module = model.unwrap()
        WRITES[name](module, list(module.parameters()))
        state, weights = engine.state_dict(), {key: whole(param) for key, param in module.named_parameters()}
        masters = {key.removesuffix(f".{MASTER}"): value for key, value in state["others"].items() if MASTER in key}
        assert masters
        result[name] = all(torch.equal(value.to(torch.bfloat16), weights[key]) for key, value in masters.items())
    return result


BY_HAND: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01),
    "Lamb": lambda params: StockLamb(params, lr=1e-3, weight_decay=0.01),
}


def groups_by_hand(options: dict[str, Any]) -> dict[str, float]:
    """Largest difference from one process where rates and decays are written by hand and by schedulers."""
    return {name: _by_hand(options, make) for name, make in BY_HAND.items()}


def _by_hand(options: dict[str, Any], make: Callable[[Any], torch.optim.Optimizer]) -> float:
    given: list[torch.optim.Optimizer] = []
    schedulers: list[Any] = []

    def keep(params: Any) -> torch.optim.Optimizer:
        given.append(make(params))
        schedulers.append(torch.optim.lr_scheduler.LambdaLR(given[0], lambda step: 1 / (1 + step)))
        return given[0]

    model, engine, booster = boost(options, keep)
    scheduled = engine if isinstance(engine, torch.optim.Optimizer) else engine.optim
    schedulers.append(torch.optim.lr_scheduler.ExponentialLR(scheduled, 0.5))
    reference = models.llama(vocab=128).train()
    plain = cast(make(reference.parameters()))
    theirs = [torch.optim.lr_scheduler.LambdaLR(plain, lambda step: 1 / (1 + step))]
    theirs.append(torch.optim.lr_scheduler.ExponentialLR(plain, 0.5))
    for step in range(6):
        batch = models.tokens(step, vocab=128)
        booster.backward(models.loss(model, batch), engine)
        models.loss(reference, batch).backward()
        for optimizer in (engine, plain):
            optimizer.step()
            optimizer.zero_grad()
        _write_groups(step, engine.param_groups[0], given[0].param_groups[0], schedulers)
        _write_groups(step, plain.param_groups[0], plain.param_groups[0], theirs)
    return largest_error(list(map(whole, model.unwrap().parameters())), list(reference.parameters()))


def _write_groups(step: int, boosted: dict[str, Any], given: dict[str, Any], schedulers: Sequence[Any]) -> None:
    if step == 0:
        boosted["lr"] *= 0.5
    elif step == 1:
        given["lr"] *= 3.0
    elif step == 2:
        given["weight_decay"] = 0.5
    elif step == 3:
        schedulers[0].step()
    else:
        schedulers[1].step()


RATED: dict[str, Callable[[Any, Any], torch.optim.Optimizer]] = {
    "torch.AdamW": lambda params, lr: torch.optim.AdamW(params, lr=lr),
    "Lamb": lambda params, lr: Lamb(params, lr=lr, bias_correction="step_size"),
    "GoLoreAdamW": lambda params, lr: GoLoreAdamW(params, lr=lr, rank=4, clamp=True, total_steps=4),
    "CAME": lambda params, lr: CAME(params, lr=lr),
    "ColossalAI's Lamb": lambda params, lr: StockLamb(params, lr=lr),
}
RATE_PLUGINS: dict[str, dict[str, Any]] = {
    "zero1": {"plugin": "zero", "stage": 1, "precision": "fp32"},
    "zero2-blocks": {"plugin": "zero", "stage": 2, "precision": "bf16", "blocks": True},
    "hybrid0": {"plugin": "hybrid", "zero_stage": 0, "tp_size": 1, "pp_size": 1, "precision": "fp32"},
    "ddp": {"plugin": "ddp", "dtype": torch.float32},
    "fsdp2": {"plugin": "fsdp", "precision": "fp32"},
    "fsdp2-blocks": {"plugin": "fsdp", "precision": "bf16", "blocks": True},
}


def tensor_rates() -> dict[str, float]:
    """Largest difference of weights and rates between a rate that is a tensor and one that is a number."""
    errors = {}
    for plugin, options in RATE_PLUGINS.items():
        for name, make in RATED.items():
            rate = torch.tensor(1e-2, dtype=torch.float64)
            got, want = _rated(options, make, rate), _rated(options, make, 1e-2)
            errors[f"{plugin} {name}"] = (got - want).abs().max().item()
    return errors


def _rated(options: dict[str, Any], make: Callable[[Any, Any], torch.optim.Optimizer], rate: Any) -> Tensor:
    model, engine, booster = boost(options, lambda params: make(params, rate))
    scheduled = engine if isinstance(engine, torch.optim.Optimizer) else engine.optim
    scheduler = torch.optim.lr_scheduler.ExponentialLR(scheduled, 0.5)
    for step in range(4):
        if step == 2:
            engine.load_state_dict(engine.state_dict())
        booster.backward(models.loss(model, models.tokens(step, vocab=128)), engine)
        engine.step()
        engine.zero_grad()
        scheduler.step()
    weights = [local_values(param).double().view(-1) for param in model.unwrap().parameters()]
    return torch.cat([*weights, torch.tensor([float(group["lr"]) for group in engine.param_groups])])
