"""The numba scan: agreement with the loop in float64, layouts, threads, and what NaN does."""

import pytest
import torch

from fambav.ops import force, selective_scan
from tests.ops.agreement import agree, draw, expected_scans

pytest.importorskip("numba")
from fambav.ops import kept_states
from fambav.ops import numba as numba_kernels

FULL = dict(D=True, bias=True, softplus=True, dlast=True)
BOTH = (False, True)


def drawn(reverse, batch, length, dim, groups, state):
    """Inputs of a scan and the gradients of its outputs."""
    directions = range(len(reverse))

    def tensor(name, *shape):
        return draw(name, len(reverse), batch, *shape).detach()

    return dict(
        u=tensor("u", length, dim),
        delta=tensor("delta", length, dim),
        A=[-draw(f"A{k}", dim, state).detach().exp() for k in directions],
        B=tensor("B", length, groups, state),
        C=tensor("C", length, groups, state),
        D=[draw(f"D{k}", dim).detach() for k in directions],
        bias=[draw(f"bias{k}", dim).detach() for k in directions],
        dy=tensor("dy", length, dim),
        dlast=tensor("dlast", dim, state),
    )


def plain(*shape):
    return torch.empty(shape)


def computed(given, reverse, place=plain, *, D, bias, softplus, dlast):
    """Results and gradients of the kernels, under their names."""
    inputs = {n: given[n] for n in ("u", "delta", "A", "B", "C")}
    inputs |= dict(D=given["D"] if D else None, bias=given["bias"] if bias else None)
    options = dict(softplus=softplus, reverse=reverse)
    places = {f"d{n}": place(*given[n].shape) for n in ("u", "delta", "B", "C")}
    y = place(*given["u"].shape)
    last, kept = numba_kernels.scan_forward(**inputs, y=y, **options, keep=True)
    dA, dD, dbias = numba_kernels.scan_backward(
        given["dy"], given["dlast"] if dlast else None, kept, **inputs, **places, **options
    )
    found = dict(y=y, last=last, **places, dA=dA)
    assert (dD is not None, dbias is not None) == (D, bias)
    return found | ({"dD": dD} if D else {}) | ({"dbias": dbias} if bias else {})


def slowed(given):
    """Inputs whose state does not leave the range of float32 where it grows."""
    return given | dict(A=[rate / 20 for rate in given["A"]])


def agrees(sizes, reverse=BOTH, **options):
    given = drawn(reverse, *sizes)
    want = expected_scans(given, reverse, **options)
    agree(computed(given, reverse, **options), want, torch.float32)


@pytest.mark.parametrize("state", [1, 3, 8, 16, 64])
@pytest.mark.parametrize("dim", [10, 64, 87])
def test_it_agrees_with_the_loop_for_any_dim_and_state(dim, state):
    agrees((2, 17, dim, 1, state), **FULL)


@pytest.mark.parametrize("length", [1, 5, 32, 33, 65, 197])
@pytest.mark.parametrize("reverse", [(False,), (True,), BOTH, (True, True)], ids=str)
def test_it_agrees_with_the_loop_for_any_length_and_direction(reverse, length):
    agrees((2, length, 20, 1, 4), reverse, **FULL)


@pytest.mark.parametrize(("groups", "dim"), [(2, 10), (2, 64), (4, 88), (87, 87), (3, 600)])
def test_channels_belong_to_their_group(groups, dim):
    agrees((2, 9, dim, groups, 8), **FULL)


@pytest.mark.parametrize("absent", ["D", "bias", "softplus", "dlast"])
def test_what_can_be_left_out_is_left_out(absent):
    given = slowed(drawn(BOTH, 2, 17, 24, 1, 16))
    options = FULL | {absent: False}
    agree(computed(given, BOTH, **options), expected_scans(given, BOTH, **options), torch.float32)


def test_many_tasks_share_a_large_batch():
    agrees((40, 5, 300, 1, 2), **FULL)


def test_a_state_that_grows_grows():
    given = slowed(drawn(BOTH, 2, 9, 24, 1, 4))
    given["A"] = [-rate for rate in given["A"]]
    agree(computed(given, BOTH, **FULL), expected_scans(given, BOTH, **FULL), torch.float32)


def in_wider_rows(*shape):
    return torch.full((*shape[:-1], shape[-1] + 9), 7.0)[..., 4:-5]


def channels_first(*shape):
    order = (0, 1, 3, 2) if len(shape) == 4 else (0, 1, 3, 4, 2)
    stored = torch.full([shape[axis] for axis in order], 7.0)
    return stored.permute([order.index(axis) for axis in range(len(shape))])


def every_second(*shape):
    return torch.full((*shape[:-1], 2 * shape[-1]), 7.0)[..., ::2]


def outside(place):
    """The numbers of the memory of a tensor that are not its own."""
    own = torch.zeros(place.untyped_storage().nbytes() // 4, dtype=torch.bool)
    own.as_strided(place.shape, place.stride(), place.storage_offset()).fill_(True)
    everything = torch.empty(0).set_(place.untyped_storage(), 0, own.shape)
    return everything[~own]


@pytest.mark.parametrize("layout", [in_wider_rows, channels_first, every_second])
@pytest.mark.parametrize("dim", [24, 48])
def test_strides_change_no_bit_and_nothing_is_written_beside_a_place(dim, layout):
    given = drawn(BOTH, 2, 33, dim, 1, 3)
    want = computed(given, BOTH, **FULL)
    moved = {n: layout(*x.shape).copy_(x) for n, x in given.items() if n in ("u", "delta", "dy")}
    moved |= {n: layout(*given[n].shape).copy_(given[n]) for n in ("B", "C")}
    places = []

    def place(*shape):
        places.append(layout(*shape))
        return places[-1]

    got = computed(given | moved, BOTH, place, **FULL)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, check_stride=False)
    assert len(places) == 5
    assert all((outside(x) == 7).all() for x in places)


def test_both_directions_may_share_a_gradient_that_is_repeated():
    given = drawn(BOTH, 2, 9, 24, 1, 4)
    shared = given["dy"][:1].expand(2, -1, -1, -1)
    repeated = given["dy"][:, :, :1, :1].expand_as(given["dy"])
    for dy in (shared, repeated):
        got = computed(given | dict(dy=dy), BOTH, **FULL)
        want = computed(given | dict(dy=dy.contiguous()), BOTH, **FULL)
        for name, tensor in want.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=0)


def test_places_of_another_dtype_are_rounded_results():
    given = drawn(BOTH, 2, 9, 24, 1, 4)
    want = computed(given, BOTH, **FULL)
    got = computed(given, BOTH, lambda *shape: torch.empty(shape, dtype=torch.bfloat16), **FULL)
    for name in ("y", "du", "ddelta", "dB", "dC"):
        torch.testing.assert_close(got[name], want[name].bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize(("batch", "dim"), [(1, 40), (3, 300)])
def test_the_number_of_threads_changes_no_bit(batch, dim):
    given = drawn(BOTH, batch, 65, dim, 1, 4)
    want = computed(given, BOTH, **FULL)
    try:
        for threads in (2, 3, 2):
            torch.set_num_threads(threads)
            for name, tensor in computed(given, BOTH, **FULL).items():
                torch.testing.assert_close(tensor, want[name], rtol=0, atol=0)
    finally:
        torch.set_num_threads(1)


def test_nothing_is_kept_where_nothing_is_wanted():
    given = drawn(BOTH, 2, 65, 24, 1, 4)
    inputs = {n: given[n] for n in ("u", "delta", "A", "B", "C", "D", "bias")}
    options = dict(softplus=True, reverse=BOTH)
    y, other = torch.empty_like(given["u"]), torch.empty_like(given["u"])
    last, kept = numba_kernels.scan_forward(**inputs, y=y, **options, keep=False)
    assert kept.shape == (0,)
    same, kept = numba_kernels.scan_forward(**inputs, y=other, **options, keep=True)
    assert kept.shape == kept_states.numba_shape(2, 2, 65, 24, 4)
    assert kept.is_contiguous()
    torch.testing.assert_close(other, y, rtol=0, atol=0)
    torch.testing.assert_close(same, last, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [0x7FC00000, -1, 0x7FC00001, -0x400000], ids=hex)
@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "A", "D", "bias", "dy"])
def test_nan_goes_where_it_goes_in_the_loop(name, bits):
    given = drawn((False,), 1, 5, 20, 1, 3)
    given = {n: x if torch.is_tensor(x) else torch.stack(x) for n, x in given.items()}
    given[name][0, ..., 1] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    options = FULL | dict(dlast=False)
    want = expected_scans(given, (False,), **options)
    got = computed(given, (False,), **options)
    assert any(tensor.isnan().any() for tensor in want.values())
    for key, tensor in want.items():
        assert (got[key].isnan() | ~tensor.isnan()).all(), f"{key} lost a NaN"


@pytest.mark.parametrize("number", [1e30, -1e30, float("inf"), float("-inf")])
@pytest.mark.parametrize("softplus", [False, True])
def test_a_large_step_does_what_it_does_in_the_loop(softplus, number):
    given = drawn((False,), 1, 3, 20, 1, 3)
    given["delta"][0, 0, 1] = number
    options = FULL | dict(softplus=softplus)
    inputs = {n: given[n] for n in ("u", "delta", "A", "B", "C", "D", "bias")}
    y = torch.empty_like(given["u"])
    numba_kernels.scan_forward(**inputs, y=y, softplus=softplus, reverse=(False,), keep=False)
    with force("reference"):
        want = selective_scan(
            *(given[n][0].movedim(1, -1) for n in ("u", "delta")),
            given["A"][0],
            *(given[n][0].movedim(1, -1) for n in ("B", "C")),
            given["D"][0],
            delta_bias=given["bias"][0],
            delta_softplus=options["softplus"],
        )
    torch.testing.assert_close(y[0], want.mT, equal_nan=True)


def one_step(delta, *, softplus):
    """Scan one token; y is the step size, and its gradient the slope."""
    one = torch.ones(1, 1, 1, len(delta))
    weight = torch.ones(1, 1, 1, 1, 1)
    inputs = dict(u=one, delta=delta.view_as(one), A=[-torch.ones(len(delta), 1)])
    inputs |= dict(B=weight, C=weight, D=None, bias=None)
    options = dict(softplus=softplus, reverse=(False,))
    y, slope, other = (torch.empty_like(one) for _ in range(3))
    _, kept = numba_kernels.scan_forward(**inputs, y=y, **options, keep=True)
    places = dict(du=other, ddelta=slope, dB=torch.empty(1, 1, 1, 1, 1))
    places |= dict(dC=torch.empty(1, 1, 1, 1, 1))
    numba_kernels.scan_backward(one, None, kept, **inputs, **places, **options)
    return y.flatten(), slope.flatten()


def test_softplus_and_its_slope_are_exact_to_a_millionth():
    x = torch.linspace(-90, 90, 180_001)
    got = one_step(x, softplus=True)
    wide = x.double()
    want = torch.log1p(wide.clamp(max=40).exp()).where(wide < 40, wide), wide.sigmoid()
    for found, exact in zip(got, want, strict=True):
        tiny = torch.finfo(torch.float32).tiny
        assert ((found.double() - exact).abs() <= 1e-6 * exact + tiny).all()


def test_softplus_of_what_is_no_number_or_beyond_all_numbers():
    y, slope = one_step(torch.tensor([float("inf"), float("-inf"), float("nan")]), softplus=True)
    assert y.tolist()[:2] == [float("inf"), 0]
    assert slope.tolist()[:2] == [1, 0]
    assert y[2].isnan()
    assert slope[2].isnan()


def test_decay_is_exact_to_a_millionth_and_ends_in_zero_and_infinity():
    exponents = torch.cat([torch.linspace(-126, 127.4, 100_001), torch.tensor([-127.5, -1e9])])
    exponents = torch.cat([exponents, torch.tensor([128.0, 1e9])])
    dim = len(exponents)
    u, delta = torch.zeros(1, 1, 2, dim), torch.ones(1, 1, 2, dim)
    u[:, :, 0], delta[:, :, 0] = 2.0**100, 2.0**-100  # a state of 1, hardly decayed
    rate = (exponents.double() * 0.6931471805599453).float()  # rounded again by the product
    y = torch.empty_like(u)
    weight = torch.ones(1, 1, 2, 1, 1)
    numba_kernels.scan_forward(
        *(u, delta, [rate[:, None]], weight, weight, None, None, y),
        softplus=False,
        reverse=(False,),
        keep=False,
    )
    found, exact = y[0, 0, 1].double(), rate.double().exp()
    assert found[-4:-2].tolist() == [0, 0]
    assert found[-2:].tolist() == [float("inf"), float("inf")]
    error = (found - exact).abs()[:-4] / exact[:-4]
    rounding = 2**-24 * rate[:-4].abs() * 2  # of the rate times log2(e)
    assert (error <= 1e-6 + rounding).all()
