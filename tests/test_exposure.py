"""What is told before training of mixers that are asked."""

from types import SimpleNamespace

import pytest
import torch

from fambav.engine.runtime import Precision
from fambav.reduction import reduce
from fambav.registry import METHODS
from fambav.timm_compat import timm
from fambav.training import exposure as told

CPU = torch.device("cpu")
PLAIN = Precision(CPU, None)


def reduced(name, method):
    form = {"param_order": "permuted"} if name.startswith("plain") else {}
    schedule = "r:8@3" if method == "storm" else "r:2@3,5"  # which has to leave a grid
    return reduce(timm.create_model(name, **form), method, schedule)


@pytest.fixture
def clock(monkeypatch):
    """A clock, in seconds, that only goes on when it is told to."""
    now = [0.0]
    monkeypatch.setattr("fambav.engine.timing.time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def lasting(clock, ms):
    """Return what lasts so long, and a list that grows by each call."""
    calls = []

    def run():
        calls.append(ms)
        clock[0] += ms / 1000

    return run, calls


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vim_micro", "plainmamba_micro"])
def test_every_mixer_that_is_asked_and_no_other_has_a_reason(name, method):
    net = reduced(name, method)
    asked = {n + 1 for n in range(net.depth) if net.reduction.hooks(n).unfused}
    kinds = told.kinds(net.reduction)
    assert {layer for kind in kinds for layer in kind.layers} == asked
    assert (told.exposure(net, PLAIN) is None) == (not asked)


def test_an_output_that_is_known_anyway_is_no_reason():
    (kind,) = told.kinds(reduced("plainmamba_micro", "utrc").reduction)
    assert (kind.reason, kind.layers) == ("are told where tokens come from", [4, 5, 6])
    assert told.kinds(reduced("vim_micro", "utrc").reduction) == []


@pytest.mark.parametrize(
    ("name", "method", "reasons"),
    [
        ("vim_micro", "evit", {"tell y, z": [3, 5]}),
        (
            "plainmamba_micro",
            "evit",
            {"tell y, z": [3, 5], "are told where tokens come from": [4, 5, 6]},
        ),
        (
            "plainmamba_micro",
            "prune-aligned",
            {"tell delta, y, z": [3, 5], "scan across gaps": [4, 5, 6]},
        ),
    ],
)
def test_each_reason_has_its_own_layers(name, method, reasons):
    kinds = told.kinds(reduced(name, method).reduction)
    assert {kind.reason: kind.layers for kind in kinds} == reasons


@pytest.mark.parametrize("name", ["vim_micro", "plainmamba_micro"])
def test_a_mixer_of_each_kind_is_timed(monkeypatch, name):
    def interleave(runs, *, rounds, **_):
        for run in runs.values():
            run()
        return {key: [10.0 * (key + 1)] * rounds for key in runs}

    calls = []
    net = reduced(name, "prune-aligned")
    for layer in net.layers:
        layer.mixer.register_forward_pre_hook(
            lambda _, given, options: calls.append((len(given), options)), with_kwargs=True
        )
    monkeypatch.setattr(told, "interleave", interleave)
    line = told.exposure(net, PLAIN)
    assert line == (
        "prune-aligned: mixers tell delta, y, z at layers 3, 5 and scan across gaps at layers 4-6;"
        " such take 2.0 and 3.0 times as long as one that is not asked (measured, forward and"
        " backward)"
    )
    want = {"delta", "y", "z"}
    returning = dict(want=want, gap_policy=None)
    assert calls[:3] == [(1, {}), (2, returning), (2, dict(want=set(), gap_policy="self"))]


def test_one_kind_has_one_time(monkeypatch):
    monkeypatch.setattr(told, "_times_as_long", lambda *_: [1.5])
    line = told.exposure(reduced("vim_micro", "evit"), PLAIN)
    assert "; such a one takes 1.5 times as long as one that is not asked" in line


def test_short_calls_are_repeated_until_a_turn_of_the_first_lasts_long_enough(clock):
    (one, calls), (other, more) = lasting(clock, 4), lasting(clock, 6)
    times = told._turns([one, other], CPU)
    # One to warm up, one to learn how long it lasts, then five to a turn.
    assert len(calls) == len(more) == 2 + 5 * (told.MANY - 1)
    assert times[0] == pytest.approx([4, *[20] * (told.MANY - 1)])
    assert times[1] == pytest.approx([6, *[30] * (told.MANY - 1)])


@pytest.mark.parametrize("ms", [25, 500])
def test_long_calls_are_not_repeated(clock, ms):
    run, calls = lasting(clock, ms)
    (times,) = told._turns([run], CPU)
    assert len(calls) == 1 + told.FEW
    assert times == pytest.approx([ms] * told.FEW)
