"""Group means of both streams, by every backend."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fambav.layers import Tokens
from fambav.ops import BackendError, force
from fambav.ops.kernels import kernel_set
from fambav.ops.match import Selection, evens_then_odds
from fambav.ops.pool import pool
from tests.ops.agreement import (
    agrees_twice,
    device_of,
    draw,
    every_length,
    results,
    widened,
)
from tests.ops.places import close
from tests.reduction.made import reducing

KERNELS = ["triton", "numba"]
BACKENDS = [*KERNELS, "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The numba kernels take float32 alone.
TAKEN = [(name, dtype) for name in KERNELS for dtype in DTYPES[: 1 if name == "numba" else None]]


def groups(length, count, batch=2):
    """A selection as a reducer makes it."""
    features = draw("groups", batch, length, 4).detach()
    return evens_then_odds(features, count, torch.empty(batch, 0, dtype=torch.int64))


def inputs(batch, length, dim, dtype=torch.float32, *, residual=True, backend="triton"):
    """One stream in `dtype`, the other in float32 as in a model."""
    device = device_of(backend)
    x = dict(x=draw("x", batch, length, dim, dtype=dtype, device=device))
    other = dict(residual=draw("residual", batch, length, dim, device=device))
    return x | other if residual else x


def means(selection, **tensors):
    """Means of the streams with weights that are no whole numbers."""
    x = tensors["x"]
    weight = draw("weight", *x.shape[:2], device=x.device).detach().abs() + 0.1
    there = Selection(*(places.to(x.device) for places in selection[:3]))
    pooled = pool(x, tensors.get("residual"), weight, weight, there)
    return tuple(stream for stream in pooled[:2] if stream is not None)


def compare(tensors, selection, kernels):
    """Hold means and gradients against the reference in float64."""

    def run(**given):
        return means(selection, **given)

    got = results(run, tensors, kernels, "pool")
    want = results(run, widened(tensors), "reference", "pool")
    for place, (name, stream) in enumerate(tensors.items()):
        for result in (f"output {place}", f"gradient of {name}"):
            assert got[result].dtype == stream.dtype
            close(got[result], want[result])


@pytest.mark.parametrize("residual", [True, False], ids=["both", "alone"])
@pytest.mark.parametrize(("kernels", "dtype"), TAKEN, ids=str)
@pytest.mark.parametrize(("length", "count"), [(2, 1), (5, 1), (5, 3), (17, 1), (17, 9), (65, 33)])
def test_means_and_gradients_are_those_of_the_reference(length, count, kernels, dtype, residual):
    tensors = inputs(2, length, 8, dtype, residual=residual, backend=kernels)
    compare(tensors, groups(length, count), kernels)


@pytest.mark.parametrize("weights", ["whole numbers", "any", "zero"])
@pytest.mark.parametrize("residual", [True, False], ids=["both", "alone"])
@pytest.mark.parametrize("dim", [1, 16, 39])
@pytest.mark.parametrize(("length", "count"), [(2, 1), (17, 0), (65, 33), (40, 38)])
def test_numba_gives_the_bits_of_the_reference(length, count, dim, residual, weights):
    order = torch.stack([draw(f"order {n}", length).argsort() for n in range(3)])
    keep, source = order.split((length - count, count), dim=1)
    target = keep.gather(1, torch.arange(count).expand(3, -1) ** 2 % (length - count))
    tensors = inputs(3, length, dim, residual=residual, backend="numba")
    size = draw("size", 3, length).detach().abs() * 3 + 1
    weight = dict(any=size, zero=size * 0).get(weights, size.round())

    def run(**given):
        pooled = pool(
            given["x"], given.get("residual"), weight, size, Selection(keep, source, target)
        )
        assert not (pooled.size.requires_grad or pooled.place.requires_grad)
        sizes.append((pooled.size, pooled.place))
        return tuple(stream for stream in pooled[:2] if stream is not None)

    sizes = []
    got, want = (results(run, tensors, backend, "pool") for backend in ("numba", "reference"))
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)
    assert all(map(torch.equal, *sizes))


@every_length((5, torch.float32), (8, torch.bfloat16), (5, torch.float16), least=5)
def test_every_length_agrees(length, dtype, record_property):
    tensors, run = inputs(2, length, 40, dtype), partial(means, groups(length, (length - 3) // 2))
    want = results(run, widened(tensors), "reference", "pool")
    agrees_twice(partial(results, run, tensors, "triton", "pool"), want, dtype, record_property)


@pytest.mark.parametrize(("kernels", "dtype"), TAKEN, ids=str)
def test_many_channels_are_shared_by_programs(kernels, dtype):
    compare(inputs(1, 5, 1030, dtype, backend=kernels), groups(5, 3, batch=1), kernels)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_list_longer_than_a_program_reads_at_once_is_read_to_its_end(kernels):
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))[None]
    keep, source = order.split((3, 147), dim=1)
    target = keep.gather(1, torch.arange(147)[None] % 2)  # the third has no sources
    tensors = inputs(1, 150, 4, backend=kernels)
    compare(tensors, Selection(keep, source, target), kernels)
    with force(kernels, "pool"):
        x = means(Selection(keep, source, target), **tensors)[0]
    assert x[0, 2].equal(tensors["x"][0, keep[0, 2]])


STRIDES = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch in the middle": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "part of a wider tensor": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "every second token": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
}


@pytest.mark.parametrize("turned", [0, 1], ids=["x", "residual"])
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("kernels", KERNELS)
def test_strides_of_streams_places_and_gradients_do_not_matter(kernels, strides, turned):
    selection, tensors = groups(17, 9), inputs(2, 17, 8, backend=kernels)
    apart = Selection(*(torch.stack((p, p), -1)[..., 0] for p in selection[:3]))
    grads = [draw(name, 2, 8, 8, device=device_of(kernels)).detach() for name in tensors]

    def stretch(both):
        return [STRIDES[strides](x) if i == turned else x for i, x in enumerate(both)]

    def run(chosen, turn):
        x, residual = turn(tensors.values())
        with force(kernels, "pool"):
            found = means(chosen, x=x, residual=residual)
        return *found, *torch.autograd.grad(found, list(tensors.values()), turn(grads))

    assert not stretch(grads)[turned].is_contiguous()
    assert all(map(torch.equal, run(apart, stretch), run(selection, list)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_is_one_number_for_all_is_spread(backend):
    tensors = inputs(2, 17, 8, backend=backend)
    with force(backend, "pool"):
        x, residual = means(groups(17, 9), **tensors)
    grads = torch.autograd.grad(x.sum() + residual.sum(), list(tensors.values()))
    for grad in grads:
        torch.testing.assert_close(grad.sum(1), torch.full_like(grad[:, 0], 8))  # of 8 groups


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_that_nothing_depends_on_has_no_gradient(backend):
    tensors = inputs(2, 9, 4, backend=backend)
    x, residual = tensors.values()
    for used, unused, place in ((x, residual, 0), (residual, x, 1)):
        with force(backend, "pool"):
            y = means(groups(9, 3), **tensors)[place]
        grad, nothing = torch.autograd.grad(y.sum(), (used, unused), allow_unused=True)
        assert grad.abs().sum(-1).all()
        assert nothing is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_and_places_follow_the_groups(backend):
    selection = Selection(
        keep=torch.tensor([[5, 1, 3], [1, 3, 5]]),
        source=torch.tensor([[0, 4, 2], [2, 4, 0]]),
        target=torch.tensor([[1, 1, 3], [3, 3, 3]]),
    )
    selection = Selection(*(places.to(device_of(backend)) for places in selection[:3]))
    x, residual = inputs(2, 6, 3, backend=backend).values()
    size = torch.tensor([[1.0, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]], device=x.device)
    with force(backend, "pool"):
        pooled = pool(x, residual, torch.ones_like(size), size, selection)
    assert pooled.size.tolist() == [[6, 8, 7], [5, 15, 1]]
    assert pooled.place.tolist() == [[1, 1, 2, 2, 1, 0], [1, 0, 1, 1, 1, 2]]
    assert pooled.place.dtype == torch.int64
    assert pooled.size.dtype == torch.float32
    assert not pooled.size.requires_grad
    torch.testing.assert_close(pooled.x[0, 1], x[0, [0, 1, 4]].mean(0))
    torch.testing.assert_close(pooled.residual[1, 1], residual[1, [0, 2, 3, 4]].mean(0))


@pytest.mark.parametrize(
    ("backend", "dtype"), [*TAKEN, *(("reference", dtype) for dtype in DTYPES)], ids=str
)
def test_a_token_without_sources_is_unchanged_to_the_last_bit(backend, dtype):
    selection = groups(65, 20)
    alone = ~(selection.keep[..., None] == selection.target[:, None]).any(-1)
    assert 0 < alone.sum() < alone.numel() - 2
    tensors = inputs(2, 65, 8, dtype, backend=backend)
    with force(backend, "pool"):
        pooled = means(selection, **tensors)
    for mean, x in zip(pooled, tensors.values(), strict=True):
        old = x.cpu().gather(1, selection.keep[..., None].expand(-1, -1, 8))
        assert mean.cpu()[alone].equal(old[alone])


@pytest.mark.parametrize(("kernels", "dtype"), TAKEN, ids=str)
def test_two_equal_calls_give_equal_bits(kernels, dtype):
    tensors, selection = inputs(2, 65, 8, dtype, backend=kernels), groups(65, 33)
    runs = [results(lambda **t: means(selection, **t), tensors, kernels, "pool") for _ in "ab"]
    assert all(runs[0][name].equal(runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_kernels_keep_a_share_and_a_place_of_each_token_for_the_backward_pass(kernels):
    tensors, saved = inputs(2, 17, 64, backend=kernels), []
    with (
        force(kernels, "pool"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        means(groups(17, 9), **tensors)
    assert sorted(t.dtype.itemsize for t in saved) == [4, 8]
    assert all(t.shape == (2, 17) for t in saved)


@pytest.mark.parametrize("kernels", KERNELS)
def test_no_copy_of_a_stream_is_made_beside_the_results(kernels):
    pool_forward = kernel_set(kernels).load().pool_forward

    class Allocated(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.total += out.numel() if "empty" in str(function) else 0
            return out

    x, residual = (stream.detach() for stream in inputs(2, 17, 64, backend=kernels).values())
    selection = [places.to(x.device) for places in groups(17, 9)[:3]]
    weight = torch.ones(2, 17, device=x.device)
    with Allocated() as mode:
        pool_forward(x, residual, weight, weight, *selection)
    assert 2 * 2 * 8 * 64 <= mode.total <= 2 * 2 * 8 * 64 + 2 * 8 + 2 * 2 * 17


def test_a_token_in_no_group_is_refused_before_anything_is_read_there():
    tensors = inputs(2, 9, 4, backend="numba")
    for field, index in (("keep", 9), ("keep", -1), ("source", 2**40), ("target", 10), ("keep", 1)):
        wrong = groups(9, 3)._asdict()
        wrong[field][1, 0] = index
        with force("numba", "pool"), pytest.raises(ValueError, match="a token in no group"):
            means(Selection(**wrong), **tensors)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ["x", "residual"])
def test_double_precision_is_left_to_the_reference(name, kernels):
    tensors = inputs(2, 9, 4, backend=kernels)
    tensors[name] = tensors[name].detach().double()
    with (
        force(kernels, "pool"),
        pytest.raises(BackendError, match=r"a tensor is torch\.float64, expected float32"),
    ):
        means(groups(9, 3), **tensors)
    assert means(groups(9, 3), **tensors)[list(tensors).index(name)].dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(residual=torch.ones(2, 9, 5)), r"residual has shape \(2, 9, 5\), expected \(2, 9, 4"),
        (dict(weight=torch.ones(2, 8)), r"weight has shape \(2, 8\), expected \(2, 9\)"),
        (dict(size=torch.ones(1, 9)), r"size has shape \(1, 9\), expected \(2, 9\)"),
        (dict(keep=torch.zeros(2, 5).long()), r"keep has shape \(2, 5\), expected \(2, 6\)"),
        (dict(source=torch.zeros(1, 3).long()), r"source has shape \(1, 3\), expected \(2, 3\)"),
        (dict(target=torch.zeros(2, 2).long()), r"target has shape \(2, 2\), expected \(2, 3\)"),
    ],
)
def test_a_wrong_shape_is_named_with_the_right_one(changes, message):
    places = groups(9, 3)._asdict()
    given = dict(x=torch.ones(2, 9, 4), residual=None, weight=torch.ones(2, 9))
    given |= dict(size=torch.ones(2, 9)) | places | changes
    selection = Selection(*(given.pop(name) for name in places))
    with pytest.raises(ValueError, match=message):
        pool(**given, selection=selection)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own tracing does so
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["famba-v", "ordered"])
def test_a_reducer_compiles_without_a_graph_break(method, backend):
    x, residual = inputs(2, 17, 8, backend=backend).values()
    start = Tokens.start(x.detach(), cls_index=(8,), trace=True)
    reducer = reducing(method, (5,), start)

    def run(x, residual):
        return reducer(start._replace(x=x, residual=residual), 0)

    with force(backend, "match"), force(backend, "pool"):
        runs = (
            run(x, residual),
            torch.compile(run, backend="aot_eager", fullgraph=True)(x, residual),
        )
    for eager, compiled in zip(*runs, strict=True):
        if not isinstance(eager, torch.Tensor):
            assert eager == compiled
            continue
        assert eager.equal(compiled)
        assert eager.requires_grad == compiled.requires_grad
    losses = (t.x.square().sum() + t.residual.sin().sum() for t in runs)
    eager, compiled = (torch.autograd.grad(loss, (x, residual)) for loss in losses)
    assert all(map(torch.equal, eager, compiled))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("residual", [True, False], ids=["both", "alone"])
def test_shapes_are_known_without_running(residual, kernels):
    tensors = inputs(2, 9, 4, residual=residual, backend=kernels)
    x, weight = tensors["x"], torch.ones(2, 9, device=device_of(kernels))
    options = dict(kernels=kernels)
    selection = [places.to(x.device) for places in groups(9, 3)[:3]]
    given = x, tensors.get("residual"), weight, weight, *selection
    torch.library.opcheck(torch.ops.fambav.pool.default, given, options)
    *_, share, place = torch.ops.fambav.pool(*given, **options)
    grads = [stream.detach()[:, :6] for stream in tensors.values()]
    given = grads, share, place
    torch.library.opcheck(torch.ops.fambav.pool_backward.default, given, options)
