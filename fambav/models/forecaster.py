"""What all models that continue a series have in common, and DLinear, the baseline of all."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fambav.arguments import whole
from fambav.models.entry import named
from fambav.models.flops import FREE, Cost, ForecasterCost
from fambav.models.model import Model
from fambav.timm_compat import timm

_EPSILON = 1e-5  # added to a standard deviation


class Forecaster(Model):
    """Continues series: (batch, lookback, variates) -> (batch, horizon, variates), float.

    Weights are shared by all variates, so their number may be any.

    Args:
        lookback: Rows that a forecast is made from.
        horizon: Rows that are forecast.

    Attributes:
        lookback, horizon: The same.
        num_classes: The horizon, the length of the output.
        pretrained_cfg: Its `input_size` is (lookback, variates).

    Raises:
        ValueError: If lookback or horizon is no whole number of at least 1.
    """

    def __init__(self, *, lookback: int, horizon: int) -> None:
        super().__init__()
        self.lookback = whole("lookback", lookback, least=1)
        self.horizon = self.num_classes = whole("horizon", horizon, least=1)
        self.pretrained_cfg = {
            "input_size": (lookback, 1),
            "num_classes": horizon,
            "classifier": self.classifier_name,
        }

    def forward(self, past: Tensor) -> Tensor:
        """Forecast: (batch, lookback, variates) -> (batch, horizon, variates).

        Raises:
            ValueError: If `past` has another number of rows.
        """
        if past.ndim != 3 or past.shape[1] != self.lookback:
            expected = f"(batch, {self.lookback}, variates)"
            raise ValueError(f"past is {tuple(past.shape)}, expected {expected}")
        return self.forecast(past.mT).mT

    @abstractmethod
    def forecast(self, rows: Tensor) -> Tensor:
        """Continue each variate: (batch, variates, lookback) -> (batch, variates, horizon)."""

    @abstractmethod
    def flop_parts(self, variates: int) -> ForecasterCost:
        """Return what a forecast of so many variates costs; weights may be on the meta device."""


def register(model: type[Forecaster], name: str) -> Callable[..., nn.Module]:
    """Register a forecaster with timm.

    Args:
        model: Its class.
        name: Its name.

    Returns:
        The function that timm calls, for the namespace of the model's module.
    """

    def build(
        pretrained: bool = False,  # noqa: FBT001, FBT002  the signature is timm's
        *,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **arguments: Any,
    ) -> nn.Module:
        if pretrained or any((pretrained_cfg, pretrained_cfg_overlay, cache_dir)):
            raise ValueError(f"pretrained is set, expected none: {name} has no published weights")
        return model(**arguments)

    vars(sys.modules[model.__module__])["default_cfgs"] = {}
    known = named(build, name, model, "its own arguments")
    made: Callable[..., nn.Module] = timm.models.register_model(known)
    return made


def standardise(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x - mean) / std along the last axis, and both, which undo it.

    Args:
        rows: (..., length), of two numbers at least.

    Source: RevIN, Kim et al., ICLR 2022, without its weights; the deviation is the unbiased one,
    plus 1e-5.
    """
    mean = rows.mean(dim=-1, keepdim=True)
    std = rows.std(dim=-1, keepdim=True) + _EPSILON
    return (rows - mean) / std, mean, std


class DLinear(Forecaster):
    """A moving average and what it leaves, each continued by one linear map.

    Args:
        lookback: Rows that a forecast is made from.
        horizon: Rows that are forecast.
        kernel: Rows of the moving average, odd; at the ends the first and the last are repeated.

    Raises:
        ValueError: If the kernel is even or below 1.

    Source: Zeng et al., "Are transformers effective for time series forecasting?",
    arXiv:2205.13504, with its names of weights; all start as 1 / lookback, a mean, as in the
    Time-Series-Library.
    """

    classifier_name: ClassVar[str] = "Linear_Seasonal"

    def __init__(self, *, lookback: int = 512, horizon: int = 96, kernel: int = 25) -> None:
        super().__init__(lookback=lookback, horizon=horizon)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}, expected an odd number of at least 1")
        self.kernel = kernel
        self.Linear_Seasonal = nn.Linear(lookback, horizon)
        self.Linear_Trend = nn.Linear(lookback, horizon)
        for linear in (self.Linear_Seasonal, self.Linear_Trend):
            nn.init.constant_(linear.weight, 1 / lookback)

    @property
    def classifier_names(self) -> tuple[str, ...]:
        """Names of both linear maps."""
        return ("Linear_Seasonal", "Linear_Trend")

    def forecast(self, rows: Tensor) -> Tensor:
        """Continue each variate: (batch, variates, lookback) -> (batch, variates, horizon)."""
        beyond = self.kernel // 2
        padded = F.pad(rows, (beyond, beyond), mode="replicate")
        trend = F.avg_pool1d(padded, self.kernel, stride=1)
        out: Tensor = self.Linear_Seasonal(rows - trend) + self.Linear_Trend(trend)
        return out

    def flop_parts(self, variates: int) -> ForecasterCost:
        """Count both linear maps; the moving average is no product."""
        both = variates * 2 * self.lookback * self.horizon
        return ForecasterCost(variates, FREE, (), Cost.of_products(both))


dlinear = register(DLinear, "dlinear")
