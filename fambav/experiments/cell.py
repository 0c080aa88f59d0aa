"""The process of a cell: trains or evaluates FOLDER/cell.yaml as main.py does, after a warm-up.

FOLDER/figures.json gets the figures, or the error, whose traceback is in FOLDER/output.txt.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fambav import config
from fambav.engine.checkpoint import write_text
from fambav.experiments.runs import read_run
from fambav.heads import HeadedModel
from fambav.training.job import TrainingJob, opened
from fambav.training.network import model
from fambav.training.step import precision

SETTINGS, OUTPUT, FIGURES = "cell.yaml", "output.txt", "figures.json"


def perform(folder: Path, variables: Mapping[str, str]) -> None:
    """Run in the process of a cell: end with the parent process, leave interruptions to it.

    Args:
        folder: Of the cell.
        variables: Added to the environment before CUDA is initialised.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    os.environ.update(variables)
    with (folder / OUTPUT).open("ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    try:
        _write(folder, {"figures": figures(folder)})
    except Exception as error:
        _write(folder, {"error": " ".join(str(error).split()) or type(error).__name__})
        raise


def figures(folder: Path) -> dict[str, Any]:
    """Carry out a cell and return its figures."""
    wanted = config.load(folder / SETTINGS)
    with opened(wanted) as job:
        if wanted.run.eval:
            plan, scores = job.layout.schedule, job.evaluate()
            metrics = {m.name: scores.metrics[m.name] for m in job.task.metrics}
            return {**metrics, "token_layers": plan and plan.share}
        _warm_up(job)
        job.train()
    result, epochs = read_run(folder), wanted.optim.epochs
    return {
        **result.metrics,
        "token_layers": result.share,
        "epochs": epochs,
        "seconds": round(result.seconds, 3),
        "seconds_per_epoch": round(result.seconds / epochs, 3),
        "images_per_second": result.speed,
        "memory_mib": result.memory_mib,
        "memory_kind": result.memory_kind,
    }


def _warm_up(job: TrainingJob) -> None:
    """Run a batch through a model of the cell's, so that no row pays for what a process does once.

    Kernels are compiled or loaded when they first run: seconds, which the first epoch would show as
    time of training.
    """
    wanted, device = job.config, job.group.device
    net = model(wanted, num_classes=job.data.num_classes).to(device).train()
    channels = len(job.data.statistics(wanted.data.data_stats)[0])
    shape = job.task.input_shape(channels, job.layout.input_size)
    inputs = torch.zeros(wanted.optim.batch_size, *shape, device=device)
    with precision(wanted, job.group).autocast():
        # Of a model with a head the backbone: kernels are there, and some heads want targets.
        outputs = net.maps(inputs) if isinstance(net, HeadedModel) else net(inputs)
    parts = [outputs] if isinstance(outputs, Tensor) else outputs
    torch.stack([part.float().sum() for part in parts]).sum().backward()


def _write(folder: Path, outcome: dict[str, Any]) -> None:
    write_text(folder / FIGURES, json.dumps(outcome) + "\n")


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # a thread cannot end its process otherwise; files are written atomically
