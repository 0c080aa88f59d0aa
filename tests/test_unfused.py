"""What a run prints of mixers that do more than a plain one."""

import pytest

from fambav.reduction import reduce
from fambav.registry import METHODS
from fambav.timm_compat import timm
from fambav.training.unfused import unfused_layers, unfused_line


def reduced(name, method):
    form = {"param_order": "permuted"} if name.startswith("plain") else {}
    schedule = "r:8@3" if method == "storm" else "r:2@3,5"  # which has to leave a grid
    return reduce(timm.create_model(name, **form), method, schedule)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vim_micro", "plainmamba_micro"])
def test_every_unfused_mixer_and_no_other_has_a_reason(name, method):
    net = reduced(name, method)
    unfused = {n + 1 for n in range(net.depth) if net.reduction.hooks(n).unfused}
    assert {n for layers in unfused_layers(net.reduction).values() for n in layers} == unfused
    assert (unfused_line(net.reduction) is None) == (not unfused)


def test_an_output_that_is_known_anyway_is_no_reason():
    reduction = reduced("plainmamba_micro", "utrc").reduction
    assert unfused_layers(reduction) == {"receive positions of tokens": [4, 5, 6]}
    assert unfused_layers(reduced("vim_micro", "utrc").reduction) == {}


@pytest.mark.parametrize(
    ("name", "method", "reasons"),
    [
        ("vim_micro", "evit", {"return y, z": [3, 5]}),
        (
            "plainmamba_micro",
            "evit",
            {"return y, z": [3, 5], "receive positions of tokens": [4, 5, 6]},
        ),
        (
            "plainmamba_micro",
            "prune-aligned",
            {"return delta, y, z": [3, 5], "scan across gaps": [4, 5, 6]},
        ),
    ],
)
def test_each_reason_has_its_own_layers(name, method, reasons):
    assert unfused_layers(reduced(name, method).reduction) == reasons


def test_the_line_names_each_reason_with_its_layers_and_what_measures_the_cost():
    assert unfused_line(reduced("plainmamba_micro", "prune-aligned").reduction) == (
        "prune-aligned: mixers return delta, y, z at layers 3, 5 and scan across gaps at layers 4-6"
        ", which may take longer than a plain mixer; fambav bench reduction measures by how much"
    )
