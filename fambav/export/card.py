"""The model card: what is known of an exported model, for people.

Every number comes from a file of the run, from arithmetic on sizes or from the check of the export;
what none of them says is "not measured".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import yaml

from fambav import flops
from fambav.experiments import changed_settings
from fambav.table import Table
from fambav.tasks import Metric, task_of
from fambav.training.inference import LoadedRun

_UNKNOWN = "not measured"
_CARD = """\
# {architecture} on {data_set}

- model: {architecture}, {parameters:,} parameters
- data set: {data_set}
{inputs}

## Loading

```python
{code}
```

{needs}

## Tokens

{plan}

## Accuracy

{accuracy}

## Cost of a sample

{cost}

## Check of this export

Compared with the model it was made of, on {check}.
"""
_OURS = (
    "import fambav\n\nmodel = fambav.from_pretrained({folder!r})",
    "`fambav.from_pretrained` builds the model from `config.json`.",
)
_LOADING = {  # of each format: the code, and what it needs
    "safetensors": _OURS,
    "hf": _OURS,
    "pth": _OURS,
    "torch": (
        "import torch\n\n"
        "model = torch.export.load({folder!r} + '/model.pt2').module()\n"
        "outputs = model(inputs)  # (batch, {shape}), float32",
        "`model.pt2` is a program of PyTorch's own operations for a batch of any size; it needs"
        " PyTorch alone.",
    ),
    "onnx": (
        "import onnxruntime\n\n"
        "session = onnxruntime.InferenceSession({folder!r} + '/model.onnx')\n"
        "(outputs,) = session.run(None, {{'images': inputs}})  # (batch, {shape}), float32",
        "`model.onnx` is of standard operators (opset 18) for a batch of any size; its scans are"
        " ONNX's own loops.",
    ),
}


class Check(NamedTuple):
    """How an export compares with the model it was made of.

    Attributes:
        images: How many were compared.
        kind: What they are, in words.
        difference: Largest difference of a logit, of images without a near tie.
        agreeing: Images whose likeliest class is the same; None where outputs are no classes.
        tolerance: Largest difference that was allowed.
        seconds: Time of the export without the comparison.
        ties: Images that differ by more because two tokens are nearly as good and rounding chooses.
    """

    images: int
    kind: str
    difference: float
    agreeing: int | None
    tolerance: float
    seconds: float
    ties: int = 0

    def line(self) -> str:
        """Return it as a line of text."""
        more = f", but for {self.ties} with a near tie between tokens" if self.ties else ""
        same = f", same top-1 on {self.agreeing} of {self.images}"
        same = "" if self.agreeing is None else same
        return (
            f"{self.images} {self.kind}: largest difference of an output {self.difference:.2g}"
            f" (at most {self.tolerance:g}){more}{same}"
        )


def card(run: LoadedRun, description: Mapping[str, Any], check: Check, *, folder: str) -> str:
    """Return the card in Markdown, for the format hf with the metadata that its hub reads.

    Args:
        run: The model.
        description: What `config.json` holds.
        check: How the export compares.
        folder: Name of the folder, as it is loaded.
    """
    kind, trained = description["fambav"]["format"], description["fambav"]["run"]
    code, needs = _LOADING[kind]
    text = _CARD.format(
        architecture=description["architecture"],
        data_set=run.config.data.data_set,
        parameters=sum(p.numel() for p in run.net.parameters()),
        inputs="\n".join(run.task.input_lines(cast(Any, run.net).pretrained_cfg)),
        code=code.format(shape=", ".join(map(str, run.input_size)), folder=folder),
        needs=needs,
        plan=_plan(run),
        accuracy=_accuracy(run, trained),
        cost=_cost(run),
        check=check.line(),
    )
    head = f"---\n{_metadata(run, description)}---\n\n" if kind == "hf" else ""
    return head + text


def _plan(run: LoadedRun) -> str:
    reduction = getattr(run.net, "reduction", None)
    if reduction is None:
        return "The model has no plan of tokens."
    schedule = reduction.schedule
    whole = schedule.unreduced
    name = getattr(reduction.method, "name", type(reduction.method).__name__)
    how = f"Method: {name}." if schedule.removed else "No token is removed."
    pairs = zip(schedule.counts, schedule.lengths, strict=True)
    return Table(
        head=("layer", "removed", "tokens that its mixer sees"),
        rows=[
            [name, str(count), str(seen)]
            for name, (count, seen) in zip(schedule.names, pairs, strict=True)
        ],
        names=0,
        notes=[
            f"{how} Token-layers: {sum(schedule.lengths)} of {whole} ({100 * schedule.share:.1f}%)."
        ],
    ).render("markdown")


def _accuracy(run: LoadedRun, trained: Mapping[str, Any]) -> str:
    def value(metric: Metric) -> str:
        known = trained[metric.name]
        return _UNKNOWN if known is None else f"{known:.{metric.digits}f}{metric.suffix}"

    data_set = run.config.data.data_set
    primary, *others = task_of(data_set).metrics
    epoch = None if trained["epoch"] is None else f"{trained['epoch']} of {trained['epochs']}"
    changes = trained.get("changes", ())
    about = {
        "seed": trained["seed"],
        "after epoch": epoch,
        **{name: trained[name] for name in ("date", "commit", "hardware")},
        **{
            f"change {n}": changed_settings(c["epoch"], c["settings"])
            for n, c in enumerate(changes, 1)
        },
    }
    return Table(
        head=("", ""),
        rows=[
            [f"{primary.label} on the held-out samples of {data_set}", value(primary)],
            *([metric.label, value(metric)] for metric in others),
            *([name, "unknown" if known is None else str(known)] for name, known in about.items()),
        ],
        names=2,
    ).render("markdown")


def _cost(run: LoadedRun) -> str:
    try:
        report = flops.count(run.net)
    except ValueError:  # not a model whose cost is known
        return f"FLOPs: {_UNKNOWN}."
    total, unreduced = report.total.as_dict(), report.unreduced.as_dict()
    return Table(
        head=("convention", "what counts", "G operations", "without reduction"),
        rows=[
            [name, meaning, f"{total[name] / 1e9:.4f}", f"{unreduced[name] / 1e9:.4f}"]
            for name, meaning in flops.CONVENTIONS.items()
        ],
        names=2,
        notes=["By arithmetic on sizes; time on a device: not measured."],
    ).render("markdown")


def _metadata(run: LoadedRun, description: Mapping[str, Any]) -> str:
    """Return the YAML that Hugging Face's hub reads."""
    task, data_set = task_of(run.config.data.data_set), run.config.data.data_set.lower()
    value = description["fambav"]["run"][task.primary.name]
    metadata: dict[str, Any] = {
        "license": "apache-2.0",
        "library_name": "fambav",
        "pipeline_tag": task.hub,
        "tags": [task.hub, "fambav", *task.tags],
        "datasets": [data_set],
        "metrics": [task.primary.hub],
    }
    if value is not None:
        result = {
            "task": {"type": task.hub},
            "dataset": {"name": data_set, "type": data_set},
            "metrics": [{"type": task.primary.hub, "value": value}],
        }
        metadata["model-index"] = [{"name": description["architecture"], "results": [result]}]
    return yaml.safe_dump(metadata, sort_keys=False)
