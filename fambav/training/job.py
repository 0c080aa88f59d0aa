"""The work of `main.py`: train, or evaluate."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from fambav.arguments import check_folder
from fambav.config import Config
from fambav.data import DataSet, EvalBatchesLoader, eval_crop
from fambav.data.device_augment import DeviceEvalLoader
from fambav.engine.activations import ActivationMax
from fambav.engine.checkpoint import CheckpointError, State
from fambav.engine.console import Console
from fambav.engine.distill import Teacher
from fambav.engine.distributed import Processes, processes
from fambav.engine.evaluate import evaluate
from fambav.engine.lock import locked
from fambav.engine.memory import PeakMemory
from fambav.engine.precision import determinism_settings
from fambav.engine.progress import Progress, restore
from fambav.engine.run_dir import KEPT, weights_file
from fambav.engine.tracker import check_tracker
from fambav.engine.trainer import Trainer
from fambav.models import TimmModel
from fambav.ops import check_environment, force, set_backend
from fambav.ops.kernels import NUMBA
from fambav.registry import family_of
from fambav.seeding import seed_all
from fambav.tasks import CHOICE, Scores, Statistics, Task, task_of
from fambav.training import batches, folder, pictured, run_state
from fambav.training.network import Layout, layout, model
from fambav.training.run_state import RunState
from fambav.training.step import images_per_update, precision, rate_warning, train_step
from fambav.training.teacher import described, teacher


def run(config: Config) -> int:
    """Train, or with --eval evaluate.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If a file or a package is missing or damaged, or settings do not fit together;
            nothing has been written then.
        OSError: If the run folder cannot be written.
        DivergedError: If the loss becomes NaN or infinite.
    """
    if config.run.output_dir is not None and not config.run.eval:
        check_folder(Path(config.run.output_dir))
    with opened(config) as job:
        if config.run.eval:
            job.evaluate()
        else:
            job.train()
    return 0


@contextmanager
def opened(config: Config) -> Iterator[TrainingJob]:
    """Prepare a run, with the settings that hold for the whole process.

    Raises:
        ValueError: If a file or a package is missing, or settings do not fit together.
    """
    with process_settings(config), processes(config.run.device) as group:
        if config.model.cuda_graphs and group.device.type != "cuda":
            raise ValueError(f"device is {group.device}, expected a CUDA device with --cuda-graphs")
        yield _prepared(config, group)


@contextmanager
def process_settings(config: Config) -> Iterator[None]:
    """Set what holds for the whole process, and put it back at the end.

    Raises:
        BackendError: If the scan's backend that is forced cannot run.
    """
    backend = config.model.scan_backend
    with (
        warnings.catch_warnings(),
        determinism_settings(
            deterministic=config.run.deterministic,
            matmul_precision=config.optim.matmul_precision,
            threads=config.run.threads,
        ),
        nullcontext() if backend is None else force(None),  # restores the backend at the end
    ):
        warnings.filterwarnings("ignore", "This DataLoader will create")  # ours is shorter
        if backend is not None:
            set_backend(backend)
        check_environment()
        yield


def _prepared(config: Config, group: Processes) -> TrainingJob:
    """Lay out the model, open the data and print notes on both."""
    console = Console(silent=not group.main)
    plan = layout(config)
    if plan.reduction is not None:
        console.write(plan.reduction.summary())
    _check_crop(config, plan)
    opened_set = batches.data_set(config, group, input_size=plan.input_size)
    if config.data.on_bad_image == "error":
        opened_set.check()
    for note in opened_set.notes:
        console.write(note)
    batches.warn_of_workers(config, console)
    own: dict[str, Any] = {task_of(config.data.data_set).output: opened_set.num_classes}
    if "input_size" in family_of(config.model.model).arguments:
        own["input_size"] = plan.input_size
    complete = config.replace(**own)
    return TrainingJob(config=complete, layout=plan, data=opened_set, group=group, console=console)


def _check_crop(config: Config, plan: Layout) -> None:
    """Refuse --eval-crop-ratio where images are not cropped.

    Raises:
        ValueError: If it is set.
    """
    ratio, default = config.data.eval_crop_ratio, type(config.data).eval_crop_ratio
    if ratio not in (default, eval_crop(plan.input_size, ratio)["crop_pct"]):
        height, width = plan.input_size
        raise ValueError(
            f"eval_crop_ratio is {ratio:g}, expected {default:g}, its default: images of {height} x"
            f" {width} pixels are taken whole"
        )


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """A run, before there are weights.

    Attributes:
        config: The settings, completed from the model and the data set.
        layout: The model without weights.
        data: The data set.
        group: The processes.
        console: Prints lines.
    """

    config: Config
    layout: Layout
    data: DataSet
    group: Processes
    console: Console

    @property
    def task(self) -> Task:
        """The task of the data set."""
        return task_of(self.config.data.data_set)

    def evaluate(self) -> Scores:
        """Evaluate the weights of a file, and print its moving average's scores if it has one.

        Returns:
            The scores of the raw weights.
        """
        state = RunState.read(weights_file(self._source() or Path(self.config.run.finetune)))
        net = self._model()
        state.load_into(net)
        held_out = self._held_out(state.statistics_for(self.config, self.data))
        raw = self._evaluate(net, held_out=held_out)
        self.console.write(self.task.line(raw))
        if self.config.optim.model_ema and state.entries.get("model_ema"):
            state.load_into(net, ema=True)
            averaged = self.task.line(self._evaluate(net, held_out=held_out))
            self.console.write(f"EMA {averaged.removeprefix('* ')}")
        self.console.write(self.task.summary(raw))
        return raw

    def train(self) -> None:
        """Train from the beginning, or from a checkpoint, to the last epoch."""
        check_tracker(self.config.run.tracker)
        state = self._start()
        source = None if state is None else state.path
        self.console.write(self._described())
        warning = rate_warning(self.config, self.group)
        if warning is not None:
            self.console.write(warning)
        trainer = self._trainer(state)
        known = family_of(self.config.model.model)
        runs = (known.scan or known.reducible) and self.group.device.type == NUMBA.device
        if runs and NUMBA.unavailable() is None:
            NUMBA.load()  # compiled for seconds at its first import, which is no time of training
        place = folder.named(self.config, source)
        self.group.wait()  # until every process has read what the main one may now replace
        with trainer.preemption, locked(place) if self.group.main else nullcontext():
            if self.group.main:
                trainer.recorder = folder.open_folder(
                    place, self.config, self.layout.schedule, self.data, trainer, source=source
                )
            with closing(trainer.recorder) if trainer.recorder else nullcontext():
                try:
                    trainer.run()
                except KeyboardInterrupt:
                    self.console.write(_left_of(place))
                    raise
                if trainer.recorder is not None:
                    picture = pictured.tokens(self.config, trainer.step.model, self.data)
                    if picture is not None:
                        trainer.recorder.picture("tokens", picture, trainer.progress.epochs)

    def _described(self) -> str:
        """What is learnt from, in one line."""
        outputs = "classes" if self.task.output == "num_classes" else "rows of a forecast"
        return (
            f"{self.data.name}: {self.data.num_classes} {outputs}, {len(self.data.train)} training"
            f" and {len(self.data.val)} held-out samples,"
            f" {images_per_update(self.config, self.group)} in an update"
        )

    def _start(self) -> RunState | None:
        """Read the checkpoint to resume from, if there is one.

        With auto, or in a folder, a damaged one gives way to the one before, and that to the best.
        """
        source, auto = self._source(), self.config.run.resume == "auto"
        if source is None or not (auto or source.is_dir()):
            return None if source is None else RunState.read(source)
        folder = source.parent if auto else source
        there = [path for name in KEPT if (path := folder / name).exists()]
        if not there and auto:
            self.console.write(f"resume is auto and there is no {source}: starting anew")
            return None
        if not there:
            raise CheckpointError(f"{folder} holds no {KEPT[0]}, expected the folder of a run")
        *others, last = there
        for path in others:
            try:
                return RunState.read(path)
            except CheckpointError as error:
                self.console.write(f"{error}; trying the one before")
        return RunState.read(last)

    def _trainer(self, state: RunState | None) -> Trainer:
        """Build a run that stands where `state` was saved."""
        config, group, schedule = self.config, self.group, self.layout.schedule
        taught_by = self._teacher()
        digest = None if taught_by is None else taught_by.digest()
        if state is not None:
            state = self._extended(state, digest)
        loader = batches.train_batches(
            config,
            self.data,
            group,
            input_size=self.layout.input_size,
            start_epoch=0 if state is None else state.epochs,
            start_update=None if state is None else state.updates,
        )
        step = train_step(
            config,
            self._model(fresh=state is None),
            group,
            num_classes=self.data.num_classes,
            per_epoch=loader.updates_per_epoch,
            teacher=taught_by,
        )
        held_out, images = self._held_out(), images_per_update(config, group)
        facts = self._facts(images, digest, state)
        return Trainer(
            task=self.task,
            step=step,
            batches=iter(loader),
            sample_indices=loader.indices,
            updates=loader.updates_per_epoch,
            images=images,
            epochs=config.optim.epochs,
            evaluate=partial(self._evaluate, held_out=held_out),
            unreadable=lambda: sum(b.skipped() for b in (loader, *held_out)),
            facts=facts,
            strings=run_state.as_strings(facts),
            tokens=schedule.lengths if schedule else (),
            peak_memory=PeakMemory(
                group.device,
                step.model.parameters(),
                replayed=config.model.cuda_graphs,
                checkpointed=config.model.grad_checkpointing,
            ),
            console=self.console,
            progress=Progress() if state is None else restore(state.entries, step, self.task),
            log_every=config.run.log_every,
            save_every=config.run.save_every,
            activation_max=ActivationMax(cast(TimmModel, step.model).blocks)
            if config.run.log_activations
            else None,
        )

    def _facts(self, images: int, digest: str | None, state: RunState | None) -> State:
        """What checkpoints hold besides the state.

        Args:
            images: In an update.
            digest: Of the teacher's weights.
            state: Where the run goes on.
        """
        reduction = self.layout.reduction
        return run_state.facts(
            self.config,
            self.data,
            self.layout.schedule,
            images=images,
            grid=None if reduction is None or reduction.info.staged else reduction.info.grid,
            teacher=digest,
            world=self.group.world,
            changes=() if state is None else state.entries.get("changes") or (),
        )

    def _source(self) -> Path | None:
        """The checkpoint to resume from; with auto, where one would be."""
        return run_state.resume_path(self.config.run.resume, self.config.run.output_dir)

    def _teacher(self) -> Teacher | None:
        """Build the teacher, if there is to be one, and print its name."""
        built = teacher(self.config, num_classes=self.data.num_classes)
        if built is not None:
            built.net.to(self.group.device)
            self.console.write(described(self.config))
        return built

    def _extended(self, state: RunState, teacher: str | None) -> RunState:
        """Return the state to go on from; a checkpoint of another run is refused."""
        images, world = images_per_update(self.config, self.group), self.group.world
        state = state.extended(self.config, images=images, teacher=teacher, world=world)
        done = state.updates
        point = f"epoch {state.epochs - 1}" if done is None else f"update {done}"
        self.console.write(f"going on from {state.path}, after {point}")
        return state

    def _model(self, *, fresh: bool = False) -> nn.Module:
        """Build the model; a fresh one for training starts from --finetune, if that is given."""
        seed_all(self.config.run.seed, "init")
        net = model(self.config, num_classes=self.data.num_classes)
        if fresh and self.config.run.finetune:
            path = weights_file(Path(self.config.run.finetune))
            state = RunState.read(path)
            self.console.write(f"starting from {path}: {state.differences(self.config)}")
            for line in state.load_into(net, head="drop"):
                self.console.write(f"  {line}")
        net.to(self.group.device)
        return net

    def _evaluate(
        self,
        net: nn.Module,
        *,
        held_out: Sequence[EvalBatchesLoader | DeviceEvalLoader],
        **given: Any,
    ) -> Scores:
        """Evaluate a model on the held-out `batches`, read by `take`.

        Metrics on samples that choose the best epoch, if there are such, follow by names of theirs.
        """
        called = self.task.inference(self.config, net, self.layout.input_size)
        called.train(net.training)

        def scores(part: EvalBatchesLoader | DeviceEvalLoader) -> Scores:
            return evaluate(
                called,
                part,
                **given,
                meter=batches.meter(self.config, self.data, self.group.device),
                processes=self.group,
                precision=precision(self.config, self.group),
            )

        found, *choosing = map(scores, held_out)
        metrics = {f"{CHOICE}{n}": v for own in choosing for n, v in own.metrics.items()}
        return found._replace(metrics={**found.metrics, **metrics})

    def _held_out(
        self, statistics: Statistics | None = None
    ) -> list[EvalBatchesLoader | DeviceEvalLoader]:
        """Held-out batches, and those that choose the best epoch if the data set has such."""
        return [
            batches.eval_batches(
                self.config,
                self.data,
                self.group,
                input_size=self.layout.input_size,
                statistics=statistics,
                samples=samples,
            )
            for samples in (self.data.val, self.data.choice)
            if samples is not None
        ]


def _left_of(place: Path) -> str:
    """Say what an interrupted run can go on from."""
    if not (place / KEPT[0]).is_file():
        return "nothing is saved of this run; SIGTERM would have saved its state"
    return f"--resume auto goes on from {place / KEPT[0]}"
