"""A grid of settings and seeds, as a YAML file says, and the cells that it asks for.

    base: vim_micro.yaml           # settings of the dense model, a file beside this one
    seeds: [0, 1, 2]
    finetune: {epochs: 2, ...}     # what differs while fine-tuning; may be left out
    rows:
      - {name: ordered 12, fusion_strategy: all, fusion_token: 12, fusion_method: ordered}

For each seed one dense model is trained, as `base` says.  For each row and seed its weights are
evaluated with the row's settings, and fine-tuned with them.  The first row, `dense`, has no
settings of its own: what the others gain by more epochs, it gains too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fambav import config
from fambav.config import Config, ConfigError
from fambav.config.options import OPTIONS
from fambav.config.sources import content
from fambav.config.values import refuse, shown
from fambav.registry import nearest

DENSE, FREE, TUNED = PHASES = ("dense", "training-free", "fine-tuned")

_KEYS = ("base", "seeds", "finetune", "rows")
_OWN = ("seed", "output_dir", "resume", "finetune", "eval")  # settings that the grid itself sets
_PLACES = {"output_dir", "resume", "finetune", "eval", "data_path", "download", "log_every"}
_LARGEST = OPTIONS["seed"].bounds.high


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        name: What the file calls it.
        slug: The same as the name of a folder.
        settings: What differs from the dense model, by the names of settings.
    """

    name: str
    slug: str
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the grid.

    Attributes:
        row: Its row.
        seed: Of every random draw.
        phase: One of PHASES.
        config: Its settings, without the places of files.
        start: The cell whose weights it starts from; None for a dense model.
    """

    row: Row
    seed: int
    phase: str
    config: Config
    start: Cell | None = None

    @property
    def name(self) -> str:
        """Row, seed and phase in words; no other cell of the grid has the same."""
        return f"{self.row.name}, seed {self.seed}, {self.phase}"

    @property
    def place(self) -> Path:
        """Its folder, relative to the grid's."""
        return Path("cells", self.row.slug, f"seed{self.seed}", self.phase)

    @property
    def settings(self) -> dict[str, Any]:
        """All that its result depends on besides the code: plain data, as JSON reads it back."""
        return {
            "config": _lasting(self.config),
            "start": None if self.start is None else _lasting(self.start.config),
        }

    def agrees(self, settings: Any) -> bool:
        """Tell whether `settings`, read from a file, are those of this cell.

        A setting that the file does not know counts as the default, so that a result outlives the
        addition of settings.
        """
        now = self.settings
        if not isinstance(settings, dict) or settings.keys() != now.keys():
            return False
        return all(_same(settings[part], wanted) for part, wanted in now.items())


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All that a file asks for.

    Attributes:
        path: The file.
        rows: The rows, the dense one first.
        seeds: The seeds.
        cells: The cells in the order in which they run: all dense models, then seed by seed.
    """

    path: Path
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]


def read(path: Path) -> Grid:
    """Read a grid.

    Raises:
        ConfigError: If the file or one of its settings cannot be used.
    """
    given = content(path)
    for key in given:
        if key not in _KEYS:
            raise ConfigError(f"{path}: {shown(key)} is not of a grid; {nearest(str(key), _KEYS)}")
    base = _base(path, given.get("base"))
    tuning = _settings(f"{path}: finetune", given["finetune"]) if "finetune" in given else None
    if tuning is not None:
        _with(base, tuning, f"{path}: finetune")
    seeds = _seeds(f"{path}: seeds", given.get("seeds"))
    rows = (Row(name=DENSE, slug=DENSE, settings={}), *_rows(path, given.get("rows")))
    cells = _cells(path, base, rows, seeds, tuning)
    return Grid(path=path, rows=rows, seeds=seeds, cells=tuple(cells))


def _cells(
    path: Path,
    base: Config,
    rows: Sequence[Row],
    seeds: Sequence[int],
    tuning: dict[str, Any] | None,
) -> list[Cell]:
    phases: list[tuple[Row, str, Config]] = []
    for row in rows:
        label = f"{path}: row {row.name!r}"
        if row.settings:
            phases.append((row, FREE, _with(base, row.settings, label)))
        if tuning is not None:
            phases.append((row, TUNED, _with(base, {**tuning, **row.settings}, label)))
    starts = [
        Cell(row=rows[0], seed=seed, phase=DENSE, config=base.replace(seed=seed)) for seed in seeds
    ]
    return starts + [
        Cell(row=row, seed=s.seed, phase=phase, config=found.replace(seed=s.seed), start=s)
        for s in starts
        for row, phase, found in phases
    ]


def _base(path: Path, given: Any) -> Config:
    """The dense model's settings; a cell that names no number of threads computes with one."""
    if not isinstance(given, str):
        refuse(f"{path}: base", given, "the path of a YAML file")
    found = config.load(path.parent / given)
    for name in _OWN:
        if found.flat()[name] != OPTIONS[name].default:
            raise ConfigError(f"{path}: base sets {name}, which the grid sets itself")
    return found.replace(threads=1) if found.run.threads is None else found


def _seeds(label: str, given: Any) -> tuple[int, ...]:
    whole = isinstance(given, list) and all(type(seed) is int for seed in given)
    if not whole or not given or not all(0 <= seed <= _LARGEST for seed in given):
        refuse(label, given, "a list of seeds such as [0, 1, 2]")
    if len(set(given)) < len(given):
        refuse(label, given, "every seed once")
    return tuple(given)


def _rows(path: Path, given: Any) -> list[Row]:
    if not isinstance(given, list) or not given:
        refuse(f"{path}: rows", given, "a list of rows, each with a name and settings")
    rows: list[Row] = []
    taken = {DENSE: DENSE}
    for number, entry in enumerate(given, start=1):
        label = f"{path}: row {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            refuse(label, entry, "settings and a `name`, which is a text")
        name = entry["name"]
        slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")
        if not slug:
            refuse(f"{label}: name", name, "a name with a letter or a digit")
        if slug in taken:
            hint = f"it is too near to {taken[slug]!r}"
            refuse(f"{label}: name", name, f"a name that no other row has; {hint}")
        taken[slug] = name
        settings = {key: value for key, value in entry.items() if key != "name"}
        settings = _settings(f"{path}: row {name!r}", settings)
        if not settings:
            refuse(f"{path}: row {name!r}", {}, f"settings; row {DENSE!r} is there without asking")
        rows.append(Row(name=name, slug=slug, settings=settings))
    return rows


def _settings(label: str, given: Any) -> dict[str, Any]:
    """Settings as they were written, under keys that may stand there."""
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        refuse(label, given, "settings such as {lr: 0.001}")
    for key in given:
        if key in _OWN:
            raise ConfigError(f"{label} sets {key}, which the grid sets itself")
    return dict(given)


def _with(base: Config, settings: dict[str, Any], label: str) -> Config:
    try:
        return base.replace(**settings)
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from None


def _lasting(found: Config) -> dict[str, Any]:
    return {name: _plain(v) for name, v in found.flat().items() if name not in _PLACES}


def _same(recorded: Any, wanted: dict[str, Any] | None) -> bool:
    if not isinstance(recorded, dict) or wanted is None:
        return recorded is wanted
    known = recorded.keys() <= wanted.keys()
    return known and all(
        recorded.get(name, _plain(OPTIONS[name].default)) == value for name, value in wanted.items()
    )


def _plain(value: Any) -> Any:
    """A tuple as the list that JSON makes of it."""
    return list(value) if isinstance(value, tuple) else value
