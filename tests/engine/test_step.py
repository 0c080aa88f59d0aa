"""One update, its losses, and a batch on its way to the device."""

import math

import pytest
import torch
from torch import nn

from fambav.engine.distributed import Processes
from fambav.engine.optim import Average
from fambav.engine.precision import Precision
from fambav.engine.step import MAX_SKIPPED, DivergedError, Losses, TrainStep, to_device
from fambav.layers.drop import DropPath
from fambav.tasks.classification import (
    binary_cross_entropy,
    smooth_cross_entropy,
    soft_cross_entropy,
)
from tests import golden

CPU = torch.device("cpu")
IMAGES, LABELS = golden.hashed("train:images", 32, 6), torch.arange(32) % 3


class Tokens(nn.Module):
    """Sees each sample as a sequence of one token, so that DropPath can drop it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.drop = DropPath(0.4)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(x + self.drop(self.inner(x)[:, None])[:, 0])


def make(*, model=None, lr=0.1, processes=None, **options):
    torch.manual_seed(0)
    model = model or Tokens()
    return TrainStep(
        model=model,
        forward=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        loss=nn.functional.cross_entropy,
        lr=lambda update: lr,
        seed=lambda update, place: torch.manual_seed(1000 + update),
        precision=Precision(CPU, options.pop("dtype", None)),
        processes=processes or Processes(0, 1, CPU),
        **options,
    )


def whole(repeat=1):
    return [(IMAGES, LABELS)] * repeat


def parts(count, repeat=1):
    """The batch dealt to `count` shards, as the loader deals it."""
    return [(IMAGES[v::count], LABELS[v::count]) for v in range(count)] * repeat


def weights(update):
    return torch.cat([p.detach().flatten() for p in update.model.parameters()])


def epoch(step, batches, count):
    """Make updates; return what the losses come to."""
    losses, stream = Losses(step, 0), iter(batches)
    step.forward.train(step.training)
    for update in range(count):
        losses.add(step(stream, update))
        losses.fetch()
    return losses.summary()


def check_accumulation(made):
    """Check that updates of four batches are those of one large batch."""
    one, four = made(), made(accumulate=4)
    first = epoch(one, whole(repeat=3), 3)
    second = epoch(four, parts(4, repeat=3), 3)
    assert second.loss == pytest.approx(first.loss, rel=1e-6)
    torch.testing.assert_close(weights(four), weights(one), rtol=1e-5, atol=1e-7)


def test_accumulated_updates_are_those_of_one_large_batch():
    check_accumulation(make)


class Recorded(Processes):
    """One of two processes that are run one after the other: adds what the other had."""

    def total(self, values):
        return values.mul_(2)


def check_processes(made):
    """Check that two processes average to the loss and the gradients of one large batch."""
    one, *shares = made(), *(made(processes=Recorded(rank, 2, CPU)) for rank in range(2))
    one.forward.train()
    loss = one._backward((IMAGES, LABELS), 0, 0)
    losses = []
    for share, batch in zip(shares, parts(2), strict=True):
        share.forward.train()
        losses.append(share._backward(batch, 0, 0))
    torch.testing.assert_close(sum(losses) / 2, loss)
    for mine, *others in zip(*(u.model.parameters() for u in (one, *shares)), strict=True):
        torch.testing.assert_close(sum(p.grad for p in others) / 2, mine.grad)


def test_processes_average_to_one_large_batch():
    check_processes(make)


def test_dropped_samples_change_with_the_update_and_not_with_history():
    update = make(lr=0.0)
    losses = [update(iter(whole()), number).item() for number in (0, 1, 2, 1)]
    assert losses[1] == losses[3]
    assert len(set(losses)) == 3


def test_every_batch_of_an_update_is_seeded_by_its_place_among_all():
    seen = []
    for rank in range(2):
        update = make(accumulate=3, processes=Recorded(rank, 2, CPU))
        update.seed = lambda number, place: seen.append((number, place))
        update(iter(parts(3)), 7)
    assert sorted(seen) == [(7, place) for place in range(6)]


def test_no_train_mode_drops_nothing():
    update = make(lr=0.0, training=False)
    assert epoch(update, whole(2), 2).loss == pytest.approx(
        nn.functional.cross_entropy(update.model(IMAGES), LABELS).item()
    )


def test_learning_rate_is_that_of_the_update():
    update = make()
    update.lr = lambda number: 0.1 * number
    before = weights(update)
    update(iter(whole()), 0)
    assert torch.equal(weights(update), before)
    update(iter(whole()), 3)
    assert update.optimizer.param_groups[0]["lr"] == pytest.approx(0.3)
    assert not torch.equal(weights(update), before)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_gradient_is_clipped_to_the_norm(dtype):
    update = make(lr=1.0, max_grad_norm=1e-3, dtype=dtype)
    before = weights(update)
    update(iter(whole()), 0)
    assert (weights(update) - before).norm().item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_computes_low_and_keeps_weights_high(dtype):
    seen = []
    update = make(dtype=dtype, model=nn.Linear(6, 3))
    update.model.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    assert math.isfinite(epoch(update, whole(2), 2).loss)
    assert seen == [dtype, dtype]
    assert update.model.weight.dtype == torch.float32


def test_average_follows_the_update_number():
    model = nn.Linear(6, 3)
    update = make(model=model, average=Average(model, decay=0.9))
    stream = iter(whole(repeat=2))
    update(stream, 0)
    first = model.weight.detach().clone()
    assert torch.equal(update.average.model.weight, first)
    update(stream, 1)
    decay = 1 - 2 ** (-2 / 3)
    expected = decay * first + (1 - decay) * model.weight
    torch.testing.assert_close(update.average.model.weight, expected)


def test_mixing_comes_before_the_model_with_the_update_number():
    seen = []

    def mix(images, targets, *, update):
        seen.append(update)
        return images * 0, nn.functional.one_hot(targets, 3).float()

    model = nn.Linear(6, 3, bias=False)
    update = make(model=model, mix=mix, accumulate=2)
    summary = epoch(update, parts(2, repeat=2), 2)
    assert seen == [0, 0, 1, 1]
    assert summary.loss == pytest.approx(math.log(3))


def test_losses_are_fetched_once_and_counted_from_the_start_of_the_run():
    step, fetched = make(lr=0.0, training=False), []
    losses = Losses(step, 10, known=[0.5])
    for update in range(11, 18):
        losses.add(step(iter(whole()), update))
        if update % 3 == 0:
            fetched.append((losses.done, len(losses.fetch())))
    fetched.append((losses.done, len(losses.fetch())))
    assert fetched == [(13, 2), (16, 3), (18, 2)]
    assert len(losses) == len(losses.values) == 8
    assert losses.fetch() == []


def test_a_batch_of_any_structure_goes_to_the_device():
    batch = (IMAGES, [{"boxes": LABELS, "name": "a"}])
    images, targets = to_device(batch, torch.device("meta"))
    assert images.is_meta and targets[0]["boxes"].is_meta and targets[0]["name"] == "a"


def poisoned(at, count):
    batches = whole(count)
    for number in at:
        batches[number] = (torch.full_like(IMAGES, torch.nan), LABELS)
    return batches


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_update():
    with pytest.raises(DivergedError, match=r"not finite at update 4, .* rate there is 0\.1$"):
        epoch(make(), poisoned([4], 9), 9)


def test_skipped_updates_leave_no_trace():
    clean, skipping = make(), make(skipping=True)
    skipping.seed = clean.seed = lambda update, place: torch.manual_seed(0)
    summary = epoch(skipping, poisoned([1, 3], 5), 5)
    expected = epoch(clean, whole(3), 3)
    assert summary.skipped == 2
    assert summary.loss == expected.loss
    assert torch.equal(weights(skipping), weights(clean))


@pytest.mark.parametrize(
    ("options", "bad"),
    [
        ({"skipping": True}, torch.full_like(IMAGES, torch.nan)),
        ({"dtype": torch.float16}, 1e3 * IMAGES.sign()),
        ({"dtype": torch.float16, "max_grad_norm": 1.0}, 1e3 * IMAGES.sign()),
    ],
    ids=["a loss that is no number", "an overflow", "an overflow that is clipped"],
)
def test_an_update_that_is_left_out_leaves_the_average_alone(options, bad):
    """Under a loss scale an overflow is left out by the scaler itself."""
    model = nn.Linear(6, 3)
    update = make(model=model, average=Average(model, decay=0.9), **options)
    update(iter(whole()), 0)
    nn.init.ones_(model.weight)  # far from the average: any move shows
    before, scale = average_of(update), update.precision.scaler.get_scale()
    update(iter([(bad, LABELS)]), 1)
    assert torch.equal(model.weight, torch.ones(3, 6)), "the update was made"
    assert torch.equal(average_of(update), before)
    assert update.precision.scaler.get_scale() == (scale / 2 if "dtype" in options else 1.0)
    update(iter(whole()), 2)
    assert not torch.equal(average_of(update), before)


def average_of(update):
    return update.average.model.weight.detach().clone()


def test_too_many_skipped_updates_in_a_row_stop_the_run():
    count = MAX_SKIPPED + 1
    assert epoch(make(skipping=True), poisoned(range(1, count), count + 1), count + 1).skipped == 20
    with pytest.raises(DivergedError, match="not finite at update 20 and 20 before it"):
        epoch(make(skipping=True), poisoned(range(count), count), count)


def targets(smoothing):
    """The published mix: 0.3 of each sample, the rest of the reversed batch."""
    labels = torch.tensor([0, 3, 3, 9])
    off = smoothing / 10
    hot = nn.functional.one_hot(labels, 10).float() * (1 - smoothing) + off
    return 0.3 * hot + 0.7 * hot.flip(0)


def test_losses_are_the_published_ones():
    case = golden.load("schedule")[1]["cases"]["loss"]
    logits, labels = 3 * golden.hashed("ce:logits", 4, 10), torch.tensor(case["targets"])
    found = {
        "soft_target_ce_lam0_3_s0_1": soft_cross_entropy(logits, targets(0.1)),
        "label_smoothing_ce_0_1": smooth_cross_entropy(0.1)(logits, labels),
        "plain_ce": smooth_cross_entropy(0.0)(logits, labels),
        "bce_targets_gt_0": binary_cross_entropy(logits, targets(0.1)),
        "bce_targets_gt_0_with_smoothing_0": binary_cross_entropy(logits, targets(0.0)),
    }
    for name, value in found.items():
        assert value.item() == pytest.approx(case[name], abs=1e-6), name


def test_binary_loss_takes_labels_as_well():
    logits = golden.hashed("bce:logits", 4, 5)
    labels = torch.tensor([0, 1, 4, 4])
    hot = nn.functional.one_hot(labels, 5).float()
    assert torch.equal(binary_cross_entropy(logits, labels), binary_cross_entropy(logits, hot))
