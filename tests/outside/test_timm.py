"""timm's own tests of models, on ours.

    FAMBAV_TIMM_CHECKOUT=/path/to/timm pytest tests/outside/test_timm.py

The checkout is one of github.com/huggingface/pytorch-image-models, or its unpacked sdist, of the
version that is installed.  Of theirs, those of TorchScript and of torch.fx are left out.
"""

import pytest

import fambav.models  # noqa: F401  registers them
from fambav.registry import FAMILIES, MODELS
from tests.outside import adapter

VARIABLE = "FAMBAV_TIMM_CHECKOUT"
pytestmark = [
    pytest.mark.outside(VARIABLE),
    pytest.mark.filterwarnings("default"),  # theirs are not ours to mend
]


def theirs(name, **values):
    """One of their tests, over our models; ours are transformer-like, with rows for an output."""
    test = adapter.published(VARIABLE, "tests/test_models.py", name, lambda folder: {})
    return adapter.over(test, values) if adapter.checkout(VARIABLE) else test


@pytest.fixture
def cfg_device():
    return "meta"


NAMES = dict(model_name=list(MODELS))

test_forward = theirs("test_model_forward", **NAMES)
test_backward = theirs("test_model_backward", **NAMES)
test_configurations = theirs("test_model_default_cfgs_non_std", **NAMES)
test_features = theirs("test_model_forward_intermediates_features", **NAMES)
test_intermediates = theirs("test_model_forward_intermediates", **NAMES)
test_pruning = theirs(  # with dropout, which the others have not
    "test_prune_intermediate_layers_params_used", model_name=list(FAMILIES["vim"].models)
)
test_pruning_at_every_layer = theirs(
    "test_prune_intermediate_layers_contract",
    model_name=[name for name in MODELS if name.endswith("micro")],
)
