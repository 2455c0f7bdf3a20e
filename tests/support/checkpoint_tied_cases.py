"""What ranks run in test_tied.py."""

from __future__ import annotations

from typing import Any

import block_cases
import models
from torch import Tensor

from colossal_bcd.booster import CheckpointFolder


def saved(plugin: str, options: dict[str, Any], folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights after four steps: without a break, and resumed after two by another model."""
    checkpoints = CheckpointFolder(folder)
    results = []
    for resumes in (False, True):
        start = block_cases.build(tied=True, seed=int(resumes))
        blocks = {"include_embedding": True, "switch_mode": "descending", "switch_block_every": 1}
        model, engine, booster = block_cases.boosted(plugin, options, model=start, block=blocks)
        if resumes:
            checkpoints.load(booster, model, engine, step=2)
        for step in range(2 if resumes else 0, 4):
            booster.backward(models.loss(model, models.tokens(step)), engine)
            engine.step()
            engine.zero_grad()
            if step == 1:
                checkpoints.save(booster, model, engine, step=2)
        module = model.unwrap()
        assert module.lm_head.weight is module.model.embed_tokens.weight
        results.append({name: param.detach().clone() for name, param in module.named_parameters()})
    return results[0], results[1]
