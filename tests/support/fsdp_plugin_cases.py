"""What ranks run in test_fsdp_plugin.py: training under FSDP2Plugin, against a loop on one process."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes
import came_pytorch
import models
import plain_badam
import torch
import torch.distributed as dist
from bitsandbytes.optim import GlobalOptimManager
from colossalai.booster import Booster
from colossalai.interface import ModelWrapper
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from colossal_bcd import (
    CAME,
    Adafactor,
    BlockOptimizer,
    BlockOptimizerRatio,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreSGD,
    GoLoreAdamW,
    Lamb,
)
from colossal_bcd.booster import CheckpointFolder, FSDP2Plugin, LowLevelZeroPlugin, estimate, explain
from colossal_bcd.compat import ReLoRaModel
from colossal_bcd.fsdp.weights import WholeTensors
from colossal_bcd.testing import CollectiveCounter, live_bytes
from support.errors import largest_error

LAYERS, PERIOD, VOCAB, LR = 3, 2, 250, 1e-3
PREFIXES = tuple(f"model.layers.{layer}." for layer in range(LAYERS))
PROJECTED: Any = {"rank": 4, "update_proj_gap": 2, "clamp": True}
BASES: dict[str, Any] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "lamb": lambda params: Lamb(params, lr=LR, weight_decay=0.1),
    "came": lambda params: CAME(params, lr=LR, weight_decay=0.1),
    "original came": lambda params: came_pytorch.CAME(params, lr=LR, weight_decay=0.1),
    "adafactor": lambda params: Adafactor(params, lr=LR, relative_step=False, beta1=0.9, weight_decay=0.1),
    "galore": lambda params: GaLoreAdamW(params, lr=LR, **PROJECTED),
    "golore": lambda params: GoLoreAdamW(params, lr=LR, random_from_step=3, **PROJECTED),
    "galore sgd": lambda params: GaLoreSGD(params, lr=0.05, momentum=0.9, **PROJECTED),
    "galore adafactor": lambda params: GaLoreAdafactor(params, lr=LR, relative_step=False, beta1=0.9, **PROJECTED),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run; of blocks `PERIOD` steps for each of the turns."""

    dtype: torch.dtype = torch.float32
    base: str = "adamw"
    blocks: bool = True
    turns: int = 3
    accumulate: int = 1
    sync: bool = True
    """Whether each micro-batch is reduced, or the last one with all."""
    clip: float = 0.0
    """By `clip_grad_by_norm`; the plugin's own is in `options`."""
    data_ranks: int = 0
    """Ranks with other batches; 0: all."""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def plugin(self) -> dict[str, Any]:
        return {"precision": "bf16" if self.dtype == torch.bfloat16 else "fp32", **self.options}


class Run:
    """A boosted Llama; the optimizer was made before."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        # Weights of other ranks than the first are others: boosting copies.
        model = models.llama(vocab=VOCAB, layers=LAYERS, seed=seed if dist.get_rank() == 0 else 7)
        model = model.to(torch.float32 if case.dtype == torch.bfloat16 else case.dtype).train()
        if dist.get_rank() == 0 and case.dtype == torch.bfloat16:
            model = model.to(torch.bfloat16).to(torch.float32)
        optimizer = BASES[case.base](model.parameters())
        if case.blocks:
            named = list(model.named_parameters())
            options: dict[str, Any] = {"switch_block_every": PERIOD, "switch_mode": "random", "verbose": 0}
            optimizer = BlockOptimizer(optimizer, named, [[prefix] for prefix in PREFIXES], **options)
        self.scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        self.booster = Booster(plugin=FSDP2Plugin(**case.plugin))
        self.model, self.optimizer, _, _, self.scheduler = self.booster.boost(
            model, optimizer, lr_scheduler=self.scheduler
        )

    @property
    def data_rank(self) -> int:
        return dist.get_rank() // (dist.get_world_size() // self.data_size)

    @property
    def data_size(self) -> int:
        return self.case.data_ranks or dist.get_world_size()

    def step(self, number: int) -> list[float]:
        case, losses = self.case, []
        for micro in range(case.accumulate):
            waits = not case.sync and micro < case.accumulate - 1
            with self.booster.no_sync(self.model, self.optimizer) if waits else contextlib.nullcontext():
                loss = models.loss(self.model, batch(number, self.data_rank * case.accumulate + micro))
                self.booster.backward(loss / case.accumulate, self.optimizer)
                losses.append(loss.item())
        if case.clip:
            self.optimizer.clip_grad_by_norm(case.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return losses

    def weights(self) -> list[Tensor]:
        whole = WholeTensors(self.model.unwrap().state_dict())
        return [whole[name] for name, _ in self.model.unwrap().named_parameters()]


def batch(step: int, number: int) -> Tensor:
    return models.tokens(100 * step + number, vocab=VOCAB)


def errors(cases: dict[str, Case]) -> dict[str, Any]:
    """Of each case: whether losses and weights are equal bit for bit, and their largest differences."""
    return {name: _errors(case) for name, case in cases.items()}


def _errors(case: Case) -> dict[str, Any]:
    run = Run(case)
    order = [0]
    if case.blocks:
        order = [run.optimizer.optim.schedule.active(turn * PERIOD)[0] for turn in range(case.turns)]
    period = PERIOD if case.blocks else 2 * PERIOD
    losses = [run.step(step) for step in range(period * len(order))]
    got = run.weights()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, losses)
    if dist.get_rank() > 0:
        return {}
    every_rank = everyone[:: dist.get_world_size() // run.data_size]
    model: nn.Module = models.llama(vocab=VOCAB, layers=LAYERS).to(case.dtype).train()
    want = plain_badam.train(
        model,
        PREFIXES if case.blocks else ("",),
        order,
        period,
        lambda step: [batch(step, number) for number in range(run.data_size * case.accumulate)],
        BASES[case.base],
        models.loss,
        max_norm=case.clip or case.options.get("max_norm", 0.0),
        accumulate=case.accumulate,
    )
    weights = [param.detach() for param in model.parameters()]
    losses = [[loss for each in every_rank for loss in each[step]] for step in range(len(losses))]
    return {
        "equal": losses == want and all(map(torch.equal, got, weights)),
        "losses": largest_error(losses, want),
        "weights": largest_error(got, weights),
        "order": order,
    }


def message(act: Callable[[], Any]) -> str:
    """The error of what is refused."""
    try:
        act()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def everything(cases: dict[str, Case]) -> dict[str, Any]:
    """All that one start of two ranks tries."""
    return {
        "errors": errors(cases),
        "refused": refused(),
        "said": said(),
        "reduction": error_of_reduction(),
        "late": late(),
        "bytes": {dtype: bytes_by_moment(dtype) for dtype in (torch.bfloat16, torch.float32)},
        "table": explain(Run(Case(dtype=torch.bfloat16)).optimizer),
        "lora": lora(),
        "overrides": overrides(),
        "ratio": ratio(),
        "files": files(),
    }


def said() -> list[str]:
    """Lines at level INFO while a GaLore optimizer is boosted."""
    records: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger("colossal_bcd")
    handler.emit = records.append  # type: ignore[method-assign]
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        Run(Case(base="galore", blocks=False, options={"verbose": True}))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    return [record.getMessage() for record in records]


def error_of_reduction() -> float:
    """Largest difference that bfloat16 makes in a reduction of float32 gradients, as a share of the largest update."""
    updates = []
    for options in ({}, {"reduce_dtype": torch.bfloat16}):
        run = Run(Case(base="sgd", blocks=False, options=options))
        before = run.weights()
        run.step(0)
        updates.append([new - old for new, old in zip(run.weights(), before, strict=True)])
    largest = [update.abs().max() for update in updates[0]]
    return largest_error(*([each / most for each, most in zip(update, largest, strict=True)] for update in updates))


def refused() -> dict[str, str]:
    """What would train wrongly or have no effect, at construction and before anything is sent."""

    def boost(change: Callable[[Any], Any], optimizer: Any = None, **options: Any) -> str:
        model: Any = models.llama(vocab=VOCAB)
        model = change(model) or model
        made = torch.optim.AdamW(model.parameters()) if optimizer is None else optimizer(model)
        booster = Booster(plugin=FSDP2Plugin(**{"precision": "fp32", **options}))
        with CollectiveCounter() as counter:
            text = message(lambda: booster.boost(model, made))
        # The one exchange compares what ranks were given.
        assert counter.total <= 1
        return text

    found = {
        name: message(lambda options=options: FSDP2Plugin(**options))  # type: ignore[misc]
        for name, options in {
            "precision": {"precision": "fp16"},
            "max_norm": {"max_norm": -1},
            "reduce_dtype": {"reduce_dtype": torch.int32},
            "tp_size": {"tp_size": 0},
            "product": {"tp_size": 2, "replicate_size": 2},
            "tp_plan": {"tp_plan": {"a": "colwise"}},
            "reshard": {"reshard_after_forward": 2},
        }.items()
    }

    def part(model: Any) -> None:
        model.lm_head.to(torch.float64)

    def to_meta(model: Any) -> None:
        model.to("meta")

    nothing: Any = lambda model: None  # noqa: E731
    found["dtypes"] = boost(part)
    found["meta"] = boost(to_meta)
    found["checkpointing"] = boost(lambda model: nn.Linear(4, 4), gradient_checkpointing=True)
    found["plan"] = boost(lambda model: nn.Linear(4, 4), tp_size=2)
    found["plan name"] = boost(nothing, tp_size=2, tp_plan={"nowhere": "colwise"})
    found["plan style"] = boost(nothing, tp_size=2, tp_plan={"model.layers.*.mlp.up_proj": "diagonal"})
    found["heads"] = boost(lambda model: setattr(model.config, "num_key_value_heads", 3), tp_size=2)
    found["relora"] = boost(lambda model: ReLoRaModel(model, r=4, target_modules=["q_proj"]))
    found["whole"] = boost(nothing, lambda model: torch.optim.Adafactor(model.parameters()))
    wrapped = ModelWrapper(nn.Linear(4, 4))
    booster = Booster(plugin=FSDP2Plugin())
    found["wrapped"] = message(lambda: booster.boost(wrapped, torch.optim.SGD(wrapped.parameters())))
    return found


def late() -> dict[str, str]:
    """What comes after boosting."""
    run = Run(Case(blocks=False, base="lamb"))
    found = {
        "closure": message(lambda: run.optimizer.step(lambda: None)),
        "group": message(lambda: run.optimizer.add_param_group({"params": []})),
        "again": message(lambda: run.booster.boost(run.model, torch.optim.SGD(run.model.parameters()))),
        "p-norm": message(lambda: run.optimizer.clip_grad_by_norm(1.0, 1.0)),
    }
    model = models.llama(vocab=VOCAB)
    model.lm_head.weight.requires_grad_(False)
    booster = Booster(plugin=FSDP2Plugin())
    model, optimizer, *_ = booster.boost(model, torch.optim.AdamW(model.parameters()))
    model.unwrap().lm_head.weight.requires_grad_(True)
    booster.backward(models.loss(model, batch(0, 0)), optimizer)
    found["thawed"] = message(optimizer.step)
    with run.optimizer.no_sync():
        loss = models.loss(run.model, batch(0, 0))
        run.optimizer.backward(loss)
        found["inside no_sync"] = message(run.optimizer.step)
    found["kept back"] = message(lambda: run.optimizer.clip_grad_by_norm(1.0))
    return found


def bytes_by_moment(dtype: torch.dtype) -> dict[str, Any]:
    """Live bytes beyond what there was before the model, and the estimate of each moment."""
    before = live_bytes()
    run = Run(Case(dtype=dtype))
    run.step(0)
    guess = estimate(run.optimizer)
    found: dict[str, Any] = {"line": str(guess), "peak": guess.peak}

    def note(name: str, want: int) -> None:
        found[name] = live_bytes() - before, want

    note("between steps", guess.weights + guess.between_steps)
    one = torch.zeros(1, 1, dtype=torch.int64)
    first = (
        run.model.unwrap()
        .model.layers[1]
        .mlp.register_forward_pre_hook(
            lambda *_: note("forward", guess.weights + guess.between_steps + guess.gathered_in_forward)
        )
    )
    loss = models.loss(run.model, one.expand(1, 2))
    first.remove()
    group = next(group for group in run.optimizer.engine.groups if any(param.requires_grad for param in group.params))
    reached = group._note

    def measured() -> Any:
        here = reached()
        # Weights and gradients are whole; tensors that Python has not seen would not be found.
        found["gradients"] = len([each._unsharded_param.grad for each in group._group.fsdp_params])
        note("backward", guess.weights + guess.between_steps + guess.gathered_in_backward)
        return here

    group._note = measured
    run.optimizer.backward(loss)
    del loss, group._note
    note("after backward", guess.weights + guess.after_backward)
    run.optimizer.register_step_pre_hook(lambda *_: note("in step", guess.weights + guess.in_step - guess.temporaries))
    run.optimizer.step()
    return found


def shared_folder() -> str:
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    return folder[0]


def files() -> dict[str, Any]:
    """Files of a model in the middle of training, and what loading them leaves."""
    run, folder = Run(Case(dtype=torch.bfloat16)), shared_folder()
    for step in range(3):
        run.step(step)
    with torch.no_grad():  # the weights of the outermost group stay whole after it
        models.loss(run.model, batch(0, 0))
    run.booster.save_model(run.model, f"{folder}/model.pt")
    run.booster.save_model(run.model, f"{folder}/shards", shard=True, size_per_shard=0.1, use_safetensors=True)
    CheckpointFolder(f"{folder}/run").save(run.booster, run.model, run.optimizer, run.scheduler, step=3)
    dist.barrier()
    weights = run.weights()
    one = torch.load(f"{folder}/model.pt", weights_only=True)
    names = [name for name, _ in run.model.unwrap().named_parameters()]
    whole = [torch.equal(one[name], weight) for name, weight in zip(names, weights, strict=True)]
    read = dict(LlamaForCausalLM.from_pretrained(f"{folder}/shards", torch_dtype="auto").named_parameters())
    found = {"whole": all(whole), "transformers": all(map(torch.equal, [read[name] for name in names], weights))}
    losses = [run.step(step) for step in range(3, 6)]
    for path in (f"{folder}/shards", f"{folder}/model.pt"):
        run.step(9)
        run.booster.load_model(run.model, path)
        found[f"loaded {path[len(folder) :]}"] = all(map(torch.equal, run.weights(), weights))
        masters = run.optimizer.masters.of.items()
        found[f"masters {path[len(folder) :]}"] = all(
            torch.equal(master.bfloat16(), run.optimizer.masters.weight_of(param)) for param, master in masters
        )
    resumed = CheckpointFolder(f"{folder}/run").load(run.booster, run.model, run.optimizer, run.scheduler)
    assert resumed is not None
    found["resumed"] = [run.step(step) for step in range(3, 6)] == losses
    other = models.llama(vocab=VOCAB, layers=LAYERS + 1)
    if dist.get_rank() == 0:
        torch.save(dict(other.state_dict()), f"{folder}/other.pt")
    dist.barrier()
    found["other"] = message(lambda: run.booster.load_model(run.model, f"{folder}/other.pt"))
    return found


def lora() -> dict[str, Any]:
    """Adapters train, and what they adapt does not; they are saved as peft saves them."""
    plugin = FSDP2Plugin()
    booster, model = Booster(plugin=plugin), models.llama(vocab=VOCAB)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    model = booster.enable_lora(model, lora_config=config)
    model, optimizer, *_ = booster.boost(model, optimizer)
    inner = model.unwrap(unwrap_peft=False)
    start = dict(WholeTensors(inner.state_dict()))
    for step in range(3):
        booster.backward(models.loss(model, batch(step, dist.get_rank())), optimizer)
        optimizer.step()
        optimizer.zero_grad()
    end = dict(WholeTensors(inner.state_dict()))
    folder = shared_folder()
    booster.save_lora_as_pretrained(model, folder, use_safetensors=True)
    dist.barrier()
    saved = load_file(f"{folder}/adapter_model.safetensors")
    same = [torch.equal(value, end[name.replace(".weight", ".default.weight")]) for name, value in saved.items()]
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    return {
        "changed": {"lora_" in name for name in changed},
        "adapters": sum("lora_" in name for name in start),
        "saved": same,
        "quantized": message(lambda: plugin.enable_lora(models.llama(), lora_config=config, bnb_quantization_config=1)),
    }


def overrides() -> list[int]:
    """Bits of the moments of a weight that is overridden, and of another, under an optimizer made before boosting."""
    model = models.llama(vocab=VOCAB)
    manager = GlobalOptimManager.get_instance()
    manager.register_parameters(model.parameters())
    weights = [model.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.gate_proj.weight]
    manager.override_config(weights[0], "optim_bits", 32)
    optimizer = bitsandbytes.optim.Adam8bit(model.parameters(), lr=LR)
    names = dict(model.named_parameters())
    chosen = [next(name for name, param in names.items() if param is weight) for weight in weights]
    booster = Booster(plugin=FSDP2Plugin(precision="fp32"))
    model, optimizer, *_ = booster.boost(model, optimizer)
    booster.backward(models.loss(model, batch(0, dist.get_rank())), optimizer)
    optimizer.step()
    of = {optimizer.parameter_names[id(param)]: master for param, master in optimizer.masters.of.items()}
    return [8 * optimizer.optim.state[of[name]]["state1"].itemsize for name in chosen]


def ratio() -> float:
    """Largest difference of weights that BlockOptimizerRatio has trained under FSDP2 and under ZeRO."""
    weights = []
    for plugin in (FSDP2Plugin(precision="fp32"), LowLevelZeroPlugin(stage=1, precision="fp32")):
        model: Any = models.llama(vocab=VOCAB, layers=LAYERS).double()
        named = list(model.named_parameters())
        options: dict[str, Any] = {"switch_every": 2, "mask_mode": "scatter", "update_ratio": 0.3, "verbose": 0}
        optimizer: Any = BlockOptimizerRatio(model.parameters(), named, lr=LR, include_embedding=True, **options)
        booster = Booster(plugin=plugin)
        model, optimizer, *_ = booster.boost(model, optimizer)
        for step in range(5):
            booster.backward(models.loss(model, batch(step, dist.get_rank())), optimizer)
            optimizer.step()
            optimizer.zero_grad()
        whole = WholeTensors(model.unwrap().state_dict())
        weights.append([whole[name] for name, _ in named])
    return largest_error(*weights)
