"""Try every optimizer under every host, with and without LoRA, and write docs/compatibility.md of what was found.

    python benchmarks/compatibility.py                      # every cell, 5 to 15 minutes on two cores
    python benchmarks/compatibility.py --host FSDP2         # a column anew; the others as they were found last
    python benchmarks/compatibility.py --optimizer CAME     # a row, printed

A cell is two real runs of a small Llama in float64 on two gloo ranks, on its weights and on LoRA's adapters.  It is
good if the losses are finite, the weights after five steps are those of one process that averages the ranks' gradients,
and a run that saves after three steps is, from new objects of other weights, bit for bit the run that goes on.
"""

from __future__ import annotations

import functools
import gc
import inspect
import itertools
import json
import logging
import math
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import click
import torch
import torch.distributed as dist
from common import environment, heading, llama, row
from peft import LoraConfig, get_peft_model  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import colossal_bcd
from colossal_bcd import BlockOptimizer, BlockOptimizerRatio, fsdp
from colossal_bcd.low_rank import ReducedGradientOptimizer
from colossal_bcd.sharding import Layout
from colossal_bcd.sharding.dtensor import MeshAxes, is_dtensor, layout_of, local_values
from colossal_bcd.testing import run_ranks

ROOT = Path(__file__).parents[1]
PAGE, FOUND = ROOT / "docs/compatibility.md", ROOT / "build/compatibility"
RANKS, LAYERS, VOCAB, HIDDEN = 2, 2, 120, 32
"""Tensor parallelism pads this vocabulary to 128 rows; a pipeline's stages have a layer each."""
SAVED, STEPS, PERIOD = 3, 5, 2
"""Steps before files are written, which is in the middle of a block, steps in all, and those of a block."""
LR = {"SGD": 0.05, "Lion": 1e-4}
"""Of others 1e-3."""
BOUND_8BIT = 0.1
"""As `Run.bound`, where moments are kept in 8 bits, whose chunks are others on other meshes."""
BLOCKS = "BlockOptimizer over "
BREAD = "BlockOptimizer with sgd_mode (BREAD)"
BOUND_WAITING = 2**-8
"""As `Run.bound`, where BREAD keeps the gradients of a pipeline's earlier micro-batches in bfloat16."""
NOT_RUN = "not run"
BASES = ("AdamW", "SGD", "Lion", "Lamb", "Adafactor", "CAME", "GaLoreAdamW")
"""What blocks are tried with: every rule, and a low-rank form."""
TIMEOUT = 900.0
Make: TypeAlias = Callable[[nn.Module, bool, int], Optimizer]
"""Makes an optimizer of a model, of whether it has adapters, and of the stages of its pipeline."""


def base(name: str, params: Sequence[tuple[str, nn.Parameter]]) -> Optimizer:
    """A registered optimizer over named parameters; what has a low-rank form projects the matrices of the layers."""
    cls: Any = getattr(colossal_bcd, name)
    groups: Any = [param for _, param in params]
    if issubclass(cls, ReducedGradientOptimizer):
        inside = {key for key, param in params if param.dim() == 2 and "layers" in key}
        rest = [param for key, param in params if key not in inside]
        groups = [{"params": [param for key, param in params if key in inside], "rank": 2, "update_proj_gap": 2}]
        groups += [{"params": rest}] if rest else []
    taken = inspect.signature(cls).parameters
    wanted = {"relative_step": False, "momentum": 0.9, "random_from_step": 3, "min_8bit_size": 0}
    options = {key: value for key, value in wanted.items() if key in taken}
    made: Optimizer = cls(groups, lr=LR.get(name.removeprefix("GaLore").removeprefix("GoLore"), 1e-3), **options)
    return made


def plain(name: str, model: nn.Module, lora: bool, stages: int) -> Optimizer:
    """All that may train, in every step."""
    return base(name, [(key, param) for key, param in model.named_parameters() if param.requires_grad])


def in_blocks(name: str, model: nn.Module, lora: bool, stages: int, **options: Any) -> Optimizer:
    """Blocks of a layer, or, as a pipeline's stages have a block each, of a layer of every stage."""
    prefix = "base_model.model.model.layers." if lora else "model.layers."
    each = LAYERS // stages
    blocks = [[f"{prefix}{index + stage * each}." for stage in range(stages)] for index in range(each)]
    given: dict[str, Any] = {"switch_block_every": PERIOD, "switch_mode": "ascending", "verbose": 0, **options}
    if lora:  # blocks train the weights below adapters, which peft has frozen
        given["lora_mode"] = "all"
    named = list(model.named_parameters())
    return BlockOptimizer(base(name, named), named, blocks, **given)


def shares(model: nn.Module, lora: bool, stages: int) -> Optimizer:
    """BAdam's other form: a share of every tensor."""
    named = [(key, param) for key, param in model.named_parameters() if param.requires_grad]
    params = [param for _, param in named]
    return BlockOptimizerRatio(params, named, update_ratio=0.3, switch_every=PERIOD, lr=1e-3, verbose=0)


def optimizers() -> dict[str, Make]:
    """Rows of the page: every registered optimizer, blocks over some, BREAD, and shares of tensors."""
    names = [name for name in colossal_bcd.__all__ if _is_plain(name)]
    return {
        **{name: partial(plain, name) for name in names},
        **{f"{BLOCKS}{name}": partial(in_blocks, name) for name in names if name in BASES},
        BREAD: partial(in_blocks, "AdamW", sgd_mode="all"),
        "BlockOptimizerRatio": shares,
    }


def _is_plain(name: str) -> bool:
    cls = getattr(colossal_bcd, name)
    return isinstance(cls, type) and issubclass(cls, Optimizer) and not name.startswith("Block")


def model_of(lora: bool, seed: int) -> nn.Module:
    """The same on every rank."""
    model = llama(HIDDEN, LAYERS, VOCAB, seed=seed, tie_word_embeddings=False)
    if lora:
        torch.manual_seed(seed + 1)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    return model.double().train()


def batch(step: int, part: int) -> Tensor:
    """[2, 8] tokens of one part of a step's batch."""
    return torch.randint(0, VOCAB, (2, 8), generator=torch.Generator().manual_seed(10 * step + part))


class Run:
    """torch's DDP around the model, a plain loop, and `torch.save`; other hosts say what differs.

    Args:
        make: of the optimizer.
        lora: adapters train.
        seed: of the weights.
    """

    stages = 1
    bound = 1e-12
    """Of the difference of weights by how far training moves them, both as norms."""

    def __init__(self, make: Make, lora: bool, seed: int) -> None:
        self.make, self.lora = make, lora
        self.host(model_of(lora, seed))

    def start(self, model: nn.Module) -> Optimizer:
        """The optimizer of this run."""
        return self.make(model, self.lora, self.stages)

    def host(self, model: nn.Module) -> None:
        """Give model and optimizer to the host."""
        self.optimizer: Any = self.start(model)
        self.model: Any = DistributedDataParallel(model, find_unused_parameters=True)

    @property
    def module(self) -> nn.Module:
        """The user's model."""
        inner: nn.Module = self.model.module
        return inner

    def loss(self, step: int) -> float | None:
        """Forward and backward of this rank's part of a batch; None where a pipeline does not tell."""
        tokens = batch(step, dist.get_rank())
        loss = self.model(input_ids=tokens, labels=tokens).loss
        self.backward(loss)
        return float(loss)

    def backward(self, loss: Tensor) -> None:
        """Of the loss."""
        loss.backward()

    def step(self, number: int) -> None:
        """One step.

        Raises:
            FloatingPointError: its loss is not finite.
        """
        loss = self.loss(number)
        if loss is not None and not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {number} is {loss}")
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> dict[str, tuple[Layout, Tensor]]:
        """This rank's part of every weight, flattened and without padding, and which part that is."""
        known, axes, found = getattr(self.optimizer, "layouts", {}), MeshAxes(), {}
        for name, param in self.module.named_parameters():
            layout = known.get(param) or (layout_of(param, axes) if is_dtensor(param) else None)
            layout = layout or Layout.whole(tuple(param.shape))
            found[name] = layout, local_values(param).detach().reshape(-1)[: layout.num_local].clone()
        return found

    def save(self, folder: str) -> None:
        """Write model and optimizer."""
        if dist.get_rank() == 0:
            torch.save((self.module.state_dict(), self.optimizer.state_dict()), f"{folder}/run.pt")

    def load(self, folder: str) -> None:
        """Read what `save` has written."""
        model, optimizer = torch.load(f"{folder}/run.pt", weights_only=False)
        self.module.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)


class Sharded(Run):
    """torch's FSDP2 without ColossalAI."""

    def host(self, model: nn.Module) -> None:
        fsdp.enable_cpu()
        fsdp.shard(model)
        self.optimizer = self.start(model)
        self.model = model
        self.engine = fsdp.attach(model, self.optimizer) if isinstance(self.optimizer, BlockOptimizer) else None

    @property
    def module(self) -> nn.Module:
        inner: nn.Module = self.model
        return inner

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"model": dict(self.module.named_parameters())}
        if self.engine is None:
            state["optim"] = get_optimizer_state_dict(self.module, self.optimizer)
        return state

    def save(self, folder: str) -> None:
        save_dcp(self._state(), checkpoint_id=f"{folder}/dcp")
        if self.engine is not None:
            fsdp.save_optimizer(self.engine, f"{folder}/optimizer")

    def load(self, folder: str) -> None:
        state = self._state()
        load_dcp(state, checkpoint_id=f"{folder}/dcp")
        if self.engine is None:
            set_optimizer_state_dict(self.module, self.optimizer, optim_state_dict=state["optim"])
        else:
            fsdp.load_optimizer(self.engine, f"{folder}/optimizer")


class Boosted(Run):
    """ColossalAI's booster with a plugin of this package."""

    plugin = "TorchDDPPlugin"
    options: Mapping[str, Any] = {}

    def host(self, model: nn.Module) -> None:
        optimizer = self.start(model)
        self.booster = booster_of(self.plugin, tuple(self.options.items()))
        self.model, self.optimizer, *_ = self.booster.boost(model, optimizer)

    @property
    def module(self) -> nn.Module:
        inner: nn.Module = self.model.unwrap(unwrap_peft=False)
        return inner

    def backward(self, loss: Tensor) -> None:
        self.booster.backward(loss, self.optimizer)

    def save(self, folder: str) -> None:
        self.booster.save_model(self.model, f"{folder}/model", shard=True, use_safetensors=True)
        self.booster.save_optimizer(self.optimizer, f"{folder}/optimizer", shard=True)

    def load(self, folder: str) -> None:
        self.booster.load_model(self.model, f"{folder}/model")
        self.booster.load_optimizer(self.optimizer, f"{folder}/optimizer")


@functools.cache
def booster_of(plugin: str, options: tuple[tuple[str, Any], ...]) -> Any:
    """One for all cells: a plugin makes process groups, and torch waits for ever where names of groups come again."""
    from colossalai.booster import Booster

    from colossal_bcd import booster

    return Booster(plugin=getattr(booster, plugin)(**dict(options)))


class Zero1(Boosted):
    """Masters and state are divided."""

    plugin, options = "LowLevelZeroPlugin", {"stage": 1, "precision": "fp32"}


class Zero2(Boosted):
    """Gradients, too."""

    plugin, options = "LowLevelZeroPlugin", {"stage": 2, "precision": "fp32"}


class Sharding(Boosted):
    """Weights, too."""

    plugin, options = "FSDP2Plugin", {"precision": "fp32"}


class Tensors(Boosted):
    """Every rank has a part of each matrix, and all of the batch."""

    # A Llama does part of its work in float32, whose sums are taken in another order, and Adam divides by gradients
    # that nearly cancel.  What is wrong differs by 1e-2 and more.
    bound = 1e-4
    plugin = "HybridParallelPlugin"
    options: Mapping[str, Any] = {"tp_size": 2, "pp_size": 1, "zero_stage": 0, "precision": "fp32"}

    def loss(self, step: int) -> float | None:
        tokens = torch.cat([batch(step, part) for part in range(RANKS)])
        loss = self.model(input_ids=tokens, labels=tokens).loss
        self.backward(loss)
        return float(loss)


class Stages(Boosted):
    """Every rank has half of the layers; the parts of the batch follow each other."""

    stages = 2
    bound = Tensors.bound
    plugin = "HybridParallelPlugin"
    options: Mapping[str, Any] = {
        "tp_size": 1,
        "pp_size": 2,
        "zero_stage": 0,
        "precision": "fp32",
        "num_microbatches": RANKS,
    }

    def loss(self, step: int) -> float | None:
        tokens = torch.cat([batch(step, part) for part in range(RANKS)])
        data = iter([{"input_ids": tokens, "labels": tokens}])
        found = self.booster.execute_pipeline(
            data, self.model, lambda out, _: out.loss, self.optimizer, return_loss=True
        )
        return None if found["loss"] is None else float(found["loss"])


HOSTS: Mapping[str, type[Run]] = {
    "torch DDP": Run,
    "TorchDDPPlugin": Boosted,
    "LowLevelZeroPlugin stage 1": Zero1,
    "LowLevelZeroPlugin stage 2": Zero2,
    "HybridParallelPlugin tp 2": Tensors,
    "HybridParallelPlugin pp 2": Stages,
    "FSDP2": Sharded,
    "FSDP2Plugin": Sharding,
}
"""Columns of the page."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What one run has shown, on one rank or on all."""

    said: str = ""
    """The error that refused it."""
    unsaved: str = ""
    """The error that refused to save or to load."""
    error: float = math.inf
    """Difference of weights from one process."""
    resumed: float = math.inf
    """Difference of weights that go on from files; 0 where every bit is equal."""


@dataclass(frozen=True)
class Cell:
    """One optimizer under one host."""

    weights: Trial
    lora: Trial
    bound: float

    def text(self, number: Callable[[str], str]) -> str:
        """What the page says.

        Args:
            number: of a footnote, by what was said.
        """
        if self.weights.said:
            return f"no {number(self.weights.said)}"
        found = self._lacks(self.weights, "", number)
        found += [f"no LoRA {number(self.lora.said)}"] if self.lora.said else self._lacks(self.lora, "LoRA ", number)
        return ", ".join(["yes", *dict.fromkeys(found)])

    def _lacks(self, trial: Trial, what: str, number: Callable[[str], str]) -> list[str]:
        """What is not as it should be: nothing, as a rule."""
        if not trial.error <= self.bound:
            return [f"{what}**differs by {trial.error:.0e}**"]
        if trial.unsaved:
            return [f"{what}no files {number(trial.unsaved)}"]
        return [f"{what}**resumes differently**"] if trial.resumed else []


def alone(names: Sequence[str], folder: str) -> None:
    """Write the weights before and after the steps of one process that averages the gradients of a batch's parts."""
    for name, lora in itertools.product(names, (False, True)):
        for stages in (1, 2) if name.startswith("Block") else (1,):
            try:
                model = model_of(lora, 0)
                before = {key: param.detach().clone() for key, param in model.named_parameters()}
                optimizer = optimizers()[name](model, lora, stages)
            except (ValueError, TypeError) as error:
                logging.getLogger(__name__).info("%s: %s", name, error)  # hosts are refused in the same way
                continue
            for step in range(STEPS):
                tokens = [batch(step, part) for part in range(RANKS)]
                torch.stack([model(input_ids=each, labels=each).loss / RANKS for each in tokens]).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            after = {key: param.detach() for key, param in model.named_parameters()}
            torch.save((before, after), _reference(folder, name, lora, stages))


def _reference(folder: str, name: str, lora: bool, stages: int) -> str:
    return f"{folder}/{name}, {'LoRA' if lora else 'weights'}, {stages}.pt"


def trial(host: type[Run], name: str, lora: bool, folder: str) -> Trial:
    """Train, save, go on, and go on again from the files."""
    make = optimizers()[name]
    try:
        run = host(make, lora, 0)
        for step in range(SAVED):
            run.step(step)
    except Exception as raised:  # whatever is said is what the page says
        return Trial(said=_told(raised))
    unsaved, files = "", [tempfile.mkdtemp(dir=folder)]
    dist.broadcast_object_list(files)
    try:
        run.save(files[0])
    except Exception as raised:
        unsaved = _told(raised)
    dist.barrier()
    for step in range(SAVED, STEPS):
        run.step(step)
    got = run.weights()
    stages = host.stages if name.startswith("Block") else 1
    before, want = torch.load(_reference(folder, name, lora, stages), weights_only=True)
    wanted = {key: _part(layout, want[key]) for key, (layout, _) in got.items()}
    started = {key: _part(layout, before[key]) for key, (layout, _) in got.items()}
    error = _difference({key: local for key, (_, local) in got.items()}, wanted, started)
    if unsaved:
        return Trial(unsaved=unsaved, error=error)
    del run
    gc.collect()
    try:
        again = host(make, lora, 7)
        again.load(files[0])
        for step in range(SAVED, STEPS):
            again.step(step)
    except Exception as raised:
        return Trial(unsaved=_told(raised), error=error)
    resumed = {key: local for key, (_, local) in again.weights().items()}
    return Trial(error=error, resumed=_difference(resumed, {key: local for key, (_, local) in got.items()}, started))


def _part(layout: Layout, whole: Tensor) -> Tensor:
    return layout.shard(whole).reshape(-1)[: layout.num_local]


def _difference(got: Mapping[str, Tensor], want: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """Norm of the difference by the norm of the movement, of this rank's parts; infinite for what is no number."""
    wrong = sum(float((got[name] - want[name]).square().sum()) for name in want)
    moved = sum(float((want[name] - start[name]).square().sum()) for name in want)
    found = math.sqrt(wrong / moved) if moved else math.inf
    return found if math.isfinite(found) else math.inf


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def on_ranks(host: str, names: Sequence[str], folder: str) -> dict[str, tuple[Trial, Trial]]:
    """What each rank runs: every cell of a host, on weights and on adapters."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    found = {}
    for name in names:
        trials = []
        for lora in (False, True):
            trials.append(trial(HOSTS[host], name, lora, folder))
            gc.collect()
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, bool(trials[-1].said))
            if len(set(everyone)) > 1:
                raise RuntimeError(f"{name} under {host} is refused on some ranks alone: {trials[-1].said}")
        found[name] = trials[0], trials[1]
    return found


def measured(cells: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], Cell]:
    """Run cells, in one start of ranks for each host.

    Args:
        cells: names of optimizers by host.
    Returns:
        The cell of each optimizer and host.
    """
    # On a machine that does much else a rank may be late.
    os.environ.setdefault("COLOSSAL_BCD_TIMEOUT", "600")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(1, alone, list(dict.fromkeys(itertools.chain(*cells.values()))), folder, timeout=TIMEOUT)
        for host, names in ((host, names) for host, names in cells.items() if names):
            begin = time.monotonic()
            ranks = run_ranks(RANKS, on_ranks, host, names, folder, timeout=TIMEOUT)
            for name in names:
                weights, lora = (together([each[name][which] for each in ranks]) for which in (0, 1))
                bound = BOUND_8BIT if "8bit" in name else HOSTS[host].bound
                bound = BOUND_WAITING if name == BREAD and HOSTS[host].stages > 1 else bound
                found[name, host] = Cell(weights, lora, bound)
            click.echo(f"-- {host}: {len(names)} cells after {time.monotonic() - begin:.0f} s", err=True)
    return found


def together(trials: Sequence[Trial]) -> Trial:
    """What all ranks have shown."""
    return Trial(
        said=next((each.said for each in trials if each.said), ""),
        unsaved=next((each.unsaved for each in trials if each.unsaved), ""),
        error=max(each.error for each in trials),
        resumed=max(each.resumed for each in trials),
    )


TEXT = f"""# Compatibility

```
python benchmarks/compatibility.py
```

writes this page. Every cell is two real runs of a small Llama of {LAYERS} layers in float64 on {RANKS} gloo ranks: one
on its weights, and one on LoRA's adapters (peft), where a BlockOptimizer trains the blocks below the adapters and the
adapters beside them (`lora_mode="all"`). "yes" says of both that

- the weights after {STEPS} steps are those of one process that averages the gradients of both ranks' batches; the last
  table says how near;
- a run that is saved after {SAVED} steps, in the middle of a block, and loaded into new objects that began with other
  weights is after {STEPS} steps, bit for bit, the run that went on.

What is not so is said in the cell, and below the table by which error. `tests/benchmarks/test_compatibility.py` runs a
part of the cells again, and all of them in `make test-full`. Updates on one process are compared with textbook code in
`tests/optim/test_conformance.py`.
"""
AFTER = """Under a pipeline every stage has an active block of its own, and BREAD keeps gradients of earlier
micro-batches in bfloat16, of which the last table has the difference. torch.distributed.checkpoint, which plain FSDP2
uses, has moments of 8 bits in float32, and quantises them again ([FSDP2](fsdp.md)). What `booster.save_optimizer`
writes loads on other meshes, too ([checkpoints](checkpoints.md)). [ReLoRaModel](relora.md), the corrections of
[BREAD](bread.md) and [optimizers of other packages](base_optimizers.md) have tables on their pages.
"""


def page(found: Mapping[tuple[str, str], Cell]) -> str:
    """The page of all cells."""
    notes: list[str] = []

    def number(said: str) -> str:
        if said not in notes:
            notes.append(said)
        return f"[{notes.index(said) + 1}]"

    lines = [TEXT, heading(("optimizer", *HOSTS))]
    for name in optimizers():
        cells = [found.get((name, host)) for host in HOSTS]
        lines.append(row([name, *(NOT_RUN if cell is None else cell.text(number) for cell in cells)]))
    lines += ["", *(f"{index}. {said}" for index, said in enumerate(notes, 1)), "", AFTER]
    lines += [
        "## How near",
        "",
        "Largest difference of weights from one process, by how far training moved them, both as norms.",
    ]
    lines += ["", heading(("host", "moments as they are", "moments in 8 bits"))]
    for host in dict.fromkeys(host for _, host in found):
        errors: dict[bool, list[float]] = {False: [], True: []}
        for (name, at), cell in found.items():
            if at == host:
                tried = [trial.error for trial in (cell.weights, cell.lora) if not trial.said]
                errors["8bit" in name] += tried
        lines.append(row([host, *(f"{max(errors[few], default=0):.0e}" for few in (False, True))]))
    lines += ["", environment("colossalai", "transformers", "peft", "bitsandbytes")]
    return "\n".join(lines) + "\n"


def read_page(text: str) -> dict[tuple[str, str], str]:
    """The cells of a page, with what was said in the place of its number."""
    notes = dict(re.findall(r"^(\d+)\. (.+)$", text, re.MULTILINE))
    table = text.partition("| optimizer |")[2].partition("\n\n")[0].splitlines()[2:]
    found = {}
    for line in table:
        name, *cells = (cell.strip() for cell in line.strip("| ").split(" | "))
        for host, cell in zip(HOSTS, cells, strict=True):
            found[name, host] = re.sub(r"\[(\d+)\]", lambda match: notes[match[1]], cell)
    return found


def summary(cells: Mapping[tuple[str, str], str]) -> str:
    """The table of the README: optimizers of equal rows in one, without what errors say, and hosts that were tried."""
    hosts = [host for host in HOSTS if any(cells[name, host] != NOT_RUN for name in optimizers())]
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in optimizers():
        found = tuple(_short(cells[name, host]) for host in hosts)
        rows.setdefault(found, []).append(name)
    lines = [heading(("optimizer", *hosts))]
    for found, names in rows.items():
        alone = [name for name in names if not name.startswith(BLOCKS)]
        blocks = [name.removeprefix(BLOCKS) for name in names if name.startswith(BLOCKS)]
        told = [", ".join(alone)] * bool(alone)
        told += [f"{BLOCKS}{'each of these' if blocks == alone else ', '.join(blocks)}"] * bool(blocks)
        lines.append(row(["; ".join(told), *found]))
    return "\n".join(lines) + "\n"


def _short(cell: str) -> str:
    """A cell without the error."""
    return re.sub(r"(no LoRA|no files|no) \w+: .*", r"\1", cell)


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--optimizer", "names", multiple=True, help="Rows of the page.  [default: all]")
@click.option("--host", "hosts", type=click.Choice(list(HOSTS)), multiple=True, help="Columns.  [default: all]")
@click.option("--keep", is_flag=True, help="Run nothing: the page again from what was found last.")
def main(names: Sequence[str], hosts: Sequence[str], keep: bool) -> None:
    """Write the page, or print some cells."""
    torch.set_num_threads(1)
    if keep and (names or hosts):
        raise click.UsageError("--keep: got it with --optimizer or --host, expected it alone. Leave one out.")
    unknown = set(names) - set(optimizers())
    if unknown:
        raise click.UsageError(
            f"--optimizer: got {', '.join(sorted(unknown))}, expected rows of the page: {'; '.join(optimizers())}."
        )
    if names:
        found = measured({host: list(names) for host in hosts or HOSTS})
        for (name, host), cell in found.items():
            errors = f"weights {cell.weights.error:.0e}, LoRA {cell.lora.error:.0e}"
            click.echo(f"{name} | {host}: {cell.text(str)} ({errors})")
        return
    FOUND.mkdir(parents=True, exist_ok=True)
    for host in () if keep else hosts or HOSTS:
        cells = [[name, asdict(cell)] for (name, _), cell in measured({host: list(optimizers())}).items()]
        (FOUND / f"{host}.json").write_text(json.dumps(cells))
    found = {}
    for host in (host for host in HOSTS if (FOUND / f"{host}.json").is_file()):
        for name, cell in json.loads((FOUND / f"{host}.json").read_text()):
            found[name, host] = Cell(Trial(**cell["weights"]), Trial(**cell["lora"]), cell["bound"])
    PAGE.write_text(page(found))
    click.echo(summary(read_page(PAGE.read_text())))


if __name__ == "__main__":
    main()
