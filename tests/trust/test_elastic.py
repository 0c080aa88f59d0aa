"""A process that is lost is started again by the launcher, and the run completes."""

import pytest

from tests.trust import soak
from tests.trust.forked import run_two


@pytest.mark.slow
def test_a_run_that_lost_a_process_is_completed_by_its_launcher_to_the_same_bits(recipe, tmp_path):
    found = soak.elastic([*recipe, "--batch-size", "4"], tmp_path, run_two)
    assert found == {"ranks killed": 1, "identical": 1}
