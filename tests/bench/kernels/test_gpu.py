"""The benchmark of a GPU, tried on a processor: its rows, its script, its processes."""

from __future__ import annotations

import json
import math
import pickle
import runpy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from regard.bench.kernels import gpu, judge, measure, others, pages
from regard.bench.kernels.case import Case
from regard.bench.kernels.jobs import jobs, take
from regard.bench.kernels.measure import Bench
from regard.bench.kernels.rows import Left
from regard.bench.measure.clock import Stopwatch, Timing

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "benchmarks/gpu.py"
SMALL = Case("test", dim=8, length=70, heads=2)


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str]:
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    main = runpy.run_path(str(SCRIPT))["main"]
    code = main(["--dry-run", "--fuzz", "3", "--out", str(path)])
    text = path.read_text()
    return code, json.loads(text), text


def test_the_script_for_gpus_runs_on_a_processor(dry: Any) -> None:
    code, found, text = dry
    assert code == 0
    assert found["complete"]
    assert found["wrong"] == []
    assert found["left_out"] == []
    assert [found["calls"] for found in found["fuzz"]] == [3, 0]
    assert "NaN" not in text
    sections = {row["section"] for row in found["rows"]}
    assert {"forward", "gradients", "decode", "relatives", "variants", "memory"} <= sections
    assert not any(row["milliseconds"] for row in found["rows"])  # it claims no times
    assert not any(row["targets"] for row in found["rows"])


def test_a_wrong_result_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    script = runpy.run_path(str(SCRIPT))
    one = next(gpu.checked(length=32))
    monkeypatch.setattr(gpu, "timed", lambda: iter(()))
    monkeypatch.setattr(gpu, "checked", lambda length: iter([one]))
    monkeypatch.setattr(judge, "allowed_of_half", lambda *a: 0.0)
    assert script["main"](["--dry-run"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_what_the_minutes_do_not_suffice_for_is_listed(capsys: Any) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main(["--dry-run", "--minutes", "0"]) == 0
    assert "no time was left" in capsys.readouterr().out


def test_rows_of_a_gpu() -> None:
    rows = list(gpu.timed())
    loose = [case for case in rows if case.section == "forward" and case.options]
    assert all(case.options == {"tol": 1e-2} and case.dim > 16 for case in loose)
    for case in loose:  # the default, more exact, is beside it
        beside = [c for c in rows if c.name == replace(case, options={}).name]
        (plain,) = (c for c in beside if c.section == "forward")
        assert not any(t.quantity == "forward/flash" for t in plain.targets)
        assert any(t.quantity == "error/rounding" for t in plain.targets)
    asked = {(c.dim, c.length, c.ridge, c.keys) for c in loose if c.targets}
    assert {key for key in gpu.FORWARD if key[0] > 16} == asked
    dense = {(c.dim, c.length, c.density, c.options["block_q"]) for c in rows
             if c.section == "chosen blocks"}  # fmt: skip
    wanted = {(D, n, d, b) for D in (64, 128) for n in (2**14, 2**16)
              for d in (0.1, 0.2, 0.3) for b in (64, 128)}  # fmt: skip
    assert wanted <= dense


def test_every_section_that_is_asked_for_is_timed() -> None:
    rows = list(gpu.timed())
    sections = {case.section for case in rows}
    assert sections >= {
        "forward", "gradients", "decode", "relatives", "linear family", "linear family, gradients",
        "chosen blocks", "windows", "policies", "memory", "variants", "precision",
    }  # fmt: skip
    hedgehog = {
        (case.dim, case.length, case.extra)
        for case in rows
        if case.mechanism == "hedgehog" and case.against is not None
    }
    assert hedgehog == {
        (D, n, extra)
        for D in (64, 128) for n in (2**14, 2**16) for extra in ((), ("identity_maps",))
    }  # fmt: skip
    for case in rows:
        if case.mechanism == "hedgehog" and case.against is not None:
            assert (case.against.mechanism, case.against.dim) == ("lightning", case.dim)
    mesa = [case.options.get("max_iters") for case in rows if case.published and case.fixed_state]
    assert mesa.count(30) == mesa.count(None) == 4
    titled = {name for name in sections if name in pages.TITLES}
    assert titled == sections


def test_processes_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(SCRIPT))
    names = script["work"].__globals__
    checks = [
        (replace(SMALL, length=n, bound=1e-4, gradient_bound=1e-3), ()) for n in range(30, 35)
    ]
    monkeypatch.setitem(names, "Bench", lambda device, timed: Bench(timed=timed))
    (tmp_path / "jobs").write_bytes(pickle.dumps(jobs([], checks)))
    (tmp_path / "1.taken").touch()  # by another process
    options = type("Options", (), {"part": "7", "worker": tmp_path, "until": math.inf})()
    script["work"](options)
    found, spent = pickle.loads((tmp_path / "7.pickle").read_bytes())
    assert sorted(found) == [0, 2, 3, 4]
    assert [(kind, fault) for kind, _, _, fault in spent] == [("check", "")] * 4
    assert all(seconds > 0 for _, _, seconds, _ in spent)
    assert [found[place].case.length for place in sorted(found)] == [30, 32, 33, 34]
    assert all(row.right for row in found.values())
    assert list(take(tmp_path, 5, time.time() + 60)) == []


def test_no_process_takes_work_when_the_time_is_over(tmp_path: Path) -> None:
    assert list(take(tmp_path, 3, time.time() - 1)) == []
    assert list(tmp_path.iterdir()) == []


def test_the_same_kernels_are_one_piece_of_work() -> None:
    checks = [
        (replace(SMALL, keys=keys, ridge=ridge), ("ridge",))
        for keys in ("normal", "offset", "smooth")
        for ridge in (0.1, 1.0)
    ]
    checks.insert(3, (replace(SMALL, dim=16), ()))
    timed = [
        replace(SMALL, impl="triton", length=2**16),
        replace(SMALL, impl="triton", length=2**14, ridge=0.1, work="gradients"),
        replace(SMALL, impl="triton", length=2**12, options={"tol": 0.1}),
        replace(SMALL, impl="triton", length=2**12),
        replace(SMALL, impl="eager", length=2**10),
    ]
    found = jobs(timed, checks)
    compiled = [calls[0][1] for kind, calls in found if kind == "compile"]
    assert [(case.length, case.work) for case in compiled] == [
        (2**14, "gradients"), (2**12, "forward"),
    ]  # fmt: skip
    judged = [[place for place, _, _ in calls] for kind, calls in found if kind == "check"]
    assert judged == [[0, 1, 2, 4], [3], [5, 6]]


def test_where_gradients_are_refused_the_output_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(timed=False)
    case = replace(SMALL, bound=1e-4, gradient_bound=1e-3)
    assert {"dq", "dridge"} <= {v.quantity for v in bench.check(case, ("ridge",)).verdicts}
    form = Bench._form

    def refused(self: Bench, case: Case, gradients: bool) -> Any:
        return Left(case, "it has none") if gradients else form(self, case, gradients)

    monkeypatch.setattr(Bench, "_form", refused)
    row = bench.check(case, ("ridge",))
    assert [(v.quantity, v.right) for v in row.verdicts] == [("output", True)]
    with monkeypatch.context() as patched:
        patched.setattr(judge, "relative_error", lambda actual, expected: 1.0)
        assert not bench.check(case, ("ridge",)).right


def test_sections_by_name(tmp_path: Path, capsys: Any) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    path = tmp_path / "gpu.json"
    assert main(["--dry-run", "--only", "decode", "--only", "policies", "--out", str(path)]) == 0
    found = json.loads(path.read_text())
    assert {row["section"] for row in found["rows"]} == {"decode", "policies"}
    assert found["checks"] == []
    assert [row["mechanism"] for row in found["rows"] if row["section"] == "policies"] == [
        "block_sparse", "block_sparse", "selected",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        main(["--dry-run", "--only", "nothing of the kind"])
    assert "nothing of the kind" in capsys.readouterr().err


def test_what_was_left_out_is_named() -> None:
    left = [
        {"section": "decode", "reason": "no time was left"},
        {"section": "decode", "reason": "no time was left"},
        {"section": "check", "reason": "why"},
    ]
    said = pages.left_out({"left_out": left})
    assert "- Decoding: one query per head: 2; no time was left" in said
    assert "- check: 1; why" in said
    assert pages.left_out({"left_out": []}) == ""


@pytest.mark.parametrize("mechanism", ["gated_delta", "hedgehog", "mesa"])
def test_unrounded_and_rounded_inputs_are_walked_together(mechanism: str) -> None:
    case = replace(SMALL, mechanism=mechanism, dtype="bfloat16")
    wide = judge._wide(case, "cpu")
    blocks = judge.blocks_of(case, 8)
    both = judge._both_rows(case, wide, blocks, 1)
    for found, given in zip(both, wide, strict=True):
        apart = judge._reference_rows(case, given, blocks, 1)
        assert (found - apart).norm() <= 1e-12 * apart.norm()
    assert (both[0] - both[1]).norm() > 1e-4 * both[0].norm()


def test_what_takes_long_of_torch_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[set[str]] = []

    def undisturbed(calls: Any, *_: Any, **options: Any) -> Any:
        timed.append(set(calls))
        assert options["rounds"] == (3 if "flash forward" in calls else 5)
        return {name: Timing(0.4, 3) for name in calls}, 0.0

    class Watch(Stopwatch):
        def once(self, call: Any, ahead: float = 0.0) -> tuple[float, Any]:
            return 0.1, call()

    bench = Bench(attempts=1)
    monkeypatch.setattr(measure, "undisturbed", undisturbed)
    monkeypatch.setattr(measure, "_KERNELS", {"cuda": {"flash": None}})
    monkeypatch.setattr(others, "contestants", lambda *_: {})
    bench.kind, bench.watch = "cuda", Watch()
    first, second = (bench.row(replace(SMALL, keys=keys)) for keys in ("normal", "offset"))
    assert timed == [{"forward", "flash forward"}, {"forward"}]
    assert first.seconds == second.seconds == {"forward": 0.4, "flash forward": 0.4}
    assert second.numbers["forward/flash"] == 1.0
    bench.row(replace(SMALL, causal=False))
    assert timed[-1] == {"forward", "flash forward"}
