"""Random calls: right ones pass, wrong ones are found and can be made again."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import regard
from regard.testing import fuzz as module
from regard.testing.fuzz import fuzz

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mechanism", ["local_linear", "parallax", "softmax"])
def test_eager_forms_are_right(mechanism: str) -> None:
    found = fuzz(4, mechanism=mechanism, impl="eager", seed=5)
    assert found["failures"] == []
    assert found["refused"] == {}
    assert all(0 < share <= 1 for share in found["worst"].values())


def drawn(number: int, kinds: int | None = None, seed: int = 0, mechanism: str = "local_linear"):
    return module.draw(regard.mechanisms[mechanism], "cpu", seed, number, kinds)


def test_a_call_is_decided_by_seed_and_number() -> None:
    first, second = drawn(7), drawn(7)
    one, again = first.call, second.call
    assert first.dtype == second.dtype
    assert one.options == again.options
    assert all(torch.equal(one[name], again[name]) for name in one.tensors)
    sizes = {tuple(drawn(n).call["k"].shape) for n in range(20)}
    assert len(sizes) > 10
    patterns = {drawn(n).subject.pattern for n in range(40)}
    assert len(patterns) == len(regard.mechanisms["local_linear"].patterns)


@pytest.mark.parametrize("mechanism", ["local_linear", "gated_delta", "block_sparse"])
def test_calls_of_a_kind_share_what_is_compiled(mechanism: str) -> None:
    def fixed(one: module.Drawn) -> tuple[object, ...]:
        """What a kernel is compiled for."""
        call = one.call
        window = call.options.get("window") or (-1, -1)
        return (
            one.dtype, one.subject.pattern, bool(one.parts), *(call.size(a) for a in ("h", "hk")),
            *(call.size(a) for a in ("d", "dv")), frozenset(call.tensors), frozenset(call.options),
            *(name for name in call.tensors if call.axes[name][1:2] == ("1",)),
            *(side >= 0 for side in window), call.options.get("block_q"),
            call.size("t") % 2 if call.size("d") % 16 else None,
            call.size("t") if call.size("t") < 5 else None,
        )  # fmt: skip

    for kind in range(5):
        calls = [drawn(n, kinds=5, mechanism=mechanism) for n in range(kind, 50, 5)]
        assert len({fixed(one) for one in calls}) == 1
        assert len({one.call.size("s") for one in calls}) > 2
    ways = {fixed(drawn(n, kinds=12, mechanism=mechanism)) for n in range(12)}
    assert len(ways) > 8


def test_everything_is_drawn() -> None:
    calls = [drawn(n, kinds=60) for n in range(60)]
    assert any(one.parts for one in calls)
    assert any(one.call.size("t") < 5 < one.call.size("s") for one in calls)
    assert any(one.call.size("h") > one.call.size("hk") for one in calls)
    windows = [one.call.options["window"] for one in calls if "window" in one.call.options]
    assert {side >= 0 for window in windows for side in window} == {True, False}
    options = {name for one in calls for name in (*one.call.tensors, *one.call.options)}
    assert {"key_mask", "key_bias", "log_decay", "ridge", "scale", "window", "solver"} <= options
    assert {one.dtype for one in calls} == set(module.DTYPES)


def test_packed_calls_are_judged_sequence_by_sequence() -> None:
    card = regard.mechanisms["local_linear"]
    number = next(n for n in range(99) if drawn(n).parts)
    one = drawn(number)
    out = one.subject.run(one.call.to(torch.float32).with_options(
        cu_seqlens=one.typed.options["cu_seqlens"]
    ))  # fmt: skip
    exact = module._apart(one.subject, one.call, one.parts)
    assert (out - exact).norm() < 1e-4 * exact.norm()
    whole = one.subject.reference(one.call)
    assert (whole - exact).norm() > 1e-2 * exact.norm()
    assert fuzz(1, mechanism=card, impl="eager", start=number)["failures"] == []


def test_kinds_are_served_by_the_form_that_is_asked_for() -> None:
    asked = {"mechanism": "softmax", "impl": "native", "kinds": 8}
    if regard.native.refusal() is not None:
        pytest.skip("no compiled form here")
    assert fuzz(8, **asked)["refused"] == {}
    alone = fuzz(40, mechanism="softmax", impl="native")["refused"]
    assert sum(alone.values()) > 0


def test_shares_are_the_whole() -> None:
    asked = {"mechanism": "softmax", "impl": "eager", "seed": 4, "kinds": 4}
    parts = [fuzz(8, share=(i, 3), **asked) for i in range(3)]
    assert sorted(part["calls"] for part in parts) == [2, 2, 4]
    assert all(part["failures"] == [] and part["next"] == 8 for part in parts)
    none = fuzz(8, seconds=0.0, **asked)  # the first call is made, whatever the time
    assert (none["calls"], none["next"]) == (1, 1)


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = regard.testing.Subject.run

    def wrong(self: Any, call: Any, **extra: Any) -> Any:
        out = right(self, call, **extra)
        return torch.where(torch.arange(out.shape[2])[:, None] == 16, 1.1 * out, out)

    monkeypatch.setattr(regard.testing.Subject, "run", wrong)
    found = fuzz(5, impl="eager", seed=2)
    assert found["failures"]
    assert "output: relative error" in found["failures"][0]
    number = int(found["failures"][0].split()[1])
    assert fuzz(1, impl="eager", seed=2, start=number)["failures"] == found["failures"][:1]


def test_refusals_are_counted() -> None:
    found = fuzz(2, mechanism="parallax", impl="triton")
    assert found["failures"] == []
    assert sum(found["refused"].values()) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("mechanism", "count"), [("local_linear", 1000), ("parallax", 250)])
def test_a_thousand_calls(mechanism: str, count: int) -> None:
    """Of the C form, or of the eager one where there is no compiler."""
    impl = "native" if regard.native.refusal() is None else "eager"
    found = fuzz(count, mechanism=mechanism, impl=impl, seed=20)
    assert found["failures"] == []


def test_the_script_for_many_processes(tmp_path: Path, capsys: Any) -> None:
    main = runpy.run_path(str(ROOT / "benchmarks/fuzz.py"))
    path = tmp_path / "fuzz.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks/fuzz.py"),
        "--device",
        "cpu",
        "--impl",
        "eager",
    ]
    command += ["--calls", "3", "--jobs", "1", "--mechanisms", "softmax", "--out", str(path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "softmax    3" in told
    found = json.loads(path.read_text())
    assert sum(kind["calls"] for kind in found["kinds"].values()) == 3
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=True)
    assert "softmax    3" in again.stdout  # nothing is left to do
    kinds = dict(found["kinds"])
    kinds["softmax 0"] = {**kinds["softmax 0"], "failures": ["call 0 of seed 0 (...): wrong"]}
    text, calls, wrong = main["table"](kinds)
    assert (calls, wrong) == (3, 1)
    assert text.splitlines()[-1].split()[:5] == ["all", "3", "3", "0", "1"]
