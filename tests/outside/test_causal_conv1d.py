"""causal-conv1d's own test of its convolution, on ours, without the states that we do not offer.

    FAMBAV_CAUSAL_CONV1D_CHECKOUT=/path/to/causal-conv1d pytest tests/outside/test_causal_conv1d.py

The checkout is one of github.com/Dao-AILab/causal-conv1d, or its unpacked sdist.
"""

import pytest
import torch

from fambav.ops import causal_conv1d
from tests.outside import adapter

VARIABLE = "FAMBAV_CAUSAL_CONV1D_CHECKOUT"
WHERE = (VARIABLE, "tests/test_causal_conv1d.py", "test_causal_conv1d")
STATELESS = dict(has_initial_states=[False], return_final_states=[False])
pytestmark = pytest.mark.outside(VARIABLE)


def without_states(
    x, weight, bias=None, initial_states=None, return_final_states=False, activation=None
):
    assert initial_states is None
    assert not return_final_states
    return causal_conv1d(x, weight, bias, activation)


def stand_ins(folder):
    path = folder / "causal_conv1d/causal_conv1d_interface.py"
    names = ("causal_conv1d_update", "causal_conv1d_update_ref")
    varlen = ("causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref")
    return adapter.package(
        "causal_conv1d.causal_conv1d_interface",
        causal_conv1d_fn=without_states,
        causal_conv1d_ref=adapter.reference(path, "causal_conv1d_ref"),
        **dict.fromkeys(names),  # only what the file imports: we have no such functions
    ) | adapter.package("causal_conv1d.causal_conv1d_varlen", **dict.fromkeys(varlen))


@pytest.fixture(autouse=True)
def their_reference_is_not_deterministic_on_a_gpu():
    torch.use_deterministic_algorithms(not torch.cuda.is_available())


test_the_convolution_as_published = adapter.over(
    adapter.published(*WHERE, stand_ins), STATELESS if adapter.checkout(VARIABLE) else {}
)
