"""What `main.py` does: train, or evaluate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from fambav.config import Config
from fambav.data import Batches, DataSet, eval_words
from fambav.data.resident import ResidentEvaluation
from fambav.engine.checkpoint import CheckpointError
from fambav.engine.distill import Teacher
from fambav.engine.evaluate import Scores, evaluate
from fambav.engine.fit import Fit, Progress, restore
from fambav.engine.lock import locked
from fambav.engine.maxima import Maxima
from fambav.engine.memory import Meter
from fambav.engine.run_dir import KEPT, weights_file
from fambav.engine.runtime import Console, Processes, numerics, processes
from fambav.models import Backbone
from fambav.ops import force, set_backend
from fambav.randomness import seed_all
from fambav.training import batches, folder, pictured, run_state
from fambav.training.exposure import exposure
from fambav.training.network import Layout, layout, model
from fambav.training.run_state import RunState
from fambav.training.teacher import described, teacher
from fambav.training.updates import images_per_update, precision, rate_warning, update


def run(config: Config) -> int:
    """Train, or evaluate, as `config` says.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If something that is asked for is missing, damaged or does not fit together;
            nothing has been written then.
        OSError: If the run folder cannot be written.
        DivergedError: If the loss stops being a number.
    """
    with opened(config) as job:
        if config.run.eval:
            job.evaluate()
        else:
            job.train()
    return 0


@contextmanager
def opened(config: Config) -> Iterator[Job]:
    """Prepare a run as `config` says, with what it sets for the whole process.

    Raises:
        ValueError: If something that is asked for is missing or does not fit together.
    """
    with process_settings(config), processes(config.run.device) as group:
        _check_device(config, group)
        yield _job(config, group)


@contextmanager
def process_settings(config: Config) -> Iterator[None]:
    """Set what holds for the whole process, and put it back at the end."""
    backend, exact = config.model.scan_backend, config.run.deterministic
    products, threads = config.optim.matmul_precision, config.run.threads
    with (
        warnings.catch_warnings(),
        numerics(deterministic=exact, matmul_precision=products, threads=threads),
        nullcontext() if backend is None else force(None),  # puts back what was forced before
    ):
        warnings.filterwarnings("ignore", "This DataLoader will create")  # said by `advise`
        if backend is not None:
            set_backend(backend)
        yield


def _check_device(config: Config, group: Processes) -> None:
    """Refuse what this run's device cannot do.

    Raises:
        ValueError: If there is something.
    """
    if config.model.cuda_graphs and group.device.type != "cuda":
        raise ValueError(f"device is {group.device}, expected a CUDA device with --cuda-graphs")


def _job(config: Config, group: Processes) -> Job:
    """Lay out the model and open the data, and say what was found."""
    console = Console(silent=not group.main)
    plan = layout(config)
    if plan.reduction is not None:
        console.say(plan.reduction.told())
    _check_crop(config, plan)
    found = batches.data_set(config, group, input_size=plan.input_size)
    for note in found.notes:
        console.say(note)
    batches.advise(config, console)
    height, width = plan.input_size
    size = {"input_size": height} if height == width else {}
    complete = config.replace(num_classes=found.num_classes, **size)
    return Job(config=complete, layout=plan, data=found, group=group, console=console)


def _check_crop(config: Config, plan: Layout) -> None:
    """Refuse a share of the image to keep where nothing is cut.

    Raises:
        ValueError: If there is one.
    """
    ratio, default = config.data.eval_crop_ratio, type(config.data).eval_crop_ratio
    if ratio not in (default, eval_words(plan.input_size, ratio)["crop_pct"]):
        height, width = plan.input_size
        raise ValueError(
            f"eval_crop_ratio is {ratio:g}, expected {default:g}, its default: images of {height} x"
            f" {width} pixels are taken whole"
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run, before there are weights.

    Attributes:
        config: The settings, with what the model and the data set decide filled in.
        layout: What is known of the model.
        data: The data set.
        group: The processes.
        console: Where lines go.
    """

    config: Config
    layout: Layout
    data: DataSet
    group: Processes
    console: Console

    def evaluate(self) -> Scores:
        """Score the weights of a file, and tell of their moving average if it holds one.

        Returns:
            The scores of the raw weights.
        """
        state = RunState.read(weights_file(self._source() or Path(self.config.run.finetune)))
        net, score = self._model(), self._score()
        state.load_into(net)
        held_out = self._held_out(state.statistics_under(self.config, self.data))
        raw = score(net, batches=held_out)
        self.console.say(raw.line())
        if self.config.optim.model_ema and state.entries.get("model_ema"):
            state.load_into(net, ema=True)
            self.console.say(f"EMA {score(net, batches=held_out).line().removeprefix('* ')}")
        text = f"Accuracy of the network on the {raw.samples} test images: {raw.acc1:.1f}%"
        self.console.say(text)
        return raw

    def train(self) -> None:
        """Train from the beginning, or from where a checkpoint left off, to the last epoch."""
        state = self._start()
        source = None if state is None else state.path
        warning = rate_warning(self.config, self.group)
        if warning is not None:
            self.console.say(warning)
        fit = self._fit(state)
        place = folder.named(self.config, source)
        self.group.wait()  # until every process has read what the main one may now replace
        with fit.signals, locked(place) if self.group.main else nullcontext():
            if self.group.main:
                fit.recorder = folder.open_folder(
                    place, self.config, self.layout.schedule, self.data, fit, source=source
                )
            with closing(fit.recorder) if fit.recorder else nullcontext():
                fit()
                if fit.recorder is not None:
                    shown = pictured.tokens(self.config, fit.update.model, self.data)
                    if shown is not None:
                        fit.recorder.picture("tokens", shown, fit.progress.epochs)

    def _start(self) -> RunState | None:
        """Read the checkpoint to go on from, if there is to be one.

        With auto, a damaged one gives way to the one before, and that to the best.
        """
        asked = self._source()
        if asked is None or self.config.run.resume != "auto":
            return None if asked is None else RunState.read(asked)
        there = [path for name in KEPT if (path := asked.with_name(name)).exists()]
        if not there:
            self.console.say(f"resume is auto and there is no {asked}: starting anew")
            return None
        *others, last = there
        for path in others:
            try:
                return RunState.read(path)
            except CheckpointError as error:
                self.console.say(f"{error}; trying the one before")
        return RunState.read(last)

    def _fit(self, state: RunState | None) -> Fit:
        """Build a run that stands where `state` was saved."""
        taught_by = self._teacher()
        digest = None if taught_by is None else taught_by.digest()
        if state is not None:
            self._check(state, digest)
        start = 0 if state is None else state.epochs
        start_update = None if state is None else state.updates
        loader = batches.train_batches(
            self.config,
            self.data,
            self.group,
            input_size=self.layout.input_size,
            start_epoch=start,
            start_update=start_update,
        )
        step = update(
            self.config,
            self._model(fresh=state is None),
            self.group,
            num_classes=self.data.num_classes,
            per_epoch=loader.updates_per_epoch,
            teacher=taught_by,
        )
        score, held_out = self._score(), self._held_out()
        schedule, images = self.layout.schedule, images_per_update(self.config, self.group)
        reduction = self.layout.reduction
        facts = run_state.facts(
            self.config,
            self.data,
            schedule,
            images=images,
            grid=None if reduction is None else reduction.info.grid,
            teacher=digest,
            world=self.group.world,
        )
        return Fit(
            update=step,
            batches=iter(loader),
            places=loader.places,
            updates=loader.updates_per_epoch,
            images=images,
            epochs=self.config.optim.epochs,
            score=partial(score, batches=held_out),
            left_out=lambda: loader.left_out() + held_out.left_out(),
            facts=facts,
            strings=run_state.as_strings(facts),
            tokens=schedule.lengths if schedule else (),
            meter=Meter(
                self.group.device,
                step.model.parameters(),
                replayed=self.config.model.cuda_graphs,
                checkpointed=self.config.model.grad_checkpointing,
            ),
            console=self.console,
            progress=Progress() if state is None else restore(state.entries, step),
            every=self.config.run.log_every,
            maxima=Maxima(_layers(step.model)) if self.config.run.log_activations else None,
            save_every=self.config.run.save_every,
        )

    def _source(self) -> Path | None:
        """The checkpoint to go on from; with auto, where one would be."""
        return run_state.resume_path(self.config.run.resume, self.config.run.output_dir)

    def _teacher(self) -> Teacher | None:
        """Build the teacher, if there is to be one, and say what it is."""
        found = teacher(self.config, num_classes=self.data.num_classes)
        if found is not None:
            found.net.to(self.group.device)
            self.console.say(described(self.config))
        return found

    def _check(self, state: RunState, teacher: str | None) -> None:
        """Refuse a checkpoint that is not of this very run."""
        images = images_per_update(self.config, self.group)
        world = self.group.world
        state.check_same_run(self.config, images=images, teacher=teacher, world=world)
        done = state.updates
        point = f"epoch {state.epochs - 1}" if done is None else f"update {done}"
        self.console.say(f"going on from {state.path}, after {point}")

    def _model(self, *, fresh: bool = False) -> nn.Module:
        """Build the model; a fresh one for training starts from --finetune, if that is given."""
        seed_all(self.config.run.seed, "init")
        net = model(self.config, num_classes=self.data.num_classes)
        if fresh and self.config.run.finetune:
            path = weights_file(Path(self.config.run.finetune))
            RunState.read(path).load_into(net, head="drop")
        net.to(self.group.device)
        if isinstance(net, Backbone) and self.group.main:
            composed = exposure(net, precision(self.config, self.group))
            if composed is not None:
                self.console.say(composed)
        return net

    def _score(self) -> Callable[..., Scores]:
        return partial(evaluate, processes=self.group, precision=precision(self.config, self.group))

    def _held_out(self, statistics: Any = None) -> Batches | ResidentEvaluation:
        return batches.eval_batches(
            self.config,
            self.data,
            self.group,
            input_size=self.layout.input_size,
            statistics=statistics,
        )


def _layers(net: nn.Module) -> Iterable[nn.Module]:
    """The layers of a model of ours; the settings allow no other."""
    return list(cast(nn.ModuleList, cast(Backbone, net).layers))
