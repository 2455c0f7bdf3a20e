"""Blocks in Hugging Face's Trainer on two processes: `torchrun --nproc_per_node 2 examples/trainer_two_processes.py`.

A small Llama from random weights learns to count; nothing is downloaded.  On several GPUs it is the same program.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from colossal_bcd import AdamW, BlockOptimizer
from colossal_bcd.compat import BAdamCallback


def dataset(rows: int = 512, length: int = 16, vocab: int = 64) -> list[dict[str, torch.Tensor]]:
    """Return numbers that follow each other, each row from another one on."""
    tokens = [(torch.arange(length) + start) % vocab for start in range(rows)]
    return [{"input_ids": row, "labels": row} for row in tokens]


def train(folder: Path, steps: int = 60, resume: bool = False) -> Trainer:
    """Train every process's replica; the trainer splits the batches, and gradients are averaged over the processes."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **shape))
    optimizer = BlockOptimizer(
        AdamW(model.parameters(), lr=3e-3),
        model.named_parameters(),
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
    trainer = Trainer(
        model, arguments, train_dataset=dataset(), optimizers=(optimizer, None), callbacks=[BAdamCallback]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    train(Path("trainer_output"), resume="--resume" in sys.argv)
