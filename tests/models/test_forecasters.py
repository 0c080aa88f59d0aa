"""Forecasters: shapes, counts, and what must not change a forecast."""

import pytest
import torch
import torch.nn.functional as F

import fambav.models  # noqa: F401  registers the models
from fambav.data import load
from fambav.data.waves import waves_floor
from fambav.models import TSM2, DLinear
from fambav.registry import models_of
from fambav.seeding import seed_all
from fambav.timm_compat import timm

SMALL = dict(lookback=48, horizon=12)
PAST = torch.randn(3, 48, 4, generator=torch.Generator().manual_seed(0))


def build(name="tsm2", **arguments):
    seed_all(0)
    return timm.create_model(name, **{**SMALL, **arguments}).eval()


@pytest.mark.parametrize("name", models_of("forecasting"))
def test_every_forecaster_continues_any_number_of_variates(name):
    model = build(name)
    assert (model.lookback, model.horizon, model.num_classes) == (48, 12, 12)
    for variates in (1, 4):
        assert model(PAST[:, :, :variates]).shape == (3, 12, variates)
    (model(PAST) * torch.randn(3, 12, 4)).sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in silent if "logits" not in name] == []  # one output has no others
    with pytest.raises(ValueError, match=r"past is \(3, 47, 4\), expected \(batch, 48, variates\)"):
        model(PAST[:, 1:])
    with pytest.raises(ValueError, match="horizon is 0, expected at least 1"):
        build(name, horizon=0)
    with pytest.raises(ValueError, match="has no published weights"):
        build(name, pretrained=True)


def test_sizes_are_those_of_the_formulas():
    model = timm.create_model("tsm2", lookback=512, horizon=96)
    tokens, dim, inner, rank, depth = 63, 32, 64, 2, 2
    mixer = 3 * dim * inner + inner * (4 + 1) + inner * (rank + 32) + inner * (rank + 1)
    mixer += inner * 16 + inner
    scalars = depth * (2 * depth + 3)
    norms = depth * 2 * 2 * dim + 2 * dim + 2 * tokens
    head = tokens * dim * 96 + 96
    assert head == 193_632
    assert (sum(p.numel() for p in model.parameters())) == (
        16 * dim + dim + tokens * dim + depth * 3 * mixer + scalars + norms + head
    )
    linear = timm.create_model("dlinear", lookback=336, horizon=96)
    assert sum(p.numel() for p in linear.parameters()) == 2 * (336 * 96 + 96)


@pytest.mark.parametrize("name", models_of("forecasting"))
@pytest.mark.parametrize("variate", [0, 3])
def test_a_shifted_and_scaled_variate_shifts_and_scales_its_forecast(name, variate):
    """DLinear's weights sum to no 1, so that only its mean of the start is held to it."""
    model, moved = build(name), PAST.clone()
    moved[:, :, variate] = 7 * moved[:, :, variate] + 100
    if name == "dlinear":
        torch.nn.init.zeros_(model.Linear_Seasonal.bias)
        torch.nn.init.zeros_(model.Linear_Trend.bias)
    want = model(PAST)
    want[:, :, variate] = 7 * want[:, :, variate] + 100
    torch.testing.assert_close(model(moved), want, rtol=1e-4, atol=1e-4)


def test_a_constant_variate_is_continued_by_its_value():
    past = PAST.clone()
    past[:, :, 1] = 3.0
    forecast = build()(past)
    assert forecast.isfinite().all()
    torch.testing.assert_close(forecast[:, :, 1], torch.full((3, 12), 3.0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("mix", [False, True])
def test_the_order_of_variates_matters_only_to_their_mixer(mix):
    model, order = build(mix_variates=mix), torch.tensor([2, 0, 3, 1])
    same = torch.allclose(model(PAST[:, :, order]), model(PAST)[:, :, order], atol=1e-5)
    assert same is not mix
    alone = torch.allclose(model(PAST[:, :, :1]), model(PAST)[:, :, :1], atol=1e-5)
    assert alone is not mix


def test_tokens_are_mixed_from_past_to_future_and_variates_both_ways():
    model = build(depth=1)
    layer = model.layers[0]
    x = torch.randn(1, 4, 5, 32)
    changed = x.clone()
    changed[0, 1, 3] += 1
    tokens = (layer._mix_tokens(changed) - layer._mix_tokens(x)).abs().amax(-1)[0] > 0
    assert tokens.nonzero().tolist() == [[1, 3], [1, 4]]
    variates = (layer._mix_variates(changed) - layer._mix_variates(x)).abs().amax(-1)[0] > 0
    assert variates.nonzero().tolist() == [[n, 3] for n in range(4)]


def test_a_lookback_whose_last_rows_are_in_no_patch_is_refused():
    with pytest.raises(ValueError, match=r"lookback is 50, expected 16 and a multiple of 8"):
        build(lookback=50)
    assert build(lookback=16, joint_norm=True)(PAST[:, :16]).shape == (3, 12, 4)


def test_dlinear_is_its_formula():
    model = build("dlinear")
    torch.nn.init.normal_(model.Linear_Seasonal.weight)
    torch.nn.init.normal_(model.Linear_Trend.weight)
    row = PAST[0, :, 0]
    padded = torch.cat([row[:1].expand(12), row, row[-1:].expand(12)])
    trend = torch.stack([padded[n : n + 25].mean() for n in range(48)])
    want = model.Linear_Seasonal(row - trend) + model.Linear_Trend(trend)
    torch.testing.assert_close(model(PAST)[0, :, 0], want, rtol=1e-4, atol=1e-4)


def fitted(model, data, *, steps, lr, batch):
    """Train on random windows; return the MSE on every fourth held-out one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        numbers = torch.randint(len(data.train), (batch,)).tolist()
        past, future = (
            torch.stack(x) for x in zip(*map(data.train.__getitem__, numbers), strict=True)
        )
        F.mse_loss(model(past), future).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    held_out = map(data.val.__getitem__, range(0, len(data.val), 4))
    past, future = (torch.stack(x) for x in zip(*held_out, strict=True))
    with torch.no_grad():
        return F.mse_loss(model(past), future).item()


def test_on_waves_dlinear_stays_at_its_floor_and_tsm2_gets_below_it():
    sizes = dict(lookback=64, horizon=16)
    data = load("WAVES", **sizes)
    alone, together = (waves_floor(64, 16, together=known) for known in (False, True))
    seed_all(0)
    linear = fitted(DLinear(**sizes), data, steps=300, lr=1e-2, batch=64)
    assert 0.97 * alone < linear < 1.15 * alone
    mixed = fitted(TSM2(dim=16, depth=1, **sizes), data, steps=220, lr=2e-2, batch=32)
    assert 0.97 * together < mixed < 0.95 * alone
