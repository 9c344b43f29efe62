"""Benchmarks of kernels: what is drawn, judged, counted and timed, and the scripts around it."""

from __future__ import annotations

import json
import math
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import regard
from regard.bench.kernels import cpu, family, flops, gpu, judge, measure, pages, pictures, threads
from regard.bench.kernels.case import PACKED, Case, Target
from regard.bench.kernels.draw import CENTRES, KINDS, draw
from regard.bench.kernels.measure import Bench, ratios
from regard.bench.kernels.result import Result, as_text, facts
from regard.bench.kernels.rows import Left, Row
from regard.bench.measure import clock, memory
from regard.bench.measure import interleaved as turns
from regard.bench.measure.clock import Sentinel, Stopwatch
from regard.bench.measure.interleaved import interleaved, undisturbed

ROOT = Path(__file__).parents[2]
SMALL = Case("test", dim=8, length=70, heads=2)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "ENOUGH", 0.0)
    monkeypatch.setattr(clock, "ENOUGH", 0.0)


def test_kinds_of_keys() -> None:
    drawn = {kind: draw(kind, heads=2, length=600, dim=8) for kind in KINDS}
    for kind, (q, k, v) in drawn.items():
        assert q.shape == k.shape == v.shape == (1, 2, 600, 8)
        assert torch.equal(k, draw(kind, heads=2, length=600, dim=8).k)
        assert not torch.equal(q, k)
        assert v.std() == pytest.approx(1.0, abs=0.05)
    assert drawn["normal"].k.std() == pytest.approx(1.0, abs=0.05)
    assert drawn["offset"].k.mean() == pytest.approx(2.0, abs=0.1)
    norms = drawn["sharp"].k[0, 0].std(0)
    assert norms[0] / norms[-1] == pytest.approx(100.0, rel=0.2)
    smooth = drawn["smooth"].k[0, 0]
    steps = (smooth[1:] - smooth[:-1]).std() / smooth.std()
    assert steps == pytest.approx(math.sqrt(2 - 2 * 0.98), rel=0.3)
    q, k, _ = drawn["cluster"]  # queries lie where the keys of their head lie
    distances = torch.cdist(q[0, 0], k[0, 0]).amin(1)
    assert distances.max() < 1.0
    assert len(k[0, 0].round(decimals=0).unique(dim=0)) <= 8 * CENTRES


def test_grouped_queries_lie_at_their_key_heads() -> None:
    q, k, _ = draw("cluster", heads=4, kv_heads=2, length=100, dim=8)
    assert k.shape[1] == 2
    for head in range(4):
        near = [float(torch.cdist(q[0, head], k[0, at]).amin(1).max()) for at in (0, 1)]
        assert near.index(min(near)) == head // 2


def test_pairs_are_counted_as_masks_see_them() -> None:
    seen = torch.ones(5, 9, dtype=torch.bool).tril(4)
    assert replace(SMALL, heads=1, length=9, queries=5).pairs == int(seen.sum())
    assert replace(SMALL, length=9, causal=False).pairs == 2 * 81
    assert replace(SMALL, length=9, work="decode").pairs == 2 * 9
    masked = replace(SMALL, length=40, extra=("key_mask",))
    real = masked.arguments()["key_mask"][0]
    assert 0 < int((~real).sum()) < 40
    assert masked.pairs == 2 * int(real.cumsum(0).sum())
    assert replace(masked, causal=False).pairs == 2 * 40 * int(real.sum())
    each = 8 * 9 // 2
    assert replace(SMALL, length=8 * PACKED, extra=("packed",)).pairs == 2 * PACKED * each


def test_work_is_counted_from_every_row() -> None:
    case = replace(SMALL, heads=1, length=3)
    steps = torch.tensor([[[1, 2, 3]]])
    wanted = sum(seen * (8 * 8 + 4 * 8 * T) for seen, T in zip((1, 2, 3), (1, 2, 3), strict=True))
    assert flops.forward(case, steps) == wanted
    assert flops.forward(case, torch.zeros(1, 1, 3)) == 6 * (8 * 8 + 8 * 9)
    assert flops.forward(replace(case, mechanism="softmax"), None) == 6 * 4 * 8


@pytest.mark.parametrize(
    "changes",
    [
        {"length": 200},
        {"mechanism": "softmax"},
        {"mechanism": "parallax"},
        {"causal": False},
        {"queries": 9},
        {"kv_heads": 1},
        {"length": 48, "extra": ("packed",)},
        {"length": 200, "extra": ("key_mask", "log_decay")},
        {"work": "decode"},
    ],
    ids=str,
)
def test_outputs_and_gradients_are_judged_by_the_reference(changes: dict[str, Any]) -> None:
    case = replace(SMALL, bound=1e-4, **changes)
    with torch.no_grad():
        out = case.run(case.arguments())
    verdicts = judge.outputs(case, out)
    early = case.rows > judge.EARLY[1]  # rows that see few keys are judged by themselves
    assert [v.quantity for v in verdicts] == ["output", "early rows"][: 1 + early]
    assert all(verdict.right for verdict in verdicts)
    assert not any(verdict.right for verdict in judge.outputs(case, out * 1.001))
    out[:, -1, -1] = math.nan  # of the last row of the last head
    assert judge.outputs(case, out)[0].error == math.inf
    assert all(verdict.right for verdict in judge.gradients(case))


@pytest.mark.parametrize("mechanism", family.MECHANISMS)
def test_the_linear_family_is_judged_by_its_eager_form(mechanism: str) -> None:
    case = replace(SMALL, mechanism=mechanism, bound=1e-5, gradient_bound=3e-5)
    given = case.arguments()
    with torch.no_grad():
        out = case.run(given)
        exact = case.card.reference(**case.arguments(dtype=torch.float64))
    assert (out - exact).norm() <= 1e-5 * exact.norm()
    assert judge.outputs(case, out)[0].right
    assert not judge.outputs(case, out * 1.001)[0].right
    assert all(verdict.right for verdict in judge.gradients(case))
    # Its numbers do not depend on the dtype, nor on how many tokens follow.
    for name, x in given.items():
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, case.arguments(dtype=torch.float64)[name].float()), name


@pytest.mark.parametrize("mechanism", ["lightning", "gated_delta", "rat"])
def test_a_token_of_the_linear_family_follows_a_state(mechanism: str) -> None:
    case = replace(SMALL, mechanism=mechanism, work="decode", length=20, bound=1e-5)
    whole = replace(case, work="forward", length=21)
    given = case.arguments()
    assert given["q"].shape[2] == given["k"].shape[2] == 1
    assert given["state"].length == 20
    with torch.no_grad():
        out = case.run(given)
        assert torch.allclose(out, whole.run(whole.arguments())[:, :, -1:], atol=1e-5)
    assert all(verdict.right for verdict in judge.outputs(case, out))
    row = Bench(rounds=2, attempts=1).row(case)
    assert isinstance(row, Row)
    assert set(row.seconds) == {"forward", "grad forward", "asking forward"}
    assert row.numbers["us"] == 1e6 * row.seconds["forward"]


def test_rows_of_the_linear_family() -> None:
    rows = {
        (c.mechanism, c.length, c.work): c for c in family.on_processor(Case, "auto", True, False)
    }
    long = rows["lightning", 16384, "forward"]
    assert long.against is rows["lightning", 16384, "forward"].against is not None
    assert long.against.length == 4096
    asked = {(t.quantity, t.level): t for t in long.targets}
    assert asked["SDPA/forward", "must"].least == 90
    assert asked["SDPA/forward", "stretch"].least == 115
    assert asked["forward/base", "must"].most == 4.4
    assert rows["gated_delta", 1024, "gradients"].targets[0].least == pytest.approx(2 / 3 * 5.5)
    assert not any(c.targets for c in family.on_processor(Case, "eager", False, True))
    # Three operations of an element of the state: decay, write, read.
    assert family.work(replace(long, length=1, heads=1, dim=2)) == 2 * 3 * 4
    assert family.work(replace(long, mechanism="rat")) is None
    seconds = {"forward": 0.5, "SDPA forward": 1.0}
    row = Row(long, "native", [], seconds, numbers=ratios(seconds, ["SDPA"]))
    assert measure.plain_numbers(row, ["SDPA"]) == {"ms": 500.0, "us": 5e5, "SDPA/forward": 2.0}


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(SMALL, options={"tol": 1e-6}, extra=("log_decay",), bound=1e-5)
    learn = ("ridge", "log_decay")
    verdicts = {v.quantity: v for v in judge.whole(case, learn=learn)}
    assert set(verdicts) == {"output", "dq", "dk", "dv", "dridge", "dlog_decay"}
    assert all(verdict.right for verdict in verdicts.values())
    right = Case.run
    # Gradients that leave out a term, as a published backward does.
    monkeypatch.setattr(Case, "run", lambda self, a: right(self, {**a, "grad": "official"}))
    verdicts = {v.quantity: v for v in judge.whole(case, learn=learn)}
    assert verdicts["output"].right
    assert not verdicts["dq"].right


def test_rounding_is_allowed_for() -> None:
    case = replace(SMALL, dtype="bfloat16")
    for verdict in judge.whole(case, learn=("ridge",)):
        assert verdict.right
        assert 0 < verdict.rounding < verdict.allowed
    with torch.no_grad():
        out = case.run(case.arguments())
    assert judge.outputs(case, out)[0].error > 1e-4
    assert not judge.outputs(case, out * 1.02)[0].right


def test_a_row_has_numbers_and_targets() -> None:
    targets = (
        Target("forward/SDPA", most=1e9),
        Target("both/forward", most=0.1),
        Target("forward/base", most=1e9),
        Target("of peak", least=2.0),
        Target("unheard of", most=1.0),
    )
    case = replace(
        SMALL, work="gradients", targets=targets, against=replace(SMALL, causal=False), heads=1
    )
    row = Bench(rounds=2, attempts=1, peak=lambda isa: 1e6).row(case)
    assert isinstance(row, Row)
    row.noisy = False
    assert row.right
    assert [(t["quantity"], t["met"]) for t in row.targets] == [
        ("forward/SDPA", True),
        ("both/forward", False),
        ("forward/base", True),
        ("of peak", False),
    ]
    assert set(row.seconds) == {
        *("forward", "backward", "both"),
        *("SDPA forward", "SDPA backward", "SDPA both", "base forward"),
    }
    assert row.numbers["both/SDPA"] == row.seconds["both"] / row.seconds["SDPA both"]
    row.noisy = True
    assert not any(target["met"] for target in row.targets)


def test_what_cannot_be_measured_says_why() -> None:
    bench = Bench(timed=False)
    left = bench.row(replace(SMALL, impl="triton"))
    assert isinstance(left, Left)
    assert "impl='triton' cannot serve this call" in left.reason
    assert not left.failed
    left = bench.row(replace(SMALL, impl="eager", isa="avx2"))
    assert isinstance(left, Left)
    assert "instruction set" in left.reason
    left = bench.check(replace(SMALL, impl="triton"), ())
    assert isinstance(left, Left)


def test_a_call_that_breaks_is_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Case, arguments: Any) -> Any:
        raise RuntimeError("illegal memory access\nand more")

    monkeypatch.setattr(Case, "run", broken)
    left = Bench(timed=False).row(SMALL)
    assert isinstance(left, Left)
    assert left.failed
    result = Result("cpu", facts("cpu"), rows=[left])
    assert result.wrong == [f"{SMALL.name}: RuntimeError: illegal memory access"]


def test_times_are_taken_in_turns() -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    found = interleaved(calls, Stopwatch(), before=lambda: order.append("."))
    _, *samples = "".join(order).split(".")
    assert [set(sample) for sample in samples[:4]] == [{"a"}, {"b"}, {"a"}, {"b"}]
    assert all(len(set(sample)) == 1 for sample in samples)
    assert found["a"].runs == found["b"].runs == len(samples) / 2 >= 5


def test_times_are_taken_again_while_the_machine_is_disturbed() -> None:
    class Moving(Sentinel):
        def __init__(self, *values: float) -> None:
            self.values = iter(values)

        def seconds(self) -> float:
            return next(self.values)

    def change(*values: float) -> float:
        calls = {"a": lambda: None}
        return undisturbed(calls, Stopwatch(), Moving(*values), attempts=2)[1]

    assert change(1.0, 1.05) == pytest.approx(0.05)
    assert change(1.0, 2.0, 1.0, 1.05) == pytest.approx(0.05)
    assert change(1.0, 2.0, 1.0, 4.0) == pytest.approx(1.0)  # the quieter one, and it says so


def test_ratios_are_to_the_yardstick_of_the_same_work() -> None:
    seconds = {"forward": 3.0, "backward": 6.0, "both": 9.0, "flash forward": 1.0}
    assert ratios(seconds, ["flash", "cuDNN"]) == {
        "forward/flash": 3.0,
        "backward/forward": 2.0,
        "both/forward": 3.0,
    }


def test_targets_are_those_of_the_instruction_set() -> None:
    def most(isa: str, impl: str, dim: int) -> list[float | None]:
        rows = [case for case in cpu.timed([impl], isa) if case.section == "forward"]
        (row,) = (case for case in rows if case.dim == dim and case.ridge == 1.0)
        return [t.most for t in row.targets if t.quantity == "forward/SDPA"]

    assert most("avx512", "native", 128) == [4.5]
    assert most("avx2", "native", 128) == [8.4]
    assert most("neon", "native", 128) == [8.4]
    assert most("avx512", "eager", 16) == [7.0]
    assert most("avx512", "eager", 32) == [6.5]
    names = [case.name + case.section for case in cpu.timed(["native"], "avx512")]
    assert len(set(names)) == len(names)
    names = [case.name + case.section for case in gpu.timed()]
    assert len(set(names)) == len(names)


def test_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "ROUNDS", 3)
    monkeypatch.setattr(threads, "PATIENCE", 5.0)
    monkeypatch.setattr(threads, "PAUSE", 0.0)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(threads, "_idle", lambda call: 2.0)
    before = torch.get_num_threads()
    asked = replace(SMALL, targets=(Target("threads", least=1e9),))
    found = threads.scaling(asked)
    assert torch.get_num_threads() == before
    assert isinstance(found, dict)
    one, two = found["milliseconds"]["one"], found["milliseconds"]["two"]
    assert found["gain"] == one / two
    assert found["right"]
    assert found["name"] == f"{SMALL.name}, 2 heads, two threads"
    assert [(t["least"], t["value"], t["met"]) for t in found["targets"]] == [
        (1e9, one / two, False)
    ]
    assert threads.scaling(SMALL)["targets"] == []
    left = threads.scaling(replace(SMALL, impl="triton"))
    assert isinstance(left, Left)
    # A round counts only right after the machine was idle; without three there is no row.
    looks = iter([1.0, 2.0, 1.2, 2.0, 2.0])
    monkeypatch.setattr(threads, "_idle", lambda call: next(looks))
    found = threads.scaling(SMALL)
    assert (found["rounds"], found["disturbed"]) == (3, 2)
    monkeypatch.setattr(threads, "_idle", lambda call: 1.0)
    monkeypatch.setattr(threads, "PATIENCE", 0.01)
    left = threads.scaling(SMALL)
    assert isinstance(left, Left)
    assert left.reason.startswith("the machine was not idle")


def test_what_two_threads_must_gain() -> None:
    asked = {
        (case.impl, case.heads, case.length): case.targets[0].least
        for case in cpu.threaded(["eager", "native"])
        if case.mechanism == "local_linear"
    }
    assert {key: least for key, least in asked.items() if key[0] == "eager"} == {
        ("eager", 1, 4096): 1.3, ("eager", 4, 4096): 1.6, ("eager", 8, 4096): 1.6,
    }  # fmt: skip
    assert asked["native", 4, 2048] == 1.7


def test_threads_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(threads, "ROUNDS", 3)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 2)
    looks = iter([2.0] * 3)
    monkeypatch.setattr(threads, "_idle", lambda call: next(looks, 1.0))
    monkeypatch.setattr(threads, "PATIENCE", 3.0)
    small = [replace(SMALL, section="threads", targets=(Target("threads", least=1e9),))]
    monkeypatch.setattr(cpu, "threaded", lambda impls: iter([*small, replace(small[0], heads=4)]))
    main = runpy.run_path(str(ROOT / "benchmarks/cpu.py"))["main"]
    path = tmp_path / "threads.json"
    assert main(["--parts", "threads", "--only", "eager", "--out", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["complete"]
    assert found["checks"] == found["rows"] == []
    assert [row["heads"] for row in found["threaded"]] == [2]
    assert [row["section"] for row in found["left_out"]] == ["threads"]
    assert "2 heads, two threads" in capsys.readouterr().out
    page = pages.threads(found)
    assert "| **missed:** ≥ 1e+09 |" in page
    assert "Not measured: local linear, eager" in page


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    path = tmp_path_factory.mktemp("cpu") / "cpu.json"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cpu, "LENGTH", 96)
        patched.setattr(family, "LENGTHS", (96, 128, 160))
        patched.setattr(turns, "ENOUGH", 0.0)
        patched.setattr(clock, "ENOUGH", 0.0)
        patched.setattr(memory, "settle", lambda: None)  # in a large process it takes long
        main = runpy.run_path(str(ROOT / "benchmarks/cpu.py"))["main"]
        code = main(["--quick", "--only", "eager", "--out", str(path)])
    return code, json.loads(path.read_text())


def test_the_script_for_processors(processor: Any) -> None:
    code, found = processor
    assert code == 0
    assert found["complete"]
    assert all(row["right"] for row in [*found["checks"], *found["rows"]])
    assert all(row["milliseconds"]["forward"] > 0 for row in found["rows"])
    if regard.native.instruction_sets():
        assert set(found["fma_peak_gflops"]) == {"before", "after"}
        uncounted = {row["section"] for row in found["rows"] if "of peak" not in row["numbers"]}
        assert uncounted == {"linear family", "linear family, decode"}  # RAT; one token
        shares = [row["numbers"].get("of peak", 0.5) for row in found["rows"]]
        assert all(0 < share < 1 for share in shares)


def test_pages_say_what_the_results_say(processor: Any) -> None:
    _, found = processor
    table = pages.table(found, "forward")
    assert table.count("\n") == 2 + sum(row["section"] == "forward" for row in found["rows"])
    assert "| / SDPA |" in table
    assert "Not measured." in pages.table(found, "variants")
    assert "short calls are right" in pages.about(found)
    assert "### Forward\n" in pages.sections(found)
    row = found["rows"][0]
    row["targets"] = [
        {"quantity": "forward/SDPA", "most": 1.0, "least": None, "level": "must", "value": 5.0,
         "met": False}
    ]  # fmt: skip
    assert f"- {row['name']}: forward/SDPA 5.00, wanted ≤ 1" in pages.missed(found)
    assert "forward/SDPA 5.00, ≤ 1: **missed**" in pages.table(found, "forward")


def test_pictures_are_drawn_from_the_rows(processor: Any) -> None:
    _, found = processor
    base = next(row for row in found["rows"] if row["dim"] == 64 and row["section"] == "forward")
    rows = [
        {**base, "section": "lengths", "length": 512, "milliseconds": {"forward": 1.0}},
        {**base, "section": "tolerance", "options": {"tol": 1e-2}},
        {**base, "section": "tolerance", "options": {"tol": 1e-3}},
    ]
    drawn = pictures.pictures({**found, "rows": [*found["rows"], *rows]})
    assert {"lengths", "tolerance"} <= set(drawn) <= set(pictures.CAPTIONS)
    assert all(b"</svg>" in content for content in drawn.values())
    assert pictures.pictures({**found, "rows": []}) == {}


def test_text_of_a_result() -> None:
    row = Row(SMALL, "blockwise", [judge.Verdict("output", 1e-3, 1e-4)], {"forward": 0.5})
    fuzz = {"mechanism": "local_linear", "impl": "eager", "calls": 5, "seed": 1, "failures": ["x"]}
    result = Result("cpu", facts("cpu"), rows=[row], fuzz=[{**fuzz, "refused": {"why": 2}}])
    text = as_text(result, ("SDPA",))
    assert f"WRONG: {SMALL.name}: error of output 1.0e-03, allowed 1.0e-04" in text
    assert " 500 " in text
    assert "3 random calls of local linear, eager, seed 1: 1 wrong; 2 more were refused" in text
    assert text.splitlines()[-1].split() == ["test", "1", "1", "-", "-", "0"]
    met = replace(SMALL, targets=(Target("forward/SDPA", most=2.0),), section="other")
    result.rows = [Row(met, "blockwise", [], numbers={"forward/SDPA": 1.5}), Left(met, "why")]
    last = as_text(result, ("SDPA",)).splitlines()[-1]
    assert last.split() == ["other", "1", "0", "1", "of", "1", "-", "1"]
