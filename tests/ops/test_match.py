"""Which pairs every backend chooses, and in which order it leaves the rest."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fambav.ops.flop_formulas  # noqa: F401  registers the formulas
from fambav.ops import force
from fambav.ops.match import MATCH, evens_then_odds, halves, in_order, match
from fambav.reduction import FambaV, Ordered
from tests.ops.agreement import agrees_twice, device_of, draw, every_length

KERNELS = ["triton", "numba"]
BACKENDS = [*KERNELS, "reference"]
LIMITS = {evens_then_odds: FambaV.limit, in_order: Ordered.limit}
PLACES = {"none": (), "even": (0,), "odd": (1,), "both": (4, 1)}


def features(batch, length, dim, dtype=torch.float32):
    return draw("match", batch, length, dim, dtype=dtype).detach()


def chosen(function, backend, x, *arguments, **options):
    """Run on the backend's device and return what was chosen as lists."""

    def there(value):
        return value.to(device_of(backend)) if isinstance(value, torch.Tensor) else value

    with force(backend, "match"):
        found = function(
            there(x), *map(there, arguments), **{name: there(v) for name, v in options.items()}
        )[:3]
    assert all(tensor.dtype == torch.int64 for tensor in found)
    return [tensor.tolist() for tensor in found]


def places(batch, *at):
    return torch.tensor(at, dtype=torch.int64).expand(batch, -1)


@pytest.mark.parametrize("most", [False, True], ids=["one", "most"])
@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("length", [2, 5, 17, 65])
@pytest.mark.parametrize("function", LIMITS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_backends_choose_the_same_tokens_in_the_same_order(kernels, function, length, at, most):
    limit = LIMITS[function](length, PLACES[at]) if length > max(PLACES[at], default=0) else 0
    if not limit:
        return
    x, at = features(2, length, 8), places(2, *PLACES[at])
    count = limit if most else 1
    got = chosen(function, kernels, x, count, at)
    assert got == chosen(function, "reference", x, count, at)
    keep, source, target = map(torch.tensor, got)
    assert torch.cat((keep, source), 1).sort().values.equal(torch.arange(length).expand(2, -1))
    assert (target[..., None] == keep[:, None]).any(-1).all()
    assert not (at[..., None] == torch.cat((source, target), 1)[:, None]).any()


def scored(kind, batch, length, dim):
    """Features whose scores are often equal, large, or no numbers."""
    x = features(batch, length, dim)
    rare = draw("rare", batch, length).abs() > 1.3
    if kind == "ties":
        return x.sign()
    if kind == "zeros":
        return x.masked_fill(rare[..., None], 0).sign()
    if kind == "norms that overflow":
        return x * 3e18
    value = {"NaN": math.nan, "infinity": math.inf, "less than measured": 1e-30}[kind]
    return x.masked_fill(rare[..., None], value)


@pytest.mark.parametrize("places_of", [(), (4,), (7, 2, 8)], ids=str)
@pytest.mark.parametrize(("length", "dim"), [(2, 3), (9, 1), (33, 3), (34, 40), (70, 3), (129, 2)])
@pytest.mark.parametrize(
    "kind",
    ["ties", "zeros", "NaN", "infinity", "less than measured", "norms that overflow"],
)
@pytest.mark.parametrize("function", LIMITS)
def test_numba_chooses_what_the_reference_does_to_the_bit(function, kind, length, dim, places_of):
    x, at = scored(kind, 3, length, dim), places(3, *(p for p in places_of if p < length))
    most = halves(length, at.shape[1], in_order=function is in_order)[0]
    for count in {0, 1, most // 2, most}:
        got = chosen(function, "numba", x, count, at)
        assert got == chosen(function, "reference", x, count, at)


@every_length((5, torch.float32), (8, torch.bfloat16), (5, torch.float16), least=5)
def test_every_length_finds_the_best_pairs_and_keeps_all_tokens(length, dtype, record_property):
    x, count = features(2, length, 40, dtype), (length - 3) // 2
    unit = torch.nn.functional.normalize(x.double(), dim=-1)

    def found(backend, x):
        with force(backend, "match"):
            pairs = evens_then_odds(x, count, places(2, length // 2).to(x.device))
        keep, *ends = (tensor.cpu() for tensor in pairs[:3])
        ends_of = (unit.gather(1, end[..., None].expand(-1, -1, 40)) for end in ends)
        scores = torch.stack([*ends_of]).prod(0).sum(-1).sort(dim=1).values
        return dict(scores=scores, places=torch.cat((keep, ends[0]), 1).sort().values)

    want = found("reference", x.double())
    assert want["places"].equal(torch.arange(length).expand(2, -1))
    there = x.to(device_of("triton"))
    agrees_twice(lambda: found("triton", there), want, dtype, record_property)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_short_floats_are_compared_in_float32(backend, dtype):
    x = features(2, 33, 40, dtype)
    assert chosen(match, backend, x, 16) == chosen(match, "reference", x.float(), 16)


@pytest.mark.parametrize("function", LIMITS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_sequences_longer_than_a_tile_are_compared_whole(kernels, function):
    x, at = features(1, 141, 40), places(1, 70)
    got = chosen(function, kernels, x, 66, at)
    assert got == chosen(function, "reference", x, 66, at)
    assert max(got[2][0]) > 129 and min(got[2][0]) < 127  # a tile holds 64 odd tokens


STRIDES = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch in the middle": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "part of a wider tensor": lambda x: torch.cat((x, -x), -1)[..., : x.shape[-1]],
    "every second channel": lambda x: torch.stack((x, -x), -1)[..., 0],
    "one sample for all": lambda x: x[:1].expand(len(x), -1, -1),
}


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("function", LIMITS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_strides_do_not_matter(kernels, function, strides):
    x = STRIDES[strides](features(3, 17, 8))
    assert not x.is_contiguous()
    at = torch.tensor([[3, 9, 16], [0, 9, 1], [5, 9, 8]])[:, ::2]
    got = chosen(function, kernels, x, 5, at)
    assert got == chosen(function, kernels, x.contiguous(), 5, at.contiguous())
    assert got == chosen(function, "reference", x, 5, at)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_exactly_equal_scores_the_lower_place_wins(backend):
    x = torch.tensor([1.0, 0]).expand(1, 9, 2)
    assert chosen(match, backend, x, 3) == [[[0, 2, 4]], [[1, 1, 1]]]
    assert chosen(match, backend, x, 3, masked=places(1, 1)) == [[[0, 2, 4]], [[3, 3, 3]]]
    assert chosen(match, backend, x, 3, masked=places(1, 2)) == [[[0, 4, 6]], [[1, 1, 1]]]


@pytest.mark.parametrize("length", [17, 141])
@pytest.mark.parametrize("kernels", KERNELS)
def test_equal_tokens_score_equally_wherever_they_stand(kernels, length):
    x = features(1, length, 64).sign() / 8  # norms and products that no order of sums rounds
    x[:, 5:] = x[:, 5:6]
    source, target = chosen(match, kernels, x, 4)
    assert source == [[6, 8, 10, 12]]
    assert target == [[5, 5, 5, 5]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_of_zeros_is_equally_unlike_all_others(backend):
    x = features(1, 9, 8).abs()
    x[:, 4] = 0
    source, target = chosen(match, backend, x, 5)
    assert source[0][-1] == 4
    assert target[0][-1] == 1
    x[:, 5] = -x[:, 6]
    x[:, 4] = 1e-30  # its norm cannot be measured
    assert chosen(match, backend, x, 5)[0][0][-1] == 4


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of Triton's interpreter
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_above_all_others(value, backend):
    x = features(1, 17, 8)
    x[:, 10] = value
    source, target = chosen(match, backend, x, 3)
    assert (source[0][0], target[0][0]) == (10, 1)
    assert len({10, *source[0]}) == 3
    x[:, 7] = x[:, 9] = value
    assert chosen(match, backend, x, 9) == [[[*range(0, 18, 2)]], [[7] * 5 + [1] + [7] * 3]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", LIMITS)
def test_a_class_token_that_is_no_number_changes_no_choice(function, backend):
    x = features(2, 17, 8)
    want = chosen(function, backend, x, 7, places(2, 8))
    x[:, 8] = math.nan
    assert chosen(function, backend, x, 7, places(2, 8)) == want


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", LIMITS)
def test_tokens_that_are_all_no_numbers_go_in_their_order(function, backend):
    x = torch.full((2, 9, 4), math.nan)
    keep, source, target = chosen(function, backend, x, 4, places(2))
    assert source == [[0, 2, 4, 6]] * 2
    assert target == [[1, 1, 1, 1]] * 2
    assert keep == [[8, 1, 3, 5, 7] if function is evens_then_odds else [1, 3, 5, 7, 8]] * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("function", "length", "count", "at", "most"),
    [
        (evens_then_odds, 9, 6, (), 5),
        (evens_then_odds, 1, 1, (), 0),
        (in_order, 9, 5, (0, 4), 4),
        (in_order, 2, 1, (1,), 0),
    ],
)
def test_more_pairs_than_tokens_are_refused(function, length, count, at, most, backend):
    with pytest.raises(ValueError, match=f"count is {count}, expected at most {most} of {length}"):
        chosen(function, backend, features(1, length, 4), count, places(1, *at))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_choice_has_no_gradient(backend):
    x = features(1, 9, 4).to(device_of(backend)).requires_grad_()
    with force(backend, "match"):
        assert not any(tensor.requires_grad for tensor in match(x, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_change_a_choice(backend):
    x = features(2, 65, 8)
    with torch.autocast(device_of(backend), torch.bfloat16):
        within = chosen(match, backend, x, 30)
    assert within == chosen(match, "reference", x, 30)


class Precision(TorchDispatchMode):
    """Notes how exact float32 products may be while there are any."""

    def __init__(self, ask):
        super().__init__()
        self.ask, self.seen = ask, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in str(function):
            self.seen.append(self.ask())
        return function(*args, **(kwargs or {}))


NEWER = hasattr(torch.backends.cuda.matmul, "fp32_precision")


def newer():
    return [getattr(torch.backends, name).matmul.fp32_precision for name in ("cuda", "mkldnn")]


@pytest.fixture
def products():
    """Let float32 products be rough, and end as it was."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


EXACT = ["numba", "reference"]  # whose products are PyTorch's


def compare(ask, backend="reference"):
    with Precision(ask) as mode:
        MATCH[backend].run(features(1, 9, 4), places(1), 2, in_order=False)
    return mode.seen


@pytest.mark.skipif(not NEWER, reason="torch has only the older setting")
@pytest.mark.parametrize("rough", ["medium", "high", "highest"])
@pytest.mark.parametrize("backend", EXACT)
def test_products_are_exact_and_leave_the_setting_as_it_was(products, rough, backend):
    products(rough)
    before = newer()
    assert compare(newer, backend) == [["ieee", "ieee"]]
    assert newer() == before
    assert torch.get_float32_matmul_precision() == rough


@pytest.mark.skipif(not NEWER, reason="torch has only the older setting")
def test_a_setting_made_in_newer_words_is_left_as_it_was_too(products):
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # torch now refuses to say it in older ones
    try:
        assert compare(newer) == [["ieee", "ieee"]]
        assert newer()[0] == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


def test_the_reference_multiplies_exactly_where_torch_has_only_the_older_setting(
    products, monkeypatch
):
    products("medium")
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace())
    assert compare(torch.get_float32_matmul_precision) == ["highest"]
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_tf32_does_not_change_a_choice_on_a_gpu(products, backend):
    torch.use_deterministic_algorithms(False)
    x = draw("match", 8, 197, 192, device="cuda").detach()
    products("highest")
    with force(backend, "match"):
        want = match(x, 90)
        products("high")
        assert all(map(torch.equal, match(x, 90), want))


class Allocated(TorchDispatchMode):
    """Notes how large the largest new tensor is; the interpreter's own are copies."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if "empty" in str(function):
            self.largest = max(self.largest, out.numel())
        return out


def test_the_kernels_store_no_scores():
    x = features(2, 65, 4).to(device_of("triton"))
    with Allocated() as mode:
        MATCH["triton"].run(x, places(2, 0).to(x.device), 9, in_order=True)
    assert 0 < mode.largest <= 2 * 65


@pytest.mark.parametrize("backend", BACKENDS)
def test_floating_point_operations_are_those_of_the_products(backend):
    for function, at, products in ((match, None, 9 * 8), (in_order, places(2, 3, 5), 8 * 7)):
        with FlopCounterMode(display=False) as counter:
            chosen(function, backend, features(2, 17, 8), 3, *([] if at is None else [at]))
        assert counter.get_total_flops() == 2 * 2 * products * 8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", LIMITS)
def test_a_compiler_sees_one_operator(function, backend):
    x, at = features(2, 17, 8).to(device_of(backend)), places(2, 3).to(device_of(backend))
    graphs = []

    def keep(graph, inputs):
        graphs.append([n.target for n in graph.graph.nodes if n.op.startswith("call")])
        return graph.forward

    with force(backend, "match"):
        got = torch.compile(function, backend=keep, fullgraph=True)(x, 4, at)
        assert all(map(torch.equal, got[:3], function(x, 4, at)[:3]))
    (targets,) = graphs
    operators = [t for t in targets if "getitem" not in str(t) and t != "detach"]
    assert operators == [torch.ops.fambav.match]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", LIMITS)
def test_shapes_are_known_without_running(function, backend):
    given = features(2, 17, 8).to(device_of(backend)), places(2, 3).to(device_of(backend)), 4
    with force(backend, "match"):
        torch.library.opcheck(
            torch.ops.fambav.match.default, given, dict(in_order=function is in_order)
        )
