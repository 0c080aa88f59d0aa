"""Models whose scans run across the gaps of pruned tokens, against ones that keep all tokens."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fambav.layers import Tokens
from fambav.layers.mamba import Mamba
from fambav.ops import selective_scan
from fambav.ops.bimamba import scan_inputs
from fambav.reduction import make_reducer, reduce
from fambav.reduction.pruning import importance
from fambav.registry import GAP_POLICIES
from tests.reduction import made
from tests.reduction.scanned import IMAGES, dropped, scanned, vim

SHARP = dict(atol=1e-10, rtol=0)
READ = frozenset({"gated"})


def pruned(schedule="r:3@1,3", **how):
    """A model in float64 that prunes, and the images for it."""
    return reduce(vim().double(), "prune-aligned", schedule, **how), IMAGES.double()


def cached(schedule="r:3@1,3"):
    return pruned(schedule, gap_policy="cached")


def through(net, images):
    """Run all blocks and keep what leaves each."""
    tokens, left = net.embed(images, trace=True), []
    for layer, block in enumerate(net.layers):
        tokens = block(tokens, net.reduction.hooks(layer))
        left.append(tokens)
    return left


def at(x, places):
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))


def into(whole, places, x):
    return whole.scatter(1, places[..., None].expand_as(x), x)


def unreduced(net, images, left):
    """Do what the model does, but scan all tokens of the start; those gone only age the state."""
    start = net.embed(images)
    x, residual, places = start.x, None, start.position
    steps = [torch.zeros(*places.shape, 2 * x.shape[2]).double() for _ in "fb"]
    for block, after in zip(net.layers, left, strict=True):
        mixer = block.mixer
        x, residual = block.norm(x, residual)
        x, z = mixer.in_proj(x).chunk(2, dim=-1)
        total = torch.zeros_like(x)
        for end, direction in enumerate(mixer._directions()):
            u, delta, *weights = scan_inputs(x, direction, reverse=bool(end))
            steps[end] = into(steps[end], places, F.softplus(delta + direction.dt_bias))
            empty = torch.zeros_like(steps[end])
            u, B, C = (into(empty[..., : t.shape[2]], places, t) for t in (u, *weights))
            inputs = (t.mT for t in (u, steps[end]))
            y = selective_scan(*inputs, direction.A, B.mT, C.mT, direction.D, reverse=bool(end))
            total = total + at(y.mT, places)
        x = mixer.out_proj(total * 0.5 * F.silu(z))
        stays = (places[:, :, None] == after.position[:, None]).any(dim=2)
        rank = stays.nonzero()[:, 1].view(len(x), -1)
        x, residual, places = at(x, rank), at(residual, rank), places.gather(1, rank)
    return x, residual


@pytest.mark.parametrize("schedule", ["r:5@1", "r:3@1,3", "r:2@1-4"])
def test_pruned_models_equal_ones_that_scan_all_tokens(schedule):
    net, images = cached(schedule)
    left = through(net, images)
    assert left[-1].x.shape[1] == net.schedule.final
    x, residual = unreduced(net, images, left)
    torch.testing.assert_close(left[-1].x, x, **SHARP)
    torch.testing.assert_close(left[-1].residual, residual, **SHARP)


def test_without_alignment_they_do_not():
    net, images = pruned(scan="compact")
    left = through(net, images)
    assert (left[-1].x - unreduced(net, images, left)[0]).abs().max() > 1e-6


def test_tokens_that_go_behind_the_last_mixer_change_nothing():
    net, images = pruned("r:7@4")
    torch.testing.assert_close(net(images), vim().double()(images), **SHARP)


@pytest.mark.parametrize("gap", GAP_POLICIES)
def test_a_scan_across_no_gaps_is_the_plain_one(gap):
    torch.manual_seed(0)
    mixer, x = Mamba(8).double(), torch.randn(2, 9, 8).double()
    tokens = Tokens.start(x, cls_index=(4,))._replace(skipped_dt=torch.zeros(2, 2, 9, 16).double())
    out, _ = mixer(x, tokens, gap_policy=gap)
    torch.testing.assert_close(out, mixer(x), **SHARP)


def identity_convolution(net):
    with torch.no_grad():
        for block in net.layers:
            for conv in (block.mixer.conv1d, block.mixer.conv1d_b):
                conv.weight.zero_()[..., -1] = 1
                conv.bias.zero_()
    return net


def test_masked_scans_are_aligned_ones_where_convolutions_do_not_leak():
    masked, images = pruned(scan="masked")
    aligned, _ = pruned(gap_policy="bias")
    leaking = masked(images) - aligned(images)
    assert leaking.abs().max() > 1e-6
    got, want = (identity_convolution(net)(images) for net in (masked, aligned))
    torch.testing.assert_close(got, want, **SHARP)
    positions = [through(net, images)[-1].position for net in (masked, aligned)]
    assert positions[0].equal(positions[1])


def test_pruning_in_steps_leaves_the_gaps_of_pruning_at_once():
    tokens = scanned(17, cls_index=(8,))
    once = made.reduce(tokens, "prune-aligned", 9, gap_policy="cached")
    some = made.reduce(tokens, "prune-aligned", 4, gap_policy="cached")
    order = torch.arange(13)
    intermediates = tokens.intermediates.at(some.position)
    intermediates = intermediates._replace(order=torch.stack((order, order.flip(0)))[None])
    some = some._replace(intermediates=intermediates)
    rest = made.reduce(some, "prune-aligned", 5, gap_policy="cached")
    assert rest.position.equal(once.position)
    assert rest.source.equal(once.source)
    torch.testing.assert_close(rest.skipped_dt, once.skipped_dt)
    assert once.skipped_dt.count_nonzero() > 0


def test_the_gap_is_the_sum_of_the_steps_between():
    y = torch.ones(2, 2, 9, 6)
    y[:, :, [0, 1, 5, 6]] = -1  # these go
    tokens = scanned(9, y=y, z=torch.ones(2, 9, 6))
    fewer = made.reduce(tokens, "prune-aligned", 4, gap_policy="cached")
    delta = tokens.intermediates.delta
    assert dropped(tokens, fewer) == [[0, 1, 5, 6]] * 2
    want = torch.zeros(2, 2, 5, 6)  # of 2, 3, 4, 7, 8
    want[:, 0, 3] = delta[:, 0, [5, 6]].sum(1)
    want[:, 1, 2] = delta[:, 1, [5, 6]].sum(1)
    torch.testing.assert_close(fewer.skipped_dt, want)


def mirrored(mixer):
    """A mixer whose directions have changed places."""
    twin = copy.deepcopy(mixer)
    for mine, theirs in (
        ("A_log", "A_b_log"),
        ("D", "D_b"),
        ("conv1d", "conv1d_b"),
        ("x_proj", "x_proj_b"),
        ("dt_proj", "dt_proj_b"),
    ):
        one, other = getattr(twin, mine), getattr(twin, theirs)
        setattr(twin, mine, other)
        setattr(twin, theirs, one)
    return twin


def heard(mixer, x):
    tokens = Tokens.start(x, cls_index=(x.shape[1] // 2,))
    return tokens._replace(intermediates=mixer(x, tokens, want=READ)[1])


@pytest.mark.parametrize(
    ("directions", "mirror"),
    [("both", "both"), ("forward", "backward"), ("backward", "forward")],
)
def test_scores_of_reversed_tokens_are_reversed_where_directions_change_places(directions, mirror):
    torch.manual_seed(0)
    mixer, x = Mamba(8).double(), torch.randn(3, 17, 8).double()
    tokens, reverse = heard(mixer, x), heard(mirrored(mixer), x.flip(1))
    score, flipped = (
        importance(t, directions=d) for t, d in ((tokens, directions), (reverse, mirror))
    )
    torch.testing.assert_close(score, flipped.flip(1), **SHARP)
    assert (score - flipped).abs().max() > 1e-3
    kept, left = (
        make_reducer("prune-aligned", directions=d).select(t, 6).keep
        for t, d in ((tokens, directions), (reverse, mirror))
    )
    assert kept.equal(16 - left.flip(1))
    assert (kept.diff(dim=1) > 0).all()


def test_gradients_reach_the_steps_of_tokens_that_are_gone_between_others():
    delta = scanned(17, cls_index=(8,)).intermediates.delta.double().requires_grad_()
    tokens = scanned(17, cls_index=(8,), delta=delta)
    fewer = made.reduce(tokens, "prune-aligned", 9, gap_policy="cached")
    torch.manual_seed(0)
    mixer = Mamba(3, expand=2).double()
    out, _ = mixer(torch.randn(2, 8, 3).double(), fewer, gap_policy="cached")
    out.square().sum().backward()
    reached = delta.grad.abs().sum(3) > 0
    for sample, gone in enumerate(dropped(tokens, fewer)):
        first, *_, last = fewer.position[sample].tolist()
        between = [place for place in gone if first < place < last]
        assert between
        for end in range(2):
            assert reached[sample, end].nonzero().flatten().tolist() == between


@pytest.mark.parametrize("hook", ["before", "between", "after"])
@pytest.mark.parametrize("method", ["prune-aligned", "evit", "utrc", "mtr"])
def test_checkpointing_changes_no_gradient(method, hook):
    gradients = []
    for enabled in (False, True):
        net = reduce(vim().double().train(), method, "r:3@2,4", hook=hook)
        net.set_grad_checkpointing(enabled)
        net(IMAGES.double()).square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    for mine, want in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, want, **SHARP)


@pytest.mark.parametrize("hook", ["before", "after"])
def test_checkpointing_draws_once(hook):
    losses = []
    for enabled in (False, True):
        net = reduce(vim().double().train(), "random", "r:3@2,4", hook=hook)
        net.set_grad_checkpointing(enabled)
        torch.manual_seed(5)
        loss = net(IMAGES.double()).square().sum()
        losses.append((loss, *torch.autograd.grad(loss, list(net.parameters()))))
    for mine, want in zip(*losses, strict=True):
        torch.testing.assert_close(mine, want, **SHARP)


@pytest.mark.parametrize("method", ["prune-aligned", "evit", "random", "utrc", "mtr"])
@pytest.mark.parametrize("gap", GAP_POLICIES)
def test_every_method_runs_with_every_gap_policy(method, gap):
    net = reduce(vim(), method, "r:3@1,3", scan="aligned", gap_policy=gap, hook="after")
    assert net.schedule.lengths == (17, 14, 14, 11)
    left = through(net, IMAGES)
    assert net(IMAGES).isfinite().all()
    assert (left[-1].skipped_dt is not None) == (gap == "cached")
    assert (left[-1].position.diff(dim=1) > 0).all()


def test_class_tokens_stay_in_every_sample_of_a_model():
    net = reduce(vim(), "prune-aligned", "r:5@1,2,3")
    left = through(net, torch.randn(7, 3, 32, 32))
    for tokens in left:
        assert tokens.position.gather(1, tokens.cls_index).tolist() == [[8]] * 7
