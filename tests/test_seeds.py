"""Code of the documents whose systems this package replaces, run as it stands with only the import changed.

Open, because what they call is not in this version: DeepSpeed's ZeRO-3 (002).
Document 004 is in test_seeds_golore.py, the parameter-ratio form of 001 and 002 in test_seeds_ratio.py, the callback of
002 in test_trainer.py.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
import transformers
from colossalai.booster import Booster
from torch import nn

from colossal_bcd import BlockOptimizer, compat
from colossal_bcd.booster import LowLevelZeroPlugin
from colossal_bcd.testing import run_ranks

# Document 000 (README of BlockOptimizers), Usage, first block.
BREAD_BADAM = """
from block_optim import BlockOptimizer

optimizer = BlockOptimizer(
    base_optimizer=original_optimizer, # can be any torch.Optimizer
    named_parameters_list=list(model.named_parameters()), 
    switch_block_every=100, # optimize each block sub-problem by 100 steps
    switch_mode="random", # update order of blocks, one can choose "random" (random reshuffling update order), "ascending" (update from input layer to output layer), or "descending" (update from output layer to input layer). The default is "random".
)
"""  # noqa: E501, W291

# Document 000, On-the-fly SGD Based Correction, with "same arguments as BAdam" written out.
BREAD_SGD = """
optimizer = BlockOptimizer(
    base_optimizer=original_optimizer, named_parameters_list=list(model.named_parameters()), # same arguments as BAdam
    sgd_mode="all", # options: ["all", "partial", "disabled"]
    sgd_lr_scaling=5., # the learning rate scaling of SGD update. SGD usually uses larger lr than Adam.
    sgd_use_sign=False # if True, use signSGD update. SignSGD update usually converges faster than SGD when the model is not well trained, e.g. under the scenario of training from scratch.
)
"""  # noqa: E501

# Document 000, Low-rank Based Correction, cut where the user makes the base optimizer.
BREAD_PEFT = """
# NOTE: make sure that the model has been transformed into peft model with LoRA adapeters, as shown below
from peft import LoraConfig, TaskType, get_peft_model
peft_config = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)
model = get_peft_model(original_model, peft_config)
"""
BREAD_LORA = """
optimizer = BlockOptimizer(
    base_optimizer=original_optimizer, named_parameters_list=list(model.named_parameters()), # same arguments as BAdam
    lora_mode="all" # options: ["all", "partial"]
)
"""

# Document 001 (first README of BAdam), Quick Start, first block.
BADAM_ASCENDING = """
from block_optim import BlockOptimizer

# before training, add this line to wrap the original optimizer
optimizer = BlockOptimizer(
    base_optimizer=original_optimizer, # can be any torch.Optimizer
    named_parameters_list=list(model.named_parameters()), 
    switch_block_every=50, # switch to the new block every 50 updates
    switch_mode="ascending", # update order of blocks, "ascending" means update the input layers first
    verbose=2 # information level, will print trainable parameters when setting to 2
)
"""  # noqa: W291

# Document 001, Quick Start, second block.
BADAM_MATRICES = """
block_prefix_list = []
for i in range(31):
    layer_prefix = [
        [f"model.layers.{i}.self_attn.q_proj."],
        [f"model.layers.{i}.self_attn.k_proj."],
        [f"model.layers.{i}.self_attn.v_proj."],
        [f"model.layers.{i}.self_attn.o_proj."],
        [f"model.layers.{i}.mlp.gate_proj."],
        [f"model.layers.{i}.mlp.up_proj."],
        [f"model.layers.{i}.mlp.down_proj."],
    ]
    block_prefix_list.extend(layer_prefix)

optimizer = BlockOptimizer(
    base_optimizer=original_optimizer,
    named_parameters_list=list(model.named_parameters_list), 
    switch_block_every=50,
    switch_mode="ascending",
    verbose=2,
    block_prefix_list=block_prefix_list # set the block list
)
"""  # noqa: W291

# Document 002 (later README of BAdam), Partition by Module (A Single GPU), first block.
BADAM_RANDOM = """
from badam import BlockOptimizer

# before training, add this line to wrap the original optimizer
optimizer = BlockOptimizer(
    base_optimizer=original_optimizer, # can be any torch.Optimizer
    named_parameters_list=list(model.named_parameters()), 
    switch_block_every=100, # switch to the new block every 50 updates, the $K$ Adam steps in paper. It can be set adaptively by $K = n/(BD)$, where $n$ is the number of training data points, $B$ is the batch size, and $D$ is the number of blocks in BAdam; see "Hyperparameter Suggestion" section for a detailed explaination about setting this hyperparameter. 
    switch_mode="random", # update order of blocks, one can choose "random" (random reshuffling update order), "ascending" (update from input layer to output layer), or "descending" (update from output layer to input layer). The default is "random".
    verbose=2 # information level, will print trainable parameters when setting to 2
)
"""  # noqa: E501, W291

# Document 002, more partition strategies, blocks of self_attn and mlp modules.
BADAM_MODULES = """
# block partition by self_attn and mlp modules
block_prefix_list = []
for i in range(32):
    layer_prefix = [
        [f"model.layers.{i}.self_attn."],
        [f"model.layers.{i}.mlp."],
    ]
    block_prefix_list.extend(layer_prefix)

optimizer = BlockOptimizer(
    base_optimizer=original_optimizer,
    named_parameters_list=list(model.named_parameters()), 
    switch_block_every=100,
    switch_mode="random",
    verbose=2,
    block_prefix_list=block_prefix_list # set the block list
)
"""  # noqa: W291

# Document 002, more partition strategies, blocks of matrix modules.
BADAM_MATRICES_RANDOM = """
#block partition by matrix modules
block_prefix_list = []
for i in range(32):
    layer_prefix = [
        [f"model.layers.{i}.self_attn.q_proj."],
        [f"model.layers.{i}.self_attn.k_proj."],
        [f"model.layers.{i}.self_attn.v_proj."],
        [f"model.layers.{i}.self_attn.o_proj."],
        [f"model.layers.{i}.mlp.gate_proj."],
        [f"model.layers.{i}.mlp.up_proj."],
        [f"model.layers.{i}.mlp.down_proj."],
    ]
    block_prefix_list.extend(layer_prefix)

optimizer = BlockOptimizer(
    base_optimizer=original_optimizer,
    named_parameters_list=list(model.named_parameters_list), 
    switch_block_every=100,
    switch_mode="random",
    verbose=2,
    block_prefix_list=block_prefix_list # set the block list
)
"""  # noqa: W291

# Document 003 (ColossalAI's tutorial on distributed optimizers), steps 1 to 5.
TUTORIAL = """
from transformers import LlamaModel, LlamaConfig
from colossalai.nn.optimizer.distributed_adafactor import DistributedAdaFactor
from colossalai.booster import Booster
from colossalai.booster.plugin import HybridParallelPlugin
import colossalai
import torch
colossalai.launch_from_torch()
# Init Llama from huggingface
configuration = LlamaConfig()
model = LlamaModel(configuration).cuda()
criterion = lambda x: x.mean()
dist_optim = DistributedAdaFactor(model.parameters())

plugin = HybridParallelPlugin(tp_size=2, zero_stage=2, pp_size=1, enable_all_optimization=True)
booster = Booster(plugin=plugin)
# You should also pass in your own dataset.
model, dist_optim, criterion, dataloader, _ = booster.boost(model, dist_optim, criterion)
steps = 10
for step in range(steps):
    input_ids = torch.ones(1, 100, device="cuda", dtype=torch.int)
    attention_mask = input_ids.clone()
    outputs = model(input_ids.cuda(), attention_mask.cuda())
    loss = criterion(outputs.last_hidden_state)
    booster.backward(loss, dist_optim)
    dist_optim.step()
    dist_optim.zero_grad()
"""

CASES = {
    "bread-badam": (BREAD_BADAM, 3, 3, 100, "random"),
    "badam-ascending": (BADAM_ASCENDING, 3, 3, 50, "ascending"),
    "badam-matrices": (BADAM_MATRICES, 32, 31 * 7, 50, "ascending"),
    "badam-random": (BADAM_RANDOM, 3, 3, 100, "random"),
    "badam-modules": (BADAM_MODULES, 32, 32 * 2, 100, "random"),
    "badam-matrices-random": (BADAM_MATRICES_RANDOM, 32, 32 * 7, 100, "random"),
}
"""Code, layers of the model, and the number of blocks, the period and the order that the code asks for."""


def wrapped(code: str, model: Any) -> BlockOptimizer:
    """Run the code on a model; blocks without an import line use that of the block before them."""
    # Two documents write `model.named_parameters_list` where they mean `model.named_parameters()`.
    model.named_parameters_list = list(model.named_parameters())
    for package in ("block_optim", "badam"):
        code = code.replace(f"from {package} import", "from colossal_bcd.compat import")
    names: dict[str, Any] = {"model": model, "original_optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2)}
    names["BlockOptimizer"] = compat.BlockOptimizer
    exec(code, names)
    return names["optimizer"]


def changed(before: dict[str, torch.Tensor], module: nn.Module) -> set[str]:
    return {name for name, param in module.named_parameters() if not torch.equal(param.detach(), before[name])}


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in module.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_badam_code_trains_the_block_that_it_says(case: str, caplog: pytest.LogCaptureFixture) -> None:
    code, num_layers, num_blocks, period, mode = CASES[case]
    model = models.llama(layers=num_layers)
    with caplog.at_level(logging.INFO):
        optimizer = wrapped(code, model)
    assert (len(optimizer.blocks), optimizer.schedule.period, optimizer.schedule.mode) == (num_blocks, period, mode)
    first = set(optimizer.active_names())
    assert (f"trainable: {', '.join(optimizer.active_names())}" in caplog.messages) == ("verbose=2" in code)
    before = weights(model)
    model(input_ids=models.tokens(0), labels=models.tokens(0)).loss.backward()
    for _ in range(period):
        assert set(optimizer.active_names()) == first
        optimizer.step()
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.full_like(param, 0.1)
    assert changed(before, model) == first
    second = set(optimizer.active_names())
    assert not second & first
    if mode == "ascending":
        assert [first, second] == [set(block.parameters) for block in optimizer.blocks[:2]]


def boosted_badam(case: str) -> dict[str, Any]:
    from colossalai.booster import Booster

    from colossal_bcd.booster import LowLevelZeroPlugin

    code, num_layers, *_ = CASES[case]
    model: Any = models.llama(layers=num_layers).bfloat16()
    optimizer: Any = wrapped(code, model)
    before = weights(model)
    booster = Booster(plugin=LowLevelZeroPlugin(stage=2, precision="bf16"))
    model, optimizer, *_ = booster.boost(model, optimizer)
    losses = []
    for step in range(2):
        batch = models.tokens(2 * step + dist.get_rank())
        loss = model(input_ids=batch, labels=batch).loss
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    largest = torch.cat([param.detach().float().view(-1) for param in model.parameters()])
    mine = largest.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return {
        "active": set(optimizer.optim.active_names()),
        "changed": changed(before, model.unwrap()),
        "equal": torch.equal(mine, largest),
        "finite": all(map(torch.isfinite, map(torch.tensor, losses))),
    }


@pytest.mark.parametrize("case", CASES)
def test_badam_code_runs_under_zero(case: str) -> None:
    for result in run_ranks(2, boosted_badam, case):
        assert result["equal"]
        assert result["finite"]
        assert result["changed"] == result["active"]


TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 250,
    "max_position_embeddings": 128,
}


class Records(logging.Handler):
    """Keeps the warnings of the package."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def tutorial(optimizer: str, port: int) -> dict[str, Any]:
    """The tutorial with this package's optimizer and plugin; its model of 7 billion parameters becomes a tiny one."""
    code = TUTORIAL.replace("colossalai.nn.optimizer.distributed_adafactor", "colossal_bcd.compat")
    code = code.replace("DistributedAdaFactor", optimizer)
    code = code.replace("colossalai.booster.plugin", "colossal_bcd.booster")
    code = code.replace("LlamaConfig()", f"LlamaConfig(**{TINY})")
    if not torch.cuda.is_available():
        code = code.replace(".cuda()", "").replace('"cuda"', '"cpu"')
    # The tutorial makes the process group itself.  No rank may leave this one before all have joined it.
    dist.barrier()
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    records = Records()
    logging.getLogger("colossal_bcd").addHandler(records)
    names: dict[str, Any] = {}
    exec(code, names)
    torch.manual_seed(1024)  # what launch_from_torch() does
    untrained = transformers.LlamaModel(names["configuration"])
    with torch.no_grad():
        start = untrained(torch.ones(1, 100, dtype=torch.int)).last_hidden_state.mean()
    engine = names["dist_optim"]
    return {
        "class": type(engine.optim).__name__,
        "steps": {state["step"] for state in engine.optim.state.values()},
        "precision": names["plugin"].precision,
        "kernels": names["plugin"].shard_config.enable_flash_attention,
        "warnings": records.messages,
        "loss": names["loss"].item(),
        "start": start.item(),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="run_ranks gives the ranks gloo; on a device use torchrun")
@pytest.mark.parametrize("optimizer", ["DistributedAdaFactor", "DistributedLamb"])
def test_tutorial_of_distributed_optimizers_runs(optimizer: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for result in run_ranks(4, tutorial, optimizer, port):
        assert result["class"] == optimizer
        # The loss scaler may skip the first steps.
        assert len(result["steps"]) == 1
        assert max(result["steps"]) >= 5
        assert result["precision"] == "fp16"
        assert not result["kernels"]
        assert len(result["warnings"]) == 1
        assert "enable_all_optimization" in result["warnings"][0]
        assert "switched off" in result["warnings"][0]
        # The criterion is the mean of the hidden state, which ten steps lower.
        assert result["loss"] < result["start"] - 1e-3


def test_bread_sgd_code_corrects_what_it_says() -> None:
    model = models.llama(layers=3)
    optimizer = wrapped(BREAD_SGD, model)
    before = weights(model)
    model(input_ids=models.tokens(0), labels=models.tokens(0)).loss.backward()
    for name in optimizer.corrected_names():
        assert not torch.equal(model.get_parameter(name).detach(), before[name])
    assert changed(before, model) == set(before) - set(optimizer.active_names()), "the block waits for the step"
    optimizer.step()
    assert changed(before, model) == set(before)


# Document 003 (ColossalAI's tutorial of distributed optimizers), "GaLore special handling".
GALORE = """
from colossalai.nn.optimizer.galore import get_galore_param_groups
from colossalai.nn.optimizer import DistGaloreAwamW
optim = DistGaloreAwamW(
    get_galore_param_groups(model, decay=1e-2, rank=8),
    lr=lr,
    betas=(beta1, beta2),
    eps=eps,
    nbits=8,
    percentile_clipping=100,
    block_wise=True,
    min_8bit_size=4096,
)
"""


def galore_of_the_tutorial() -> dict[str, Any]:
    """The block with our names, and training under ZeRO stage 2, whose support the document says is underway."""
    code = GALORE.replace("colossalai.nn.optimizer.galore", "colossal_bcd.compat")
    code = code.replace("colossalai.nn.optimizer", "colossal_bcd.compat")
    model = models.llama(vocab=1024)
    names: dict[str, Any] = {"model": model, "lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    exec(code, names)
    optimizer = names["optim"]
    booster = Booster(plugin=LowLevelZeroPlugin(stage=2, precision="bf16"))
    model, engine, *_ = booster.boost(model, optimizer)
    losses = []
    for _ in range(8):
        loss = models.loss(model, models.tokens(0))
        booster.backward(loss, engine)
        engine.step()
        engine.zero_grad()
        losses.append(loss.item())
    dtypes = {entry.dtype for state in engine.optim.state.values() for name, entry in state.items()
              if name.startswith("exp_avg")}  # fmt: skip
    return {"class": type(engine.optim).__name__, "losses": losses, "dtypes": dtypes}


def test_tutorials_galore_block_runs_and_trains_under_zero() -> None:
    for result in run_ranks(2, galore_of_the_tutorial):
        assert result["class"] == "DistGaloreAwamW"
        assert result["losses"][-1] < result["losses"][0] - 0.5
        # Large images in 8 bits with scales of 32, small ones in 32.
        assert result["dtypes"] == {torch.uint8, torch.float32}


def test_bread_lora_code_trains_adapters_everywhere() -> None:
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=64, decoder_start_token_id=0
    )
    names: dict[str, Any] = {"original_model": transformers.T5ForConditionalGeneration(config)}
    exec(BREAD_PEFT, names)
    model = names["model"]
    optimizer = wrapped(BREAD_LORA, model)
    before = weights(model)
    tokens = models.tokens(0, vocab=64)
    for _ in range(2):  # at first the gradient of one factor is zero, as the other one is
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    adapters = {name for name in before if ".lora_" in name}
    base = {name for block in optimizer.active_blocks() for name in block.parameters}
    assert adapters
    assert changed(before, model) == adapters | base
