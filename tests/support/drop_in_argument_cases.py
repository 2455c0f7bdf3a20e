"""What ranks run in test_drop_in_arguments.py: each constructor argument of ColossalAI's plugins, seen at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import torch
import torch.distributed as dist
from colossalai.amp.naive_amp.grad_scaler import DynamicGradScaler
from colossalai.booster import Booster
from colossalai.shardformer import GradientCheckpointConfig
from colossalai.shardformer.policies.llama import LlamaForCausalLMPolicy
from on_ranks import heard
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from colossal_bcd import BlockOptimizer
from colossal_bcd.booster import HybridParallelPlugin, LowLevelZeroPlugin, TorchDDPPlugin
from colossal_bcd.testing import CollectiveCounter

PLUGINS: dict[str, Any] = {"zero": LowLevelZeroPlugin, "hybrid": HybridParallelPlugin, "ddp": TorchDDPPlugin}
HYBRID: dict[str, Any] = {"tp_size": 1, "pp_size": 1, "precision": "fp32"}
SCALING = {
    "initial_scale": 8.0,
    "min_scale": 3.0,
    "growth_factor": 4.0,
    "backoff_factor": 0.25,
    "growth_interval": 2,
    "hysteresis": 2,
    "max_scale": 16.0,
}
OVERFLOWS = (False, False, True, True, True, True, False)


class Net(nn.Module):
    """Weights of 5 and 6 rows, which 2 ranks do not divide evenly; a buffer; a layer that no batch uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last, self.unused = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(2, 3)
        self.register_buffer("offset", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x))) + self.offset


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    """Another one on each rank."""
    generator = torch.Generator().manual_seed(11 + dist.get_rank())
    return torch.randn(3, 4, generator=generator).to(dtype)


def boosted(plugin: str, options: dict[str, Any], *, block: bool = False, lr: float = 1.0) -> Any:
    """Model, engine and booster of a small network, or, for the hybrid plugin, of a Llama."""
    model = models.llama() if plugin == "hybrid" else Net()
    if plugin != "hybrid" and dist.get_rank() == 1:
        model.offset.fill_(1.0)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=lr)
    if block:
        names = ["first.", "last."] if plugin != "hybrid" else ["model.layers.0.", "model.layers.1."]
        listed = list(model.named_parameters())
        optimizer = BlockOptimizer(optimizer, listed, block_prefix_list=[[name] for name in names], verbose=0)
    booster = Booster(plugin=PLUGINS[plugin](**options))
    criterion = (lambda outputs, _: outputs.loss) if plugin == "hybrid" else None
    model, engine, *_ = booster.boost(model, optimizer, criterion)
    return model, engine, booster


def loss_of(model: Any) -> Tensor:
    if any(hasattr(module, "lm_head") for module in model.modules()):
        tokens = models.tokens(dist.get_rank())
        return model(input_ids=tokens, labels=tokens).loss
    dtype = next(model.parameters()).dtype
    return model(batch(dtype)).float().square().mean()


def backward(plugin: str, options: dict[str, Any], **kwargs: Any) -> Any:
    model, engine, booster = boosted(plugin, options, **kwargs)
    with CollectiveCounter() as counter:
        booster.backward(loss_of(model), engine)
    return model, engine, booster, counter


def scaled(plugin: str, options: dict[str, Any]) -> bool:
    """The loss scale follows ColossalAI's scaler with these numbers, through growth, limits and overflow."""
    model, engine, booster = boosted(plugin, {**options, "precision": "fp16", **SCALING})
    reference, seen, want = DynamicGradScaler(**SCALING), [], []
    for overflow in OVERFLOWS:
        loss = loss_of(model)
        booster.backward(loss * (float("inf") if overflow else 1e-4), engine)
        engine.step()
        engine.zero_grad()
        reference.update(overflow)
        seen.append(engine.mixed_precision_mixin.loss_scale)
        want.append(reference.scale.item())
    assert len(set(want)) == 4
    return seen == want


def dtype_of(plugin: str, options: dict[str, Any]) -> str:
    model, *_ = boosted(plugin, options)
    return str(next(model.parameters()).dtype)


def clipped(plugin: str, options: dict[str, Any]) -> bool:
    """With lr=1 and SGD the norm of the step is the largest one allowed."""
    model, engine, *_ = backward(plugin, options)
    before = [param.detach().clone() for param in model.parameters()]
    engine.step()
    squares = [(param.detach() - old).square().sum() for param, old in zip(model.parameters(), before, strict=True)]
    return bool(torch.stack(squares).sum().sqrt().sub(1e-3).abs() < 1e-6)


def num_gradient_collectives(plugin: str, options: dict[str, Any], **kwargs: Any) -> int:
    *_, counter = backward(plugin, options, **kwargs)
    return counter.total


def averages_rounded(plugin: str, options: dict[str, Any]) -> bool:
    """Sent in bfloat16, averages are those of the rounded halves, not those in float32."""
    _, engine, *_ = backward(plugin, options)
    averages = torch.cat(list(engine._reducer.grads.values()))
    return torch.equal(averages, averages.bfloat16().float())


def sent_during_backward(plugin: str, options: dict[str, Any]) -> bool:
    """Whether a bucket is on its way before the first layer has its gradient."""
    model, engine, booster = boosted(plugin, options)
    counter, seen = CollectiveCounter(), []
    first = next(model.parameters())
    first.register_hook(lambda _: seen.append(counter.total))
    with counter:
        booster.backward(loss_of(model), engine)
    return seen[0] > 0


def gathers_later(plugin: str, options: dict[str, Any]) -> bool:
    """Whether weights are still on their way when the step returns; the next forward pass waits for them."""
    model, engine, *_ = backward(plugin, options)
    engine.step()
    waits = any(hasattr(param, "_all_gather_handle") for param in model.parameters())
    loss_of(model)
    return waits


def shards_kept(plugin: str, options: dict[str, Any]) -> float:
    """Kept averages by values of what has one: 1 at stage 0 and 1, about a half on two ranks at stage 2."""
    _, engine, *_ = backward(plugin, options)
    grads = engine._reducer.grads
    return round(sum(grad.numel() for grad in grads.values()) / sum(param.numel() for param in grads), 1)


def master_share(plugin: str, options: dict[str, Any]) -> float:
    _, engine, *_ = boosted(plugin, options)
    of = engine.masters.of
    return round(sum(master.numel() for master in of.values()) / sum(param.numel() for param in of), 1)


def master_dtype(plugin: str, options: dict[str, Any]) -> str:
    _, engine, *_ = boosted(plugin, options)
    return str(engine.parameters[0].dtype)


def master_devices(plugin: str, options: dict[str, Any]) -> list[str]:
    _, engine, *_ = boosted(plugin, options)
    return sorted({str(master.device) for master in engine.parameters})


def says_overflow(plugin: str, options: dict[str, Any]) -> list[str]:
    """What is logged of a skipped step."""
    model, engine, booster = boosted(plugin, {**options, "precision": "fp16", "initial_scale": 8.0})
    booster.backward(loss_of(model) * float("inf"), engine)
    with heard() as seen:
        engine.step()
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, [message for message in seen if "overflow" in message])
    return [message for messages in lists for message in messages]


def takes_float32(plugin: str, options: dict[str, Any]) -> bool:
    model, *_ = boosted(plugin, {**options, "precision": "bf16"})
    try:
        model(batch(torch.float32))
    except RuntimeError:
        return False
    return True


def group_sizes(plugin: str, options: dict[str, Any]) -> list[int]:
    _, engine, *_ = boosted(plugin, options)
    return [dist.get_world_size(group) for group in engine.config.zero_groups]


def buffers_kept(plugin: str, options: dict[str, Any]) -> bool:
    """Whether rank 1 keeps its own buffer."""
    model, *_ = boosted(plugin, options, block=True)
    return dist.get_rank() == 0 or bool(model.unwrap().offset.eq(1.0).all())


def hybrid_buffers_kept(plugin: str, options: dict[str, Any]) -> bool:
    model = models.llama()
    model.model.register_buffer("mark", torch.full((2,), float(dist.get_rank())))
    booster = Booster(plugin=HybridParallelPlugin(**options))
    model, *_ = booster.boost(model, torch.optim.SGD(model.parameters(), lr=1.0))
    return bool(model.unwrap().model.mark.eq(float(dist.get_rank())).all())


def unused_are_left_alone(plugin: str, options: dict[str, Any], *, block: bool = False) -> bool:
    """A layer without gradients does not disturb two steps in a row, as it does torch's reducer if not asked for."""
    model, engine, booster = boosted(plugin, options, block=block)
    for _ in range(2):
        booster.backward(loss_of(model), engine)
        engine.step()
        engine.zero_grad()
    return True


def ddp_attribute(name: str) -> Callable[..., Any]:
    def read(plugin: str, options: dict[str, Any]) -> Any:
        model, *_ = boosted(plugin, options)
        assert isinstance(model.module, DistributedDataParallel)
        value = getattr(model.module, name)
        return int(value) if name == "bucket_bytes_cap" else value

    return read


def on_plugin(read: Callable[[Any], Any]) -> Callable[..., Any]:
    """An observer of what ColossalAI's own code reads of the plugin."""

    def observe(plugin: str, options: dict[str, Any]) -> Any:
        return read(PLUGINS[plugin](**options))

    return observe


def on_model(read: Callable[[Any], Any]) -> Callable[..., Any]:
    def observe(plugin: str, options: dict[str, Any]) -> Any:
        model, *_ = boosted(plugin, options)
        return read(model)

    return observe


def kernels(plugin: str, options: dict[str, Any]) -> str:
    """Whether a kernel that this machine lacks is switched off, and said to be, on rank 0."""
    with heard() as seen:
        made = PLUGINS[plugin](**options)
    (name,) = options.keys() - HYBRID.keys()
    assert any(name in message for message in seen)
    return "on" if getattr(made, name) or getattr(made.shard_config, name) else "switched off"


class MarkingPolicy(LlamaForCausalLMPolicy):
    """ColossalAI's policy that leaves a mark on the model."""

    def postprocess(self) -> Any:
        self.model.marked = True
        return super().postprocess()


def pipeline_losses(plugin: str, options: dict[str, Any], layers: int = 4) -> list[float]:
    """Losses of four steps over pipeline stages, on every rank."""
    model = models.llama(layers=layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    booster = Booster(plugin=HybridParallelPlugin(**options))
    model, engine, criterion, *_ = booster.boost(model, optimizer, lambda outputs, _: outputs.loss)
    losses = []
    for step in range(4):
        tokens = models.tokens(step)
        data = iter([{"input_ids": tokens, "labels": tokens}])
        loss = booster.execute_pipeline(data, model, criterion, engine, return_loss=True)["loss"]
        engine.step()
        engine.zero_grad()
        value = torch.zeros(()) if loss is None else loss.detach().float()
        dist.all_reduce(value)
        losses.append(value.item())
    return losses


def plain_losses(layers: int = 4) -> list[float]:
    """The same on one process."""
    model = models.llama(layers=layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(4):
        loss = models.loss(model, models.tokens(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logged(plugin: str, options: dict[str, Any]) -> list[str]:
    """What is said of arguments without effect when the plugin is made."""
    with heard() as seen:
        PLUGINS[plugin](**options)
    return [message for message in seen if "without effect" in message]


def refused(plugin: str, options: dict[str, Any]) -> str:
    """The error of the constructor, or of boosting a block optimizer under torch's DDP."""
    try:
        PLUGINS[plugin](**options)
        if plugin == "ddp":
            boosted(plugin, options, block=True)
    except (ValueError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


LAYERS = GradientCheckpointConfig(gradient_checkpointing_ratio=0.5)
STAGES = {**HYBRID, "pp_size": 2, "num_microbatches": 2}
Z: dict[str, Any] = {"precision": "fp32"}
SMALL: dict[str, Any] = {**HYBRID, "zero_bucket_size_in_m": 0}
ZERO_SCALED: Any = [(scaled, {}, True)]
HYBRID_SCALED: Any = [(scaled, HYBRID, True)]
RING: dict[str, Any] = {**HYBRID, "tp_size": 2, "enable_sequence_parallelism": True}
SEQUENCE: Any = [
    (
        on_plugin(lambda p: (p.shard_config.enable_sequence_parallelism, p.sequence_parallelism_mode)),
        {**RING, "sequence_parallelism_mode": "split_gather"},
        (True, "split_gather"),
    )
]
KERNELS = ("enable_all_optimization", "enable_fused_normalization", "enable_flash_attention", "enable_jit_fused")
"""What a machine without an accelerator lacks; elsewhere it is ColossalAI's."""

EFFECTS: dict[str, dict[str, list[tuple[Callable[..., Any], dict[str, Any], Any]]]] = {
    "zero": {
        "stage": [(shards_kept, {**Z, "stage": 1}, 1.0), (shards_kept, {**Z, "stage": 2}, 0.5)],
        "precision": [(dtype_of, {"precision": kind}, f"torch.{dtype}") for kind, dtype in (
            ("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16"))],
        **dict.fromkeys(SCALING, ZERO_SCALED),
        "max_norm": [(clipped, {**Z, "max_norm": 1e-3}, True)],
        "reduce_bucket_size_in_m": [
            (num_gradient_collectives, Z, 1), (num_gradient_collectives, {**Z, "reduce_bucket_size_in_m": 0}, 6)],
        "communication_dtype": [
            (averages_rounded, Z, False), (averages_rounded, {**Z, "communication_dtype": torch.bfloat16}, True)],
        "overlap_communication": [
            (sent_during_backward, {**Z, "reduce_bucket_size_in_m": 0, "overlap_communication": False}, False),
            # The unused layer is in the first bucket, so that the others wait for the end.
            (on_plugin(lambda plugin: plugin._config().overlap_communication), Z, True)],
        "overlap_allgather": [(gathers_later, Z, False), (gathers_later, {**Z, "overlap_allgather": True}, True)],
        "cpu_offload": [(master_devices, {**Z, "cpu_offload": True}, ["cpu"])],
        "master_weights": [(master_dtype, {"precision": "bf16"}, "torch.float32"),
                           (master_dtype, {"precision": "bf16", "master_weights": False}, "torch.bfloat16")],
        "verbose": [(says_overflow, {}, []),
                    (says_overflow, {"verbose": True}, ["overflow: this step is skipped, the loss scale is now 8"])],
        "cast_inputs": [(takes_float32, {}, True), (takes_float32, {"cast_inputs": False}, False)],
        "extra_dp_size": [(group_sizes, Z, [2]), (group_sizes, {**Z, "extra_dp_size": 2}, [2, 1])],
    },
    "hybrid": {
        "tp_size": [(on_model(lambda model: tuple(model.unwrap().model.layers[0].mlp.up_proj.weight.shape)),
                     {**HYBRID, "tp_size": 2}, (48, 64))],
        "pp_size": [(pipeline_losses, STAGES, plain_losses)],
        "num_microbatches": [(on_plugin(lambda p: p.scheduler.num_microbatches), STAGES, 2)],
        "microbatch_size": [(pipeline_losses, {**HYBRID, "pp_size": 2, "microbatch_size": 1}, plain_losses)],
        "pp_style": [(pipeline_losses, {**STAGES, "pp_style": "interleaved", "num_model_chunks": 2}, plain_losses)],
        "num_model_chunks": [(on_plugin(lambda p: p.stage_manager.num_model_chunks),
                              {**STAGES, "pp_style": "interleaved", "num_model_chunks": 2}, 2)],
        "num_layers_per_stage": [(pipeline_losses, {**STAGES, "num_layers_per_stage": [1, 3]}, plain_losses)],
        "enable_metadata_cache": [(on_plugin(lambda p: p.scheduler.enable_metadata_cache),
                                   {**STAGES, "enable_metadata_cache": False}, False)],
        "overlap_p2p": [(on_plugin(lambda p: p.scheduler.overlap_p2p),
                         {**STAGES, "pp_style": "interleaved", "num_model_chunks": 2}, False)],
        "sp_size": [(on_plugin(lambda p: dist.get_world_size(p.sp_group)),
                     {**HYBRID, "enable_sequence_parallelism": True, "sequence_parallelism_mode": "all_to_all",
                      "sp_size": 2}, 2)],
        **dict.fromkeys(("enable_sequence_parallelism", "sequence_parallelism_mode"), SEQUENCE),
        "precision": [(dtype_of, {**HYBRID, "precision": "bf16"}, "torch.bfloat16")],
        "zero_stage": [(master_share, {**HYBRID, "zero_stage": 0}, 1.0),
                       (master_share, {**HYBRID, "zero_stage": 1}, 0.5),
                       (shards_kept, {**HYBRID, "zero_stage": 2}, 0.5)],
        **{name: [(kernels, {**HYBRID, name: True}, "switched off")] for name in KERNELS},
        "parallel_output": [(on_plugin(lambda p: p.shard_config.parallel_output),
                             {**HYBRID, "tp_size": 2, "parallel_output": False}, False)],
        **dict.fromkeys(SCALING, HYBRID_SCALED),
        "max_norm": [(clipped, {**HYBRID, "max_norm": 1e-3}, True)],
        "broadcast_buffers": [(hybrid_buffers_kept, {**HYBRID, "broadcast_buffers": False}, True)],
        "ddp_bucket_cap_mb": [(num_gradient_collectives, HYBRID, 1),
                              (num_gradient_collectives, {**HYBRID, "ddp_bucket_cap_mb": 0}, 21)],
        "find_unused_parameters": [(unused_are_left_alone, {**HYBRID, "find_unused_parameters": True}, True)],
        "zero_bucket_size_in_m": [(num_gradient_collectives, {**HYBRID, "zero_stage": 1}, 1),
                                  (num_gradient_collectives, {**SMALL, "zero_stage": 1}, 21)],
        "cpu_offload": [(master_devices, {**HYBRID, "zero_stage": 1, "cpu_offload": True}, ["cpu"])],
        "communication_dtype": [(averages_rounded, {**HYBRID, "communication_dtype": torch.bfloat16}, True)],
        "overlap_communication": [
            (sent_during_backward, {**HYBRID, "ddp_bucket_cap_mb": 0}, True),
            (sent_during_backward, {**HYBRID, "ddp_bucket_cap_mb": 0, "overlap_communication": False}, False)],
        "overlap_allgather": [(gathers_later, {**HYBRID, "zero_stage": 1, "overlap_allgather": True}, True)],
        "custom_policy": [(on_model(lambda model: model.unwrap().marked),
                           lambda: {**HYBRID, "tp_size": 2, "custom_policy": MarkingPolicy()}, True)],
        "gradient_checkpoint_config": [(on_plugin(lambda p: p.shard_config.gradient_checkpoint_config is LAYERS),
                                        {**HYBRID, "gradient_checkpoint_config": LAYERS}, True)],
        "make_vocab_size_divisible_by": [
            (on_model(lambda model: model.unwrap().lm_head.weight.shape[0]),
             {**HYBRID, "tp_size": 2, "make_vocab_size_divisible_by": 100}, 200)],
        "dp_outside": [(on_plugin(lambda p: (p.dp_axis, p.pp_axis)), {**HYBRID, "dp_outside": False}, (1, 0))],
    },
    "ddp": {
        "broadcast_buffers": [(ddp_attribute("broadcast_buffers"), {"broadcast_buffers": False}, False),
                              (buffers_kept, {"broadcast_buffers": False}, True)],
        "bucket_cap_mb": [(ddp_attribute("bucket_bytes_cap"), {"bucket_cap_mb": 2}, 2 * 2**20)],
        "find_unused_parameters": [(unused_are_left_alone, {"find_unused_parameters": True}, True)],
        "check_reduction": [(on_plugin(lambda p: p.ddp_kwargs["check_reduction"]), {"check_reduction": True}, True)],
        "gradient_as_bucket_view": [
            (ddp_attribute("gradient_as_bucket_view"), {"gradient_as_bucket_view": True}, True)],
        "static_graph": [(ddp_attribute("static_graph"), {"static_graph": True}, True)],
    },
}  # fmt: skip
"""Plugin -> argument -> observers with the plugin's options and what they must see."""

ZERO_BUBBLE = {**STAGES, "pp_style": "zbv", "num_model_chunks": 2, "scheduler_nodes": []}

REFUSALS: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "zero": {
        "norm_type": ({"norm_type": 1.0}, "AssertionError: .*norm_type=2"),
        "fp8_communication": ({"fp8_communication": True}, "ValueError: fp8_communication=True"),
        "use_fp8": ({"use_fp8": True}, "ValueError: use_fp8=True"),
    },
    "hybrid": {
        "fp8_communication": ({**HYBRID, "fp8_communication": True}, "ValueError: fp8_communication=True"),
        "use_fp8": ({**HYBRID, "use_fp8": True}, "ValueError: use_fp8=True"),
        "pp_style": (ZERO_BUBBLE, "ValueError: pp_style='zbv'"),
        "scheduler_nodes": (ZERO_BUBBLE, "ValueError: pp_style='zbv'"),
        "sequence_parallelism_mode": (
            {**RING, "sequence_parallelism_mode": "ring"}, "ValueError: sequence_parallelism_mode='ring'"),
        "inner_ring_size": (
            {**RING, "sequence_parallelism_mode": "ring_attn", "inner_ring_size": 2},
            "ValueError: sequence_parallelism_mode='ring_attn'"),
        "overlap_allgather": (
            {**HYBRID, "tp_size": 2, "overlap_allgather": True}, "ValueError: overlap_allgather=True"),
        **{name: ({**HYBRID, name: True}, rf"ValueError: HybridParallelPlugin\({name}=True\) at zero_stage=0")
           for name in ("static_graph", "check_reduction", "gradient_as_bucket_view")},
    },
    "ddp": {
        name: ({name: True}, rf"ValueError: .*{name}=True")
        for name in ("static_graph", "check_reduction", "gradient_as_bucket_view", "fp8_communication")
    },
}  # fmt: skip
"""Plugin -> argument -> options that are refused, and the message."""

SAID: list[tuple[str, dict[str, Any], list[str]]] = [
    ("zero", {"precision": "bf16", "initial_scale": 2.0, "stage": 1}, [
        "LowLevelZeroPlugin: initial_scale (with precision='bf16') without effect"]),
    ("zero", {"precision": "bf16"}, []),
    ("hybrid", {**HYBRID, "zero_stage": 1, "static_graph": True, "num_microbatches": 4}, [
        "HybridParallelPlugin: num_microbatches (with pp_size=1), static_graph (with zero_stage=1) without effect"]),
    ("hybrid", {**HYBRID, "zero_bucket_size_in_m": 3, "inner_ring_size": 2}, [
        "HybridParallelPlugin: inner_ring_size (with sequence_parallelism_mode=None), zero_bucket_size_in_m (with "
        "zero_stage=0) without effect"]),
]  # fmt: skip


def everything() -> dict[str, Any]:
    """Observers that did not see what they must; errors of refusals; what was said: by plugin and argument."""
    seen: dict[str, Any] = {"effects": {}, "refusals": {}, "said": []}
    known: dict[int, Any] = {}
    want_plain = plain_losses()
    for plugin, arguments in EFFECTS.items():
        for argument, rows in arguments.items():
            for number, (observe, options, want) in enumerate(rows):
                key = id(rows) * 8 + number
                if key not in known:
                    given = options() if callable(options) else dict(options)
                    known[key] = observe(plugin, given)
                got = known[key]
                if want is plain_losses:
                    # Micro-batches change the order of sums of about 100 values near 5 in float32.
                    right = all(abs(a - b) < 5e-6 for a, b in zip(got, want_plain, strict=True))
                else:
                    right = got == want
                if not right:
                    seen["effects"][plugin, argument, number] = got
    for plugin, refusals in REFUSALS.items():
        for argument, (options, _) in refusals.items():
            seen["refusals"][plugin, argument] = refused(plugin, options)
    seen["said"] = [logged(plugin, options) for plugin, options, _ in SAID]
    return seen
