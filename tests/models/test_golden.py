"""Whole models against the numbers of the official code."""

import pytest
import torch

from fambav.models import Vim
from tests.golden import fill, hashed, images, load

PLAIN, PLAIN_CASES = load("vim")
FUSED, FUSED_CASES = load("fambav")
MODELS = [name for name in PLAIN_CASES if name.startswith("s_")]


def build(case):
    model = fill(Vim(**case["arguments"]))
    return model, images(case["image_keys"], *model.img_size)


def streams(model, batch):
    """The feature, and what each block gave: x (its mixer's output) and the residual stream."""
    seen = []
    for block in model.layers:
        block.register_forward_hook(lambda _module, _args, tokens: seen.append(tokens))
    with torch.no_grad():
        feature = model.forward_head(model.forward_features(batch), pre_logits=True)
    return feature, [tokens.x for tokens in seen], [tokens.residual for tokens in seen]


def near(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def check_streams(arrays, name, model, batch):
    feature, hidden, residual = streams(model, batch)
    near(model.head(feature), arrays[f"{name}/logits"], 3e-5)
    near(model(batch), arrays[f"{name}/logits"], 3e-5)
    near(feature, arrays[f"{name}/feat"], 3e-5)
    for kind, stream in (("hidden", hidden), ("residual", residual)):
        norms = torch.stack([x.flatten(1).norm(dim=1) for x in stream])
        torch.testing.assert_close(norms, arrays[f"{name}/{kind}_norm"], rtol=1e-6, atol=0)
        for layer, x in enumerate(stream):
            whole, part = f"{name}/{kind}", f"{name}/L{layer}/{kind}"
            if whole in arrays:
                near(x[..., :8], arrays[whole][layer], 5e-5)
            if part in arrays:
                near(x[..., :8], arrays[part], 5e-5)


def check_gradients(arrays, case, name, model, batch):
    (model(batch) * hashed("gout", 2, 10)).sum().backward()
    parameters = dict(model.named_parameters())
    assert list(parameters) == case["grad_names"]
    norms, dots = arrays[f"{name}/grad_norm"], arrays[f"{name}/grad_dot"]
    for key, norm, dot in zip(parameters, norms.tolist(), dots.tolist(), strict=True):
        grad = parameters[key].grad.double()
        projected = (grad * hashed(f"proj:{key}", *grad.shape, dtype=torch.float64)).sum()
        exact = 1e-3 if key.endswith("skip_scale") else 1e-4  # a difference of large terms
        tolerance = exact * max(norm, 0.01)
        assert grad.norm().item() == pytest.approx(norm, abs=tolerance), key
        assert projected.item() == pytest.approx(dot, abs=tolerance), key


@pytest.mark.parametrize("name", MODELS)
def test_models_of_every_kind_agree_with_the_official_code(name):
    check_streams(PLAIN, name, *build(PLAIN_CASES[name]))


@pytest.mark.parametrize("name", ["s_mid_v2", "s_mid_none", "s_double_v2", "s_mid_v1"])
def test_gradients_agree_with_the_official_code(name):
    case = PLAIN_CASES[name]
    check_gradients(PLAIN, case, name, *build(case))


@pytest.mark.parametrize("name", FUSED_CASES)
def test_fused_models_agree_with_the_paper_s_code(name):
    model, batch = build(FUSED_CASES[name])
    assert list(model.schedule.lengths) == FUSED[f"{name}/tokens"].tolist()
    check_streams(FUSED, name, model, batch)


@pytest.mark.parametrize("name", FUSED_CASES)
def test_a_trace_names_the_group_of_every_token(name):
    model, batch = build(FUSED_CASES[name])
    with torch.no_grad():
        rows, trace = model.forward_features(batch, trace=True)
        feature = model.forward_head(rows, pre_logits=True)
    assert len(trace.sources) == model.depth
    assert trace.sources[-1].tolist() == FUSED[f"{name}/group"].tolist()
    for source, length in zip(trace.sources, model.schedule.lengths, strict=True):
        assert all(set(row.tolist()) == set(range(length)) for row in source)
    near(feature, FUSED[f"{name}/feat"], 3e-5)


@pytest.mark.parametrize("name", ["none", "all_r2"])
def test_gradients_through_fusion_agree_with_the_paper_s_code(name):
    case = FUSED_CASES[name]
    check_gradients(FUSED, case, name, *build(case))
