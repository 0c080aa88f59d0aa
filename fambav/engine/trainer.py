"""A whole run: train an epoch, evaluate, save, record, and again.

An interrupted run saves its state, and resumes from there to the same bits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path

import torch

from fambav.engine import checkpoint
from fambav.engine.activations import ActivationMax
from fambav.engine.checkpoint import State
from fambav.engine.console import Console
from fambav.engine.memory import PeakMemory, resident_mib
from fambav.engine.preemption import LoaderError, Preempted, Preemption, Prefetcher
from fambav.engine.progress import Progress, snapshot
from fambav.engine.run_dir import BEST, CHECKPOINT, PREVIOUS, WEIGHTS, Record, Recorder
from fambav.engine.step import Batch, DivergedError, Losses, TrainStep
from fambav.tasks import Scores, Task

NOT_FINITE = "not_finite"  # folder with what is known of an update that is not finite


class UnsavedError(OSError):
    """The last state of a run could not be written."""


@dataclass(kw_only=True)
class _Epoch:
    """An epoch in training.

    Attributes:
        number: From 0.
        losses: Of its updates.
        resumed: The first update that this process makes.
        start: By the clock, earlier by the time spent on it before an interruption.
        reported: Updates done at the last line.
        reported_at: When that was.
    """

    number: int
    losses: Losses
    resumed: int
    start: float
    reported: int
    reported_at: float


@dataclass(kw_only=True)
class Trainer:
    """Trains from where a run stands to its last epoch.

    Attributes:
        task: Knows the metrics, and the lines that are printed of them.
        step: Makes an update.
        batches: All batches from here to the last epoch, in order.
        sample_indices: Samples in the batches of an update, over all processes, as plain data.
        updates: Updates in an epoch.
        images: Images in an update, over all processes.
        epochs: Epochs of the whole run.
        evaluate: Evaluates a model, reading its batches by a function `take`.
        facts: What every checkpoint holds besides the state, plain data.
        strings: The same for the file of weights alone.
        unreadable: Counts the samples that this process could not read so far.
        tokens: Tokens seen by each layer; empty if the model has no such thing.
        peak_memory: Measures memory.
        console: Prints lines.
        progress: How far the run is; changed in place.
        recorder: Writes the log; None in every process but the main one.
        log_every: Updates from one line to the next.
        save_every: Updates from one checkpoint to the next within an epoch; None for none there.
        activation_max: Measures outputs of layers; None for not.
        preemption: Notes signals; enter it before the run folder is written to.
        unsaved: Why the last state could not be written; None if it could.
        best_unsaved: Whether the last checkpoint is the best one and could not be kept as that.
    """

    task: Task
    step: TrainStep
    batches: Iterator[Batch]
    sample_indices: Callable[[int], Record]
    updates: int
    images: int
    epochs: int
    evaluate: Callable[..., Scores]
    facts: State
    strings: dict[str, str]
    unreadable: Callable[[], int]
    tokens: Sequence[int]
    peak_memory: PeakMemory
    console: Console
    progress: Progress
    recorder: Recorder | None = None
    log_every: int = 10
    save_every: int | None = None
    activation_max: ActivationMax | None = None
    preemption: Preemption = field(default_factory=Preemption)
    unsaved: OSError | None = None
    best_unsaved: bool = False

    def run(self) -> None:
        """Train to the end.

        Raises:
            DivergedError: If loss or gradient become NaN or infinite.
            Preempted: If a signal ended the run; its state is saved.
            LoaderError: If samples cannot be read; the state is saved.
            UnsavedError: If the last state could not be written.
        """
        start = time.perf_counter()
        batches = Prefetcher(
            self.batches,
            count=self.step.accumulate,
            processes=self.step.processes,
            preemption=self.preemption,
        )
        for epoch in range(self.progress.epochs, self.epochs):
            self._run_epoch(epoch, batches)
        self._check_saved()
        spent = timedelta(seconds=round(time.perf_counter() - start))
        self.console.write(f"Training time {spent}")

    def repair(self, source: Path, folder: Path) -> None:
        """Write the files that follow from the checkpoint resumed from, if a crash cut them off.

        Args:
            source: The checkpoint, whose state this run is in.
            folder: The run folder, whose own checkpoint may be damaged or missing.
        """
        with self._catching_unsaved():
            last = folder / CHECKPOINT
            if source.resolve() != last.resolve():
                checkpoint.copy(source, last)
            self._write_followers(folder)

    def _run_epoch(self, number: int, batches: Prefetcher) -> None:
        losses = self._train(number, batches)
        trained = time.perf_counter()
        with self._saving_at_end():
            scores = self._evaluate(batches)
        evaluated = time.perf_counter()
        record = {
            **self._training_record(number, losses),
            **scores,
            "eval_seconds": round(evaluated - trained, 3),
            "save_seconds": 0.0,
        }
        self.progress.end_epoch(record)
        self.console.write(self.task.best_line(self.progress.best(self.task)))
        self._report_unreadable()
        self._save()
        record["save_seconds"] = round(time.perf_counter() - evaluated, 3)
        if self.recorder is not None:
            self.recorder.epoch(record)

    def _train(self, number: int, batches: Prefetcher) -> Losses:
        """Make the updates of an epoch that are not done yet."""
        step, progress, first = self.step, self.progress, number * self.updates
        resumed = first if progress.updates is None else progress.updates
        losses, now = Losses(step, first, progress.losses), time.perf_counter()
        epoch = _Epoch(
            number=number,
            losses=losses,
            resumed=resumed,
            start=now - progress.seconds,
            reported=resumed,
            reported_at=now,
        )
        step.forward.train(step.training)
        try:
            for update in range(resumed, first + self.updates):
                with self._saving_at_end(epoch):
                    batches.prefetch()
                if self.save_every and len(losses) and losses.done % self.save_every == 0:
                    self._update_progress(epoch)
                    self._save()
                with self.peak_memory.first_update() if update == resumed else nullcontext():
                    loss = step(batches, update)
                losses.add(loss)
                due = len(losses) % self.log_every == 0 or update + 1 == first + self.updates
                if due or (step.checks_finite and not loss.isfinite()):
                    self._report(epoch)
        except DivergedError as error:
            progress.updates, progress.losses = error.update, losses.values[:-1]
            self._write_diverged(error)
            raise
        self._update_progress(epoch)
        return losses

    def _report(self, epoch: _Epoch) -> None:
        """Print a line on the updates since the last one."""
        losses, fetched = epoch.losses, epoch.losses.fetch()
        done, now = losses.done, time.perf_counter()
        speed = (done - epoch.reported) * self.images / (now - epoch.reported_at)
        text = f"loss {fetched[-1]:.4f}  lr {self.step.lr(done - 1):.3g}  {speed:.0f} images/s"
        text += f"  {timedelta(seconds=round(self._seconds_left(epoch, speed)))} left"
        self.console.step(f"Epoch: [{epoch.number}]", len(losses), self.updates, text)
        self._record_losses(losses, fetched)
        epoch.reported, epoch.reported_at = done, now

    def _seconds_left(self, epoch: _Epoch, speed: float) -> float:
        """Time to the end of the run at `speed` images per second, evaluations as the last one."""
        updates = self.epochs * self.updates - epoch.losses.done
        history = self.progress.history
        evaluation = history[-1]["eval_seconds"] if history else 0.0
        return updates * self.images / speed + (self.epochs - epoch.number) * float(evaluation)

    def _record_losses(self, losses: Losses, fetched: list[float]) -> None:
        if self.recorder is not None and fetched:
            self.recorder.updates(losses.done, fetched, self.step.lr(losses.done - 1))

    def _update_progress(self, epoch: _Epoch) -> None:
        """Bring the progress up to the updates done."""
        losses, progress = epoch.losses, self.progress
        self._record_losses(losses, losses.fetch())
        progress.updates, progress.losses = losses.done, losses.values
        progress.seconds = time.perf_counter() - epoch.start
        if progress.updates > epoch.resumed:
            progress.peak_mib = max(progress.peak_mib, self.peak_memory.peak().mib)
        if self.activation_max is not None:
            pairs = zip_longest(progress.maxima, self.activation_max.take(), fillvalue=0.0)
            progress.maxima = [max(pair) for pair in pairs]

    @contextmanager
    def _saving_at_end(self, epoch: _Epoch | None = None) -> Iterator[None]:
        """Save the state when something ends the run inside the block."""
        try:
            yield
        except (Preempted, LoaderError) as end:
            if epoch is not None:
                self._update_progress(epoch)
            self._save()
            self._check_saved()
            if isinstance(end, Preempted):
                self.console.write(
                    f"{end.signal.name}: saved after update {self.progress.updates}; "
                    "--resume auto goes on from there"
                )
            raise

    def _evaluate(self, batches: Prefetcher) -> Record:
        """Evaluate the raw weights, and the moving average if there is one."""
        scores = self.evaluate(self.step.model, take=batches.take)
        self.console.write(self.task.line(scores))
        record = {f"test_{name}": value for name, value in scores.metrics.items()}
        if self.step.average is not None:
            scores = self.evaluate(self.step.average.model, take=batches.take)
            self.console.write(f"EMA {self.task.line(scores).removeprefix('* ')}")
            record |= {f"test_ema_{name}": value for name, value in scores.metrics.items()}
        return record

    def _training_record(self, number: int, losses: Losses) -> Record:
        rates = [self.step.lr(number * self.updates + update) for update in range(self.updates)]
        seconds, summary = self.progress.seconds, losses.summary()
        return {
            "epoch": number,
            "train_lr": sum(rates) / len(rates),
            "train_loss": summary.loss,
            "skipped_updates": summary.skipped,
            "n_parameters": sum(p.numel() for p in self.step.model.parameters()),
            "tokens": list(self.tokens),
            "train_seconds": round(seconds, 3),
            "images_per_second": round(self.updates * self.images / seconds, 2),
            "peak_memory_mib": round(self.progress.peak_mib, 3),
            "peak_memory_kind": self.peak_memory.peak().kind,
            "rss_mib": round(resident_mib(), 1),
            **({} if self.activation_max is None else {"activation_max": self.progress.maxima}),
            **self._changed(number),
        }

    def _changed(self, epoch: int) -> Record:
        """The settings that are others from this epoch on, each before and now."""
        changes = [own for own in self.facts.get("changes", ()) if own["epoch"] == epoch]
        settings = {name: v for own in changes for name, v in own["settings"].items()}
        return {"changed": settings} if settings else {}

    def _report_unreadable(self) -> None:
        processes = self.step.processes
        count = processes.total(torch.tensor(self.unreadable(), device=processes.device))
        if count:
            self.console.write(f"{int(count)} unreadable images were left out so far")

    def _save(self) -> None:
        """Write the checkpoint and the files that follow from it; the other processes wait."""
        if self.recorder is not None:
            with self._catching_unsaved():
                self._write(self.recorder)
        self.step.processes.wait()

    @contextmanager
    def _catching_unsaved(self) -> Iterator[None]:
        """Warn of a state that cannot be written inside the block; training goes on.

        The one before is whole.
        """
        try:
            yield
            self.unsaved = None
        except OSError as error:
            self.unsaved = error
            self.console.write(
                f"warning: checkpoint could not be written ({error.strerror or error}); the "
                "one before is whole, and training goes on"
            )

    def _write(self, recorder: Recorder) -> None:
        folder, last = recorder.folder, recorder.folder / CHECKPOINT
        if last.exists():
            if self.best_unsaved:  # by a write that failed
                self._keep_best(folder)
            checkpoint.copy(last, folder / PREVIOUS)
        recorder.flush()
        checkpoint.save(last, self._state())
        self._write_followers(folder)

    def _write_followers(self, folder: Path) -> None:
        """Write what follows from the checkpoint in `folder`, which holds the present state."""
        self.best_unsaved = self._is_best()
        if self.best_unsaved:
            self._keep_best(folder)
        checkpoint.save_weights(folder / WEIGHTS, self.step.model.state_dict(), self.strings)

    def _keep_best(self, folder: Path) -> None:
        checkpoint.copy(folder / CHECKPOINT, folder / BEST)
        self.best_unsaved = False

    def _is_best(self) -> bool:
        """Whether the present state is that behind the best epoch."""
        progress, history = self.progress, self.progress.history
        between_epochs = progress.updates in (None, progress.epochs * self.updates)
        return (
            between_epochs and bool(history) and self.task.best_epoch(history) == len(history) - 1
        )

    def _state(self) -> State:
        return {**snapshot(self.step, self.progress, self.task), **self.facts}

    def _check_saved(self) -> None:
        """Refuse to end where the last state or the log could not be written."""
        error = self.unsaved or (None if self.recorder is None else self.recorder.unwritten)
        if error is not None:
            reason = f"last state could not be written: {error.strerror or error}"
            raise UnsavedError(error.errno, reason, error.filename) from error

    def _write_diverged(self, error: DivergedError) -> None:
        """Write what is known of an update whose loss or gradient is not finite."""
        if self.recorder is None:
            return
        folder = self.recorder.folder / NOT_FINITE
        facts = {
            "update": error.update,
            "epoch": error.update // self.updates,
            "loss": str(error.loss),
            "lr": self.step.lr(error.update),
            **self.sample_indices(error.update),
        }
        folder.mkdir(exist_ok=True)
        checkpoint.write_text(folder / "update.json", json.dumps(facts, indent=1) + "\n")
        if self.step.checks_finite:  # the weights are those before the update
            checkpoint.save(folder / "state.pth", self._state())
        self.console.write(f"what is known of update {error.update} is in {folder}")
