"""MODEL of a command: where its config comes from, and the model that it describes, without memory."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from colossal_bcd.names import role_of


def _decoder(
    hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, **others: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        **others,
    }


def _encoder(hidden: int, ffn: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = _decoder(hidden, ffn, layers, heads, heads, 50265)
    del sizes["num_key_value_heads"]
    return {**sizes, "model_type": "roberta", "max_position_embeddings": 514, "type_vocab_size": 1}


_QWEN3: dict[str, Any] = {"model_type": "qwen3", "head_dim": 128, "max_position_embeddings": 40960}
PRESETS: Mapping[str, dict[str, Any]] = {
    "llama-2-7b": _decoder(4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096),
    "llama-2-13b": _decoder(5120, 13824, 40, 40, 40, 32000, max_position_embeddings=4096),
    "llama-3-8b": _decoder(4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": _decoder(8192, 28672, 80, 64, 8, 128256),
    "llama-3.2-1b": _decoder(2048, 8192, 16, 32, 8, 128256, head_dim=64, tie_word_embeddings=True),
    "mistral-7b": _decoder(4096, 14336, 32, 32, 8, 32000, model_type="mistral", max_position_embeddings=32768),
    "qwen2.5-7b": _decoder(3584, 18944, 28, 28, 4, 152064, model_type="qwen2", max_position_embeddings=131072),
    "qwen3-0.6b": _decoder(1024, 3072, 28, 16, 8, 151936, **_QWEN3, tie_word_embeddings=True),
    "qwen3-8b": _decoder(4096, 12288, 36, 32, 8, 151936, **_QWEN3),
    "qwen3-32b": _decoder(5120, 25600, 64, 64, 8, 151936, **_QWEN3),
    "roberta-base": _encoder(768, 3072, 12, 12),
    "roberta-large": _encoder(1024, 4096, 24, 16),
    "gpt2": {"model_type": "gpt2"},
    "smollm2-135m": _decoder(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
}
"""Published configs, as far as sizes depend on them."""


@dataclass(frozen=True)
class Model:
    """A model as its config describes it."""

    name: str
    config: Any
    """Of transformers."""

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest sequence; None: the config does not say."""
        positions = getattr(self.config, "max_position_embeddings", None)
        # The positions of RoBERTa begin behind that of the padding.
        return positions - 2 if positions is not None and "roberta" in self.config.model_type else positions

    def build(self, dtype: torch.dtype) -> nn.Module:
        """The model with its head for language modelling, on the device that is the default; torch initialises it."""
        import transformers

        architecture = (self.config.architectures or [""])[0]
        masked = type(self.config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
        auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
        made = getattr(transformers, architecture, None)
        config = copy.deepcopy(self.config)
        build = getattr(made, "_from_config", auto.from_config) if made is not None else auto.from_config
        model: nn.Module = build(config)
        return model.to(dtype).train()

    def on_meta(self, dtype: torch.dtype) -> nn.Module:
        """The model without memory."""
        with torch.device("meta"):
            return self.build(dtype)

    def changed(self, **values: Any) -> Model:
        """The model of another config.

        Args:
            values: by their names in it.
        """
        import transformers

        values = {name: value for name, value in values.items() if value is not None}
        # Of as many values as there are layers, in newer versions of transformers; it follows from the rest.
        kept = {name: value for name, value in self.config.to_dict().items() if name not in ("layer_types", *values)}
        names = {name: self.config.attribute_map.get(name, name) for name in values}
        for name in names.values():
            kept.pop(name, None)
        kind = kept.pop("model_type")
        made = transformers.AutoConfig.for_model(kind, **kept, **{names[name]: values[name] for name in values})
        return Model(self.name, made)

    def shrunk(self, *, layers: int | None, vocab: int | None, width: int) -> Model:
        """A model like this one, but smaller.

        Args:
            layers: number of them; None: all.
            vocab: size of the vocabulary; None: as it is.
            width: divides hidden sizes, and the number of heads; whole heads stay.
        Raises:
            ValueError: a width is not a multiple of the divisor.
        """
        values: dict[str, Any] = {"num_hidden_layers": layers, "vocab_size": vocab}
        if width > 1:
            heads = self.config.num_attention_heads
            size = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
            if self.config.hidden_size % width or size * heads % width:
                raise ValueError(
                    f"--width: got {width}, expected a divisor of hidden_size={self.config.hidden_size}. Take a power "
                    "of 2."
                )
            for name in ("hidden_size", "intermediate_size"):
                if getattr(self.config, name, None) is not None:
                    values[name] = getattr(self.config, name) // width
            shared = max(heads // max(getattr(self.config, "num_key_value_heads", None) or heads, 1), 1)
            values["num_attention_heads"] = fewer = max(heads // width, 2 * shared)
            if getattr(self.config, "num_key_value_heads", None) is not None:
                values["num_key_value_heads"] = fewer // shared
            if getattr(self.config, "head_dim", None) is not None:
                values["head_dim"] = max(values["hidden_size"] // fewer, 2)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            token = getattr(self.config, name, None)
            if vocab is not None and isinstance(token, int) and token >= vocab:
                values[name] = 0
        return self.changed(**values)


def read_model(text: str) -> Model:
    """The model that a user means.

    Args:
        text: a preset, a config.json, or a folder with one.
    Raises:
        ValueError: it is none of these, or transformers does not know the model.
    """
    import transformers

    path = Path(text)
    if text.lower() in PRESETS:
        name, values = text.lower(), dict(PRESETS[text.lower()])
    elif path.exists():
        name, values = path.stem if path.suffix == ".json" else path.resolve().name, _read(path)
    else:
        closest = difflib.get_close_matches(text.lower(), PRESETS, n=3, cutoff=0.4) or list(PRESETS)
        raise ValueError(
            f"MODEL: got {text!r}, expected a preset, a config.json, or a folder with one. Presets like it: "
            f"{', '.join(closest)}; nothing is downloaded."
        )
    kind = values.pop("model_type", None)
    try:
        config = transformers.AutoConfig.for_model(kind, **values, use_cache=False)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"MODEL: {text} has model_type {kind!r} and values that transformers {transformers.__version__} does not "
            f"take ({str(error).splitlines()[0][:80]}). Take the config.json of a model of transformers."
        ) from None
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise ValueError(f"MODEL: {text} says no num_hidden_layers, expected a model of equal layers.")
    return Model(name, config)


def _read(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"MODEL: {path} has no config.json. Name a folder that has one, or the file itself.")
    try:
        values = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"MODEL: {file} is no JSON ({error}). Name a model's config.json.") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f"MODEL: {file} has no model_type. Name a config.json as transformers saves it.")
    values.pop("use_cache", None)
    return values


def layer_names(model: nn.Module) -> list[str]:
    """Names of the layers, in order."""
    return list(dict.fromkeys(layer for name, _ in model.named_parameters() if (layer := role_of(name).layer)))
