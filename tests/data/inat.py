"""A small iNaturalist of 2018 in the real layout."""

import json

from tests.data.made import made_folder


def made_inat(path, *, train=16, val=8, **entries):
    """Write images and the three lists for two categories; return `path`.

    There are so many images of each category; `entries` are more of its values, by category.
    """
    made_folder(path / "images", classes=["0", "1"], train=train, val=val, size=(20, 20))
    for part, count in (("train", train), ("val", val)):
        images, marks = [], []
        for number in range(2 * count):
            label, place = number % 2, number // 2
            images.append({"id": number, "file_name": f"images/{part}/{label}/{place}.png"})
            marks.append({"image_id": number, "category_id": label})
        write(path / f"{part}2018.json", {"images": images, "annotations": marks})
    known = [{"id": n, "name": f"species {n}", "genus": f"genus {n}"} for n in range(2)]
    for name, values in entries.items():
        for category, value in zip(known, values, strict=True):
            category[name] = value
    write(path / "categories.json", known)
    return path


def write(path, tree):
    path.write_text(json.dumps(tree))
