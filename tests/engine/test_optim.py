"""Learning rate, parameter groups and moving average."""

import pytest
import torch
from torch import nn

from fambav.engine.optim import Average, cosine, groups, optimizer, scaled
from fambav.timm_compat import timm
from tests import golden

CASES = ["base5e-4", "base1e-3", "vim_finetune30", "short20"]


def rate(case, *, updates, late):
    arguments = {k: case[k] for k in ("lr", "epochs", "warmup_epochs", "warmup_lr", "min_lr")}
    return cosine(arguments.pop("lr"), updates=updates, late=late, **arguments)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("updates", [1, 97])
def test_learning_rate_at_whole_epochs_is_the_published_schedule(name, updates):
    arrays, text = golden.load("schedule")
    lr = rate(text["cases"][f"lr/{name}"], updates=updates, late=False)
    expected = arrays[f"lr/{name}/nolag"].tolist()
    assert [lr(e * updates) for e in range(len(expected))] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_late_learning_rate_is_constant_in_an_epoch_and_one_epoch_behind(name):
    arrays, text = golden.load("schedule")
    lr = rate(text["cases"][f"lr/{name}"], updates=7, late=True)
    expected = arrays[f"lr/{name}/lag"].tolist()
    for inside in (0, 3, 6):
        found = [lr(7 * epoch + inside) for epoch in range(len(expected))]
        assert found == pytest.approx(expected, rel=1e-12)


def test_learning_rate_changes_with_every_update_and_ends_at_its_floor():
    case = golden.load("schedule")[1]["cases"]["lr/base5e-4"]
    lr = rate(case, updates=10, late=False)
    assert lr(1) == pytest.approx(1e-6 + 0.02 * (5e-4 - 1e-6))
    assert lr(3000) == lr(4000) == case["value_at_epochs_end"]


def test_learning_rate_without_warm_up_starts_at_its_peak():
    lr = cosine(0.1, epochs=2, updates=5, warmup_epochs=0, warmup_lr=9.0, min_lr=0.0)
    assert lr(0) == pytest.approx(0.1)
    assert lr(5) == pytest.approx(0.05)


@pytest.mark.parametrize("warmup", [0, 3, 10])
def test_the_cosine_after_the_warm_up_is_that_of_timm(warmup):
    lr = cosine(
        0.1, epochs=10, updates=4, warmup_epochs=warmup, warmup_lr=1e-3, min_lr=1e-2, prefix=True
    )
    from timm.scheduler import CosineLRScheduler  # behind timm_compat

    cycle = dict(warmup_t=warmup, warmup_lr_init=1e-3, warmup_prefix=True, lr_min=1e-2)
    held = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1)
    theirs = CosineLRScheduler(held, t_initial=max(10 - warmup, 1), **cycle)
    for epoch in range(10):
        assert lr(4 * epoch) == pytest.approx(theirs._get_lr(epoch)[0], rel=1e-12)
    assert lr(40) == pytest.approx(1e-2)


def test_linear_scaling_is_by_images_over_512():
    for base, batch, world, expected in golden.load("schedule")[1]["cases"]["linear_scaling"][
        "cases"
    ]:
        assert scaled(base, images=batch * world) == pytest.approx(expected, rel=1e-12)


def names(model, group):
    of = {id(parameter): name for name, parameter in model.named_parameters()}
    return [of[id(parameter)] for parameter in group["params"]]


@pytest.fixture(scope="module")
def vim_tiny():
    import fambav.models  # noqa: F401  registers it

    return timm.create_model("vim_tiny", img_size=32)


def test_published_groups_are_those_of_the_released_loop(vim_tiny):
    case = golden.load("schedule")[1]["cases"]["wd_groups_vim_tiny"]
    spared, decayed = (
        names(vim_tiny, g) for g in groups(vim_tiny, weight_decay=0.1, rule="published")
    )
    assert (len(decayed), len(spared)) == (case["decayed"], case["undecayed"])
    assert set(case["decayed_layer0"]) | set(case["decayed_other"]) <= set(decayed)
    assert set(case["undecayed_layer0"]) | set(case["undecayed_other"]) <= set(spared)


def test_default_groups_spare_the_decay_rates_too(vim_tiny):
    published, default = (
        set(names(vim_tiny, groups(vim_tiny, weight_decay=0.1, rule=rule)[1]))
        for rule in ("published", "default")
    )
    assert default < published
    assert {name.rsplit(".", 1)[-1] for name in published - default} == {"A_log", "A_b_log"}
    assert len(published - default) == 48


class Marked(nn.Module):
    def __init__(self):
        super().__init__()
        self.listed, self.marked, self.plain, self.frozen = (
            nn.Parameter(torch.ones(2, 2)) for _ in range(4)
        )
        self.marked._no_weight_decay = True
        self.frozen.requires_grad_(False)

    def no_weight_decay(self):
        return {"listed"}


def test_a_model_says_what_must_not_decay():
    model = Marked()
    spared, decayed = groups(model, weight_decay=0.1)
    assert (names(model, spared), names(model, decayed)) == (["listed", "marked"], ["plain"])
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0.0, 0.1)


@pytest.mark.parametrize("name", ["adamw", "adam", "nadamw", "lamb", "lion", "sgd"])
def test_every_optimizer_steps_and_keeps_the_groups(name):
    model = Marked()
    found = optimizer(
        groups(model, weight_decay=0.1), name=name, lr=0.1, eps=1e-8, betas=None, momentum=0.9
    )
    model.plain.grad = torch.ones(2, 2)
    found.step()
    assert (model.plain < 1).all()
    assert [g["weight_decay"] for g in found.param_groups] == [0.0, 0.1]


def test_sgd_without_momentum_takes_the_plain_step():
    model = Marked()
    found = optimizer(groups(model, weight_decay=0.0), name="sgd", lr=0.25, momentum=0.0)
    before = model.plain.detach().clone()
    for _ in range(2):
        model.plain.grad = torch.ones(2, 2)
        found.step()
    assert torch.equal(model.plain, before - 0.5)


def filled(value):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def test_average_without_warm_up_forgets_as_published():
    case = golden.load("schedule")[1]["cases"]["ema"]
    average = Average(filled(1.0).double(), decay=case["decay"], warmup=False)
    weights = filled(0.0).double()
    for done in range(1, 1001):
        average.update(weights, done)
    left = average.model.weight.item()
    expected = case["weight_of_init_after_29100_steps"] ** (1000 / 29100)
    assert left == pytest.approx(expected, rel=1e-9)


def test_average_with_warm_up_forgets_the_initial_weights_at_once():
    average = Average(filled(1.0), decay=0.99996, warmup=True)
    average.update(filled(3.0), 1)
    assert average.model.weight.item() == 3.0
    average.update(filled(0.0), 2)
    assert average.model.weight.item() == pytest.approx(3 * (1 - 2 ** (-2 / 3)))


def test_average_depends_on_the_update_number_only():
    first, second = (Average(filled(1.0), decay=0.9) for _ in range(2))
    first.update(filled(5.0), 1)
    second.model.load_state_dict(first.model.state_dict())
    for average in (first, second):
        average.update(filled(2.0), 2)
    assert torch.equal(first.model.weight, second.model.weight)
