"""Test-time regression without training: which mechanism does what the regression picture says.

Hyper-parameters are chosen on four streams, errors measured on eight others of the same law.
The measured values are in docs/regression.md, which these tests read and hold to.
`pytest -m slow -rP tests/tasks/test_regression_table.py` prints them.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from regard import ops
from regard.core.budgets import relative_error
from regard.tasks import (
    PiecewiseRegression,
    RegressionScore,
    evaluate_test_time_regression,
    strictly_causal,
)
from regard.tasks.piecewise import Predictor

GOLDEN = Path(__file__).parents[1] / "golden" / "regression_tasks" / "ttr_piecewise"
PAGE = Path(__file__).parents[2] / "docs" / "regression.md"
LENGTH = 512
SEED = 0


def softmax(h: float):
    return strictly_causal(ops.softmax_attention, scale=1 / h)


def local_linear(h: float, ridge: float, decay: float = 1.0):
    return _remembering(ops.local_linear_attention, decay, scale=1 / h, ridge=ridge)


def through_origin(h: float, ridge: float, decay: float = 1.0):
    """Local linear without intercept, its ridge beside weights exp(-|x - x_j|^2 / 2h) <= 1."""
    options = {"intercept": False, "kernel": "gaussian", "ridge_mode": "absolute"}
    return _remembering(ops.local_linear_attention, decay, scale=1 / h, ridge=ridge, **options)


def mesa(ridge: float, decay: float = 1.0):
    return _remembering(ops.mesa_attention, decay, ridge=ridge)


def delta(step: float, decay: float | None = None):
    """Keys of norm 1; the default scale makes the queries, of norm sqrt(d), unit ones too."""

    def predict(x: Tensor, y: Tensor) -> Tensor:
        beta = x.new_full((x.shape[0], 1, x.shape[1] - 1), step)
        if decay is None:
            return strictly_causal(ops.delta_attention, beta=beta)(x, y)
        forget = torch.full_like(beta, math.log(decay))
        return strictly_causal(ops.gated_delta_attention, beta=beta, log_decay=forget)(x, y)

    return predict


def linear(c: float):
    """(c / t) sum over the t pairs before of y_j x_j . x_t."""
    sums = strictly_causal(ops.linear_attention, feature_map="identity", normalise=False)

    def predict(x: Tensor, y: Tensor) -> Tensor:
        return sums(x, y) * c / torch.arange(x.shape[1]).clamp(min=1)[:, None]

    return predict


def _remembering(op, decay: float, **options):
    """Pair j counts decay^(t-1-j) in the prediction of y_t."""

    def predict(x: Tensor, y: Tensor) -> Tensor:
        forget = None
        if decay < 1:
            forget = x.new_full((x.shape[0], 1, x.shape[1] - 1), math.log(decay))
        return strictly_causal(op, log_decay=forget, **options)(x, y)

    return predict


PREDICTORS = {
    "softmax": lambda a: softmax(a["h"]),
    "lla": lambda a: local_linear(a["h"], a["lla_ridge_relative"]),
    "mesa": lambda a: mesa(a["mesa_ridge"]),
    "mesa_decay": lambda a: mesa(a["mesa_ridge"], a["mesa_decay"]),
    "deltanet": lambda a: delta(a["delta_beta"]),
    "gated_deltanet": lambda a: delta(a["delta_beta"], a["delta_alpha"]),
}
ARGUMENTS = json.loads(GOLDEN.with_suffix(".json").read_text())["args"]


@pytest.mark.parametrize("name", PREDICTORS)
def test_predictions_equal_an_independent_evaluation(name):
    """Values of an evaluation of the equations in float64 that shares no code with this one."""
    data = load_file(GOLDEN.with_suffix(".safetensors"))
    prediction = PREDICTORS[name](ARGUMENTS)(data["in.x"], data["in.y"])
    assert relative_error(prediction, data[f"out.{name}"]) < 1e-8


def test_the_linear_predictor_is_its_sum():
    data = load_file(GOLDEN.with_suffix(".safetensors"))
    x, y = data["in.x"], data["in.y"]
    weights = (x @ x.mT).tril(-1) / torch.arange(x.shape[1]).clamp(min=1)[:, None]
    assert relative_error(linear(0.3)(x, y), 0.3 * weights @ y) < 1e-12


EVERY = {name: make(ARGUMENTS) for name, make in PREDICTORS.items()}
EVERY |= {
    "linear": linear(1.0),
    "lla_decay": local_linear(1.3, 0.1, 0.9),
    "through_origin": through_origin(1.3, 0.1, 0.9),
}


@pytest.mark.parametrize("name", EVERY)
def test_predictors_see_no_target_of_their_own(name):
    x, y, _ = PiecewiseRegression(4, 8, 24).sample(2, torch.Generator().manual_seed(0))
    predict = EVERY[name]
    expected = predict(x, y)
    x, y = x.clone(), y.clone()
    x[:, 13:], y[:, 12:] = 1e4, -1e4
    assert torch.equal(predict(x, y)[:, :13], expected[:, :13])
    assert not expected[:, 0].any()


def test_a_flat_kernel_through_the_origin_is_mesa():
    x, y, _ = PiecewiseRegression(4, 8, 24).sample(2, torch.Generator().manual_seed(0))
    flat = through_origin(math.inf, 0.3, 0.9)(x, y)
    assert relative_error(flat, mesa(0.3, 0.9)(x, y)) < 1e-10


BANDWIDTHS = (0.15, 0.3, 0.5, 1.0, 2.0)  # of the kernel, in units of sqrt(d)
RIDGES = (0.1, 1.0, 10.0)  # of mesa
FAMILIES = {
    "local linear": (local_linear, BANDWIDTHS, (1e-3, 1e-2, 0.1)),
    "softmax": (softmax, BANDWIDTHS),
    "mesa": (mesa, RIDGES),
    "mesa, decay": (mesa, RIDGES, (0.9, 0.95, 0.98, 0.99)),
    "delta": (delta, (0.3, 0.6, 1.0)),
    "gated delta": (delta, (0.3, 0.6, 1.0), (0.95, 0.99)),
    "linear": (linear, (0.3, 1.0, 3.0)),
}

Mode = Literal["cluster", "iid"]
WIDE = (0.1, *BANDWIDTHS, 5.0, 10.0, 20.0, math.inf)
SMALL = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
DECAYS = (1.0, 0.99, 0.98, 0.95, 0.93, 0.9, 0.85, 0.8, 0.75, 0.7)
DECAYING = {
    "local linear": (local_linear, WIDE, SMALL),
    "local linear, decay": (local_linear, WIDE, SMALL, DECAYS),
    "no intercept": (through_origin, WIDE, SMALL),
    "no intercept, decay": (through_origin, WIDE, SMALL, DECAYS),
    "mesa, decay": (mesa, (*SMALL, 10.0), DECAYS),
}


def members(family: tuple, d: int) -> Iterator[tuple[tuple, Predictor]]:
    """(settings, predictor) of every member; bandwidths become those of dimension d."""
    make, *grids = family
    for settings in product(*grids):
        arguments = settings
        if make in (softmax, local_linear, through_origin):
            arguments = (settings[0] * math.sqrt(d), *settings[1:])
        yield settings, make(*arguments)


@functools.cache
def scores(mode: Mode, d: int, segment: int, decaying: bool = False) -> dict[str, RegressionScore]:
    """Of the tuned member of every family, on streams it was not tuned on."""
    task = PiecewiseRegression(d, segment, LENGTH, mode)
    make = torch.Generator().manual_seed(SEED)
    tuning, test = task.sample(4, make), task.sample(8, make)
    chosen = {}
    for name, family in (DECAYING if decaying else FAMILIES).items():
        numbered = {str(settings): predict for settings, predict in members(family, d)}
        errors = evaluate_test_time_regression(numbered, tuning)
        best = min(errors, key=lambda settings: errors[settings].error)
        print(f"{name}: chosen {best}, {errors[best].error:.4f} where it was chosen")
        chosen[name] = numbered[best]
    found = evaluate_test_time_regression(chosen, test, baseline="local linear")
    for name, score in found.items():
        parts = score.in_segment.split(4)
        curve = [f"{float(part.mean()):.4f}" for part in (parts[0], parts[-1])]
        print(f"{mode} {d} {segment}  {name}: {score.error:.4f} ({score.ratio:.2f})", *curve)
    return found


def page(table: str) -> dict[tuple[Mode, int, int], dict[str, tuple[float, float]]]:
    """Rows of a table of docs/regression.md: what these tests found, and an earlier evaluation."""
    text = PAGE.read_text().split(f"<!-- {table} -->")[1].split("<!--")[0]
    heading, _, *lines = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()
    )
    found = {}
    for mode, d, segment, *cells in lines:
        pairs = [re.fullmatch(r"([\d.]+) \(([\d.]+)\)", cell) for cell in cells]
        values = [(float(pair[1]), float(pair[2])) for pair in pairs if pair]
        found[mode, int(d), int(segment)] = dict(zip(heading[3:], values, strict=True))
    return found


TABLE, DECAY_TABLE = page("table"), page("decay")

# Rounding differs between processors, and a near-tie may then be settled otherwise.
BETWEEN_MACHINES = 0.03
# Of streams of one law: on five seeds local linear lies in .030-.036 (cluster, d = 16, S = 128)
# and .037-.055 (d = 8). Streams are hard for all predictors alike, so ratios vary less.
BETWEEN_STREAMS = 0.25


@pytest.mark.slow
@pytest.mark.parametrize("row", TABLE, ids=str)
def test_errors_are_those_of_the_page_and_near_an_earlier_evaluation(row):
    found = scores(*row)
    assert list(found) == list(TABLE[row])
    for name, (here, earlier) in TABLE[row].items():
        assert found[name].error == pytest.approx(here, rel=BETWEEN_MACHINES), name
        assert found[name].error == pytest.approx(earlier, rel=BETWEEN_STREAMS), name


@pytest.mark.slow
def test_local_linear_wins_where_maps_change_and_regions_tell_them_apart():
    ratio = {name: score.ratio for name, score in scores("cluster", 16, 128).items()}
    assert ratio["softmax"] >= 2.5  # 3.92; seeds 0-4: 3.80-4.34
    assert ratio["mesa"] >= 3  # 6.14; 6.14-6.71
    assert min(ratio, key=lambda name: ratio[name]) == "local linear"


@pytest.mark.slow
def test_one_map_for_all_is_learnt_as_well_by_one_ridge_regression():
    found = scores("cluster", 16, 512)
    lla, mesa = found["local linear"].error, found["mesa"].error
    assert abs(lla - mesa) / mesa < 0.15  # .037; seeds 0-4: 0-.037


@pytest.mark.slow
def test_without_regions_only_forgetting_helps():
    found = scores("iid", 16, 128)
    assert found["mesa, decay"].error < found["local linear"].error / 2  # .214; .211-.219 of it
    assert found["delta"].error < found["local linear"].error / 2  # .284; .275-.284 of it


@pytest.mark.slow
def test_local_linear_goes_on_improving_where_softmax_has_reached_a_plateau():
    found = scores("cluster", 16, 128)
    lla, softmax = found["local linear"].in_segment, found["softmax"].in_segment
    assert lla[-4:].mean() < 0.02  # .0012; seeds 0-4: .0000-.0012
    assert softmax[-4:].mean() > 0.08  # .1066; .0955-.1193
    assert lla[:4].mean() > softmax[:4].mean()  # .786 > .665: a fresh segment costs it more


@pytest.mark.slow
def test_the_lead_over_softmax_grows_with_dimension():
    small, large = (scores("cluster", d, 128)["softmax"].ratio for d in (8, 16))
    assert large > small  # 3.92 > 3.07; seeds 0-4: 2.39-3.23 at d = 8, 3.80-4.34 at d = 16


@pytest.mark.slow
@pytest.mark.parametrize("row", DECAY_TABLE, ids=str)
def test_errors_with_decay(row):
    found = {name: score.error for name, score in scores(*row, decaying=True).items()}
    assert list(found) == list(DECAY_TABLE[row])
    for name, (here, _) in DECAY_TABLE[row].items():
        assert found[name] == pytest.approx(here, rel=BETWEEN_MACHINES), name
    mesa = found["mesa, decay"]
    if row[0] == "cluster":
        assert found["local linear, decay"] < mesa  # d = 16: .548 of it; d = 8: .624
        assert found["no intercept, decay"] < found["local linear, decay"]  # .778 and .776 of it
    else:
        assert found["local linear, decay"] <= 1.2 * mesa  # 1.114 and 1.155
        assert abs(found["no intercept, decay"] / mesa - 1) < 0.01  # 1.0007 and .998
