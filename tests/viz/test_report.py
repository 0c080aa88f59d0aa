"""The page: everything in one file, nothing from elsewhere, and a browser shows it."""

import base64
import importlib
import io
import json
import re
import shutil
import subprocess
from contextlib import redirect_stdout
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from fambav import experiments, viz
from fambav.cli import console, main
from fambav.engine import checkpoint
from fambav.experiments import Estimate, Point
from fambav.tasks import task_of
from fambav.viz import style
from tests.conftest import BROWSERS
from tests.data.made import made_cifar

TINY = """--model vim_micro --input-size 16 --data-set CIFAR --num_workers 0 --batch-size 16
    --epochs 1 --warmup-epochs 0 --threads 1 --device cpu"""


@pytest.fixture(scope="module", autouse=True)
def coarse():
    """Pictures of fewer pixels, which take less time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "DPI", 75)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one epoch whose names would be markup if nobody escaped them."""
    folder = tmp_path_factory.mktemp("report")
    made_cifar(folder, train=32, test=8)
    plans = {
        "<b>plain & whole": [],
        "upper": ["--fusion-strategy", "upper", "--fusion-layer", "3", "--fusion-token", "2"],
    }
    places = []
    for name, plan in plans.items():
        place = folder / name
        words = [*TINY.split(), "--data-path", str(folder), *plan, "--output_dir", str(place)]
        assert main(words) == 0
        places.append(place)
    return places


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory):
    target = tmp_path_factory.mktemp("page") / "page.html"
    assert console(["report", *map(str, runs), "--output", str(target)]) == 0
    return target


@pytest.fixture(scope="module")
def one(runs, tmp_path_factory):
    """The page of one run, without its data."""
    target, image = (tmp_path_factory.mktemp("one") / name for name in ("page.html", "image.png"))
    Image.new("RGB", (16, 16)).save(image)
    words = ["--image", str(image), "--no-class-accuracy", "--output", str(target)]
    assert console(["report", str(runs[1]), *words]) == 0
    return target


class Seen(HTMLParser):
    """What a page is made of."""

    def __init__(self):
        super().__init__()
        self.tags, self.sources, self.links, self.cells, self._in = [], [], [], [], None

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.sources += [given[name] for name in ("src", "srcset", "data") if name in given]
        self.links += [given["href"]] if "href" in given else []
        self._in = tag
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, data):
        if self._in in ("td", "th"):
            self.cells[-1] += data


def seen(target):
    found = Seen()
    found.feed(target.read_text())
    return found


def test_the_page_needs_no_network_and_runs_nothing(made):
    found, text = seen(made), made.read_text()
    assert not {"script", "link", "iframe", "object", "form"} & set(found.tags)
    assert found.sources
    assert all(source.startswith("data:image/") for source in found.sources)
    assert all(link.startswith("#") for link in found.links)
    assert not re.search(r"url\(|@import", text)
    assert "default-src 'none'" in text


def test_every_picture_is_whole_and_says_what_it_shows(made):
    found = seen(made)
    assert found.tags.count("img") == found.tags.count("figcaption") == len(found.sources)
    for source in found.sources:
        with Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) as image:
            image.load()
            assert min(image.size) > 100
    assert any(source.startswith("data:image/gif") for source in found.sources)
    assert not re.search(r'alt=""', made.read_text())


def test_tables_hold_results_plans_settings_and_the_machine(made):
    cells = seen(made).cells
    for expected in ("top-1 %", "token-layers", "upper 3, r = 2", "fusion_strategy", "torch"):
        assert any(expected in cell for cell in cells), expected
    assert any("vim_micro" in cell for cell in cells)


def test_the_plan_is_that_of_the_run(one):
    cells = seen(one).cells
    at = cells.index("tokens its mixer sees")
    rows = [cells[at + 1 + 4 * n : at + 5 + 4 * n] for n in range(6)]
    assert [row[0] for row in rows] == list("123456")
    assert [int(row[1]) - int(row[2].replace("-", "0")) for row in rows] == [
        int(row[3]) for row in rows
    ]


def test_runs_of_one_name_keep_their_own_pictures(runs, tmp_path, monkeypatch):
    def save(_drawn, path):  # encoding takes most of the time
        Image.new("RGB", (2, 2)).save(path)

    monkeypatch.setattr(importlib.import_module("fambav.viz.render"), "save", save)
    places = [tmp_path / parent / "run" for parent in "ab"]
    for place in places:
        shutil.copytree(runs[1], place)
    viz.write_report(places, tmp_path / "two.html")
    text = (tmp_path / "two.html").read_text()
    for name, after in (("a-run", "b-run"), ("b-run", "</main>")):
        part = text.split(f"<h2>{name}</h2>")[1].split(f"<h2>{after}</h2>")[0]
        assert part.count("<img ") >= 7


def test_names_are_texts_and_never_markup(made):
    text = made.read_text()
    assert "<b>plain" not in text
    assert "&lt;b&gt;plain &amp; whole" in text


def scores(*words):
    """Top-1 of an evaluation, as main.py prints it."""
    with redirect_stdout(io.StringIO()) as out:
        assert main(["--eval", "--num_workers", "0", *map(str, words)]) == 0
    return float(re.search(r"Acc@1 ([\d.]+)", out.getvalue())[1])


def test_accuracy_by_class_adds_up_to_what_an_evaluation_finds(runs, made):
    cells = seen(made).cells
    for run in runs:
        at = cells.index("most often taken for") + 3
        cells = cells[at:]
        rows = [cells[n : n + 4] for n in range(0, 4 * 8, 4)]
        rows = rows[: next((n for n, row in enumerate(rows) if row[0] == "layer"), 8)]
        images, right = ([float(row[column]) for row in rows] for column in (2, 3))
        assert right == sorted(right), "the weakest class first"
        assert all(row[1].endswith(" x)") == (float(row[3]) < 100) for row in rows)
        assert sum(images) == 8
        mean = sum(n * share for n, share in zip(images, right, strict=True)) / 8
        expected = scores("--resume", run / "best_checkpoint.pth")
        assert mean == pytest.approx(expected, abs=0.1)
        note = f"on CIFAR: top-1 accuracy {expected:.2f}% on 8 held-out samples"
        assert f"best_checkpoint.pth {note}" in made.read_text()


def test_without_data_the_page_says_so_and_a_flag_leaves_the_classes_out(runs, one, tmp_path):
    assert "Accuracy by class" not in one.read_text()
    place, image = tmp_path / "run", tmp_path / "image.png"
    shutil.copytree(runs[1], place)
    Image.new("RGB", (16, 16)).save(image)
    words = ["report", str(place), "--image", str(image), "--output", str(tmp_path / "page.html")]
    settings = (place / "config.yaml").read_text()
    for file in ("checkpoint.pth", "best_checkpoint.pth"):
        state = torch.load(place / file, weights_only=True)
        (place / file).unlink()
        checkpoint.save(place / file, state | {"config": state["config"] | {"data_path": "gone"}})
    assert console(words) == 0
    assert "not measured: " in (tmp_path / "page.html").read_text()
    assert (place / "config.yaml").read_text() == settings


def result(page):
    return re.search(r'<p class="result">(.*)</p>', page.read_text())[1]


def test_the_result_stands_on_top_in_a_sentence(runs, made, one):
    logs = [json.loads((run / "log.txt").read_text()) for run in runs]
    values, seconds = ([log[key] for log in logs] for key in ("test_acc1", "train_seconds"))
    change = values[1] - values[0]
    apart = f"{abs(change):.2f} points {'more' if change > 0 else 'less'} than" if change else "as"
    share = json.loads((runs[1] / "plan.json").read_text())["share"]
    assert result(made) == (
        f"upper reaches a held-out top-1 accuracy of {values[1]:.2f}%, {apart} &lt;b&gt;plain "
        f"&amp; whole, in {100 * seconds[1] / seconds[0]:.0f}% of its training time; tokens kept: "
        f"{100 * share:.0f}% of token-layers."
    )
    assert made.read_text().index('class="result"') < made.read_text().index("<table")
    assert result(one).startswith(
        f"upper reaches a held-out top-1 accuracy of {values[1]:.2f}% after 1 epochs and "
    )


def test_a_grid_stands_as_a_sentence_a_table_and_its_front(tmp_path, monkeypatch):
    points = [
        Point(
            name=name,
            labels=(name,),
            baseline=name == "none",
            phase="scratch",
            settings={},
            method=name,
            figures={
                "acc1": Estimate(accuracy, 0.25, 3),
                "seconds": Estimate(seconds, 1.0, 3),
                "token_layers": Estimate(share, None, 3),
            },
            paper=None,
        )
        for name, accuracy, seconds, share in (
            ("none", 97.0, 30.0, 1.0),
            ("lower", 80.0, 15.0, 0.4),
            ("all < 7", 90.5, 20.0, 0.5),
        )
    ]
    monkeypatch.setattr(experiments, "is_grid", lambda folder: True)
    monkeypatch.setattr(experiments, "read_points", lambda folder: points)
    monkeypatch.setattr(experiments, "read_task", lambda folder: task_of("DIGITS"))
    viz.write_report([tmp_path / "a & b"], tmp_path / "grid.html", title="A grid")
    found, text = seen(tmp_path / "grid.html"), (tmp_path / "grid.html").read_text()
    assert found.cells[-4:] == ["all < 7", "90.50 ± 0.25", "0.500", "20.0 ± 1.0"]
    assert "memory MiB" not in found.cells
    assert len(found.sources) == 1
    assert "<h1>A grid</h1>" in text
    assert "<caption>a &amp; b</caption>" in text
    assert '<td class="figure">20.0 ± 1.0</td>' in text
    assert '<p class="note">mean ± sample standard deviation over seeds</p>' in text
    assert result(tmp_path / "grid.html") == (
        "a &amp; b: all &lt; 7 reaches the best top-1 accuracy of the rows with reduction, "
        "90.50 ± 0.25%, 6.50 points less than none, in 67% of its training time."
    )


def test_on_a_phone_wide_things_scroll_in_boxes_of_their_own(made):
    text = made.read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    for tag in ("table", "img"):
        assert 0 < text.count(f"<{tag}") == text.count(f'<div class="scroll"><{tag}')
    style = re.search(r"<style>(.*)</style>", text, re.DOTALL)[1]
    rules = dict(line.split(" { ", 1) for line in style.splitlines()[::-1] if " { " in line)
    assert "overflow-x: auto" in rules[".scroll"]
    assert "overflow-x: auto" in rules["pre"]
    assert "overflow-wrap: anywhere" in rules["body"]
    assert not re.search(r"(?<!max-)width: \d", style)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["none"], "error: run is 'none', expected a folder with log.txt and config.yaml"),
        (["none", "--output", "page.pdf"], "expected a file ending in .html"),
        ([], "error: the following arguments are required: RUN|GRID"),
    ],
)
def test_what_cannot_be_reported_is_one_line(tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    assert console(["report", *words]) == 2
    line = capsys.readouterr().err
    assert expected in line
    assert line.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_damaged_plan_is_named_and_leaves_no_page(runs, tmp_path, capsys):
    place = tmp_path / "run"
    shutil.copytree(runs[1], place)
    (place / "env.json").write_text("{")
    assert console(["report", str(place), "--output", str(tmp_path / "page.html")]) == 2
    assert "env.json" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.browser
def test_a_browser_shows_the_page(made, tmp_path):
    browser = next(name for name in BROWSERS if shutil.which(name))
    shot = tmp_path / "shot.png"
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    subprocess.run(
        [
            *(browser, *words, f"--user-data-dir={tmp_path / 'profile'}"),
            *("--window-size=1200,3000", f"--screenshot={shot}", made.as_uri()),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (3000, 1200, 3)
    blue = np.abs(pixels - (0x00, 0x72, 0xB2)).sum(axis=2) < 6  # the line below a heading
    assert (blue.sum(axis=1) > 900).any()
    lower = pixels[700:]  # below the tables are pictures: many colours
    assert len(np.unique(lower.reshape(-1, 3), axis=0)) > 500
    assert (pixels[:, -4:] > 240).all(), "nothing is cut off at the right"


@pytest.mark.browser
def test_a_browser_as_wide_as_a_phone_need_not_scroll_the_page_sideways(made, tmp_path):
    frame = f'<iframe width="390" height="800" src="{made.as_uri()}"></iframe>'
    script = "const e = f.contentDocument.documentElement;"
    script += "document.title = e.scrollWidth - e.clientWidth;"
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f"<!DOCTYPE html>{frame}<script>const f = document.querySelector('iframe');"
        f"f.onload = () => {{ {script} }};</script>"
    )
    browser = next(name for name in BROWSERS if shutil.which(name))
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    done = subprocess.run(
        [
            *(browser, *words, f"--user-data-dir={tmp_path / 'profile'}"),
            *("--virtual-time-budget=20000", "--dump-dom", wrapper.as_uri()),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert re.search(r"<title>(\d+)</title>", done.stdout)[1] == "0"
