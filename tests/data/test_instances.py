"""Boxes of SHAPES-DET and of miniature files in COCO's layout, and what is refused of them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fambav.config import Augment
from fambav.data import DataError, load, synthetic
from fambav.data.coco import rasterised
from fambav.data.instances import BoxTransform, fitted
from tests.made import refused

STATISTICS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
SIZES = {7: (60, 40), 3: (40, 60), 9: (50, 50)}  # width and height by id
ROWS = [  # of training: id, image, category, bbox, iscrowd, segmentation
    (11, 7, 18, [10, 5, 20, 10], 0, [[10, 5, 30, 5, 30, 15, 10, 15]]),
    (12, 7, 90, [0, 0, 60.4, 40], 1, {"counts": [0, 1200, 1200], "size": [40, 60]}),
    (13, 3, 44, [5, 6, 7, 8], 0, [[5, 6, 12, 6, 12, 14, 5, 14]]),
    (14, 3, 18, [5, 6, 0, 8], 0, [[5, 6, 5, 6, 5, 14, 5, 14]]),
]


def described(rows=ROWS, **changes):
    names = ("id", "image_id", "category_id", "bbox", "iscrowd", "segmentation")
    return {
        "images": [
            {"id": n, "file_name": f"{n:012}.jpg", "width": w, "height": h}
            for n, (w, h) in SIZES.items()
        ],
        "annotations": [dict(zip(names, row, strict=True)) for row in rows],
        "categories": [{"id": n, "name": f"kind {n}"} for n in (90, 18, 44)],
        **changes,
    }


@pytest.fixture
def coco(tmp_path):
    for part in ("train2017", "val2017"):
        (tmp_path / part).mkdir()
        for number, size in SIZES.items():
            Image.new("RGB", size, (number * 20, 0, 0)).save(tmp_path / part / f"{number:012}.jpg")
        put(tmp_path, part, described())
    return tmp_path


def put(folder, part, content):
    path = folder / "annotations" / f"instances_{part}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def test_images_boxes_and_categories_of_coco(coco):
    opened = load("COCO", coco)
    assert opened.class_names == ("kind 18", "kind 44", "kind 90")  # by id, without gaps
    assert (len(opened.train), len(opened.val)) == (2, 3)  # one has no boxes to learn from
    assert opened.notes == (
        "COCO: 2 images to train, 1 without boxes left out, 3 held out; 2 boxes without area left"
        " out",
    )
    image, known = opened.train[0]
    assert image.size == (60, 40)
    assert known.boxes.tolist() == [[10, 5, 30, 15], [0, 0, 60, 40]]  # rounding is cut off
    assert known.labels.tolist() == [0, 2] and known.crowd.tolist() == [False, True]
    first, crowd = known.masks()
    rows, columns = np.nonzero(first)
    assert (rows.min(), rows.max() + 1) == pytest.approx((5, 15), abs=1)
    assert (columns.min(), columns.max() + 1) == pytest.approx((10, 30), abs=1)
    assert np.array_equal(crowd, np.broadcast_to(np.arange(60) < 30, (40, 60)))  # down columns
    _, empty = opened.val[2]
    assert empty.boxes.shape == (0, 4) and empty.masks().shape == (0, 50, 50)


def test_folders_of_images_may_lie_deeper(coco):
    (coco / "images").mkdir()
    for part in ("train2017", "val2017"):
        (coco / part).rename(coco / "images" / part)
    assert len(load("COCO", coco).val) == 3


def changed(number, **entries):
    content = described()
    content["annotations"][number].update(entries)
    return content


BROKEN = {
    "annotation 11 has bbox [50, 5, 20, 10], expected left, top, width and height within image 7"
    " of 60 x 40 pixels": changed(0, bbox=[50, 5, 20, 10]),
    "annotation 13 has bbox [5, 6, -7, 8], expected left": changed(2, bbox=[5, 6, -7, 8]),
    "annotation 13 has bbox [5, 6, 7], expected left": changed(2, bbox=[5, 6, 7]),
    "annotations[2].bbox[0] is 'a', expected a number": changed(2, bbox=["a", 6, 7, 8]),
    "annotation 12 has category_id 5, expected one that the file has": changed(1, category_id=5),
    "annotation 12 has image_id 5, expected one that the file has": changed(1, image_id=5),
    "annotation 12 has iscrowd 2, expected 0 or 1": changed(1, iscrowd=2),
    "annotation 13 has segmentation [[1, 2]], expected polygons": changed(2, segmentation=[[1, 2]]),
    "annotation 12 has segmentation {'counts': [3]}": changed(1, segmentation={"counts": [3]}),
    "annotations have the id 11 twice": changed(1, id=11),
    "has no annotations, expected at least one": described(annotations=[]),
    "has no annotations that teach": described(rows=ROWS[1:2]),
    "has no images, expected at least one": described(images=[]),
    "annotations is missing, expected a list": {"images": [], "categories": []},
    "has 1 categories, expected at least 2": described(
        rows=[],
        annotations=[{**described()["annotations"][0], "category_id": 1}],
        categories=[{"id": 1, "name": "a"}],
    ),
}


@pytest.mark.parametrize("words", BROKEN)
def test_what_does_not_fit_is_refused_when_the_set_is_opened(coco, words):
    put(coco, "train2017", BROKEN[words])
    with pytest.raises(DataError) as error:
        load("COCO", coco)
    assert words in str(error.value) and "instances_train2017.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_and_other_categories_are_refused(coco):
    (coco / "train2017" / f"{7:012}.jpg").unlink()
    with pytest.raises(DataError, match=r"train2017 lacks 1 images of .*, such as 0+7\.jpg"):
        load("COCO", coco)
    other = described(categories=[{"id": n, "name": "x"} for n in (90, 18, 44)])
    put(coco, "val2017", other)
    with pytest.raises(DataError, match="has other categories than"):
        load("COCO", coco)
    (coco / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(DataError, match=r"has 0 files instances_val\*\.json, expected one"):
        load("COCO", coco)


def test_a_box_outside_of_its_image_ends_a_run_in_one_line(coco):
    put(coco, "val2017", changed(0, bbox=[50, 5, 20, 10]))
    words = ["--data-set", "COCO", "--data-path", coco, "--model", "vssd_nano"]
    line = refused(*words, "--input-size", "32", "--device", "cpu")
    assert "instances_val2017.json: annotation 11 has bbox [50, 5, 20, 10], expected" in line


def test_an_image_of_another_size_is_refused_before_a_run_or_when_it_is_read(coco):
    Image.new("RGB", (61, 40)).save(coco / "val2017" / f"{7:012}.jpg")
    with pytest.raises(DataError, match=r"is 61 x 40, expected 60 x 40 as in .*val2017\.json"):
        load("COCO", coco).val[0]
    words = ["--data-set", "COCO", "--data-path", coco, "--model", "vssd_nano", "--device", "cpu"]
    assert "is 61 x 40, expected 60 x 40" in refused(*words, "--output_dir", coco / "out")
    assert not (coco / "out").exists()


def test_masks_of_an_annotation_without_any_are_refused(coco):
    content = described()
    del content["annotations"][0]["segmentation"]
    put(coco, "val2017", content)
    _, known = load("COCO", coco).val[0]
    assert len(known.boxes) == 2
    with pytest.raises(
        DataError, match=r"val2017.json: annotation 11 has no segmentation, expected"
    ):
        known.masks()


def test_a_polygon_covers_its_area():
    square = [np.array([[2, 3], [10, 3], [10, 8], [2, 8]], dtype=np.float32)]
    assert rasterised(square, (20, 12)).sum() == pytest.approx(40, abs=14)  # and of its border


def test_boxes_of_shapes_are_tight_around_their_pixels():
    opened = synthetic.shapes_det(counts=(20, 5))
    plain, masked = synthetic.shapes100(counts=(20, 5)), synthetic.shapes_seg(counts=(20, 5))
    assert np.array_equal(opened.train.images, plain.train.images)
    assert opened.num_classes == 10
    for n in range(20):
        _, known = opened.train[n]
        assert known.labels.tolist() == [*divmod(int(plain.train.labels[n]), 10)]
        masks = known.masks()
        for label, box, mask in zip(known.labels, known.boxes, masks, strict=True):
            assert (masked.train.labels[n][mask] == label + 1).all()
            left, top, right, bottom = map(int, box)
            assert mask[top:bottom, left:right].sum() == mask.sum() > 0
            assert mask[top].any() and mask[bottom - 1].any()
            assert mask[:, left].any() and mask[:, right - 1].any()
        assert np.array_equal(masks.any(axis=0), masked.train.labels[n] > 0)


def test_a_transform_keeps_boxes_masks_and_pixels_together():
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[5:15, 10:30] = 255
    mask = (pixels[..., 0] > 0)[None]
    opened = synthetic.shapes_det(counts=(1, 1)).val[0][1]
    target = opened._replace(
        boxes=np.array([[10, 5, 30, 15]], dtype=np.float32),
        labels=np.array([4]),
        crowd=np.array([False]),
        masks=lambda: mask,
    )
    augment = Augment(hflip=1.0, color_jitter=None)
    for change in (None, augment):
        made = BoxTransform((64, 80), STATISTICS, masks=True, augment=change)
        image, known = made(Image.fromarray(pixels), target)
        assert image.shape == (3, 64, 80) and image.dtype == torch.float32
        assert known["boxes"].tolist() == [[20, 10, 60, 30]]
        assert known["labels"].tolist() == [4]
        assert torch.equal(known["masks"][0, :40].bool(), image[0, :40] > 0)
        assert (image[:, 40:] == 0).all()  # the mean colour
        assert torch.equal(made(Image.fromarray(pixels)), image)
    assert fitted((480, 640), (800, 1344)) == (800, 1067)
    assert fitted((10, 4000), (64, 64)) == (1, 64)
