"""Names, and what to say about a wrong one."""

import subprocess
import sys

import pytest
import torch

from fambav.config import parse
from fambav.registry import BUILDERS, DATA_SETS, MODELS, Registry, nearest, register_data_set
from fambav.training.network import layout


def test_names_are_checked_without_torch():
    code = "import sys, fambav.registry; print([n for n in ('torch', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_published_model_has_both_spellings():
    short = {name for name in MODELS if name.endswith("midclstok_div2")}
    long = {name for name in MODELS if name.endswith("middle_cls_token_div2")}
    assert {n.replace("midclstok", "middle_cls_token") for n in short} == long
    assert len(short) == 5
    others = {name for name in MODELS if name.startswith("vim_")} - short - long
    assert others == {"vim_tiny", "vim_small", "vim_base", "vim_micro"}


@pytest.mark.parametrize(("wrong", "right"), [("cifar", "CIFAR"), ("DIGIT", "DIGITS")])
def test_a_misspelt_name_is_answered_with_the_nearest(wrong, right):
    assert nearest(wrong, DATA_SETS) == f"did you mean {right!r}?"


def test_a_name_near_nothing_is_answered_with_all():
    assert nearest("xyz", ("a", "b")) == "known: a, b"


def test_a_name_is_taken_once():
    table = Registry("thing")
    table.register("one")(int)
    assert table["one"] is int
    assert table.names() == ["one"]
    with pytest.raises(ValueError, match="thing is 'one', expected a name that is not taken"):
        table.register("one")(str)
    with pytest.raises(ValueError, match="did you mean 'one'"):
        table["onne"]


def test_a_data_set_of_ones_own_is_a_name_that_flags_take(monkeypatch):
    from fambav.data import load

    monkeypatch.setattr(BUILDERS, "_builders", dict(BUILDERS._builders))
    known = dict(DATA_SETS)

    @register_data_set("MINE")
    def mine(request):
        return load("DIGITS")

    try:
        assert parse(["--data-set", "MINE", "--model", "vim_micro"]).data.data_set == "MINE"
        assert load("MINE", "no/such").num_classes == 10
        with pytest.raises(ValueError, match="data_set is 'DIGITS', expected a name that is not"):
            register_data_set("DIGITS")(mine)
        with pytest.raises(ValueError, match="did you mean 'segmentation'"):
            register_data_set("YOURS", "segmentaton")
    finally:
        DATA_SETS.clear()
        DATA_SETS.update(known)
    with pytest.raises(ValueError, match="MINE"):
        parse(["--data-set", "MINE"])


def test_a_model_that_was_registered_with_timm_may_not_say_its_size():
    from fambav.timm_compat import timm

    @timm.models.register_model
    def nameless(pretrained=False, **given):
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

    plain = ["--model", "timm/nameless"]
    with pytest.raises(ValueError, match=r"input_size is none, expected .* timm/nameless does not"):
        layout(parse(plain))
    assert layout(parse([*plain, "--input-size", "48"])).input_size == (48, 48)
