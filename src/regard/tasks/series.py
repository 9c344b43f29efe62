"""A time series as regression data: reading, gaps, and lag windows that never look ahead.

The rows are cut in three, in time order: training, validation and test, the test a fifth of
the rows, the validation stretch as long but at most 750 rows. Gaps are filled by interpolation
in the training stretch only; from the validation stretch on, a missing value is the last one
that was seen, so that no window there knows more than a forecaster standing at its end.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.tasks.data import DATA_SETS

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "-", ".", "?"})
MOST_GAPS = 0.2
MOST_VALIDATION = 750
LEAST_SCORED = 20
LEAST_SPREAD, MOST_SIZE = 1e-140, 1e140  # beyond, squared errors leave the range of float64

Stretch = Literal["training", "validation", "test"]


class SeriesError(ValueError):
    """A series that cannot be used, and why, in one line."""


@dataclass(frozen=True, eq=False)
class Series:
    """One measured quantity in time order; `values` is NaN where nothing was measured."""

    name: str
    values: Float[Tensor, " n"]
    column: str = "value"
    times: tuple[str, ...] = ()
    title: str = ""
    unit: str = ""
    step: str = "row"
    source: str = ""
    licence: str = ""
    others: tuple[str, ...] = field(default=())

    @property
    def observed(self) -> Bool[Tensor, " n"]:
        """True where a value was measured."""
        return ~self.values.isnan()

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Split:
    """Where the validation stretch and the test stretch begin in a series of `rows` rows."""

    rows: int
    validation: int
    test: int

    @classmethod
    def fifths(cls, rows: int) -> Split:
        """The last fifth is the test, the fifth before it (at most 750 rows) validates.

        >>> Split.fifths(100)
        Split(rows=100, validation=60, test=80)
        """
        fifth = rows // 5
        return cls(rows, rows - fifth - min(fifth, MOST_VALIDATION), rows - fifth)

    def gaps(self, observed: Bool[Tensor, " n"]) -> dict[Stretch, int]:
        """Rows without a value, by stretch."""
        missing = (~observed).long()
        return {
            "training": int(missing[: self.validation].sum()),
            "validation": int(missing[self.validation : self.test].sum()),
            "test": int(missing[self.test :].sum()),
        }


def load_series(what: str, column: str | None = None) -> Series:
    """A shipped data set by name, or the CSV file at a path.

    >>> len(load_series("sunspots"))
    309
    """
    if what in DATA_SETS:
        data = DATA_SETS[what]
        read = read_csv(data.path, column or data.column)
        if read.column != data.column:
            return read
        about = (data.title, data.unit, data.step, data.source, data.licence)
        return Series(data.name, read.values, read.column, read.times, *about)
    path = Path(what)
    if not path.exists():
        near = [] if path.suffix else get_close_matches(what, DATA_SETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        shipped = ", ".join(DATA_SETS)
        raise SeriesError(f"no such file: {what}{hint} (shipped data sets: {shipped})")
    return read_csv(path, column)


def read_csv(path: Path, column: str | None = None) -> Series:
    """One column of a comma-separated file with a header, rows in time order.

    Without `column`, the first numeric one that does not just count upwards (a year, an index)
    is taken; one that does only if the file has no other. A first column that is not the chosen
    one names the rows. Empty cells, NA, NaN, null and none are gaps.
    """
    header, rows = _table(path)
    cells = {name: [row[i].strip() for row in rows] for i, name in enumerate(header)}
    parsed = {name: _numbers(texts) for name, texts in cells.items()}
    numeric = [name for name, numbers in parsed.items() if isinstance(numbers, list)]
    chosen = _choose(path, column, numeric, parsed, cells)
    values = torch.tensor(parsed[chosen], dtype=torch.float64)
    times = tuple(cells[header[0]]) if header[0] != chosen else ()
    others = tuple(name for name in numeric if name not in (chosen, header[0]))
    return Series(path.stem, values, chosen, times, others=others)


def _table(path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, row) for row in reader]
    except UnicodeDecodeError as error:
        raise SeriesError(f"{path} is not text in UTF-8 (byte {error.start})") from error
    except csv.Error as error:
        raise SeriesError(f"{path} is not a CSV file ({error})") from error
    except OSError as error:
        raise SeriesError(f"cannot read {path}: {error.strerror}") from error
    while lines and not any(cell.strip() for cell in lines[-1][1]):
        lines.pop()
    while lines and not lines[0][1]:
        lines.pop(0)
    if not lines:
        raise SeriesError(f"{path} is empty")
    header = [name.strip() for name in lines[0][1]]
    # A blank line is a gap where a row is one cell, and no row at all elsewhere.
    lines = [(at, row or [""]) for at, row in lines if row or len(header) == 1]
    _check_delimiter(path, header, [row for _, row in lines[1:6]])
    if all(_number(name) is not None for name in header):
        raise SeriesError(f"{path} has no header: its first line is {','.join(header)!r}")
    if twice := [name for name in header if header.count(name) > 1]:
        raise SeriesError(f"{path} has two columns called {twice[0]!r}")
    for at, row in lines[1:]:
        if len(row) != len(header):
            raise SeriesError(
                f"{path}, line {at}: {len(row)} cells where the header has {len(header)}"
            )
    return header, [row for _, row in lines[1:]]


def _check_delimiter(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One column that is full of another separator was not written with commas."""
    if len(header) != 1:
        return
    names = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
    for mark, word in names.items():
        if mark in header[0] and all(mark in ",".join(row) for row in rows):
            raise SeriesError(f"{path} looks separated by {word} ({mark!r}); commas are needed")


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _numbers(texts: Sequence[str]) -> list[float] | str:
    """The column as numbers, NaN for gaps; or the first cell that is none, in words."""
    numbers: list[float] = []
    for row, text in enumerate(texts, 1):
        value = float("nan") if text.lower() in MISSING else _number(text)
        if value is None:
            return f"row {row} holds {text!r}"
        numbers.append(value)
    return numbers if any(value == value for value in numbers) else "it holds no value"


def _choose(
    path: Path,
    column: str | None,
    numeric: Sequence[str],
    parsed: dict[str, list[float] | str],
    cells: dict[str, list[str]],
) -> str:
    header, listed = list(parsed), ", ".join(numeric) or "none"
    if column is not None and column not in header:
        near = get_close_matches(column, header, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SeriesError(
            f"{path} has no column {column!r}{hint} (its columns: {', '.join(header)})"
        )
    if column is not None and column not in numeric:
        raise SeriesError(
            f"column {column!r} of {path} is not numeric: {parsed[column]} "
            f"(numeric columns: {listed})"
        )
    if column is not None:
        return column
    if not numeric:
        raise SeriesError(f"{path} has no numeric column ({header[-1]!r}: {parsed[header[-1]]})")
    measured = [name for name in numeric if not _counts_upwards(parsed[name])]
    if measured or len(header) == 1:
        return (measured or numeric)[0]
    counting = f"{listed} only counts upwards" if len(numeric) == 1 else f"{listed} only count"
    way = f"choose with --column {' or --column '.join(numeric)}"
    if len(numeric) == len(header):
        raise SeriesError(f"{path} has no column that is measured: {counting}; {way}")
    # The one that is nearest to numbers, the last of those that are equally near.
    meant = max(
        reversed([name for name in header if name not in numeric]),
        key=lambda name: sum(_number(text) is not None for text in cells[name]),
    )
    what = f"column {meant!r} of {path} is not numeric: {parsed[meant]}"
    raise SeriesError(f"{what}; {counting}; {way}")


def _counts_upwards(numbers: list[float] | str) -> bool:
    """Whether a column grows from each of its values to the next: a date or an index."""
    if isinstance(numbers, str):
        return False
    values = [number for number in numbers if not math.isnan(number)]
    return len(values) > 1 and all(a < b for a, b in pairwise(values))


def check_series(series: Series, split: Split, least_rows: int) -> None:
    """Raises a `SeriesError` for a series too short, gappy, constant, large or small to score."""
    rows, missing = len(series), int((~series.observed).sum())
    what = f"column {series.column!r} of {series.name}"
    if rows < least_rows:
        raise SeriesError(
            f"{what} has {rows} rows; at least {least_rows} are needed for these lags and horizons"
        )
    if missing > MOST_GAPS * rows:
        raise SeriesError(
            f"{what} has {missing} gaps in {rows} rows ({missing / rows:.0%}); at most a fifth "
            "can be filled"
        )
    before = series.values[: split.test][series.observed[: split.test]]
    if len(before) == 0 or bool((before == before[0]).all()):
        raise SeriesError(f"{what} is constant before the test stretch; nothing can be learnt")
    largest = float(series.values[series.observed].abs().max())
    if largest > MOST_SIZE:
        raise SeriesError(
            f"{what} holds values up to {largest:.1e}: their squares overflow above {MOST_SIZE:g}"
        )
    spread = float(before.max() - before.min())
    if spread < LEAST_SPREAD:
        raise SeriesError(
            f"{what} spreads over {spread:.1e}: squares underflow below {LEAST_SPREAD:g}"
        )
    if not bool(series.observed[: split.validation].any()):
        raise SeriesError(f"{what} has no value in its first {split.validation} rows")
    tested = split.rows - split.test
    scored = int(series.observed[split.test :].sum())
    if scored == 0:
        raise SeriesError(f"{what} has no value in the last fifth, which is the test")
    if scored < LEAST_SCORED or tested - scored > MOST_GAPS * tested:
        raise SeriesError(
            f"{what} has {scored} values in the {tested} rows of the last fifth, which is the "
            f"test; at least {LEAST_SCORED} and four fifths of the rows are needed to score"
        )


def fill_gaps(values: Float[Tensor, " n"], split: Split) -> Float[Tensor, " n"]:
    """No NaN left: interpolated between training values, the last seen value from there on.

    The interpolation knows the training stretch only; before its first value that value is
    repeated, after its last one that one.
    """
    filled = values.clone()
    known = (~values[: split.validation].isnan()).nonzero().flatten()
    if len(known) == 0:
        raise SeriesError(f"no value in the first {split.validation} rows")
    rows = torch.arange(split.validation)
    right = torch.searchsorted(known, rows).clamp(max=len(known) - 1)
    left = (right - 1).clamp(min=0)
    left = torch.where(known[right] <= rows, right, left)
    a, b = known[left], known[right]
    share = ((rows - a).to(values.dtype) / (b - a).clamp(min=1)).clamp(0, 1)
    filled[: split.validation] = torch.lerp(values[a], values[b], share)
    for row in range(split.validation, len(values)):
        if filled[row].isnan():
            filled[row] = filled[row - 1]
    return filled


Embedding = Literal["relative", "absolute"]


def lag_windows(
    filled: Float[Tensor, " n"], lags: int, embedding: Embedding
) -> Float[Tensor, "n_lags d"]:
    """The raw keys of rows `lags`, `lags` + 1, ...: see `Lagged`."""
    windows = filled.unfold(0, lags + 1, 1).flip(1)  # x[t], x[t-1], ..., x[t-lags]
    return windows[:, 1:] - windows[:, :1] if embedding == "relative" else windows[:, :-1]


@dataclass(frozen=True, eq=False)
class Lagged:
    """A series as regression data: what is known at row t (a key), and what came h rows later.

    `embedding="relative"`: key_t = (x[t-1] - x[t], ..., x[t-L] - x[t]) / key_scale, and the
    target of horizon h is the change x[t+h] - x[t], standardised. Two moments are near each
    other if the series took the same course to them, at whatever level: what makes a local
    method work on a series with a trend.
    `embedding="absolute"`: key_t = (x[t], ..., x[t-L+1]) and target x[t+h], both standardised
    by the series' mean and deviation.

    All constants come from the rows before `split.test`. Row `lags` is the first with a key.
    """

    split: Split
    lags: int
    embedding: Embedding
    filled: Float[Tensor, " n"]
    observed: Bool[Tensor, " n"]
    keys: Float[Tensor, "n_lags d"]
    key_shift: float
    key_scale: float

    @classmethod
    def of(
        cls,
        values: Float[Tensor, " n"],
        split: Split,
        *,
        lags: int = 24,
        embedding: Embedding = "relative",
    ) -> Lagged:
        """Embeds `values`, NaN where nothing was measured."""
        filled = fill_gaps(values, split)
        raw = lag_windows(filled, lags, embedding)
        if embedding == "relative":
            shift, scale = 0.0, float(raw[: split.test - lags].square().mean().sqrt())
        else:
            past = filled[: split.test]
            shift, scale = float(past.mean()), float(past.std())
        scale = scale or 1.0
        observed = ~values.isnan()
        return cls(split, lags, embedding, filled, observed, (raw - shift) / scale, shift, scale)

    def before_test(self) -> Lagged:
        """What was known when the test stretch began, built anew from those rows alone."""
        values = self.filled[: self.split.test].clone()
        values[~self.observed[: self.split.test]] = float("nan")
        split = Split(self.split.test, self.split.validation, self.split.test)
        return Lagged.of(values, split, lags=self.lags, embedding=self.embedding)

    def latest(self, rows: int) -> Lagged:
        """The last `rows` rows, with the same keys; all of them if there are fewer."""
        cut = max(0, self.split.rows - rows)
        if cut == 0:
            return self
        split = Split(rows, self.split.validation - cut, self.split.test - cut)
        keys, filled = self.keys[cut:], self.filled[cut:]
        return replace(self, split=split, keys=keys, filled=filled, observed=self.observed[cut:])

    def base(self, rows: Tensor) -> Tensor:
        """What a standardised target is added to: the level at the rows, or 0."""
        level = self.filled[rows]
        return level if self.embedding == "relative" else torch.zeros_like(level)

    def pairs(self, horizon: int, stop: int) -> Pairs:
        """The pairs (key at j, value at j + horizon) that are complete before row `stop`."""
        first, last = self.lags, stop - horizon
        rows = torch.arange(first, max(first, last))
        raw = self.filled[rows + horizon] - self.base(rows)
        before = rows + horizon < self.split.test
        real = self.observed[rows + horizon]
        known = raw[before & real]
        shift = float(known.mean()) if len(known) else 0.0
        scale = float(known.std(correction=0)) if len(known) else 1.0
        scale = scale or 1.0
        return Pairs(horizon, self.keys[: len(rows)], (raw - shift) / scale, real, shift, scale)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Keys and standardised values of one horizon; `real` is False where the value is a gap."""

    horizon: int
    keys: Float[Tensor, "s d"]
    values: Float[Tensor, " s"]
    real: Bool[Tensor, " s"]
    shift: float
    scale: float
