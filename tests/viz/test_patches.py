"""Patches and the tokens they are part of, as labels and pixels."""

import numpy as np
import pytest
import timm
import torch

import fambav
import fambav.models
from fambav.viz import style, trace_tokens
from fambav.viz.patches import (
    COLOURS,
    borders,
    colours,
    depths,
    fitted,
    labels,
    links,
    painted,
    tile,
)

SMALL = {"num_classes": 3, "img_size": 16, "depth": 3}
IMAGE = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(3))
METHODS = {
    "famba-v": "r:4",
    "ordered": "r:4",
    "tome": "r:4",
    "r-meeto": "r:4@2-3",
    "stm": "r:3",
    "mtr": "r:4",
    "prune-aligned": "r:4",
    "evit": "r:4",
    "random": "r:4",
    "utrc": "r:4",
}


def test_a_known_source_map_gives_the_right_labels():
    # a 2 x 3 grid with a class token at place 3: patches 0, 1, 2, 4, 5, 6
    source = np.array([4, 0, 4, 1, -1, 0, 2])
    assert labels(source, (2, 3), (3,)).tolist() == [[0, 1, 0], [-1, 1, 2]]


def test_a_source_map_of_another_grid_is_refused():
    with pytest.raises(ValueError, match=r"source has 6 patches, expected the 2 x 2 of the grid"):
        labels(np.arange(6), (2, 2), ())


@pytest.mark.parametrize("place", ["middle", "head", "double", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_every_patch_is_in_one_token_or_dropped(method, place):
    model = timm.create_model("vim_micro", class_token=place, **SMALL)
    fambav.reduce(model, method, METHODS[method])
    trace = trace_tokens(model, IMAGE)
    over = depths(trace)
    assert over.shape == (4, 4, 4)
    assert over[0].ravel().tolist() == list(range(16))
    for at, left in zip(over, trace.kept, strict=True):
        alive = at[at >= 0]
        assert sorted(set(alive.tolist())) == list(range(left - len(trace.cls_index)))
        assert (at >= -1).all()
    assert trace.kept[-1] == model.schedule.final
    dropping = method in ("prune-aligned", "evit", "random")  # utrc folds what it silences
    assert (over[-1] == -1).any() == dropping


def test_patches_that_end_in_one_token_keep_one_colour_and_lone_ones_have_none():
    over = np.array([[[0, 1, 2, 3]], [[0, 0, 1, 2]], [[0, 0, 0, 1]]])
    colour = colours(over)
    assert len({*colour[0, :3]}) == 1
    assert colour[0, 0] >= 0
    assert colour[0, 3] == -1


def test_tokens_that_touch_have_different_colours_though_there_are_fewer_colours_than_tokens():
    # below each token stands the one that is next in turn for the same colour
    at = np.repeat(np.arange(4 * len(COLOURS)), 2).reshape(4, 2 * len(COLOURS))
    colour = colours(at[None])
    assert (colour >= 0).all()
    for down, right in ((0, 1), (1, 0), (1, 1)):
        far = np.s_[down:, right:], np.s_[: 4 - down, : at.shape[1] - right]
        other = at[far[0]] != at[far[1]]
        assert (colour[far[0]] != colour[far[1]])[other].all()


def test_a_token_that_is_dropped_later_has_a_colour_until_then():
    over = np.array([[[0, 1, 2]], [[0, 0, 1]], [[-1, -1, 0]]])
    assert colours(over)[0].tolist() == [0, 0, -1]


def test_groups_are_coloured_lone_patches_untouched_and_dropped_ones_dark():
    image = np.full((4, 8, 3), 0.5)
    at = np.array([[0, 0, 1, -1]])
    out = painted(image, at, colours(at[None]))
    assert (out[:, 4:6] == 0.5).all()
    assert (out[:, 6:] < 0.3).all()
    first = COLOURS[0] - COLOURS[0].mean()
    tint = out[0, 0] - out[0, 0].mean()
    assert tint @ first / np.linalg.norm(tint) / np.linalg.norm(first) > 0.999
    assert (out[:, :4] == out[0, 0]).all()


# Machado et al., "A physiologically-based model for simulation of color vision deficiency", 2009:
# what linear RGB looks like without red, and without green receptors.
SEEN = {
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
}


@pytest.mark.parametrize("eye", SEEN)
def test_colours_stay_apart_for_the_colour_blind(eye):
    lines = np.array([[int(c[n : n + 2], 16) / 255 for n in (1, 3, 5)] for c in style.LINES])
    for palette in (COLOURS[:7], lines):
        seen = (palette**2.2 @ np.array(SEEN[eye]).T).clip(0, 1) ** (1 / 2.2)
        apart = np.linalg.norm(seen[:, None] - seen[None], axis=2)
        assert apart[np.triu_indices(len(seen), 1)].min() > 0.12


def test_borders_run_between_tokens_and_around_the_image():
    lines = borders(np.array([[0, 0, 1]]))
    found = {tuple(map(tuple, line)) for line in lines.astype(int).tolist()}
    assert ((2, 0), (2, 1)) in found
    assert ((1, 0), (1, 1)) not in found
    assert len(found) == 1 + 2 + 6


def test_parts_of_a_token_are_joined_by_the_shortest_lines():
    at = np.array([[0, 1, 0, 0], [2, 3, 4, 0], [0, 5, 6, 7]])
    assert links(at).tolist() == [[[0.5, 0.5], [2.5, 0.5]], [[0.5, 0.5], [0.5, 2.5]]]
    assert links(np.array([[0, 0], [1, 2]])).shape == (0, 2, 2)


def test_patches_end_between_pixels_whatever_the_sizes():
    image = np.arange(7 * 5 * 3.0).reshape(7, 5, 3)
    out = fitted(image, (4, 5))
    assert out.shape[0] % 28 == 0
    assert out.shape[1] % 5 == 0
    assert min(out.shape[0] / 4, out.shape[1] / 5) >= 8
    assert (np.unique(out[:, 0, 0]) == image[:, 0, 0]).all()  # repeated, not blended


def test_a_tile_shows_borders_and_grows_by_whole_pixels():
    at = np.array([[0, 0], [1, 2]])
    out = tile(np.zeros((8, 8, 3)), at, colours(at[None]), side=20)
    assert out.shape == (3, 24, 24)
    assert out.dtype == np.uint8
    assert (out[:, 11:13] == 255).all()
    assert (out[:, 14:, 11:13] == 255).all()
    assert (out[:, :10, 11:13] < 255).any()
    assert (out[:, 14:, :10] == 0).all()
