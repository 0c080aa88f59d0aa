"""Orders in which paths read a map."""

import io

import pytest
import torch
from torch.autograd.gradcheck import gradcheck, gradgradcheck

from fambav.ops.scan_order import order_table, to_steps, to_tokens
from fambav.ops.scan_paths import PATHS, scan_paths

CPU = torch.device("cpu")


def test_paths_are_rows_and_columns_and_these_from_their_ends():
    paths = scan_paths((2, 3), CPU)
    rows, columns = [0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]
    assert paths.T.tolist() == [rows, columns, rows[::-1], columns[::-1]]
    one = scan_paths((2, 3), CPU, ("-columns",))
    assert one.T.tolist() == [columns[::-1]]
    with pytest.raises(ValueError, match="path is 'slant', expected one of rows, columns"):
        scan_paths((2, 3), CPU, ("slant",))


def test_diagonals_are_read_from_their_upper_ends():
    def cells(grid, name):  # row and column of each step
        order = scan_paths(grid, CPU, (name,))[:, 0].tolist()
        return " ".join(f"{cell // grid[1]}{cell % grid[1]}" for cell in order)

    down_left = "33 23 32 13 22 31 03 12 21 30 02 11 20 01 10 00"
    down_right = "03 02 13 01 12 23 00 11 22 33 10 21 32 20 31 30"
    assert cells((4, 4), "antidiagonals") == down_left
    assert cells((4, 4), "diagonals") == down_right
    assert cells((4, 4), "-diagonals") == " ".join(down_right.split()[::-1])
    assert cells((2, 3), "antidiagonals") == "12 02 11 01 10 00"
    assert cells((3, 2), "diagonals") == "01 00 11 10 21 20"


@pytest.mark.parametrize("grid", [(3, 5), (1, 4), (6, 6)])
def test_all_paths_are_a_table(grid):
    paths = scan_paths(grid, CPU, PATHS)
    assert paths.shape == (grid[0] * grid[1], len(PATHS))
    assert torch.equal(order_table(paths, len(paths)), paths)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_traced_paths_are_not_kept():
    def doubled(x):
        read = to_steps(x, scan_paths((2, 7), CPU))
        return to_tokens(read, scan_paths((2, 7), CPU), 14).sum(dim=2)

    x = torch.randn(1, 14, 2)
    traced = torch.compile(doubled, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(x), 4 * x)
    torch.testing.assert_close(doubled(x), 4 * x)
    with torch.inference_mode():
        first = scan_paths((2, 9), CPU)
    assert scan_paths((2, 9), CPU) is first


def there_and_back(x):
    """Use all of them, and a product that has a second derivative."""
    paths = scan_paths((2, 3), CPU)
    read = to_steps(x, paths)
    cells = to_tokens(read * read[:, :, :1], paths, 6)
    return to_tokens(to_steps(cells, paths), paths, 6).sum(dim=2)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")  # by jvp itself
def test_paths_have_all_derivatives_at_all_times():
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    gradcheck(there_and_back, x, check_forward_ad=True)
    gradgradcheck(there_and_back, x)
    both = torch.func.vmap(there_and_back)(torch.stack((x, 2 * x)))
    torch.testing.assert_close(both, torch.stack((there_and_back(x), 4 * there_and_back(x))))
    gradient = torch.func.grad(lambda x: there_and_back(x).sum())(x.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(there_and_back(x).sum(), x)[0])


def test_paths_made_under_a_transform_do_not_outlive_it():
    torch.func.grad(lambda x: to_steps(x, scan_paths((3, 7), CPU)).sum())(torch.ones(1, 21, 2))
    assert scan_paths((3, 7), CPU).sum().item() == 4 * sum(range(21))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit
def test_a_trace_can_be_saved():
    x, file = torch.randn(1, 6, 3, requires_grad=True), io.BytesIO()
    torch.jit.save(torch.jit.trace(there_and_back, x), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), there_and_back(x))
