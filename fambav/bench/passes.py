"""Training steps by the trainer's own code, and forward passes of whole models."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from fambav.bench.candidates import (
    CLASSES,
    EAGER,
    MODEL,
    REPLAYED,
    Candidate,
    candidates,
    images,
    prepared,
    relative,
    use_backend,
)
from fambav.bench.operations import LENGTHS
from fambav.bench.profile import profile as profiled
from fambav.bench.report import Report, Row, positive, settings, training_dtype
from fambav.bench.roofline import Roofline, flops
from fambav.bench.timing import (
    Run,
    Times,
    allocated_mib,
    captured,
    first_ms,
    interleave,
    peak_mib,
    quartiles,
    ratios,
    spread,
)
from fambav.config import Config
from fambav.engine.distributed import Processes
from fambav.engine.memory import MIB
from fambav.engine.precision import determinism_settings
from fambav.engine.step import TrainStep
from fambav.registry import family_of
from fambav.training.step import train_step

FORWARD_BATCH = {"cuda": 128, "cpu": 8}
STEP_BATCH = {"cuda": 128, "cpu": 2}
STEP_BACKENDS = {"cuda": ("triton", "cuda"), "cpu": ("numba", "cpu", "cuda")}
STEP_BASELINES = ("cuda", "cpu")
STEP_TITLE = "training step (forward, loss, backward, optimizer)"
EPOCH = 1000  # updates
PASSES = 3  # a backward pass makes two products for each one of the forward pass
T = TypeVar("T")
AllTimes = Mapping[Any, Times]


class Forward(NamedTuple):
    """A model in evaluation mode that has been called once, on fixed images.

    Attributes:
        net: The model.
        run: A forward pass without gradients; returns the logits, or replays a CUDA graph.
        first_ms: Milliseconds of the first call, compilation included; for a replay, of all calls
            up to its capture.
        optimizer: None.
    """

    net: nn.Module
    run: Run
    first_ms: float
    optimizer: None = None


class Step(NamedTuple):
    """A model and its training step, on fixed images.

    Attributes:
        net: The model.
        update: One training step.
        batch: Images and labels, on the device.
        backend: Of its operations; None for the fastest.
        capture_mib: Peak memory of the capture of its passes as CUDA graphs; None without graphs.
    """

    net: nn.Module
    update: TrainStep
    batch: tuple[Tensor, Tensor]
    backend: str | None
    capture_mib: float | None

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the training step."""
        optimizer: torch.optim.Optimizer = self.update.optimizer
        return optimizer

    def run(self) -> Tensor:
        """Make a step; return its loss."""
        with use_backend(self.backend):
            return self.update(itertools.repeat(self.batch), 0)

    def peak_mib(self) -> float:
        """Return the peak memory of a step, in MiB, beyond weights and the optimizer's state."""
        if self.capture_mib is not None:
            return self.capture_mib
        return peak_mib(self.run, self.batch[0].device, ignored=self.net.parameters())


def infer(
    *,
    batch: int | None = None,
    rounds: int = 9,
    warmup: int = 2,
    device: torch.device,
    dtypes: Sequence[torch.dtype] | None = None,
    alone: bool = False,
    roofline: bool = False,
    profile: bool = False,
    **which: Any,
) -> Report:
    """Measure forward passes in evaluation mode and without gradients, on random images.

    Args:
        alone: Time each call from an idle device to an idle device.
        roofline: Also measure peak compute and bandwidth, and shares of them; see `Roofline`.
        profile: Also report the shares of layers and operations; see `bench.profile`.
        which: Arguments of `candidates`: what is compared.

    Returns:
        A row for each candidate:
            first_call_ms   with compilation, except of what an earlier row has compiled
            images_per_s    from the median
            times_faster    than the first row within each round: median and quartiles
            peak_mib        allocated by PyTorch in a pass, beyond weights and images
            gflop_per_image, gflop_per_s    as `roofline.flops` counts them

    Raises:
        ValueError: If a number is too small, or as `candidates`.
        MeasureError: If no candidate can run here.
    """
    batch = FORWARD_BATCH[device.type] if batch is None else batch
    dtypes = [training_dtype(device)] if dtypes is None else dtypes
    positive(batch=batch, rounds=rounds)
    given = candidates(dtypes=dtypes, device=device, **which)

    def columns(key: Candidate, made: Mapping[Candidate, Forward], times: AllTimes) -> Row:
        low, faster, high = quartiles(ratios(times[next(iter(made))], times[key]))
        reduction = getattr(made[key].net, "reduction", None)
        return {
            **key.row(),
            "token_layers_left": None if reduction is None else reduction.schedule.share,
            **_rate(batch, times[key]),
            "times_faster": faster,
            "faster_quartiles": (low, high),
            "first_call_ms": made[key].first_ms,
            "peak_mib": allocated_mib(_eager(key, made), device),
        }

    make = partial(forward_pass, batch=batch, device=device)
    how: dict[str, Any] = dict(rounds=rounds, warmup=warmup, device=device, alone=alone)
    how |= dict(batch=batch, profile=profile, peaks_of=dtypes if roofline else ())
    parts = _measured(given, make, lambda candidate: candidate.name, columns, **how)
    about: dict[str, Any] = dict(method=given[0].method, batch=batch, rounds=rounds)
    title = "one call at a time" if alone else "forward passes"
    return Report(title=title, settings=settings(device, **about, memory="allocated"), **parts)


def latency(**given: Any) -> Report:
    """Measure the latency of single images, each from an idle device to its logits; see `infer`."""
    return infer(batch=1, alone=True, **given)


def step(
    *,
    batch: int | None = None,
    lengths: Sequence[int] | None = None,
    rounds: int = 5,
    warmup: int = 2,
    device: torch.device,
    dtypes: Sequence[torch.dtype] | None = None,
    names: Sequence[str] | None = None,
    roofline: bool = False,
    profile: bool = False,
    **which: Any,
) -> Report:
    """Measure whole training steps: forward, loss, backward and optimizer, on random images.

    Args:
        lengths: Tokens, class tokens included; images of their size; none of stages.
        names: Backends; by default those for the device, without plain PyTorch.
        roofline, profile: As in `infer`.
        which: Further arguments of `candidates`; peers are not captured as CUDA graphs.

    Returns:
        A row for every candidate.  Operations are three times those of a forward pass.

    Raises:
        ValueError: If a number is too small, or as `candidates`.
        MeasureError: If no candidate can run here.
    """
    batch = STEP_BATCH[device.type] if batch is None else batch
    dtypes = [training_dtype(device)] if dtypes is None else dtypes
    positive(batch=batch, rounds=rounds)
    sizes = _step_lengths(str(which.get("model", MODEL)), lengths)
    most = max(filter(None, sizes), default=0)
    names = STEP_BACKENDS[device.type] if names is None else names
    given = candidates(names=names, dtypes=dtypes, lengths=sizes, device=device, **which)
    given = [c for c in given if c.ours or c.launch == EAGER]

    def make(candidate: Candidate) -> Step:
        (made := training(candidate, batch=batch, device=device)).run()
        return made

    def columns(key: Candidate, made: Mapping[Candidate, Step], times: AllTimes) -> Row:
        others = {name: times.get(key._replace(backend=name)) for name in STEP_BASELINES}
        longest = times.get(key._replace(length=most)), most
        return {
            **{name: value for name, value in key.row().items() if name != "plan"},
            "length": key.length,
            **_rate(batch, times[key]),
            **relative(times[key], others, longest, key.length, made[key].peak_mib()),
        }

    def refused(key: Candidate) -> str:
        return " ".join(key.row()[name] for name in ("backend", "dtype")[: len(dtypes)])

    how: dict[str, Any] = dict(rounds=rounds, warmup=warmup, device=device, passes=PASSES)
    how |= dict(batch=batch, profile=profile, peaks_of=dtypes if roofline else ())
    parts = _measured(given, make, refused, columns, **how)
    memory = "allocated" if device.type == "cuda" else "saved for backward"
    about = settings(device, model=given[0].model, batch=batch, rounds=rounds, memory=memory)
    return Report(title=STEP_TITLE, settings=about, **parts)


def _step_lengths(model: str, lengths: Sequence[int] | None) -> Sequence[int | None]:
    """Return the numbers of tokens to measure; None for a model's own.

    Raises:
        ValueError: If some are given for a model that has no single one.
    """
    if lengths is not None:
        positive(length=min(lengths, default=0))
    if not family_of(model).staged:
        return LENGTHS if lengths is None else lengths
    if lengths:
        raise ValueError(
            f"length is {lengths[0]}, expected none with {model}, each stage of which has another"
        )
    return (None,)


def _check_batch(model: str, net: nn.Module, batch: int) -> None:
    """Refuse one image whose last map is one cell: batch norm has no variance of it."""
    cells = math.prod(cast(Any, net).pretrained_cfg.get("pool_size") or (2,))
    if batch == cells == 1 and any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules()
    ):
        raise ValueError(
            f"batch is 1, expected at least 2 with {model}, whose batch norm would see one cell"
        )


def forward_pass(candidate: Candidate, *, batch: int, device: torch.device) -> Forward:
    """Make a model and call it.

    Raises:
        BackendError: If its backend cannot run here.
        RuntimeError: If it cannot be captured as a CUDA graph.
    """
    net = candidate.network(device).eval()
    given, precision = images(net, batch, device), candidate.precision(device)
    # Autocast caches the casts of weights, which a replay would not repeat.
    cached = candidate.launch == EAGER

    def eager() -> Tensor:
        with use_backend(candidate.backend), torch.no_grad(), precision.autocast(cached=cached):
            logits: Tensor = net(given)
            return logits

    made: list[Run] = [eager]
    first: Run = eager if cached else lambda: made.append(captured(eager))
    spent = first_ms(first, device)
    return Forward(net, made[-1], spent)


def training(candidate: Candidate, *, batch: int, device: torch.device, seed: int = 0) -> Step:
    """Make a model and its training step: a plain run without mixing and moving average.

    Args:
        candidate: The model, its backend, dtype and launch.
        batch: Images.
        device: Of the model.
        seed: Of weights, images and labels.

    Raises:
        ValueError: If the model cannot be built so.
        RuntimeError: If its passes cannot be captured as CUDA graphs.
    """
    mixed, graphs = candidate.dtype != torch.float32, candidate.launch == REPLAYED
    name = candidate.model if candidate.ours else f"timm/{candidate.model}"
    precision = {"amp_dtype": "fp16" if candidate.dtype == torch.float16 else "bf16"}
    config = Config.from_flat(
        dict(model=name, data_set="FAKE", batch_size=batch, cuda_graphs=graphs)
        | dict(mixup=0.0, cutmix=0.0, model_ema=False, amp=mixed)
        | (precision if mixed else {})
    )
    net = candidate.network(device, drop_path=config.model.drop_path, seed=seed)
    _check_batch(candidate.model, net, batch)
    given = images(net, batch, device)
    labels = torch.randint(CLASSES, (batch,)).to(device)
    group, peak = Processes(0, 1, device), None
    if graphs:
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    with use_backend(candidate.backend):
        update = train_step(config, net, group, num_classes=CLASSES, per_epoch=EPOCH)
    if graphs:
        peak = (torch.cuda.max_memory_allocated(device) - before) / MIB
    update.forward.train()
    return Step(net, update, (given, labels), candidate.backend, peak)


def _measured(
    given: Sequence[Candidate],
    make: Callable[[Candidate], T],
    refused: Callable[[Candidate], str],
    columns: Callable[[Candidate, Mapping[Candidate, T], AllTimes], Row],
    *,
    batch: int,
    passes: int = 1,
    peaks_of: Sequence[torch.dtype],
    profile: bool,
    device: torch.device,
    **how: Any,
) -> dict[str, Any]:
    """Time all candidates that can be made; return rows, skipped and tables of a report."""
    with determinism_settings(deterministic=False, matmul_precision="high"):
        made, skipped = prepared(given, make, refused)
        peaks = Roofline(device, peaks_of)
        runs: dict[Any, Run] = {key: cast(Any, ready).run for key, ready in made.items()}
        times = interleave({**runs, **peaks.runs()}, **how, device=device)
        rows = []
        for key in made:
            done, run = passes * flops(key), _eager(key, made)
            throughput = peaks.row(times, key, key.dtype, batch=batch, flops=done, run=run)
            rows.append({**columns(key, made, times), **throughput})
        tables = peaks.tables(times)
        if profile:  # of eager runs alone: a replay is a single launch
            subjects = {
                key.name: (one.run, one.net, one.optimizer)
                for key, one in cast(Any, made).items()
                if key.launch == EAGER
            }
            tables |= profiled(subjects, rounds=how["rounds"], device=device)
    return dict(rows=rows, skipped=skipped, tables=tables)


def _eager(key: Candidate, made: Mapping[Candidate, Any]) -> Run:
    """Return the eager run of a candidate that may be a replay."""
    run: Run = made[key._replace(launch=EAGER)].run
    return run


def _rate(batch: int, own: Times) -> dict[str, Any]:
    return {"images_per_s": 1000 * batch / statistics.median(own), **spread(own)}
