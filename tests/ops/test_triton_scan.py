"""The Triton scan: agreement with the loop in float64, layouts, types, and what NaN does."""

from functools import partial
from importlib import import_module

import pytest
import torch

from tests.ops.agreement import (
    ROUNDED,
    agrees_twice,
    device_of,
    draw,
    every_length,
    expected_scans,
)
from tests.ops.places import close, like, place, unwritten_around

pytest.importorskip("triton")
import triton.language as tl

from fambav.ops import kept_states
from fambav.ops import triton as triton_kernels

MODULES = [import_module(f"fambav.ops.triton.scan_{way}") for way in ("forward", "backward")]
DEVICE = device_of("triton")
FULL = dict(D=True, bias=True, softplus=True, dlast=True)
BOTH, ONE = (False, True), (False,)
TOKENS = ("u", "delta", "B", "C", "dy")
# Channels, state numbers and their groups, directions, and what differs from FULL.
FORMS = (
    (384, 16, 1, BOTH, dict(dlast=False, block=64)),
    (87, 3, 1, BOTH, dict(softplus=False)),
    (48, 8, 2, BOTH, dict(D=False, bias=False, dlast=False)),
    (64, 1, 4, (True,), {}),
    (8, 64, 1, ONE, dict(dlast=False)),
    (33, 12, 1, (True, True), {}),
    (192, 16, 1, ONE, dict(D=False, bias=False)),
    (128, 16, 1, BOTH, dict(block=128)),
)
TRAINED = [
    pytest.param(128, length, 384, dtype, marks=pytest.mark.gpu, id=f"{length}-{dtype}")
    for dtype in ROUNDED
    for length in (197, 130, 65, 29)
]


def drawn(reverse, batch, length, dim, groups, state, dtype=torch.float32):
    """Inputs of a scan and the gradients of its outputs."""
    shapes = dict(u=(length, dim), B=(length, groups, state), dlast=(dim, state))
    shapes |= dict(delta=shapes["u"], dy=shapes["u"], C=shapes["B"])
    shapes |= dict(A=(dim, state), D=(dim,), bias=(dim,))
    given = {}
    for name, shape in shapes.items():
        several = () if name in ("A", "D", "bias") else (batch,)
        tensor = draw(name, len(reverse), *several, *shape).detach()
        given[name] = tensor.to(DEVICE, dtype if name in TOKENS else torch.float32)
    return given | dict(A=-given["A"].exp())


def computed(given, reverse, layout="plain", *, D, bias, softplus, dlast, **choice):
    """Results and gradients of the kernels, under their names."""
    inputs = {n: given[n] for n in ("u", "delta", "A", "B", "C")}
    inputs |= dict(D=given["D"] if D else None, bias=given["bias"] if bias else None)
    options = dict(softplus=softplus, reverse=reverse, **choice)
    names = dict(y="u", du="u", ddelta="delta", dB="B", dC="C")
    places = {
        name: place(*given[n].shape, dtype=given[n].dtype, layout=layout, device=DEVICE)
        for name, n in names.items()
    }
    y = places.pop("y")
    last, kept = triton_kernels.scan_forward(**inputs, y=y, **options, keep=True)
    dA, dD, dbias = triton_kernels.scan_backward(
        given["dy"], given["dlast"] if dlast else None, kept, **inputs, **places, **options
    )
    found = dict(y=y, last=last, **places, dA=dA)
    assert (dD is not None, dbias is not None) == (D, bias)
    assert {last.dtype, kept.dtype, dA.dtype} == {torch.float32}
    return found | ({"dD": dD} if D else {}) | ({"dbias": dbias} if bias else {})


def agrees(sizes, reverse=BOTH, dtype=torch.float32, **choice):
    given = drawn(reverse, *sizes, dtype=dtype)
    compare(computed(given, reverse, **FULL, **choice), expected_scans(given, reverse, **FULL))


def compare(got, want):
    assert got.keys() == want.keys()
    for name, exact in want.items():
        close(got[name], exact)


@every_length((2, torch.float32), dense=True)
def test_every_length_agrees_on_rows_with_and_without_alignment(length, dtype, record_property):
    given, layout = drawn(BOTH, 2, length, 40, 1, 16, dtype), ("plain", "slice")[length % 2]
    given |= {n: like(given[n], layout) for n in ("B", "C")}
    want = expected_scans(given, BOTH, **FULL)
    agrees_twice(lambda: computed(given, BOTH, layout, **FULL), want, dtype, record_property)


@every_length((2, torch.float32))
def test_every_length_agrees_in_forms_in_turn(length, dtype, record_property):
    dim, state, groups, reverse, more = FORMS[length % len(FORMS)]
    given, options = drawn(reverse, 2, length, dim, groups, state, dtype), FULL | more
    choice = {"block": options.pop("block")} if "block" in options else {}
    if not options["softplus"]:
        given |= dict(delta=given["delta"].abs() / 4, bias=given["bias"].abs())
    want = expected_scans(given, reverse, **options)
    run = partial(computed, given, reverse, **options, **choice)
    agrees_twice(run, want, dtype, record_property)


@pytest.mark.parametrize(("batch", "length", "dim", "dtype"), [(1, 5, 6, torch.float32), *TRAINED])
def test_every_length_of_a_training_batch_agrees(batch, length, dim, dtype, record_property):
    given, options = drawn(BOTH, batch, length, dim, 1, 16, dtype), FULL | dict(dlast=False)
    want = expected_scans(given, BOTH, **options, backend="cpu", device=DEVICE)
    agrees_twice(partial(computed, given, BOTH, **options), want, dtype, record_property)


@pytest.mark.parametrize("length", [1, 5])
def test_it_agrees_with_the_loop_in_both_directions(length):
    agrees((1, length, 10, 1, 16))


@pytest.mark.parametrize("reverse", [(False,), (True,), BOTH], ids=str)
def test_it_agrees_with_the_loop_beyond_a_chunk(reverse):
    agrees((1, 19, 6, 1, 4), reverse)


def test_it_agrees_with_the_loop_from_chunk_to_chunk():
    agrees((1, 35, 6, 1, 8))


@pytest.mark.parametrize("length", [2, 4, 11])
def test_states_may_be_kept_at_any_even_distance(length):
    agrees((1, length, 6, 1, 4), chunk=4)


def test_states_are_kept_at_the_distance_asked_for():
    given = drawn(ONE, 1, 11, 6, 1, 4)
    inputs = {n: given[n] for n in ("u", "delta", "A", "B", "C", "D", "bias")}
    kept = {}
    for chunk in (2, 4):
        y = place(*given["u"].shape, device=DEVICE)
        options = dict(softplus=True, reverse=ONE, keep=True, chunk=chunk)
        kept[chunk] = triton_kernels.scan_forward(**inputs, y=y, **options)[1]
        assert kept[chunk].shape == kept_states.triton_shape(1, 1, 11, 6, 4, chunk=chunk)
    assert kept[4].shape[2] == 2
    assert torch.equal(kept[2][:, :, [1, 3]], kept[4])


def test_states_cannot_be_kept_at_an_odd_distance():
    given = drawn(ONE, 1, 4, 6, 1, 4)
    with pytest.raises(ValueError, match="chunk is 3, expected a multiple of 2"):
        computed(given, ONE, **FULL, chunk=3)


@pytest.mark.parametrize("state", [1, 3, 8, 24])
def test_it_agrees_with_the_loop_for_any_state(state):
    agrees((1, 3, 6, 1, state), ONE)


@pytest.mark.parametrize(("groups", "dim"), [(1, 87), (4, 8), (2, 80)])
def test_channels_that_fill_no_block_belong_to_their_group(groups, dim):
    agrees((2, 2, dim, groups, 4), ONE)


@pytest.mark.parametrize("absent", ["D", "bias", "softplus", "dlast"])
def test_what_can_be_left_out_is_left_out(absent):
    given = drawn(ONE, 1, 3, 6, 1, 4)
    given |= dict(A=given["A"] / 20)  # without softplus a state may grow
    options = FULL | {absent: False}
    compare(computed(given, ONE, **options), expected_scans(given, ONE, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_tokens_are_computed_in_float32(dtype):
    agrees((1, 5, 10, 1, 8), ONE, dtype)


@pytest.mark.parametrize("choice", [dict(block=64, warps=2), dict(block=64, warps=1)], ids=str)
def test_any_block_gives_the_same_result(choice):
    agrees((1, 17, 87, 1, 4), ONE, **choice)


def test_programs_are_wide_where_there_are_enough():
    widths = {walks: MODULES[0].fast_block(walks, 384, 16) for walks in (1, 64, 256)}
    assert widths == {1: 32, 64: 32, 256: 64}
    assert MODULES[0].fast_block(10_000, 32, 16) == 32
    assert MODULES[0].fast_block(10_000, 384, 64) == 32


@pytest.mark.parametrize("layout", ["transposed", "slice"])
def test_any_strides_are_read_and_written(layout):
    given = drawn(BOTH, 1, 3, 6, 1, 4)
    strided = {n: like(x, layout) if n in TOKENS else x for n, x in given.items()}
    got = computed(strided, BOTH, layout, **FULL)
    compare(got, expected_scans(given, BOTH, **FULL))
    for name in ("y", "du", "ddelta", "dB", "dC") if layout == "slice" else ():
        assert unwritten_around(got[name])


@pytest.mark.parametrize("length", [1, 2, 4, 5])
def test_no_number_before_the_first_token_or_after_the_last_is_used(length):
    given = drawn(BOTH, 1, length, 6, 1, 3)
    inner = {n: like(x, "slice") if n in TOKENS else x for n, x in given.items()}
    got = computed(inner, BOTH, "slice", **FULL, chunk=4)
    compare(got, expected_scans(given, BOTH, **FULL))
    assert all(unwritten_around(got[name]) for name in ("y", "du", "ddelta", "dB", "dC"))


def test_parameters_may_be_views():
    given = drawn(BOTH, 1, 3, 6, 1, 4)
    views = given | {n: given[n].repeat_interleave(2, dim=-1)[..., ::2] for n in ("A", "D", "bias")}
    views |= dict(dlast=given["dlast"].mT.contiguous().mT)
    compare(computed(views, BOTH, **FULL), expected_scans(given, BOTH, **FULL))


def test_directions_may_share_a_gradient():
    given = drawn(BOTH, 1, 3, 6, 1, 4)
    given |= dict(dy=given["dy"][:1].expand_as(given["dy"]))
    compare(computed(given, BOTH, **FULL), expected_scans(given, BOTH, **FULL))


def test_far_tokens_have_long_distances(monkeypatch):
    far = torch.empty_strided((1, 1, 2, 1), (0, 0, 2**30, 1), device="meta")
    assert MODULES[0].index_type(1, far) == tl.int32
    assert MODULES[0].index_type(2, far) == tl.int64
    for module in MODULES:
        monkeypatch.setattr(module, "index_type", lambda *_: tl.int64)
    agrees((1, 3, 6, 1, 4))


def test_two_equal_calls_give_equal_bits():
    given = drawn(ONE, 2, 3, 40, 1, 4)
    first, second = (computed(given, ONE, **FULL) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_a_gradient_nothing_is_kept():
    given = drawn(ONE, 1, 18, 6, 1, 1)
    inputs = {n: given[n] for n in ("u", "delta", "A", "B", "C", "D", "bias")}
    results = []
    for keep in (False, True):
        y = place(*given["u"].shape, device=DEVICE)
        last, kept = triton_kernels.scan_forward(
            **inputs, y=y, softplus=True, reverse=ONE, keep=keep
        )
        results.append((y, last))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert kept.shape == kept_states.triton_shape(1, 1, 18, 6, 1)
    assert kept.isfinite().all()
    assert kept.numel()


@pytest.mark.parametrize("name", ["u", "delta", "B", "C"])
def test_nan_spreads_along_the_scan_and_no_further(name):
    given = drawn(BOTH, 2, 4, 6, 1, 4)
    given[name][:, 0, 1] = float("nan")
    got = computed(given, BOTH, **FULL)
    tokens = [slice(1, 2)] * 2 if name == "C" else [slice(1, None), slice(2)]
    for k, reached in enumerate(tokens):
        lost = got["y"][k, 0].isnan().all(dim=1)
        assert lost.tolist() == [t in range(4)[reached] for t in range(4)]
    assert got["dA"].isnan().all()
    for one in ("y", "last", "du", "ddelta", "dB", "dC"):
        assert got[one][:, 1].isfinite().all()


def test_softplus_and_its_slope_are_accurate_far_out():
    x = torch.linspace(-40, 40, 321, dtype=torch.float64)
    x, dim = x.float().to(DEVICE), len(x)
    ones = torch.ones(1, 1, 1, dim, device=DEVICE)
    row = torch.ones(1, 1, 1, 1, 1, device=DEVICE)
    A = [torch.zeros(dim, 1, device=DEVICE)]
    inputs = dict(u=ones, delta=x.view_as(ones), A=A, B=row, C=row, D=None, bias=None)
    options = dict(softplus=True, reverse=ONE)
    last, kept = triton_kernels.scan_forward(
        **inputs, y=torch.empty_like(ones), **options, keep=True
    )
    places = {f"d{n}": torch.empty_like(inputs[n]) for n in ("u", "delta", "B", "C")}
    triton_kernels.scan_backward(ones, None, kept, **inputs, **places, **options)
    exact = x.cpu().double().clone().requires_grad_()
    value = torch.log1p(exact.exp())
    (slope,) = torch.autograd.grad(value.sum(), exact)
    for got, want in ((last, value.detach()), (places["ddelta"], slope)):
        error = (got.cpu().double().flatten() / want - 1).abs()
        assert error[x.cpu().abs() <= 10].max() < 1e-6
        assert error.max() < 2e-6


@pytest.mark.parametrize("module", MODULES)
def test_every_argument_of_a_compiled_form_is_told(module):
    forms = list(module.variants())
    assert len({form.name for form in forms}) == len(forms)
    for form in forms:
        assert form.types.keys() | form.constants.keys() == set(form.kernel.arg_names)
        assert not form.types.keys() & form.constants.keys()
        assert {*form.aligned, *form.ones} <= form.types.keys()
