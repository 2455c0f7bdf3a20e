"""Llama models of the papers' pretraining, from 9 million weights to one billion.

The numbers are GaLore's and ReLoRA's; the names count the weights with a vocabulary of 32,000.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from records import DataError
from transformers import LlamaConfig

PRESETS: dict[str, tuple[int, int, int, int]] = {
    "llama_9m": (128, 352, 4, 4),
    "llama_20m": (256, 688, 4, 4),
    "llama_35m": (384, 1024, 8, 6),
    "llama_60m": (512, 1376, 8, 8),
    "llama_100m": (640, 1708, 10, 12),
    "llama_130m": (768, 2048, 12, 12),
    "llama_250m": (768, 2560, 16, 24),
    "llama_350m": (1024, 2736, 16, 24),
    "llama_1b": (2048, 5461, 32, 24),
}
"""Hidden size, intermediate size, heads, layers."""


def config_of(name: str, vocabulary: int, length: int) -> LlamaConfig:
    """The configuration of a model.

    Args:
        name: of `PRESETS`, or a file of Hugging Face's format for Llama, of which a vocabulary is not looked at.
        vocabulary: tokens.
        length: positions that it is trained on.
    Raises:
        DataError: there is no such preset or file, or the file is of something else.
    """
    if name in PRESETS:
        hidden, intermediate, heads, layers = PRESETS[name]
        values: dict[str, Any] = {
            "hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads,
            "num_hidden_layers": layers, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
        }  # fmt: skip
    else:
        values = _read(Path(name))
    values |= {"vocab_size": vocabulary, "max_position_embeddings": max(length, 1024), "use_cache": False}
    # Ids of the file are of its own vocabulary.
    values |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return LlamaConfig(**values)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise DataError(
            f"--model_config: got {str(path)!r}, expected one of {', '.join(PRESETS)} or a configuration's file."
        ) from None
    except ValueError:
        raise DataError(f"{path}: got no JSON, expected a configuration of Hugging Face's format. Mend it.") from None
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    if not isinstance(values, dict) or values.get("model_type") != "llama" or not values.keys() >= set(sizes):
        raise DataError(f"{path}: expected the model_type llama and {', '.join(sizes)}. Mend it.")
    return values
