"""Rows that are taken as equally spaced: what their dates say about it."""

from __future__ import annotations

from datetime import date, datetime, timedelta

import pytest

from regard.tasks.dates import uneven
from regard.tasks.series import load_series

DAYS = [date(2020, 1, 1) + timedelta(days=n) for n in range(60)]
MONTHS = [f"{year}-{month:02d}-01" for year in (2020, 2021) for month in range(1, 13)]
HOURS = [datetime(2020, 1, 1) + timedelta(hours=n) for n in range(50)]


@pytest.mark.parametrize(
    "times",
    [
        [],
        ["2020"],
        [f"d{n}" for n in range(9)],
        ["1", "2", "4", "8"],  # an index is no date
        [str(year) for year in range(1900, 1950)],
        [str(day) for day in DAYS],
        [str(day) for day in DAYS if day.weekday() < 5],
        [str(day).replace("-", "/") for day in DAYS[::7]],
        MONTHS,
        [month[:7] for month in MONTHS],
        [f"{year}-06-30" for year in range(1990, 2020)],
        ["2020-01-31", "2020-02-29", "2020-03-31", "2020-04-30"],
        [hour.isoformat(" ") for hour in HOURS],
        [f"{hour.isoformat()}Z" for hour in HOURS],
        ["2020-01-01", "2020-01-05", "2020-02-01", "2020-07-01"],  # visits, not a series
    ],
)
def test_even(times: list[str]) -> None:
    assert uneven(times) is None


@pytest.mark.parametrize(
    ("times", "words"),
    [
        (MONTHS[:5] + MONTHS[6:], "1 month is missing between the rows (the first after 2020-05-0"),
        (MONTHS[:5] + MONTHS[8:], "3 months are missing between the rows (the first after 2020-05"),
        ([str(day) for day in DAYS if day.day != 7], "2 days are missing"),
        ([str(day) for day in DAYS[::7] if day.day != 15], "1 step is missing"),
        ([str(hour) for hour in HOURS[:9] + HOURS[10:]], "1 hour is missing"),
        ([str(year) for year in range(1900, 1950) if year != 1914], "1 year is missing"),
        (MONTHS[:3] + MONTHS[2:], "row 4 (2020-03-01) is of the same time as the row before it"),
        (MONTHS[::-1], "row 2 (2021-11-01) is of an earlier time than the row before it"),
        ([*map(str, HOURS[:9]), "2020-01-01 08:20:00"], "row 10 (2020-01-01 08:20:00) does not"),
    ],
)
def test_uneven(times: list[str], words: str) -> None:
    said = uneven(times)
    assert said is not None
    assert words in said


def test_shipped_series() -> None:
    assert uneven(load_series("co2").times) is None
    assert uneven(load_series("sunspots").times) is None
    said = uneven(load_series("seattle-temps").times)  # clocks were put forward
    assert said == "1 hour is missing between the rows (the first after 2010-03-14 02:00)"
