"""The run: corpus, trainer, loop, and what is written at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import time

import torch
from data import Corpus, load_corpus
from events import Events
from interrupt import stop_request
from measure import MemoryProbe, RankFigures, Traffic, peak_bytes
from report import Curve, Point, Report, plot, print_report, write_losses
from rich.console import Console
from screen import Screen
from settings import Settings, SettingsError
from trainers import Trainer, launch, make_trainer
from transformers.utils import logging as transformers_logging

from colossal_bcd import BlockOptimizer
from colossal_bcd.testing import CollectiveCounter, live_bytes

EVAL_BATCH = 8


def run(settings: Settings, started: float) -> None:
    """Train as asked and write losses.csv, loss.png, table.md and the model to the output directory.

    Args:
        settings: the flags.
        started: time.monotonic() when the program began.
    """
    transformers_logging.set_verbosity_error()
    rank = launch(settings)
    console = Console(quiet=rank != 0, highlight=False)
    corpus = load_corpus(
        settings.text,
        settings.model,
        settings.tokenizer,
        settings.vocab_size,
        settings.sequence_length,
        held_out_batch=EVAL_BATCH * settings.data_ranks,
    )
    baseline = live_bytes()
    trainer = make_trainer(settings, corpus.tokenizer)
    loop = Loop(settings, trainer, corpus, MemoryProbe(settings, trainer.model, baseline))
    loop.run(Screen(console, settings))
    if rank == 0:
        settings.output.mkdir(parents=True, exist_ok=True)
        write_losses(loop.curve, settings.output / "losses.csv")
    if stop_request.received:
        step = loop.curve.num_steps
        console.print(f"stopped after step {step}; losses so far are in {settings.output}/losses.csv")
        if not settings.reference:
            console.print(f"{settings.output}/checkpoints has what --resume goes on from")
    else:
        finish(settings, trainer, corpus, loop, console, started)
    trainer.close()


class Loop:
    """Steps, held-out losses and measurements of one rank."""

    def __init__(self, settings: Settings, trainer: Trainer, corpus: Corpus, probe: MemoryProbe) -> None:
        self.curve = Curve()
        self._settings, self._trainer, self._corpus, self._probe = settings, trainer, corpus, probe
        self._ordinary, self._switching = Traffic(), Traffic()
        optimizer = trainer.optimizer
        base = optimizer.base_optimizer if isinstance(optimizer, BlockOptimizer) else optimizer
        base.register_step_post_hook(probe)

    def run(self, screen: Screen) -> None:
        """Train until the last step or until somebody asks to stop."""
        settings, trainer = self._settings, self._trainer
        taken, extra = trainer.resume() if settings.resume else (0, {})
        if taken >= settings.steps:
            raise SettingsError(f"--resume: the checkpoint is of a run that has taken all of its {taken} steps.")
        for values in extra.get("curve", []):
            self.curve.add(Point(**values))
        if not self.curve.points:
            self.curve.add(Point(step=0, loss=None, held_out=self._held_out_loss(), block=""))
        stop_request.training = True
        events = Events(settings, trainer.rank, taken)
        with screen, contextlib.closing(events):
            for step in range(taken + 1, settings.steps + 1):
                began = time.monotonic()
                block = self._block()
                due = step % settings.eval_every == 0 or step == settings.steps
                # Not the first step of a block, of which the probe measures the bytes.
                recorded = due and block in self._probe.results
                with events.recording(trainer.optimizer, recorded):
                    loss = self._step(step, block)
                loss, stop = trainer.mean([loss, float(stop_request.received)])
                seconds = time.monotonic() - began
                held_out = self._held_out_loss() if due and not stop else None
                point = Point(step=step, loss=loss, held_out=held_out, block=block)
                self.curve.add(point)
                rate = settings.batch_size * settings.sequence_length / seconds
                screen.show(point, rate)
                events.add(point, rate, trainer.optimizer, recorded)
                if stop or (settings.checkpoint_every and step % settings.checkpoint_every == 0):
                    trainer.checkpoint(step, {"curve": [dataclasses.asdict(point) for point in self.curve.points]})
                if stop:
                    stop_request.received = True
                    break
        stop_request.training = False

    def figures(self) -> RankFigures:
        """What this rank measured."""
        return RankFigures(
            memory=self._probe.largest,
            num_parameters=self._probe.num_parameters,
            peak=peak_bytes(),
            ordinary=self._ordinary,
            switching=self._switching,
        )

    def _step(self, step: int, block: str) -> float:
        batch = self._corpus.batch(step, self._settings.batch_size, self._settings.seed)
        self._probe.expect(block, batch.nbytes)
        with CollectiveCounter() as counter:
            loss = self._trainer.step(batch)
        optimizer = self._trainer.optimizer
        switched = isinstance(optimizer, BlockOptimizer) and optimizer.schedule.is_switch(optimizer.num_steps)
        (self._switching if switched else self._ordinary).add(counter)
        return loss

    def _block(self) -> str:
        optimizer = self._trainer.optimizer
        if not isinstance(optimizer, BlockOptimizer):
            return "all"
        return "+".join(block.name for block in optimizer.active_blocks())

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        trainer = self._trainer
        trainer.model.eval()
        batches = self._corpus.held_out.view(-1, EVAL_BATCH, self._corpus.held_out.shape[1])
        losses = [trainer.loss(batch).item() for batch in trainer.share(batches)]
        trainer.model.train()
        return trainer.mean([sum(losses) / len(losses)])[0]


def finish(settings: Settings, trainer: Trainer, corpus: Corpus, loop: Loop, console: Console, started: float) -> None:
    """Save the model, gather the figures of all ranks, and report on rank 0."""
    if settings.save:
        folder = settings.output / "model"
        trainer.save(folder)
        if trainer.rank == 0:
            corpus.tokenizer.save_pretrained(folder)
    figures = trainer.gather(loop.figures())
    if trainer.rank != 0:
        return
    report = Report(settings=settings, curve=loop.curve, ranks=figures, seconds=time.monotonic() - started)
    plot(report, settings.output / "loss.png")
    print_report(report, console, settings.output)
