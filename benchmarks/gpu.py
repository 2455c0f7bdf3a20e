"""Measure on one GPU: steps against the copy bandwidth, GaLore, many tensors, and BAdam on a Llama-3-8B.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --section bandwidth --section steps --output steps.md
    python benchmarks/gpu.py --device cpu --size small --output small.md

A section that fails leaves its traceback in the report and the others as they are; the exit code is 1 then.  The report
is written after every section.
"""

from __future__ import annotations

import gc
import math
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
import torch.distributed as dist
from common import heading, row
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import colossal_bcd
from colossal_bcd import BlockOptimizer, estimate, fsdp
from colossal_bcd.optim.math import adam_direction_, direction_numbers, moment_numbers

GB = 1e9
"""Bytes are decimal, as in the paper of BAdam."""
WARM_UP = 3
BETAS = (0.9, 0.999)
RANK = 128


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large everything is."""

    copied: int
    """Bytes that are copied to measure the bandwidth."""
    layer: tuple[tuple[int, ...], ...]
    """Shapes of the parameters of one layer."""
    rank: int
    exact: tuple[tuple[int, int], ...]
    """Shapes whose singular vectors are computed exactly."""
    tensors: tuple[tuple[int, tuple[int, int]], ...]
    """Number and shape of tensors, each the same values in all."""
    model: Mapping[str, Any]
    """Of LlamaConfig."""
    batches: tuple[tuple[int, int], ...]
    """Sequences and their length."""
    repeats: int


LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
SIZES = {
    "llama-8b": Size(
        copied=4 * 2**30,
        layer=(
            (4096, 4096),
            (1024, 4096),
            (1024, 4096),
            (4096, 4096),
            (14336, 4096),
            (14336, 4096),
            (4096, 14336),
            (4096,),
            (4096,),
        ),
        rank=RANK,
        exact=((1024, 4096), (4096, 4096)),
        tensors=((75, (640, 256)), (750, (64, 256))),
        model=LLAMA_8B,
        batches=((2, 1024), (1, 512), (8, 512), (8, 1024)),
        repeats=20,
    ),
    "small": Size(
        copied=2**20,
        layer=((32, 32), (8, 32), (96, 32), (32, 96), (32,)),
        rank=4,
        exact=((8, 32),),
        tensors=((3, (40, 16)), (30, (4, 16))),
        model={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 64,
            "max_position_embeddings": 64,
        },
        batches=((2, 16), (1, 8)),
        repeats=3,
    ),
}


@dataclass
class Bench:
    """Where and how large to measure, and what later sections need of earlier ones."""

    device: torch.device
    size: Size
    bandwidth: float | None = None
    """Bytes per second that a copy moves, reads and writes counted."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def allocated(self) -> int:
        """Bytes that are allocated now; 0 where that is not known."""
        return torch.cuda.memory_allocated(self.device) if self.on_gpu else 0

    def peak(self) -> int:
        """Bytes that were allocated at most since `reset_peak`."""
        return torch.cuda.max_memory_allocated(self.device) if self.on_gpu else 0

    def reset_peak(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)

    def free(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Times:
    """Medians in milliseconds."""

    device: float
    """Between two events on the stream, or on a CPU wall time."""
    host: float
    """Until the call returns, with the device idle before it."""


class Clock:
    """Times one piece of work on the device's stream.

    Args:
        bench: where.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if bench.on_gpu else []

    def __call__(self, work: Callable[[], Any]) -> Times:
        self._bench.wait()
        begin = time.perf_counter()
        if self._events:
            self._events[0].record()
        work()
        if self._events:
            self._events[1].record()
        host = 1000 * (time.perf_counter() - begin)
        self._bench.wait()
        return Times(self._events[0].elapsed_time(self._events[1]) if self._events else host, host)


def in_turn(bench: Bench, sides: Mapping[str, Callable[[], Any]], repeats: int | None = None) -> dict[str, Times]:
    """Medians of several pieces of work that are done in turn, after a warm-up of each."""
    clock = Clock(bench)
    for work in sides.values():
        for _ in range(WARM_UP):
            work()
    rounds = [{name: clock(work) for name, work in sides.items()} for _ in range(repeats or bench.size.repeats)]
    return {
        name: Times(median(each[name].device for each in rounds), median(each[name].host for each in rounds))
        for name in sides
    }


def bandwidth(bench: Bench) -> Iterator[str]:
    """What a copy moves: the measure of everything else."""
    source = torch.ones(bench.size.copied // 4, device=bench.device)
    target = torch.empty_like(source)
    times = in_turn(bench, {"copy": lambda: target.copy_(source)})["copy"]
    bench.bandwidth = 2 * source.nbytes / (times.device / 1000)
    yield (
        f"A copy of {source.nbytes / GB:.2f} GB takes {times.device:.3f} ms: **{bench.bandwidth / GB:.0f} GB/s**, "
        "bytes that are read and bytes that are written counted."
    )


ELEMENTWISE: dict[str, tuple[dict[str, Any], int, str]] = {
    "AdamW": ({}, 28, "reads w, g, m, v; writes w, m, v"),
    "SGD": ({"momentum": 0.9}, 20, "reads w, g, m; writes w, m"),
    "Lion": ({}, 20, "reads w, g, m; writes w, m"),
    "Lamb": ({}, 40, "reads w, g, m, v and writes m, v for the two norms; reads w, m, v and writes w"),
    "Adafactor": (
        {"relative_step": False, "lr": 1e-3},
        24,
        "reads g and w for the means and the size of w; g for the size of the update; g, w and writes w",
    ),
    "CAME": (
        {"lr": 1e-3},
        32,
        "reads g for the means; g for the size of the update; g, m and writes m for the confidence; m, w and writes w",
    ),
}
"""Optimizer -> hyper-parameters, bytes that a step of float32 weights has to move per value whatever its kernels are,
and why.  Rows, columns and scalars are not counted."""


def layer_params(bench: Bench, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Any]:
    """Parameters with gradients."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, device=bench.device).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def with_fresh_weights(params: Sequence[Any]) -> list[Any]:
    """Other weights with the same gradients."""
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    for copy, param in zip(copies, params, strict=True):
        copy.grad = param.grad
    return copies


def torch_sides(bench: Bench, params: Sequence[Any]) -> dict[str, Callable[[], Any]]:
    """Steps of torch's AdamW."""
    kinds: dict[str, dict[str, Any]] = {
        "torch AdamW, foreach": {"foreach": True},
        "torch AdamW, fused": {"fused": True},
    }
    return {name: torch.optim.AdamW(with_fresh_weights(params), **options).step for name, options in kinds.items()}


def compiled_formula(params: Sequence[Any]) -> Callable[[], Any]:
    """AdamW's formula in one compiled function of all tensors: what a compiler makes of it."""
    weights = [param.detach().clone() for param in params]
    moments = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in weights]
    grads, numbers = [param.grad for param in params], {**moment_numbers(BETAS), **direction_numbers(BETAS, 1e-8, 10)}

    def update(weights: Any, grads: Any, moments: Any) -> None:
        for weight, grad, (first, second) in zip(weights, grads, moments, strict=True):
            direction = adam_direction_(first, second, grad, **numbers)
            weight.mul_(1 - 1e-5).sub_(direction, alpha=1e-3)

    compiled: Any = torch.compile(update)
    return lambda: compiled(weights, grads, moments)


def made(name: str, params: Sequence[Any], **options: Any) -> Any:
    """An optimizer of this package."""
    build: Any = getattr(colossal_bcd, name)
    return build(params, **options)


STEP_HEADER = (
    "step",
    "ms",
    "host, ms",
    "bytes per value, least",
    "GB",
    "share of the copy bandwidth",
    "of fused AdamW",
)


def step_line(bench: Bench, name: str, times: Times, fused: Times, per_value: float, num_values: int) -> str:
    """A line of `STEP_HEADER`."""
    moved = per_value * num_values
    share = "-" if bench.bandwidth is None else f"{moved / (times.device / 1000) / bench.bandwidth:.0%}"
    return row((
        name,
        f"{times.device:.3f}",
        f"{times.host:.3f}",
        f"{per_value:.1f}",
        f"{moved / GB:.2f}",
        share,
        f"{times.device / fused.device:.2f}",
    ))  # fmt: skip


def steps(bench: Bench) -> Iterator[str]:
    """Steps over the parameters of one layer, each in turn with torch's fused AdamW."""
    shapes = bench.size.layer
    params = layer_params(bench, shapes)
    num_values = sum(param.numel() for param in params)
    distinct = ", ".join("x".join(map(str, shape)) for shape in dict.fromkeys(shapes))
    yield (
        f"{len(shapes)} tensors, {num_values / 1e6:.1f} million values: {distinct}. Weights and gradients are "
        "float32.\n"
    )
    yield heading(STEP_HEADER)
    for name, (options, per_value, _) in ELEMENTWISE.items():
        sides = {
            name: made(name, with_fresh_weights(params), compile=False, **options).step,
            f"{name}, compiled": made(name, with_fresh_weights(params), compile=True, **options).step,
            **torch_sides(bench, params),
        }
        if name != "AdamW":
            del sides["torch AdamW, foreach"]
        measured = in_turn(bench, sides)
        fused = measured["torch AdamW, fused"]
        for side, times in measured.items():
            if name == "AdamW" or side != "torch AdamW, fused":
                least = 28 if side.startswith("torch") else per_value
                yield step_line(bench, side, times, fused, least, num_values)
        del sides
        bench.free()
    yield "\n" + "\n".join(f"- {name}, {least} bytes: {why}." for name, (_, least, why) in ELEMENTWISE.items())


def compiled(bench: Bench) -> Iterator[str]:
    """AdamW's formula under torch.compile: what one kernel per tensor takes."""
    params = layer_params(bench, bench.size.layer)
    num_values = sum(param.numel() for param in params)
    sides = {"AdamW's formula, torch.compile": compiled_formula(params), **torch_sides(bench, params)}
    measured = in_turn(bench, sides)
    yield heading(STEP_HEADER)
    for side, times in measured.items():
        yield step_line(bench, side, times, measured["torch AdamW, fused"], 28, num_values)


def masters(bench: Bench) -> Iterator[str]:
    """bfloat16 weights: with float32 masters in a block that stays, and rounded stochastically without masters."""
    params = layer_params(bench, bench.size.layer, torch.bfloat16)
    num_values = sum(param.numel() for param in params)
    fused = torch_sides(bench, layer_params(bench, bench.size.layer))["torch AdamW, fused"]
    named = [(f"layers.0.{index}", param) for index, param in enumerate(with_fresh_weights(params))]
    block = BlockOptimizer(
        made("AdamW", [param for _, param in named]),
        named,
        block_prefix_list=[["layers.0."]],
        switch_mode="fixed",
        verbose=0,
    )
    grads = [param.grad for param in params]

    def step_of_block() -> None:
        for (_, param), grad in zip(named, grads, strict=True):
            param.grad = grad
        block.step()

    rounded = made("AdamW", with_fresh_weights(params), rounding="stochastic")
    sides = {
        "AdamW on float32 masters": step_of_block,
        "AdamW, stochastic rounding": rounded.step,
        "torch AdamW, fused": fused,
    }
    measured = in_turn(bench, sides)
    # Masters: the bfloat16 gradient is read, and a bfloat16 weight written, besides three float32 values, twice each.
    least = {"AdamW on float32 masters": 28, "AdamW, stochastic rounding": 22, "torch AdamW, fused": 28}
    yield heading(STEP_HEADER)
    for side, times in measured.items():
        yield step_line(bench, side, times, measured["torch AdamW, fused"], least[side], num_values)
    yield (
        "\nOn masters: reads g in 2 bytes, and master, m, v; writes these and the weight in 2 bytes. Rounded: reads w "
        "and g in 2 bytes, m, v; writes w in 2 bytes, m, v. Torch's works on float32."
    )


def galore_bytes(shapes: Sequence[tuple[int, ...]], rank: int) -> float:
    """Bytes that a step of GaLoreAdamW has to move: g once, w twice, the low-rank gradient's AdamW, and the basis."""
    total = 0.0
    for shape in shapes:
        if len(shape) < 2:
            total += 28 * shape[0]
        else:
            low_rank = min(rank, min(shape)) * max(shape)
            total += 12 * math.prod(shape) + 28 * low_rank + 2 * 4 * min(rank, min(shape)) * min(shape)
    return total


def galore(bench: Bench) -> Iterator[str]:
    """GaLore with AdamW: steps between refreshes, and refreshes by method."""
    shapes, rank = bench.size.layer, bench.size.rank
    params = layer_params(bench, shapes)
    num_values = sum(param.numel() for param in params)
    options = {"rank": rank, "clamp": True, "update_proj_gap": 10**6, "svd_method": "random"}
    sides = {
        f"GaLoreAdamW, rank {rank}": made("GaLoreAdamW", with_fresh_weights(params), **options).step,
        "torch AdamW, fused": torch_sides(bench, params)["torch AdamW, fused"],
    }
    measured = in_turn(bench, sides)
    per_value = galore_bytes(shapes, rank) / num_values
    flops = sum(4 * math.prod(shape) * min(rank, *shape) for shape in shapes if len(shape) > 1)
    yield heading(STEP_HEADER)
    for side, times in measured.items():
        least = 28 if side.startswith("torch") else per_value
        yield step_line(bench, side, times, measured["torch AdamW, fused"], least, num_values)
    yield (
        f"\nBetween refreshes; besides moving bytes it multiplies, {flops / 1e12:.2f} * 10^12 operations in float32 "
        "(torch.backends.cuda.matmul.allow_tf32 is off).\n"
    )
    del sides
    bench.free()
    yield heading(("refresh", "ms"))
    for method in ("random", "subspace"):
        yield refresh_line(bench, f"{method}, all matrices of the layer", params, method)
    for shape in bench.size.exact:
        for method in ("exact", "subspace"):
            yield refresh_line(bench, f"{method}, {shape[0]}x{shape[1]}", layer_params(bench, [shape]), method)


def refresh_line(bench: Bench, name: str, params: Sequence[Any], method: str) -> str:
    """Time a step that refreshes everything, less one that does not."""
    options = {"rank": bench.size.rank, "clamp": True, "svd_method": method}
    always = made("GaLoreAdamW", with_fresh_weights(params), update_proj_gap=1, **options)
    never = made("GaLoreAdamW", with_fresh_weights(params), update_proj_gap=10**6, **options)
    clock = Clock(bench)
    never.step()
    if method != "exact":  # an exact one takes seconds
        always.step()
    return row((name, f"{clock(always.step).device - clock(never.step).device:.1f}"))


def tensors(bench: Bench) -> Iterator[str]:
    """The same values in few and in ten times as many tensors."""
    counts = " and ".join(f"{count} of {shape[0]}x{shape[1]}" for count, shape in bench.size.tensors)
    yield f"Tensors: {counts}. Host time is what the call takes until it returns.\n"
    yield heading(("step", *(f"{count}, {what}" for count, _ in bench.size.tensors for what in ("ms", "host ms"))))
    galore_options = {"rank": 4, "update_proj_gap": 10**6, "svd_method": "random"}
    rows: dict[str, list[str]] = {}
    for count, shape in bench.size.tensors:
        params = layer_params(bench, [shape] * count)
        sides = {
            name: made(name, with_fresh_weights(params), **given).step for name, (given, *_) in ELEMENTWISE.items()
        }
        sides["GaLoreAdamW"] = made("GaLoreAdamW", with_fresh_weights(params), **galore_options).step
        for name, times in in_turn(bench, {**sides, **torch_sides(bench, params)}).items():
            rows.setdefault(name, []).extend((f"{times.device:.2f}", f"{times.host:.2f}"))
    for name, cells in rows.items():
        yield row((name, *cells))


def new_llama(bench: Bench) -> Any:
    """A Llama of random bfloat16 weights, made on the device, that checkpoints its layers."""
    config = LlamaConfig(**bench.size.model, use_cache=False, attn_implementation="sdpa", tie_word_embeddings=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(bench.device):
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


PERIOD = 4
"""Steps in a block: two that allocate, one that is measured, one that switches."""
BADAM_HEADER = (
    "batch",
    "tokens/s",
    "without the optimizer",
    "forward and backward, ms",
    "step, ms",
    "switch, ms",
    "peak, GB",
    "in a step, GB",
    "weights + estimate in a step, GB",
)


def badam(bench: Bench) -> Iterator[str]:
    """BAdam on the whole model, blocks from the first layer on, whose backward pass is the longest."""
    yield from train_blocks(bench, bench.size.batches)


def sharded(bench: Bench) -> Iterator[str]:
    """The same on weights that torch's FSDP2 shards over one rank: what gathering and reducing cost by themselves."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("nccl" if bench.on_gpu else "gloo", store=store, rank=0, world_size=1)
    try:
        yield from train_blocks(bench, bench.size.batches[:1], shard=True)
    finally:
        dist.destroy_process_group()


def train_blocks(bench: Bench, batches: Sequence[tuple[int, int]], shard: bool = False) -> Iterator[str]:
    """A line for each batch."""
    bench.free()
    base = bench.allocated()
    model = new_llama(bench)
    weights = sum(param.nbytes for param in model.parameters())
    count = sum(param.numel() for param in model.parameters())
    full = estimate(made("AdamW", list(model.parameters()), lr=1e-6))
    optimizer = BlockOptimizer(
        made("AdamW", list(model.parameters()), lr=1e-6),
        list(model.named_parameters()),
        switch_block_every=PERIOD,
        switch_mode="ascending",
        verbose=0,
    )
    guess = estimate(optimizer)
    if shard:
        fsdp.attach(fsdp.shard(model), optimizer)
    yield (
        f"Llama of {count / 1e9:.2f} billion random weights in bfloat16 ({weights / GB:.2f} GB), non-reentrant "
        f"gradient checkpointing, {len(optimizer.blocks)} blocks of one layer, AdamW on float32 masters, loss on "
        "random tokens, ascending blocks from the first on. Medians of two blocks."
    )
    yield f"\n{heading(BADAM_HEADER)}"
    for batch, length in batches:
        yield badam_line(bench, model, optimizer, base, weights + guess.in_step, batch, length)
    if shard:
        return
    yield (
        f"\n`estimate` of BAdam, beyond the weights: {guess.between_steps / GB:.2f} GB between steps, "
        f"{guess.in_step / GB:.2f} GB in a step, {guess.after_backward / GB:.2f} GB after backward; activations and "
        "logits are not in it. BAdam's paper (arXiv 2404.02827) measured 23.5 GB in all for Llama 3-8B with batches of "
        "2 sequences of up to 1024 tokens and gradient checkpointing; GB are 10^9 bytes here, and the peak is what "
        "torch has allocated at most, without its cache and CUDA's own memory.\n\n"
        f"AdamW on all weights, by `estimate` alone: {weights / GB:.1f} GB of weights and {full.in_step / GB:.1f} GB "
        f"in a step, {(weights + full.in_step) / GB:.1f} GB in all."
    )


def badam_line(bench: Bench, model: Any, optimizer: Any, base: int, guessed: int, batch: int, length: int) -> str:
    """Train two blocks."""
    clock, vocab = Clock(bench), bench.size.model["vocab_size"]
    data = torch.randint(0, vocab, (batch, length), device=bench.device)
    passes: list[float] = []
    taken: dict[bool, list[float]] = {False: [], True: []}
    peak = in_step = 0

    def backward() -> None:
        loss: Tensor = model(input_ids=data, labels=data).loss
        loss.backward()

    for step in range(2 * PERIOD):
        bench.reset_peak()
        passed = clock(backward).device
        peak = max(peak, bench.peak())
        bench.reset_peak()
        stepped = clock(optimizer.step).device
        peak, in_step = max(peak, bench.peak()), max(in_step, bench.peak())
        optimizer.zero_grad()
        # The first step of a block allocates its state, and the last one ends with the switch to the next.
        if step % PERIOD >= 2:
            passes.append(passed)
            taken[step % PERIOD == PERIOD - 1].append(stepped)
    backward_ms, step_ms = median(passes), median(taken[False])
    switch_ms = median(taken[True]) - step_ms
    tokens = batch * length
    return row((
        f"{batch} x {length}",
        f"{1000 * tokens / (backward_ms + step_ms):.0f}",
        f"{1000 * tokens / backward_ms:.0f}",
        f"{backward_ms:.1f}",
        f"{step_ms:.2f}",
        f"{switch_ms:.2f}",
        f"{(peak - base) / GB:.2f}",
        f"{(in_step - base) / GB:.2f}",
        f"{guessed / GB:.2f}",
    ))  # fmt: skip


SECTIONS: dict[str, tuple[str, Callable[[Bench], Iterator[str]]]] = {
    "bandwidth": ("Copy bandwidth", bandwidth),
    "steps": ("Steps at the shapes of one layer of Llama 8B", steps),
    "masters": ("bfloat16 weights", masters),
    "badam": ("BAdam on Llama 3-8B", badam),
    "sharded": ("BAdam on Llama 3-8B, weights sharded over one rank", sharded),
    "tensors": ("Many small tensors", tensors),
    "galore": ("GaLore", galore),
    "compiled": ("A compiled formula", compiled),
}
"""In the order of a run: decompositions and a compiler, which may take long, come last."""


def environment(bench: Bench) -> str:
    """The machine, versions, the date, and how times are taken."""
    gpu = torch.cuda.get_device_name(bench.device) if bench.on_gpu else f"no GPU, {platform.machine()} CPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {version('transformers')}"
    medians = f"Medians of {bench.size.repeats} after {WARM_UP} of warm-up, sides in turn."
    return f"{gpu}; {versions}; {date.today().isoformat()}. {medians}"


def run_section(bench: Bench, name: str) -> tuple[str, bool]:
    """Its part of the report, and whether it went through."""
    title, section = SECTIONS[name]
    lines, good, begin = [f"## {title}", "", section.__doc__ or "", ""], True, time.perf_counter()
    try:
        for line in section(bench):
            click.echo(line)
            lines.append(line)
    except Exception:
        good = False
        lines += ["", "This section failed:", "", "```", traceback.format_exc().rstrip(), "```"]
        click.echo(lines[-2])
    bench.free()
    click.echo(f"-- {name}: {'done' if good else 'FAILED'} after {time.perf_counter() - begin:.1f} s", err=True)
    return "\n".join(lines), good


@click.command(help=(__doc__ or "").partition("\n")[0], context_settings={"show_default": True})
@click.option("--section", "chosen", type=click.Choice(list(SECTIONS)), multiple=True, help="[default: all of them]")
@click.option("--device", default="cuda")
@click.option("--size", default="llama-8b", type=click.Choice(list(SIZES)))
@click.option("--output", default=Path("docs/benchmarks_gpu.md"), type=click.Path(path_type=Path))
def main(chosen: Sequence[str], device: str, size: str, output: Path) -> None:
    """Write the report."""
    bench = Bench(torch.device(device), SIZES[size])
    command = f"python benchmarks/gpu.py{''.join(f' --section {name}' for name in chosen)}"
    report = [f"# Benchmarks on one GPU\n\n```\n{command}\n```\n\n{environment(bench)}"]
    click.echo(report[0])
    failed = []
    for name in chosen or SECTIONS:
        text, good = run_section(bench, name)
        report.append(text)
        failed += [] if good else [name]
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("\n\n".join(report) + "\n")
    if failed:
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
