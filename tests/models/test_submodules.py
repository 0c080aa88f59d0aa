"""Sub-modules of a mixer that others replace, hook or parametrize are called, not bypassed."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

import fambav
import fambav.models
from fambav.timm_compat import timm
from tests.data.made import made_cifar10
from tests.trust.forked import run

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SAID = "such mixers run as single modules"
PARTS = ("conv1d", "x_proj", "dt_proj", "conv1d_b", "x_proj_b", "dt_proj_b", "out_proj")


def model(name="vim_micro", **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **options).eval()


def watch(net, name, seen):
    """Hook a sub-module; its calls are counted and change nothing."""
    part = net.get_submodule(name)
    return part.register_forward_hook(lambda module, given, output: seen.append(name))


def gradients(net):
    net.zero_grad()
    net(IMAGES).square().sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("part", PARTS)
def test_a_hook_on_any_part_of_a_mixer_fires_and_may_change_the_result(part):
    net = model()
    before = net(IMAGES)
    handle = (
        net.layers[2]
        .mixer.get_submodule(part)
        .register_forward_hook(lambda module, given, output: 2 * output)
    )
    with pytest.warns(UserWarning, match=rf"layers.2.mixer.{part} has forward hooks: {SAID}"):
        changed = net(IMAGES)
    assert not torch.allclose(changed, before, atol=1e-5)
    handle.remove()
    assert torch.equal(net(IMAGES), before)


@pytest.mark.parametrize("kind", ["v2", "v1", "none"])
def test_called_modules_give_the_results_and_gradients_of_the_fused_mixer(kind):
    net = model(bimamba_type=kind)
    logits, expected, seen = net(IMAGES), gradients(net), []
    names = [f"layers.{n}.mixer.{part}" for n in range(6) for part in PARTS]
    names = [name for name in names if kind == "v2" or not name.endswith("_b")]
    for name in names:
        watch(net, name, seen)
    with pytest.warns(UserWarning, match=SAID):
        torch.testing.assert_close(net(IMAGES), logits, atol=1e-6, rtol=1e-5)
    assert sorted(seen) == sorted(names)
    torch.testing.assert_close(gradients(net), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("twice", [True, False])
def test_a_hook_on_plainmambas_step_size_fires_and_changes_nothing(twice):
    net, seen = model("plainmamba_micro", dt_bias_twice=twice), []
    logits, expected = net(IMAGES), gradients(net)
    name = next(name for name, _ in net.named_modules() if name.endswith("dt_proj"))
    watch(net, name, seen)
    torch.testing.assert_close(net(IMAGES), logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradients(net), expected, atol=1e-5, rtol=1e-4)
    assert seen == [name] * 2


@pytest.mark.parametrize("gap", ["cached", "bias", "hold_prev", "none"])
def test_reductions_that_read_the_mixer_call_hooked_modules_too(gap):
    net, seen = model(), []
    fambav.reduce(net, "prune-aligned", "tokens:45,30@2,4", gap_policy=gap)
    logits = net(IMAGES)
    names = [f"layers.{n}.mixer.{part}" for n in range(6) for part in PARTS]
    for name in names:
        watch(net, name, seen)
    with pytest.warns(UserWarning, match=SAID):
        torch.testing.assert_close(net(IMAGES), logits, atol=1e-5, rtol=1e-4)
    assert sorted(seen) == sorted(names)


@pytest.mark.parametrize("name", ["vim_micro", "plainmamba_micro"])
def test_adapters_learn_in_every_projection_and_merge_to_the_same_logits(name):
    import peft  # which takes seconds, and every process of tests reads this file

    net = model(name)
    targets = ["in_proj", "out_proj", "x_proj", "dt_proj"]
    adapted = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=targets)).eval()
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_B" in parameter_name:  # starts at 0, where lora_A has no gradient
            nn.init.normal_(parameter, std=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = adapted(IMAGES)
    logits.square().sum().backward()
    learned = [p for p in adapted.parameters() if p.requires_grad]
    assert len(learned) == 2 * 4 * 6  # A and B of four projections in six layers
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learned)
    merged = adapted.merge_and_unload()
    assert merged.unfused == {}
    torch.testing.assert_close(merged(IMAGES), logits, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["vim_micro", "plainmamba_micro"])
def test_quantized_linear_layers_are_used(name):
    net = model(name)
    small = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        exact, rough = net(IMAGES), small(IMAGES)
    assert 0 < (rough - exact).norm() < 0.1 * exact.norm()
    kinds = [
        type(m) for m in small.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)
    ]
    assert len(kinds) == sum(isinstance(m, nn.Linear) for m in net.modules())


def test_a_parametrized_projection_is_called():
    net = model()
    before = net(IMAGES)
    parametrizations.weight_norm(net.layers[0].mixer.x_proj)
    assert list(net.unfused) == ["layers.0.mixer.x_proj"]
    with pytest.warns(UserWarning, match=r"layers.0.mixer.x_proj is a .*ParametrizedLinear"):
        torch.testing.assert_close(net(IMAGES), before, atol=1e-6, rtol=1e-5)


def test_a_projection_whose_weight_is_of_another_class_is_called():
    net = model()
    before = net(IMAGES)
    projection = net.layers[0].mixer.dt_proj
    weight = projection.weight.detach()
    projection.weight = nn.Parameter(TwoTensor(weight, weight), requires_grad=False)
    assert net.unfused == {"layers.0.mixer.dt_proj": "has a weight that is a TwoTensor"}
    projection.weight = nn.Parameter(weight)
    assert net.unfused == {}
    assert torch.equal(net(IMAGES), before)


STAGED = [
    "vmamba_nano",
    "vssd_nano",
    "groupmamba_nano",
    "vim2_nano",
    "vmunet_nano",
    "cvmh_unet_nano",
]


@pytest.mark.parametrize("name", STAGED)
def test_the_modules_that_feature_info_names_return_the_maps(name):
    net, seen = model(name), []
    for info in net.feature_info:
        part = net.get_submodule(info["module"])
        part.register_forward_hook(lambda module, given, output: seen.append(output))
    maps = net.forward_intermediates(IMAGES, intermediates_only=True, output_fmt="NHWC")
    assert len(seen) == len(maps) == 4
    assert [x.shape for x in seen] == [x.shape for x in maps]
    assert all(x.requires_grad for x in seen)


def test_hooks_on_all_modules_are_served():
    net, seen = model(), []
    with (
        nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)),
        pytest.warns(UserWarning, match=SAID),
    ):
        net(IMAGES)
    assert {net.layers[3].mixer.get_submodule(part) for part in PARTS} <= set(seen)


def test_torchs_counter_counts_the_same_operations_fused_and_not():
    def count(net):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(IMAGES)
        return counter.get_total_flops()

    net = model()
    fused = count(net)  # without a warning
    for layer in net.layers:
        watch(layer, "mixer.out_proj", [])
    with pytest.warns(UserWarning, match=SAID):
        assert count(net) == fused > 0


def test_it_is_said_once_by_each_model_and_never_by_a_plain_one():
    def said(net):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for _ in range(2):
                net(IMAGES)
        return [str(one.message) for one in found]

    first, second = model(), model()
    assert said(first) == []
    for net in (first, second):
        for layer in net.layers:
            watch(layer, "mixer.out_proj", [])
        assert [line.split()[0] for line in said(net)] == ["layers.0.mixer.out_proj"]
        assert set(net.unfused) == {f"layers.{n}.mixer.out_proj" for n in range(6)}
    assert said(copy.deepcopy(second)) == []


def register_hooked():
    warnings.simplefilter("default")

    @timm.models.register_model
    def vim_hooked(pretrained=False, **options):
        net = timm.create_model("vim_micro", **options)
        net.layers[1].mixer.x_proj.register_forward_hook(lambda *_: None)
        return net


def test_a_run_records_why_its_mixers_are_not_fused(tmp_path):
    data = ["--data-set", "CIFAR10", "--data-path", str(made_cifar10(tmp_path / "data"))]
    flags = [*data, "--input-size", "32", "--epochs", "1", "--num_workers", "0"]
    flags += ["--batch-size", "8", "--device", "cpu", "--threads", "1"]

    def unfused(name, *words):
        done = run([*flags, *words], tmp_path / name, register_hooked)
        assert done.status == 0, done.out
        return json.loads((tmp_path / name / "env.json").read_text())["unfused"], done.out

    found, lines = unfused("hooked", "--model", "timm/vim_hooked")
    assert found == {"layers.1.mixer.x_proj": "has forward hooks"}
    assert lines.count(SAID) == 1
    found, lines = unfused("plain", "--model", "vim_micro", "--log-activations")
    assert found is None
    assert SAID not in lines
