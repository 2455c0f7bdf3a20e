"""What every plugin checks and does before and after ColossalAI wraps the model.

All ranks must have been given the same; engines of torch and ColossalAI train what required grad when they were made,
and nothing that comes later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from colossalai.interface import OptimizerWrapper
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block import BlockOptimizer, BlockOptimizerRatio
from colossal_bcd.block.gradient_checkpointing import keep_checkpoints_whole, prefer_non_reentrant
from colossal_bcd.block.trained import is_plain, trained_of
from colossal_bcd.booster.adapters import adopt_adapters
from colossal_bcd.booster.casts.registry import cast, names_of
from colossal_bcd.engine.agreement import differing, gathered, num_ranks
from colossal_bcd.engine.fitness import Given, require_fit

FOLLOWING = (
    "Boost with them trainable and freeze them afterwards (torch's DDP then asks for find_unused_parameters=True), or "
    "use LowLevelZeroPlugin or HybridParallelPlugin of colossal_bcd.booster, which follow."
)
UNDIVIDED = (
    "Use an optimizer of colossal_bcd, or a plugin that divides none: TorchDDPPlugin, or HybridParallelPlugin with "
    "tp_size=1, pp_size=1, zero_stage=0."
)


class Uncopied:
    """Mixin of boosted optimizers: refuses `copy` and `pickle`, which would break the original's class, too.

    A copy of torch's Optimizer wraps `step` of its class once more, and does so before it fails here.
    """

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"a boosted {type(self).__name__} cannot be copied or pickled: it has masters, hooks and process groups; "
            "expected to stay with its model. Save it by booster.save_optimizer(optimizer, path)."
        )


def ready_to_boost(model: nn.Module, optimizer: Any, given: Given) -> Optimizer:
    """Cast the optimizer and settle what would fail later, before the first collective about weights."""
    adopt_adapters(model, optimizer)
    require_same_options(model, optimizer)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"boost: got an optimizer of type {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    trained = {id(param) for param in trained_of(optimizer).parameters()}
    foreign = trained - {id(param) for param in model.parameters()}
    if foreign:
        raise ValueError(
            f"boost: {len(foreign)} of the optimizer's {len(trained)} parameters are not in the model. Construct the "
            "optimizer from the parameters of the model that is boosted, after the model was changed or copied."
        )
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and id(module.weight) in trained:
            raise ValueError(f"module {name!r} has sparse gradients, expected dense ones. Build it with sparse=False.")
    keep_checkpoints_whole()
    optimizer = cast(optimizer, measured=True)
    require_fit(optimizer, given, "boost", UNDIVIDED)
    if isinstance(optimizer, (BlockOptimizer, BlockOptimizerRatio)):
        prefer_non_reentrant(model)
    return optimizer


@contextlib.contextmanager
def thawed(optimizer: Any) -> Iterator[None]:
    """Everything that will ever be trained requires grad while ColossalAI wraps the model; attaching freezes again."""
    params = [] if is_plain(optimizer) else trained_of(optimizer).parameters()
    before = [(param, param.requires_grad) for param in params]
    for param in params:
        param.requires_grad_(True)
    try:
        yield
    except BaseException:
        for param, trained in before:
            param.requires_grad_(trained)
        raise


@torch.no_grad()
def same_start(model: nn.Module, group: Any, *, buffers: bool = True) -> None:
    """Copy weights and buffers of the group's first rank to the others, as torch's DDP does.

    ZeRO's first gather does so for what is trained; what a block optimizer leaves frozen is never gathered.
    Without `buffers` every rank keeps its own.
    """
    if dist.get_world_size(group) > 1:
        source = dist.get_global_rank(group, 0)
        for tensor in [*model.parameters(), *(model.buffers() if buffers else ())]:
            dist.broadcast(tensor.data, source, group=group)


def require_same_options(model: nn.Module, optimizer: Any, group: dist.ProcessGroup | None = None) -> None:
    """Compare what this rank was given with what the others were: one exchange of names and numbers.

    Raises:
        ValueError: on every rank of the group (None: of all), naming the ranks and what differs.
    """
    if num_ranks(group) == 1:
        return
    everyone = gathered(_described(model, optimizer), group)
    first = everyone[0]
    for subject in first:
        different = differing([options.get(subject) for options in everyone])
        if different:
            detail = _differences(everyone[different[0]].get(subject, {}), first[subject])
            raise ValueError(
                f"boost: the {subject} of ranks {different} differs from that of rank 0: {detail}. Construct the same "
                "model and optimizer, with the same arguments and seed, on every rank."
            )


def _described(model: nn.Module, optimizer: Any) -> dict[str, dict[str, Any]]:
    """Subject -> name -> a short value; the same names and values on ranks that agree."""
    names = {id(param): name for name, param in model.named_parameters()}
    kinds = {"class": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"}
    shapes = {name: f"{tuple(param.shape)} {param.dtype}" for name, param in model.named_parameters()}
    if not isinstance(optimizer, Optimizer):
        return {"model": shapes, "optimizer": kinds}
    trained = trained_of(optimizer)
    base, members = trained.base_optimizer, trained.members
    options: dict[str, dict[str, Any]] = {
        "model": shapes,
        "optimizer": {**kinds, "base": f"{type(base).__module__}.{type(base).__qualname__}", "groups": len(members)},
    }
    for index, (group, params) in enumerate(zip(base.param_groups, members, strict=True)):
        listed = [names.get(id(param), "a parameter of another model") for param in params]
        options[f"param group {index}"] = {
            **{name: _plain(value) for name, value in group.items() if name != "params"},
            "parameters": f"{len(listed)} ({_digest(listed)})",
        }
    if not trained.plan.is_whole:
        identity = trained.plan.identity()
        blocks = identity.pop("blocks")
        options["block schedule"] = {
            **identity,
            "blocks": [name for name, _ in blocks],
            "parameters of the blocks": _digest(blocks),
        }
    return options


def _plain(value: Any) -> str:
    """What ranks can compare of a value of a param group: nothing of it is an address, which differs on every rank.

    Functions count by their qualified name, and objects of other classes by their type alone.
    """
    if isinstance(value, Tensor):
        return repr(value.tolist())
    if value is None or isinstance(
        value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, enum.Enum)
    ):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_plain(key)}: {_plain(each)}" for key, each in value.items()) + "}"
    if isinstance(value, Set):
        return "{" + ", ".join(sorted(map(_plain, value))) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(_plain, value)) + ")"
    if isinstance(value, functools.partial):
        return f"partial({_plain(value.func)}, {_plain(value.args)}, {_plain(value.keywords)})"
    kind = type(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return f"{kind.__qualname__}{_plain(fields)}"
    name = getattr(value, "__qualname__", None)
    if isinstance(name, str):
        return f"{getattr(value, '__module__', None)}.{name}"
    return f"a {kind.__module__}.{kind.__qualname__}"


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]


def _differences(theirs: dict[str, Any], first: dict[str, Any]) -> str:
    names = [name for name in {**first, **theirs} if theirs.get(name) != first.get(name)]
    shown = ", ".join(f"{name} {theirs.get(name)} instead of {first.get(name)}" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def configured_by_stock(
    configure: Callable[..., Any], model: Any, optimizer: Any, *args: Any, sharded: bool, **kwargs: Any
) -> Any:
    """Boost by ColossalAI's engine, whose steps then look for weights that were thawed or added since it was made.

    Their gradients would be those of one rank's batch alone, or be used by nobody.  The step raises ValueError on every
    rank where they are found.  The optimizer gets the names of its parameters, for checkpoints.  If `sharded`, its
    groups will hold tensors of the engine's own, to which no others may come.
    """
    names, frozen = names_of(model), list[Parameter]()
    if isinstance(optimizer, Optimizer):
        module: nn.Module = model.unwrap(unwrap_peft=False) if hasattr(model, "unwrap") else model
        candidates = _grouped(optimizer) if sharded else module.parameters()
        frozen = [param for param in candidates if not param.requires_grad]
    boosted = configure(model, optimizer, *args, **kwargs)
    made = boosted[1]
    if not isinstance(made, OptimizerWrapper) or hasattr(made, "parameter_names"):
        return boosted
    made.parameter_names, made.has_whole_state = names, type(made) is OptimizerWrapper
    members = set(_grouped(made.optim)) if sharded else None

    def look(stepped: Optimizer, _args: Any, _kwargs: Any) -> None:
        grouped = set(_grouped(stepped))
        late = [param for param in frozen if param.requires_grad and (sharded or param in grouped)]
        if members is not None:
            late += [param for param in grouped - members if param not in late]
        if late:
            listed = [names.get(id(param), f"one of shape {tuple(param.shape)}") for param in late]
            raise ValueError(
                f"{len(late)} weights were thawed or added after boosting, such as {listed[0]}; got them in a step of "
                f"an engine that trains only what required grad when it was made, expected none. {FOLLOWING}"
            )

    made.optim.register_step_pre_hook(look)
    return boosted


def _grouped(optimizer: Optimizer) -> list[Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]
