"""CIFAR, from the files its authors publish."""

import hashlib
import io
import os
import pickle
import struct
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest

from fambav.data import DataError, cifar, fetch, load
from fambav.data.cifar import LAYOUTS
from fambav.data.types import digest
from fambav.timm_compat import torchvision
from tests.data.made import made_cifar, made_cifar10, write


def entries(path):
    with path.open("rb") as file:
        return pickle.load(file, encoding="bytes")


def spoil(path, **changes):
    write(path, entries(path) | {name.encode(): value for name, value in changes.items()})


@pytest.fixture
def folder(tmp_path):
    return made_cifar(tmp_path, classes=4, train=12, test=8)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize(("name", "make"), [("CIFAR", made_cifar), ("CIFAR10", made_cifar10)])
def test_root_and_inner_folder_are_both_taken(tmp_path, name, make, inner):
    folder = make(tmp_path, train=50, test=20)
    data = load(name, folder if inner else tmp_path)
    assert (len(data.train), len(data.val)) == (50, 20)
    assert data.num_classes == len(data.class_names) == (100 if name == "CIFAR" else 10)
    assert data.class_names[3] == "class_3"


def test_pixels_and_labels_are_those_of_the_file(folder):
    spoil(folder / "train", coarse_labels=[0] * 12)
    data = load("CIFAR", folder)
    written = entries(folder / "train")
    image, _ = data.train[5]
    assert (image.mode, image.size) == ("RGB", (32, 32))
    planes = written[b"data"][5].reshape(3, 32, 32)
    assert np.array_equal(np.asarray(image), planes.transpose(1, 2, 0))
    assert [label for _, label in data.train] == written[b"fine_labels"]


def test_the_five_batches_of_cifar10_come_in_order(tmp_path):
    folder = made_cifar10(tmp_path, train=50)
    third = entries(folder / "data_batch_3")[b"data"][1].reshape(3, 32, 32)
    image, _ = load("CIFAR10", tmp_path).train[21]
    assert np.array_equal(np.asarray(image), third.transpose(1, 2, 0))


def test_own_statistics_are_those_of_the_training_pixels(folder):
    data = load("CIFAR", folder)
    pixels = data.train.images.reshape(-1, 3) / 255
    mean, std = data.statistics("own")
    np.testing.assert_allclose(mean, pixels.mean(0))
    np.testing.assert_allclose(std, pixels.std(0))


def test_a_made_set_is_read_with_one_notice(folder):
    (note,) = load("CIFAR", folder).notes
    assert "train, test, meta are not the published CIFAR" in note
    assert "12 images to train and 8 to test" in note


def test_the_published_files_are_read_without_a_notice(folder, monkeypatch):
    class Published(torchvision.datasets.CIFAR100):
        pass

    Published.train_list = [["train", md5(folder / "train")]]
    Published.test_list = [["test", md5(folder / "test")]]
    Published.meta = dict(LAYOUTS["CIFAR"].meta, md5=md5(folder / "meta"))
    monkeypatch.setitem(LAYOUTS, "CIFAR", Published)
    assert load("CIFAR", folder).notes == ()


def test_the_digest_changes_with_a_pixel(tmp_path):
    one, same, other = (
        load("CIFAR", made_cifar(tmp_path / name, classes=4, train=12, test=8))
        for name in ("one", "same", "other")
    )
    assert one.digest == same.digest
    other.val.images[0, 0, 0, 0] ^= 1
    assert digest(other.train, other.val) != one.digest


def string(text):
    """A short str of Python 2."""
    return b"U" + bytes([len(text)]) + text


def python2_file(images, labels):
    """Assemble what Python 2 and numpy 1 wrote: str keys, and an array by _reconstruct."""
    dtype = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"K" + bytes([images.shape[0]]) + b"M" + struct.pack("<H", images.shape[1]) + b"\x86"
    raw = b"T" + struct.pack("<i", images.nbytes) + images.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
    array += string(b"b") + b"\x87R(K\x01" + shape + dtype + b"\x89" + raw + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    pairs = string(b"data") + array + string(b"fine_labels") + listed
    return b"\x80\x02}(" + pairs + b"u."


def test_files_of_python_2_and_numpy_1_are_read(folder):
    images = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    (folder / "test").write_bytes(python2_file(images, [0, 3, 1]))
    data = load("CIFAR", folder)
    assert data.val.labels.tolist() == [0, 3, 1]
    assert np.array_equal(data.val.images.transpose(0, 3, 1, 2).reshape(3, -1), images)


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_of_pickle_is_read(folder, protocol):
    written = entries(folder / "train")
    written[b"fine_labels"] = [np.int64(label) for label in written[b"fine_labels"]]
    (folder / "train").write_bytes(pickle.dumps(written, protocol=protocol))
    assert load("CIFAR", folder).train.labels.tolist() == written[b"fine_labels"]


@pytest.mark.parametrize("absent", [("meta",), ("train", "test"), ("train", "test", "meta")])
def test_what_is_missing_is_reported_with_the_command_that_fetches_it(folder, absent):
    for name in absent:
        (folder / name).unlink()
    with pytest.raises(DataError) as caught:
        load("CIFAR", folder.parent)
    message = str(caught.value)
    assert f"looked in {folder}, missing: {', '.join(absent)}" in message
    assert f"--data-set CIFAR --data-path {folder.parent} --download" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["train", "test", "meta"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_file_is_reported(folder, name, share):
    path = folder / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=rf"{name} is truncated or damaged .*--download"):
        load("CIFAR", folder)


@pytest.mark.parametrize("raw", [b"not a pickle", b"\x80\x02]q\x00.", b"\x80\x02K\x07."])
def test_a_file_of_something_else_is_reported(folder, raw):
    (folder / "train").write_bytes(raw)
    with pytest.raises(DataError, match="train is truncated or damaged"):
        load("CIFAR", folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(data=np.zeros((12, 3071), np.uint8)), r"data is uint8 \(12, 3071\), expected uint8"),
        (dict(data=np.zeros((12, 3072))), "data is float64"),
        (dict(data=np.zeros((0, 3072), np.uint8), fine_labels=[]), "labels are float64"),
        (dict(data=[1, 2]), "data is <class 'list'>"),
        (dict(fine_labels=[0] * 11), r"labels are int64 \(11,\), expected 12 integers"),
        (dict(fine_labels=[0.5] * 12), "labels are float64"),
        (dict(fine_labels=[4] * 12), r"labels are 4 \.\. 4, expected 0 \.\. 3"),
        (dict(fine_labels=[-1] * 12), r"labels are -1 \.\. -1"),
    ],
)
def test_arrays_that_do_not_fit_are_reported(folder, changes, message):
    spoil(folder / "train", **changes)
    with pytest.raises(DataError, match=message):
        load("CIFAR", folder)


def test_labels_or_names_that_are_not_there_are_reported(folder):
    write(folder / "train", {b"data": np.zeros((1, 3072), np.uint8)})
    with pytest.raises(DataError, match=r"train holds .*'data'.*, expected 'fine_labels'"):
        load("CIFAR", folder)
    write(folder / "meta", {b"label_names": [b"cat"]})
    with pytest.raises(DataError, match=r"meta holds .*, expected a list 'fine_label_names'"):
        load("CIFAR", folder)


class Payload:
    """Calls what it is told to when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("where", ["train", "test", "meta"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_file_that_wants_to_run_something_is_refused_and_nothing_runs(
    folder, tmp_path, where, protocol
):
    trace = tmp_path / "trace"
    harmful = entries(folder / where) | {b"data": Payload(os.mkdir, str(trace))}
    (folder / where).write_bytes(pickle.dumps(harmful, protocol=protocol))
    with pytest.raises(DataError, match=rf"{where} asks for posix.mkdir, expected only arrays"):
        load("CIFAR", folder)
    assert not trace.exists()


@pytest.mark.parametrize(
    "stream",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cfambav.data.cifar\nPath\n.",
        b"cnumpy\nload\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0ctesting.sys.\x93.",
        b"cnumpy.core.multiarray\n_reconstruct\n(c__builtin__\nbytes\nK\x00\x85U\x01btR.",
        b"ccopyreg\n_reconstructor\n.",
    ],
)
def test_no_other_name_is_looked_up(stream):
    with pytest.raises(pickle.UnpicklingError):
        cifar._Unpickler(io.BytesIO(stream), encoding="bytes").load()


@pytest.mark.parametrize("maker", sorted({type(m).__name__ for m in cifar._ALLOWED.values()}))
def test_a_pickle_can_not_change_what_it_may_call(maker):
    names = {type(made).__name__: name for name, made in cifar._ALLOWED.items()}
    module, name = names[maker]
    build = f"c{module}\n{name}\n(N}}X\x04\0\0\0evilK\x01stb.".encode()
    with pytest.raises(cifar._BROKEN):
        cifar._Unpickler(io.BytesIO(build), encoding="bytes").load()
    assert not hasattr(cifar._ALLOWED[module, name], "evil")


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A server on this machine with an archive of a made CIFAR-100, in place of the authors'."""
    folder = made_cifar(tmp_path / "server", classes=4, train=12, test=8)
    archive = tmp_path / "server" / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    handler = partial(Quiet, directory=archive.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{archive.name}"
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(LAYOUTS["CIFAR"], "url", address)
        monkeypatch.setattr(LAYOUTS["CIFAR"], "tgz_md5", md5(archive))
        yield archive
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("inner", ["", "cifar-100-python"])
def test_fetching_unpacks_the_published_archive(tmp_path, published, inner):
    root = tmp_path / "data" / inner
    fetch("CIFAR", root)
    data = load("CIFAR", root)
    assert (len(data.train), len(data.val)) == (12, 8)
    assert (tmp_path / "data" / "cifar-100-python" / "meta").is_file()


def test_nothing_is_fetched_without_download(tmp_path, published):
    with pytest.raises(DataError, match="missing: train, test, meta"):
        load("CIFAR", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_fetching_leaves_files_alone_that_are_there(folder, monkeypatch):
    monkeypatch.setattr(LAYOUTS["CIFAR"], "url", "file:///nowhere")
    before = (folder / "train").read_bytes()
    fetch("CIFAR", folder)
    assert (folder / "train").read_bytes() == before


@pytest.mark.parametrize("spoilt", ["url", "tgz_md5"])
def test_an_archive_that_can_not_be_had_is_one_sentence(tmp_path, published, monkeypatch, spoilt):
    wrong = {"url": "file:///nowhere/cifar.tar.gz", "tgz_md5": "0" * 32}[spoilt]
    monkeypatch.setattr(LAYOUTS["CIFAR"], spoilt, wrong)
    with pytest.raises(DataError, match=r"can not be fetched into .*by hand") as caught:
        fetch("CIFAR", tmp_path / "data")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["IMNET", "FOLDER", "INAT"])
def test_what_can_not_be_fetched_is_reported(name):
    with pytest.raises(DataError, match=f"data_set is '{name}', expected one that --download"):
        fetch(name, "datasets")
