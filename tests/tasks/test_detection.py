"""Detection: AP against its definition, and a run trained, resumed, evaluated, predicted, drawn."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from fambav.cli import console
from fambav.config import Config
from fambav.data import read_image, synthetic
from fambav.registry import BUILDERS, TASKS
from fambav.tasks import task_of
from fambav.tasks.detection import IOU_THRESHOLDS
from fambav.training.inference import load_run
from tests.identical import assert_identical, log
from tests.made import crash_in_update, crashing, go, refused

WORDS = [
    *("--data-set", "SHAPES-DET", "--data-stats", "own", "--model", "vssd_nano"),
    *("--head", "mask-rcnn", "--head-channels", "8", "--anchor-scale", "3"),
    *("--region-samples", "16", "--input-size", "32", "--batch-size", "4", "--epochs", "2"),
    *("--warmup-epochs", "0", "--lr", "3e-3", "--unscale-lr", "--clip-grad", "1"),
    *("--num_workers", "0", "--device", "cpu", "--threads", "1", "--no-model-ema"),
]


@pytest.fixture(scope="module", autouse=True)
def few():
    task_of("SHAPES-DET")
    small = synthetic.shapes_det(counts=(16, 6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUILDERS._builders, "SHAPES-DET", lambda _: small)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    found = go(*WORDS, "--output_dir", folder)
    assert found.status == 0, found.err
    return folder, found.out


def test_a_run_learns_and_logs_its_metrics(finished):
    folder, printed = finished
    first, last = log(folder)
    boxes = {"ap", "ap50", "ap75"}
    metrics = boxes | {f"mask_{name}" for name in boxes}
    assert {n for n in first if n.startswith("test_")} == {f"test_{name}" for name in metrics}
    assert last["train_loss"] < first["train_loss"]
    assert "* AP " in printed and "Best AP: " in printed


def test_a_killed_run_resumes_bit_for_bit(finished, tmp_path):
    folder, _ = finished
    with crashing(partial(crash_in_update, update=6)):
        go(*WORDS, "--output_dir", tmp_path, "--save-every", "1")
    assert go(*WORDS, "--output_dir", tmp_path, "--save-every", "1", "--resume", "auto").status == 0
    assert_identical(tmp_path, folder)


@pytest.fixture
def confident(monkeypatch):
    """Let a net that knows nothing yet say what it thinks."""
    from fambav.heads import Detector

    def eager(self, images, targets=None, real=Detector.forward):
        self.roi_heads.score_thresh = 0.0
        return real(self, images, targets)

    monkeypatch.setattr(Detector, "forward", eager)


def test_a_run_is_evaluated_predicted_with_and_drawn(finished, confident, tmp_path, capsys):
    folder, _ = finished
    assert console(["evaluate", str(folder), "--device", "cpu"]) == 0
    assert "box AP on the 6 test samples: " in capsys.readouterr().out
    pixels = np.random.default_rng(0).integers(256, size=(40, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    words = ["predict", str(folder), str(tmp_path / "a.png"), "--device", "cpu"]
    assert console([*words, "--output-dir", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    rows = json.loads((tmp_path / "out" / "a_boxes.json").read_text())
    assert 0 < len(rows) <= 100
    for row in rows:
        left, top, right, bottom = row["box"]
        assert 0 <= left <= right <= 70 and 0 <= top <= bottom <= 40
        assert row["mask"]["size"] == [40, 70] and sum(row["mask"]["counts"]) == 40 * 70
    assert read_image(tmp_path / "out" / "a_boxes.png").size == (70, 40)
    assert console(words) == 2
    assert "output_dir is None, expected a folder for the boxes" in capsys.readouterr().err
    assert console(["show", str(folder), "--output-dir", str(tmp_path / "drawn")]) == 0
    assert {p.name for p in (tmp_path / "drawn").iterdir()} == {"boxes.png", "curves.png"}


def test_what_has_no_meaning_for_a_detector_is_refused_in_one_line(finished, capsys, tmp_path):
    folder, _ = finished
    for words, wanted in (
        (["evaluate", folder, "--per-class"], "expected one whose task has classes"),
        (
            ["export", folder, "--format", "hf", "--output-dir", tmp_path / "x"],
            "model is vssd_nano of SHAPES-DET, expected one whose output is a tensor",
        ),
        (["flops", *WORDS[:6]], "model is a detector with head faster-rcnn, expected one whose"),
    ):
        assert console([str(word) for word in words]) == 2
        err = capsys.readouterr().err
        assert wanted in err and err.count("\n") == 1


def test_a_checkpoint_says_what_it_is_of(finished):
    loaded = load_run(finished[0])
    assert loaded.num_classes == 10 and loaded.class_names[0] == "disc"
    assert loaded.net.head == "mask-rcnn"


REFUSED = {
    "--head upernet": "--head is 'upernet', expected faster-rcnn or mask-rcnn with --data-set SHA",
    "--auxiliary-weight 0": "--auxiliary-weight is 0.0, expected 0.4 with --data-set SHAPES-DET",
    "--compile": "--compile is on, expected off with --data-set SHAPES-DET",
    "--crop-size 32": "--crop-size is 32, expected none with --data-set SHAPES-DET",
    "--mixup 0.2": "--mixup is 0.2, expected 0.0 with --data-set SHAPES-DET",
    "--num-classes 7": "num_classes is 7, expected 10, the classes of SHAPES-DET",
    "--model vmunet": "--model is 'vmunet', expected a model for detection",
    "--region-samples 0": "--region-samples is 0, expected at least 1",
    "--data-set SHAPES-SEG": "--head is 'mask-rcnn', expected upernet or fcn",
    "--data-set DIGITS": "--head is 'mask-rcnn', expected none with --model vssd_nano",
}


@pytest.mark.parametrize("words", REFUSED)
def test_settings_that_do_not_fit_are_refused(words):
    base = [w for w in WORDS if w not in ("--head-channels", "8", "--anchor-scale", "3")]
    base = base[: base.index("--region-samples")]
    assert REFUSED[words] in refused(*base, *words.split())


def test_heads_have_their_published_width_unless_another_is_named():
    flat = {"model": "vssd_nano", "data_set": "SHAPES-DET"}
    config = Config.from_flat(flat)
    assert (config.model.head, config.model.head_channels) == ("faster-rcnn", 256)
    assert Config.from_flat({**flat, "head_channels": 512}).model.head_channels == 512
    assert Config.recorded(config.flat()) == config
    assert Config.from_flat({**flat, "data_set": "SHAPES-SEG"}).model.head_channels == 512


def made(seed, *, images=12, classes=3, masks=False):
    """Outputs and targets that agree in part, with crowds and equal scores."""
    random = np.random.default_rng(seed)
    outputs, targets = [], []
    for _ in range(images):
        known, guesses = random.integers(0, 6), random.integers(0, 9)
        low = random.integers(0, 20, (known, 2))
        boxes = np.concatenate([low, low + random.integers(3, 12, (known, 2))], axis=1)
        chosen = boxes[random.integers(0, known, guesses)] if known else np.zeros((guesses, 4))
        found = chosen + random.integers(-2, 3, (guesses, 4))
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        output = {
            "boxes": torch.tensor(found, dtype=torch.float32),
            "scores": torch.tensor(random.integers(1, 20, guesses) / 20).float(),
            "labels": torch.tensor(random.integers(0, classes, guesses)),
            "finite": torch.tensor(0.0),
        }
        target = {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(random.integers(0, classes, known)),
            "crowd": torch.tensor(random.random(known) < 0.2),
        }
        if masks:
            for each in (output, target):
                each["masks"] = filled(each["boxes"])
        outputs.append(output)
        targets.append(target)
    return outputs, targets


def filled(boxes):
    places = torch.arange(36)
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    inside = (places[None, :, None] >= low) & (places[None, :, None] < high)  # (n, 36, x or y)
    return inside[..., 1][:, :, None] & inside[..., 0][:, None]


def defined(outputs, targets, threshold, classes):
    """AP by its definition, one detection at a time, in plain numbers."""
    values = []
    for label in range(classes):
        rows, total = [], 0
        for output, target in zip(outputs, targets, strict=True):
            truth = [
                (box.tolist(), bool(crowd))
                for box, other, crowd in zip(*target.values(), strict=True)
                if other == label
            ]
            total += sum(not crowd for _, crowd in truth)
            used = set()
            for n in output["scores"].argsort(descending=True, stable=True).tolist():
                if output["labels"][n] != label:
                    continue
                box, best, state = output["boxes"][n].tolist(), threshold, "missed"
                for k, (other, crowd) in enumerate(truth):
                    if not crowd and k not in used and iou(box, other) >= best:
                        best, state, place = iou(box, other), "found", k
                if state == "found":
                    used.add(place)
                elif any(c and iou(box, o, crowd=True) >= threshold for o, c in truth):
                    state = "ignored"
                rows.append((float(output["scores"][n]), state))
        if total:
            values.append(area(sorted(rows, key=lambda row: -row[0]), total))
    return 100 * sum(values) / len(values)


def iou(one, other, *, crowd=False):
    sides = [min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in range(2)]
    both = max(sides[0], 0) * max(sides[1], 0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    return both / (areas[0] if crowd else sum(areas) - both)


def area(rows, total):
    points, hits, count = [], 0, 0
    for _, state in rows:
        if state == "ignored":
            continue
        hits, count = hits + (state == "found"), count + 1
        points.append((hits / total, hits / count))
    recalls = np.linspace(0, 1, 101)
    return sum(max((p for r, p in points if r >= recall), default=0) for recall in recalls) / 101


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_that_of_its_definition(seed):
    outputs, targets = made(seed)
    meter = TASKS["detection"].meter(3, torch.device("cpu"))
    assert meter.update(outputs[:5], targets[:5]) and meter.update(outputs[5:], targets[5:])
    metrics = meter.scores().metrics
    want = [defined(outputs, targets, threshold, 3) for threshold in IOU_THRESHOLDS]
    assert 0 < want[0] < 100
    assert metrics["ap50"] == pytest.approx(want[0], rel=1e-12)
    assert metrics["ap75"] == pytest.approx(want[5], rel=1e-12)
    assert metrics["ap"] == pytest.approx(sum(want) / 10, rel=1e-12)


@pytest.mark.parametrize("world", [2, 3])
def test_shares_of_processes_give_the_same_digits(world):
    outputs, targets = made(7, masks=True, images=13)
    meters = [TASKS["detection"].meter(3, torch.device("cpu")) for _ in range(world + 1)]
    whole, *shares = meters
    whole.update(outputs, targets)
    for rank, share in enumerate(shares):
        share.update(outputs[rank::world], targets[rank::world])
    total, kept = sum(share.sums for share in shares), [share.images for share in shares]
    shares[0].sums = total
    shares[0].share(lambda _: kept)
    assert shares[0].scores() == whole.scores()
    assert whole.scores().metrics["mask_ap"] == whole.scores().metrics["ap"]  # boxes, all filled
    assert whole.scores().samples == 13


def test_no_detections_no_objects_and_what_is_not_finite():
    meter = TASKS["detection"].meter(3, torch.device("cpu"))
    outputs, targets = made(0, images=2)
    none = [{name: value[:0] for name, value in own.items()} for own in targets]
    assert meter.update(outputs, none)
    assert meter.scores().metrics == {"ap": 0, "ap50": 0, "ap75": 0}
    outputs[1]["finite"] = torch.tensor(torch.nan)
    assert not meter.update(outputs, targets)


@pytest.mark.extra("faster_coco_eval")
@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_that_of_faster_coco_eval(seed):
    from faster_coco_eval import COCO, COCOeval_faster

    outputs, targets = made(seed, images=40)
    meter = TASKS["detection"].meter(3, torch.device("cpu"))
    meter.update(outputs, targets)
    truth, guesses = [], []
    for image, (output, target) in enumerate(zip(outputs, targets, strict=True), start=1):
        for box, label, crowd in zip(*target.values(), strict=True):
            row = entry(image, box, label)
            row |= {"id": len(truth) + 1, "iscrowd": int(crowd), "area": row["bbox"][2] ** 2}
            truth.append(row)
        rows = zip(output["boxes"], output["labels"], output["scores"], strict=True)
        guesses += [{**entry(image, box, label), "score": float(s)} for box, label, s in rows]
    known = COCO(
        {
            "images": [{"id": n + 1, "width": 40, "height": 40} for n in range(40)],
            "categories": [{"id": n, "name": str(n)} for n in range(3)],
            "annotations": truth,
        }
    )
    run = COCOeval_faster(known, known.loadRes(guesses), "bbox", print_function=lambda *_: None)
    run.evaluate()
    run.accumulate()
    run.summarize()
    metrics = meter.scores().metrics
    assert [metrics[n] / 100 for n in ("ap", "ap50", "ap75")] == pytest.approx(run.stats[:3])


def entry(image, box, label):
    left, top, right, bottom = box.tolist()
    bbox = [left, top, right - left, bottom - top]
    return {"image_id": image, "category_id": int(label), "bbox": bbox}
