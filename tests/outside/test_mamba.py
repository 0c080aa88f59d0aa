"""mamba-ssm's own test of its selective scan, on ours.

    FAMBAV_MAMBA_CHECKOUT=/path/to/mamba pytest tests/outside/test_mamba.py -k as_published

The checkout is one of github.com/state-spaces/mamba; its sdist lacks the file.
"""

import pytest
import torch

from fambav.ops import selective_scan
from tests.outside import adapter

VARIABLE = "FAMBAV_MAMBA_CHECKOUT"
WHERE = (VARIABLE, "tests/ops/test_selective_scan.py", "test_selective_scan")
pytestmark = pytest.mark.outside(VARIABLE)


def with_a_precise_gate(reference):
    """Theirs rounds silu(z) to the type of z, by more than their tolerances of gradients allow."""

    def run(*tensors, z=None, **options):
        return reference(*tensors, z=None if z is None else z.float(), **options)

    return run


def stand_ins(folder):
    path = folder / "mamba_ssm/ops/selective_scan_interface.py"
    reference = adapter.reference(path, "selective_scan_ref")
    return adapter.package(
        "mamba_ssm.ops.selective_scan_interface",
        selective_scan_fn=selective_scan,
        selective_scan_ref=with_a_precise_gate(reference),
        mamba_inner_fn=None,  # only what the file imports: we have no such function
        mamba_inner_ref=None,
    )


@pytest.fixture(autouse=True)
def their_reference_is_not_deterministic_on_a_gpu():
    torch.use_deterministic_algorithms(not torch.cuda.is_available())


test_the_scan_as_published = adapter.published(*WHERE, stand_ins)
test_the_scan_over_the_commented_lists = adapter.longest(
    test_the_scan_as_published, adapter.commented(*WHERE)
)
