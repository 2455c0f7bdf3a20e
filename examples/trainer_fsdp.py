"""Blocks of sharded weights in Hugging Face's Trainer: `torchrun --nproc_per_node 2 examples/trainer_fsdp.py`.

It needs torch 2.6, on CPUs 2.13.  Each process has a half of the weights, and of the masters and moments of a block.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from counting import batch, model
from transformers import Trainer, TrainingArguments

from colossal_bcd import AdamW, BlockOptimizer
from colossal_bcd.compat import BAdamCallback, enable_accelerate


class BlockTrainer(Trainer):
    """With FSDP the trainer does not take an optimizer that is made, but makes one before it shards the model."""

    optimizer: Any

    def create_optimizer(self, model: Any = None) -> Any:
        """Called with whole weights, at every start of training."""
        if self.optimizer is None:
            base = AdamW(self.model.parameters(), lr=3e-3)
            named = self.model.named_parameters()
            self.optimizer = BlockOptimizer(base, named, switch_block_every=10, include_lm_head=True)
        return self.optimizer


def train(folder: Path, steps: int = 60, resume: bool = False) -> Trainer:
    """Train on the batches that the trainer gives to this process."""
    enable_accelerate()  # before the trainer is made, on CPUs
    os.environ["FSDP_VERSION"] = "2"  # for transformers before 5, which does not read the version below
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        logging_steps=max(1, steps // 4),
        save_steps=max(1, steps // 2),
        use_cpu=not torch.cuda.is_available(),
        fsdp="full_shard auto_wrap",
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        report_to=[],
    )
    rows = [{"input_ids": row, "labels": row} for row in batch(0, rows=512)]
    trainer = BlockTrainer(model(), arguments, train_dataset=rows, callbacks=[BAdamCallback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    train(Path("trainer_output"), resume="--resume" in sys.argv)
