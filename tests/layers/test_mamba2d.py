"""The mixer over a grid, whole or in part, against the official numbers and a plain loop."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from fambav.layers import INTERMEDIATES, Tokens
from fambav.layers.mamba2d import Mamba2D
from tests.golden import fill, hashed, load

GOLDEN, _ = load("plainmamba")
POLICIES = ["bias", "hold_prev", "self", "none"]
GRID = (4, 5)
MOVES = {(0, 1): 1, (0, -1): 2, (-1, 0): 3, (1, 0): 4}


def mixer(dtype=torch.float32, **arguments):
    return fill(Mamba2D(32, **{"grid": GRID, "state": 4, **arguments})).to(dtype)


def some(length, samples=2, seed=0):
    """Indices of some tokens of the grid, in any order."""
    generator = torch.Generator().manual_seed(seed)
    every = (torch.randperm(20, generator=generator)[:length] for _ in range(samples))
    return torch.stack(list(every))


def tokens(x, position, **known):
    return Tokens.start(x, cls_index=())._replace(position=position, **known)


def snakes(height, width):
    """The four orders, place by place, each with the move into the place."""
    down = [(r, c) for r in range(height) for c in range(width)[:: -1 if r % 2 else 1]]
    right = [(r, c) for c in range(width) for r in range(height)[:: -1 if c % 2 else 1]]
    for walk in (down, down[::-1], right, right[::-1]):
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(walk)]
        moves = [0, *(MOVES[step] for step in steps)]
        yield [(r * width + c, move) for (r, c), move in zip(walk, moves, strict=True)]


def gap_of(policy, skipped, delta, before, bias):
    each = {"bias": F.softplus(bias), "hold_prev": before, "self": delta, "none": 0.0 * delta}
    return skipped * each[policy]


def plain_loop(m, hidden, position, policy="none"):
    """What the mixer is, token by token.  Returns its output and what each scan gave."""
    height, width = m.grid
    x, z = (hidden @ m.in_proj.weight.T + m.in_proj.bias).chunk(2, dim=-1)
    image = x.new_zeros(len(x), height * width, x.shape[2])
    for sample, places in enumerate(position):
        image[sample, places] = x[sample]
    image = image.mT.unflatten(2, m.grid)
    image = F.conv2d(image, m.conv2d.weight, m.conv2d.bias, padding=3, groups=x.shape[2])
    A, bias, out = -m.A_log.exp(), m.dt_proj.bias * (1 + m.dt_bias_twice), []
    ys = x.new_zeros(len(x), 4, *x.shape[1:])
    for sample, places in enumerate(position.tolist()):
        u = F.silu(image[sample].flatten(1).T[places])
        dt, B, C = (u @ m.x_proj.weight.T).split(m.splits, dim=1)
        delta = F.softplus(dt @ m.dt_proj.weight.T + bias)
        raster = sorted(range(len(places)), key=places.__getitem__)
        for direction, walk in enumerate(snakes(height, width)):
            steps = [(step, place, move) for step, (place, move) in enumerate(walk)]
            left = [step for step in steps if step[1] in places]
            h, before, last = x.new_zeros(x.shape[2], A.shape[1]), delta[0], None
            for k, (step, place, move) in enumerate(left):
                token = places.index(place)
                own = token if m.param_order == "permuted" else raster[k]
                skipped = 0 if last is None else step - last - 1
                gap = gap_of(policy, skipped, delta[own], before, bias)
                drive = (delta[own] * u[token])[:, None] * (B[own] + m.direction_Bs[move])
                h = torch.exp((delta[own] + gap)[:, None] * A) * h + drive
                ys[sample, direction, token] = h @ C[own] + m.D * u[token]
                before, last = delta[own], step
        gated = ys[sample].sum(dim=0) * F.silu(z[sample])
        out.append(gated @ m.out_proj.weight.T + m.out_proj.bias)
    return torch.stack(out), ys


@pytest.mark.parametrize("name", ["4x4", "5x7", "4x6"])
def test_it_agrees_with_the_official_mixer(name):
    height, width = map(int, name.split("x"))
    m = fill(Mamba2D(32, grid=(height, width)))
    hidden = hashed(f"pmixer:{name}", 2, height * width, 32)
    torch.testing.assert_close(m(hidden), GOLDEN[f"mixer_{name}"], atol=5e-6, rtol=0)


@pytest.mark.parametrize("twice", [True, False])
@pytest.mark.parametrize("param_order", ["raster", "permuted"])
@torch.no_grad()
def test_a_whole_grid_agrees_with_a_plain_loop(param_order, twice):
    m = mixer(torch.float64, param_order=param_order, dt_bias_twice=twice)
    hidden = hashed("whole", 2, 20, 32, dtype=torch.float64)
    expected, _ = plain_loop(m, hidden, torch.arange(20).expand(2, -1))
    torch.testing.assert_close(m(hidden), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 9, 19])
@pytest.mark.parametrize("param_order", ["raster", "permuted"])
@torch.no_grad()
def test_a_part_of_a_grid_agrees_with_a_plain_loop(param_order, length):
    m = mixer(torch.float64, param_order=param_order)
    hidden, position = hashed("part", 2, length, 32, dtype=torch.float64), some(length)
    expected, _ = plain_loop(m, hidden, position)
    out, _ = m(hidden, tokens(hidden, position))
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_states_age_over_gaps_as_in_a_plain_loop(policy):
    m = mixer(torch.float64, param_order="permuted")
    hidden, position = hashed("part", 2, 8, 32, dtype=torch.float64), some(8)
    expected, ys = plain_loop(m, hidden, position, policy)
    given = tokens(hidden, position)
    out, intermediates = m(hidden, given, want=frozenset({"y"}), gap_policy=policy)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(intermediates.y, ys, atol=1e-12, rtol=0)
    if policy != "none":
        plain, _ = m(hidden, given, want=frozenset({"y"}))
        assert (out - plain).abs().max() > 1e-4


@torch.no_grad()
def test_step_sizes_that_tokens_carry_are_used_in_every_direction():
    m = mixer(torch.float64, param_order="permuted")
    hidden, position = hashed("part", 2, 8, 32, dtype=torch.float64), some(8)
    want = frozenset({"delta"})
    expected, intermediates = m(hidden, tokens(hidden, position), want=want, gap_policy="self")
    ranks = torch.stack([torch.tensor([p for p, _ in walk]).argsort() for walk in snakes(*GRID)])
    step = ranks[None].expand(2, -1, -1).gather(2, position[:, None].expand(-1, 4, -1))
    before = step[..., None] - step[..., None, :]  # how far each other token is behind
    skipped = torch.where(before > 0, before, 99).min(dim=3).values - 1
    gap = torch.where(skipped < 90, skipped, 0)[..., None] * intermediates.delta
    out, _ = m(hidden, tokens(hidden, position, skipped_dt=gap), gap_policy="cached")
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    nothing, _ = m(hidden, tokens(hidden, position), gap_policy="cached")
    plain, _ = m(hidden, tokens(hidden, position))
    torch.testing.assert_close(nothing, plain, atol=1e-12, rtol=0)


@pytest.mark.parametrize("param_order", ["raster", "permuted"])
def test_all_places_in_any_order_give_what_the_whole_grid_gives(param_order):
    m = mixer(param_order=param_order)
    hidden, position = hashed("whole", 2, 20, 32), some(20)
    expected = m(hidden)
    same = tokens(hidden, torch.arange(20).expand(2, -1))
    torch.testing.assert_close(m(hidden, same)[0], expected, atol=1e-6, rtol=0)
    whole = tokens(hidden, position, grid=GRID)  # a grid needs no places
    assert torch.equal(m(hidden, whole)[0], expected)
    index = position[..., None].expand(-1, -1, 32)
    want = frozenset({"mixed"})
    out, intermediates = m(hidden.gather(1, index), tokens(hidden, position), want=want)
    torch.testing.assert_close(out, expected.gather(1, index), atol=1e-6, rtol=0)
    assert torch.equal(intermediates.mixed, out)


def test_a_smaller_grid_is_mixed_like_a_grid_of_that_size():
    small, large = mixer(grid=(2, 3)), mixer()
    hidden = hashed("small", 2, 6, 32)
    given = tokens(hidden, some(6), grid=(2, 3))
    assert torch.equal(large(hidden, given)[0], small(hidden))


def test_masked_tokens_are_mixed_on_the_whole_grid():
    m, hidden = mixer(), hashed("whole", 2, 20, 32)
    masked = tokens(hidden, some(8), keep_index=some(8))
    assert torch.equal(m(hidden, masked)[0], m(hidden))


@pytest.mark.parametrize("param_order", ["raster", "permuted"])
@torch.no_grad()
def test_intermediates_are_what_each_token_s_scan_step_used(param_order):
    m = mixer(torch.float64, param_order=param_order)
    hidden, position = hashed("part", 2, 9, 32, dtype=torch.float64), some(9)
    out, intermediates = m(hidden, tokens(hidden, position), want=INTERMEDIATES)
    assert set(intermediates._fields) == INTERMEDIATES | {"order"}
    y, z = intermediates.y, intermediates.z[:, None]
    positive = (y * F.silu(z)).clamp(min=0).sum(dim=3, keepdim=True)
    torch.testing.assert_close(intermediates.gated, positive, atol=1e-12, rtol=0)
    _, ys = plain_loop(m, hidden, position)
    torch.testing.assert_close(intermediates.y, ys, atol=1e-12, rtol=0)
    A, again = -m.A_log.exp(), torch.zeros_like(intermediates.y)
    for sample in range(2):
        for direction in range(4):
            h = 0
            for token in intermediates.order[sample, direction].tolist():
                u, delta, B, C = (
                    signal[sample, direction, token]
                    for signal in (
                        intermediates.u,
                        intermediates.delta,
                        intermediates.B,
                        intermediates.C,
                    )
                )
                h = torch.exp(delta[:, None] * A) * h + (delta * u)[:, None] * B
                again[sample, direction, token] = h @ C + m.D * u
    torch.testing.assert_close(intermediates.y, again, atol=1e-12, rtol=0)
    gated = (
        intermediates.y.sum(dim=1) * F.silu(intermediates.z)
    ) @ m.out_proj.weight.T + m.out_proj.bias
    torch.testing.assert_close(gated, out, atol=1e-12, rtol=0)
    assert intermediates.mixed is out


def test_only_what_is_wanted_is_returned():
    m, hidden = mixer(), hashed("whole", 2, 20, 32)
    for want in (frozenset(), frozenset({"C"}), frozenset({"delta", "z"})):
        out, intermediates = m(hidden, tokens(hidden, some(20), grid=GRID), want=want)
        found = {name for name, signal in intermediates._asdict().items() if signal is not None}
        assert found == want | {"order"}
        torch.testing.assert_close(out, m(hidden), atol=1e-6, rtol=0)


def test_every_parameter_learns_from_a_part_of_a_grid():
    m = mixer(param_order="permuted").train()
    hidden = hashed("part", 2, 8, 32)
    out, _ = m(hidden, tokens(hidden, some(8)), gap_policy="hold_prev")
    (out * torch.randn(2, 8, 32)).sum().backward()
    assert [n for n, p in m.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_gradients_of_a_part_are_those_of_a_plain_loop():
    m, position = mixer(torch.float64, param_order="raster"), some(6)
    weight = hashed("weight", 2, 6, 32, dtype=torch.float64)
    found = []
    for run in (
        lambda x: m(x, tokens(x, position))[0],
        lambda x: plain_loop(m, x, position)[0],
    ):
        m.zero_grad()
        hidden = hashed("part", 2, 6, 32, dtype=torch.float64).requires_grad_()
        (run(hidden) * weight).sum().backward()
        found.append({"hidden": hidden.grad} | {n: p.grad for n, p in m.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], atol=1e-11, rtol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("arguments", "known", "gap", "message"),
    [
        ({}, {}, "self", "gap policy is 'self', expected none, since its weights pair"),
        ({}, {"grid": (2, 3)}, None, "hidden has 8 tokens, expected 6 for a grid of 2 x 3"),
        ({"param_order": "permuted"}, {"grid": (2, 4)}, "self", "expected 'cached' for a grid"),
    ],
)
def test_tokens_that_cannot_be_mixed_are_refused(arguments, known, gap, message):
    hidden = hashed("part", 2, 8, 32)
    with pytest.raises(ValueError, match=message):
        mixer(**arguments)(hidden, tokens(hidden, some(8), **known), gap_policy=gap)


def test_a_sequence_of_another_length_and_an_unknown_order_are_refused():
    with pytest.raises(ValueError, match="hidden has 8 tokens, expected 20 for a grid of 4 x 5"):
        mixer()(hashed("part", 2, 8, 32))
    with pytest.raises(ValueError, match=r"param_order is 'rastr'.*did you mean 'raster'"):
        mixer(param_order="rastr")


def test_bfloat16_is_close_to_float32():
    m, hidden = mixer(), hashed("whole", 2, 20, 32)
    exact = m(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        rough = m(hidden)
        composed, _ = m(hidden, tokens(hidden, some(20), grid=GRID), want=INTERMEDIATES)
    assert rough.dtype == torch.bfloat16
    for out in (rough, composed):
        assert (out.float() - exact).norm() < 0.02 * exact.norm()
