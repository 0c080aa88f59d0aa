"""Images are of a fixed list of formats, known by their content; all else is named or left out."""

import io
import os

import pytest
from PIL import Image

from fambav import cli
from fambav.data import read_image
from fambav.data.types import DataError
from tests.data.made import made_folder
from tests.trust.forked import run
from tests.trust.refusals import refused
from tests.trust.test_reading import FOLDER


def written(kind, size=(20, 20), mode="RGB", **options):
    file = io.BytesIO()
    Image.new(mode, size, 7).save(file, kind, **options)
    return file.getvalue()


BROKEN = {
    "QOI": b"qoif" + b"\xff" * 10,
    "AVIF": b"\0\0\0\x20ftypavif" + bytes(24),
    "DDS": b"DDS " + (124).to_bytes(4, "little") + bytes(120),
    "FTEX": b"FTEX" + bytes(40),
    "EPS": b"%!PS-Adobe",
    "nothing": b"",
    "PNG": b"\x89PNG\r\n\x1a\n" + bytes(30),
    "PPM": b"P6 99999999999999999999 9 255 ",
    "a box of JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\1jp2h" + b"\xff" * 8,
    "half a JPEG": written("JPEG", (200, 200))[:400],
    "half a TIFF": written("TIFF", (200, 200))[:400],
    "half a GIF": written("GIF", (200, 200))[:30],
}


@pytest.mark.parametrize("kind", ["BMP", "WEBP"])
def test_the_content_counts_and_not_the_ending(tmp_path, kind):
    path = tmp_path / "a.png"
    path.write_bytes(written(kind))
    assert read_image(path).size == (20, 20)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", BROKEN)
def test_what_looks_like_an_image_and_is_none_is_named(tmp_path, case):
    path = tmp_path / "a.png"
    path.write_bytes(BROKEN[case])
    with pytest.raises(DataError, match=r"^[^\n]*a\.png[^\n]*, expected an image[^\n]*$"):
        read_image(path)


def test_no_program_is_started_to_read_an_image(tmp_path, monkeypatch):
    """Pillow hands EPS to Ghostscript, whose language opens files and runs programs."""
    started = []
    monkeypatch.setattr("subprocess.Popen.__init__", lambda *given, **rest: started.append(given))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    (tmp_path / "a.png").write_bytes(written("EPS"))
    with pytest.raises(DataError, match=r"expected an image in PNG, JPEG"):
        read_image(tmp_path / "a.png")
    assert started == []


def test_a_folder_in_the_place_of_an_image_is_named(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(DataError, match=r"a\.png is a folder, expected an image"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("path", ["a\0.png", "a\ud800.png", "a" * 5000])
def test_a_name_that_no_file_can_have_is_refused(path):
    with pytest.raises(DataError, match=r"^[^\n]*, expected an image[^\n]*$"):
        read_image(path)


@pytest.mark.parametrize("command", ["predict", "show"])
def test_an_image_that_is_a_pipe_is_refused_at_once(whole, tmp_path, command):
    os.mkfifo(tmp_path / "a.png")
    words = {
        "predict": ["predict", whole, tmp_path / "a.png"],
        "show": ["show", whole, "--what", "groups", "--image", tmp_path / "a.png"],
    }[command]
    if command == "show":
        words += ["--output_dir", tmp_path / "new"]
    refused(*words, names=[tmp_path / "a.png"], program=cli.console)
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 300 images to train on and 100 held out, one in a hundred of other formats."""
    folder = tmp_path_factory.mktemp("images")
    made_folder(folder, train=150, val=50, size=(16, 16))
    for place, case in enumerate(("QOI", "DDS", "a box of JPEG 2000")):
        (folder / f"train/cat/{place}.png").write_bytes(BROKEN[case])
    (folder / "val/dog/4.png").unlink()
    os.mkfifo(folder / "val/dog/4.png")
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_they_are_left_out_where_that_is_wanted(images, tmp_path, workers):
    words = [*FOLDER.split(), "--epochs", "1", "--data-path", images, "--batch-size", "50"]
    words += ["--on-bad-image", "skip", "--num_workers", workers]
    found = run(words, tmp_path / "run", timeout=60)
    assert found.status == 0, found.out
    assert "4 unreadable images were left out so far" in found.out
