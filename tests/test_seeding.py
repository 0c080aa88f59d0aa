"""Draws named by what they are for."""

import random

import numpy as np
import pytest
import torch

from fambav.seeding import key, seed_all, seed_cpu


def draws():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_a_key_is_the_same_everywhere():
    assert key(0, "order", 0) == 2094333682667709378
    assert key(np.int64(0), "order", torch.tensor(0)) == key(0, "order", 0)


def test_every_part_of_a_key_counts():
    names = [(0, "a", 1), (1, "a", 0), (0, "b", 1), (0, "a", 1, 0), (0, "a1"), (0, "a", "1")]
    keys = [key(*name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(0 <= number < 2**63 for number in keys)


def test_a_key_takes_no_fractions():
    with pytest.raises(TypeError):
        key(0, 0.5)


@pytest.mark.parametrize("seed", [seed_cpu, seed_all])
def test_a_seed_decides_all_three_generators(seed):
    seed(0, "a", 1)
    first = draws()
    later = draws()
    seed(0, "a", 1)
    assert draws() == first
    assert all(a != b for a, b in zip(first, later, strict=True))
    seed(0, "a", 2)
    assert all(a != b for a, b in zip(first, draws(), strict=True))


def test_only_seeding_all_reaches_the_devices(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    seed_cpu(0, "a")
    assert seeds == []
    seed_all(0, "a")
    assert seeds == [key(0, "a")]
