"""Segmentation by a tiny net: trained, killed and resumed, evaluated, predicted with, drawn."""

import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn import functional as F

import fambav.models  # noqa: F401  # before timm
from fambav.cli import console
from fambav.config import Config, checks
from fambav.data import load, read_image, synthetic
from fambav.data.types import IGNORE
from fambav.export import export
from fambav.layers import sliding
from fambav.layers.sliding import SlidingWindow
from fambav.registry import BUILDERS, FAMILIES, TASKS, Family
from fambav.tasks import segmentation, task_of
from fambav.timm_compat import timm
from fambav.training import batches
from tests.identical import assert_identical, log
from tests.made import crash_in_update, crashing, go, refused


class TinyNet(nn.Module):
    """A convolution at half the size, and logits there."""

    def __init__(self, *, num_classes=11, img_size=32):
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.mix = nn.Conv2d(16, 16, 3, padding=1)
        self.out = nn.Conv2d(16, num_classes, 1)
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.pretrained_cfg = {"input_size": (3, *size)}

    def forward(self, images):
        return self.out(F.gelu(self.mix(F.gelu(self.stem(images)))))


def tiny_segmenter(num_classes=11, img_size=None, **_):
    return TinyNet(num_classes=num_classes, img_size=img_size or 32)


@pytest.fixture(scope="module", autouse=True)
def registered():
    task_of("SHAPES-SEG")
    timm.models.register_model(tiny_segmenter)
    family = Family(
        models=("tiny_segmenter",),
        arguments={"input_size": "img_size"},
        tasks=("segmentation",),
        layers=False,
        reducible=False,
        scan=False,
    )
    small = partial(synthetic.shapes_seg, counts=(48, 20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "tiny", family)
        patch.setattr(checks, "MODELS", (*checks.MODELS, "tiny_segmenter"))
        patch.setitem(BUILDERS._builders, "SHAPES-SEG", lambda _: small())
        yield


FLAGS = [
    *("--model", "tiny_segmenter", "--data-set", "SHAPES-SEG", "--num_workers", "0"),
    *("--batch-size", "8", "--epochs", "3", "--warmup-epochs", "0", "--lr", "1e-2"),
    *("--unscale-lr", "--log_every", "1", "--data-stats", "own", "--mask-loss", "ce+dice"),
    *("--resize-range", "0.8", "1.5", "--device", "cpu", "--threads", "1"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    found = go(*FLAGS, "--output_dir", folder)
    assert found.status == 0, found.err
    return folder, found.out


def test_a_run_learns_and_logs_its_metrics(finished):
    folder, printed = finished
    first, *_, last = records = log(folder)
    assert {n for n in first if n.startswith("test_") and "ema" not in n} == {
        "test_loss",
        "test_miou",
        "test_oa",
        "test_mf1",
    }
    assert last["train_loss"] < first["train_loss"]
    best = max(record["test_miou"] for record in records)
    assert f"Best mIoU: {best:.4g}%" in printed


def test_a_killed_run_resumes_bit_for_bit(finished, tmp_path):
    folder, _ = finished
    with crashing(partial(crash_in_update, update=8)):
        go(*FLAGS, "--output_dir", tmp_path)
    assert go(*FLAGS, "--output_dir", tmp_path, "--resume", "auto").status == 0
    assert_identical(tmp_path, folder)


def test_an_evaluation_repeats_the_best_scores_by_class(finished, tmp_path, capsys):
    folder, _ = finished
    best = max(record["test_miou"] for record in log(folder))
    picture, rows = tmp_path / "confusion.png", tmp_path / "images.csv"
    words = ["--per-class", "--confusion", str(picture), "--predictions", str(rows)]
    assert console(["evaluate", str(folder), *words]) == 0
    out = capsys.readouterr().out
    assert f" mIoU {best:.3f} " in out and "precision %" in out and "hourglass" in out
    assert picture.stat().st_size
    assert len(rows.read_text().splitlines()) == 21
    assert console(["evaluate", str(folder), "--eval-flip", "--eval-scales", "1", "1.25"]) == 0
    assert f" mIoU {best:.3f} " not in capsys.readouterr().out


def test_prediction_writes_masks_and_overlays_of_images_of_any_size(finished, tmp_path, capsys):
    folder, _ = finished
    pixels = np.random.default_rng(0).integers(256, size=(50, 75, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    out = tmp_path / "out"
    words = ["predict", str(folder), str(tmp_path / "a.png"), "--device", "cpu"]
    assert console([*words, "--output-dir", str(out)]) == 0
    assert "background" in capsys.readouterr().out
    mask = np.asarray(Image.open(out / "a_mask.png"))
    assert mask.shape == (50, 75) and mask.max() < 11
    assert read_image(out / "a_overlay.png").size == (75, 50)
    assert console([*words, "--topk", "2", "--output-dir", str(out)]) == 2
    assert console(words) == 2
    assert "output_dir is None, expected a folder for the masks" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_an_export_is_compared_on_windows_of_images_of_any_size(kind, finished, tmp_path):
    class Odd:
        def __init__(self, samples):
            self.samples = samples

        def __len__(self):
            return 3

        def __getitem__(self, n):
            image, labels = self.samples[n]
            return image.resize((48 + n, 20 + 12 * n)), labels

    known = synthetic.shapes_seg(counts=(48, 20))
    with pytest.MonkeyPatch.context() as patch:
        odd = replace(known, val=Odd(known.val))
        patch.setitem(BUILDERS._builders, "SHAPES-SEG", lambda _: odd)
        check = export(finished[0], kind, tmp_path / "out")
    assert check.images == 3 and check.difference <= check.tolerance


def test_pictures_show_image_truth_and_prediction(finished, tmp_path, capsys):
    folder, _ = finished
    assert console(["show", str(folder), "--output-dir", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"masks.png", "curves.png"}


REFUSED = {
    "--mixup 0.2": "--mixup is 0.2, expected 0.0 with --data-set SHAPES-SEG",
    "--aa rand-m9": "--aa is 'rand-m9', expected none with --data-set SHAPES-SEG",
    "--resize-range 2 1": "--resize-range is [2.0, 1.0], expected two numbers, the second not",
    "--crop-size 16 --input-size 32": "--input-size is 32, expected 16 as --crop-size",
    "--num-classes 7": "num_classes is 7, expected 11, the classes of SHAPES-SEG",
}


@pytest.mark.parametrize("words", REFUSED)
def test_settings_that_do_not_fit_are_refused(words):
    assert REFUSED[words] in refused(*FLAGS, *words.split())


def test_masks_need_a_data_set_with_masks():
    line = refused("--model", "vim_micro", "--data-set", "DIGITS", "--crop-size", "16")
    assert "expected none with --data-set DIGITS, which has no masks" in line


def test_metrics_are_those_of_the_counts_and_shares_add_up_exactly():
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 3, 4, 5), torch.randint(3, (7, 4, 5))
    labels[0, :2], labels[1] = IGNORE, IGNORE
    whole, *shares = (TASKS["segmentation"].meter(3, torch.device("cpu")) for _ in range(3))
    assert whole.update(logits, labels)
    for rank, share in enumerate(shares):
        share.update(logits[rank::2], labels[rank::2])
    shares[0].sums += shares[1].sums
    assert torch.equal(shares[0].confusion(), whole.confusion())
    guesses, known = logits.argmax(1)[labels != IGNORE], labels[labels != IGNORE]
    ious, f1s = [], []
    for label in range(3):
        both = ((guesses == label) & (known == label)).sum()
        ious.append(both / ((guesses == label) | (known == label)).sum())
        f1s.append(2 * both / ((guesses == label).sum() + (known == label).sum()))
    metrics = whole.scores().metrics
    assert metrics["miou"] == pytest.approx(100 * float(torch.stack(ious).mean()))
    assert metrics["mf1"] == pytest.approx(100 * float(torch.stack(f1s).mean()))
    assert metrics["oa"] == pytest.approx(100 * float((guesses == known).float().mean()))
    assert shares[0].scores().metrics["miou"] == metrics["miou"]
    whole.unscored = (2,)
    assert whole.scores().metrics["miou"] == pytest.approx(
        100 * float(torch.stack(ious[:2]).mean())
    )
    assert not whole.update(logits * torch.nan, labels)


def test_losses_leave_ignored_pixels_out():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 6, 6), torch.randint(4, (2, 6, 6))
    labels[:, :3] = IGNORE
    kept, truth = logits[:, :, 3:], labels[:, 3:]
    half = F.cross_entropy(kept, truth) / 2  # of the pixels are labelled
    assert torch.isclose(segmentation.cross_entropy(logits, labels), half)
    shares, hot = kept.softmax(1), F.one_hot(truth, 4).permute(0, 3, 1, 2)
    both, sizes = (shares * hot).sum((0, 2, 3)), (shares**2 + hot).sum((0, 2, 3))
    want = 1 - ((2 * both + 1e-5) / (sizes + 1e-5)).mean()
    assert torch.isclose(segmentation.dice(logits, labels), want)
    assert segmentation.cross_entropy(logits, torch.full_like(labels, IGNORE)) == 0


def _images():
    torch.manual_seed(0)
    labels = torch.randint(3, (6, 8, 8))
    labels[0, :5], labels[3], labels[4, :, 2:] = IGNORE, IGNORE, IGNORE
    return torch.randn(6, 3, 8, 8), labels


def _pass(wrap, images, labels):
    torch.manual_seed(1)
    net = wrap(TinyNet(num_classes=3))
    config = Config.from_flat({"model": "vmunet_nano", "mask_loss": "ce+dice"})
    loss = TASKS["segmentation"].loss(config, mixed=False)(net(images), labels)
    loss.backward()
    return loss.detach(), {n.removeprefix("module."): p.grad for n, p in net.named_parameters()}


def _one_of_two(rank, folder):
    torch.set_num_threads(1)
    where = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    images, labels = _images()
    found = _pass(nn.parallel.DistributedDataParallel, images[rank::2], labels[rank::2])
    torch.save(found, folder / f"{rank}.pth")
    dist.destroy_process_group()


def test_losses_of_two_processes_are_those_of_one(tmp_path):
    """Also where the shares have different numbers of ignored pixels."""
    start = torch.multiprocessing.start_processes
    start(_one_of_two, (tmp_path,), nprocs=2, start_method="fork")
    loss, gradients = _pass(nn.Identity(), *_images())
    shares = [torch.load(tmp_path / f"{rank}.pth") for rank in range(2)]
    torch.testing.assert_close(sum(share for share, _ in shares) / 2, loss)
    for _, found in shares:
        torch.testing.assert_close(found, gradients)


def test_windows_cover_an_image_and_agree_where_the_net_is_local():
    pointwise = nn.Conv2d(3, 4, 1)
    images = torch.randn(2, 3, 37, 21)
    with torch.no_grad():
        want = pointwise(images)
        for overlap in (0.0, 0.5):
            net = SlidingWindow(pointwise, window=(16, 24), overlap=overlap)
            torch.testing.assert_close(net(images), want)
        views = SlidingWindow(pointwise, window=(16, 24), flip=True)
        torch.testing.assert_close(views(images).exp(), want.softmax(1))
        scaled = SlidingWindow(pointwise, window=(16, 24), scales=(0.5, 2.0))
        assert scaled(images).shape == want.shape


@pytest.mark.parametrize("size", [(150, 41), (16, 90), (5, 7)])
@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5])
def test_tiles_of_an_image_give_the_mask_of_the_whole(size, overlap, monkeypatch):
    monkeypatch.setattr(sliding, "_TILE", 0)  # two windows a side
    torch.manual_seed(0)
    window = SlidingWindow(nn.Conv2d(3, 4, 5, padding=2), window=(16, 8), overlap=overlap)
    pixels = np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)
    seen = []

    def outputs_of(image):
        seen.append(image.size)
        return window(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255)

    with torch.no_grad():
        whole = outputs_of(Image.fromarray(pixels))[0].argmax(0)
        mask = segmentation.predicted_mask(Image.fromarray(pixels), window, outputs_of)
    assert np.array_equal(mask, whole)
    assert max(width for width, _ in seen[1:]) <= 4 * 8 * 2
    assert max(height for _, height in seen[1:]) <= 4 * 16 * 2


def test_one_tile_is_in_memory_at_a_time_and_few_windows_are_read_at_once(monkeypatch):
    monkeypatch.setattr(sliding, "_TILE", 2**18)
    shapes, alive, pixels = [], [], []
    known = nn.Conv2d(3, 4, 1)

    class Counting(nn.Module):
        def forward(self, images):
            shapes.append(tuple(images.shape))
            return known(images)

    window = SlidingWindow(Counting(), window=(64, 128), overlap=0.5)
    references = []

    def outputs_of(image):
        alive.append(sum(reference() is not None for reference in references))
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        pixels.append(image.width * image.height)
        logits = window(x)
        references.append(weakref.ref(logits))
        return logits

    with torch.no_grad():
        mask = segmentation.predicted_mask(Image.new("RGB", (1500, 700)), window, outputs_of)
    assert mask.shape == (700, 1500) and len(alive) == 4 * 4
    assert max(pixels) <= 2**18
    assert max(alive) == 0  # logits of the tile before are gone
    assert {shape[2:] for shape in shapes} == {(64, 128)}
    assert max(shape[0] for shape in shapes) == 2**18 // (64 * 128)


@pytest.mark.parametrize("window", [(16, 24), (600, 520)])
def test_windows_that_are_read_together_give_what_single_ones_give(window):
    torch.manual_seed(0)
    net, images = nn.Conv2d(3, 4, 3, padding=1).double(), torch.randn(2, 3, 640, 530)
    net.forward = partial(lambda own, x: nn.Conv2d.forward(own, x.double()), net)
    with torch.no_grad():
        found = SlidingWindow(net, window=window)(images)
        one = SlidingWindow(net, window=window)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sliding, "_TOGETHER", 1)
            torch.testing.assert_close(one(images), found)


def test_classes_that_are_left_out_reach_the_meter():
    opened = replace(load("SHAPES-SEG"), unscored=(5,))
    config = Config.from_flat({"model": "tiny_segmenter", "data_set": "SHAPES-SEG"})
    for by_class in (False, True):
        assert batches.meter(config, opened, torch.device("cpu"), by_class=by_class).unscored == (
            5,
        )


def test_the_shapes_of_masks_are_those_of_the_labels():
    plain = synthetic.shapes100(counts=(20, 5))
    masked = synthetic.shapes_seg(counts=(20, 5))
    assert np.array_equal(plain.train.images, masked.train.images)
    assert masked.class_names[0] == "background" and masked.num_classes == 11
    for mask, label in zip(masked.train.labels, plain.train.labels, strict=True):
        kinds = {int(label) // 10 + 1, int(label) % 10 + 1}
        assert set(np.unique(mask)) == {0} | kinds
