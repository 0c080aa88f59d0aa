"""Names that a flag or a config file may use, and what some of them build.

Torch-free, so that a misspelt name is refused in a fraction of a second.  Models are registered
with timm and only listed here; a test holds the lists equal to what is really there.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from itertools import product
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

from fambav.short_repr import short_repr

T = TypeVar("T")

_LONGEST = 200  # characters of a name that is compared: the time grows with their square

_GRIDS = (
    "tiny_patch16_224",
    "tiny_patch16_stride8_224",
    "small_patch16_224",
    "small_patch16_stride8_224",
    "base_patch16_224",
)
_SUFFIXES = ("midclstok", "middle_cls_token")


class Family(NamedTuple):
    """Models of one kind, as far as they are known before torch is.

    Attributes:
        models: Their names.
        arguments: Settings that shape the model, and the arguments of its constructor that they
            become.  A setting that another family has and this one lacks is refused.
        tasks: What they can learn, modules of `fambav.tasks`: first what they do by themselves,
            then what they do with a head of `HEADS` or `DETECTORS` on their maps.
        layers: Whether they are stacks of layers over an image, which are computed again to save
            memory, looked into and counted.
        reducible: Whether the tokens of these layers can be fused, merged and dropped.
        staged: Whether these layers are in stages, which Famba-V's strategies do not count in.
        scan: Whether they scan sequences by our operator.
    """

    models: tuple[str, ...]
    arguments: dict[str, str]
    tasks: tuple[str, ...] = ("classification", "segmentation", "detection")
    layers: bool = True
    reducible: bool = True
    staged: bool = False
    scan: bool = True


_ANY = {"input_size": "img_size", "drop_path": "drop_path_rate"}
FOREIGN = "timm/"  # what names of timm's own models start with
FAMILIES: dict[str, Family] = {
    "vim": Family(
        models=(
            "vim_tiny",
            "vim_small",
            "vim_base",
            "vim_micro",
            *(
                f"vim_{grid}_bimambav2_final_pool_mean_abs_pos_embed_with_{suffix}_div2"
                for grid, suffix in product(_GRIDS, _SUFFIXES)
            ),
        ),
        arguments={
            **_ANY,
            "patch_size": "patch_size",
            "stride": "stride",
            "class_token": "class_token",
            "bimamba_type": "bimamba_type",
            "legacy_init": "legacy_init",
            "drop": "drop_rate",
        },
    ),
    "plainmamba": Family(
        models=("plainmamba_l1", "plainmamba_l2", "plainmamba_l3", "plainmamba_micro"),
        arguments={**_ANY, "param_order": "param_order", "dt_bias_twice": "dt_bias_twice"},
    ),
    "vmamba": Family(
        models=(
            "vmamba_nano",
            *(f"vmamba_tiny_{form}" for form in ("s1l8", "s2l5")),
            *(f"vmamba_{size}_{form}" for size in ("small", "base") for form in ("s1l20", "s2l15")),
            *(f"vanilla_vmamba_{size}" for size in ("tiny", "small", "base")),
        ),
        arguments={**_ANY, "drop": "drop_rate"},
        staged=True,
    ),
    "vssd": Family(
        models=tuple(f"vssd_{size}" for size in ("nano", "micro", "tiny", "small", "base")),
        arguments={**_ANY, "drop": "drop_rate"},
        scan=False,
        staged=True,
    ),
    "groupmamba": Family(
        models=tuple(f"groupmamba_{size}" for size in ("nano", "tiny", "small", "base")),
        arguments={**_ANY, "drop": "drop_rate", "distillation_head": "distillation"},
        reducible=False,
        staged=True,
    ),
    "vim2": Family(
        models=("vim2_nano", "vim2_tiny", "vim2_small", "vim2_base"),
        arguments={**_ANY, "drop": "drop_rate"},
        reducible=False,
        staged=True,
    ),
    "tsm2": Family(
        models=("tsm2",),
        arguments={"lookback": "lookback", "drop": "drop_rate"},
        tasks=("forecasting",),
        layers=False,
        reducible=False,
    ),
    "dlinear": Family(
        models=("dlinear",),
        arguments={"lookback": "lookback"},
        tasks=("forecasting",),
        layers=False,
        reducible=False,
        scan=False,
    ),
    "vmunet": Family(
        models=("vmunet", "vmunet_deep", "vmunet_nano"),
        arguments=_ANY,
        reducible=False,
        tasks=("segmentation",),
        staged=True,
    ),
    "cvmh_unet": Family(
        models=("cvmh_unet", "cvmh_unet_nano"),
        arguments=_ANY,
        reducible=False,
        tasks=("segmentation",),
        staged=True,
    ),
    "timm": Family(
        models=(),
        arguments={**_ANY, "drop": "drop_rate"},
        layers=False,
        reducible=False,
        scan=False,
    ),
}
UNREDUCED = "whose tokens cannot be reduced: its layers take all of them"  # of a refusal
MODELS: tuple[str, ...] = tuple(name for known in FAMILIES.values() for name in known.models)


def models_of(task: str) -> tuple[str, ...]:
    """Return the models of `MODELS` that do a task by themselves."""
    able = (known for known in FAMILIES.values() if task == known.tasks[0])
    return tuple(name for known in able for name in known.models)


CLASSIFIERS: tuple[str, ...] = models_of("classification")


def family_of(model: str) -> Family:
    """Return the family of a model of `MODELS`, or of one of timm's own, timm/NAME."""
    if model.startswith(FOREIGN):
        return FAMILIES["timm"]
    return next(known for known in FAMILIES.values() if model in known.models)


STRATEGIES: tuple[str, ...] = ("none", "all", "interleaved", "lower", "upper")
STRATEGY_ALIASES: dict[str, str] = {"no": "none", "alternate": "interleaved"}
METHODS: tuple[str, ...] = (
    "famba-v",
    "ordered",
    "tome",
    "mtr",
    "prune-aligned",
    "evit",
    "random",
    "r-meeto",
    "stm",
    "storm",
    "utrc",
)
FUSION_METHODS = METHODS[:2]  # those of --fusion-method
HOOKS: tuple[str, ...] = ("before", "between", "after")
OWN_HEADS: tuple[str, ...] = ("upernet", "fcn")  # which label pixels on the maps of a backbone
LIBRARY_HEADS = ("unet", "unetplusplus", "fpn", "segformer", "manet", "linknet")
HEADS = OWN_HEADS + LIBRARY_HEADS  # the others are of segmentation-models-pytorch
DETECTORS = ("faster-rcnn", "mask-rcnn")  # which find boxes, and the second one masks in them
SCAN_POLICIES: tuple[str, ...] = ("compact", "aligned", "masked")
GAP_POLICIES: tuple[str, ...] = ("bias", "cached", "hold_prev", "self", "none")
CLASS_TOKEN_POLICIES: tuple[str, ...] = ("exact", "proportional", "middle")
SCHEDULES = (  # forms of --reduction-schedule, and a pattern that all of them but published match
    "r:5, r:5@3-23/2, ramp:16,-1, list:7,7,0, 6:9,8:12, keep:0.8@5,10, tokens:157,125@10,20,"
    " upper:6:9, all:7, of stages r:8@2.1-2.4, or published"
)
SCHEDULE_FORM = (
    r"(r|ramp|list|keep|tokens):[-\d.,@/]+|(all|interleaved|alternate|lower|upper)(:\d+)+"
    r"|(\d+\.)?\d+:\d+(,(\d+\.)?\d+:\d+)*"
)
DEVICE_FORM = r"cpu|cuda(:\d{1,3})?"
DATA_SETS: dict[str, str] = {  # with their tasks, modules of `fambav.tasks`
    **dict.fromkeys(
        ("DIGITS", "SHAPES100", "CIFAR", "CIFAR10", "IMNET", "FOLDER", "INAT", "INAT19", "FAKE"),
        "classification",
    ),
    **dict.fromkeys(("SHAPES-SEG", "SEGFOLDER", "ADE20K", "VAIHINGEN", "POTSDAM"), "segmentation"),
    **dict.fromkeys(("SHAPES-DET", "COCO"), "detection"),
    **dict.fromkeys(("WAVES", "ETTh1", "ETTh2", "ETTm1", "ETTm2", "CSV"), "forecasting"),
}
MADE = ("DIGITS", "SHAPES100", "SHAPES-SEG", "SHAPES-DET", "FAKE", "WAVES")  # without files
CLASS_TOKENS: tuple[str, ...] = ("middle", "head", "double", "none")
BIMAMBA: tuple[str, ...] = ("v2", "v1", "none")
PARAM_ORDERS: tuple[str, ...] = ("raster", "permuted")
SCAN_BACKENDS: tuple[str, ...] = ("triton", "cuda", "numba", "cpu", "reference")


CONFIGS = Path(__file__).parent / "configs"  # the YAML files that come with the package


def shipped(path: str | Path) -> Path:
    """Return a path, or of one such as configs/digits/vim_micro.yaml that is not there, ours.

    Commands of the documentation so work in any folder; a file of the user's own always wins.
    """
    own = CONFIGS.parent / path
    known = Path(path).parts[:1] == (CONFIGS.name,) and not Path(path).exists() and own.is_file()
    return own if known else Path(path)


def configs() -> tuple[str, ...]:
    """Return the files of settings that come with the package, as `--config` takes them."""
    files = sorted(CONFIGS.glob("*/*.yaml"))
    return tuple(str(p.relative_to(CONFIGS.parent)) for p in files if p.parent.name != "grids")


def recipes(data_set: str) -> tuple[str, ...]:
    """Return the files of `configs()` that say they are for a data set, those of Vim first."""
    line = f"data_set: {data_set}\n"
    known = (n for n in configs() if line in (CONFIGS.parent / n).read_text(encoding="utf-8"))
    return tuple(sorted(known, key=lambda name: ("/vim_" not in name, name)))


def grids() -> dict[str, Path]:
    """Return the files of the grids of experiments that come with the package, by name."""
    return {path.stem: path for path in sorted((CONFIGS / "grids").glob("*.yaml"))}


PICTURES: dict[str, str] = {  # what `fambav show` draws
    "groups": "patches of each token, layer by layer",
    "strategies": "patches of each token under every strategy, same weights",
    "animation": "patches of each token, animated over the layers (GIF)",
    "similarity": "cosine of every two tokens, layer by layer",
    "mean_similarity": "mean cosine of neighbours and of all pairs of tokens, over the layers",
    "layers": "tokens and operations of each layer",
    "scan": "path of the scan before and after tokens are removed",
    "masks": "image, truth and prediction of a segmentation",
    "boxes": "truth and prediction of a detection",
    "curves": "accuracy, loss and learning rate of all runs, over the epochs",
}


def nearest(name: object, names: Collection[str]) -> str:
    """Return a hint for a name that is not among `names`.

    Args:
        name: The unknown one, or what is no name at all.
        names: The known ones.

    Returns:
        "did you mean 'x'?" if one of the names is close, else "known: x, y, z".
    """
    folded = {other.lower(): other for other in names}
    text = name[:_LONGEST].lower() if isinstance(name, str) else ""
    close = difflib.get_close_matches(text, folded, n=1)
    return f"did you mean {folded[close[0]]!r}?" if close else f"known: {', '.join(names)}"


class Registry(Generic[T]):
    """A table from public names to builders.  A name is taken once and never replaced."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._builders: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate a builder so that flags and config files can use `name`.

        Raises:
            ValueError: If the name is taken.
        """

        def add(builder: T) -> T:
            if name in self._builders:
                raise ValueError(f"{self.kind} is {name!r}, expected a name that is not taken")
            self._builders[name] = builder
            return builder

        return add

    def __getitem__(self, name: str) -> T:
        if not isinstance(name, str) or name not in self._builders:
            raise ValueError(
                f"{self.kind} is {short_repr(name)}, expected a known name;"
                f" {nearest(name, self.names())}"
            )
        return self._builders[name]

    def names(self) -> list[str]:
        """Return every registered name, in the order of registration."""
        return list(self._builders)


REDUCERS: Registry[Callable[..., Any]] = Registry("reduction")
BUILDERS: Registry[Callable[..., Any]] = Registry("data_set")
TASKS: Registry[Any] = Registry("task")


def register_data_set(name: str, task: str = "classification") -> Callable[[T], T]:
    """Decorate what opens a data set of one's own, so that `--data-set` takes its name.

    Args:
        name: The name.
        task: What is learnt of it, a module of `fambav.tasks`.

    Returns:
        A decorator of a function that gets a `fambav.data.datasets.Request` and returns a
        `fambav.data.DataSet`.

    Raises:
        ValueError: If the task is unknown, or, by the decorator, the name is taken.
    """
    tasks = set(DATA_SETS.values())
    if task not in tasks:
        raise ValueError(
            f"task is {short_repr(task)}, expected a known name; {nearest(task, tasks)}"
        )

    def add(builder: T) -> T:
        known = BUILDERS.register(name)(cast("Any", builder))
        DATA_SETS[name] = task
        return cast("T", known)

    return add
