"""Settings and weights that chance has made are read, or refused in one line."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

import fambav
from fambav.config import ConfigError
from fambav.engine import checkpoint
from fambav.engine.checkpoint import CheckpointError
from tests.made import refused
from tests.trust import fuzz

options = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return fuzz.Weights(tmp_path_factory.mktemp("fuzz"))


@settings(options, max_examples=300)
@given(raw=fuzz.texts())
def test_settings_made_by_chance_are_read_or_refused_in_one_line(tmp_path, raw):
    fuzz.settings_are_read_or_refused(tmp_path, raw)


FOUND = {
    "statistics that are a tensor": ("mean", torch.zeros(0)),
    "statistics of two channels": ("std", [0.5, 0.5]),
    "a number of images that is a tensor": ("images_per_update", torch.ones(2, 3)),
    "settings that hold a tensor": ("config", {"model": "vim_micro", "seed": torch.ones(2, 3)}),
    "an epoch long before the first": ("epoch", -300),
    "an optimizer of other shapes": ("optimizer", None),
    "a history of no records": ("history", [{"epoch": 0}]),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_chance_has_found_is_refused(weights, case):
    name, value = FOUND[case]
    state = copy.deepcopy(weights.state)
    if name == "optimizer":
        state["optimizer"]["state"][0]["exp_avg"] = torch.ones(2, 3)
    else:
        state[name] = value
    path = weights.folder / "found.pth"
    checkpoint.save(path, state)
    refused(*weights.words, "--resume", path)


@pytest.mark.parametrize(
    "text", ["{", "[" * 2000, "[1, 2]", "null", '{"model": 3}', '{"seed": -1}']
)
def test_strings_beside_weights_that_say_nothing_of_use_are_refused(weights, text):
    path = weights.folder / "strings.safetensors"
    checkpoint.save_weights(path, weights.state["model"], {"config": text, "mean": "[0, 0, 0]"})
    with pytest.raises((CheckpointError, ConfigError), match=r"^[^\n]+$"):
        fambav.from_pretrained(path)


@settings(options, max_examples=60)
@given(changes=fuzz.edits(), reader=some.sampled_from(fuzz.READERS), marked=some.booleans())
def test_checkpoints_changed_by_chance_are_read_or_refused_in_one_line(
    weights, changes, reader, marked
):
    weights.are_read_or_refused(changes, reader, marked=marked)


@settings(options, max_examples=60)
@given(at=some.floats(0, 1), new=some.binary(min_size=1, max_size=6))
def test_bytes_changed_by_chance_are_read_or_refused(weights, at, new):
    weights.bytes_are_read_or_refused(at, new)
