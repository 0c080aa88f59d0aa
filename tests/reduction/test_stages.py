"""Reduction within the stages of hierarchical models: exactness, the grammar, counts, refusals."""

import pytest
import torch

import fambav
from fambav import flops
from fambav.heads import SegmentationModel
from fambav.layers import Tokens
from fambav.layers.cells import Cells
from fambav.layers.nc_ssd import NonCausalSSD
from fambav.layers.ss2d import SS2D
from fambav.models import VSSD, VMamba
from fambav.models.vssd import Attention
from fambav.ops import nc_ssd
from fambav.ops.match import Selection, others
from fambav.ops.scan_paths import kept_paths, scan_paths
from fambav.reduction import make_staged_reduction, merge, read_options

NETS = {
    "vssd": lambda **how: VSSD(heads=(2, 2), state=4, **SIZES, **how),
    "vmamba": lambda **how: VMamba(**SIZES, **how),
}
SIZES = dict(dims=(8, 12), depths=(3, 2), img_size=(24, 40), num_classes=4)


def built(name, **how):
    torch.manual_seed(0)
    return NETS[name](**how).double().eval()


def images(size=(24, 40)):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).double()


def kept_cells(dropped, grid=(4, 5), dim=8):
    """A map without some cells, the rows of the others, and where those are."""
    torch.manual_seed(0)
    x = torch.randn(2, *grid, dim).double()
    tokens = Tokens.start(x.flatten(1, 2), cls_index=(), grid=grid, trace=True)
    gone = torch.tensor(dropped).expand(2, -1)
    none = gone[:, :0]
    selection = Selection(others(gone, grid[0] * grid[1]), none, none)
    fewer = merge(tokens, selection, tokens.size)
    return x, fewer, Cells(fewer, tokens.x)


@pytest.mark.parametrize("form", [NonCausalSSD, Attention])
def test_a_dropped_cell_has_no_weight_in_what_cells_share(form):
    mixer = NonCausalSSD(8, heads=2, state=4) if form is NonCausalSSD else Attention(8, 2)
    mixer = mixer.double()
    dropped = [3, 7, 19]
    x, tokens, cells = kept_cells(dropped)
    if form is NonCausalSSD:
        # The whole map with those cells zero before the convolution and of size 0 in the state.
        stay = torch.ones(2, 20).double()
        stay[:, dropped] = 0
        z, xBC, dt = mixer.in_proj(x).split(mixer.splits, dim=3)
        xBC = torch.nn.functional.silu(mixer.conv2d(xBC * stay.view(2, 4, 5, 1))).flatten(1, 2)
        value, B, C = xBC.split(mixer.convolved_splits, dim=2)
        dt = torch.nn.functional.softplus(dt + mixer.dt_bias).flatten(1, 2)
        A = -mixer.A_log.exp()
        y = nc_ssd(value.unflatten(2, (2, -1)), dt, A, B, C, mixer.D, size=stay).flatten(2)
        whole = mixer.out_proj(mixer.norm(y) * z.flatten(1, 2))
    else:
        q, k, v = mixer.to_qkv(x.flatten(1, 2)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT / 2
        logits[..., dropped] = -torch.inf
        whole = mixer.to_out((logits.softmax(dim=3) @ v).transpose(1, 2).flatten(2))
    expected = whole.gather(1, tokens.position[..., None].expand(-1, -1, 8))
    torch.testing.assert_close(mixer(tokens.x, cells), expected)


@pytest.mark.parametrize("form", [NonCausalSSD, Attention])
def test_merging_equal_cells_is_exact(form):
    mixer = NonCausalSSD(8, heads=2, state=4) if form is NonCausalSSD else Attention(8, 2)
    mixer = mixer.double()
    if form is NonCausalSSD:  # cells stay equal only if their neighbours do not matter
        mixer.conv2d.weight.data[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    x = torch.randn(2, 4, 5, 8).double()
    x[:, 0, 1] = x[:, 0, 2] = x[:, 3, 4]
    tokens = Tokens.start(x.flatten(1, 2), cls_index=(), grid=(4, 5), trace=True)
    source, target = torch.tensor([[2, 19]]).expand(2, -1), torch.tensor([[1, 1]]).expand(2, -1)
    fewer = merge(tokens, Selection(others(source, 20), source, target), tokens.size)
    cells = Cells(fewer)
    torch.testing.assert_close(cells.whole(mixer(fewer.x, cells)), mixer(x).flatten(1, 2))


@pytest.mark.parametrize("form", [NonCausalSSD, Attention])
def test_merging_cells_that_are_alike_is_exact_to_first_order(form):
    torch.manual_seed(0)
    mixer = NonCausalSSD(8, heads=2, state=4) if form is NonCausalSSD else Attention(8, 2)
    mixer = mixer.double()
    base, apart = torch.randn(2, 4, 5, 8).double(), torch.randn(2, 8).double()
    base[:, 0, 2] = base[:, 0, 1]
    source, target = torch.tensor([[2]]).expand(2, -1), torch.tensor([[1]]).expand(2, -1)
    errors = []
    for size in (1e-2, 5e-3):
        x = base.clone()
        x[:, 0, 1] += size * apart
        x[:, 0, 2] -= size * apart
        tokens = Tokens.start(x.flatten(1, 2), cls_index=(), grid=(4, 5), trace=True)
        fewer = merge(tokens, Selection(others(source, 20), source, target), tokens.size)
        cells = Cells(fewer)
        if form is NonCausalSSD:  # beside what the convolution makes of different neighbours
            mixer.conv2d.weight.data[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
        far = slice(3, None)  # cells that were not merged
        error = cells.whole(mixer(fewer.x, cells)) - mixer(x).flatten(1, 2)
        errors.append(error[:, far].abs().max().item())
    # Members that differ by a half are a quarter as wrong: what remains is of second order.
    assert 0 < errors[1] < 0.3 * errors[0] < 1e-3


def test_paths_read_kept_cells_in_the_order_of_the_whole_map():
    mixer = SS2D(8).double()
    _, tokens, cells = kept_cells([0, 6, 7, 13])
    position = tokens.position[0]
    paths = kept_paths(scan_paths((4, 5), position.device), tokens.position)
    for path in range(4):
        whole = scan_paths((4, 5), position.device)[:, path]
        expected = [n for n in whole.tolist() if n in position.tolist()]
        assert position[paths[0, :, path]].tolist() == expected
    # Each path by itself: gathered, scanned, and scattered back.
    u, projected, _ = mixer.project(tokens.x, cells)
    out = mixer(tokens.x, cells)
    shuffled = torch.randperm(16)
    moved = tokens._replace(
        x=tokens.x[:, shuffled],
        position=tokens.position[:, shuffled],
        source=torch.where(tokens.source < 0, -1, shuffled.argsort()[tokens.source.clamp(min=0)]),
    )
    torch.testing.assert_close(mixer(moved.x, Cells(moved)), out[:, shuffled])
    assert u.shape == (2, 16, 8)
    assert projected.shape[2] == 4


def scored(mixer, norm, want):
    """What a mixer returns of kept cells, and what its norm reads of them."""
    _, tokens, cells = kept_cells([3, 7, 19])
    seen = []
    norm.register_forward_pre_hook(lambda _, read: seen.append(read[0].flatten(1, -2)))
    out, found = mixer(tokens.x, cells, frozenset(want))
    torch.testing.assert_close(out, mixer(tokens.x, cells))
    return tokens.x, cells, found, seen[0]


def test_scores_are_those_of_the_tokens():
    mixer = SS2D(8, state=2).double()
    want = {"delta", "B", "ungated_unclipped", "ungated"}
    x, cells, found, y = scored(mixer, mixer.out_norm, want)
    # The directions add up to what is normalised; forward ones are the even.
    torch.testing.assert_close(found.ungated_unclipped.sum(dim=(1, 3)), y.sum(dim=2))
    assert (found.ungated >= found.ungated_unclipped).all()
    _, projected, _ = mixer.project(x, cells)
    dt, B, _ = projected.split(mixer.splits, dim=3)
    for direction, path in enumerate((1, 3, 0, 2)):  # columns, from their ends, rows, likewise
        torch.testing.assert_close(found.B[:, direction], B[:, :, path])
        step = dt[:, :, path] @ mixer.dt_projs_weight[path].T + mixer.dt_projs_bias[path]
        torch.testing.assert_close(found.delta[:, direction], torch.nn.functional.softplus(step))

    shared = NonCausalSSD(8, heads=2, state=4).double()
    x, _, found, y = scored(shared, shared.norm, want)
    torch.testing.assert_close(found.ungated[:, 0, :, 0], y.clamp(min=0).sum(dim=2))
    step = torch.nn.functional.softplus(shared.in_proj(x)[..., -2:] + shared.dt_bias)
    torch.testing.assert_close(found.delta[:, 0], step)


@pytest.mark.parametrize("name", NETS)
def test_pruning_drops_the_cells_of_least_score(name):
    model, x = built(name), images()
    block = model.stages[0][1]
    fambav.reduce(model, "evit", "1.2:20", signal="mixed")
    kept = []
    trailing = block.trailing
    block.trailing = lambda x, cells=None: trailing(x, kept.append(cells) or cells)
    mixer = block.op if name == "vmamba" else block.attn
    mixed = []
    mixer.register_forward_hook(lambda *call: mixed.append(call[2]))
    model(x)
    score = mixed[0].clamp(min=0).sum(dim=2)  # of all 60 cells
    best = score.argsort(dim=1, descending=True)[:, :40].sort(dim=1).values
    assert torch.equal(kept[0]._position, best)


@pytest.mark.parametrize("name", NETS)
def test_a_walk_over_kept_cells_that_drops_none_is_the_model(name):
    model, x = built(name), images()
    whole = model(x)
    fambav.reduce(model, "tome", "1.3:1")
    assert not torch.equal(model(x), whole)
    hooks = make_staged_reduction(model.info).stage(0).hooks
    map_ = model.embed(x)
    torch.testing.assert_close(model.stages[0](map_, hooks), model.stages[0](map_))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    ("method", "schedule"),
    [
        ("random", "r:10@1.1-1.3"),
        ("tome", "keep:0.7@1.2,2.1"),
        ("famba-v", "1.1:9,2.2:3"),
        ("storm", "tokens:40,20@1.1,1.3"),
        ("stm", "list:7,7"),
        ("mtr", "1.1:9,1.3:4"),
        ("utrc", "1.2:9,2.1:4"),
        ("evit signal=ungated", "keep:0.7@1.1"),
        ("evit signal=mixed,fuse=true", "keep:0.7@1.1,2.1"),
        ("prune-aligned signal=ungated", "keep:0.7@1.1,1.2"),
        ("r-meeto metric=delta", "r:9@1.2-1.3"),
    ],
)
def test_every_stage_gives_its_whole_map_and_gradients(name, method, schedule):
    model, x = built(name), images()
    method, _, options = method.partition(" ")
    how = dict(scan="compact") if method == "prune-aligned" else {}
    fambav.reduce(model, method, schedule, **read_options(method, options), **how)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 6, 10), (2, 12, 3, 5)]
    logits = model(x)
    logits.sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert not [n for n, grad in grads.items() if grad is None or not grad.isfinite().all()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).sum().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[n])
    if "keep" in schedule:  # of the images' own size
        assert model(images((40, 56))).isfinite().all()


def test_a_dropped_cell_keeps_its_residual_stream():
    model = built("vmamba")
    fambav.reduce(model, "random", "1.1:20")
    x = model.embed(images())
    out = model.stages[0](x, model.reduction.stage(0).hooks)
    same = (out == x).all(dim=3).sum(dim=(1, 2))
    assert same.tolist() == [20, 20]


@pytest.mark.parametrize("name", NETS)
def test_hooks_fire_while_cells_are_removed(name):
    model, seen = built(name), []
    fambav.reduce(model, "random", "1.1:20")
    for part in (model.stages[0], model.stages[0][1]):
        part.register_forward_hook(lambda module, given, output: seen.append(module))
    model(images())
    assert seen == [model.stages[0][1], model.stages[0]]


def test_counts_follow_the_kept_cells():
    for name in NETS:
        model = built(name)
        whole = flops.count(model).total
        fambav.reduce(model, "random", "keep:0.5@1.1,2.1")
        report = flops.count(model)
        assert report.unreduced == whole
        assert report.total.multiply_adds < 0.8 * whole.multiply_adds
        rows = [row for row in report.rows if row.part == "layer"]
        assert tuple(row.name for row in rows) == model.reduction.schedule.names
        layers = [row.tokens for row in rows]
        assert layers == [30, 30, 30, 8, 8] == list(model.reduction.schedule.lengths)
        assert model.reduction.schedule.share == (90 + 16) / (180 + 30)


@pytest.mark.parametrize("name", NETS)
def test_scoring_costs_the_width_inside_of_a_mixer(name):
    model = built(name)
    fambav.reduce(model, "prune-aligned", "1.2:5", scan="compact", signal="ungated")
    paths = model.directions
    assert flops.count(model).reduction.all_directions == paths * 60 * 2 * 8  # cells, inner


def test_a_reduction_in_place_of_its_own_is_counted_under_a_head_too():
    model = SegmentationModel(built("vmamba"), 3, channels=8)
    assert flops.count(model).reduction == flops.FREE
    report = flops.count(model, make_staged_reduction(model.info, "tome", "1.1:5"))
    assert report.method == "tome" and report.total.multiply_adds < report.unreduced.multiply_adds


def test_multiply_adds_are_those_that_run():
    from torch.utils.flop_counter import FlopCounterMode

    model, x = built("vssd"), images()
    fambav.reduce(model, "random", "1.1:30,2.1:5")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x[:1])
    attention = 4 * 10**2 * 12 * 2  # of two layers of 10 cells, which the counter passes over
    counted = counter.get_total_flops() + attention
    assert counted == 2 * flops.count(model).total.multiply_adds


@pytest.mark.parametrize(
    ("method", "schedule", "message"),
    [
        ("tome", "r:5@3", "expected layers from 1.1 to 2.2"),
        ("tome", "r:5@1.4", "expected layers from 1.1 to 1.3 in stage 1"),
        ("tome", "r:5@2.1-1.2", "expected layers from 1.1 to 2.2"),
        ("tome", "1.1:3,1.1:4", "expected each layer once, from 1.1 to 2.2"),
        ("tome", "2.1:9", "expected at most 8 at layer 2.1; layer 2.1 has 15 - 0 = 15 tokens"),
        ("random", "1.1:59,1.2:1", "fits from layer 1.1 on, all fit from maps of 7 x 11 cells on"),
        ("storm", "1.2:7", "tokens removed at layer 1.2 are 7, expected a number that makes"),
        ("tome", "upper:2:3", "upper counts in one stage"),
        ("tome", "published", "no paper has one for vssd"),
        ("mtr", "r:1@2.1", "which reads delta of the mixers of stage 2"),
        ("evit", "r:1@1.2", "which reads gated of the mixers of stage 1"),
        ("prune-aligned", "r:1@1.2", "scan_policy is 'aligned', expected another"),
    ],
)
def test_what_makes_no_sense_in_stages_is_refused_in_one_line(method, schedule, message):
    model = built("vssd")
    with pytest.raises(ValueError, match="expected") as refusal:
        fambav.reduce(model, method, schedule)
    assert message in str(refusal.value)
    assert not model.reduction.reduces
    with pytest.raises(ValueError, match="'mean' in models of stages; each member of a group"):
        fambav.reduce(model, "storm", "tokens:40@1.1", merge="sum")
    for how, why in (
        (dict(scan="masked"), "scan_policy is 'masked', expected 'compact'"),
        (dict(scan="aligned"), "states of vssd are sums"),
    ):
        with pytest.raises(ValueError, match=why):
            fambav.reduce(model, "random", "1.1:3", **how)


def test_a_model_of_fewer_stages_keeps_their_part_of_the_plan():
    model = built("vssd")
    fambav.reduce(model, "tome", "1.2:9,2.1:3")
    model.prune_intermediate_layers([0])
    assert model.reduction.schedule.counts == (0, 9, 0)
