"""Forecasting of series: squared and absolute errors of standardised values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fambav.registry import TASKS
from fambav.tasks import Loss, Meter, Metric, Statistics, Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fambav.config import Config


class Forecasting(Task):
    """The next rows of a series follow from those before."""

    hub = "time-series-forecasting"
    tags = ("time-series",)
    output = "horizon"
    metrics = (
        Metric("mse", "MSE", "", "mean squared error", higher_is_better=False, hub="mse", digits=4),
        Metric(
            "mae", "MAE", "", "mean absolute error", higher_is_better=False, hub="mae", digits=4
        ),
    )

    def train_transform(
        self, config: Config, statistics: Statistics, input_size: tuple[int, int]
    ) -> Any:
        """Return what leaves a window as it is: the series is standardised as a whole."""
        return _unchanged

    def eval_transform(
        self, config: Config, statistics: Statistics, input_size: tuple[int, int]
    ) -> Any:
        """Return what leaves a window as it is."""
        return _unchanged

    def loss(self, config: Config, *, mixed: bool) -> Loss:
        """Return the mean squared error."""
        import torch.nn.functional as F

        return F.mse_loss

    def meter(self, num_classes: int, device: torch.device) -> Meter:
        """Return an empty meter of both errors."""
        return Errors(2, device)

    def input_shape(self, channels: int, size: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape of a window: lookback and variates."""
        return size[0], channels

    def input_lines(self, known: Mapping[str, Any]) -> tuple[str, ...]:
        """Return lines on the windows that a model reads, and what it makes of them."""
        lookback, variates = known["input_size"]
        return (
            f"- input: {lookback} rows of {variates} variates, each standardised by its mean and"
            " standard deviation in the training rows",
            f"- output: the next {known['num_classes']} rows, standardised",
        )

    def preprocessing(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """Return how values become what a model reads."""
        return {
            "do_normalize": True,
            "lookback": known["input_size"][0],
            "horizon": known["num_classes"],
            "mean": list(known["mean"]),
            "std": list(known["std"]),
        }


TASKS.register("forecasting")(Forecasting())


class Errors(Meter):
    """Sums over windows of their mean squared and mean absolute error."""

    def batch_sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sums of forecasts and truth, both (batch, horizon, variates); (2,), float64.

        The mean over windows of means over their numbers is the mean over all numbers, since every
        window has as many.
        """
        import torch

        errors = (outputs.double() - targets.double()).flatten(1)
        return torch.stack([e.mean(dim=1).sum() for e in (errors.square(), errors.abs())])

    def metrics(self, sums: Tensor, samples: int) -> dict[str, float]:
        """Return both errors, in units of the training rows' deviation; the loss is the first."""
        squared, absolute = (sums / samples).tolist()
        return {"loss": squared, "mse": squared, "mae": absolute}


def _unchanged(window: Tensor) -> Tensor:
    return window
