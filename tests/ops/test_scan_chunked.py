"""The chunked scan: what it keeps, what it copies, and where chunks and blocks end."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fambav.ops import BackendError, force, scan_chunked, selective_scan
from tests.ops.agreement import agree, draw, results, scan_inputs, widened

FULL = dict(delta_softplus=True, return_last_state=True)


@pytest.fixture
def blocks(monkeypatch):
    """Make blocks of 2 rows and chunks of 3 steps."""
    monkeypatch.setattr(scan_chunked, "block_size", lambda *sizes: (2, 3))


def saved(function):
    """Storages that autograd keeps, by address."""
    found = {}

    def pack(x):
        found[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function()
    return out, found


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.usefixtures("blocks")
def test_ends_of_chunks_and_blocks_do_not_show(batch, length, reverse):
    inputs = scan_inputs(batch, 6, 3, 2, length, dtype=torch.float64)
    want = results(selective_scan, inputs, "reference", **FULL, reverse=reverse)
    agree(results(selective_scan, inputs, "cpu", **FULL, reverse=reverse), want, torch.float64)


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize(("dim", "state"), [(64, 1), (384, 16), (4096, 64)])
def test_a_block_fits_the_cache_and_never_vanishes(batch, dim, state):
    rows, steps = scan_chunked.block_size(batch, dim, state, torch.device("cpu"))
    assert 1 <= rows <= batch
    assert 1 <= steps <= scan_chunked.MAX_STEPS
    assert rows == 1 or rows * dim * state <= scan_chunked.STEP_NUMBERS
    assert steps == 1 or rows * steps * dim * state <= scan_chunked.CHUNK_NUMBERS


def test_an_empty_batch_has_an_empty_result():
    y = selective_scan(**scan_inputs(0, 6, 1, 2, 4))
    assert y.shape == (0, 6, 4)


def test_only_the_inputs_and_a_state_for_each_chunk_are_kept():
    inputs = scan_inputs(4, 64, 1, 16, 197)
    with force("cpu"):
        _, kept = saved(lambda: selective_scan(**inputs, delta_softplus=True))
    own = {x.untyped_storage().data_ptr() for x in inputs.values()}
    steps = scan_chunked.block_size(4, 64, 16, torch.device("cpu"))[1]
    states = [x.numel() for address, x in kept.items() if address not in own]
    assert own <= kept.keys()
    assert states == [4 * 64 * 16 * -(-197 // steps)]


def test_it_keeps_at_most_a_quarter_of_what_a_loop_keeps():
    inputs = scan_inputs(4, 64, 1, 16, 65)
    own = {x.untyped_storage().data_ptr() for x in inputs.values()}
    size = {}
    for backend in ("cpu", "reference"):
        with force(backend):
            _, kept = saved(lambda: selective_scan(**inputs, delta_softplus=True))
        extra = (x.untyped_storage().nbytes() for a, x in kept.items() if a not in own)
        size[backend] = sum(extra)
    assert 0 < 4 * size["cpu"] <= size["reference"]


def test_nothing_is_kept_where_no_gradient_is_wanted():
    inputs = scan_inputs(2, 8, 1, 4, 5)
    options = dict(softplus=True, reverse=False, out_dtype=torch.float32)
    names = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"]
    tensors = [inputs[name].detach() for name in names]
    y, _, kept = torch.ops.fambav.chunked_scan(*tensors, **options, keep=False)
    assert kept.numel() == 0
    with torch.no_grad(), force("cpu"):
        without = selective_scan(**inputs, delta_softplus=True)
    assert not without.requires_grad
    torch.testing.assert_close(without, y, rtol=0, atol=0)


def test_a_slice_of_a_projection_is_scanned_like_its_copy():
    whole = draw("whole", 2, 5, 16, dtype=torch.float64).detach()
    inputs = scan_inputs(2, 8, 1, 4, 5, dtype=torch.float64)
    views = [whole[..., part].detach().requires_grad_() for part in (slice(8), slice(8, 16))]
    sliced = inputs | dict(u=views[0].mT, z=views[1].mT)
    copied = inputs | dict(u=views[0].mT.contiguous(), z=views[1].mT.contiguous())
    with force("cpu"):
        y, kept = saved(lambda: selective_scan(**sliced, delta_softplus=True))
        want = selective_scan(**copied, delta_softplus=True)
    torch.testing.assert_close(y, want, rtol=0, atol=1e-14)
    assert whole.untyped_storage().data_ptr() in kept
    grads = (torch.autograd.grad(out.square().sum(), views) for out in (y, want))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant):
    inputs = scan_inputs(2, 8, 1, 4, 5)

    def call(*tensors):
        return selective_scan(**dict(zip(inputs, tensors, strict=True)), delta_softplus=True)

    with force("cpu"):
        want = torch.autograd.grad(call(*inputs.values()).sum(), list(inputs.values()))
        y = checkpoint(call, *inputs.values(), use_reentrant=reentrant)
        y.sum().backward()
    for tensor, grad in zip(inputs.values(), want, strict=True):
        torch.testing.assert_close(tensor.grad, grad, rtol=0, atol=0)


def test_saved_tensors_may_live_elsewhere():
    inputs = scan_inputs(2, 8, 1, 4, 5)
    want = results(selective_scan, inputs, "cpu", **FULL)
    store = []

    def pack(x):
        store.append(x.detach().numpy().copy())
        return len(store) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: torch.from_numpy(store[i])):
        got = results(selective_scan, inputs, "cpu", **FULL)
    assert len(store) == len(inputs) + 1
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor)


class Scanner(torch.nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.inputs = torch.nn.ParameterDict(inputs)

    def forward(self, scale):
        return selective_scan(**self.inputs, delta_softplus=True) * scale


def test_it_trains_under_distributed_data_parallel(tmp_path):
    scanner = Scanner(scan_inputs(2, 8, 1, 4, 5))
    parameters = list(scanner.parameters())
    want = torch.autograd.grad(scanner(2.0).sum(), parameters)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        DistributedDataParallel(scanner)(2.0).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for parameter, expected in zip(parameters, want, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_two_runs_are_the_same_to_the_last_bit():
    inputs = scan_inputs(3, 64, 1, 16, 65)
    first, second = (results(selective_scan, inputs, "cpu", **FULL) for _ in range(2))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0)


def test_the_compiler_sees_one_operator_and_no_loop():
    inputs = scan_inputs(2, 8, 1, 4, 5)
    graphs = []

    def count(graph, examples):
        del examples
        graphs.append([node.target for node in graph.graph.nodes if "scan" in str(node.target)])
        return graph

    def call(*tensors):
        return selective_scan(**dict(zip(inputs, tensors, strict=True)), delta_softplus=True) + 1

    with force("cpu"):
        y = torch.compile(call, fullgraph=True, backend=count)(*inputs.values())
        torch.testing.assert_close(y, call(*inputs.values()), rtol=0, atol=0)
    assert [len(nodes) for nodes in graphs] == [1]


@pytest.mark.parametrize(
    ("groups", "absent", "keep"),
    [(1, (), True), (2, ("D", "z", "delta_bias"), True), (2, ("z",), False)],
)
def test_the_operators_keep_their_promises_to_the_compiler(groups, absent, keep):
    inputs = scan_inputs(2, 8, groups, 4, 5)
    tensors = [None if name in absent else x.detach() for name, x in inputs.items()]
    flags = dict(softplus=True, reverse=True)
    options = flags | dict(out_dtype=torch.float32, keep=keep)
    checks = dict(test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
    operators = torch.ops.fambav
    torch.library.opcheck(operators.chunked_scan.default, tuple(tensors), options, **checks)
    if keep:
        y, h, kept = operators.chunked_scan(*tensors, **options)
        arguments = torch.ones_like(y), torch.ones_like(h), kept, *tensors
        backward = operators.chunked_scan_backward.default
        torch.library.opcheck(backward, arguments, flags, **checks)


def test_what_it_cannot_do_is_refused_by_name():
    inputs = scan_inputs(2, 8, 1, 4, 5)
    constant = inputs | dict(B=torch.ones(8, 4))
    uneven = inputs | dict(C=torch.ones(2, 2, 4, 5))
    with force("cpu"):
        with pytest.raises(
            BackendError, match="'cpu' of selective_scan cannot run: B or C is constant"
        ):
            selective_scan(**constant)
        with pytest.raises(BackendError, match="B has 1 groups and C 2, expected the same"):
            selective_scan(**uneven)
    wide = widened(uneven)
    with force("reference"):
        want = selective_scan(**wide)
    torch.testing.assert_close(selective_scan(**wide), want, rtol=0, atol=0)
