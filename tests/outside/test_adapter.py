"""The adapter itself, on a small checkout made up here in the shape of the real ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.outside import adapter

VARIABLE = "FAMBAV_MADE_UP_CHECKOUT"
WHERE = (VARIABLE, "tests/test_double.py", "test_double")
INTERFACE = """
import math

import torch
import their_compiled_module
from their_package.other import something

from einops import rearrange


def double_fn(x):
    return their_compiled_module.double(x)


def double_ref(x):
    return rearrange(x * (1 + math.cos(0)), "b d -> b d")
"""
TESTS = """
import pytest
import torch

from made_up.ops.interface import double_fn, double_ref


def test_other():
    pass


# @pytest.mark.parametrize('dtype', [torch.float32, torch.complex64, torch.float64])
@pytest.mark.parametrize('dtype', [torch.float32])
# @pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("size", [1, 2])
# @pytest.mark.parametrize("size", [1])
@pytest.mark.parametrize(
    "states", [False, True]
)
def test_double(size, dtype, states):
    device = 'cuda'
    assert not states
    x = torch.ones(size, size, dtype=dtype, device=device)
    assert torch.equal(double_fn(x), double_ref(x))
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    for name, text in [("made_up/interface.py", INTERFACE), ("tests/test_double.py", TESTS)]:
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(text)
    monkeypatch.setenv(VARIABLE, str(tmp_path))


def stand_ins(double):
    def build(folder):
        reference = adapter.reference(folder / "made_up/interface.py", "double_ref")
        return adapter.package("made_up.ops.interface", double_fn=double, double_ref=reference)

    return build


def grid(test):
    return {mark.args[0]: list(mark.args[1]) for mark in test.pytestmark}


def test_their_test_runs_our_function_beside_their_reference(made):
    seen = []
    test = adapter.published(*WHERE, stand_ins(lambda x: seen.append(x) or 2 * x))
    assert grid(test) == dict(dtype=[torch.float32], size=[1, 2], states=[False, True])
    test(size=2, dtype=torch.float32, states=False)
    assert seen[0].device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert not {"made_up", "their_compiled_module"} & sys.modules.keys()


def test_a_wrong_function_fails_their_test(made):
    test = adapter.published(*WHERE, stand_ins(lambda x: 3 * x))
    with pytest.raises(AssertionError):
        test(size=2, dtype=torch.float32, states=False)


def test_the_commented_lists_replace_shorter_ones_and_hold_nothing_complex(made):
    test = adapter.published(*WHERE, stand_ins(lambda x: 2 * x))
    everywhere = adapter.longest(test, adapter.commented(*WHERE))
    real = [torch.float32, torch.float64]
    assert grid(everywhere) == dict(dtype=real, size=[2, 4, 8], states=[False, True])
    everywhere(size=8, dtype=torch.float64, states=False)
    with pytest.raises(AssertionError):
        everywhere(size=8, dtype=torch.float64, states=True)
    assert grid(test)["size"] == [1, 2]


def test_lists_can_be_cut_to_what_we_offer(made):
    test = adapter.published(*WHERE, stand_ins(lambda x: 2 * x))
    assert grid(adapter.over(test, dict(states=[False])))["states"] == [False]


def test_without_a_checkout_there_is_a_test_to_be_skipped(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    test = adapter.longest(adapter.published(*WHERE, None), adapter.commented(*WHERE))
    with pytest.raises(AssertionError, match=f"{VARIABLE} names no checkout"):
        test()


def test_what_is_not_run_for_want_of_a_checkout_is_counted():
    files = [f"tests/outside/test_{name}.py" for name in ("mamba", "causal_conv1d")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files],
        capture_output=True,
        text=True,
        env={n: value for n, value in os.environ.items() if not n.startswith("FAMBAV_")},
        cwd=Path(__file__).parents[2],
    )
    assert "not run here: 2 x outside: FAMBAV_MAMBA_CHECKOUT names no checkout" in done.stdout
    assert "1 x outside: FAMBAV_CAUSAL_CONV1D_CHECKOUT names no checkout" in done.stdout
