"""A whole run: train an epoch, evaluate, save, record, and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from torch import Tensor, nn

from fambav.engine import checkpoint
from fambav.engine.checkpoint import CheckpointError, State
from fambav.engine.evaluate import Scores
from fambav.engine.memory import Meter, resident_mib
from fambav.engine.record import BEST, CHECKPOINT, WEIGHTS, Record, Recorder
from fambav.engine.runtime import Console
from fambav.engine.train import Summary, Update, train_epoch


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        epochs: Epochs done.
        best_acc1: Highest top-1 of the raw weights so far, in percent; -1 before the first epoch.
        history: One record per epoch.
    """

    epochs: int = 0
    best_acc1: float = -1.0
    history: list[Record] = field(default_factory=list)


def snapshot(update: Update, progress: Progress) -> State:
    """Return everything that changes in a run, under the names that DeiT's tools know."""
    average, scaler = update.average, update.precision.scaler
    return {
        "model": update.model.state_dict(),
        "optimizer": update.optimizer.state_dict(),
        "model_ema": None if average is None else average.model.state_dict(),
        "scaler": scaler.state_dict() if scaler.is_enabled() else None,
        "epoch": progress.epochs - 1,
        "best_acc1": progress.best_acc1,
        "history": progress.history,
    }


def restore(state: State, update: Update) -> Progress:
    """Put a run back to where `state` was saved.

    Args:
        state: A snapshot.
        update: Of the same model and optimizer; changed in place.

    Raises:
        CheckpointError: If the state is not of such a run.
    """
    try:
        update.model.load_state_dict(state["model"])
        update.optimizer.load_state_dict(state["optimizer"])
        if update.average is not None:
            update.average.model.load_state_dict(state["model_ema"])
        if update.precision.scaler.is_enabled():
            update.precision.scaler.load_state_dict(state["scaler"])
        history = [dict(record) for record in state["history"]]
        return Progress(state["epoch"] + 1, state["best_acc1"], history)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(": ")
        raise CheckpointError(
            f"checkpoint does not hold the state of this run ({reason}), expected one of ours"
        ) from error


@dataclass(kw_only=True)
class Fit:
    """A run from where it stands to its last epoch.

    Attributes:
        update: One step.
        batches: All batches that are left, in order.
        updates: Updates in an epoch.
        images: Images in an update, over all processes.
        epochs: Epochs of the whole run.
        score: Evaluates a model.
        facts: What every checkpoint says besides the state, plain data.
        strings: The same for the file of weights alone.
        tokens: Tokens seen by each layer; empty if the model has no such thing.
        meter: Measures memory.
        console: Where lines go.
        progress: How far the run has come; changed in place.
        recorder: Where files go; None in every process but the main one.
        every: Updates from one line to the next.
    """

    update: Update
    batches: Iterator[tuple[Tensor, Tensor]]
    updates: int
    images: int
    epochs: int
    score: Callable[[nn.Module], Scores]
    facts: State
    strings: dict[str, str]
    tokens: Sequence[int]
    meter: Meter
    console: Console
    progress: Progress
    recorder: Recorder | None = None
    every: int = 10

    def __call__(self) -> None:
        """Run to the end.

        Raises:
            DivergedError: If the loss stops being a number.
        """
        start = time.perf_counter()
        for epoch in range(self.progress.epochs, self.epochs):
            self._epoch(epoch)
        spent = timedelta(seconds=round(time.perf_counter() - start))
        self.console.say(f"Training time {spent}")

    def _epoch(self, epoch: int) -> None:
        start = time.perf_counter()
        summary = self._train(epoch)
        trained = time.perf_counter()
        scores = self._evaluate()
        evaluated = time.perf_counter()
        record = {
            **self._trained(epoch, summary, trained - start),
            **scores,
            "eval_seconds": round(evaluated - trained, 3),
            "save_seconds": 0.0,
        }
        self.progress.epochs = epoch + 1
        self.progress.history.append(record)
        self._save(record)
        record["save_seconds"] = round(time.perf_counter() - evaluated, 3)
        if self.recorder is not None:
            self.recorder.epoch(record)

    def _train(self, epoch: int) -> Summary:
        first = epoch * self.updates
        last, clock = first, time.perf_counter()

        def report(done: int, losses: list[float]) -> None:
            nonlocal last, clock
            lr, now = self.update.lr(done - 1), time.perf_counter()
            speed = (done - last) * self.images / (now - clock)
            text = f"loss {losses[-1]:.4f}  lr {lr:.3g}  {speed:.0f} images/s"
            self.console.step(f"Epoch: [{epoch}]", done - first, self.updates, text)
            if self.recorder is not None:
                self.recorder.updates(done, losses, lr)
            last, clock = done, now

        return train_epoch(
            self.update,
            self.batches,
            updates=range(first, first + self.updates),
            first=self.meter.first_update(),
            every=self.every,
            report=report,
        )

    def _evaluate(self) -> Record:
        raw = self.score(self.update.model)
        self.console.say(raw.line())
        found = {f"test_{name}": getattr(raw, name) for name in ("loss", "acc1", "acc5")}
        if self.update.average is not None:
            averaged = self.score(self.update.average.model)
            self.console.say(f"EMA {averaged.line().removeprefix('* ')}")
            for name in ("loss", "acc1", "acc5"):
                found[f"test_ema_{name}"] = getattr(averaged, name)
        return found

    def _trained(self, epoch: int, summary: Summary, seconds: float) -> Record:
        rates = [self.update.lr(epoch * self.updates + step) for step in range(self.updates)]
        peak = self.meter.peak()
        return {
            "epoch": epoch,
            "train_lr": sum(rates) / len(rates),
            "train_loss": summary.loss,
            "skipped_updates": summary.skipped,
            "n_parameters": sum(p.numel() for p in self.update.model.parameters()),
            "tokens": list(self.tokens),
            "train_seconds": round(seconds, 3),
            "images_per_second": round(self.updates * self.images / seconds, 2),
            "peak_memory_mib": round(peak.mib, 3),
            "peak_memory_kind": peak.kind,
            "rss_mib": round(resident_mib(), 1),
        }

    def _save(self, record: Record) -> None:
        """Write the checkpoint, then the files that follow from it; the other processes wait."""
        best = record["test_acc1"] > self.progress.best_acc1
        self.progress.best_acc1 = max(record["test_acc1"], self.progress.best_acc1)
        self.console.say(f"Max accuracy: {self.progress.best_acc1:.2f}%")
        if self.recorder is not None:
            folder = self.recorder.folder
            checkpoint.save(
                folder / CHECKPOINT, {**snapshot(self.update, self.progress), **self.facts}
            )
            if best:
                checkpoint.copy(folder / CHECKPOINT, folder / BEST)
            weights = self.update.model.state_dict()
            checkpoint.save_weights(folder / WEIGHTS, weights, self.strings)
        self.update.processes.wait()
