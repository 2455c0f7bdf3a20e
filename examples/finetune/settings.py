"""What a run is asked to do; checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from colossal_bcd.block.schedule import Mode

LOW_RANK = ("galore", "golore", "galore-8bit", "galore-sgd", "galore-adafactor")
"""Values of --optimizer that project gradients."""
RUN = (
    "optimizer", "base", "rank", "gap", "scale", "precision", "steps", "switch_every", "switch_mode", "embeddings",
    "lr", "batch_size", "sequence_length", "clip", "seed", "model", "text", "tokenizer", "vocab_size", "hidden_size",
    "layers", "gather_images",
)  # fmt: skip
"""Flags that say what is trained, on what, and how."""


class SettingsError(ValueError):
    """Flags that contradict each other; the same on every rank."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Flags of a run and the number of its processes."""

    world_size: int
    """Ranks: processes that run, or with `reference` the ranks that one process stands for."""
    reference: bool
    """Run the ranks' micro-batches one after the other in this process, without ColossalAI."""
    optimizer: str
    base: str
    """What makes the steps: of a block, or the optimizer itself."""
    plugin: Literal["zero", "hybrid", "ddp"]
    tp: int
    zero_stage: int
    precision: Literal["bf16", "fp16", "fp32"]
    steps: int
    switch_every: int
    """Optimizer steps on one block (K)."""
    switch_mode: Mode
    rank: int
    """Of the projections of `LOW_RANK` optimizers."""
    gap: int
    """Steps between refreshes of their bases."""
    scale: float
    """Factor of their projected updates."""
    embeddings: bool
    """Train embedding and head as blocks of their own, too."""
    lr: float
    batch_size: int
    """Sequences per step over all ranks."""
    accumulate: int
    """Backward passes per step and rank."""
    sequence_length: int
    clip: float
    """Largest gradient norm of what is active; 0 does not clip."""
    eval_every: int
    seed: int
    model: Path | None
    text: Path | None
    tokenizer: Literal["bpe", "byte"]
    vocab_size: int
    hidden_size: int
    layers: int
    output: Path
    save: bool
    checkpoint_every: int
    """Steps between checkpoints; 0: only when interrupted."""
    resume: bool
    gather_images: bool = False
    """Gather low-rank updates instead of weights; without float32 masters, rounding stochastically."""
    tensorboard: Path | None = None
    """Folder of events; None: none are written."""

    @property
    def data_ranks(self) -> int:
        """Ranks that see different data."""
        return self.world_size // self.tp

    @property
    def zero_ranks(self) -> int:
        """Ranks that share masters, states and the gradients of a step."""
        return self.data_ranks if self.zero_stage and not self.reference else 1

    @property
    def micro_batch(self) -> int:
        """Sequences in one backward pass of one rank."""
        return self.batch_size // (self.data_ranks * self.accumulate)

    @property
    def run(self) -> dict[str, int | float | str]:
        """What another run must have in common to go on with this one's checkpoint; ranks may differ."""
        values = {name: getattr(self, name) for name in RUN}
        return {name: value if isinstance(value, (int, float)) else str(value) for name, value in values.items()}

    def __post_init__(self) -> None:
        self._check_mesh()
        if self.gather_images:
            _require(
                self.optimizer in LOW_RANK and self.plugin == "zero" and not self.reference,
                "--gather-images is about galore and golore under --plugin zero, got "
                f"--optimizer {self.optimizer} --plugin {self.plugin}{' --reference' * self.reference}.",
            )
        self._check_precision()
        self._check_batch()
        self._check_files()

    def _check_mesh(self) -> None:
        _require(
            self.tp == 1 or self.plugin == "hybrid",
            f"--tp {self.tp} needs --plugin hybrid, got --plugin {self.plugin}.",
        )
        _require(
            self.world_size % self.tp == 0, f"--tp {self.tp} does not divide the {self.world_size} ranks of this run."
        )
        if self.plugin == "zero":
            _require(
                self.zero_stage in (1, 2),
                "--plugin zero has --zero-stage 1 or 2, got 0. Use --plugin hybrid or ddp for stage 0.",
            )
        if self.plugin == "ddp":
            _require(
                self.zero_stage == 0, f"--plugin ddp shards nothing, got --zero-stage {self.zero_stage}. Leave it out."
            )
            _require(self.clip == 0, "--clip needs --plugin zero or hybrid, which clip inside the step, got ddp.")

    def _check_precision(self) -> None:
        if self.precision == "fp16":
            _require(
                not self.reference, "--reference has no loss scaling, got --precision fp16. Compare in bf16 or fp32."
            )
            _require(self.plugin != "ddp", "--plugin ddp has no loss scaling, got --precision fp16. Use bf16 or fp32.")
        if self.plugin == "hybrid" and self.precision == "fp32":
            _require(
                self.zero_stage == 0,
                f"--plugin hybrid takes --precision fp32 with --zero-stage 0 only, got {self.zero_stage}.",
            )
        if self.plugin == "ddp" and self.optimizer != "badam":
            _require(
                self.precision == "fp32",
                f"--plugin ddp keeps no float32 masters for {self.optimizer}, got --precision {self.precision}. "
                "Use fp32, or --plugin zero.",
            )

    def _check_batch(self) -> None:
        parts = self.data_ranks * self.accumulate
        _require(
            self.batch_size % parts == 0,
            f"--batch-size {self.batch_size} is not a multiple of {parts} (data-parallel ranks x --accumulate).",
        )

    def _check_files(self) -> None:
        if self.text is not None:
            _require(
                self.text.suffix in (".txt", ".jsonl"), f"--text takes a .txt or .jsonl file, got {self.text.name}."
            )
        if self.model is not None:
            for name in ("config.json", "tokenizer_config.json"):
                _require((self.model / name).is_file(), f"--model {self.model} has no {name}; give a saved HF model.")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SettingsError(message)
