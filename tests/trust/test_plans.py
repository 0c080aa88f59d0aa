"""The schedule that is printed is what every layer really sees; no plan is silently nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from fambav import models  # noqa: F401  registers them
from fambav.reduction import plan
from fambav.timm_compat import timm

EXAMPLES = 500
CLASS_TOKENS = ("middle", "head", "double", "none")
STRATEGIES = ("all", "interleaved", "lower", "upper")


def built(depth, grid, class_token, strategy, layer, count, method):
    return timm.create_model(
        "vim_micro",
        depth=depth,
        img_size=4 * grid,
        patch_size=4,
        dim=8,
        num_classes=2,
        class_token=class_token,
        fusion_strategy=strategy,
        fusion_layer=layer,
        fusion_token=count,
        fusion_method=method,
    ).eval()


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    depth=some.integers(1, 6),
    grid=some.integers(1, 5),
    class_token=some.sampled_from(CLASS_TOKENS),
    strategy=some.sampled_from(STRATEGIES),
    layer=some.integers(-1, 8),
    count=some.integers(-1, 14),
    method=some.sampled_from(("famba-v", "ordered")),
)
def test_every_plan_is_refused_in_a_line_or_seen_by_every_layer(
    depth, grid, class_token, strategy, layer, count, method
):
    wanted = None if strategy in ("all", "interleaved") else layer
    try:
        net = built(depth, grid, class_token, strategy, wanted, count, method)
    except ValueError as error:
        assert str(error)
        assert "\n" not in str(error)
        return
    seen = []
    for block in net.layers:
        block.mixer.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    with torch.no_grad():
        net(torch.randn(1, 3, 4 * grid, 4 * grid))
    assert tuple(seen) == net.schedule.lengths
    assert list(net.schedule.counts) == list(
        plan(strategy, depth=depth, count=count, layer=wanted)
    ), "what was asked for is carried out in full"
    assert net.schedule.removed > 0, "a strategy that fuses nothing is refused"
    assert seen[-1] == net.length - net.schedule.removed


def test_the_examples_hold_plans_of_both_kinds():
    assert built(4, 4, "none", "upper", 2, 3, "ordered").schedule.removed == 9
    with pytest.raises(ValueError, match="fusion_token"):
        built(4, 2, "none", "all", None, 9, "ordered")
