"""A comparison as one HTML page: self-contained, readable offline and on a phone."""

from __future__ import annotations

from html import escape

from regard.bench.compare import tables
from regard.bench.compare.pictures import draw
from regard.bench.compare.regressor import TAIL
from regard.bench.compare.result import RIDGE, Result
from regard.bench.report.page import figure, page, paragraphs, table
from regard.bench.report.plotting import Picture

__all__ = ["render"]


def render(result: Result) -> str:
    """The page: findings first, then tables and pictures, then how it was done."""
    series = result.series
    title = series["title"] or f"{series['name']}: {series['column']}"
    pictures = {picture.name: picture for picture in draw(result)}
    unit = f" ({series['unit']})" if series["unit"] else ""
    parts = [
        *paragraphs(tables.about(result)),
        _not_complete(result),
        "<h2>What was found</h2>",
        *(f'<p class="lead">{escape(sentence)}</p>' for sentence in result.findings),
        f"<h2>Root mean squared error by horizon{escape(unit)}</h2>",
        table(*tables.errors(result, relative=False)),
        f'<p class="note">h: rows ahead; each error is over the {series["scored"]} measured rows '
        "of the test. The least error of a column is marked.</p>",
        "<h2>The same, over the error of the last value</h2>",
        table(*tables.errors(result, relative=True)),
        '<p class="note">Below 1: better than predicting no change.</p>',
        *(figure(pictures.get(name)) for name in ("horizons", "forecast", "along")),
        "<h2>Chosen parameters</h2>",
        table(*tables.choices(result), words=True),
        '<p class="note">Chosen on the validation stretch only; validation is the geometric mean '
        "over horizons of the error over that of the last value. An asterisk marks the outermost "
        "value that was tried. The last column is the largest relative deviation of the forecasts "
        "from the float64 reference, "
        f"on the last {TAIL} rows.</p>",
        *_costs(result, pictures),
        *_slopes(result, pictures),
        *_skipped(result),
        "<h2>How it was done</h2>",
        *paragraphs(_method(result)),
        f"<footer>{escape(_footer(result))}</footer>",
    ]
    return page(title, parts)


def _not_complete(result: Result) -> str:
    return "" if result.complete else "<p><strong>Interrupted: results are partial.</strong></p>"


def _costs(result: Result, pictures: dict[str, Picture]) -> list[str]:
    if not result.costs:
        return []
    threads = result.method["threads"]
    note = (
        "Processor time of one causal call (the least of five) and what it adds to the memory of "
        f"a fresh process, {threads} thread{'s' * (threads != 1)}, one head, the windows of this "
        "series as queries and keys, as many value channels as lags. In brackets: over the time "
        "of torch's own attention in the same process."
    )
    numbers = table(*tables.costs(result))
    return ["<h2>Cost</h2>", numbers, f'<p class="note">{note}</p>', figure(pictures.get("cost"))]


def _slopes(result: Result, pictures: dict[str, Picture]) -> list[str]:
    picture = pictures.get("slopes")
    if picture is None:
        return []
    words = (
        "Local linear attention fits an affine map around every window, so its forecast can be "
        "read: how far it moves if one past value moves by one unit. Where the stripes change "
        "along the series, one linear model for all times would be wrong; on the right, for "
        f"comparison, the one map of {RIDGE}."
    )
    return ["<h2>The local slopes that LLA found</h2>", f"<p>{words}</p>", figure(picture)]


def _skipped(result: Result) -> list[str]:
    if not result.skipped:
        return []
    return [
        "<h2>Missing</h2>",
        *paragraphs([f"{name}: {reason}" for name, reason in result.skipped.items()]),
    ]


def _method(result: Result) -> list[str]:
    method = result.method
    lags = method["lags"]
    embedding = (
        f"A window is the {lags} values before the current one, relative to it; what is forecast "
        "is the change from the current value, standardised."
        if method["embedding"] == "relative"
        else f"A window is the last {lags} values; windows and targets are standardised."
    )
    return [
        f"{embedding} A forecast made at row t for row t + h is one query: its keys are the "
        "windows ending at rows j, its values what came h rows after them, for all j with "
        "j + h <= t. Nothing is trained. Mechanisms that take a bias per key get a Gaussian "
        "kernel. Standardisation and parameters come from the rows before the test; one setting "
        "is chosen per mechanism for all horizons.",
        "Ridge autoregression uses the same windows and the same pairs, refitted at every "
        "forecast. The seasonal naive forecast repeats the last season; the season is the highest "
        "peak of the autocorrelation before the test. Differences are called noise where the "
        "statistic of Diebold and Mariano is below 2 standard errors.",
        f"Forecasts in {method['dtype']}, errors in float64.",
    ]


def _footer(result: Result) -> str:
    series, method = result.series, result.method
    source = f"Data: {series['source']} ({series['licence']}). " if series["source"] else ""
    return f"{source}regard {method['regard']}, torch {method['torch']}, seed {method['seed']}."
