"""An image on its way through a model."""

import numpy as np
import pytest
import timm
import torch

import fambav
import fambav.models
from fambav.viz import TokenTrace, trace_tokens
from fambav.viz.measures import cosines, mean_cosines, scan_path
from fambav.viz.trace import Step

IMAGE = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))


def small(name="vim_micro", **arguments):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, img_size=16, depth=3, **arguments)


@pytest.mark.parametrize(
    ("name", "method", "how"),
    [
        ("vim_micro", "none", {}),
        ("vim_micro", "famba-v", {}),
        ("vim_micro", "ordered", {"scan": "masked"}),
        ("vim_micro", "prune-aligned", {}),
        ("plainmamba_micro", "ordered", {}),
        ("plainmamba_micro", "stm", {}),
    ],
)
def test_a_trace_is_the_forward_pass_itself(name, method, how):
    model = small(name)
    fambav.reduce(model, method, "r:3", **how)
    model.train()
    before = torch.get_rng_state()
    trace = trace_tokens(model, IMAGE)
    assert model.training
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)
    model.eval()
    with torch.no_grad():
        _, whole = model.forward_features(IMAGE[None], trace=True)
        logits = model(IMAGE[None])[0]
    np.testing.assert_array_equal(trace.logits, logits.numpy())
    for step, source in zip(trace.steps, whole.sources, strict=True):
        np.testing.assert_array_equal(step.source, source[0].numpy())
    assert tuple(len(step.features) for step in trace.steps) == model.schedule.lengths
    assert trace.kept[-1] == model.schedule.final


def test_features_are_what_the_mixer_reads():
    model, read = small().eval(), []
    handle = model.layers[1].mixer.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    trace = trace_tokens(model, IMAGE)
    handle.remove()
    np.testing.assert_array_equal(trace.steps[1].features, read[0][0].numpy())


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="model is a Linear, expected one whose tokens can be"):
        trace_tokens(torch.nn.Linear(3, 3), IMAGE)


def made(features, position=None, rank=(0, 1, 2)):
    length = len(features)
    place = np.arange(length) if position is None else np.array(position)
    step = Step(np.array(features, dtype=np.float32), place, np.arange(length), np.arange(3))
    nothing = dict(image=None, pixels=None, logits=None)
    return TokenTrace(grid=(1, 3), cls_index=(), rank=np.array(rank), steps=(step,), **nothing)


def test_neighbours_and_pairs_are_compared_by_their_cosines():
    neighbours, pairs = mean_cosines(made([[1, 0], [2, 0], [0, 3]]))
    assert neighbours.tolist() == [0.5]
    assert pairs[0] == pytest.approx(1 / 3)
    assert np.isnan(mean_cosines(made([[1, 0]]))).all()


def test_the_cosine_of_nothing_is_nothing():
    assert cosines(np.array([[0, 0], [1, 0]], dtype=np.float32)).tolist() == [[0, 0], [0, 1]]


def test_a_step_back_in_the_scan_is_told():
    path = scan_path(made(np.eye(3), position=[1, 0, 2]), 1)
    assert path.patches.tolist() == [1, 0, 2]
    assert path.forward.tolist() == [False, True]
    assert path.share == 0.5


def test_a_whole_image_is_scanned_row_by_row_or_along_a_snake():
    trace = trace_tokens(small(), IMAGE)
    assert scan_path(trace, 0).patches.tolist() == list(range(16))
    assert scan_path(trace, 1).patches.tolist() == list(range(16))
    snake = scan_path(trace_tokens(small("plainmamba_micro"), IMAGE), 1)
    assert snake.patches.tolist() == [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11, 15, 14, 13, 12]
    assert snake.share == 1.0


@pytest.mark.parametrize(("method", "kept"), [("ordered", True), ("famba-v", False)])
def test_order_is_kept_or_lost_as_the_method_says(method, kept):
    model = small()
    fambav.reduce(model, method, "r:3")
    trace = trace_tokens(model, IMAGE)
    shares = [scan_path(trace, layer).share for layer in (1, 2, 3)]
    assert (min(shares) == 1.0) == kept
    assert scan_path(trace, 0).share == 1.0
