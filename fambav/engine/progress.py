"""The state of a run: how far it is, and what of it a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fambav.engine.checkpoint import CheckpointError, NotFiniteWeightsError, State
from fambav.engine.finite import NotFiniteError, check_weights
from fambav.engine.run_dir import Record
from fambav.engine.step import TrainStep
from fambav.tasks import Task

_HYPERPARAMETERS = {"weight_decay", "betas", "eps", "momentum"}  # others may be state, as in LAMB
_UNKNOWN = -1.0  # best value before the first epoch, whatever the metric


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epochs: Epochs done, evaluated and recorded.
        updates: Updates done; None for those of the epochs done.
        history: One record per epoch.
        losses: Of the updates since the last epoch, over all processes; NaN for a skipped one.
        seconds: Spent on those.
        peak_mib: Peak memory of those, in MiB.
        maxima: Largest magnitude of each layer's outputs in those, if that is measured.
    """

    epochs: int = 0
    updates: int | None = None
    history: list[Record] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    peak_mib: float = 0.0
    maxima: list[float] = field(default_factory=list)

    def best(self, task: Task) -> float:
        """Return the best value of the primary metric of the raw weights; -1 without an epoch."""
        if not self.history:
            return _UNKNOWN
        return float(self.history[task.best_epoch(self.history)][task.primary.key])

    def end_epoch(self, record: Record) -> None:
        """Add the record of an epoch, and start the next one."""
        self.history.append(record)
        self.epochs += 1
        self.losses, self.seconds, self.peak_mib, self.maxima = [], 0.0, 0.0, []


def snapshot(step: TrainStep, progress: Progress, task: Task) -> State:
    """Return everything that changes in a run, under the names that DeiT's tools know."""
    average, scaler = step.average, step.precision.scaler
    return {
        "model": step.model.state_dict(),
        "optimizer": step.optimizer.state_dict(),
        "model_ema": None if average is None else average.model.state_dict(),
        "scaler": scaler.state_dict() if scaler.is_enabled() else None,
        "epoch": progress.epochs - 1,
        task.best_key: progress.best(task),
        "history": progress.history,
        "updates": progress.updates,
        "losses": progress.losses,
        "seconds": progress.seconds,
        "peak_mib": progress.peak_mib,
        "maxima": progress.maxima,
    }


def restore(state: State, step: TrainStep, task: Task) -> Progress:
    """Put a run back to where `state` was saved.

    Args:
        state: A snapshot.
        step: Of the same model and optimizer; changed in place.
        task: What is learnt.

    Raises:
        CheckpointError: If the state is not of such a run.
        NotFiniteWeightsError: If a weight or a number of the optimizer is not finite.
    """
    try:
        _load_weights(step.model, state["model"])
        _load_optimizer(step.optimizer, state["optimizer"])
        if step.average is not None:
            _load_weights(step.average.model, state["model_ema"])
        if step.precision.scaler.is_enabled():
            step.precision.scaler.load_state_dict(state["scaler"])
        progress = Progress(
            epochs=state["epoch"] + 1,
            updates=state.get("updates"),  # older files are of finished epochs only
            history=[dict(record) for record in state["history"]],
            losses=[float(loss) for loss in state.get("losses", ())],
            seconds=float(state.get("seconds", 0.0)),
            peak_mib=float(state.get("peak_mib", 0.0)),
            maxima=[float(value) for value in state.get("maxima", ())],
        )
        progress.best(task)  # needs the primary metric of every epoch
        return progress
    except NotFiniteError as error:
        raise NotFiniteWeightsError(f"checkpoint cannot be gone on from: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(": ")
        raise CheckpointError(
            f"checkpoint does not hold the state of this run ({reason}), expected one of ours"
        ) from error


def _load_weights(net: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load the weights of a run into its model, none of them converted.

    Raises:
        ValueError: If a weight is complex, an integer or not finite.
    """
    check_weights(weights, net.state_dict())
    net.load_state_dict(weights)


def _load_optimizer(optimizer: Optimizer, state: State) -> None:
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
            if name not in ("params", "lr") and _kind(group.get(name, value)) != _kind(value):
                raise TypeError(f"{name} of the optimizer is {group[name]!r}, expected {value!r}")
            if name in _HYPERPARAMETERS:  # those of now, which --extend may have changed
                group[name] = value
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                if getattr(value, "shape", ()) not in ((), parameter.shape):
                    raise ValueError(f"{name} is {tuple(value.shape)}, expected one per weight")


def _kind(value: Any) -> type:
    """The type of a value; all numbers are of one, lists and tuples too."""
    kinds: tuple[tuple[type, ...], ...] = ((float, int), (list, tuple))
    return next((kind[0] for kind in kinds if type(value) in kind), type(value))
