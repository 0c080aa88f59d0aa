"""Settings and weights that chance has made are read, or refused in one line."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from tests.trust import fuzz

options = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return fuzz.Weights(tmp_path_factory.mktemp("fuzz"))


@settings(options, max_examples=300)
@given(raw=fuzz.texts())
def test_settings_made_by_chance_are_read_or_refused_in_one_line(tmp_path, raw):
    fuzz.settings_are_read_or_refused(tmp_path, raw)


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
