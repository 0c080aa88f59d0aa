"""Accuracy that counts every sample once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fambav.engine.distributed import Processes
from fambav.engine.evaluate import evaluate
from fambav.engine.precision import Precision
from fambav.tasks import task_of

CPU = torch.device("cpu")
ONE = Processes(0, 1, CPU)
TASK = task_of("DIGITS")


def meter():
    return TASK.meter(8, CPU)


def scores(logits, labels, sizes, processes=ONE):
    batches = list(zip(logits.split(sizes), labels.split(sizes), strict=True))
    how = dict(meter=meter(), processes=processes, precision=Precision(CPU, None))
    return evaluate(nn.Identity(), batches, **how)


@pytest.mark.parametrize("classes", [3, 10])
def test_scores_are_those_of_the_whole_set_whatever_the_batches(classes):
    torch.manual_seed(0)
    logits, labels = torch.randn(23, classes), torch.randint(classes, (23,))
    expected = F.cross_entropy(logits.double(), labels).item()
    order = logits.argsort(dim=1, descending=True)
    for sizes in ([23], [8, 8, 7], [1] * 23):
        found = scores(logits, labels, sizes)
        assert found.metrics["loss"] == pytest.approx(expected, rel=1e-6)
        assert found.metrics["acc1"] == pytest.approx(
            100 * (order[:, 0] == labels).double().mean().item()
        )
        hits = (order[:, :5] == labels[:, None]).any(dim=1)
        assert found.metrics["acc5"] == pytest.approx(100 * hits.double().mean().item())
        assert found.samples == 23


class Two(Processes):
    """The first of two processes; the sums of the second are known."""

    def total(self, values):
        return values.add_(torch.tensor([7.0, 1.0, 2.0, 3.0], dtype=torch.float64))

    def largest(self, value):
        return max(value, 2)


def test_shares_of_uneven_size_are_added_before_dividing():
    logits = torch.eye(8)[:5] * 20
    found = scores(logits, torch.arange(5), [5], Two(0, 2, CPU))
    assert found.samples == 8
    assert found.metrics["acc1"] == pytest.approx(100 * 6 / 8)
    assert found.metrics["acc5"] == pytest.approx(100 * 7 / 8)
    assert found.metrics["loss"] == pytest.approx(7 / 8, rel=1e-6)


def test_a_process_without_samples_still_takes_part():
    empty = torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64)
    assert scores(*empty, [0], Two(0, 2, CPU)).samples == 3
    with pytest.raises(ValueError, match="evaluation set is empty"):
        scores(*empty, [0])


def test_batches_are_taken_as_often_as_on_the_process_that_has_most():
    # Whoever takes a batch may wait for the others there.
    taken = []

    def take(stream):
        taken.append(next(stream, None))
        return taken[-1]

    class More(Two):
        def largest(self, value):
            return value + 3

    batches = [(torch.eye(3), torch.arange(3))]
    how = dict(meter=meter(), processes=More(0, 2, CPU), precision=Precision(CPU, None), take=take)
    assert evaluate(nn.Identity(), batches, **how).samples == 6
    assert [batch is None for batch in taken] == [False, True, True, True]


def test_the_model_is_evaluated_in_evaluation_mode_and_left_as_it_was():
    model = nn.Sequential(nn.Dropout(0.5)).train()
    logits = torch.randn(4, 3)
    batch = [(logits, logits.argmax(dim=1))]
    for training in (True, False):
        model.train(training)
        how = dict(meter=meter(), processes=ONE, precision=Precision(CPU, None))
        found = evaluate(model, batch, **how)
        assert found.metrics["acc1"] == 100
        assert model.training is training


def test_the_line_is_the_one_that_tools_look_for():
    found = scores(torch.eye(6)[:2] * 50, torch.arange(2), [2])
    assert TASK.line(found) == "* Acc@1 100.000 Acc@5 100.000 loss 0.000"
