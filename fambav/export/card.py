"""The model card: what is known of an exported model, for people.

Every number comes from a file of the run, from arithmetic on sizes or from the check of the export;
what none of them says is "not measured".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import yaml

from fambav import costs
from fambav.export.description import Run, run_of
from fambav.models import Backbone
from fambav.tasks import Metric, task_of
from fambav.training.prediction import Pretrained

UNKNOWN = "not measured"

_LOADING = {
    "safetensors": "import fambav\n\nmodel = fambav.from_pretrained({folder!r})",
    "hf": "import fambav\n\nmodel = fambav.from_pretrained({folder!r})",
    "torch": (
        "import torch\n\n"
        "model = torch.export.load({folder!r} + '/model.pt2').module()\n"
        "logits = model(images)  # (batch, {channels}, {height}, {width}), float32"
    ),
    "onnx": (
        "import onnxruntime\n\n"
        "session = onnxruntime.InferenceSession({folder!r} + '/model.onnx')\n"
        "(logits,) = session.run(None, {{'images': images}})"
        "  # (batch, {channels}, {height}, {width}), float32"
    ),
}
_NEEDS = {
    "safetensors": "`fambav.from_pretrained` builds the model from `config.json`.",
    "hf": "`fambav.from_pretrained` builds the model from `config.json`.",
    "torch": (
        "`model.pt2` is a program of PyTorch's own operations for a batch of any size; it needs"
        " PyTorch alone."
    ),
    "onnx": (
        "`model.onnx` is of standard operators (opset 18) for a batch of any size; its scans are"
        " ONNX's own loops."
    ),
}


class Check(NamedTuple):
    """How an export compares with the model it was made of.

    Attributes:
        images: How many were compared.
        kind: What they are, in words.
        difference: Largest difference of a logit, of images without a near tie.
        agreeing: Images whose likeliest class is the same.
        tolerance: Largest difference that was allowed.
        seconds: Time of the export without the comparison.
        ties: Images that differ by more because two tokens are nearly as good and rounding chooses.
    """

    images: int
    kind: str
    difference: float
    agreeing: int
    tolerance: float
    seconds: float
    ties: int = 0

    def line(self) -> str:
        """Say it in a line."""
        more = f", but for {self.ties} with a near tie between tokens" if self.ties else ""
        return (
            f"{self.images} {self.kind}: largest difference of a logit {self.difference:.2g}"
            f" (at most {self.tolerance:g}){more}, same top-1 on {self.agreeing} of {self.images}"
        )


def card(model: Pretrained, told: dict[str, Any], check: Check, *, folder: str) -> str:
    """Return the card in Markdown.

    Args:
        model: The model.
        told: What `config.json` says of it.
        check: How its export compares.
        folder: Name of the folder, as it is loaded.
    """
    kind, run = told["fambav"]["format"], run_of(model)
    parts = [
        f"# {_title(model, told)}",
        _about(model, told),
        "## Loading",
        _loading(told, kind, folder),
        "## Tokens",
        _plan(model),
        "## Accuracy",
        _accuracy(model, run),
        "## Cost of an image",
        _cost(model),
        "## Check of this export",
        f"Compared with the model it was made of, on {check.line()}.",
    ]
    text = "\n\n".join(parts) + "\n"
    return (_front_matter(model, told, run) + text) if kind == "hf" else text


def _title(model: Pretrained, told: dict[str, Any]) -> str:
    return f"{told['architecture']} on {model.config.data.data_set}"


def _about(model: Pretrained, told: dict[str, Any]) -> str:
    images, names = told["pretrained_cfg"], model.class_names
    channels, height, width = images["input_size"]
    parameters = sum(p.numel() for p in model.net.parameters())
    mean, std = (", ".join(f"{v:.4g}" for v in images[name]) for name in ("mean", "std"))
    shown = "no names" if not names else ", ".join(map(str, names[:10]))
    more = ", ..." if names and len(names) > 10 else ""
    return "\n".join(
        [
            f"- model: {told['architecture']}, {parameters:,} parameters",
            f"- data set: {model.config.data.data_set}",
            f"- images: {channels} x {height} x {width}, resized bicubically, mean {mean},"
            f" standard deviation {std}",
            f"- classes: {told['num_classes']} ({shown}{more})",
        ]
    )


def _loading(told: dict[str, Any], kind: str, folder: str) -> str:
    channels, height, width = told["pretrained_cfg"]["input_size"]
    code = _LOADING[kind].format(folder=folder, channels=channels, height=height, width=width)
    return f"```python\n{code}\n```\n\n{_NEEDS[kind]}"


def _plan(model: Pretrained) -> str:
    net = model.net
    if not isinstance(net, Backbone):
        return "The model has no plan of tokens."
    schedule = net.schedule
    lines = ["| layer | removed | tokens that its mixer sees |", "|---:|---:|---:|"]
    for layer, (count, left) in enumerate(
        zip(schedule.counts, schedule.lengths, strict=True), start=1
    ):
        lines.append(f"| {layer} | {count} | {left} |")
    method = net.reduction.method
    how = "No token is removed." if not sum(schedule.counts) else f"Method: {_named(method)}."
    whole = schedule.start * len(schedule.lengths)
    summed = f"Token-layers: {sum(schedule.lengths)} of {whole} ({100 * schedule.share:.1f}%)."
    return "\n".join([*lines, "", f"{how} {summed}"])


def _named(method: Any) -> str:
    return str(getattr(method, "name", type(method).__name__))


def _accuracy(model: Pretrained, run: Run) -> str:
    def shown(metric: Metric) -> str:
        value = run.metrics[metric.name]
        return UNKNOWN if value is None else f"{value:.2f}{metric.suffix}"

    of = "" if run.epochs is None else f" of {run.epochs}"
    data_set = model.config.data.data_set
    primary, *others = task_of(data_set).metrics
    rows = {
        f"{primary.label} on the held-out images of {data_set}": shown(primary),
        **{metric.label: shown(metric) for metric in others},
        "seed": run.seed,
        "after epoch": None if run.epoch is None else f"{run.epoch}{of}",
        "date": run.date,
        "commit": run.commit,
        "hardware": run.hardware,
    }
    lines = [f"| {name} | {'unknown' if v is None else v} |" for name, v in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cost(model: Pretrained) -> str:
    try:
        report = costs.count(model.net)
    except ValueError:  # not a model whose cost is known
        return f"FLOPs: {UNKNOWN}."
    total, dense = report.total.json(), report.dense.json()
    lines = [
        "| convention | G operations | without reduction | what counts |",
        "|---|---:|---:|---|",
    ]
    for name, meaning in costs.CONVENTIONS.items():
        lines.append(f"| {name} | {total[name] / 1e9:.4f} | {dense[name] / 1e9:.4f} | {meaning} |")
    return "\n".join([*lines, "", "By arithmetic on sizes; time on a device: not measured."])


def _front_matter(model: Pretrained, told: dict[str, Any], run: Run) -> str:
    task, data_set = task_of(model.config.data.data_set), model.config.data.data_set.lower()
    value = run.metrics[task.primary.name]
    result = {
        "task": {"type": task.hub},
        "dataset": {"name": data_set, "type": data_set},
        "metrics": [{"type": task.primary.hub, "value": value}],
    }
    head: dict[str, Any] = {
        "license": "apache-2.0",
        "library_name": "fambav",
        "pipeline_tag": task.hub,
        "tags": [task.hub, "vision-mamba", "token-reduction", "fambav", "timm"],
        "datasets": [data_set],
        "metrics": [task.primary.hub],
    }
    if value is not None:
        head["model-index"] = [{"name": told["architecture"], "results": [result]}]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n"
