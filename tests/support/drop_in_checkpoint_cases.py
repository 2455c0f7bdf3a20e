"""What code written for ColossalAI asserts of saved and loaded runs; run on ranks."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import models
import torch
import torch.distributed as dist
from colossalai.booster import Booster
from colossalai.testing import check_state_dict_equal
from colossalai.zero import LowLevelZeroOptimizer as StockLowLevelZeroOptimizer
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification

from colossal_bcd import AdamW
from colossal_bcd.booster import HybridParallelPlugin, LowLevelZeroPlugin


class Convolutions(nn.Module):
    """Running statistics of batches, which are no parameters, and a bias of which most ranks have nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.norm = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.last = nn.Linear(5, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(images))).mean((2, 3)))


def bert() -> nn.Module:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(
        BertConfig(**sizes, vocab_size=256, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )


def loss_of(model: Any, step: int) -> Tensor:
    index = 10 * step + dist.get_rank()
    names = {type(module).__name__ for module in model.modules()}
    if "Convolutions" in names:  # the same on every rank, or running statistics would differ
        return model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))).float().square().mean()
    tokens = models.tokens(index)
    if "BertForSequenceClassification" in names:
        return model(input_ids=tokens, labels=tokens[:, 0] % 2).loss
    return model(input_ids=tokens, labels=tokens).loss


def adam(model: nn.Module) -> Any:
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def ours(model: nn.Module) -> Any:
    return AdamW(model.parameters(), lr=1e-3)


ZERO: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], dict[str, Any], bool]] = {
    "convolutions fp16": (Convolutions, adam, {"stage": 2, "precision": "fp16"}, True),
    "convolutions offload": (Convolutions, adam, {"stage": 2, "precision": "fp16", "cpu_offload": True}, False),
    "bert bf16": (bert, adam, {"stage": 1, "precision": "bf16"}, True),
    "bert low precision masters": (bert, ours, {"stage": 2, "precision": "bf16", "master_weights": False}, False),
    "gpt2 of this package": (models.gpt2, ours, {"stage": 1, "precision": "fp32", "overlap_allgather": True}, True),
}
"""Case -> model, optimizer, options of LowLevelZeroPlugin, and whether files are in shards."""

HYBRID: dict[str, tuple[dict[str, Any], bool]] = {
    "zero1": ({"pp_size": 1, "zero_stage": 1, "precision": "fp16", "initial_scale": 1}, True),
    "zero0": ({"pp_size": 1, "zero_stage": 0, "precision": "bf16"}, False),
    "pipeline": (
        {"pp_size": 2, "zero_stage": 1, "precision": "fp16", "initial_scale": 1, "num_microbatches": 2},
        True,
    ),
    "tensors": ({"pp_size": 1, "tp_size": 2, "zero_stage": 1, "precision": "fp32"}, False),
}
"""Case -> options of HybridParallelPlugin, and whether files are in shards."""


@contextlib.contextmanager
def folder() -> Iterator[str]:
    """One for all ranks."""
    with tempfile.TemporaryDirectory() if dist.get_rank() == 0 else contextlib.nullcontext() as mine:
        name = [mine]
        dist.broadcast_object_list(name)
        assert name[0] is not None
        yield name[0]
        dist.barrier()


def masters_are_the_weights(model: Any, wrapper: Any) -> None:
    """Each master is this rank's slice of the padded weight, found as user code finds it."""
    assert isinstance(wrapper, StockLowLevelZeroOptimizer)
    weights = {id(param) for param in model.parameters()}
    assert wrapper.working_to_master_param
    for key, master in wrapper.working_to_master_param.items():
        assert key in weights
        weight = wrapper.master_to_working_param[id(master)]
        padded = nn.functional.pad(weight.data.view(-1), (0, wrapper.get_param_padding_size(weight)))
        slices = padded.chunk(dist.get_world_size())
        assert torch.equal(slices[dist.get_rank()], master.data.view(-1).to(padded.dtype))


def resumes(model: Any, wrapper: Any, again: Any, other: Any, run: Callable[[Any, Any, int], None]) -> None:
    """Whether what was loaded is what was saved, and takes the next two steps alike, bit by bit."""
    check_state_dict_equal(wrapper.optim.state_dict(), other.optim.state_dict())
    for step in (2, 3):
        for each, optimizer in ((model, wrapper), (again, other)):
            run(each, optimizer, step)
            optimizer.step()
            optimizer.zero_grad()
            optimizer.wait_for_weights()
    assert_close(dict(again.unwrap().named_parameters()), dict(model.unwrap().named_parameters()), rtol=0, atol=0)


def zero(case: str) -> None:
    """Saved with gradients of a finished pass waiting: they count in the run that goes on, and are in no file."""
    make, optimizer_of, options, shard = ZERO[case]
    booster = Booster(plugin=LowLevelZeroPlugin(max_norm=1.0, initial_scale=32, **options))

    def boosted() -> tuple[Any, Any]:
        model = make()
        model, wrapper, *_ = booster.boost(model, optimizer_of(model))
        return model, wrapper

    def run(model: Any, wrapper: Any, step: int) -> None:
        booster.backward(loss_of(model, step), wrapper)

    model, wrapper = boosted()
    run(model, wrapper, 0)
    wrapper.step()
    wrapper.zero_grad()
    run(model, wrapper, 1)
    waiting = [wrapper.get_param_grad(param) for param in wrapper.working_to_master_map]
    with folder() as path:
        booster.save_model(model, f"{path}/model", shard=shard)
        booster.save_optimizer(wrapper, f"{path}/optimizer", shard=shard, size_per_shard=1)
        dist.barrier()
        after = [wrapper.get_param_grad(param) for param in wrapper.working_to_master_map]
        assert_close(after, waiting, rtol=0, atol=0)
        again, other = boosted()
        booster.load_model(again, f"{path}/model")
        check_state_dict_equal(model.state_dict(), again.state_dict())
        booster.load_optimizer(other, f"{path}/optimizer")
        masters_are_the_weights(again, other)
        wrapper.zero_grad()
    resumes(model, wrapper, again, other, run)


def hybrid(case: str) -> None:
    options, shard = HYBRID[case]
    booster = Booster(plugin=HybridParallelPlugin(**{"tp_size": 1, **options}))

    def boosted() -> tuple[Any, Any]:
        model = models.llama()
        model, wrapper, *_ = booster.boost(model, adam(model))
        return model, wrapper

    def run(model: Any, wrapper: Any, step: int) -> None:
        if booster.plugin.stage_manager is None:
            booster.backward(loss_of(model, step), wrapper)
            return
        tokens = models.tokens(step)
        batch = iter([{"input_ids": tokens, "labels": tokens}])
        booster.execute_pipeline(batch, model, lambda outputs, _: outputs.loss, wrapper, return_loss=True)

    model, wrapper = boosted()
    run(model, wrapper, 0)
    wrapper.step()
    wrapper.zero_grad()
    with folder() as path:
        booster.save_model(model, f"{path}/model", shard=shard, size_per_shard=1)
        booster.save_optimizer(wrapper, f"{path}/optimizer", shard=shard, size_per_shard=1)
        dist.barrier()
        again, other = boosted()
        booster.load_model(again, f"{path}/model")
        check_state_dict_equal(model.unwrap().state_dict(), again.unwrap().state_dict())
        booster.load_optimizer(other, f"{path}/optimizer")
    resumes(model, wrapper, again, other, run)


def adapters(precision: str, offload: bool) -> None:
    """Adapters and optimizer saved, and loaded around a model whose optimizer was made before them."""
    from peft import LoraConfig

    lora = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    options: dict[str, Any] = {"stage": 2, "max_norm": 1.0, "initial_scale": 32, "precision": precision}
    first, second = (Booster(plugin=LowLevelZeroPlugin(cpu_offload=offload, **options)) for _ in range(2))
    model: Any = models.llama()
    optimizer = adam(model)
    again = copy.deepcopy(model)
    other: Any = adam(again)
    model, wrapper, *_ = first.boost(first.enable_lora(model, lora_config=lora), optimizer)

    def run(model: Any, wrapper: Any, step: int) -> None:
        first.backward(loss_of(model, step), wrapper)

    run(model, wrapper, 0)
    wrapper.step()
    wrapper.zero_grad()
    with folder() as path:
        first.save_lora_as_pretrained(model, f"{path}/model")
        first.save_optimizer(wrapper, f"{path}/optimizer", shard=False)
        dist.barrier()
        again = second.enable_lora(again, pretrained_dir=f"{path}/model", lora_config=lora)
        again, other, *_ = second.boost(again, other)
        check_state_dict_equal(model.state_dict(), again.state_dict())
        masters_are_the_weights(again, other)
        second.load_optimizer(other, f"{path}/optimizer")
    resumes(model, wrapper, again, other, run)


def everything() -> bool:
    """All cases; the first that fails raises with its name."""
    cases: list[tuple[Callable[..., None], tuple[Any, ...]]] = [(zero, (case,)) for case in ZERO]
    if dist.get_world_size() == 2:
        cases += [(hybrid, (case,)) for case in HYBRID]
        cases += [(adapters, ("fp16", True)), (adapters, ("bf16", False))]
    for case, arguments in cases:
        try:
            case(*arguments)
        except Exception as error:
            error.add_note(f"{case.__name__} {arguments}")
            raise
    return True
