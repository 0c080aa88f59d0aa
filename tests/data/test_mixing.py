"""Mixup and CutMix."""

import numpy as np
import pytest
import torch

from fambav.config import Augment
from fambav.data import mixup
from tests import golden

ARRAYS, TOLD = golden.load("recipe_data")
LABELS = torch.tensor([0, 3, 3, 9])
OPTIONS = dict(num_classes=10, batch_size=4, seed=0)


def images():
    return golden.hashed("mix:x", 4, 3, 8, 8)


def scripted(monkeypatch, *, lam, cutmix, centre=()):
    """Let numpy draw `lam`, mixup or cutmix, and the centre of the box."""
    places = list(centre)
    monkeypatch.setattr(np.random, "rand", lambda *_: 0.0 if cutmix else 0.5)
    monkeypatch.setattr(np.random, "beta", lambda *_: lam)
    monkeypatch.setattr(np.random, "randint", lambda *_, **__: places.pop(0))


@pytest.mark.parametrize(("lam", "smoothing"), [(0.3, 0.1), (0.0, 0.1), (0.75, 0.0)])
def test_targets_share_their_mass_with_the_partners(monkeypatch, lam, smoothing):
    scripted(monkeypatch, lam=lam, cutmix=False)
    _, targets = mixup(Augment(smoothing=smoothing), **OPTIONS)(images(), LABELS, update=0)
    torch.testing.assert_close(
        targets, ARRAYS[f"mix/target_lam{lam}_s{smoothing}"], rtol=0, atol=1e-6
    )
    torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_mixup_is_the_originals(monkeypatch):
    scripted(monkeypatch, lam=0.3, cutmix=False)
    mixed, targets = mixup(**OPTIONS)(images(), LABELS, update=0)
    torch.testing.assert_close(mixed, ARRAYS["mix/mixup_0.3/x"], rtol=0, atol=1e-6)
    torch.testing.assert_close(targets, ARRAYS["mix/mixup_0.3/target"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["cutmix_centre", "cutmix_clipped", "cutmix_whole"])
def test_cutmix_pastes_the_originals_box_with_its_last_odd_pixel(monkeypatch, name):
    """Boxes of an odd side end a pixel later than in timm 0.4, which made them one too small."""
    case = TOLD["mix"][name]
    top, bottom, left, right = case["box_yl_yh_xl_xh"]
    pasted = images()
    pasted[..., top:bottom, left:right] = images().flip(0)[..., top:bottom, left:right]
    assert torch.equal(pasted, ARRAYS[f"mix/{name}/x"])

    odd = int(8 * (1 - case["lam"]) ** 0.5) % 2
    bottom, right = min(bottom + odd, 8), min(right + odd, 8)
    pasted[..., top:bottom, left:right] = images().flip(0)[..., top:bottom, left:right]
    scripted(monkeypatch, lam=case["lam"], cutmix=True, centre=(case["cy"], case["cx"]))
    mixed, targets = mixup(Augment(smoothing=0.0), **OPTIONS)(images(), LABELS, update=0)
    assert torch.equal(mixed, pasted)
    assert targets[0, 0].item() == 1 - (bottom - top) * (right - left) / 64


def test_a_stream_of_draws_is_the_originals():
    mix = mixup(Augment(smoothing=0.0), **OPTIONS)
    labels, blank = torch.tensor([0, 1]), torch.zeros(2, 3, 224, 224)
    np.random.seed(0)
    for call in TOLD["mix"]["numpy_seed0_stream"]["calls"]:
        _, targets = mix.inner(blank, labels)
        share = call.get("corrected_lam", call["lam"])
        row_and_column = 2 / 224 if call["cutmix"] else 1e-6
        assert targets[0, 0].item() == pytest.approx(share, rel=0, abs=row_and_column)


def test_the_draws_of_an_update_depend_on_nothing_else():
    mix = mixup(**OPTIONS)
    runs = []
    for noise in (1, 99):
        np.random.seed(noise)
        runs.append([mix(images(), LABELS, update=update) for update in (5, 6, 7)])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert not torch.equal(runs[0][0][1], runs[0][1][1])
    elsewhere = mixup(**OPTIONS | dict(seed=1))(images(), LABELS, update=5)
    assert not torch.equal(elsewhere[1], runs[0][0][1])


@pytest.mark.parametrize(("mode", "shares"), [("batch", 1), ("pair", 2), ("elem", 4)])
def test_a_mode_says_what_draws_a_share_of_its_own(mode, shares):
    mix = mixup(Augment(cutmix=0.0, smoothing=0.0, mixup_mode=mode), **OPTIONS)
    mixed, targets = mix(images(), torch.arange(4), update=0)
    assert not torch.equal(mixed, images())
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert len({round(share, 5) for share in targets.diagonal().tolist()}) == shares


def test_probabilities_say_how_often_and_which():
    never = mixup(Augment(mixup_prob=0.0, smoothing=0.0), **OPTIONS)
    boxes, blends = (mixup(Augment(mixup_switch_prob=share), **OPTIONS) for share in (1.0, 0.0))
    for update in range(5):
        unmixed, targets = never(images(), LABELS, update=update)
        assert torch.equal(unmixed, images())
        assert torch.equal(targets, torch.nn.functional.one_hot(LABELS, 10).float())
        boxed, blended = (mix(images(), LABELS, update=update)[0] for mix in (boxes, blends))
        copied = (boxed == images()) | (boxed == images().flip(0))
        assert copied.all()
        assert not torch.isin(blended, images()).any()


def test_an_odd_batch_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="batch_size is 33, expected an even number"):
        mixup(num_classes=10, batch_size=33, seed=0)


@pytest.mark.parametrize("span", [(0.5,), (0.6, 0.4), (0.2, 1.5)])
def test_a_box_that_is_no_span_is_refused(span):
    with pytest.raises(ValueError, match="cutmix_minmax is"):
        mixup(Augment(cutmix_minmax=span), **OPTIONS)


def test_without_mixing_there_is_nothing_to_do():
    assert mixup(Augment(mixup=0.0, cutmix=0.0), num_classes=10, batch_size=33, seed=0) is None
    boxes = Augment(mixup=0.0, cutmix=0.0, cutmix_minmax=(0.2, 0.8), smoothing=0.0)
    only_boxes = mixup(boxes, **OPTIONS)
    mixed, targets = only_boxes(images(), LABELS, update=0)
    assert 0.2**2 <= targets[0, 9] <= 0.8**2
    assert (mixed != images()).any()
