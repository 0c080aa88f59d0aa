"""Images are of a fixed list of formats, known by their content; all else is named or left out."""

import io
import os

import pytest
from fambav.data.arrays import DataError
from PIL import Image, features

from fambav import cli
from fambav.data import read_image
from tests.data.made import made_folder
from tests.trust.forked import run, run_alone
from tests.trust.refusals import the_line_of
from tests.trust.test_reading import FOLDER


def written(kind, size=(20, 20), mode="RGB", **options):
    file = io.BytesIO()
    Image.new(mode, size, 7).save(file, kind, **options)
    return file.getvalue()


TAKEN = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000")
OTHERS = ("DDS", "BLP", "EPS", "ICNS", "ICO", "IM", "MSP", "PCX", "SGI", "SPIDER", "TGA", "XBM")
MODES = {"BLP": "P", "MSP": "1", "SPIDER": "F", "XBM": "1"}
BROKEN = {
    "a header of QOI": b"qoif" + bytes(10),
    "a header of QOI, large": b"qoif" + b"\xff" * 10,
    "a header of AVIF": b"\0\0\0\x20ftypavif" + bytes(24),
    "a header of DDS": b"DDS " + (124).to_bytes(4, "little") + bytes(120),
    "a header of BLP1": b"BLP1" + bytes(30),
    "a header of BLP2": b"BLP2" + b"\xff" * 300,
    "a header of EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    "a header of EPS alone": b"%!PS-Adobe",
    "a box of EPS": b"%!PS-Adobe-3.0\n%%BoundingBox: a b c d\n",
    "a header of FTEX": b"FTEX" + bytes(40),
    "a header of FITS": b"SIMPLE  =                    T" + b" " * 50,
    "a header of PSD": b"8BPS\0\x01" + bytes(30),
    "a header of FLI": bytes(4) + b"\x11\xaf" + bytes(122),
    "a header of GBR": (40).to_bytes(4, "big") + (2).to_bytes(4, "big") + b"\xff" * 40,
    "a header of WMF": b"\xd7\xcd\xc6\x9a" + bytes(80),
    "a header of PCD": bytes(2048) + b"PCD_" + bytes(100),
    "a header of MPEG": b"\0\0\x01\xb3" + bytes(8),
    "a header of XPM": b'/* XPM */\n"9 9 1 1",\n',
    "a header of PNG": b"\x89PNG\r\n\x1a\n" + bytes(30),
    "a header of JPEG": b"\xff\xd8\xff\xe0" + bytes(30),
    "a header of TIFF": b"II*\0" + b"\xff" * 30,
    "a header of WebP": b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(30),
    "a header of GIF": b"GIF89a" + b"\xff" * 20,
    "a header of BMP": b"BM" + b"\xff" * 60,
    "a header of PPM": b"P6 99999999999999999999 9 255 ",
    "nothing": b"",
    "zeros": bytes(100),
    "text": b"no image",
    "a half PNG": written("PNG", (200, 200))[:100],
    "a half JPEG": written("JPEG", (200, 200))[:400],
    "a half TIFF": written("TIFF", (200, 200))[:400],
    "a half WebP": written("WEBP", (200, 200))[:40],
    "a half GIF": written("GIF", (200, 200))[:30],
}
if features.check("avif"):
    AVIF = written("AVIF", (64, 64))
    BROKEN |= {"a half AVIF": AVIF[: len(AVIF) // 2], "AVIF of zeros": AVIF[:80] + bytes(200)}


@pytest.mark.parametrize("kind", TAKEN)
def test_these_formats_are_read_whatever_the_ending(tmp_path, kind):
    path = tmp_path / "a.png"
    path.write_bytes(written(kind))
    assert read_image(path).size == (20, 20)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_are_refused_by_name_though_pillow_reads_them(tmp_path, kind):
    path = tmp_path / "a.png"
    path.write_bytes(written(kind, (32, 32), MODES.get(kind, "RGB")))
    with pytest.raises(DataError, match=r"^[^\n]*a\.png[^\n]*, expected [^\n]*PNG[^\n]*$"):
        read_image(path)


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
    with pytest.raises(DataError):
        read_image(tmp_path / "a.png")
    assert started == []


def test_a_folder_in_the_place_of_an_image_is_named(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(DataError, match=r"a\.png"):
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
        "show": ["show", whole, "--what", "layers", "--image", tmp_path / "a.png"],
    }[command]
    if command == "show":
        words += ["--output_dir", tmp_path / "new"]
    found = run_alone(words, tmp_path / "out", timeout=8, program=cli.console)
    the_line_of(found, tmp_path / "a.png")
    assert not (tmp_path / "new").exists()


BAD = ("a header of QOI", "a header of DDS", "a header of BLP2", "a header of EPS", "a half AVIF")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 600 images to train on and 200 held out, one in a hundred of other formats."""
    folder = tmp_path_factory.mktemp("images")
    made_folder(folder, train=300, val=100, size=(16, 16))
    known = [case for case in BAD if case in BROKEN]
    for place, case in enumerate(known):
        (folder / f"train/cat/{place}.png").write_bytes(BROKEN[case])
    (folder / "val/dog/3.png").write_bytes(BROKEN["a header of DDS"])
    (folder / "val/dog/4.png").unlink()
    os.mkfifo(folder / "val/dog/4.png")
    return folder, len(known) + 2


@pytest.mark.parametrize("workers", [0, 1])
def test_they_are_left_out_where_that_is_wanted(images, tmp_path, workers):
    folder, bad = images
    words = [*FOLDER.split(), "--epochs", "1", "--data-path", folder, "--batch-size", "100"]
    words += ["--on-bad-image", "skip", "--num_workers", workers]
    found = run(words, tmp_path / "run", timeout=60)
    assert found.status == 0, found.out
    assert f"{bad} unreadable images were left out so far" in found.out


def test_without_it_the_first_is_named(images, tmp_path):
    folder, _ = images
    words = [*FOLDER.split(), "--epochs", "1", "--data-path", folder, "--num_workers", "1"]
    the_line_of(run(words, tmp_path / "run", timeout=60), ".png", "expected an image", status=5)
