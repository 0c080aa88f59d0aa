"""Losses with a teacher, and what a teacher may not do."""

import copy
import math

import pytest
import torch
from torch import nn

from fambav.engine import distill
from fambav.engine.distill import Teacher, divergence
from fambav.tasks.classification import (
    binary_cross_entropy,
    smooth_cross_entropy,
    soft_cross_entropy,
)
from tests import golden
from tests.engine.test_step import IMAGES, Tokens, check_accumulation, check_processes, make, whole

BATCH, CLASSES = 4, 5
OURS = golden.hashed("distill:ours", BATCH, CLASSES).double() * 3
THEIRS = golden.hashed("distill:theirs", BATCH, CLASSES).double() * 3
SOFT = (golden.hashed("distill:targets", BATCH, CLASSES).double() * 2).softmax(dim=1)


def log_softmax(row):
    total = math.log(sum(math.exp(x) for x in row))
    return [x - total for x in row]


def kl_by_hand(ours, theirs):
    """Mean over the batch of sum q (log q - log p), number by number."""
    rows = []
    for mine, other in zip(ours.tolist(), theirs.tolist(), strict=True):
        p, q = log_softmax(mine), log_softmax(other)
        rows.append(sum(math.exp(b) * (b - a) for a, b in zip(p, q, strict=True)))
    return sum(rows) / len(rows)


def ce_by_hand(ours, targets):
    rows = zip(ours.tolist(), targets.tolist(), strict=True)
    losses = [
        -sum(t * a for t, a in zip(target, log_softmax(row), strict=True)) for row, target in rows
    ]
    return sum(losses) / len(losses)


def test_the_divergence_is_that_of_the_model_from_the_teacher():
    assert divergence(OURS, THEIRS).item() == pytest.approx(kl_by_hand(OURS, THEIRS), rel=1e-12)
    assert kl_by_hand(OURS, THEIRS) != pytest.approx(kl_by_hand(THEIRS, OURS), rel=1e-2)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_kl_adds_the_divergence_to_the_whole_loss_of_the_labels(alpha):
    found = distill.kl(soft_cross_entropy, alpha=alpha)(OURS, SOFT, THEIRS)
    expected = ce_by_hand(OURS, SOFT) + alpha * kl_by_hand(OURS, THEIRS)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("alpha", "tau"), [(0.5, 1.0), (0.3, 4.0), (1.0, 0.5)])
def test_soft_shares_the_loss_with_the_divergence_per_element_at_a_temperature(alpha, tau):
    found = distill.soft(soft_cross_entropy, alpha=alpha, tau=tau)(OURS, SOFT, THEIRS)
    distance = kl_by_hand(OURS / tau, THEIRS / tau) * BATCH * tau**2 / (BATCH * CLASSES)
    expected = (1 - alpha) * ce_by_hand(OURS, SOFT) + alpha * distance
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_hard_shares_the_loss_with_the_teachers_guess(alpha):
    found = distill.hard(soft_cross_entropy, alpha=alpha)(OURS, SOFT, THEIRS)
    guess = torch.eye(CLASSES)[[row.index(max(row)) for row in THEIRS.tolist()]]
    expected = (1 - alpha) * ce_by_hand(OURS, SOFT) + alpha * ce_by_hand(OURS, guess)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_a_second_head_learns_from_the_teacher_and_the_first_from_the_labels():
    pair, guess = (OURS, OURS.flip(1)), torch.eye(CLASSES)[THEIRS.argmax(dim=1)]
    found = distill.hard(soft_cross_entropy, alpha=0.3)(pair, SOFT, THEIRS)
    expected = 0.7 * ce_by_hand(OURS, SOFT) + 0.3 * ce_by_hand(OURS.flip(1), guess)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    found = distill.soft(soft_cross_entropy, alpha=0.3, tau=1.0)(pair, SOFT, THEIRS)
    distance = kl_by_hand(OURS.flip(1), THEIRS) / CLASSES
    expected = 0.7 * ce_by_hand(OURS, SOFT) + 0.3 * distance
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_mesa_adds_the_cross_entropy_with_the_average_once_it_sets_in():
    loss = distill.mesa(soft_cross_entropy, alpha=1.5)
    added = 1.5 * ce_by_hand(OURS, THEIRS.softmax(dim=1))
    assert loss(OURS, SOFT, THEIRS).item() == pytest.approx(ce_by_hand(OURS, SOFT) + added)
    assert loss(OURS, SOFT).item() == pytest.approx(ce_by_hand(OURS, SOFT))


@pytest.mark.parametrize("base", [smooth_cross_entropy(0.1), binary_cross_entropy])
def test_any_loss_of_the_labels_may_be_the_base(base):
    labels = torch.arange(BATCH)
    found = distill.kl(base, alpha=0.5)(OURS, labels, THEIRS)
    torch.testing.assert_close(found, base(OURS, labels) + 0.5 * divergence(OURS, THEIRS))


def test_a_model_that_is_its_teacher_is_at_no_distance_and_drawn_nowhere():
    logits = OURS.clone().requires_grad_()
    distance = divergence(logits, OURS)
    (gradient,) = torch.autograd.grad(distance, logits)
    assert distance.item() == pytest.approx(0.0, abs=1e-14)
    assert gradient.abs().max().item() < 1e-15


def test_the_divergence_of_short_floats_is_computed_in_long_ones():
    short = [x.bfloat16() for x in (OURS, THEIRS)]
    found = divergence(*short)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(kl_by_hand(*(x.double() for x in short)), rel=1e-5)


def taught(**options):
    """An update of a model that a teacher of the same kind teaches."""
    torch.manual_seed(5)
    teacher = Teacher(Tokens())
    update = make(**options)
    update.teacher = teacher
    update.loss = distill.kl(nn.functional.cross_entropy, alpha=0.5)
    return update, teacher


def test_a_teacher_is_frozen_and_draws_nothing():
    update, teacher = taught()
    before = copy.deepcopy(teacher.net.state_dict())
    losses = [update(iter(whole()), number).item() for number in range(3)]
    assert losses[0] != losses[2]
    assert not teacher.net.training
    assert all(parameter.grad is None for parameter in teacher.net.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.net.parameters())
    assert all(torch.equal(v, before[n]) for n, v in teacher.net.state_dict().items())
    assert torch.equal(teacher(IMAGES), teacher(IMAGES)), "blocks are skipped in training only"
    assert not teacher(IMAGES.clone().requires_grad_()).requires_grad


def test_the_model_in_training_moves_towards_its_teacher():
    update, teacher = taught(lr=0.5)
    update.model.eval()
    update.loss = distill.soft(nn.functional.cross_entropy, alpha=1.0, tau=1.0)
    distances = []
    for number in range(30):
        update(iter(whole()), number)
        distances.append(divergence(update.model(IMAGES), teacher(IMAGES)).item())
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.9 * distances[0]


def test_the_teacher_sees_the_mixed_images_in_the_precision_of_the_model():
    update, _ = taught(dtype=torch.bfloat16)
    seen = []
    update.mix = lambda images, targets, *, update: (images.flip(0) / 2, targets)
    update.teacher = lambda images: seen.append(images) or update.model(images).detach()
    dtypes = []
    update.loss = lambda logits, targets, lesson: dtypes.append(lesson.dtype) or logits.sum()
    update(iter(whole()), 0)
    assert torch.equal(seen[0], IMAGES.flip(0) / 2)
    assert dtypes == [torch.bfloat16]


def test_a_teacher_may_set_in_later():
    update, seen = taught()[0], []
    update.taught_from = 2
    update.loss = lambda logits, targets, *lesson: seen.append(len(lesson)) or logits.sum()
    for number in range(4):
        update(iter(whole()), number)
    assert seen == [0, 0, 1, 1]


def test_accumulated_updates_with_a_teacher_are_those_of_one_large_batch():
    check_accumulation(lambda **options: taught(**options)[0])


def test_processes_with_a_teacher_each_average_to_one_large_batch():
    check_processes(lambda **options: taught(**options)[0])


def test_a_digest_tells_teachers_apart():
    torch.manual_seed(0)
    net = Tokens()
    net.register_buffer("count", torch.tensor(3))
    twin = copy.deepcopy(net)
    assert Teacher(net).digest() == Teacher(twin).digest()
    twin.count += 1
    assert Teacher(net).digest() != Teacher(twin).digest()
    other = nn.ModuleDict({"renamed": copy.deepcopy(net)})
    assert Teacher(net).digest() != Teacher(other).digest()
