"""One run that nothing interrupted, for all to be compared with."""

import pytest

from tests.data.made import made_cifar
from tests.trust.forked import RECIPE, run


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    made_cifar(folder, train=40, test=37)
    return [*RECIPE.split(), "--data-path", folder]


@pytest.fixture(scope="session")
def whole(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    found = run(recipe, folder)
    assert found.status == 0, found.out
    return folder
