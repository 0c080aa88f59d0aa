"""timm and torchvision on any build of torch."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fambav import timm_compat
from fambav.timm_compat import guard_posterize, prepare_torchvision, timm

POSTERIZE = ("Posterize", "PosterizeIncreasing", "PosterizeOriginal")


def run(code):
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True)


def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_timm_and_torchvision_import_without_a_warning():
    code = "from fambav.timm_compat import timm, torchvision; timm.create_model('resnet10t')"
    done = run(code)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b"" == done.stderr


@pytest.fixture
def untouched(monkeypatch):
    """As before torchvision's first import, with a record of what is declared."""
    declared = []

    class Library:
        def __init__(self, *names):
            declared.append(names)

        def define(self, schema):
            declared.append(schema.split("(")[0])

    monkeypatch.delitem(sys.modules, "torchvision")
    monkeypatch.setattr(timm_compat, "_kept", [])
    monkeypatch.setattr(torch.library, "Library", Library)
    return declared


def test_nothing_is_touched_where_the_native_library_loads(untouched, monkeypatch):
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    assert prepare_torchvision() == "native"
    assert untouched == []


def test_operators_are_declared_once_where_it_does_not_load(untouched, monkeypatch):
    def load_library(path):
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(torch.ops, "load_library", load_library)
    assert prepare_torchvision() == "shimmed"
    assert prepare_torchvision() == "shimmed"
    assert untouched == [("torchvision", "DEF"), "nms", "qnms"]


def test_a_missing_torchvision_is_told(untouched, monkeypatch):
    monkeypatch.setattr(timm_compat.importlib.util, "find_spec", lambda name: None)
    assert prepare_torchvision() == "absent"
    assert untouched == []


@pytest.mark.parametrize("name", POSTERIZE)
def test_posterize_without_bits_is_black_even_where_pillow_refuses(name):
    def refusing(image, bits, **_):
        if not 1 <= bits <= 8:
            raise ValueError("bits must be between or equal to 1 and 8")
        return image

    operations = dict.fromkeys(POSTERIZE, refusing)
    guard_posterize(operations)
    guard_posterize(operations)
    image = picture()
    assert np.asarray(operations[name](image, 0)).max() == 0
    assert operations[name](image, 3, fill=0) is image


@pytest.mark.parametrize("bits", range(1, 9))
def test_posterize_with_bits_is_left_as_it_was(bits):
    for name in POSTERIZE:
        guarded = timm.data.auto_augment.NAME_TO_OP[name]
        plain = timm.data.auto_augment.posterize(picture(), bits)
        assert np.array_equal(np.asarray(guarded(picture(), bits)), np.asarray(plain))
