"""Patches, class tokens and the resizing of a raster."""

import pytest
import torch

from fambav.layers.embed import (
    PatchEmbed,
    cls_index_of,
    insert,
    pair,
    patch_grid,
    resize_grid,
)


@pytest.mark.parametrize(
    ("img_size", "patch_size", "stride", "grid"),
    [
        ((224, 224), 16, 16, (14, 14)),
        ((224, 224), 16, 8, (27, 27)),
        ((64, 96), 16, 16, (4, 6)),
        ((5, 4), 4, 1, (2, 1)),
        ((10, 10), 2, 4, (3, 3)),
    ],
)
def test_a_grid_counts_the_patches_that_fit(img_size, patch_size, stride, grid):
    assert patch_grid(img_size, patch_size=patch_size, stride=stride) == grid


@pytest.mark.parametrize(
    ("side", "stride", "arithmetic"),
    [
        (65, 16, r"\(65 - 16\) / 16 \+ 1 = 4\.062 patches; the next sizes that fit are 64 and 80"),
        (224, 15, r"\(224 - 16\) / 15 \+ 1 = 14\.87 patches"),
        (15, 16, r"the next sizes that fit are 16 and 32"),
    ],
)
def test_an_image_that_patches_do_not_divide_is_refused_with_the_arithmetic(
    side, stride, arithmetic
):
    with pytest.raises(ValueError, match=f"img_size is {side}.*{arithmetic}"):
        patch_grid((240 if stride == 16 else 226, side), patch_size=16, stride=stride)


@pytest.mark.parametrize("wrong", [{"patch_size": 0}, {"stride": 0}, {"stride": -4}])
def test_patches_of_no_size_are_refused(wrong):
    with pytest.raises(ValueError, match="expected at least 1"):
        patch_grid((32, 32), **{"patch_size": 4, "stride": 4, **wrong})


@pytest.mark.parametrize("size", [0, (1, 2, 3), (4, 0), [], (4.5, 4)])
def test_a_size_that_is_no_pair_is_refused(size):
    with pytest.raises(ValueError, match="expected a whole number of 1 to"):
        pair(size, name="img_size")


def test_patches_are_read_row_by_row():
    embed = PatchEmbed(1, patch_size=2, stride=2, in_chans=1)
    torch.nn.init.constant_(embed.proj.weight, 0.25)
    image = torch.arange(6.0).reshape(1, 1, 2, 3).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert embed(image)[0, :, 0].tolist() == pytest.approx([0, 1, 2, 3, 4, 5])


def test_patch_weights_start_with_the_published_spread():
    weight = PatchEmbed(384, patch_size=16, stride=16, in_chans=3).proj.weight
    assert weight.std().item() == pytest.approx(0.0410, rel=0.01)


@pytest.mark.parametrize(
    ("class_token", "places"), [("middle", (2,)), ("head", (0,)), ("double", (0, 6)), ("none", ())]
)
def test_class_tokens_stand_where_their_name_says(class_token, places):
    assert cls_index_of(class_token, 5) == places
    x, extra = torch.arange(1.0, 6).reshape(1, 5, 1), [torch.zeros(1, 1, 1)] * len(places)
    out = insert(x.expand(2, -1, -1), extra, places)
    assert out.shape == (2, 5 + len(places), 1)
    assert [i for i, value in enumerate(out[1, :, 0].tolist()) if value == 0] == list(places)
    assert out[0][out[0] > 0].tolist() == [1, 2, 3, 4, 5]


def test_the_published_middle_is_row_98_of_197():
    assert cls_index_of("middle", 196) == (98,)
    assert cls_index_of("middle", 27 * 27) == (364,)


def test_an_unknown_place_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="class_token is 'centre', expected a known name"):
        cls_index_of("centre", 4)
    with pytest.raises(ValueError, match="did you mean 'middle'"):
        cls_index_of("midle", 4)


def test_resizing_a_raster_keeps_its_axes_apart():
    height, width = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    raster = torch.stack((height, width), dim=-1).reshape(1, 24, 2)
    out = resize_grid(raster, (4, 6), (8, 3)).reshape(8, 3, 2)
    torch.testing.assert_close(out[..., 0], out[:, :1, 0].expand(8, 3))
    torch.testing.assert_close(out[..., 1], out[:1, :, 1].expand(8, 3))
    assert (out[:, 0, 0].diff() > 0).all()
    assert (out[0, :, 1].diff() > 0).all()


def test_resizing_takes_a_place_as_the_middle_of_its_cell():
    ramp = torch.arange(12.0).reshape(1, 12, 1)
    out = resize_grid(ramp, (12, 1), (24, 1)).flatten()
    torch.testing.assert_close(out[5:-3] - out[3:-5], torch.ones(16))  # two of them to a cell


def test_resizing_keeps_the_dtype():
    assert resize_grid(torch.zeros(1, 4, 2).half(), (2, 2), (3, 3)).dtype == torch.float16
