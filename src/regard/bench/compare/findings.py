"""What the numbers say, in sentences: above all where local linear attention loses."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.bench.compare.cost import SDPA
from regard.bench.compare.result import LLA, RIDGE, Entry, Result
from regard.bench.report.words import number

NOISE = 2.0


def loss_difference(first: Tensor, second: Tensor, horizon: int) -> float:
    """How many standard errors the first forecast's mean squared error lies above the second's.

    The statistic of Diebold and Mariano (1995): forecasts h rows ahead have errors that are
    correlated over h - 1 rows, which the standard error counts in (Bartlett weights).
    """
    size = float(torch.maximum(first.abs().max(), second.abs().max())) or 1.0
    difference = (first / size).square() - (second / size).square()  # no fourth power overflows
    n, mean = len(difference), float(difference.mean())
    centred = difference - mean
    variance = float(centred.square().mean())
    for lag in range(1, min(horizon, n)):
        weight = 1 - lag / horizon
        variance += 2 * weight * float((centred[lag:] * centred[:-lag]).sum()) / n
    if variance <= 0:
        return 0.0 if mean == 0 else float("inf") if mean > 0 else float("-inf")
    return mean / (variance / n) ** 0.5


def standard_errors(result: Result, first: str, second: str, horizon: int) -> float:
    """`loss_difference` of two forecasters on the scored rows of a horizon."""
    forecasts = result.forecasts[horizon]
    truth, scored = forecasts.truth, forecasts.scored
    errors = [(forecasts.by_name[name] - truth)[scored] for name in (first, second)]
    return loss_difference(errors[0], errors[1], horizon)


def findings(result: Result) -> list[str]:
    """Who is best, where LLA loses, its gap to autoregression, and what it costs."""
    focus = result.entry(LLA)
    sentences = [_best(result)]
    if focus is None or not focus.scores:
        return [*sentences, "LLA (local_linear) took no part."]
    return [*sentences, _where_lla_loses(result, focus), *_gap(result, focus), *_price(result)]


def _best(result: Result) -> str:
    won: dict[str, list[str]] = {}
    for horizon in result.horizons:
        name = result.best(horizon) or "none"
        perfect = [e.name for e in result.entries if (s := e.score(horizon)) and s.rmse == 0]
        others = [other for other in perfect if other != name]
        like = f", like {_list(others)}" if others else ""
        words = f"{horizon} (an error of 0{like})" if perfect else str(horizon)
        won.setdefault(name, []).append(words)
    parts = [f"{name} at horizon {_list(horizons)}" for name, horizons in won.items()]
    return f"Least error over {result.series['scored']} scored points: {'; '.join(parts)}."


def _where_lla_loses(result: Result, focus: Entry) -> str:
    losses, close = [], []
    for other in result.entries:
        lost, near = [], []
        for own in focus.scores:
            theirs = other.score(own.horizon)
            if other.name == focus.name or theirs is None:
                continue
            noise = abs(standard_errors(result, focus.name, other.name, own.horizon)) < NOISE
            if own.rmse <= theirs.rmse:
                near += [str(own.horizon)] * (noise and own.rmse < theirs.rmse)
                continue
            against = "an error of 0"
            if theirs.rmse:
                more = 100 * (own.rmse / theirs.rmse - 1)
                against = f"{number(theirs.rmse)}, {more:.1f} % more"
            lost.append(
                f"{own.horizon} ({number(own.rmse)} against {against}"
                f"{', within the noise of this test' if noise else ''})"
            )
        if lost:
            losses.append(f"to {other.name} at horizon {_list(lost)}")
        if near:
            close.append(f"over {other.name} at horizon {_list(near)}")
    first = (
        f"LLA (local_linear) loses {'; '.join(losses)}."
        if losses
        else "LLA (local_linear) loses to none of the others in error at these horizons."
    )
    second = f" Its lead is within the noise of this test {'; '.join(close)}." if close else ""
    return first + second


def _gap(result: Result, focus: Entry) -> list[str]:
    ridge = result.entry(RIDGE)
    if ridge is None:
        return []
    parts = []
    for own in focus.scores:
        theirs = ridge.score(own.horizon)
        if theirs is None:
            continue
        if theirs.rmse == 0:
            word = "both are 0" if own.rmse == 0 else f"{number(own.rmse)} against 0"
            parts.append(f"{word} at horizon {own.horizon}")
        else:
            gap = 100 * (own.rmse / theirs.rmse - 1)
            word = "more" if gap > 0 else "less"
            parts.append(f"{abs(gap):.1f} % {word} at horizon {own.horizon}")
    return [f"Error of LLA against that of {RIDGE}: {', '.join(parts)}."] if parts else []


def _price(result: Result) -> list[str]:
    own, softmax, plain = result.cost(LLA), result.cost("softmax"), result.cost(SDPA)
    if own is None:
        return []
    length = own.lengths[-1]
    parts = [f"{number(own.ratios[-1], 2)} times the time of torch SDPA"]
    if softmax is not None:
        parts.append(
            f"{number(own.seconds[-1] / softmax.seconds[-1], 2)} times that of softmax with the "
            "same kernel"
        )
    sentence = f"At length {length} a call of LLA takes {' and '.join(parts)}"
    memory = plain.peak_bytes[-1] if plain else None
    if memory is not None and own.peak_bytes[-1] is not None:
        sentence += (
            f", and {own.peak_bytes[-1] / 2**20:.1f} MiB of memory (SDPA {memory / 2**20:.1f})"
        )
    dearer = own.ratios[-1] > 1 or (softmax is not None and own.seconds[-1] > softmax.seconds[-1])
    return [sentence + (": in cost it loses." if dearer else ".")]


def _list(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
