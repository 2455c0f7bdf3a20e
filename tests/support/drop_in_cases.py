"""What ranks run in test_drop_in.py: the same code on ColossalAI's optimizer wrappers and on this package's."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import re
import weakref
from collections.abc import Iterator
from typing import Any

import models
import torch
import torch.distributed as dist
from colossalai.accelerator import set_accelerator
from colossalai.amp.naive_amp.mixed_precision_optimizer import MixedPrecisionOptimizer
from colossalai.booster import Booster
from colossalai.booster.plugin import HybridParallelPlugin as StockHybridParallelPlugin
from colossalai.booster.plugin import LowLevelZeroPlugin as StockLowLevelZeroPlugin
from colossalai.booster.plugin import TorchDDPPlugin as StockTorchDDPPlugin
from colossalai.booster.plugin.hybrid_parallel_plugin import (
    HybridParallelAMPOptimizer,
    HybridParallelModule,
    HybridParallelNaiveOptimizer,
    HybridParallelZeroOptimizer,
)
from colossalai.booster.plugin.low_level_zero_plugin import LowLevelZeroModel
from colossalai.booster.plugin.torch_ddp_plugin import TorchDDPModel
from colossalai.cluster import ProcessGroupMesh
from colossalai.interface import OptimizerWrapper
from colossalai.zero import LowLevelZeroOptimizer as StockLowLevelZeroOptimizer
from torch import Tensor, nn
from torch.testing import assert_close

from colossal_bcd import AdamW, BlockOptimizer
from colossal_bcd.booster import HybridParallelPlugin, LowLevelZeroOptimizer, LowLevelZeroPlugin, TorchDDPPlugin
from colossal_bcd.booster.cpu_accelerator import HostAccelerator

STOCK: dict[str, Any] = {
    "zero": StockLowLevelZeroPlugin,
    "hybrid": StockHybridParallelPlugin,
    "ddp": StockTorchDDPPlugin,
}
OURS: dict[str, Any] = {"zero": LowLevelZeroPlugin, "hybrid": HybridParallelPlugin, "ddp": TorchDDPPlugin}
HYBRID = {"tp_size": 1, "pp_size": 1}
PAIRS: dict[str, tuple[str, dict[str, Any], tuple[type, ...], type]] = {
    "zero": ("zero", {"stage": 1, "precision": "bf16"}, (StockLowLevelZeroOptimizer,), LowLevelZeroModel),
    "hybrid-zero": (
        "hybrid", {**HYBRID, "zero_stage": 1, "precision": "bf16"}, (HybridParallelZeroOptimizer,), HybridParallelModule
    ),
    "hybrid-amp": (
        "hybrid",
        {**HYBRID, "zero_stage": 0, "precision": "bf16"},
        (HybridParallelAMPOptimizer, MixedPrecisionOptimizer),
        HybridParallelModule,
    ),
    "hybrid-naive": (
        "hybrid",
        {**HYBRID, "zero_stage": 0, "precision": "fp32"},
        (HybridParallelNaiveOptimizer,),
        HybridParallelModule,
    ),
    "ddp": ("ddp", {}, (OptimizerWrapper,), TorchDDPModel),
}  # fmt: skip
"""Case -> plugin, its options, and ColossalAI's classes that user code knows there."""

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("pg_to_grad_store", "pid_to_grad_store", "pg_to_bucket_store", "pid_to_bucket_store", "pg_to_tensor_bucket"),
        "AttributeError: .*not kept in ColossalAI's stores here. Use ",
    ),
    "record_param_padding_size": "ValueError: .*get_param_padding_size",
    "link_master_and_working_param": "ValueError: .*update_master_params",
    "scale_loss": r"NotImplementedError: .*backward\(loss\)",
    "unscale_grad": r"NotImplementedError: .*step\(\)",
}
"""Name -> the error with its remedy."""
CALLS: dict[str, tuple[Any, ...]] = {
    "record_param_padding_size": (None, 0),
    "link_master_and_working_param": (None,) * 2,
}


class Net(nn.Module):
    """Sizes that two ranks do not divide, and a layer that no batch uses."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.drop, self.last = nn.Linear(7, 9), nn.Linear(9, 9), nn.Linear(9, 5)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def use_cpu() -> None:
    """Let ColossalAI's own classes run on this machine."""
    set_accelerator(HostAccelerator())
    StockLowLevelZeroOptimizer._sanity_checks = lambda self: None


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randn(4, 7, generator=generator).to(dtype)


def loss_of(model: Any, step: int = 0) -> Tensor:
    if any(hasattr(module, "lm_head") for module in model.modules()):
        tokens = models.tokens(10 * step + dist.get_rank())
        return model(input_ids=tokens, labels=tokens).loss
    return model(batch(step, next(model.parameters()).dtype)).float().square().sum()


def boosted(plugins: dict[str, Any], case: str, *, block: bool = False) -> Any:
    """Model, wrapper and booster."""
    plugin, options, *_ = PAIRS[case]
    model = models.llama() if plugin == "hybrid" else Net()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if block:
        optimizer = BlockOptimizer(optimizer, list(model.named_parameters()), block_prefix_list=[["first."]], verbose=0)
    extra = {"overlap_communication": False} if plugin != "ddp" and plugins is STOCK else {}
    booster = Booster(plugin=plugins[plugin](**options, **extra))
    model, wrapper, *_ = booster.boost(model, optimizer)
    return model, wrapper, booster


def public(cls: type) -> set[str]:
    """Public names of ColossalAI's own: of its classes, and what their constructors put into an instance."""
    names: set[str] = set()
    for parent in cls.__mro__:
        if parent.__module__.startswith("colossalai"):
            names |= set(vars(parent))
            names |= set(re.findall(r"self\.([a-z]\w*)\s*(?::[^=\n]+)?=[^=]", inspect.getsource(parent)))
    return {name for name in names if not name.startswith("_")}


def error_of(thing: Any, name: str) -> str | None:
    """What reading the name raises, or calling it where a call is what is refused."""
    try:
        value = getattr(thing, name)
        if name in REFUSED:
            value(*CALLS.get(name, (None,) * (name == "scale_loss")))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def calls_differ(theirs: Any, ours: Any) -> str | None:
    """What of ColossalAI's signature ours does not take, by place, name or default."""
    if not callable(theirs) or isinstance(theirs, type):
        return None
    wanted = [p for p in inspect.signature(theirs).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    given = list(inspect.signature(ours).parameters.values())
    takes_any = {p.kind for p in given} >= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    loose = {p.kind for p in inspect.signature(theirs).parameters.values()} & {inspect.Parameter.VAR_KEYWORD}
    # Without a name of its own, the method hands on torch's arguments, which ours names.
    if len(wanted) > 1 and not loose <= {p.kind for p in given}:
        return "other keywords"
    for place, parameter in enumerate(wanted):
        if takes_any:
            break
        if place >= len(given) or given[place].name != parameter.name:
            return f"{parameter.name} at place {place}"
        if given[place].default != parameter.default:
            return f"default of {parameter.name}"
    return None


def surface(case: str) -> dict[str, Any]:
    """What is missing of ColossalAI's surface, what is refused and how, and signatures that differ."""
    plugin, _, classes, model_class = PAIRS[case]
    model, wrapper, booster = boosted(OURS, case, block=case == "ddp")
    missing, refused, signatures = [], {}, []
    stock = STOCK[plugin](**PAIRS[case][1])
    things = [(wrapper, classes), (model, (model_class,)), (booster.plugin, (STOCK[plugin],)), (booster, (Booster,))]
    for thing, kinds in things:
        for kind in kinds:
            for name in public(kind):
                if thing is booster.plugin and not hasattr(stock, name):
                    continue  # It depends on arguments.
                error = error_of(thing, name)
                if name in REFUSED:
                    refused[name] = error
                elif error is not None:
                    missing.append((kind.__name__, name, error))
                elif inspect.isfunction(vars(kind).get(name)):
                    difference = calls_differ(
                        getattr(thing, name, None) and getattr(kind, name), getattr(type(thing), name)
                    )
                    if difference:
                        signatures.append((kind.__name__, name, difference))
    return {"missing": missing, "refused": refused, "signatures": signatures, "kinds": isinstance(model, model_class)}


def maps(wrapper: Any, params: list[Any]) -> dict[str, Any]:
    """What the tables of weights and masters say, by place of the weight."""
    place = {id(param): index for index, param in enumerate(params)}
    seen: dict[str, Any] = {}
    to_master, to_weight = wrapper.get_working_to_master_map(), wrapper.get_master_to_working_map()
    seen["masters"] = {place[key]: master.detach().clone() for key, master in to_master.items()}
    seen["back"] = sorted(place[id(to_weight[id(master)])] for master in to_master.values())
    if hasattr(wrapper, "param_info"):
        info = wrapper.param_info
        seen["info"] = (
            info["param_groups"],
            {place[key]: number for key, number in info["param2id"].items()},
            {number: place[key] for number, key in info["id2param"].items()},
            {place[key]: tuple(shape) for key, shape in info["param2shape"].items()},
        )
    return seen


def read_zero(wrapper: Any, params: list[Any], booster: Any, model: Any) -> dict[str, Any]:
    """Everything that user code reads of a ZeRO optimizer, in the course of two steps."""
    seen = maps(wrapper, params)
    seen["padding"] = [wrapper.get_param_padding_size(param) for param in params]
    for name in ("get_param_padding_map", "get_padding_map"):
        table = getattr(wrapper, name)()
        seen[name] = [table[id(param)] for param in params]
    seen["plain"] = wrapper.num_param_groups, wrapper.dtype, len(wrapper.parameters), wrapper.require_grad_sync
    seen["same"] = wrapper.working_to_master_param.keys() == wrapper.get_working_to_master_map().keys()
    lists = wrapper.pg_to_param_list
    seen["lists"] = [len(each) for each in lists.values()], {len(lists[wrapper.param_to_pg[p]]) for p in params}
    for step in range(2):
        booster.backward(loss_of(model, step), wrapper)
        grads = [wrapper.get_param_grad(param) for param in params]
        seen["grads", step] = [None if grad is None else grad.clone() for grad in grads]
        # ColossalAI's are in the order in which backward has made them.
        working = [grad.clone() for grad in wrapper.get_working_grads_by_group_id(0)]
        seen["working", step] = sorted(working, key=lambda grad: (grad.numel(), grad.abs().sum().item()))
        own = [wrapper.get_working_grad_by_param_id(id(param)) for param in params]
        seen["own", step] = [None if grad is None else grad.clone() for grad in own]
        parts = [wrapper.get_partitioned_gradients_by_param_id(0, id(param)) for param in params]
        seen["parts", step] = [[part.clone() for part in each] for each in parts]
        seen["ids", step] = [
            grad is None or wrapper.get_param_id_for_grad(grad) == id(param)
            for grad, param in zip(own, params, strict=True)
        ]
        seen["no id", step] = wrapper.get_param_id_for_grad(torch.zeros(3))
        for grad in wrapper.get_working_grads_by_group_id(0):
            grad.mul_(0.5)  # what is written into the slices counts
        wrapper.step()
        wrapper.zero_grad()
        seen["weights", step] = [param.detach().clone() for param in params]
    extra = sum(param.float().square().sum() for param in params)  # every weight has state now
    booster.backward(loss_of(model, 2) + extra, wrapper)
    wrapper.step()
    wrapper.zero_grad()
    seen["state"] = {key: dict(state) for key, state in wrapper.state_dict()["state"].items()}
    seen["on master"] = {
        key: sorted(name for name, value in state.items() if isinstance(value, Tensor) and name != "step")
        for key, state in wrapper.state_dict(only_on_master=True)["state"].items()
    }
    sizes = []
    merged: dict[int, Any] = {}
    for shard, size in wrapper.state_dict_shard(max_shard_size=0.0005):
        merged.update({key: dict(state) for key, state in shard.items()})
        sizes.append(size)
    seen["shards"], seen["sizes"] = merged, sizes
    seen["shards on master"] = sum(
        isinstance(value, Tensor) and name != "step"
        for shard, _ in wrapper.state_dict_shard(only_on_master=True)
        for state in shard.values()
        for name, value in state.items()
    )
    booster.backward(loss_of(model, 3), wrapper)
    wrapper.zero_grad_stores()
    wrapper.zero_bucket_stores()
    seen["forgotten"] = [wrapper.get_param_grad(param) for param in params]
    wrapper.zero_grad()
    with contextlib.nullcontext() if wrapper._partition_grads else wrapper.no_sync():
        booster.backward(loss_of(model, 4), wrapper)
    booster.backward(loss_of(model, 5), wrapper)
    seen["accumulated"] = [wrapper.get_param_grad(param) for param in params]
    wrapper.step()
    seen["norm"] = round(float(wrapper.get_grad_norm()), 4)
    return seen


def compared(case: str, stage: int | None = None) -> list[str]:
    """Names of what ColossalAI's wrapper and ours do not say alike."""
    use_cpu()
    results = []
    for plugins in (STOCK, OURS):
        plugin, options, *_ = PAIRS[case]
        PAIRS["now"] = (plugin, {**options, "stage": stage} if stage else options, (), object)
        model, wrapper, booster = boosted(plugins, "now")
        params = list(model.unwrap().parameters())
        zero = isinstance(wrapper, StockLowLevelZeroOptimizer) and case in ("zero", "hybrid-zero")
        if zero:
            results.append(read_zero(wrapper, params, booster, model))
            continue
        seen = maps(wrapper, params) if case == "hybrid-amp" else {"info": list(wrapper.param_info)}
        seen["plain"] = (
            wrapper.max_norm,
            wrapper.tp_size,
            wrapper.pp_size,
            type(getattr(wrapper, "mixed_precision", None)),
        )
        if case == "hybrid-naive":
            seen["plain"] = seen["plain"][:3]
        else:
            seen["direct"] = [wrapper.working_to_master_map[param].clone() for param in params]
            seen["back"] = all(wrapper.master_to_working_map[m] is p for p, m in wrapper.working_to_master_map.items())
        results.append(seen)
    stock, ours = results
    assert stock.keys() <= ours.keys()
    return [str(name) for name in stock if not alike(stock[name], ours[name])]


def alike(theirs: Any, ours: Any) -> bool:
    """Equal, tensors to float32's rounding: two ranks' halves are added in one order."""
    try:
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6, check_dtype=False)
    except AssertionError:
        return False
    except TypeError:
        if isinstance(theirs, dict):
            return theirs.keys() == ours.keys() and all(alike(theirs[key], ours[key]) for key in theirs)
        if isinstance(theirs, (list, tuple)):
            return len(theirs) == len(ours) and all(map(alike, theirs, ours))
        return bool(theirs == ours)
    return True


def hooks_run() -> dict[str, list[str]]:
    """Step hooks of a plain optimizer, of one of this package and of blocks: in order, once a step."""
    seen: dict[str, list[str]] = {}
    for name in ("torch", "ours", "block"):
        model = Net()
        optimizer: Any = AdamW(model.parameters()) if name == "ours" else torch.optim.AdamW(model.parameters())
        if name == "block":
            optimizer = BlockOptimizer(
                optimizer, list(model.named_parameters()), block_prefix_list=[["last."]], verbose=0
            )
        booster = Booster(plugin=LowLevelZeroPlugin(precision="fp32"))
        model, engine, *_ = booster.boost(model, optimizer)
        calls: list[str] = []
        last = list(model.unwrap().parameters())[-1]

        def before(
            optimizer: Any, args: Any, kwargs: Any, calls: list[str] = calls, engine: Any = engine, last: Any = last
        ) -> None:
            calls.append(f"before: {engine.working_to_master_param[id(last)].grad is not None}")

        engine.register_step_pre_hook(before)
        handle = engine.register_step_post_hook(lambda *_, calls=calls: calls.append("after"))
        for step in range(2):
            booster.backward(loss_of(model, step), engine)
            engine.step()
            engine.zero_grad()
            handle.remove()
        seen[name] = calls
    return seen


def pinned() -> dict[str, bool]:
    """Buffers are made once and hold the state."""
    model, engine, booster = boosted(OURS, "zero")
    booster.backward(loss_of(model), engine)
    engine.step()
    engine.zero_grad()
    buffers: dict[int, dict[str, Tensor]] = {}
    state = engine.state_dict(buffers)["state"]
    first = {(key, name): tensor.data_ptr() for key, each in buffers.items() for name, tensor in each.items()}
    same = all(state[key][name] is buffers[key][name] for key, name in first)
    booster.backward(loss_of(model, 1), engine)
    engine.step()
    shards = [shard for shard, _ in engine.state_dict_shard(pinned_state_dicts=buffers)]
    kept = all(buffers[key][name].data_ptr() == pointer for (key, name), pointer in first.items())
    now = engine.state_dict()["state"]
    right = all(torch.equal(buffers[key][name], now[key][name]) for key, name in first)
    return {"some": len(first) >= 8, "same": same, "kept": kept, "right": right, "shards": len(shards) == 1}


def model_no_sync() -> dict[str, int]:
    """Collectives of a backward pass inside the model's own `no_sync`, and after it."""
    from colossal_bcd.testing import CollectiveCounter

    seen = {}
    for case, block in (("hybrid-naive", False), ("ddp", True)):
        model, engine, booster = boosted(OURS, case, block=block)
        inside = model.no_sync() if case != "ddp" else model.module.no_sync()
        with CollectiveCounter() as counter, inside:
            booster.backward(loss_of(model), engine)
        seen[f"{case} inside"] = counter.total
        with CollectiveCounter() as counter:
            booster.backward(loss_of(model), engine)
        seen[f"{case} after"] = counter.total
        engine.step()
    return seen


@contextlib.contextmanager
def constructed(kind: str) -> Iterator[Any]:
    """ColossalAI's class, or ours; only the name differs."""
    use_cpu()
    yield StockLowLevelZeroOptimizer if kind == "stock" else LowLevelZeroOptimizer


def stages_agree(kind: str) -> bool:
    """Stage 1 and 2 around equal models: outputs, gradients and weights are equal."""
    with constructed(kind) as cls:
        one = Net()
        two = copy.deepcopy(one)
        overlap = {"overlap_communication": kind != "stock", "initial_scale": 128}
        first = cls(torch.optim.Adam(one.parameters(), lr=1.0), verbose=True, **overlap)
        second = cls(torch.optim.Adam(two.parameters(), lr=1.0), partition_grad=True, **overlap)
        x = batch(0)
        outputs = one(x), two(x)
        assert torch.equal(*outputs)
        first.backward(outputs[0].mean().float())
        second.backward(outputs[1].mean().float())
        for p1, p2 in zip(one.parameters(), two.parameters(), strict=True):
            g1, g2 = first.get_param_grad(p1), second.get_param_grad(p2)
            assert (g1 is None) == (g2 is None)
            if g1 is not None:
                assert_close(g1, g2)
        first.step()
        second.step()
        assert_close(list(one.parameters()), list(two.parameters()))
    return True


def follows_ddp(kind: str, dtype: torch.dtype, master_weights: bool, extra: int, zero_grad: bool = True) -> bool:
    """Two steps of SGD beside torch's DDP in the same dtype: gradients, then weights.

    Without `zero_grad` gradients accumulate over the steps, as ColossalAI's test has it.
    """
    rtol, atol = (5e-2, 5e-4) if dtype is torch.float16 else (4e-3, 4e-3)  # those of ColossalAI's test
    groups: dict[str, Any] = {}
    if extra > 1:
        mesh = ProcessGroupMesh(extra, dist.get_world_size() // extra)
        groups = {"extra_dp_group": mesh.get_group_along_axis(0), "dp_process_group": mesh.get_group_along_axis(1)}
    with constructed(kind) as cls:
        plain = Net(dtype)
        ours = copy.deepcopy(plain)
        replica = nn.parallel.DistributedDataParallel(plain, find_unused_parameters=True)
        optimizer = torch.optim.SGD(plain.parameters(), lr=1.0)
        options: dict[str, Any] = {"overlap_communication": kind != "stock", "reduce_bucket_size": 1024 * 1024}
        options |= {"master_weights": master_weights, "initial_scale": 1, **groups}
        zero = cls(torch.optim.SGD(ours.parameters(), lr=1.0), **options)
        for step in range(2):
            x = torch.rand(8, 7, generator=torch.Generator().manual_seed(step + 10 * dist.get_rank())).to(dtype)
            ours_out, plain_out = ours(x), replica(x)
            assert_close(ours_out, plain_out, rtol=rtol, atol=atol)
            zero.backward(ours_out.mean())
            plain_out.mean().backward()
            for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
                grad = zero.get_param_grad(q)
                assert (grad is None) == (p.grad is None or not p.grad.any())
                if grad is not None:
                    assert_close(grad, p.grad, rtol=rtol, atol=atol)
            zero.step()
            optimizer.step()
            zero._force_wait_all_gather()
            assert_close(list(ours.parameters()), list(plain.parameters()), rtol=rtol, atol=atol)
            if zero_grad:
                zero.zero_grad()
                optimizer.zero_grad()
    return True


def accumulates(kind: str) -> bool:
    """One pass under `no_sync`, one outside, clipped: as torch's DDP does it."""
    with constructed(kind) as cls:
        plain = Net()
        plain.drop.requires_grad_(False)
        ours = copy.deepcopy(plain)
        replica = nn.parallel.DistributedDataParallel(plain, bucket_cap_mb=1)
        trained = [param for param in plain.parameters() if param.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=1.0)
        options = {"overlap_communication": False, "reduce_bucket_size": 262144, "clip_grad_norm": 1.0}
        zero = cls(torch.optim.Adam(ours.parameters(), lr=1.0), **options)
        for number in range(2):
            with zero.no_sync() if number == 0 else contextlib.nullcontext():
                zero.backward(ours(batch(number)).sum().float())
            with replica.no_sync() if number == 0 else contextlib.nullcontext():
                replica(batch(number)).sum().backward()
            if number == 0:
                for p, q in zip(trained, filter(lambda p: p.requires_grad, ours.parameters()), strict=True):
                    assert torch.equal(p.grad, q.grad)
        zero.step()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        # The gradients agree to 1e-6 of themselves; in its first step Adam divides each by itself.
        assert_close(list(ours.parameters()), list(plain.parameters()))
    return True


def loads_torch_state(kind: str) -> bool:
    """The state dict is torch's, and a state dict of torch's loads into emptied state."""
    with constructed(kind) as cls:
        plain = Net()
        plain.drop.requires_grad_(False)
        ours = copy.deepcopy(plain)
        replica = nn.parallel.DistributedDataParallel(plain)
        optimizer = torch.optim.Adam([p for p in plain.parameters() if p.requires_grad], lr=1.0)
        trained = [param for param in ours.parameters() if param.requires_grad]
        zero = cls(torch.optim.Adam(trained, lr=1.0), overlap_communication=kind != "stock", initial_scale=1)
        zero.backward(ours(batch(0)).mean().float())
        replica(batch(0)).mean().backward()
        zero.step()
        optimizer.step()
        want = copy.deepcopy(optimizer.state_dict())

        def check() -> None:
            got = zero.state_dict()
            assert list(got["state"]) == list(want["state"])
            for theirs, mine in zip(want["state"].values(), got["state"].values(), strict=True):
                for name in theirs:
                    assert_close(torch.as_tensor(mine[name]), torch.as_tensor(theirs[name]), check_dtype=False)

        check()
        zero.optim.state = []
        zero.load_state_dict(copy.deepcopy(want))
        check()
    return True


def freed(kind: str) -> bool:
    """Deleting the wrapper frees it at once, and its hooks leave the weights."""
    with constructed(kind) as cls:
        model = Net()
        zero = cls(torch.optim.SGD(model.parameters(), lr=1.0))
        gone = weakref.ref(zero)
        gc.disable()
        del zero
        gc.enable()
        hooks = [param._post_accumulate_grad_hooks for param in model.parameters()]
        return gone() is None and not any(hooks)


def layer_drop(kind: str) -> bool:
    """What one step does not use keeps its weight and its state; the next one may use it."""
    with constructed(kind) as cls:
        model = Net()
        zero = cls(torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9), partition_grad=True)
        before = model.drop.weight.detach().clone()
        zero.backward(model(batch(0)).mean())
        zero.step()
        zero.zero_grad()
        kept = torch.equal(model.drop.weight, before)
        zero.backward(model(batch(0)).mean() + model.drop(torch.ones(1, 9)).mean())
        zero.step()
        return kept and not torch.equal(model.drop.weight, before)


CONSTRUCTED: list[tuple[Any, tuple[Any, ...]]] = [
    (stages_agree, ()),
    *((follows_ddp, (dtype, masters, 1)) for dtype in (torch.float16, torch.bfloat16) for masters in (True, False)),
    *((follows_ddp, (torch.bfloat16, True, 2, zero_grad)) for zero_grad in (True, False)),
    *(
        (follows_ddp, (dtype, masters, 1, False))
        for dtype in (torch.float16, torch.bfloat16)
        for masters in (True, False)
    ),
    (accumulates, ()),
    (loads_torch_state, ()),
    (freed, ()),
    (layer_drop, ()),
]


def constructed_cases() -> dict[str, Any]:
    """What of ColossalAI's own assertions fails, for its class and for ours."""
    seen: dict[str, Any] = {}
    for kind in ("stock", "ours"):
        for case, arguments in CONSTRUCTED:
            try:
                result: Any = case(kind, *arguments)
            except (AssertionError, AttributeError, ValueError, TypeError, RuntimeError) as error:
                result = f"{type(error).__name__}: {error}"
            if result is not True:
                seen[f"{kind} {case.__name__} {arguments}"] = result
    return seen


def everything() -> dict[str, Any]:
    """All of this file on the same ranks."""
    return {
        "surface": {case: surface(case) for case in PAIRS if case != "now"},
        "zero-1": compared("zero", 1),
        "zero-2": compared("zero", 2),
        **{case: compared(case) for case in ("hybrid-zero", "hybrid-amp", "hybrid-naive")},
        "hooks": hooks_run(),
        "pinned": pinned(),
        "no_sync": model_no_sync(),
        "constructed": constructed_cases(),
    }
