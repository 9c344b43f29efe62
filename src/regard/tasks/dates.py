"""Whether the rows of a dated series are as equally spaced as they are taken to be."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise

_SECONDS = ((86_400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


def uneven(times: Sequence[str]) -> str | None:
    """What is wrong with the dates of rows that are taken as equally spaced, in a sentence.

    Dates are years, months or anything in ISO 8601 (or with / for -). Times that are none are
    not judged, nor dates without a step that most rows keep; days that leave out weekends only
    are even.

    >>> uneven(["2020-01", "2020-02", "2020-03", "2020-06"])
    '2 months are missing between the rows (the first after 2020-03)'
    >>> uneven(["2020", "2021", "2022"]) is None
    True
    """
    texts = [text.strip().replace("/", "-") for text in times]
    placed = _places(texts)
    if placed is None or len(texts) < 3:
        return None
    places, unit = placed
    steps = [after - before for before, after in pairwise(places)]
    for row, step in enumerate(steps, 1):
        if step <= 0:
            what = "is of the same time as" if step == 0 else "is of an earlier time than"
            return f"row {row + 1} ({texts[row]}) {what} the row before it"
    usual, kept = Counter(steps).most_common(1)[0]
    if kept == len(steps) or 2 * kept <= len(steps):
        return None
    left_out = [max(round(step / usual) - 1, 0) for step in steps]
    total = sum(left_out)
    if total == 0:
        row = next(row for row, step in enumerate(steps, 1) if step != usual)
        return f"row {row + 1} ({texts[row]}) does not follow at the distance of the others"
    if (usual, unit) == (1, "day") and _only_weekends(texts, left_out):
        return None
    first = texts[next(row for row, count in enumerate(left_out) if count)]
    number = f"{total} {unit}" if usual == 1 else f"{total} step"  # of several units each
    are = " is" if total == 1 else "s are"
    return f"{number}{are} missing between the rows (the first after {first})"


def _places(texts: Sequence[str]) -> tuple[list[int], str] | None:
    """Every time as a whole number of the largest unit that serves all of them."""
    if all(re.fullmatch(r"\d{4}", text) for text in texts):
        return [int(text) for text in texts], "year"
    months = [re.fullmatch(r"(\d{4})-(\d\d)", text) for text in texts]
    if all(months):
        return [12 * int(found[1]) + int(found[2]) for found in months if found], "month"
    try:
        moments = [datetime.fromisoformat(text) for text in texts]
    except ValueError:
        return None
    moments = [moment if moment.tzinfo else moment.replace(tzinfo=UTC) for moment in moments]
    ends = {(moment + timedelta(days=1)).day for moment in moments} == {1}
    same = len({(moment.day, moment.time()) for moment in moments}) == 1
    if (same or ends) and len({(moment.year, moment.month) for moment in moments}) == len(moments):
        places, unit = [12 * moment.year + moment.month for moment in moments], "month"
        yearly = len({place % 12 for place in places}) == 1
        return ([place // 12 for place in places], "year") if yearly else (places, unit)
    seconds = [round(moment.timestamp()) for moment in moments]
    for size, unit in _SECONDS:
        if all((second - seconds[0]) % size == 0 for second in seconds):
            return [(second - seconds[0]) // size for second in seconds], unit
    return None


def _only_weekends(texts: Sequence[str], left_out: Sequence[int]) -> bool:
    """Whether every day that was left out is a Saturday or a Sunday."""
    for text, count in zip(texts, left_out, strict=False):
        day = datetime.fromisoformat(text)
        if any((day + timedelta(days=1 + n)).weekday() < 5 for n in range(count)):
            return False
    return True
