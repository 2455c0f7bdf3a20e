"""Blocks in Hugging Face's Trainer on two processes: `torchrun --nproc_per_node 2 examples/trainer_two_processes.py`.

On several GPUs it is the same program.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from counting import batch, model
from transformers import Trainer, TrainingArguments

from colossal_bcd import AdamW, BlockOptimizer
from colossal_bcd.compat import BAdamCallback


def train(folder: Path, steps: int = 60, resume: bool = False) -> Trainer:
    """Train every process's replica; the trainer splits the batches, and gradients are averaged over the processes."""
    network = model()
    optimizer = BlockOptimizer(
        AdamW(network.parameters(), lr=3e-3),
        network.named_parameters(),
        switch_block_every=10,
        include_embedding=True,
        include_lm_head=True,
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        logging_steps=max(1, steps // 4),
        save_steps=max(1, steps // 2),
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
    )
    rows = [{"input_ids": row, "labels": row} for row in batch(0, rows=512)]
    trainer = Trainer(network, arguments, train_dataset=rows, optimizers=(optimizer, None), callbacks=[BAdamCallback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    train(Path("trainer_output"), resume="--resume" in sys.argv)
