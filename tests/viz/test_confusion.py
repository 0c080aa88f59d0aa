"""The confusion matrix can be read with ten classes and with a hundred."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.text import Text

from fambav import viz

NAMES = {3: ["cat", "dog", "a name of thirty-one characters"]}
TITLE = "vim_tiny on CIFAR: top-1 accuracy 70.00%"


def drawn(classes):
    counts = np.eye(classes, dtype=int) * 30
    counts[0, 1], counts[2] = 10, 0
    names = NAMES.get(classes, [f"class_{n}" for n in range(classes)])
    figure = viz.confusion(counts, names, title=TITLE)
    figure.draw_without_rendering()
    return figure


def labels(axis):
    return [label for label in axis.get_ticklabels() if label.get_text()]


def test_rows_are_divided_by_their_sums_and_written_out():
    axes = drawn(3).axes[0]
    shares = axes.images[0].get_array().filled(np.nan)
    np.testing.assert_array_equal(shares[:2], [[75, 25, 0], [0, 100, 0]])
    assert np.isnan(shares[2]).all(), "a class without samples has no shares"
    assert [text.get_text() for text in axes.texts] == ["75", "25", "100"]
    last = "a name of thirty-on… (0)"
    assert [t.get_text() for t in labels(axes.yaxis)] == ["cat (40)", "dog (30)", last]
    assert [t.get_text() for t in labels(axes.xaxis)][:2] == ["cat", "dog"]


@pytest.mark.parametrize("classes", [10, 100])
def test_every_class_is_named_in_type_that_can_be_read_at_half_size(classes):
    figure = drawn(classes)
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    assert min(t.get_fontsize() for t in texts) >= max(11, 0.018 * 72 * figure.get_figwidth())
    rows = labels(figure.axes[0].yaxis)
    assert [f"class_{n} " in row.get_text() for n, row in enumerate(rows)] == [True] * classes
    boxes = [row.get_window_extent() for row in rows]
    assert all(one.y0 >= other.y1 for one, other in pairwise(boxes))
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) >= -0.01 and box.x1 <= width + 0.01 and box.y1 <= height + 0.01
    assert " ".join(figure.get_suptitle().split()).startswith(TITLE)
