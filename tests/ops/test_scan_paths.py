"""Orders in which paths read a map, and features brought into them and back."""

import pytest
import torch

from fambav.ops.scan_paths import (
    CROSS,
    PATHS,
    merge_paths,
    read_paths,
    scan_paths,
    to_cells,
    to_steps,
)

CPU = torch.device("cpu")


def test_paths_are_rows_and_columns_and_these_from_their_ends():
    paths = scan_paths((2, 3), CPU)
    rows, columns = [0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]
    assert paths.order[0].T.tolist() == [rows, columns, rows[::-1], columns[::-1]]
    one = scan_paths((2, 3), CPU, ("-columns",))
    assert one.order[0].T.tolist() == [columns[::-1]]
    with pytest.raises(ValueError, match="path is 'diagonal', expected one of rows, columns"):
        scan_paths((2, 3), CPU, ("diagonal",))


@pytest.mark.parametrize("names", [CROSS, PATHS[1:3]])
def test_features_are_read_in_the_order_and_come_back(names):
    paths = scan_paths((3, 5), CPU, names)
    x = torch.randn(2, 15, 4, dtype=torch.float64, requires_grad=True)
    each = torch.randn(2, 15, len(names), 4, dtype=torch.float64, requires_grad=True)
    read = read_paths(x, paths)
    for path in range(len(names)):
        order = paths.order[0, :, path]
        assert torch.equal(read[:, :, path], x[:, order])
        assert torch.equal(to_steps(each, paths)[:, :, path], each[:, order, path])
    assert torch.equal(to_cells(to_steps(each, paths), paths), each)
    torch.testing.assert_close(merge_paths(read, paths), len(names) * x)
    for function, given in ((read_paths, x), (merge_paths, each), (to_steps, each)):
        assert torch.autograd.gradcheck(lambda v, f=function: f(v, paths), given)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_traced_paths_are_not_kept():
    def doubled(x):
        return merge_paths(read_paths(x, scan_paths((2, 7), CPU)), scan_paths((2, 7), CPU))

    x = torch.randn(1, 14, 2)
    traced = torch.compile(doubled, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(x), 4 * x)
    torch.testing.assert_close(doubled(x), 4 * x)
    with torch.inference_mode():
        first = scan_paths((2, 9), CPU)
    assert scan_paths((2, 9), CPU) is first
