"""What a benchmark returns: rows that are true, refusals that say why, JSON, the page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.bench.measure import memory
from regard.bench.timing import accuracy, benchmark, child
from regard.bench.timing.accuracy import blocks_of, reference_rows, rows_are_independent
from regard.bench.timing.benchmark import Benchmark
from regard.bench.timing.child import Measurement
from regard.bench.timing.contestants import SDPA, Contestant, yardsticks
from regard.bench.timing.fit import estimate, why_too_large
from regard.bench.timing.result import Refusal, SpeedResult
from regard.bench.timing.setting import Setting
from regard.core.card import Card, Paper
from regard.core.patterns import Pattern
from regard.ops.softmax.reference import softmax_reference

TINY = Setting(lengths=(16, 300), heads=2, dim=8, patience=0.05)


@cache
def measured() -> SpeedResult:
    return regard.bench.speed(
        ["softmax", "delta"], lengths=(300, 16), heads=2, dim=8, patience=0.05, backward=True
    )


def toy(op: Any, reference: Any = softmax_reference, **fields: Any) -> Card:
    return Card("toy", Paper("Toy"), op, reference, **fields)


def rows_of(card: Card, setting: Setting = TINY) -> list[dict[str, Any]]:
    return list(Measurement(Contestant(card.name, setting, card)).rows())


def test_rows_in_fresh_processes() -> None:
    result = measured()
    assert result.complete
    assert result.names == (SDPA, "softmax", "delta")
    assert [(row.name, row.length) for row in result.rows] == [
        (name, length) for name in result.names for length in (16, 300)
    ]
    assert not result.refused
    for row in result.rows:
        assert row.seconds > 0
        assert row.runs >= 1
        assert row.error is not None
        assert row.error < 1e-5
        assert row.gradient_error is not None
        assert row.gradient_error < 1e-4
        assert set(row.ratios) == (set() if row.name == SDPA else {SDPA})
        assert row.noisy == (row.sentinel_moved > 0.1)
    whole, part = (result.row("delta", length) for length in (16, 300))
    assert whole is not None
    assert whole.compared == "all queries of one head of 2"
    assert part is not None
    assert part.compared == "24 queries of one head of 2, from the first to the last"
    assert result.fastest(300) == min(result.rows[3::2], key=lambda row: row.seconds)


def test_the_form_is_what_explain_says() -> None:
    row = measured().row("delta", 300)
    assert row is not None
    leaves = TINY.call(regard.mechanisms["delta"], 300).leaves()
    told = regard.explain(regard.ops.delta_attention, **leaves.arguments)
    assert (row.form, row.impl, row.reasons) == (told.form, told.impl, told.reasons)
    assert "Which form ran" in str(measured())


def test_json_and_sentences() -> None:
    data = json.loads(measured().to_json())
    assert data["complete"] is True
    assert data["setting"]["lengths"] == [16, 300]
    assert {"regard", "torch", "python"} <= set(data["versions"])
    assert data["machine"]["processors"] >= 1
    assert len(data["rows"]) == 6
    assert data["findings"][0].startswith("At length 16 ")
    if regard.native.instruction_sets():
        assert set(data["fma_peak_gflops"]) == {"before", "after"}


def test_every_mechanism_gets_the_same_values() -> None:
    plain = TINY.call(None, 16)
    for name in regard.mechanisms:
        call = TINY.call(regard.mechanisms[name], 16)
        assert all(torch.equal(call[x], plain[x]) for x in "qkv")
        assert call.options["causal"] is True
    beta = TINY.call(regard.mechanisms["delta"], 16)["beta"]
    assert bool(((beta > 0) & (beta < 1)).all())
    half = replace(TINY, dtype="bfloat16").call(None, 16)
    assert half["q"].dtype == torch.bfloat16


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", regard.mechanisms)
def test_a_part_of_every_reference_can_be_evaluated(name: str, causal: bool) -> None:
    contestant = Contestant.named(name, replace(TINY, causal=causal))
    card = regard.mechanisms[name]
    # Without an end to align them at, queries that see by their place, or choose in blocks, stand
    # where they stand among the others.
    placed = name in ("hierarchical_sparse", "routed", "window") and not causal
    if contestant.setting.why_unfit(card) is None:
        assert rows_are_independent(contestant) == (not placed)


def inexact(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    out = softmax_reference(q, k, v, causal=causal)
    assert isinstance(out, Tensor)
    last = torch.zeros_like(out)
    last[:, :, -1] = 1.0  # one row is wrong, and all gradients are
    return (out + last).detach() + 1.01 * (out - out.detach())


@pytest.mark.parametrize("causal", [True, False])
def test_errors_are_found(causal: bool) -> None:
    for found in rows_of(toy(inexact), replace(TINY, causal=causal, backward=True)):
        row = found["row"]
        whole = found["length"] == 16
        if causal or whole:  # otherwise the rows that are looked at are in the middle
            assert row["error"] > 0.1
        assert row["gradient_error"] == pytest.approx(0.01, rel=1e-3)


def test_gradients_of_some_queries_are_those_of_the_whole() -> None:
    row = rows_of(regard.mechanisms["local_linear"], replace(TINY, backward=True))[1]["row"]
    assert row["compared"].startswith("24 queries")
    assert row["gradient_error"] < 1e-4


def pooled(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    out = softmax_reference(q - q.mean(2, keepdim=True), k, v, causal=causal)
    assert isinstance(out, Tensor)
    return out


def test_queries_that_depend_on_each_other_are_not_judged_in_part() -> None:
    short, long = rows_of(toy(pooled, pooled))
    assert short["row"]["error"] < 1e-6
    assert long["row"]["error"] is None
    assert "depend on other queries" in long["row"]["compared"]


def test_a_reference_that_would_be_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "MOST", 1)
    card = regard.mechanisms["softmax"]
    causal = rows_of(card, replace(TINY, lengths=(2000,)))[0]["row"]
    assert causal["compared"] == "8 queries of one head of 2, only up to position 8"
    every = rows_of(card, replace(TINY, lengths=(2000,), causal=False))[0]["row"]
    assert every["error"] is None
    assert "the reference would take" in every["compared"]


def test_blocks_are_what_the_reference_computes() -> None:
    card = regard.mechanisms["linear"]
    call = TINY.call(card, 400).to(torch.float64)
    blocks = blocks_of(400, causal=True)
    whole = card.reference(call["q"], call["k"], call["v"], causal=True)
    expected = torch.cat([whole[:, :, start:stop] for start, stop in blocks], 2)
    torch.testing.assert_close(reference_rows(card, call, blocks, True), expected)


def test_memory_counts_a_square_of_scores() -> None:
    if not memory.forget_peak():
        return
    setting = replace(TINY, lengths=(1024,), heads=1)
    square = rows_of(toy(softmax_reference, memory="quadratic"), setting)[0]["row"]["peak_bytes"]
    fused = rows_of(regard.mechanisms["softmax"], setting)[0]["row"]["peak_bytes"]
    assert square > 1024 * 1024 * 4
    assert fused < 1024 * 1024 * 4


def test_where_a_peak_cannot_be_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is measured first for all lengths, before references raise the peak."""
    told = iter([(11, None), (22, None)])
    monkeypatch.setattr(memory, "forget_peak", lambda: False)
    real = memory.growth
    monkeypatch.setattr(memory, "growth", lambda work, device=None: next(told, None) or real(work))
    found = rows_of(regard.mechanisms["linear"])
    assert [answer["row"]["peak_bytes"] for answer in found] == [11, 22]


def test_what_does_not_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    card = toy(softmax_reference, memory="quadratic")
    setting = replace(TINY, lengths=(16, 1 << 20))
    need = estimate(Contestant("toy", setting, card), 1 << 20)
    assert need.scores == 2 * 2 * (1 << 40) * 4
    assert need.scores > 1000 * need.tensors
    short, long = rows_of(card, setting)
    assert "row" in short
    assert "T x S scores, 16.0 TiB" in long["refused"]
    assert why_too_large(need, None, None) is None
    monkeypatch.setattr(memory, "available", lambda device="cpu": 1000)
    assert "1000.0 bytes are free" in rows_of(regard.mechanisms["linear"])[0]["refused"]


def test_what_would_take_too_long_is_not_tried() -> None:
    for name, expected in (("softmax", 9.0), ("linear", 3.0)):
        measurement = Measurement(Contestant.named(name, replace(TINY, patience=0.1)))
        measurement.last = (100, 1.0)
        assert f"might take {expected:.2f} s" in str(measurement._refuse(300))
        measurement.patience = 1.0
        assert measurement._refuse(300) is None


def failing(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    raise NotImplementedError("no such luck\nat all")


def test_what_cannot_be_served_says_why() -> None:
    assert [found["refused"] for found in rows_of(toy(failing))] == ["no such luck"] * 2
    card = toy(softmax_reference, patterns=(Pattern.NONCAUSAL_SELF,))
    assert rows_of(card)[0]["refused"] == "it has no causal form"


@pytest.fixture
def sentinel(monkeypatch: pytest.MonkeyPatch):
    def script(times: Sequence[float]) -> Iterator[float]:
        told = iter(times)
        monkeypatch.setattr(child.Sentinel, "seconds", lambda self: next(told))
        return told

    return script


def test_a_disturbed_row_is_measured_again(sentinel) -> None:
    setting = replace(TINY, lengths=(16,), patience=None)
    left = sentinel([1.0, 1.3, 1.0, 1.05, 9.0])
    row = rows_of(regard.mechanisms["softmax"], setting)[0]["row"]
    assert row["sentinel_moved"] == pytest.approx(0.05)
    assert not row["noisy"]
    assert list(left) == [9.0]
    left = sentinel([1.0, 1.3, 1.0, 0.8, 1.0, 1.4, 9.0])
    row = rows_of(regard.mechanisms["softmax"], setting)[0]["row"]
    assert row["sentinel_moved"] == pytest.approx(0.2)
    assert row["noisy"]
    assert list(left) == [9.0]


def test_a_process_that_dies_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {name: rows_of(regard.mechanisms[name]) for name in ("linear", "softmax")}

    def stream(module: str, description: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if description["name"] not in answers:
            raise RuntimeError("the measuring process failed: torch is ill")
        yield answers[description["name"]][0]
        if description["name"] == "linear":
            raise RuntimeError("the measuring process failed: the system ended it")
        yield answers[description["name"]][1]

    monkeypatch.setattr(benchmark, "stream", stream)
    result = Benchmark(TINY, ["linear", "softmax"]).run()
    assert [(row.name, row.length) for row in result.rows] == [
        ("linear", 16), ("softmax", 16), ("softmax", 300),
    ]  # fmt: skip
    assert result.refused[-1] == Refusal(
        "linear", 300, "the measuring process failed: the system ended it"
    )
    assert "Left out: torch SDPA at 16, 300: the measuring process failed: torch is" in str(result)
    assert result.complete

    def stop(result: SpeedResult) -> None:
        if result.rows:
            raise KeyboardInterrupt

    stopped = Benchmark(TINY, ["linear", "softmax"])
    stopped.after_row = stop
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    data = json.loads(stopped.result.to_json())
    assert data["complete"] is False
    assert len(data["rows"]) == 1


def test_yardsticks_of_a_gpu_are_named() -> None:
    assert yardsticks("cuda") == (SDPA, f"{SDPA} (flash)", f"{SDPA} (cuDNN)")


@pytest.mark.requires("cuda")
def test_on_a_gpu() -> None:
    result = regard.bench.speed(
        ["softmax"], lengths=(64, 512), device="cuda", dtype="bfloat16", backward=True
    )
    assert {row.name for row in result.rows} >= {SDPA, f"{SDPA} (flash)", "softmax"}
    row = result.row("softmax", 512)
    assert row is not None
    assert {SDPA, f"{SDPA} (flash)"} <= set(row.ratios)
    assert row.error is not None
    assert row.error < 1.2e-2
    assert row.peak_bytes
    assert result.clock == "CUDA events, the median"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"mechanisms": ["softmx"]}, KeyError, "did you mean 'softmax'"),
        ({"mechanisms": []}, ValueError, "mechanisms must be at least one name"),
        ({"mechanisms": "softmax"}, TypeError, "mechanisms must be a list of names"),
        ({"lengths": ()}, ValueError, "lengths must be at least one"),
        ({"lengths": (0,)}, ValueError, "lengths must be an int of at least 1"),
        ({"heads": 0}, ValueError, "heads must be an int of at least 1"),
        ({"dtype": "float8"}, ValueError, "dtype must be one of 'float64'"),
        ({"device": "gpu"}, ValueError, "device must be 'cpu' or 'cuda'"),
        ({"device": "meta"}, ValueError, "device must be one of 'cpu', 'cuda'"),
        ({"device": "cuda:99"}, ValueError, "torch sees no such GPU"),
        ({"patience": 0}, ValueError, "patience must be a finite number above 0"),
    ],
)
def test_bad_arguments(options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        regard.bench.speed(**options)


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    measured().save_report(path)
    text = path.read_text(encoding="utf-8")
    assert text.count("<img") == text.count('src="data:image/svg+xml;base64,') == 1
    assert "http" not in text.split("base64,")[0]
    assert "<script" not in text
    for sentence in measured().findings:
        assert sentence in text
    assert "Length 300" in text
    assert "Left out" not in text
    assert list(tmp_path.iterdir()) == [path]
    nothing = Benchmark(TINY, ["linear"]).result
    nothing.save_report(path)
    assert "Interrupted" in path.read_text(encoding="utf-8")
