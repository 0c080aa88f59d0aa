"""The run folder: its name, and the files written before the first update."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

from fambav.config import Config
from fambav.data import DataSet
from fambav.engine import checkpoint, run_dir
from fambav.engine.run_dir import Recorder
from fambav.engine.tracker import Tracker
from fambav.engine.trainer import Trainer
from fambav.reduction import Schedule


def named(config: Config, source: Path | None) -> Path:
    """Return the folder in the settings, that of the run to go on with, or a new one."""
    if config.run.output_dir is not None:
        return Path(config.run.output_dir)
    if source is not None:
        return source.parent
    name = config.model.model.replace("/", "_")
    now = time.strftime("%Y%m%d-%H%M%S")
    return Path("output") / f"{name}_{config.data.data_set.lower()}_{now}"


def open_folder(
    folder: Path,
    config: Config,
    plan: Schedule | None,
    data_set: DataSet,
    trainer: Trainer,
    *,
    source: Path | None,
) -> Recorder:
    """Make the run folder, write what is known so far, and open its log.

    Args:
        folder: The run folder.
        config: The complete settings.
        plan: Tokens at each layer, if the model has such a plan.
        data_set: The data set.
        trainer: The run, standing where it will go on.
        source: The checkpoint that it goes on from, or None.

    Raises:
        OSError: If the folder cannot be written.
    """
    console = trainer.console
    run_dir.prepare(folder)
    if source is None or source.parent.resolve() != folder.resolve():
        kept = run_dir.set_aside(folder)
        if kept is not None:
            console.write(f"{folder} holds an earlier run; its files are now in {kept}")
    if source is not None:
        trainer.repair(source, folder)
    group, precision = trainer.step.processes, trainer.step.precision.name
    about = run_dir.environment(
        processes=group.world,
        device=str(group.device),
        precision=precision,
        data={"name": data_set.name, "sha256": data_set.digest, "train": len(data_set.train)},
        resumed=source and str(source),
        unfused=getattr(trainer.step.model, "unfused", None) or None,
        **{name: trainer.facts[name] for name in ("changes",) if name in trainer.facts},
    )
    checkpoint.write_text(folder / "config.yaml", config.to_yaml())
    checkpoint.write_text(folder / "env.json", json.dumps(about, indent=1) + "\n")
    if plan is not None:
        removal = {**asdict(plan), "share": plan.share}
        checkpoint.write_text(folder / "plan.json", json.dumps(removal) + "\n")
    console.write(f"{config.model.model} on {data_set.name}: {group.device}, {precision}")
    console.write(f"run folder: {folder}")
    done = trainer.progress.updates
    done = trainer.progress.epochs * trainer.updates if done is None else done
    tracker = Tracker(config.run.tracker, folder, config.flat(), warn=console.write)
    history = trainer.progress.history
    return Recorder(folder, history, updates=done, tracker=tracker, warn=console.write)
