"""What every way of merging must never change, whatever its options."""

import pytest
import torch

from fambav.reduction import make_reducer
from tests.reduction.made import pick, reduce, reducing, some

WAYS = {
    "famba-v": ("famba-v", {}),
    "ordered": ("ordered", {}),
    "r-meeto": ("r-meeto", {}),
    "r-meeto by l1": ("r-meeto", dict(distance="l1")),
    "r-meeto by l2": ("r-meeto", dict(distance="l2", weighted=False)),
    "r-meeto to the third": ("r-meeto", dict(nearest=3)),
    "r-meeto out of order": ("r-meeto", dict(order="lost")),
    "r-meeto out of order by l1": ("r-meeto", dict(order="lost", distance="l1")),
    "tome": ("tome", {}),
    "stm": ("stm", {}),
    "stm in pairs": ("stm", dict(neighbours="next", radius=0, weighted=True)),
    "stm far from the class token": ("stm", dict(radius=5)),
    "storm": ("storm", {}),
    "storm in small windows": ("storm", dict(window=2, distance="cosine", weighted=False)),
    "storm by output": ("storm", dict(metric="hidden", distance="l2", window=1)),
}
ORDERED = [
    way for way, (method, options) in WAYS.items() if make_reducer(method, **options).ordered
]
COMPILED = (
    "famba-v",
    "ordered",
    "r-meeto",
    "r-meeto by l1",
    "r-meeto out of order",
    "tome",
    "stm",
    "storm",
)
PLACES = {"head": (0,), "middle": (32,), "double": (0, 65), "none": ()}
POLICIES = [
    *((name, "exact") for name in PLACES),
    *((name, "proportional") for name in PLACES if name != "none"),
    ("middle", "middle"),
]


def counts_of(method):
    """Two steps, that leave a grid of 7 x 7 and then of 7 x 6 where one is needed."""
    return (15, 7) if method == "storm" else (12, 7)


def tokens_at(name):
    places = PLACES[name]
    return some(places, length=64 + len(places), grid=(8, 8))


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


@pytest.mark.parametrize(("name", "policy"), POLICIES)
def test_no_patch_is_lost_and_class_tokens_stay_alone_in_every_sample(way, name, policy):
    method, options = way
    tokens, counts = tokens_at(name), counts_of(way[0])
    merged = reduce(tokens, method, *counts, class_policy=policy, **options)
    left = tokens.x.shape[1] - sum(counts)
    assert merged.x.shape == merged.residual.shape == (3, left, 8)
    assert merged.size.sum(1).tolist() == tokens.size.sum(1).tolist()
    assert [sorted(set(row)) for row in merged.source.tolist()] == [list(range(left))] * 3
    for stream in ("x", "residual"):
        was = pick(getattr(tokens, stream), tokens.cls_index)
        assert pick(getattr(merged, stream), merged.cls_index).equal(was)
    assert merged.position.gather(1, merged.cls_index).equal(tokens.cls_index)
    members = (merged.source[:, :, None] == merged.cls_index[:, None]).sum(1)
    assert (members == 1).all()


@pytest.mark.parametrize(("name", "policy"), POLICIES)
@pytest.mark.parametrize("way", ORDERED)
def test_the_order_of_the_scan_is_kept(way, name, policy):
    method, options = WAYS[way]
    merged = reduce(tokens_at(name), method, 12, 7, class_policy=policy, **options)
    position = merged.position
    if policy != "exact":
        patches = torch.ones_like(position, dtype=torch.bool)
        patches.scatter_(1, merged.cls_index, value=False)
        position = position[patches].view(3, -1)
    assert (position.diff(dim=1) > 0).all()


def test_each_token_is_the_mean_of_those_it_stands_for(way):
    method, options = way
    tokens = tokens_at("middle")
    merged = reduce(tokens, method, *counts_of(method)[:1], **options)
    members = torch.nn.functional.one_hot(merged.source).float()
    mean = members.mT @ tokens.x / members.sum(1)[..., None]
    torch.testing.assert_close(merged.x, mean)


def test_both_streams_are_merged_alike(way):
    method, options = way
    tokens = tokens_at("middle")
    merged = reduce(tokens._replace(residual=2 * tokens.x), method, *counts_of(method), **options)
    assert torch.equal(merged.residual, 2 * merged.x)


def test_gradient_reaches_every_token_of_both_streams(way):
    method, options = way
    tokens = tokens_at("double")
    x, residual = tokens.x.requires_grad_(), tokens.residual.requires_grad_()
    tokens = tokens._replace(x=x, residual=residual)
    merged = reduce(tokens, method, *counts_of(method), **options)
    (merged.x.square().sum() + merged.residual.square().sum()).backward()
    assert (x.grad.abs().sum(-1) > 0).all()
    assert (residual.grad.abs().sum(-1) > 0).all()


def test_samples_do_not_see_each_other(way):
    method, options = way
    tokens, counts = tokens_at("middle"), counts_of(way[0])
    order = torch.tensor([2, 0, 1])
    shuffled = tokens._replace(
        **{n: f[order] for n, f in tokens._asdict().items() if isinstance(f, torch.Tensor)}
    )
    together = reduce(tokens, method, *counts, **options)
    for got, want in zip(reduce(shuffled, method, *counts, **options), together, strict=True):
        if isinstance(want, torch.Tensor):
            assert torch.equal(got, want[order])
        else:
            assert got == want


def test_autocast_does_not_change_who_merges(way):
    method, options = way
    tokens, counts = tokens_at("middle"), counts_of(way[0])
    with torch.autocast("cpu", torch.bfloat16):
        within = reduce(tokens, method, *counts, **options)
    assert torch.equal(within.x, reduce(tokens, method, *counts, **options).x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tokens_of_other_dtypes_keep_them(way, dtype):
    method, options = way
    tokens = tokens_at("middle")
    tokens = tokens._replace(x=tokens.x.to(dtype), residual=tokens.residual.to(dtype))
    merged = reduce(tokens, method, *counts_of(method), **options)
    assert merged.x.dtype == merged.residual.dtype == dtype
    assert merged.size.dtype == torch.float32


def test_tokens_of_zeros_merge_without_nan(way):
    method, options = way
    tokens = tokens_at("middle")
    x = tokens.x.clone()
    x[:, 20:] = 0
    tokens = tokens._replace(x=x.requires_grad_(), residual=torch.zeros_like(x))
    merged = reduce(tokens, method, *counts_of(method), **options)
    merged.x.sum().backward()
    assert merged.x.isfinite().all()
    assert x.grad.isfinite().all()


def test_not_a_number_costs_no_class_token(way):
    method, options = way
    tokens = tokens_at("middle")
    tokens.x[0, 7] = tokens.x[1, 40:] = tokens.residual[1, 40:] = torch.nan
    merged = reduce(tokens, method, *counts_of(method)[:1], **options)
    members = (merged.source[:, :, None] == merged.cls_index[:, None]).sum(1)
    assert (members == 1).all()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own tracing does so
@pytest.mark.parametrize("way", COMPILED)
def test_merging_compiles_without_a_graph_break(way):
    method, options = WAYS[way]
    tokens, (count, _) = tokens_at("middle")._replace(source=None), counts_of(method)
    reducer = reducing(method, (count,), tokens, **options)

    def run(x, residual):
        merged = reducer(tokens._replace(x=x, residual=residual), 0)
        return merged.x, merged.residual, merged.size, merged.cls_index

    inputs = [t.clone().requires_grad_() for t in (tokens.x, tokens.residual)]
    got = torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs)
    for mine, eager in zip(got, run(*inputs), strict=True):
        assert torch.equal(mine, eager)
    want = torch.autograd.grad(run(*inputs)[0].square().sum(), inputs[0])[0]
    assert torch.equal(torch.autograd.grad(got[0].square().sum(), inputs[0])[0], want)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("r-meeto", dict(metric="b"), "option metric is 'b', expected a known name; did you mean"),
        ("r-meeto", dict(distance="dot"), "option distance is 'dot', expected a known name"),
        ("r-meeto", dict(nearest=0), "option nearest is 0, expected at least 1"),
        ("r-meeto", dict(order="random"), "option order is 'random', expected a known name"),
        ("r-meeto", dict(merge="sum"), "option merge is 'sum', expected a known name; known: mean"),
        ("stm", dict(radius=-1), "option radius is -1, expected at least 0"),
        ("stm", dict(neighbours="previous"), "option neighbours is 'previous', expected a known"),
        ("storm", dict(window=0), "option window is 0, expected at least 1"),
        ("storm", dict(distance="l3"), "option distance is 'l3', expected a known name; known: l1"),
        ("storm", dict(metric="B"), "option metric is 'B', expected a known name; known: residual"),
        ("tome", dict(weighted=False), "option is 'weighted', expected one of tome; tome has none"),
    ],
)
def test_a_wrong_option_is_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        make_reducer(method, **options)
