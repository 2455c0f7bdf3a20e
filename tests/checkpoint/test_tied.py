"""Models whose head is their embedding, which ColossalAI cannot write in safetensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_tied_cases import saved
from transformers import LlamaForCausalLM

from colossal_bcd.testing import run_ranks

OPTIONS = {"zero": {"stage": 2}, "ddp": {}, "hybrid": {"tp_size": 2, "pp_size": 1, "zero_stage": 1}}


@pytest.mark.parametrize("plugin", OPTIONS)
def test_tied_model_resumes_bit_for_bit_from_a_checkpoint_folder(plugin: str, tmp_path: Path) -> None:
    """`CheckpointFolder.save` failed with "Some tensors share memory", so that no tied model could be resumed."""
    for straight, resumed in run_ranks(2, saved, plugin, OPTIONS[plugin], str(tmp_path)):
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    if plugin != "hybrid":
        model = LlamaForCausalLM.from_pretrained(tmp_path / "step-00000002" / "model")
        assert model.lm_head.weight is model.model.embed_tokens.weight
