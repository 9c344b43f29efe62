"""The pictures of a comparison."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regard.bench.compare.result import LLA, RIDGE, Result
from regard.bench.report.plotting import COLUMNS, Picture, colour, figure, source_of

SHOWN_ROWS = 120


def draw(result: Result) -> list[Picture]:
    """Every picture the result has data for."""
    drawn = [_horizons(result), _forecast(result), _along(result), _cost(result), _slopes(result)]
    return [picture for picture in drawn if picture is not None]


def _colour(result: Result, name: str) -> str:
    return colour(name, [entry.name for entry in result.entries])


def _unit(result: Result) -> str:
    return result.series["unit"] or result.series["column"]


def _horizons(result: Result) -> Picture | None:
    entries = [
        entry for entry in result.entries if any(s.relative is not None for s in entry.scores)
    ]
    if not entries:
        return None
    with figure(3.6) as (drawing, axes):
        plot = axes[0, 0]
        for entry in entries:
            known = [s for s in entry.scores if s.relative is not None]
            places = [result.horizons.index(s.horizon) for s in known]
            plot.plot(
                places,
                [s.relative for s in known],
                marker="o",
                markersize=4,
                label=entry.name,
                color=_colour(result, entry.name),
            )
        plot.set_xticks(range(len(result.horizons)), [str(h) for h in result.horizons])
        plot.set_xlabel("horizon, rows ahead")
        plot.set_ylabel("error over that of the last value")
        plot.set_ylim(bottom=0, top=_top(entries))
        drawing.legend(loc="outside upper center", ncols=COLUMNS, fontsize=9)
        source = source_of(drawing)
    best = "; ".join(f"horizon {h}: {result.best(h)}" for h in result.horizons)
    caption = "Error by horizon. Above the frame: more than 1.5 times that of the last value."
    return Picture("horizons", source, f"Error by horizon. Least error, {best}.", caption)


def _top(entries: list[Any]) -> float:
    highest = max(s.relative for e in entries for s in e.scores if s.relative is not None)
    return min(1.5, 1.05 * highest)


def _shown(result: Result) -> list[str]:
    """The forecasters that a line plot can hold: mechanisms, autoregression, in this order."""
    names = [e.name for e in result.entries if e.kind == "mechanism" or e.name == RIDGE]
    return sorted(names, key=lambda name: (name != LLA, name != RIDGE, name != "softmax"))[:3]


def _panels(result: Result) -> list[int]:
    horizons = [h for h in result.horizons if h in result.forecasts]
    return [horizons[0]] if len(horizons) == 1 else [horizons[0], horizons[-1]]


def _forecast(result: Result) -> Picture | None:
    names = _shown(result)
    if not names:
        return None
    panels = _panels(result)
    with figure(2.5 * len(panels) + 0.6, len(panels)) as (drawing, axes):
        for plot, horizon in zip(axes[:, 0], panels, strict=True):
            own = result.forecasts[horizon]
            cut = slice(max(0, len(own.rows) - SHOWN_ROWS), None)
            rows = own.rows[cut]
            truth = torch.where(own.scored, own.truth, torch.nan)[cut]
            style = {"color": "#1d2329", "linewidth": 2.2, "alpha": 0.8, "label": "truth"}
            plot.plot(rows.numpy(), truth.numpy(), **style)
            for name in reversed(names):
                line = own.by_name[name][cut]
                colour = _colour(result, name)
                plot.plot(rows.numpy(), line.numpy(), color=colour, label=name, linewidth=1.2)
            plot.set_title(f"{horizon} {'row' if horizon == 1 else 'rows'} ahead", fontsize=10)
            plot.set_ylabel(_unit(result))
            _time_ticks(plot, result, rows)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside upper center", ncols=COLUMNS, fontsize=9)
        source = source_of(drawing)
    count = min(SHOWN_ROWS, len(result.forecasts[panels[0]].rows))
    caption = f"Forecast against truth, the last {count} rows of the test."
    alt = f"Lines of the truth and of the forecasts of {', '.join(names)} over the {count} rows."
    return Picture("forecast", source, alt, caption)


def _time_ticks(plot: Any, result: Result, rows: Tensor) -> None:
    """Row names under the axis, where the file has any."""
    if not result.times:
        plot.set_xlabel("row")
        return
    at = [int(rows[round(x)]) for x in torch.linspace(0, len(rows) - 1, 4).tolist()]
    plot.set_xticks(at, [_short(result.times[row]) for row in at], fontsize=9)


def _short(label: str) -> str:
    if len(label) == 8 and label.isdigit():
        return f"{label[:4]}-{label[4:6]}"
    return label[:10]


def _along(result: Result) -> Picture | None:
    names = _shown(result)
    if not names:
        return None
    panels = _panels(result)
    span = max(4, len(result.forecasts[panels[0]].rows) // 12)
    with figure(2.4 * len(panels) + 0.6, len(panels)) as (drawing, axes):
        for plot, horizon in zip(axes[:, 0], panels, strict=True):
            own = result.forecasts[horizon]
            for name in reversed(names):
                squares = (own.by_name[name] - own.truth).square()
                error = _running(squares, own.scored, span).sqrt()
                plot.plot(own.rows.numpy(), error.numpy(), color=_colour(result, name), label=name)
            plot.set_title(f"{horizon} {'row' if horizon == 1 else 'rows'} ahead", fontsize=10)
            plot.set_ylabel(_unit(result))
            plot.set_ylim(bottom=0)
            _time_ticks(plot, result, own.rows)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside upper center", ncols=COLUMNS, fontsize=9)
        source = source_of(drawing)
    caption = f"Error along the test: root mean square over {span} rows."
    return Picture("along", source, f"Running error of {', '.join(names)} over the test.", caption)


def _running(squares: Tensor, scored: Tensor, span: int) -> Tensor:
    """The mean over the scored ones of the last `span` rows, NaN until there are as many rows."""
    weight = scored.double()
    total = torch.where(scored, squares, 0.0).cumsum(0)
    count = weight.cumsum(0)
    total[span:], count[span:] = total[span:] - total[:-span], count[span:] - count[:-span]
    mean = total / count
    mean[: span - 1] = torch.nan
    return mean


def _cost(result: Result) -> Picture | None:
    if not result.costs:
        return None
    with figure(3.4, 1, 2) as (drawing, axes):
        for cost in result.costs:
            colour = _colour(result, cost.name)
            style = {"color": colour, "marker": "o", "markersize": 4, "label": cost.name}
            axes[0, 0].plot(cost.lengths, [1000 * t for t in cost.seconds], **style)
            memory = [math.nan if b is None else b / 2**20 for b in cost.peak_bytes]
            axes[0, 1].plot(cost.lengths, memory, **style)
        for plot, title in zip(axes[0], ("time, ms", "peak memory, MiB"), strict=True):
            plot.set_title(title, fontsize=10)
            plot.set_xlabel("length")
            plot.set_xscale("log", base=2)
            plot.set_xticks(result.costs[0].lengths, [str(n) for n in result.costs[0].lengths])
            plot.minorticks_off()
        axes[0, 0].set_yscale("log")
        axes[0, 1].set_ylim(bottom=0)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside upper center", ncols=COLUMNS, fontsize=9)
        source = source_of(drawing)
    words = "; ".join(
        f"{c.name} {1000 * c.seconds[-1]:.3g} ms at length {c.lengths[-1]}" for c in result.costs
    )
    return Picture("cost", source, f"Cost against length: {words}.", "Cost against length.")


def _slopes(result: Result) -> Picture | None:
    found = result.slopes
    if found is None:
        return None
    lags = found.slopes.shape[1]
    bound = float(found.slopes.abs().quantile(0.99)) or 1.0
    first = 1 if result.method["embedding"] == "relative" else 0
    extent = (0, len(found.rows), lags + first - 0.5, first - 0.5)
    picture = {
        "aspect": "auto",
        "cmap": "RdBu_r",
        "vmin": -bound,
        "vmax": bound,
        "interpolation": "nearest",
    }
    with figure(3.6, 1, 2, width_ratios=(12, 1), sharey=True) as (drawing, axes):
        left, right = axes[0]
        image = left.imshow(found.slopes.T.numpy(), extent=extent, **picture)
        left.grid(False)
        left.set_ylabel("lag, rows before the forecast is made")
        at = torch.linspace(0, len(found.rows) - 1, 4).round().long()
        labels = [
            _short(result.times[int(row)]) if result.times else str(int(row))
            for row in found.rows[at]
        ]
        left.set_xticks((at + 0.5).tolist(), labels, fontsize=9)
        left.set_title("LLA, along the test", fontsize=10)
        right.imshow(found.autoregression[:, None].numpy(), extent=(0, 1, *extent[2:]), **picture)
        right.grid(False)
        right.set_xticks([])
        right.set_title("ridge", fontsize=10)
        drawing.colorbar(image, ax=axes[0].tolist(), shrink=0.9)
        source = source_of(drawing)
    strongest = int(found.slopes.abs().mean(0).argmax()) + first
    alt = (
        f"Heat map of the slopes of LLA over time and lag; on average the largest is at lag "
        f"{strongest}."
    )
    caption = (
        f"d forecast / d past value, {found.horizon} {'row' if found.horizon == 1 else 'rows'} "
        "ahead. Red: the forecast rises with that value; blue: it falls."
    )
    return Picture("slopes", source, alt, caption)
