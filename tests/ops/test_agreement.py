"""What is unwritten, wrong or another at the second call does not pass for a right result."""

import pytest
import torch

from tests.ops.agreement import agrees_twice

ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([ONES * 1.001, ONES * 1.001], "y is off by 1.0e-03"),
        ([ONES, ONES * (1 + 1e-6)], "y is another at the second call"),
        ([ONES * torch.inf, ONES * torch.inf], "y is not finite"),
        ([torch.tensor([[1.0, torch.nan, 1.0]] * 2)] * 2, "y is another at the second call"),
        ([ONES[:1], ONES[:1]], "y has another shape"),
    ],
)
def test_it_is_found(results, message):
    given = iter(results)
    with pytest.raises(AssertionError, match=message):
        agrees_twice(lambda: {"y": next(given)}, {"y": ONES}, torch.float32, lambda *_: None)


def test_the_largest_error_over_the_largest_number_is_recorded():
    told = {}
    agrees_twice(
        lambda: {"y": ONES * 1.5, "z": ONES},
        {"y": ONES * 1.501, "z": ONES * 1.0001},
        torch.float16,
        told.__setitem__,
    )
    assert told == {"worst_tensor": "y", "worst_error": pytest.approx(0.001 / 1.501, rel=1e-3)}
