"""A whole run: train an epoch, evaluate, save, record, and again.

Where it is interrupted, it saves what it has come to; it goes on from there to the same bits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fambav.engine import checkpoint
from fambav.engine.checkpoint import CheckpointError, NotFiniteWeightsError, State
from fambav.engine.control import Ahead, LoaderError, Signals, Stopped
from fambav.engine.evaluate import Scores
from fambav.engine.finite import NotFiniteError, check_weights
from fambav.engine.maxima import Maxima
from fambav.engine.memory import Meter, resident_mib
from fambav.engine.run_dir import BEST, CHECKPOINT, PREVIOUS, WEIGHTS, Record, Recorder
from fambav.engine.runtime import Console
from fambav.engine.train import DivergedError, Losses, Summary, Update, train_epoch

NOT_FINITE = "not_finite"  # folder of what is known of an update whose numbers are not


class UnsavedError(OSError):
    """The last state of a run could not be written."""


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        epochs: Epochs done, evaluated and recorded.
        updates: Updates done; None for those of the epochs done.
        best_acc1: Highest top-1 of the raw weights so far, in percent; -1 before the first epoch.
        history: One record per epoch.
        losses: Of the updates since the last epoch, over all processes; NaN for one left out.
        seconds: Spent on those.
        peak_mib: Peak memory of those, in MiB.
        maxima: Largest magnitude that each layer put out in those, if that is measured.
    """

    epochs: int = 0
    updates: int | None = None
    best_acc1: float = -1.0
    history: list[Record] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    peak_mib: float = 0.0
    maxima: list[float] = field(default_factory=list)


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
        "updates": progress.updates,
        "losses": progress.losses,
        "seconds": progress.seconds,
        "peak_mib": progress.peak_mib,
        "maxima": progress.maxima,
    }


def restore(state: State, update: Update) -> Progress:
    """Put a run back to where `state` was saved.

    Args:
        state: A snapshot.
        update: Of the same model and optimizer; changed in place.

    Raises:
        CheckpointError: If the state is not of such a run.
        NotFiniteWeightsError: If a weight or a number of the optimizer is not finite.
    """
    try:
        _put(update.model, state["model"])
        _load(update.optimizer, state["optimizer"])
        if update.average is not None:
            _put(update.average.model, state["model_ema"])
        if update.precision.scaler.is_enabled():
            update.precision.scaler.load_state_dict(state["scaler"])
        history = [dict(record) for record in state["history"]]
        return Progress(
            epochs=state["epoch"] + 1,
            updates=state.get("updates"),  # older files are of finished epochs only
            best_acc1=state["best_acc1"],
            history=history,
            losses=[float(loss) for loss in state.get("losses", ())],
            seconds=float(state.get("seconds", 0.0)),
            peak_mib=float(state.get("peak_mib", 0.0)),
            maxima=[float(value) for value in state.get("maxima", ())],
        )
    except NotFiniteError as error:
        raise NotFiniteWeightsError(f"checkpoint cannot be gone on from: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(": ")
        raise CheckpointError(
            f"checkpoint does not hold the state of this run ({reason}), expected one of ours"
        ) from error


def _put(net: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load the weights of a run into its model, none of them converted.

    Raises:
        ValueError: If a weight is complex, an integer or not finite.
    """
    check_weights(weights, net.state_dict())
    net.load_state_dict(weights)


def _load(optimizer: Optimizer, state: State) -> None:
    """Put an optimizer back to where `state` was saved.

    Raises:
        TypeError: If a setting is of another type than the optimizer's own.
        ValueError: If it is of an optimizer of other parameters, or a number is not finite.
    """
    for number, own in state["state"].items():
        moments = {n: v for n, v in own.items() if isinstance(v, Tensor) and v.ndim}
        named = {f"{name} of weight {number}": value for name, value in moments.items()}
        check_weights(named, dict.fromkeys(named, torch.empty(0)))
    before = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for own, group in zip(before, optimizer.param_groups, strict=True):
        for name, value in own.items():
            if name not in ("params", "lr") and _type(group.get(name, value)) != _type(value):
                raise TypeError(f"{name} of the optimizer is {group[name]!r}, expected {value!r}")
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                if getattr(value, "shape", ()) not in ((), parameter.shape):
                    raise ValueError(f"{name} is {tuple(value.shape)}, expected one per weight")


def _type(value: object) -> type:
    """The type of a value; numbers have one, lists and tuples too."""
    return next(
        (kind[0] for kind in ((float, int), (list, tuple)) if type(value) in kind), type(value)
    )


@dataclass(kw_only=True)
class Fit:
    """A run from where it stands to its last epoch.

    Attributes:
        update: One step.
        batches: All batches that are left, in order.
        places: What the batches of an update are made of, for all processes: plain data.
        updates: Updates in an epoch.
        images: Images in an update, over all processes.
        epochs: Epochs of the whole run.
        score: Evaluates a model, reading its batches by a function `take`.
        facts: What every checkpoint says besides the state, plain data.
        strings: The same for the file of weights alone.
        left_out: Counts the samples that this process could not read so far.
        tokens: Tokens seen by each layer; empty if the model has no such thing.
        meter: Measures memory.
        console: Where lines go.
        progress: How far the run has come; changed in place.
        recorder: Where files go; None in every process but the main one.
        every: Updates from one line to the next.
        save_every: Updates from one checkpoint to the next within an epoch; None for none there.
        maxima: Measures what layers put out; None for not.
        signals: What has been asked for; enter it before the run folder is written to.
        unsaved: Why the last state could not be written; None if it could.
        best_left: Whether the last checkpoint is the best one and could not be kept as that.
    """

    update: Update
    batches: Iterator[tuple[Tensor, Tensor]]
    places: Callable[[int], Record]
    updates: int
    images: int
    epochs: int
    score: Callable[..., Scores]
    facts: State
    strings: dict[str, str]
    left_out: Callable[[], int]
    tokens: Sequence[int]
    meter: Meter
    console: Console
    progress: Progress
    recorder: Recorder | None = None
    every: int = 10
    save_every: int | None = None
    maxima: Maxima | None = None
    signals: Signals = field(default_factory=Signals)
    unsaved: OSError | None = None
    best_left: bool = False

    def __call__(self) -> None:
        """Run to the end.

        Raises:
            DivergedError: If loss or gradient stop being numbers.
            Stopped: If a signal ended the run; its state is saved.
            LoaderError: If samples cannot be read; the state is saved.
            UnsavedError: If the last state could not be written.
        """
        start = time.perf_counter()
        ahead = Ahead(
            self.batches,
            count=self.update.accumulate,
            processes=self.update.processes,
            signals=self.signals,
        )
        for epoch in range(self.progress.epochs, self.epochs):
            self._epoch(epoch, ahead)
        self._refuse_unsaved()
        spent = timedelta(seconds=round(time.perf_counter() - start))
        self.console.say(f"Training time {spent}")

    def _epoch(self, epoch: int, ahead: Ahead) -> None:
        progress = self.progress
        summary = self._train(epoch, ahead)
        trained = time.perf_counter()
        scores = self._evaluate(ahead)
        evaluated = time.perf_counter()
        record = {
            **self._trained(epoch, summary),
            **scores,
            "eval_seconds": round(evaluated - trained, 3),
            "save_seconds": 0.0,
        }
        progress.epochs = epoch + 1
        progress.history.append(record)
        progress.losses, progress.seconds, progress.peak_mib, progress.maxima = [], 0.0, 0.0, []
        progress.best_acc1 = max(record["test_acc1"], progress.best_acc1)
        self.console.say(f"Max accuracy: {progress.best_acc1:.2f}%")
        self._tell_left_out()
        self._save()
        record["save_seconds"] = round(time.perf_counter() - evaluated, 3)
        if self.recorder is not None:
            self.recorder.epoch(record)

    def _tell_left_out(self) -> None:
        processes = self.update.processes
        count = processes.total(torch.tensor(self.left_out(), device=processes.device))
        if count:
            self.console.say(f"{int(count)} unreadable images were left out so far")

    def _train(self, epoch: int, ahead: Ahead) -> Summary:
        first, progress = epoch * self.updates, self.progress
        done = first if progress.updates is None else progress.updates
        losses = Losses(self.update, first, progress.losses)
        start = clock = time.perf_counter()
        before, last = progress.seconds, done

        def record(fetched: list[float]) -> None:
            if self.recorder is not None and fetched:
                done = first + len(losses)
                self.recorder.updates(done, fetched, self.update.lr(done - 1))

        def note() -> None:
            record(losses.fetch())
            progress.updates, progress.losses = first + len(losses), losses.values
            progress.seconds = before + time.perf_counter() - start
            if progress.updates > done:
                progress.peak_mib = max(progress.peak_mib, self.meter.peak().mib)
            if self.maxima is not None:
                pairs = zip_longest(progress.maxima, self.maxima.take(), fillvalue=0.0)
                progress.maxima = [max(pair) for pair in pairs]

        def report(done: int, fetched: list[float]) -> None:
            nonlocal last, clock
            lr, now = self.update.lr(done - 1), time.perf_counter()
            speed = (done - last) * self.images / (now - clock)
            text = f"loss {fetched[-1]:.4f}  lr {lr:.3g}  {speed:.0f} images/s"
            self.console.step(f"Epoch: [{epoch}]", done - first, self.updates, text)
            record(fetched)
            last, clock = done, now

        def pause() -> None:
            with self._ending(note):
                ahead.prepare()
            if self.save_every and len(losses) and (first + len(losses)) % self.save_every == 0:
                note()
                self._save()

        try:
            summary = train_epoch(
                self.update,
                ahead,
                updates=range(done, first + self.updates),
                losses=losses,
                first=self.meter.first_update(),
                every=self.every,
                report=report,
                pause=pause,
            )
        except DivergedError as error:
            progress.updates, progress.losses = error.update, losses.values[:-1]
            self._tell_of(error)
            raise
        note()
        return summary

    @contextmanager
    def _ending(self, note: Callable[[], None]) -> Iterator[None]:
        """Save what a run has come to when something ends it inside the block."""
        try:
            yield
        except (Stopped, LoaderError) as end:
            note()
            self._save()
            self._refuse_unsaved()
            if isinstance(end, Stopped):
                self.console.say(
                    f"{end.signal.name}: saved after update {self.progress.updates}; "
                    "--resume auto goes on from there"
                )
            raise

    def _evaluate(self, ahead: Ahead) -> Record:
        with self._ending(lambda: None):
            return self._scores(ahead)

    def _scores(self, ahead: Ahead) -> Record:
        raw = self.score(self.update.model, take=ahead.take)
        self.console.say(raw.line())
        found = {f"test_{name}": getattr(raw, name) for name in ("loss", "acc1", "acc5")}
        if self.update.average is not None:
            averaged = self.score(self.update.average.model, take=ahead.take)
            self.console.say(f"EMA {averaged.line().removeprefix('* ')}")
            for name in ("loss", "acc1", "acc5"):
                found[f"test_ema_{name}"] = getattr(averaged, name)
        return found

    def _trained(self, epoch: int, summary: Summary) -> Record:
        rates = [self.update.lr(epoch * self.updates + step) for step in range(self.updates)]
        seconds = self.progress.seconds
        return {
            "epoch": epoch,
            "train_lr": sum(rates) / len(rates),
            "train_loss": summary.loss,
            "skipped_updates": summary.skipped,
            "n_parameters": sum(p.numel() for p in self.update.model.parameters()),
            "tokens": list(self.tokens),
            "train_seconds": round(seconds, 3),
            "images_per_second": round(self.updates * self.images / seconds, 2),
            "peak_memory_mib": round(self.progress.peak_mib, 3),
            "peak_memory_kind": self.meter.peak().kind,
            "rss_mib": round(resident_mib(), 1),
            **({} if self.maxima is None else {"activation_max": self.progress.maxima}),
        }

    def repair(self, source: Path, folder: Path) -> None:
        """Write what follows from the checkpoint that the run goes on from, and was cut off.

        Args:
            source: The checkpoint, whose state this run is in.
            folder: The run folder, whose own checkpoint may be damaged or missing.
        """
        with self._telling():
            last = folder / CHECKPOINT
            if source.resolve() != last.resolve():
                checkpoint.copy(source, last)
            self._follow(folder)

    def _save(self) -> None:
        """Write the checkpoint and the files that follow from it; the other processes wait."""
        if self.recorder is not None:
            with self._telling():
                self._write(self.recorder)
        self.update.processes.wait()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Tell of a state that cannot be written inside the block; training goes on.

        The one before is whole.
        """
        try:
            yield
            self.unsaved = None
        except OSError as error:
            self.unsaved = error
            self.console.say(
                f"warning: checkpoint could not be written ({error.strerror or error}); the "
                "one before is whole, and training goes on"
            )

    def _write(self, recorder: Recorder) -> None:
        folder, last = recorder.folder, recorder.folder / CHECKPOINT
        if last.exists():
            if self.best_left:  # by a write that failed
                self._keep_best(folder)
            checkpoint.copy(last, folder / PREVIOUS)
        recorder.flush()
        checkpoint.save(last, {**snapshot(self.update, self.progress), **self.facts})
        self._follow(folder)

    def _follow(self, folder: Path) -> None:
        """Write what follows from the checkpoint in `folder`, which holds the present state."""
        self.best_left = self._stands_at_best()
        if self.best_left:
            self._keep_best(folder)
        checkpoint.save_weights(folder / WEIGHTS, self.update.model.state_dict(), self.strings)

    def _keep_best(self, folder: Path) -> None:
        checkpoint.copy(folder / CHECKPOINT, folder / BEST)
        self.best_left = False

    def _stands_at_best(self) -> bool:
        """Whether the present state is that behind the best epoch."""
        progress = self.progress
        if progress.updates not in (None, progress.epochs * self.updates):
            return False
        accuracies = [epoch["test_acc1"] for epoch in progress.history]
        return bool(accuracies) and accuracies.index(max(accuracies)) == len(accuracies) - 1

    def _refuse_unsaved(self) -> None:
        found = self.unsaved or (None if self.recorder is None else self.recorder.unwritten)
        if found is not None:
            reason = f"last state could not be written: {found.strerror or found}"
            raise UnsavedError(found.errno, reason, found.filename) from found

    def _tell_of(self, error: DivergedError) -> None:
        """Write what is known of an update whose loss or gradient is not finite."""
        if self.recorder is None:
            return
        folder = self.recorder.folder / NOT_FINITE
        known = {
            "update": error.update,
            "epoch": error.update // self.updates,
            "loss": str(error.loss),
            "lr": self.update.lr(error.update),
            **self.places(error.update),
        }
        folder.mkdir(exist_ok=True)
        checkpoint.write_text(folder / "update.json", json.dumps(known, indent=1) + "\n")
        if self.update.looks:  # the weights are those before the update
            checkpoint.save(
                folder / "state.pth", {**snapshot(self.update, self.progress), **self.facts}
            )
        self.console.say(f"what is known of update {error.update} is in {folder}")
