"""Where time goes: every second is put down to one part, every operation to one group."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fambav.bench import profile as profiling
from fambav.bench.candidates import Candidate, images
from fambav.bench.passes import training
from fambav.bench.profile import (
    GROUPS,
    WHOLE,
    DeviceType,
    by_layer,
    by_operation,
    group,
    kernel_times,
    operation_times,
    parts,
    profile,
)
from fambav.ops.kernels import NUMBA
from fambav.timm_compat import timm

CPU = torch.device("cpu")


class Taking(torch.autograd.Function):
    """Lets a clock go on, and twice as far in the backward pass."""

    @staticmethod
    def forward(ctx, x, clock, seconds):
        ctx.clock, ctx.seconds = clock, seconds
        clock.now += seconds
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        ctx.clock.now += 2 * ctx.seconds
        return grad, None, None


class Layer(nn.Module):
    def __init__(self, clock, seconds):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.clock, self.seconds = clock, seconds

    def forward(self, x):
        return Taking.apply(x * self.weight, self.clock, self.seconds)


@pytest.fixture
def clock(monkeypatch):
    found = SimpleNamespace(now=0.0)
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: found.now)
    return found


def test_each_part_has_its_share_forward_and_backward(clock):
    net = nn.Sequential()
    net.stem = Layer(clock, 1.0)
    net.blocks = nn.Sequential(Layer(clock, 2.0), Layer(clock, 3.0), nn.Tanh())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: setattr(clock, "now", clock.now + 4))

    def forward():
        clock.now += 5
        return net(torch.ones(3))

    def step():
        forward().sum().backward()
        optimizer.step()

    # The optimizer's own hook comes before ours, which puts its seconds down to what went before.
    found = by_layer(step, net, rounds=2, device=CPU)
    assert found == pytest.approx(
        {"stem": 7 / 27, "layer 1": 6 / 27, "layer 2": 9 / 27, "layer 3": 0, "rest": 5 / 27}
    )
    with torch.no_grad():
        found = by_layer(forward, net, rounds=1, device=CPU)
    assert found == pytest.approx(
        {"stem": 1 / 11, "layer 1": 2 / 11, "layer 2": 3 / 11, "layer 3": 0, "rest": 5 / 11}
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_reduction_counts_for_itself_and_an_optimizer_too():
    step = training(Candidate("vim_micro", "upper:4:9"), batch=1, device=CPU)
    found = by_layer(step.run, step.net, step.optimizer, rounds=1, device=CPU)
    layers = {f"layer {n}" for n in range(1, 7)}
    assert found.keys() == {"patches", *layers, "reduction", "head", "optimizer", "rest"}
    assert all(share > 0 for share in found.values())
    assert sum(found.values()) == pytest.approx(1)


def test_parts_are_children_with_weights_and_what_the_longest_list_holds():
    with torch.device("meta"):
        deit = timm.create_model("deit_tiny_patch16_224")
        resnet = timm.create_model("resnet18")
    assert [*parts(deit)] == ["patch_embed", *(f"layer {n}" for n in range(1, 13)), "norm", "head"]
    assert {"conv1", "layer4 2", "fc"} <= parts(resnet).keys()
    assert [*parts(Candidate("plainmamba_micro").network(torch.device("meta")))][-1] == "head"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["aten::bmm", "fambav::bimamba_scan"], "linear"),
        (["aten::cat", "fambav::bimamba_scan"], "scan"),
        (["conv_forward", "fambav::bimamba_scan"], "conv"),
        (["gate_backward", "fambav::bimamba_scan_backward"], "scan"),
        (["aten::mm", "fambav::match", "fambav reduction"], "matching"),
        (["aten::index_add_", "_Mean", "fambav reduction"], "pooling"),
        (["aten::gather", "fambav reduction"], "matching"),
        (["aten::pow", "_Norm"], "norm"),
        (["aten::native_layer_norm_backward"], "norm"),
        (["aten::normal_"], "rest"),
        (["aten::addmm"], "linear"),
        (["AddmmBackward0"], "linear"),
        (["aten::_scaled_dot_product_flash_attention_for_cpu"], "attention"),
        (["aten::_log_softmax"], "rest"),
        (["aten::comma"], "rest"),
        (["_scan_forward_kernel"], "scan"),
        (["_norm_backward_kernel"], "norm"),
        (["_pool_forward_kernel"], "pooling"),
        (["_best_partner_kernel"], "matching"),
        (["nvjet_tst_128x256_64x4_1x2_h_bz_TNT"], "linear"),
        (["sm90_xmma_fprop_implicit_gemm_bf16"], "conv"),
        (["void at::native::vectorized_elementwise_kernel<4>"], "rest"),
    ],
)
def test_an_operation_belongs_to_one_group(names, expected):
    assert group(names) == expected
    assert expected in GROUPS


def test_kernels_of_a_gpu_are_added_up_and_nothing_else():
    def event(name, ns, device=DeviceType.CUDA, named=False):
        told = dict(name=name, duration_ns=ns, device_type=device, is_user_annotation=named)
        return SimpleNamespace(**{what: lambda value=value: value for what, value in told.items()})

    spent = kernel_times(
        [
            event("_scan_forward_kernel", 5),
            event("nvjet_tst", 2),
            event("scan_forward", 50, named=True),  # a range of ours, as the GPU saw it
            event("Optimizer.step#AdamW.step", 90, named=True),
            event("aten::mm", 30, DeviceType.CPU),
            event("Memset (Device)", 1),
        ]
    )
    assert spent == {"scan": 5, "linear": 2, "rest": 1}


def test_on_a_cpu_each_operation_counts_without_what_it_calls():
    events = [
        (0, 10, "aten::mm"),  # before the run
        (10, 100, WHOLE),
        (20, 60, "fambav::bimamba_scan"),
        (25, 35, "aten::bmm"),
        (26, 28, "aten::empty"),  # called by the product
        (40, 45, "aten::cat"),
        (60, 80, "fambav reduction"),
        (60, 70, "aten::mm"),
        (200, 210, WHOLE),
    ]
    spent, second = operation_times(list(reversed(events)))
    assert spent == {"scan": 30, "linear": 10, "matching": 20, "rest": 30}
    assert second == {"rest": 10}


@pytest.mark.skipif(NUMBA.unavailable() is not None, reason="needs numba")
def test_operations_of_our_models_and_of_peers_are_told_apart():
    loaded = NUMBA.load()
    kernel = loaded.scan_forward
    nets = {
        name: Candidate(model, plan).network(CPU).eval()
        for name, model, plan in (
            ("fused", "vim_micro", "upper:4:9"),
            ("peer", "deit_tiny_patch16_224", "none"),
        )
    }
    watched = {}
    for name, net in nets.items():
        given = images(net, 1, CPU)
        watched[name] = (lambda net=net, given=given: net(given)), net, None
    with torch.no_grad():
        tables = profile(watched, rounds=1, device=CPU)
    layers, operations = tables.values()
    fused, peer = operations
    for name in ("scan", "conv", "norm", "matching", "pooling", "linear", "rest"):
        assert fused[name] > 0, name
    assert fused["attention"] == 0
    assert peer["scan"] == peer["matching"] == peer["pooling"] == 0
    assert peer["attention"] > 0
    assert peer["linear"] > 0
    for row in operations:
        assert sum(row[name] for name in GROUPS) == pytest.approx(1)
    for name in nets:
        assert sum(row[name] or 0 for row in layers) == pytest.approx(1)
    assert loaded.scan_forward is kernel


@pytest.mark.skipif(NUMBA.unavailable() is not None, reason="needs numba")
def test_a_backward_pass_is_in_the_groups_too():
    step = training(Candidate("vim_micro", "upper:4:9"), batch=1, device=CPU)
    found = by_operation(step.run, step.net, rounds=1, device=CPU)
    forward = step.net.eval()
    given = step.batch[0]
    assert all(found[name] > 0 for name in GROUPS if name != "attention")
    assert sum(found.values()) == pytest.approx(1)
    with torch.no_grad():
        assert forward(given).isfinite().all()
