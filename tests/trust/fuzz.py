"""Whatever is handed to us as settings or weights is read, or refused in one line.

    python -m tests.trust.fuzz 10 [SEED]

tries new ones for ten minutes and prints what is neither; `test_fuzz.py` tries some in every run of
the tests, and keeps what was found once.
"""

import contextlib
import copy
import io
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as some

import fambav
from fambav import cli
from fambav.config import Config, ConfigError, load
from fambav.engine import checkpoint
from fambav.engine.checkpoint import CheckpointError
from tests.data.made import made_cifar
from tests.trust.forked import RECIPE

ROOT = Path(__file__).resolve().parents[2]
NAMES = tuple(Config().flat())
WORDS = (
    *("vim_micro", "timm/resnet10t", "none", "auto", "upper", "ordered", "DIGITS", "cpu", "r:1"),
    *("", " ", "null", "1e999", "-0", "0x10", "1_0", "%s", "{}", "\0", "a\nb", "é", "../x", "~"),
)
small = some.integers(-3, 40) | some.floats(-2, 40) | some.sampled_from([float("nan"), 1e30])
numbers = some.integers() | some.floats() | small
plain = some.none() | some.booleans() | some.sampled_from(WORDS) | some.text(max_size=6)


def trees(leaves):
    """Values as YAML and checkpoints hold them."""
    keys = some.sampled_from(NAMES) | some.text(max_size=6) | some.integers(0, 3)
    return some.recursive(
        leaves,
        lambda value: some.lists(value, max_size=4) | some.dictionaries(keys, value, max_size=3),
        max_leaves=5,
    )


@some.composite
def texts(draw):
    """YAML files: settings with any values, shipped ones with a few bytes changed, and bytes."""
    kind = draw(some.integers(0, 2))
    if kind == 0:
        value = trees(plain | numbers)
        known = some.dictionaries(some.sampled_from(NAMES), value, min_size=1, max_size=4)
        return yaml.safe_dump(draw(known), allow_unicode=True).encode()
    if kind == 1:
        path = draw(some.sampled_from(sorted(ROOT.glob("configs/*/*.yaml"))))
        raw = bytearray(path.read_bytes())
        for _ in range(draw(some.integers(1, 3))):
            at, long = draw(some.integers(0, len(raw))), draw(some.integers(0, 6))
            raw[at : at + long] = draw(
                some.sampled_from(
                    [b": ", b"- ", b"&a ", b"*a", b"[", b"}", b"!!", b"\t", b"\n", b"|"]
                )
                | some.binary(max_size=4)
            )
        return bytes(raw)
    return draw(some.binary(max_size=40))


def settings_are_read_or_refused(folder, raw):
    path = Path(folder) / "settings.yaml"
    path.write_bytes(raw)
    try:
        config = load(path)
    except ConfigError as error:
        assert str(error)
        assert "\n" not in str(error)
        return
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load(path).flat() == config.flat()


@some.composite
def edits(draw):
    """Changes of a tree: steps down to a place, by number, and what comes there."""
    tensors = some.sampled_from(
        [torch.zeros(()), torch.zeros(0), torch.ones(2, 3), torch.full((3,), float("nan"))]
    )
    value = trees(plain | small) | tensors
    steps = some.lists(some.integers(0, 400), min_size=1, max_size=4)
    change = some.tuples(some.sampled_from(["put", "drop", "add"]), steps, value)
    return draw(some.lists(change, min_size=1, max_size=2))


def edited(tree, changes):
    tree = copy.deepcopy(tree)
    for kind, steps, value in changes:
        place = tree
        for step in steps[:-1]:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            below = place[keys[step % len(keys)]] if len(keys) else None
            if not isinstance(below, dict | list) or not below:
                break
            place = below
        keys = list(place) if isinstance(place, dict) else range(len(place))
        if not len(keys):
            continue
        key = keys[steps[-1] % len(keys)]
        if kind == "drop":
            del place[key]
        elif kind == "put" or isinstance(place, list):
            place[key] = value
        else:
            place[f"{key}s"] = value
    return tree


READERS = ("--resume", "--finetune", "--eval --resume", "from_pretrained", "predict")


class Weights:
    """A finished run, whose checkpoint is handed back changed."""

    def __init__(self, folder):
        self.folder = Path(folder)
        made_cifar(self.folder, train=40, test=37)
        self.words = [*RECIPE.split(), "--epochs", "1", "--data-path", str(self.folder)]
        run = self.folder / "run"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert cli.main([*self.words, "--output_dir", str(run)]) == 0
        self.state = checkpoint.load(run / "checkpoint.pth")
        self.image = self.folder / "image.png"
        from PIL import Image

        Image.new("RGB", (16, 16)).save(self.image)

    def are_read_or_refused(self, changes, reader, *, marked=True):
        path, state = self.folder / "changed.pth", edited(self.state, changes)
        if marked:
            checkpoint.save(path, state)
        else:
            torch.save(state, path)
        self.read(path, reader)

    def bytes_are_read_or_refused(self, at, new):
        """A file that carries no digest, as others write them, and is not what it was."""
        path = self.folder / "bytes.pth"
        file = io.BytesIO()
        torch.save({**self.state, "optimizer": {}}, file)
        raw = bytearray(file.getvalue())
        place = int(at * len(raw))
        raw[place : place + len(new)] = new
        path.write_bytes(raw)
        self.read(path, "from_pretrained")

    def read(self, path, reader):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if reader == "from_pretrained":
                with contextlib.suppress(CheckpointError, ConfigError, ValueError):
                    fambav.from_pretrained(path)
                return
            if reader == "predict":
                status = cli.console(["predict", str(path), str(self.image)])
            else:
                status = cli.main([*self.words, *reader.split(), str(path)])
        assert status in (0, 2, 3), (status, err.getvalue())
        if status:
            lines = err.getvalue().splitlines()
            assert len(lines) == 1, lines
            assert lines[0].startswith("error: ")


def main(minutes, first=0):
    """Try new ones until the time is over."""
    end, tried, found = time.monotonic() + 60 * minutes, 0, {}

    def attempt(property_, **given_):
        nonlocal tried
        tried += 1
        try:
            property_(**given_)
        except Exception as error:  # noqa: BLE001  whatever it is
            where = traceback.extract_tb(error.__traceback__)[-1]
            name = f"{type(error).__name__} at {where.filename}:{where.lineno}"
            if name not in found:
                found[name] = given_
                print(name, error, given_, sep="\n    ", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        weights = Weights(folder)
        options = settings(
            max_examples=200,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        while time.monotonic() < end:
            first += 1

            @seed(first)
            @options
            @given(raw=texts())
            def settings_(raw):
                attempt(settings_are_read_or_refused, folder=folder, raw=raw)

            @seed(first)
            @options
            @given(changes=edits(), reader=some.sampled_from(READERS), marked=some.booleans())
            def states(changes, reader, marked):
                attempt(weights.are_read_or_refused, changes=changes, reader=reader, marked=marked)

            @seed(first)
            @options
            @given(at=some.floats(0, 1), new=some.binary(min_size=1, max_size=6))
            def files(at, new):
                attempt(weights.bytes_are_read_or_refused, at=at, new=new)

            settings_()
            states()
            files()
    print(f"{tried} tried in {minutes:g} minutes, {len(found)} neither read nor refused")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(float(sys.argv[1]), *map(int, sys.argv[2:])))
