"""A method at work in a model: policies, hooks, and what is refused."""

import copy

import pytest
import timm
import torch

import fambav
import fambav.models
from fambav.layers import INTERMEDIATES, Tokens
from fambav.reduction import (
    Reducer,
    Reduction,
    Schedule,
    Selection,
    make_reducer,
    make_reduction,
    others,
    read_options,
)
from fambav.registry import METHODS, REDUCERS
from tests.reduction.made import body, reducing


class Every(Reducer):
    """Drops the first patches; what it is asked to read is an option."""

    def __init__(self, *, reads="", share=0.5, times=1, loud=False):
        super().__init__()
        self.needs = frozenset(reads.split())
        self.seen, self.share, self.times, self.loud = [], share, times, loud

    def select(self, tokens, count):
        self.seen.append(tokens)
        patches = others(tokens.cls_index, tokens.x.shape[1])
        nothing = patches[:, :0]
        return Selection(others(patches[:, :count], tokens.x.shape[1]), nothing, nothing)

    @staticmethod
    def limit(length, cls_index):
        return length - len(cls_index) - 1


@pytest.fixture(autouse=True)
def every(registry):
    REDUCERS.register("every")(Every)


def vim(**arguments):
    torch.manual_seed(0)
    sizes = dict(num_classes=5, img_size=32, patch_size=8, depth=4, dim=32)
    return timm.create_model("vim_micro", **sizes, **arguments).eval()


IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32)


def lengths(net):
    seen = []
    hooks = [
        block.mixer.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
        for block in net.layers
    ]
    net(IMAGES)
    for hook in hooks:
        hook.remove()
    return tuple(seen)


@pytest.mark.parametrize("hook", ["before", "between", "after"])
def test_mixers_see_the_lengths_of_the_plan_wherever_tokens_go(hook):
    net = fambav.reduce(vim(), "every", "list:0,3,0,2", hook=hook)
    assert lengths(net) == net.schedule.lengths
    assert lengths(net) == ((17, 17, 14, 14) if hook == "after" else (17, 14, 14, 12))
    _, trace = net.forward_features(IMAGES, trace=True)
    assert [s.ge(0).sum().item() for s in trace.sources] == [34, 28, 28, 24]


def test_the_model_that_is_reduced_is_the_model_itself_and_none_undoes_it():
    net = vim()
    unreduced = net(IMAGES)
    assert fambav.reduce(net, "ordered", 2) is net
    assert not net(IMAGES).equal(unreduced)
    assert net.state_dict().keys() == vim().state_dict().keys()
    assert fambav.reduce(net, "none")(IMAGES).equal(unreduced)


def test_a_reduction_changes_while_a_model_lives():
    net = vim()
    for count in (1, 3):
        net.reduction = make_reduction(net.info, "ordered", f"r:{count}@2-4")
        assert lengths(net) == tuple(17 - count * n for n in range(4))


def test_a_reduction_set_on_a_model_in_evaluation_draws_nothing():
    net = vim().train()
    net.reduction = make_reduction(net.info, "random", "r:3")
    assert net.reduction.method.training
    net.eval()
    net.reduction = make_reduction(net.info, "random", "r:3@2")
    assert net(IMAGES).equal(net(IMAGES))


def test_a_copy_of_a_model_has_a_reduction_of_its_own():
    net = fambav.reduce(vim(), "every", "r:2")
    twin = copy.deepcopy(net)
    twin(IMAGES)
    assert not net.reduction.method.seen
    assert len(twin.reduction.method.seen) == 4


def test_what_is_no_model_of_ours_is_not_reduced():
    with pytest.raises(ValueError, match=r"^model is a Linear, expected one whose tokens"):
        fambav.reduce(torch.nn.Linear(1, 1), "ordered", 2)


@pytest.mark.parametrize("bimamba_type", ["v2", "v1", "none"])
@pytest.mark.parametrize("hook", ["before", "between", "after"])
def test_a_method_gets_what_it_needs_of_the_mixer_before(hook, bimamba_type):
    net = fambav.reduce(
        vim(bimamba_type=bimamba_type),
        "every",
        "r:3@3",
        hook=hook,
        reads="u delta B C y z mixed",
    )
    given = {}
    asked = net.layers[2 if hook == "after" else 1].mixer
    asked.register_forward_hook(lambda _, inputs, out: given.update(out=out[0]))
    net(IMAGES)
    (tokens,) = net.reduction.method.seen
    intermediates, ends = tokens.intermediates, 1 if bimamba_type == "none" else 2
    assert (
        intermediates.u.shape
        == intermediates.delta.shape
        == intermediates.y.shape
        == (2, ends, 17, 64)
    )
    assert intermediates.B.shape == intermediates.C.shape == (2, ends, 17, 16)
    assert intermediates.z.shape == (2, 17, 64)
    assert intermediates.mixed is given["out"]
    assert intermediates.order.tolist() == [[[*range(17)], [*range(16, -1, -1)]][:ends]]
    assert [net.reduction.hooks(n).with_tokens for n in range(4)].count(True) == 1


@pytest.mark.parametrize("hook", ["before", "between", "after"])
def test_a_method_that_reads_the_output_alone_leaves_the_mixer_fused(hook):
    net, outputs = fambav.reduce(vim(), "every", "r:3@3", hook=hook, reads="mixed"), []
    assert not any(net.reduction.hooks(n).with_tokens for n in range(4))
    mixer = net.layers[2 if hook == "after" else 1].mixer
    mixer.register_forward_hook(lambda *call: outputs.append(call[-1]))
    net(IMAGES)
    (tokens,) = net.reduction.method.seen
    assert tokens.intermediates.mixed.equal(outputs[0])


def test_a_mixer_returns_what_it_scanned_beside_what_a_fused_one_computes():
    net = vim()
    mixer, x = net.layers[1].mixer, torch.randn(2, 9, 32)
    out, intermediates = mixer(x, Tokens.start(x, cls_index=()), want=INTERMEDIATES)
    torch.testing.assert_close(out, mixer(x), atol=2e-6, rtol=1e-5)
    gated = (
        intermediates.y.sum(1) * 0.5 * torch.nn.functional.silu(intermediates.z)
    ) @ mixer.out_proj.weight.T
    torch.testing.assert_close(gated, out, atol=2e-6, rtol=1e-5)
    assert (intermediates.delta > 0).all()


def test_masked_tokens_stay_as_zeros_and_nothing_else_changes_its_place():
    net = fambav.reduce(vim(), "every", "r:3@2,3", scan="masked")
    assert lengths(net) == (17,) * 4
    assert net.schedule.lengths == (17, 14, 11, 11)
    assert "masked: every mixer runs on all 17 tokens" in net.reduction.summary()
    tokens = net.embed(IMAGES)
    for layer, block in enumerate(net.layers):
        tokens = block(tokens, net.reduction.hooks(layer))
    assert tokens.keep_index.tolist() == [[6, 7, *range(8, 17)]] * 2
    assert tokens.residual[:, :6].eq(0).all()
    assert tokens.x[:, :6].eq(0).all()
    left = tokens.kept()
    assert left.x.shape == (2, 11, 32)
    assert left.cls_index.tolist() == [[2]] * 2
    first, second = net.reduction.method.seen[-2:]
    assert (first.x.shape[1], second.x.shape[1]) == (17, 14)


@pytest.mark.parametrize(
    ("policy", "places"), [("exact", [5, 2]), ("proportional", [6, 4]), ("middle", [6, 5])]
)
def test_the_class_token_goes_where_the_policy_says(policy, places):
    x = torch.arange(17.0).view(1, 17, 1)
    tokens = Tokens.start(x, cls_index=(8,))
    reduction = reducing("every", (3, 3), tokens, class_policy=policy)
    for layer, place in enumerate(places):
        tokens = reduction(tokens, layer)
        assert tokens.cls_index.tolist() == [[place]]
        assert tokens.x[0, place] == 8
    patches = [p for p in tokens.position[0].tolist() if p != 8]
    assert patches == [6, 7, *range(9, 17)]


def test_sizes_and_sources_of_what_is_dropped_go_with_it():
    tokens = Tokens.start(torch.randn(2, 9, 3), cls_index=(4,), trace=True)
    fewer = reducing("every", (2,), tokens)(tokens, 0)
    assert fewer.size.tolist() == [[1.0] * 7] * 2
    assert fewer.source.tolist() == [[-1, -1, *range(7)]] * 2
    assert fewer.position.tolist() == [[*range(2, 9)]] * 2
    again = reducing("every", (1,), fewer)(fewer, 0)
    assert again.source.tolist() == [[-1, -1, -1, *range(6)]] * 2


def test_some_may_be_folded_and_some_dropped_and_a_silent_source_reaches_one_stream():
    class Mixed(Every):
        def select(self, tokens, count):
            places = torch.tensor([[0, 2, 5], [1, 2, 5]])
            return Selection(
                keep=places,
                source=torch.tensor([[1, 3], [0, 4]]),
                target=torch.tensor([[0, 2], [1, 5]]),
                silent=torch.tensor([[True, False], [False, False]]),
            )

    start = Tokens.start(torch.randn(2, 6, 3), cls_index=(), trace=True)
    tokens = start._replace(residual=torch.randn(2, 6, 3))
    fewer = Reduction(body(6), Mixed(), Schedule.of(6, (3,)))(tokens, 0)
    x, residual = tokens.x, tokens.residual
    torch.testing.assert_close(fewer.x[0, 0], x[0, 0])
    torch.testing.assert_close(fewer.residual[0, 0], residual[0, :2].mean(0))
    torch.testing.assert_close(fewer.x[0, 1], x[0, 2:4].mean(0))
    torch.testing.assert_close(fewer.x[1, 2], x[1, 4:].mean(0))
    assert fewer.size.tolist() == [[2, 2, 1], [2, 1, 2]]
    assert fewer.source.tolist() == [[0, 0, 1, 1, -1, 2], [0, 0, 1, -1, 2, 2]]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["vim_micro", "plainmamba_micro"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_does_on_a_gpu_what_it_does_on_a_cpu(method, family):
    torch.manual_seed(0)
    own = dict(class_token="none") if family == "vim_micro" else dict(param_order="permuted")
    net = timm.create_model(family, num_classes=5, **own).eval()
    fambav.reduce(net, method, "tokens:56,42@2,4" if method == "storm" else "r:9@2,4")
    images, results = torch.randn(2, 3, 32, 32), []
    for device in ("cpu", "cuda"):
        net.to(device)
        feature, trace = net.forward_features(images.to(device), trace=True)
        net.zero_grad()
        net(images.to(device)).square().sum().backward()
        grads = [p.grad.cpu() for p in net.parameters() if p.grad is not None]
        results.append(
            (
                trace.sources[-1].cpu(),
                feature.detach().cpu(),
                torch.cat([g.flatten() for g in grads]),
            )
        )
    (where, feature, grad), (there, found, gradient) = results
    assert there.equal(where)
    torch.testing.assert_close(found, feature, atol=1e-4, rtol=1e-4)
    assert (gradient - grad).norm() < 1e-3 * grad.norm()


MIDDLE = dict(cls_index=(8,), depth=4)


@pytest.mark.parametrize(
    ("sizes", "how", "message"),
    [
        ({}, dict(method="evry"), "reduction is 'evry', expected a known name; did you mean"),
        ({}, dict(schedule="r:99"), "reduction_schedule is 'r:99', expected at most"),
        ({}, dict(schedule="published"), "every has none for vim of width 8 and depth 4"),
        ({}, dict(hook="inside"), "reduction_hook is 'inside', expected a known name"),
        ({}, dict(scan="skipped"), "scan_policy is 'skipped', expected a known name"),
        (
            {},
            dict(gap_policy="bias"),
            "gap_policy is 'bias', expected none unless scan_policy is aligned",
        ),
        ({}, dict(scan="aligned", gap_policy="old"), "gap_policy is 'old', expected a known name"),
        ({}, dict(class_policy="edge"), "class_token_policy is 'edge', expected a known name"),
        (
            dict(cls_index=()),
            dict(class_policy="proportional"),
            "class_token_policy is 'proportional', expected 'exact' for a model without class",
        ),
        (
            dict(cls_index=(0,)),
            dict(class_policy="middle"),
            "class_token_policy is 'middle', expected 'exact' or 'proportional'",
        ),
        (
            {},
            dict(class_policy="middle", scan="aligned"),
            "class_token_policy is 'middle', expected 'exact' with scan_policy aligned",
        ),
        (
            {},
            dict(method="famba-v", scan="aligned", schedule="r:3@2"),
            "scan_policy is 'aligned', expected 'compact' with famba-v, which loses order",
        ),
        (
            dict(unaligned="its parameters stay behind"),
            dict(scan="aligned", schedule="r:3@2"),
            "scan_policy is 'aligned', expected another; its parameters stay behind",
        ),
        (
            dict(intermediates=frozenset({"mixed"})),
            dict(reads="delta mixed", schedule="r:3@2"),
            "reduction is 'every', which reads delta, mixed of the mixer, expected a method or",
        ),
        ({}, dict(reads="y"), "reduction is 'every' at layer 1, expected a later layer"),
        (
            {},
            dict(scan="aligned", gap_policy="cached"),
            "reduction is 'every' at layer 1, expected a later layer",
        ),
        ({}, dict(red="y"), "reduction option is 'red', expected one of every; did you mean"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(sizes, how, message):
    given = dict(method="every", schedule="r:3") | how
    with pytest.raises(ValueError, match=f"^.*{message}") as refusal:
        make_reduction(body(17, **{**MIDDLE, **sizes}), **given)
    assert "\n" not in str(refusal.value)


def test_hooks_after_the_mixer_may_read_the_first_one():
    made = make_reduction(body(17, **MIDDLE), "every", "r:3", hook="after", reads="y")
    assert [made.hooks(n).want for n in range(4)] == [frozenset({"y"})] * 4


def test_only_mixers_behind_a_gap_scan_across_it():
    how = dict(scan="aligned", gap_policy="self")
    made = make_reduction(body(17, **MIDDLE), "every", "r:3@2", hook="after", **how)
    assert [made.hooks(n).gap_policy for n in range(4)] == [None, None, "self", "self"]
    made = make_reduction(body(17, **MIDDLE), "every", "r:3@2", **how)
    assert [made.hooks(n).gap_policy for n in range(4)] == [None, "self", "self", "self"]
    plain = make_reduction(body(17, **MIDDLE), "every", "r:3@2", scan="aligned", gap_policy="none")
    assert not any(plain.hooks(n).with_tokens for n in range(4))


def test_options_are_read_as_what_their_defaults_are():
    text = "share=0.25, times=3,loud=true,reads=y z"
    wanted = dict(share=0.25, times=3, loud=True, reads="y z")
    assert read_options("every", text) == wanted
    assert make_reducer("every", **wanted).share == 0.25
    assert read_options("every", "") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("share", "expected key=value pairs"),
        ("share=1,share=2", "no key twice"),
        ("shre=1", "reduction option is 'shre', expected one of every; did you mean 'share'"),
        ("share=much", "reduction option share is 'much', expected float"),
        ("times=1.5", "reduction option times is '1.5', expected int"),
        ("loud=1", "reduction option loud is '1', expected true or false"),
    ],
)
def test_options_that_cannot_be_read_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_options("every", text)


def test_a_method_without_options_takes_none():
    with pytest.raises(ValueError, match="expected one of ordered; ordered has none"):
        read_options("ordered", "share=1")
