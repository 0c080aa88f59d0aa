"""The YAML file of a grid.

    base: vim_micro.yaml           # settings of the dense model, a file beside this one
    seeds: [0, 1, 2]
    finetune: {epochs: 2, ...}     # what differs while fine-tuning; may be left out
    rows:
      - {name: ordered 12, fusion_strategy: all, fusion_token: 12, fusion_method: ordered}

For each seed one dense model is trained, as `base` says.  For each row and seed its weights are
evaluated with the row's settings, and fine-tuned with them.  The first row, `dense`, has no
settings of its own: what the others gain by more epochs, it gains too.

    train: scratch                 # instead, every row and seed is trained by itself
    seeds: [0, 1, 2]
    names: [strategy, method]      # heads of several columns of names
    paper: {source: "arXiv:...", show: figures}
    rows:
      - {name: [none, "-"], config: vim_tiny.yaml, paper: {acc1: 70.1, time: "4:33:02"}}
      - {name: [upper, ordered], config: vim_tiny_upper.yaml, fusion_method: ordered}

Then the first row without reduction is what the others are compared with.  In both, `vary` lists
the settings besides those of reduction in which rows may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fambav import config
from fambav.comparison import likeness
from fambav.config import OPTIONS, Config, ConfigError, format_value, read_yaml, refuse
from fambav.experiments.grid import DENSE, FREE, SCRATCH, TUNED, Cell, Grid
from fambav.experiments.rows import NONE, OWN, Row, read_names, read_rows, read_settings
from fambav.registry import nearest

_KEYS = ("title", "train", "base", "seeds", "finetune", "names", "vary", "paper", "rows")
_TRAIN = ("from-dense", "scratch")
_SHOW = ("figures", "differences")
_LARGEST = OPTIONS["seed"].bounds.high

Content = dict[Any, Any]


class Layout(NamedTuple):
    """What has to run.

    Attributes:
        rows: The rows in the order of the table.
        baseline: The one that the others are compared with.
        cells: The cells in the order in which they run.
    """

    rows: tuple[Row, ...]
    baseline: Row
    cells: tuple[Cell, ...]


class Case(NamedTuple):
    """What a grid's file says beside its rows.

    Attributes:
        path: The file.
        given: Its keys and values.
        names: Heads of the columns that name rows.
        seeds: The seeds.
        vary: Settings in which rows may differ besides those of reduction.
        data_path: Folder of the data set instead of that of the settings.
    """

    path: Path
    given: Content
    names: tuple[str, ...]
    seeds: tuple[int, ...]
    vary: tuple[str, ...]
    data_path: str | None


def read(path: Path, *, seeds: int | None = None, data_path: str | None = None) -> Grid:
    """Read a grid.

    Args:
        path: The file.
        seeds: How many seeds, from 0, instead of those of the file.
        data_path: Folder of the data set instead of that of the settings.

    Raises:
        ConfigError: If the file or one of its settings cannot be used.
    """
    given = read_yaml(path)
    for key in given:
        if key not in _KEYS:
            shown, hint = format_value(key), nearest(str(key), _KEYS)
            raise ConfigError(f"{path}: {shown} is not of a grid; {hint}")
    scratch = _choice(f"{path}: train", given.get("train", _TRAIN[0]), _TRAIN) == "scratch"
    listed = _seeds(f"{path}: seeds", given.get("seeds"))
    names = read_names(path, given.get("names"))
    case = Case(
        path=path,
        given=given,
        names=names,
        seeds=listed if seeds is None else tuple(range(seeds)),
        vary=_vary(path, given.get("vary", [])),
        data_path=data_path,
    )
    taken = () if scratch else (DENSE,)
    rows = read_rows(path, given.get("rows"), names=len(names), taken=taken)
    layout = _from_scratch(case, rows) if scratch else _from_dense(case, rows)
    source, show = _paper(path, given.get("paper"), layout)
    return Grid(
        path=path,
        title=_text(f"{path}: title", given.get("title", "")),
        scratch=scratch,
        names=names,
        rows=layout.rows,
        baseline=layout.baseline,
        vary=case.vary,
        source=source,
        differences=show == "differences",
        seeds=case.seeds,
        cells=layout.cells,
    )


def _from_dense(case: Case, rows: Sequence[Row]) -> Layout:
    """Every row starts from the dense model of its seed."""
    path, given = case.path, case.given
    base = _base(case, f"{path}: base", _base_path(path, given.get("base")))
    tuning = read_settings(f"{path}: finetune", given["finetune"]) if "finetune" in given else None
    if tuning is not None:
        _with(base, tuning, f"{path}: finetune")
    dense = Row(
        name=DENSE, slug=DENSE, labels=(DENSE, *[NONE] * (len(case.names) - 1)), settings={}
    )
    phases: list[tuple[Row, str, Config]] = []
    if tuning is not None:
        phases.append((dense, TUNED, _with(base, tuning, f"{path}: finetune")))
    for row in rows:
        label = f"{path}: row {row.name!r}"
        if row.file is not None:
            raise ConfigError(f"{label} has a config, which has no meaning without train: scratch")
        if not row.settings:
            refuse(label, {}, f"settings; row {DENSE!r} is there without asking")
        phases.append((row, FREE, _with(base, row.settings, label)))
        if tuning is not None:
            tuned = _with(base, {**tuning, **row.settings}, label)
            _refuse_other_recipe(case, row, tuned, phases[0])
            phases.append((row, TUNED, tuned))
    starts = [
        Cell(row=dense, seed=seed, phase=DENSE, config=base.replace(seed=seed))
        for seed in case.seeds
    ]
    cells = starts + [
        Cell(row=row, seed=s.seed, phase=phase, config=found.replace(seed=s.seed), start=s)
        for s in starts
        for row, phase, found in phases
    ]
    return Layout((dense, *rows), dense, tuple(cells))


def _from_scratch(case: Case, rows: Sequence[Row]) -> Layout:
    """Every row is trained by itself."""
    path, given = case.path, case.given
    if "finetune" in given:
        raise ConfigError(f"{path}: finetune has no meaning with train: scratch")
    common = None
    if "base" in given:
        common = _base(case, f"{path}: base", _base_path(path, given["base"]))
    configs: list[Config] = []
    for row in rows:
        label = f"{path}: row {row.name!r}"
        own = common if row.file is None else _base(case, f"{label}: config", row.file)
        if own is None:
            raise ConfigError(f"{label} has no config, expected one, or a base of the grid")
        configs.append(_with(own, row.settings, label))
    dense = next((n for n, found in enumerate(configs) if found == found.dense()), None)
    if dense is None:
        refuse(f"{path}: rows", [row.name for row in rows], "a row without reduction among them")
    plain = configs[dense].flat()
    for row, found in zip(rows, configs, strict=True):
        _refuse_other_recipe(case, row, found, (rows[dense], SCRATCH, configs[dense]))
    told = [
        replace(row, settings={k: v for k, v in found.flat().items() if v != plain[k]})
        for row, found in zip(rows, configs, strict=True)
    ]
    cells = (
        Cell(row=row, seed=seed, phase=SCRATCH, config=found.replace(seed=seed))
        for seed in case.seeds
        for row, found in zip(told, configs, strict=True)
    )
    return Layout(tuple(told), told[dense], tuple(cells))


def _refuse_other_recipe(
    case: Case, row: Row, found: Config, first: tuple[Row, str, Config]
) -> None:
    """Refuse a row that would be compared with one that is trained in another way."""
    recipes = [likeness.recipe(settings) for settings in (first[2], found)]
    other = likeness.differing(recipes)
    left = {name: values for name, values in other.items() if name not in case.vary}
    if left:
        raise ConfigError(
            f"{case.path}: row {row.name!r} differs from {first[0].name!r} in "
            f"{likeness.told(left)}, expected the same recipe; "
            f"vary: [{', '.join(left)}] in the grid allows it"
        )


def _base_path(path: Path, given: Any) -> Path:
    if not isinstance(given, str):
        refuse(f"{path}: base", given, "the path of a YAML file")
    return path.parent / given


def _base(case: Case, label: str, file: Path) -> Config:
    """Settings of a file; a cell that names no number of threads computes with one."""
    found = config.load(file)
    for name in OWN:
        if found.flat()[name] != OPTIONS[name].default:
            raise ConfigError(f"{label} sets {name}, which the grid sets itself")
    places = {} if case.data_path is None else {"data_path": case.data_path}
    threads = {"threads": 1} if found.run.threads is None else {}
    return _with(found, {**places, **threads}, label)


def _seeds(label: str, given: Any) -> tuple[int, ...]:
    whole = isinstance(given, list) and all(type(seed) is int for seed in given)
    if not whole or not given or not all(0 <= seed <= _LARGEST for seed in given):
        refuse(label, given, "a list of seeds such as [0, 1, 2]")
    if len(set(given)) < len(given):
        refuse(label, given, "every seed once")
    return tuple(given)


def _vary(path: Path, given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        refuse(f"{path}: vary", given, "a list of settings such as [lr]")
    for name in given:
        if name not in OPTIONS:
            raise ConfigError(f"{path}: vary: {name!r} is not a setting; {_near(name)}")
    return tuple(given)


def _near(name: str) -> str:
    hint = nearest(name, OPTIONS)
    return hint if hint.startswith("did you mean") else "see main.py --help"


def _paper(path: Path, given: Any, layout: Layout) -> tuple[str, str]:
    """Where the papers' figures come from, and whether they or their differences are shown."""
    label = f"{path}: paper"
    if given is None:
        if any(row.paper for row in layout.rows):
            raise ConfigError(f"{label} is missing, expected {{source: ...}}, as rows have figures")
        return "", _SHOW[0]
    if not isinstance(given, dict) or not given.keys() <= {"source", "show"}:
        refuse(label, given, "{source: ..., show: figures}")
    show = _choice(f"{label}: show", given.get("show", _SHOW[0]), _SHOW)
    if show == "differences" and layout.baseline.paper is None:
        raise ConfigError(
            f"{path}: row {layout.baseline.name!r} has no figures of the paper, "
            "expected some, as differences to them are shown"
        )
    return _text(f"{label}: source", given.get("source")), show


def _choice(label: str, given: Any, known: Sequence[str]) -> str:
    if given not in known:
        refuse(label, given, f"one of {', '.join(known)}")
    return str(given)


def _text(label: str, given: Any) -> str:
    if not isinstance(given, str):
        refuse(label, given, "a text")
    return given


def _with(base: Config, settings: dict[str, Any], label: str) -> Config:
    try:
        return base.replace(**settings)
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from None
