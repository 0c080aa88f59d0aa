"""The YAML file of a grid.

    base: vim_micro.yaml           # settings of the unreduced model, a file beside this one
    seeds: [0, 1, 2]
    finetune: {epochs: 2, ...}     # what differs while fine-tuning; may be left out
    rows:
      - {name: ordered 12, fusion_strategy: all, fusion_token: 12, fusion_method: ordered}

For each seed one unreduced model is trained with `base`.  For each row and seed its weights are
evaluated with the row's settings, and fine-tuned with them.  The first row, `unreduced`, has no
settings of its own: what the others gain by more epochs, it gains too.

    train: scratch                 # instead, every row and seed is trained by itself
    seeds: [0, 1, 2]
    names: [strategy, method]      # heads of several columns of names
    paper: {source: "arXiv:...", show: figures}
    rows:
      - {name: [none, "-"], config: vim_tiny.yaml, paper: {time: "4:33:02"}}
      - {name: [upper, ordered], config: vim_tiny_upper.yaml, fusion_method: ordered}

Then the first row without reduction is what the others are compared with.  In both, `vary` lists
the settings besides those of reduction in which rows may differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fambav import config
from fambav.config import (
    OPTIONS,
    Config,
    ConfigError,
    check_path,
    format_value,
    read_yaml,
    refuse,
)
from fambav.experiments.grid import FREE, SCRATCH, TUNED, UNREDUCED, Cell, Grid
from fambav.experiments.provenance import described, differing, fingerprint
from fambav.experiments.rows import NONE, OWN, Row, read_rows, read_settings
from fambav.registry import nearest

_KEYS = ("title", "train", "base", "seeds", "finetune", "names", "vary", "paper", "rows")
_TRAIN = ("from-unreduced", "scratch")
_SHOW = ("figures", "differences")
_LARGEST = OPTIONS["seed"].bounds.high


def read_grid(
    path: Path, *, seeds: int | None = None, settings: Mapping[str, Any] | None = None
) -> Grid:
    """Read a grid.

    Args:
        path: The file.
        seeds: How many seeds, from 0, instead of those of the file.
        settings: Instead of those of its base and its rows' configs; what a row or the fine-tuning
            sets by itself stays.

    Raises:
        ConfigError: If the file or one of its settings cannot be used.
    """
    return _File(path, seeds, read_settings("--set", dict(settings or {}))).grid()


class _File:
    """A grid's file while it is read."""

    def __init__(self, path: Path, seeds: int | None, settings: dict[str, Any]) -> None:
        self.path, self.settings, self.given = path, settings, read_yaml(path)
        for key in self.given:
            if key not in _KEYS:
                hint = nearest(str(key), _KEYS)
                raise ConfigError(f"{path}: {format_value(key)} is not of a grid; {hint}")
        self.scratch = (
            self._choice("train", self.given.get("train", _TRAIN[0]), _TRAIN) == _TRAIN[1]
        )
        listed = self._seeds()
        self.seeds = listed if seeds is None else tuple(range(seeds))
        self.names = self._names()
        self.vary = self._vary()

    def grid(self) -> Grid:
        """Read the rows, and what follows from them."""
        taken = () if self.scratch else (UNREDUCED,)
        given = self.given.get("rows")
        rows = read_rows(self.path, given, names=len(self.names), taken=taken)
        rows, baseline, cells = (
            self._from_scratch(rows) if self.scratch else self._from_unreduced(rows)
        )
        source, show = self._paper(rows, baseline)
        return Grid(
            path=self.path,
            title=self._text("title", self.given.get("title", "")),
            scratch=self.scratch,
            names=self.names,
            rows=tuple(rows),
            baseline=baseline,
            vary=self.vary,
            source=source,
            differences=show == _SHOW[1],
            seeds=self.seeds,
            cells=tuple(cells),
        )

    def _from_unreduced(self, rows: Sequence[Row]) -> tuple[list[Row], Row, list[Cell]]:
        """Rows, the baseline and the cells where every row starts from the unreduced model."""
        base = self._base(f"{self.path}: base", self._base_path())
        labels = (UNREDUCED, *[NONE] * (len(self.names) - 1))
        baseline = Row(name=UNREDUCED, slug=UNREDUCED, labels=labels, settings={})
        phases: list[tuple[Row, str, Config]] = []
        tuning = None
        if "finetune" in self.given:
            label = f"{self.path}: finetune"
            tuning = read_settings(label, self.given["finetune"])
            phases.append((baseline, TUNED, _with(base, tuning, label)))
        for row in rows:
            label = self._label(row)
            if row.file is not None:
                hint = "which has no meaning without train: scratch"
                raise ConfigError(f"{label} has a config, {hint}")
            if not row.settings:
                refuse(label, {}, f"settings; row {UNREDUCED!r} is always there")
            phases.append((row, FREE, _with(base, row.settings, label)))
            if tuning is not None:
                tuned = _with(base, {**tuning, **row.settings}, label)
                self._refuse_other_settings(row, tuned, baseline, phases[0][2])
                phases.append((row, TUNED, tuned))
        starts = [
            Cell(row=baseline, seed=seed, phase=UNREDUCED, config=base.replace(seed=seed))
            for seed in self.seeds
        ]
        cells = starts + [
            Cell(row=row, seed=s.seed, phase=phase, config=run.replace(seed=s.seed), start=s)
            for s in starts
            for row, phase, run in phases
        ]
        return [baseline, *rows], baseline, cells

    def _from_scratch(self, rows: Sequence[Row]) -> tuple[list[Row], Row, list[Cell]]:
        """Rows, the baseline and the cells where every row is trained by itself."""
        if "finetune" in self.given:
            raise ConfigError(f"{self.path}: finetune has no meaning with train: scratch")
        common = None
        if "base" in self.given:
            common = self._base(f"{self.path}: base", self._base_path())
        configs: list[Config] = []
        for row in rows:
            label = self._label(row)
            own = common if row.file is None else self._base(f"{label}: config", row.file)
            if own is None:
                raise ConfigError(f"{label} has no config, expected one, or a base of the grid")
            configs.append(_with(own, row.settings, label))
        first = next((n for n, run in enumerate(configs) if run == run.unreduced()), None)
        if first is None:
            names = [row.name for row in rows]
            refuse(f"{self.path}: rows", names, "a row without reduction among them")
        for row, run in zip(rows, configs, strict=True):
            self._refuse_other_settings(row, run, rows[first], configs[first])
        plain = configs[first].flat()
        rows = [
            replace(row, settings={k: v for k, v in run.flat().items() if v != plain[k]})
            for row, run in zip(rows, configs, strict=True)
        ]
        cells = [
            Cell(row=row, seed=seed, phase=SCRATCH, config=run.replace(seed=seed))
            for seed in self.seeds
            for row, run in zip(rows, configs, strict=True)
        ]
        return rows, rows[first], cells

    def _refuse_other_settings(self, row: Row, run: Config, first: Row, other: Config) -> None:
        """Refuse a row that would be compared with one that is trained in another way."""
        every = differing([fingerprint(other), fingerprint(run)])
        if left := {name: values for name, values in every.items() if name not in self.vary}:
            raise ConfigError(
                f"{self._label(row)} differs from {first.name!r} in {described(left)}, expected "
                f"the same recipe; vary: [{', '.join(left)}] in the grid allows it"
            )

    def _label(self, row: Row) -> str:
        return f"{self.path}: row {row.name!r}"

    def _base_path(self) -> Path:
        given = self.given.get("base")
        if not isinstance(given, str):
            refuse(f"{self.path}: base", given, "the path of a YAML file")
        check_path(f"{self.path}: base", given)
        return self.path.parent / given

    def _base(self, label: str, file: Path) -> Config:
        """Settings of a file; a cell that names no number of threads computes with one."""
        run = config.load(file)
        for name in OWN:
            if run.flat()[name] != OPTIONS[name].default:
                raise ConfigError(f"{label} sets {name}, which the grid sets itself")
        threads = {"threads": 1} if run.run.threads is None else {}
        return _with(run, {**threads, **self.settings}, label)

    def _seeds(self) -> tuple[int, ...]:
        label, given = f"{self.path}: seeds", self.given.get("seeds")
        whole = isinstance(given, list) and all(type(seed) is int for seed in given)
        if not whole or not given or not all(0 <= seed <= _LARGEST for seed in given):
            refuse(label, given, "a list of seeds such as [0, 1, 2]")
        if len(set(given)) < len(given):
            refuse(label, given, "every seed once")
        return tuple(given)

    def _names(self) -> tuple[str, ...]:
        given = self.given.get("names")
        if given is None:
            return ("row",)
        texts = isinstance(given, list) and all(isinstance(name, str) and name for name in given)
        if not texts or not given:
            refuse(f"{self.path}: names", given, "a list of columns such as [strategy, method]")
        return tuple(given)

    def _vary(self) -> tuple[str, ...]:
        given = self.given.get("vary", [])
        if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
            refuse(f"{self.path}: vary", given, "a list of settings such as [lr]")
        for name in given:
            if name not in OPTIONS:
                hint = nearest(name, OPTIONS)
                hint = hint if hint.startswith("did you mean") else "see main.py --help"
                raise ConfigError(f"{self.path}: vary: {name!r} is not a setting; {hint}")
        return tuple(given)

    def _paper(self, rows: Sequence[Row], baseline: Row) -> tuple[str, str]:
        """The source of the papers' figures, and whether tables have them or differences."""
        label, given = f"{self.path}: paper", self.given.get("paper")
        if given is None:
            if any(row.paper for row in rows):
                hint = "expected {source: ...}, as rows have figures"
                raise ConfigError(f"{label} is missing, {hint}")
            return "", _SHOW[0]
        if not isinstance(given, dict) or not given.keys() <= {"source", "show"}:
            refuse(label, given, "{source: ..., show: figures}")
        show = self._choice("paper: show", given.get("show", _SHOW[0]), _SHOW)
        if show == _SHOW[1] and baseline.paper is None:
            raise ConfigError(
                f"{self._label(baseline)} has no figures of the paper, "
                "expected some, as the table has differences to them"
            )
        return self._text("paper: source", given.get("source")), show

    def _choice(self, key: str, given: Any, known: Sequence[str]) -> str:
        if given not in known:
            refuse(f"{self.path}: {key}", given, f"one of {', '.join(known)}")
        return str(given)

    def _text(self, key: str, given: Any) -> str:
        if not isinstance(given, str):
            refuse(f"{self.path}: {key}", given, "a text")
        return given


def _with(base: Config, settings: dict[str, Any], label: str) -> Config:
    try:
        return base.replace(**settings)
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from None
