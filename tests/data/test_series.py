"""Series: files, borders, scaling, windows, and what is refused; the made WAVES."""

import numpy as np
import pytest
import torch

from fambav.data import DataError, load
from fambav.data.series import ETT, parts, read_csv
from fambav.data.waves import LAG, waves_floor


def written(path, rows=120, variates=2, change=None):
    """A CSV file of random numbers; `change` may spoil its lines first."""
    values = np.random.default_rng(0).normal(size=(rows, variates)) * 3 + 5
    lines = [",".join(["date", *(f"v{n}" for n in range(variates))])]
    lines += [
        f"2020-01-{1 + n // 24:02d} {n % 24:02d}:00:00,{','.join(map(str, row))}"
        for n, row in enumerate(values)
    ]
    if change is not None:
        change(lines)
    path.write_text("\n".join(lines) + "\n")
    return values


def opened(path, lookback=8, horizon=4):
    return load("CSV", path, lookback=lookback, horizon=horizon)


@pytest.mark.parametrize(
    ("name", "counts"),
    [("ETTh1", (8033, 2785, 2785)), ("ETTm2", (33953, 11425, 11425))],
)
def test_ett_has_its_published_borders(tmp_path, name, counts):
    rows = 20 * 30 * 24 * ETT[name]
    extra = 40  # rows behind the test are not used
    values = np.arange(rows + extra, dtype=float)
    lines = ["date,OT", *(f"{n},{value % 97}" for n, value in enumerate(values))]
    (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    found = load(name, tmp_path, lookback=512, horizon=96)
    assert tuple(map(len, (found.train, found.choice, found.val))) == counts
    mean, std = found.mean[0], found.std[0]
    first, last = found.val[0][1][0, 0], found.val[len(found.val) - 1][1][-1, 0]
    border = 16 * 30 * 24 * ETT[name]
    assert first * std + mean == pytest.approx(border % 97, abs=1e-3)
    assert last * std + mean == pytest.approx((rows - 1) % 97, abs=1e-3)
    assert load(name, tmp_path / f"{name}.csv", lookback=512, horizon=96).digest == found.digest


def test_any_other_file_is_split_by_shares(tmp_path):
    values = written(tmp_path / "a.csv", rows=119)
    assert parts(119) == (83, 96, 119)  # 0.7 and 0.2 of 119, rounded down
    found = opened(tmp_path / "a.csv")
    assert [len(part) for part in (found.train, found.choice, found.val)] == [72, 10, 20]
    assert found.mean == pytest.approx(values[:83].mean(axis=0), rel=1e-12)
    assert found.std == pytest.approx(values[:83].std(axis=0), rel=1e-12)
    past, future = found.val[3]
    whole = torch.cat([past, future]).double().numpy() * found.std + found.mean
    assert whole == pytest.approx(values[96 - 8 + 3 : 96 + 3 + 4], abs=1e-5)
    assert found.variates == ("v0", "v1") and found.statistics("own") == (found.mean, found.std)


def test_other_rows_than_those_of_training_change_no_scale(tmp_path):
    written(tmp_path / "a.csv")

    def change(lines):
        lines[90:] = [line.rsplit(",", 1)[0] + ",77" for line in lines[90:]]

    written(tmp_path / "b.csv", change=change)
    one, other = (opened(tmp_path / name) for name in ("a.csv", "b.csv"))
    assert (one.mean, one.std) == (other.mean, other.std)
    assert torch.equal(one.train.values, other.train.values)
    assert not torch.equal(one.val.values, other.val.values) and one.digest != other.digest


def cell(row, text):
    """Replace the last cell of a row of the file, which counts from 1."""

    def change(lines):
        lines[row - 1] = lines[row - 1].rsplit(",", 1)[0] + "," + text

    return change


WRONG = {
    "empty": (cell(7, ""), "row 7, column 'v1' is empty, expected a finite number"),
    "text": (cell(7, "high"), "row 7, column 'v1' is 'high', expected a finite number"),
    "nan": (cell(121, "NaN"), "row 121, column 'v1' is 'NaN', expected a finite number"),
    "infinite": (cell(2, "1e999"), "row 2, column 'v1' is '1e999', expected a finite number"),
    "underscore": (cell(2, "1_0"), "row 2, column 'v1' is '1_0', expected a finite number"),
    "short row": (
        lambda lines: lines.__setitem__(4, "2020-01-01,1"),
        "row 5 has 2 columns, expected 3 as the header has",
    ),
    "blank row": (lambda lines: lines.insert(9, ""), "row 10 has 0 columns, expected 3"),
    "no date": (
        lambda lines: lines.__setitem__(0, "time,v0,v1"),
        "row 1 starts with 'time', expected a header of date and",
    ),
    "semicolons": (
        lambda lines: lines.__setitem__(0, "date;v0;v1"),
        "row 1 starts with 'date;v0;v1', expected a header of date and",
    ),
    "nothing": (lambda lines: lines.clear(), "row 1 "),
    "open quote": (lambda lines: lines.__setitem__(5, '"2020,1,2'), "cannot be read"),
    "constant": (
        lambda lines: lines.__setitem__(
            slice(1, None), [line.rsplit(",", 1)[0] + ",0.1" for line in lines[1:]]
        ),
        "column 'v1' is 0.1 in all training rows, 2 to 85, expected a variate that is not constant",
    ),
    "too large": (cell(100, "1e308"), r"column 'v1' is 1e+308 in row 100, expected a smaller"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_refused_by_name_and_row(tmp_path, wrong):
    change, text = WRONG[wrong]
    written(tmp_path / "a.csv", change=change)
    with pytest.raises(DataError) as caught:
        opened(tmp_path / "a.csv")
    assert str(caught.value).startswith(str(tmp_path / "a.csv"))
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_windows_that_do_not_fit_are_refused(tmp_path):
    written(tmp_path / "a.csv", rows=100)  # 70 to train, 10 and 20 behind
    opened(tmp_path / "a.csv", lookback=60, horizon=10)
    with pytest.raises(DataError, match=r"horizon is 11 .* of 60, expected at most 10 .* train"):
        opened(tmp_path / "a.csv", lookback=60, horizon=11)
    with pytest.raises(DataError, match=r"horizon is 11 .* expected at most 10 .* validation"):
        opened(tmp_path / "a.csv", lookback=8, horizon=11)
    with pytest.raises(DataError, match="expected a shorter lookback for the training rows of"):
        opened(tmp_path / "a.csv", lookback=70, horizon=1)
    (tmp_path / "a.csv").rename(tmp_path / "ETTh1.csv")
    with pytest.raises(DataError, match=r"has 100 rows of numbers, expected the 14400 of ETTh1"):
        load("ETTh1", tmp_path)
    with pytest.raises(DataError, match=r"expected ETTh2.csv or the folder with it"):
        load("ETTh2", tmp_path)


def test_uneven_dates_are_noted_and_bytes_that_are_no_text_refused(tmp_path):
    written(tmp_path / "a.csv", change=lambda lines: lines.pop(50))
    assert (
        read_csv(tmp_path / "a.csv")
        .notes[0]
        .endswith("a.csv: 1 uneven time steps, the first before row 51")
    )
    written(tmp_path / "b.csv")
    assert read_csv(tmp_path / "b.csv").notes == ()
    (tmp_path / "c.csv").write_bytes(b"date,v\n1,\xff\n")
    with pytest.raises(DataError, match=r"c.csv is no text in UTF-8"):
        read_csv(tmp_path / "c.csv")


def test_waves_are_the_same_everywhere_and_reach_the_reef_after_a_lag():
    found = load("WAVES", lookback=64, horizon=16)
    assert found.digest.startswith("8c650e6f62e397c5")
    offshore, reef, harbour = found.train.values.double().T.numpy()
    late = np.corrcoef(offshore[:-LAG], reef[LAG:])[0, 1]
    assert late == pytest.approx((8 / 9) ** 0.5, abs=0.01)
    assert abs(np.corrcoef(offshore, reef)[0, 1]) < 0.1 > abs(np.corrcoef(harbour, reef)[0, 1])


def test_the_floor_of_waves_is_that_of_least_squares():
    lookback, horizon = 56, 8
    found = load("WAVES", lookback=lookback, horizon=horizon)
    for together, expected in ((False, 0.632), (True, 0.426)):
        floor, errors = waves_floor(lookback, horizon, together=together), []
        assert floor == pytest.approx(expected, abs=1e-3)
        pairs = [torch.stack(part) for part in zip(*found.train, strict=True)]
        past, future = (part.double().numpy() for part in pairs)
        for variate in range(3):
            seen = past.reshape(len(past), -1) if together else past[:, :, variate]
            fitted, *_ = np.linalg.lstsq(seen, future[:, :, variate])
            errors.append(((seen @ fitted - future[:, :, variate]) ** 2).mean())
        assert np.mean(errors) == pytest.approx(floor, rel=0.05)
