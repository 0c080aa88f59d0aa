"""Who is dropped: by importance, by likeness to the class token, by lot."""

import pytest
import timm
import torch
import torch.nn.functional as F

import fambav
from fambav.layers import Tokens, mamba
from fambav.layers.drop import shard
from fambav.ops.match import others
from fambav.reduction import make_reducer, make_reduction, reduce
from fambav.reduction.pruning import importance, ranked
from fambav.registry import GAP_POLICIES
from tests.reduction import made
from tests.reduction.scanned import IMAGES, dropped, scanned, vim

PRUNERS = ("prune-aligned", "evit", "random")
PLACES = {"head": (0,), "middle": (8,), "double": (0, 16), "none": ()}


def after(tokens, method, *counts, **how):
    """Remove tokens behind the mixer, in evaluation."""
    reduction = made.reducing(method, counts, tokens, hook="after", scan="compact", **how).eval()
    for layer in range(len(counts)):
        tokens = reduction(tokens, layer)
    return tokens


def test_importance_sums_what_is_positive_over_channels_and_directions():
    y = torch.tensor([[[[1.0, -5], [2, 3]], [[4, -6], [-7, 0.5]]]])
    tokens = scanned(2, cls_index=(), batch=1, inner=2, y=y, mixed=y[:, 0])
    assert importance(tokens, signal="ungated").tolist() == [[5, 5.5]]
    assert importance(tokens, signal="ungated", directions="forward").tolist() == [[1, 5]]
    assert importance(tokens, signal="ungated", directions="backward").tolist() == [[4, 0.5]]
    assert importance(tokens, signal="ungated", clip=False).tolist() == [[-6, -1.5]]
    assert importance(tokens, signal="mixed").tolist() == [[1, 5]]


def test_the_gate_belongs_to_each_direction_before_negatives_are_left_out():
    tokens = scanned()
    y, z = tokens.intermediates.y, tokens.intermediates.z
    want = sum((y[:, end] * F.silu(z)).clamp(min=0).sum(2) for end in (0, 1))
    torch.testing.assert_close(importance(tokens), want)


def test_two_directions_of_four_run_forward():
    tokens = scanned(directions=4, order=torch.arange(9).expand(1, 4, 9))
    want = tokens.intermediates.y[:, [0, 2]].clamp(min=0).sum((1, 3))
    got = importance(tokens, signal="ungated", directions="forward")
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_importance_is_added_up_in_float32_at_least_and_has_no_gradient(dtype):
    y = scanned().intermediates.y.to(dtype).requires_grad_()
    score = importance(scanned(y=y), signal="ungated")
    assert score.dtype == torch.promote_types(dtype, torch.float32)
    assert not score.requires_grad


def test_of_equal_scores_the_lower_place_is_kept_and_class_tokens_are_in_no_rank():
    score = torch.tensor([[1.0, 3, 1, 3, 9, 1]])
    assert ranked(score, torch.tensor([[4]])).tolist() == [[1, 3, 0, 2, 5]]
    tokens = scanned(y=torch.zeros(2, 2, 9, 6))
    for method in ("prune-aligned", "evit"):
        assert dropped(tokens, after(tokens, method, 3)) == [[6, 7, 8]] * 2


@pytest.mark.parametrize("method", ["prune-aligned", "evit"])
def test_the_patches_of_least_importance_go_and_the_others_stay_as_they_are(method):
    tokens = scanned(17, cls_index=(8,))
    fewer = after(tokens, method, 6)
    score = importance(tokens)
    for sample, gone in enumerate(dropped(tokens, fewer)):
        patches = [p for p in range(17) if p != 8]
        assert gone == sorted(sorted(patches, key=score[sample].tolist().__getitem__)[:6])
        assert fewer.x[sample].equal(tokens.x[sample, fewer.position[sample]])
        assert fewer.residual[sample].equal(tokens.residual[sample, fewer.position[sample]])


@pytest.mark.parametrize(
    ("signal", "clip", "needs"),
    [
        ("gated", True, "gated"),
        ("ungated", True, "ungated"),
        ("ungated", False, "ungated_unclipped"),
        ("mixed", True, "mixed"),
        ("mixed", False, "mixed"),
    ],
)
def test_the_mixer_is_asked_for_nothing_that_a_signal_does_not_need(signal, clip, needs):
    options = dict(signal=signal, clip=clip)
    assert make_reducer("prune-aligned", **options).needs == {needs}
    for gap, more in (("bias", set()), ("cached", {"delta"})):
        net = reduce(vim(), "prune-aligned", "r:3@2,3", gap_policy=gap, **options)
        assert net(IMAGES).isfinite().all()
        assert net.reduction.hooks(1).want == {needs} | more


@pytest.mark.parametrize("gap", [*GAP_POLICIES, None])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prune-aligned", {}),
        ("prune-aligned", dict(signal="ungated", clip=False)),
        ("evit", {}),
        ("mtr", {}),
        ("utrc", {}),
        ("stm", {}),
        *(
            ("r-meeto", dict(metric=metric, class_policy="exact"))
            for metric in ("hidden", "B", "C", "delta")
        ),
    ],
    ids=str,
)
def test_no_published_method_leaves_the_fused_path(method, options, gap, monkeypatch):
    scan = None if gap is None else "aligned"
    net = reduce(vim(), method, "r:2@2-4", scan=scan, gap_policy=gap, hook="after", **options)
    calls, fused = [], mamba.bimamba_scan

    def count(*given, **how):
        calls.append(how)
        return fused(*given, **how)

    monkeypatch.setattr(mamba, "bimamba_scan", count)
    net(IMAGES)
    assert len(calls) == 4


@pytest.mark.parametrize("method", PRUNERS)
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_class_tokens_stay_in_every_sample_even_if_they_score_least(method, places):
    y, mixed = torch.rand(5, 2, 17, 6) + 1, torch.rand(5, 17, 8) + 1
    for place in places:
        y[:, :, place] = mixed[:, place] = -1
    z = torch.ones(5, 17, 6)
    tokens = scanned(17, cls_index=places, batch=5, y=y, z=z, mixed=mixed)
    most = make_reducer(method).limit(17, places)
    assert most == 16 - len(places)
    for count in (1, 9, most):
        fewer = after(tokens, method, count)
        assert fewer.position.gather(1, fewer.cls_index).tolist() == [list(places)] * 5
        assert (fewer.position.diff(dim=1) > 0).all()


@pytest.mark.parametrize("method", PRUNERS)
def test_dropped_tokens_take_their_size_with_them_and_have_no_place(method):
    tokens = scanned(17, cls_index=(8,))
    fewer = after(tokens, method, 6)
    assert fewer.size.tolist() == [[1] * 11] * 2
    for sample, gone in enumerate(dropped(tokens, fewer)):
        assert fewer.source[sample].eq(-1).nonzero().flatten().tolist() == gone
        kept = fewer.position[sample]
        assert fewer.source[sample, kept].tolist() == list(range(11))


def test_the_fused_token_is_the_best_of_those_that_go_and_their_mean_over_patches():
    tokens = scanned(9)
    tokens = tokens._replace(size=torch.tensor([[1.0, 2, 3, 4, 1, 5, 6, 7, 8]] * 2))
    fewer = after(tokens, "evit", 3, fuse=True)
    order = ranked(importance(tokens), tokens.cls_index)
    for sample in range(2):
        target, *gone = order[sample, -4:].tolist()
        assert dropped(tokens, fewer)[sample] == sorted(gone)
        group = [target, *gone]
        place = fewer.position[sample].tolist().index(target)
        weight = tokens.size[sample, group]
        for got, x in ((fewer.x, tokens.x), (fewer.residual, tokens.residual)):
            want = (weight[:, None] * x[sample, group]).sum(0) / weight.sum()
            torch.testing.assert_close(got[sample, place], want)
        assert fewer.source[sample, group].tolist() == [place] * 4
    assert fewer.size.sum(1).tolist() == tokens.size.sum(1).tolist()


def test_likeness_to_the_class_token_is_a_cosine():
    mixed = torch.randn(2, 9, 8)
    mixed[:, 2] = 100 * mixed[:, 4]
    mixed[:, 6] = -0.01 * mixed[:, 4]
    tokens = scanned(mixed=mixed)
    assert dropped(tokens, after(tokens, "evit", 1, score="class")) == [[6]] * 2
    fewer = after(tokens, "evit", 7, score="class")
    assert fewer.position.tolist() == [[2, 4]] * 2


def test_likeness_needs_a_class_token():
    with pytest.raises(ValueError, match=r"score is 'class', expected 'y' for a model without"):
        reduce(vim(class_token="none"), "evit", "r:3", score="class")


def test_a_scan_of_one_direction_has_no_backward_scores():
    net = vim(bimamba_type="none")
    with pytest.raises(ValueError, match=r"directions is 'backward', expected 'both' or 'forward'"):
        reduce(net, "prune-aligned", "r:3", directions="backward")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("prune-aligned", dict(signal="gatd"), "option signal is 'gatd', expected a known name"),
        ("prune-aligned", dict(directions="up"), "option directions is 'up', expected a known"),
        (
            "prune-aligned",
            dict(signal="mixed", directions="forward"),
            "option directions is 'forward', expected 'both' with signal=mixed",
        ),
        ("evit", dict(score="x"), "option score is 'x', expected a known name"),
        (
            "evit",
            dict(score="class", signal="mixed"),
            "signal is 'mixed', expected none with score",
        ),
        ("random", dict(mode="fold"), "option mode is 'fold', expected a known name"),
        ("random", dict(seed=-1), "option seed is -1, expected at least 0"),
        ("random", dict(sed=1), "reduction option is 'sed', expected one of random"),
    ],
)
def test_options_without_a_meaning_are_refused_in_one_line(method, options, message):
    with pytest.raises(ValueError, match=message) as refusal:
        make_reducer(method, **options)
    assert "\n" not in str(refusal.value)


def test_random_draws_are_not_made_where_a_checkpoint_would_repeat_them():
    body = made.body(17, cls_index=(8,))
    with pytest.raises(ValueError, match="reduction_hook is 'between', expected a known name"):
        make_reduction(body, "random", "r:3", hook="between")


def test_in_training_every_sample_has_a_draw_of_its_own_from_the_seed():
    draws = []
    for _ in range(2):
        torch.manual_seed(1)
        tokens = Tokens.start(torch.zeros(4, 17, 8), cls_index=(8,))
        reduction = made.reducing("random", (5,), tokens)
        draws.append(dropped(tokens, reduction(tokens, 0)))
    assert draws[0] == draws[1]
    assert len({tuple(gone) for gone in draws[0]}) == 4


def test_two_shards_draw_what_one_process_would():
    def gone(samples):
        tokens = Tokens.start(torch.zeros(samples, 17, 8), cls_index=(8,))
        torch.manual_seed(3)
        return dropped(tokens, made.reducing("random", (5,), tokens)(tokens, 0))

    whole, parts = gone(6), []
    for index in range(2):
        with shard(index, 2):
            parts.append(gone(3))
    assert [parts[sample % 2][sample // 2] for sample in range(6)] == whole


def test_in_evaluation_there_is_one_draw_for_each_length_and_no_generator_moves():
    before = torch.get_rng_state()
    tokens = [Tokens.start(torch.zeros(3, n, 8), cls_index=(8,)) for n in (17, 18)]
    gone = [dropped(t, after(t, "random", 6)) for t in tokens]
    assert torch.get_rng_state().equal(before)
    assert gone[0] == [gone[0][0]] * 3
    assert gone[0] != gone[1]
    with shard(1, 2):
        assert dropped(tokens[0], after(tokens[0], "random", 6)) == gone[0]
    assert dropped(tokens[0], after(tokens[0], "random", 6, seed=1)) != gone[0]


def test_fixed_draws_take_any_patch_as_often_as_another():
    tokens = Tokens.start(torch.zeros(1, 17, 8), cls_index=(8,))
    times = torch.zeros(17)
    for seed in range(400):
        times[dropped(tokens, after(tokens, "random", 4, seed=seed))[0]] += 1
    assert times[8] == 0
    assert (others(torch.tensor([[8]]), 17)[0] == times.nonzero().flatten()).all()
    assert (times[times > 0] - 100).abs().max() < 40  # more than 4 standard deviations


def test_tokens_merged_at_random_join_the_nearest_that_stays():
    tokens = scanned(17, cls_index=(8,))
    fewer = after(tokens, "random", 9, mode="merge")
    assert fewer.size.sum(1).tolist() == [17, 17]
    patches = [p for p in range(17) if p != 8]
    for sample in range(2):
        kept = [p for p in fewer.position[sample].tolist() if p != 8]
        for place, patch in enumerate(patches):
            left = min(kept, key=lambda p, at=place: abs(patches.index(p) - at))
            now = fewer.source[sample, patch]
            assert fewer.position[sample, now] == left
    assert fewer.position.gather(1, fewer.cls_index).tolist() == [[8], [8]]


def test_a_model_in_evaluation_stays_so_when_it_is_reduced():
    for training in (False, True):
        net = fambav.reduce(vim().train(training), "random", "r:3")
        assert net.reduction.method.training is training
    net = fambav.reduce(vim(), "random", "r:3")
    assert net(IMAGES).equal(net(IMAGES))


@pytest.mark.parametrize("method", ["prune-aligned", "evit"])
def test_published_lengths_are_those_of_the_paper(method):
    def lengths(name, **sizes):
        body = made.body(197, cls_index=(98,), depth=24, grid=(14, 14), **sizes)
        schedule = make_reduction(body, method).schedule
        return schedule.lengths[4:21:5], schedule.final

    assert lengths("tiny", dim=192) == ((197, 197, 157, 157), 125)
    assert lengths("small", dim=384) == ((197, 157, 125, 101), 101)
    for depth in (24, 36):
        body = made.body(196, depth=depth, grid=(14, 14), family="plainmamba")
        assert make_reduction(body, method).schedule.lengths[5:18:6] == (138, 97, 68)
    for sizes in (dict(dim=768), dict(dim=192, depth=12), dict(dim=192, length=65)):
        given = dict(length=197, depth=24, cls_index=(32,)) | sizes
        with pytest.raises(ValueError, match=f"{method} has none for vim"):
            make_reduction(made.body(given.pop("length"), **given), method)


def test_a_published_schedule_that_is_ours_says_so():
    plain = made.body(196, depth=24, grid=(14, 14), family="plainmamba")
    line = make_reduction(plain, "prune-aligned").summary().splitlines()[-1]
    assert (
        line
        == "schedule keep:0.7@5,11,17 is ours: the paper of prune-aligned does not give its own"
    )
    assert "ours" not in make_reduction(plain, "prune-aligned", "keep:0.7@5").summary()
    vim = made.body(197, cls_index=(98,), depth=24, grid=(14, 14), dim=192)
    assert "ours" not in make_reduction(vim, "prune-aligned").summary()


def test_parameters_that_belong_to_another_order_cannot_be_aligned():
    body = made.body(196, depth=24, family="plainmamba", unaligned="they are elsewhere")
    with pytest.raises(ValueError, match="scan_policy is 'aligned', expected another; they are"):
        make_reduction(body, "prune-aligned")
    assert make_reduction(body, "prune-aligned", scan="compact").scan == "compact"


@pytest.mark.parametrize("method", [*PRUNERS, "utrc", "mtr"])
@pytest.mark.parametrize("param_order", ["raster", "permuted"])
def test_methods_run_in_a_model_that_scans_a_grid_four_ways(method, param_order):
    torch.manual_seed(0)
    sizes = dict(num_classes=5, depth=3, param_order=param_order)
    net = timm.create_model("plainmamba_micro", **sizes).eval()
    scan = "aligned" if param_order == "permuted" else "compact"
    reduce(net, method, "r:5@1,2", scan=scan, hook="after")
    images = torch.randn(2, 3, *net.img_size)
    first = net.schedule.start
    assert net.schedule.lengths == (first, first - 5, first - 10)
    assert net(images).isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own
@pytest.mark.parametrize("method", [*PRUNERS, "utrc", "mtr"])
def test_a_reduced_model_is_one_graph(method):
    torch._dynamo.reset()
    net = reduce(vim(depth=2), method, "r:4@1")
    with torch.no_grad():
        got = torch.compile(net, backend="aot_eager", fullgraph=True)(IMAGES)
        torch.testing.assert_close(got, net(IMAGES), atol=1e-5, rtol=1e-4)
