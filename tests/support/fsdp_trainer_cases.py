"""What ranks run in test_fsdp_trainers.py: accelerate and Hugging Face's Trainer on sharded weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import models
import replica_trainer_cases
import test_trainer
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from replica_trainer_cases import launched
from test_trainer import ACCUMULATION, BLOCKS, STEPS, UNSAFE, dataset, decaying
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import Trainer, TrainingArguments

from colossal_bcd import CAME, AdamW, BlockOptimizer, BlockOptimizerRatio, fsdp
from colossal_bcd.compat import BAdamCallback, block_optimizer, enable_accelerate
from support.errors import largest_error

PERIOD, LAYERS, MAX_NORM = 2, 3, 0.05
ACCUMULATE = 2
Make = Callable[..., torch.optim.Optimizer]


def blocks(base: Any, **options: Any) -> Make:
    def make(model: nn.Module, micro: int = ACCUMULATE) -> BlockOptimizer:
        if "sgd_mode" in options:
            options["accumulation_steps"] = micro
        return BlockOptimizer(
            base(model.parameters()), model.named_parameters(), switch_block_every=PERIOD, switch_mode="random", seed=1,
            verbose=0, **options,
        )  # fmt: skip

    return make


MADE: dict[str, Make] = {
    "blocks": blocks(lambda params: AdamW(params, lr=1e-2, weight_decay=0.1)),
    "torch's": blocks(lambda params: torch.optim.AdamW(params, lr=1e-2), include_embedding=True, include_lm_head=True),
    "came blocks": blocks(lambda params: CAME(params, lr=1e-3), active_modules=["lm_head."]),
    "corrected": blocks(lambda params: torch.optim.SGD(params, lr=0.05), sgd_mode="all"),
    "came": lambda model, micro=ACCUMULATE: CAME(model.parameters(), lr=1e-3),
}


def fresh(**options: Any) -> Accelerator:
    """An accelerator that shards, after others in the same process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    options = {"auto_wrap_policy": "transformer_based_wrap", **options}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **options)
    return Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE, fsdp_plugin=plugin)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """As the model's own, which is in float32."""
    logits = model(input_ids=tokens).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def whole(param: Tensor) -> Tensor:
    return (param.full_tensor() if hasattr(param, "full_tensor") else param).detach()


def weights(model: nn.Module) -> dict[str, Tensor]:
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return {name.replace("_checkpoint_wrapped_module.", ""): whole(param) for name, param in model.named_parameters()}


def advance(accelerator: Accelerator, model: nn.Module, optimizer: Any, steps: range) -> list[float]:
    """A loop as accelerate's documentation has it; norms before clipping."""
    rank, norms = dist.get_rank(), []
    for step in steps:
        for micro in range(ACCUMULATE):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, models.tokens(100 * step + rank * ACCUMULATE + micro, vocab=250)))
                if accelerator.sync_gradients:
                    norms.append(float(whole(accelerator.clip_grad_norm_(model.parameters(), MAX_NORM))))
                optimizer.step()
                optimizer.zero_grad()
    return norms


def accelerated(name: str, folder: str, dtype: torch.dtype = torch.float64, **options: Any) -> dict[str, Any]:
    """Weights after eight steps, and of another run that goes on from the fifth."""

    def prepared(seed: int) -> tuple[Any, Any, Any]:
        accelerator = fresh(**options)
        model: Any = models.llama(vocab=250, layers=LAYERS, seed=seed).to(dtype)
        return accelerator, *accelerator.prepare(model, MADE[name](model))

    accelerator, model, optimizer = prepared(0)
    norms = advance(accelerator, model, optimizer, range(5))
    accelerator.save_state(folder)
    norms += advance(accelerator, model, optimizer, range(5, 8))
    found = {"weights": weights(model), "norms": norms}
    accelerator, model, optimizer = prepared(9)
    accelerator.load_state(folder)
    advance(accelerator, model, optimizer, range(5, 8))
    return {**found, "again": weights(model)}


def one_process(name: str, ranks: int) -> dict[str, Any]:
    model: Any = models.llama(vocab=250, layers=LAYERS).to(torch.float64)
    optimizer, norms = MADE[name](model, micro=1), []
    for step in range(8):
        batches = [models.tokens(100 * step + number, vocab=250) for number in range(ranks * ACCUMULATE)]
        # In one pass, as corrections of the first of several wait in bfloat16 on one process.
        loss_of(model, torch.cat(batches)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": weights(model), "norms": norms}


CASES: dict[str, dict[str, Any]] = {
    "blocks": {"name": "blocks"},
    "layers of torch's AdamW": {"name": "torch's", "activation_checkpointing": True},
    "blocks of CAME": {"name": "came blocks", "cpu_ram_efficient_loading": True},
    "corrected": {"name": "corrected", "state_dict_type": "FULL_STATE_DICT"},
    "CAME": {"name": "came"},
    "bfloat16": {"name": "blocks", "dtype": torch.bfloat16},
}


def many_accelerated(folder: str) -> dict[str, Any]:
    enable_accelerate()
    launched()
    return {name: accelerated(folder=f"{folder}/{index}", **case) for index, (name, case) in enumerate(CASES.items())}


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was raised")


def refused() -> dict[str, str]:
    """What cannot be prepared, and what may be: a model that was sharded and attached before."""
    enable_accelerate()
    launched()
    # accelerate does not find the classes of layers once they are sharded.
    accelerator, model = (
        fresh(auto_wrap_policy="no_wrap"),
        fsdp.shard(models.llama(vocab=250, layers=LAYERS).to(torch.float64)),
    )
    optimizer: Any = MADE["blocks"](model)
    fsdp.attach(model, optimizer)
    model, prepared = accelerator.prepare(model, optimizer)
    model, prepared = accelerator.prepare(model, prepared)
    advance(accelerator, model, prepared, range(3))
    assert optimizer.num_steps == 3
    wrong_call = refusal(lambda: accelerator.prepare(model, prepared, device_placement=[True]))
    assert "device_placement" in wrong_call
    assert prepared.optimizer is optimizer
    optimizer.param_groups[0]["params"] = list(optimizer.active_set.masters)
    found = {"pointed elsewhere": refusal(lambda: advance(accelerator, model, prepared, range(1)))}
    accelerator, model = fresh(), models.llama(vocab=250, layers=LAYERS).to(torch.float64)
    warming: Any = MADE["torch's"](model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(warming, lambda step: step / 4)  # at zero when it is prepared
    model, warmed, scheduler = accelerator.prepare(model, warming, scheduler)
    for step in range(3):
        advance(accelerator, model, warmed, range(step, step + 1))
        scheduler.step()
    assert warming.num_steps == 3
    accelerator, model = fresh(), models.llama(vocab=250)
    other = MADE["blocks"](model)
    ratio = BlockOptimizerRatio(list(model.parameters()), list(model.named_parameters()), 0.3, verbose=0)
    found |= {
        "apart": refusal(lambda: accelerator.prepare(other)),
        "ratio": refusal(lambda: accelerator.prepare(model, ratio)),
    }
    accelerator.scaler = object()
    found["scaler"] = refusal(lambda: accelerator.prepare(model, other))
    return found


class BlockTrainer(Trainer):
    """With FSDP the trainer takes no finished optimizer."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = test_trainer.block_optimizer(self.model)
        return self.optimizer


def trained(
    folder: str, dtype: torch.dtype, *, seed: int = 0, resume: bool = False, by_class: str = "", **options: Any
) -> dict[str, Tensor]:
    """Weights after a Trainer's steps; with `resume` from its fourth step on."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    model: Any = models.llama(seed=seed).to(dtype)
    arguments = TrainingArguments(
        **{
            "output_dir": folder, "max_steps": STEPS, "per_device_train_batch_size": 2, "use_cpu": True,
            "gradient_accumulation_steps": ACCUMULATION, "save_steps": 4, "logging_steps": 1, "report_to": [],
            "lr_scheduler_type": "linear", "warmup_steps": 2, "max_grad_norm": 0.5, "disable_tqdm": True,
            "fsdp": "full_shard auto_wrap", **UNSAFE,
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}, **options,
        }
    )  # fmt: skip
    make: dict[str, Any] = {"callbacks": [] if by_class == "came" else [BAdamCallback]}
    if by_class:
        blocks = block_optimizer, {"model": model, "base": decaying, "lr": 1e-2, "blocks": BLOCKS}
        make["optimizer_cls_and_kwargs"] = (CAME, {"lr": 1e-3}) if by_class == "came" else blocks
    trainer = (Trainer if by_class else BlockTrainer)(model, arguments, train_dataset=dataset(), **make)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-4" if resume else None)
    assert hasattr(model, "reshard")
    return weights(model)


TRAINED: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "checkpointing": {"dtype": torch.float32, "gradient_checkpointing": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "mixed": {"dtype": torch.bfloat16, "bf16": True},
    "came": {"dtype": torch.float32, "by_class": "came"},
    "factory": {"dtype": torch.float32, "by_class": "blocks"},
}


def trained_and_resumed(folder: str) -> dict[str, Any]:
    """Runs as a whole, and from their fifth step on with other weights at first; one on whole replicas by DDP."""
    launched()
    os.environ["FSDP_VERSION"] = "2"  # for transformers before 5
    message = refusal(lambda: trained(f"{folder}/refused", torch.float32))
    assert "FSDP" in message
    assert "enable_accelerate()" in message
    del os.environ["ACCELERATE_USE_FSDP"]
    found: dict[str, Any] = {"replicas": replica_trainer_cases.trained(f"{folder}/replicas", torch.float32)}
    enable_accelerate()
    for name, options in TRAINED.items():
        path = f"{folder}/{name}"
        found[name] = trained(path, **options), trained(path, seed=9, resume=True, **options)
    return found


def groups_changed() -> dict[str, Any]:
    """What an optimizer does whose parameters were replaced by DTensors, as accelerate does, before its first step."""

    def pointed(*params: Tensor, state: dict[str, Any] | None = None) -> CAME:
        old = nn.Parameter(torch.ones(5, 3, dtype=torch.float64))
        optimizer = CAME([old], lr=1e-2)
        if state is not None:
            optimizer.load_state_dict(state)
        optimizer.param_groups[0]["params"] = list(params or [old])
        return optimizer

    gradient = torch.arange(15, dtype=torch.float64).reshape(5, 3) - 7
    mesh = init_device_mesh("cpu", (2,))
    new, twice = (nn.Parameter(distribute_tensor(torch.ones_like(gradient), mesh, [Shard(0)])) for _ in range(2))
    whole, follows = pointed(), pointed(new)
    old = whole.param_groups[0]["params"][0]
    for step in range(1, 6):
        old.grad, new.grad = gradient * step, distribute_tensor(gradient * step, mesh, [Shard(0)])
        whole.step()
        follows.step()
    return {
        "followed": largest_error([new.full_tensor()], [old]),
        "twice": refusal(pointed(twice, twice).state_dict),
        "state of others": refusal(pointed(twice, state=whole.state_dict()).step),
    }
