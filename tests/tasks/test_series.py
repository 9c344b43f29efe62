"""Reading a series, filling gaps, and lag windows that never look ahead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regard.tasks.data import DATA_SETS
from regard.tasks.series import (
    Lagged,
    Series,
    SeriesError,
    Split,
    check_series,
    fill_gaps,
    load_series,
    read_csv,
)

NAN = float("nan")


def write(folder: Path, text: str, name: str = "data.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "rows", "gaps"), [("co2", 2284, 59), ("sunspots", 309, 0), ("seattle-temps", 8759, 0)]
)
def test_shipped_data(name: str, rows: int, gaps: int) -> None:
    series = load_series(name)
    assert len(series) == rows
    assert int((~series.observed).sum()) == gaps
    assert series.source
    assert series.licence
    licences = DATA_SETS[name].path.with_name("LICENCES.md").read_text(encoding="utf-8")
    assert DATA_SETS[name].file in licences


def test_column_choice(tmp_path: Path) -> None:
    path = write(tmp_path, "year,wind,temp\n2000,3,1.5\n2001,NA,2.5\n2002,1,\n")
    assert read_csv(path).column == "wind"
    chosen = read_csv(path, "temp")
    assert chosen.values[:2].tolist() == [1.5, 2.5]
    assert chosen.values[2].isnan()
    assert chosen.times == ("2000", "2001", "2002")
    assert chosen.others == ("wind",)


def test_only_column_may_count(tmp_path: Path) -> None:
    assert read_csv(write(tmp_path, "steps\n10\n11\n15\n")).column == "steps"
    both = write(tmp_path, "day,steps\n1,10\n2,11\n3,15\n")
    with pytest.raises(SeriesError, match="choose with --column day or --column steps"):
        read_csv(both)
    assert read_csv(both, "steps").column == "steps"
    single = read_csv(write(tmp_path, "x\n1\n\n3\n"))
    assert single.column == "x"
    assert single.values.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("", None, "is empty"),
        ("a;b\n1;2,5\n3;4,5\n", None, "separated by semicolons"),
        ("a\tb\n1\t2\n", None, "separated by tabs"),
        ("1,2\n3,4\n", None, "has no header"),
        ("a,a\n1,2\n", None, "two columns called 'a'"),
        ("a,b\n1,2\n1,2,3\n", None, "line 3: 3 cells where the header has 2"),
        ("d,x,y\na,1,foo\nb,2,3\n", "y", r"row 1 holds 'foo' \(numeric columns: x\)"),
        ("d,temp\na,1\nb,2\n", "tmp", "did you mean 'temp'"),
        ("d,x\na,one\n", None, "has no numeric column"),
        ("d,x\na,inf\n", "x", "row 1 holds 'inf'"),
        ("d,x\na,\nb,\n", "x", "it holds no value"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, column: str | None, words: str) -> None:
    with pytest.raises(SeriesError, match=words) as error:
        read_csv(write(tmp_path, text), column)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["0,1.5", "1,oops", "2,0.5"], "column 'load' of .* row 2 holds 'oops'"),
        (["0,1.5", ",inf", "2,0.5"], "column 'load' of .* row 2 holds 'inf'"),
        (['0,"1,516"', '1,"1,410"', '2,"1,490"'], "column 'load' of .* row 1 holds '1,516'"),
    ],
)
def test_an_index_is_never_forecast_unasked(tmp_path: Path, rows: list[str], words: str) -> None:
    path = write(tmp_path, "\n".join(["t,load", *rows]))
    with pytest.raises(SeriesError, match=f"{words}; t only counts upwards; .*--column t$"):
        read_csv(path)
    assert read_csv(path, "t").column == "t"
    dated = write(tmp_path, "\n".join(["day,t,load", *(f"d,{row}" for row in rows)]), "dated.csv")
    with pytest.raises(SeriesError, match=words):
        read_csv(dated)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    for path, words in ((tmp_path / "binary.csv", "not text in UTF-8"), (tmp_path, "cannot read")):
        with pytest.raises(SeriesError, match=words):
            read_csv(path)
    with pytest.raises(SeriesError, match="did you mean 'co2'"):
        load_series("co3")


def test_series_that_cannot_be_used() -> None:
    wave = torch.sin(torch.arange(100.0).double())
    cases = {
        "at least 101": (wave, 101),
        "constant before the test": (torch.where(torch.arange(100) < 80, 1.0, wave), 50),
        r"21 gaps in 100 rows \(21%\)": (wave.index_fill(0, torch.arange(30, 51), NAN), 50),
        "no value in the last fifth": (wave.index_fill(0, torch.arange(80, 100), NAN), 50),
        "19 values in the 20 rows of the last fifth": (
            wave.index_fill(0, torch.arange(80, 81), NAN), 50,
        ),
        r"values up to 1.0e\+200: their squares overflow": (wave * 1e200, 50),
        "spreads over 2.0e-200: squares underflow": (wave * 1e-200, 50),
    }  # fmt: skip
    for words, (values, least) in cases.items():
        with pytest.raises(SeriesError, match=words):
            check_series(Series("s", values), Split.fifths(100), least)
    check_series(Series("s", wave.index_fill(0, torch.arange(20), NAN)), Split.fifths(100), 50)


def test_a_fifth_of_the_test_stretch_may_be_missing() -> None:
    wave = torch.sin(torch.arange(200.0).double())
    fifth = wave.index_fill(0, torch.arange(160, 168), NAN)
    check_series(Series("s", fifth), Split.fifths(200), 50)
    with pytest.raises(SeriesError, match="has 31 values in the 40 rows of the last fifth"):
        check_series(
            Series("s", fifth.index_fill(0, torch.tensor([190]), NAN)), Split.fifths(200), 50
        )


def test_gaps_are_interpolated_in_training_only() -> None:
    split = Split(rows=10, validation=6, test=8)
    values = torch.tensor([NAN, 1.0, NAN, NAN, 4.0, NAN, 9.0, NAN, NAN, 2.0]).double()
    # The gap at row 5 is the end of training: the 9 after it must not be seen.
    expected = [1.0, 1.0, 2.0, 3.0, 4.0, 4.0, 9.0, 9.0, 9.0, 2.0]
    assert fill_gaps(values, split).tolist() == expected
    assert values[0].isnan()
    assert split.gaps(~values.isnan()) == {"training": 4, "validation": 1, "test": 1}


@pytest.mark.parametrize("embedding", ["relative", "absolute"])
def test_windows_and_targets(embedding: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(60).double().cumsum(0)
    split = Split.fifths(60)
    data = Lagged.of(x, split, lags=3, embedding=embedding)  # type: ignore[arg-type]
    pairs = data.pairs(4, split.rows)
    t = 17
    if embedding == "relative":
        window, target = torch.stack([x[t - 1], x[t - 2], x[t - 3]]) - x[t], x[t + 4] - x[t]
    else:
        window, target = torch.stack([x[t], x[t - 1], x[t - 2]]), x[t + 4]
    key = (window - data.key_shift) / data.key_scale
    torch.testing.assert_close(data.keys[t - 3], key)
    torch.testing.assert_close(pairs.values[t - 3] * pairs.scale + pairs.shift, target)
    assert len(pairs.values) == 60 - 4 - 3


@pytest.mark.parametrize("embedding", ["relative", "absolute"])
def test_constants_ignore_the_test_stretch(embedding: str) -> None:
    x = load_series("co2").values
    split = Split.fifths(len(x))
    other = x.clone()
    other[split.test :] = torch.randn(split.rows - split.test).double() * 1e6
    one = Lagged.of(x, split, embedding=embedding)  # type: ignore[arg-type]
    two = Lagged.of(other, split, embedding=embedding)  # type: ignore[arg-type]
    assert (one.key_shift, one.key_scale) == (two.key_shift, two.key_scale)
    for horizon in (1, 26):
        a, b = one.pairs(horizon, split.rows), two.pairs(horizon, split.rows)
        assert (a.shift, a.scale) == (b.shift, b.scale)
    past, again = one.before_test(), two.before_test()
    assert torch.equal(past.keys, again.keys)
    assert torch.equal(past.keys, one.keys[: len(past.keys)])


def test_windows_never_see_later_rows() -> None:
    x = load_series("co2").values.clone()
    split = Split.fifths(len(x))
    x[split.test + 50 : split.test + 60] = NAN
    row = split.test + 55
    other = x.clone()
    other[row + 1 :] = 1e5
    one, two = Lagged.of(x, split), Lagged.of(other, split)
    assert torch.equal(one.keys[: row + 1 - one.lags], two.keys[: row + 1 - one.lags])
    assert float(one.filled[row]) == float(x[split.test + 49])
    assert not bool(one.pairs(5, split.rows).real[row - 5 - one.lags])


def test_latest_keeps_keys() -> None:
    data = Lagged.of(load_series("sunspots").values, Split.fifths(309)).before_test()
    latest = data.latest(150)
    assert torch.equal(latest.keys, data.keys[-len(latest.keys) :])
    assert latest.split.rows - latest.split.validation == data.split.rows - data.split.validation
