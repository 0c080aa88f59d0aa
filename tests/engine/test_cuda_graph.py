"""Passes as CUDA graphs: what is recorded, and when it is replayed."""

import itertools

import pytest
import torch
from torch import nn

from fambav.config import parse
from fambav.engine.cuda_graph import CudaGraph
from fambav.engine.distributed import Processes
from fambav.engine.precision import Precision
from fambav.layers import DropPath, shard
from fambav.layers.drop import current
from fambav.training import model
from fambav.training.step import train_step

CPU = torch.device("cpu")
SHAPE = (4, 3)


class Dropping(nn.Module):
    """Drops whole samples."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.drop = DropPath(0.5)

    def forward(self, x):
        return self.drop(self.inner(x)[:, None])[:, 0]


@pytest.fixture
def recorded(monkeypatch):
    """Stands for the recording: runs the module as ever, in the shard that it was recorded in."""
    seen = []

    def record(module, samples):
        seen.append((tuple(samples[0].shape), torch.is_autocast_cache_enabled(), current()))
        index, count = current()

        def replay(images):
            seen.append("replay")
            with shard(index, count):
                return module(images)

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    return seen


def made(net=None, **options):
    torch.manual_seed(0)
    return CudaGraph(net or Dropping(), SHAPE, precision=Precision(CPU, None), **options)


def test_a_batch_of_the_recorded_shape_is_replayed_and_others_run_as_ever(recorded):
    replayed = made()
    (shape, cached, (index, count)) = recorded[0]
    assert (shape, cached, index.tolist(), count) == (SHAPE, False, [0], 1)
    replayed(torch.ones(SHAPE))
    assert recorded[1:] == ["replay"]
    replayed(torch.ones(3, 3))  # a last batch
    with torch.no_grad():
        replayed(torch.ones(SHAPE))
    with shard(1, 2):  # drawn for another global batch than the recorded one
        replayed(torch.ones(SHAPE))
    replayed.eval()
    replayed(torch.ones(SHAPE))
    assert recorded[1:] == ["replay"]


def test_a_replay_draws_what_the_model_draws_from_the_same_seed_in_every_shard(recorded):
    net, images = Dropping(), torch.randn(SHAPE)
    replayed = made(net, shards=3)
    for index in (0, 2, 1):
        with shard(index, 3):
            torch.manual_seed(7)
            found = replayed(images)
            torch.manual_seed(7)
            assert torch.equal(found, net(images))
    assert recorded.count("replay") == 3


def test_gradients_that_are_added_up_are_copied_from_where_a_replay_writes_them(monkeypatch):
    place = torch.zeros(3)

    class Writes(torch.autograd.Function):
        """A replay: the gradient is always in the same place."""

        @staticmethod
        def forward(ctx, weight, images):
            ctx.save_for_backward(images)
            return (weight * images).sum()

        @staticmethod
        def backward(ctx, grad):
            (images,) = ctx.saved_tensors
            return place.copy_(grad * images).detach(), None

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, images):
            return Writes.apply(self.weight, images)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda module, _: module)
    net = Scale()
    replayed = CudaGraph(net, (3,), precision=Precision(CPU, None), accumulating=True)
    replayed(torch.tensor([1.0, 2.0, 3.0])).backward()
    replayed(torch.tensor([10.0, 20.0, 30.0])).backward()
    assert net.weight.grad.tolist() == [11.0, 22.0, 33.0]


def test_the_model_itself_is_left_as_it_was(recorded):
    net = Dropping()
    before = dict(net.__dict__)
    made(net)
    assert net.__dict__ == before
    assert net.training


FUSED = "--fusion-strategy upper --fusion-layer 3 --fusion-token 8 --drop-path 0.3 --drop 0.1"


def trained(*words):
    """Losses of a few updates on a GPU, then weights and their average."""
    flags = "--model vim_micro --input-size 32 --batch-size 8 --mixup 0 --cutmix 0 --lr 0.01"
    wanted = parse(f"{flags} --model-ema-decay 0.5 {' '.join(words)}".split())
    gpu = torch.device("cuda", 0)
    torch.manual_seed(0)
    net = model(wanted, num_classes=10).to(gpu)
    made = train_step(wanted, net, Processes(0, 1, gpu), num_classes=10, per_epoch=3)
    made.forward.train(made.training)
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8)) for _ in range(3)]
    stream = itertools.cycle(batches)
    losses = torch.stack([made(stream, number) for number in range(6)])
    with torch.no_grad():
        made.model.eval()
        scores = made.model(batches[0][0][:3].to(gpu))
    return [losses, scores, *net.state_dict().values(), *made.average.model.state_dict().values()]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "words",
    [
        "",
        FUSED,
        f"{FUSED} --fusion-method ordered",
        f"{FUSED} --grad-accum-steps 2",
        f"{FUSED} --no_amp",
        f"{FUSED} --amp-dtype fp16 --clip-grad 1",
        f"{FUSED} --grad-checkpointing",
        f"{FUSED} --no-train-mode",
    ],
)
def test_replayed_updates_equal_those_that_are_not_bit_for_bit(words):
    for ours, theirs in zip(trained(words, "--cuda-graphs"), trained(words), strict=True):
        assert torch.equal(ours, theirs)
