"""timm's own tests of models, on ours.

    FAMBAV_TIMM_CHECKOUT=/path/to/timm pytest tests/outside/test_timm.py

The checkout is one of github.com/huggingface/pytorch-image-models, or its unpacked sdist, of the
version that is installed.  TorchScript and torch.fx do not take our models; of theirs, only these
tests may fail.
"""

import pytest

import fambav.models  # noqa: F401  registers them
from fambav.registry import CLASSIFIERS, FAMILIES
from tests.outside import adapter

VARIABLE = "FAMBAV_TIMM_CHECKOUT"
FILE = "tests/test_models.py"
pytestmark = [
    pytest.mark.outside(VARIABLE),
    pytest.mark.filterwarnings("default"),  # theirs are not ours to mend
]


def theirs(name, **values):
    """One of their tests, over our models; ours are transformer-like, with rows for an output."""
    test = adapter.published(VARIABLE, FILE, name, lambda folder: {})
    return adapter.over(test, values) if adapter.checkout(VARIABLE) else test


def may_fail(name, why):
    return pytest.mark.xfail(reason=why, strict=False)(theirs(name, **MICRO))


@pytest.fixture
def cfg_device():
    return "meta"


NAMES = dict(model_name=list(CLASSIFIERS))
MICRO = dict(model_name=[name for name in CLASSIFIERS if name.endswith("micro")])

test_forward = theirs("test_model_forward", **NAMES)
test_backward = theirs("test_model_backward", **NAMES)
test_configurations = theirs("test_model_default_cfgs_non_std", **NAMES)
test_features = theirs("test_model_forward_features", **NAMES)
test_features_of_intermediates = theirs("test_model_forward_intermediates_features", **NAMES)
test_intermediates = theirs("test_model_forward_intermediates", **NAMES)
test_pruning = theirs(  # with dropout, which the others have not
    "test_prune_intermediate_layers_params_used", model_name=list(FAMILIES["vim"].models)
)
test_pruning_at_every_layer = theirs("test_prune_intermediate_layers_contract", **MICRO)
test_forward_after_pruning = theirs(  # of images of 128 pixels
    "test_forward_after_prune_intermediate_layers", model_name=["plainmamba_micro"]
)

SCRIPT, FX = "TorchScript does not take our models", "torch.fx does not take our models"
test_torchscript = may_fail("test_model_forward_torchscript", SCRIPT)
test_forward_fx = may_fail("test_model_forward_fx", FX)
test_backward_fx = may_fail("test_model_backward_fx", FX)
test_fx_torchscript = may_fail("test_model_forward_fx_torchscript", FX)

NOT_OURS = {
    "test_model_default_cfgs": "of models whose output is a map; test_configurations is of ours",
}


def test_every_test_of_theirs_that_a_new_model_gets_is_here():
    """A test over all models of timm's registry takes ours as soon as they are registered."""
    module = test_forward.__globals__
    over_all = {
        name
        for name, test in module.items()
        if name.startswith("test_") and "vim_micro" in adapter.grid(test).get("model_name", [])
    }
    here = {test.__name__ for name, test in globals().items() if name.startswith("test_")}
    assert over_all - here == set(NOT_OURS)
