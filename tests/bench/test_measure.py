"""Clocks, memory, fresh processes: the instruments themselves."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

from regard.bench.measure import memory
from regard.bench.measure.clock import REPEATS, Sentinel, Stopwatch
from regard.bench.measure.process import stream


def busy(seconds: float) -> None:
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass


def test_the_least_of_at_least_five_runs() -> None:
    lengths = iter([0.05, 0.03, 0.06, 0.04, 0.05])
    timing = Stopwatch().sample(lambda: busy(next(lengths)))
    assert timing.runs == REPEATS
    assert 0.03 <= timing.seconds < 0.04


def test_waiting_is_not_counted_with_one_thread() -> None:
    assert Stopwatch(threads=1).once(lambda: time.sleep(0.05))[0] < 0.03
    assert Stopwatch(threads=2).once(lambda: time.sleep(0.05))[0] >= 0.05


def test_short_calls_are_repeated_more_often_and_long_ones_less() -> None:
    assert Stopwatch().sample(lambda: busy(0.001)).runs > REPEATS
    assert Stopwatch().sample(lambda: busy(0.03), patience=0.05).runs == 2


def test_the_sentinel_takes_time() -> None:
    assert Sentinel("cpu", Stopwatch()).seconds() > 0


def test_growth_is_what_the_call_held_at_most() -> None:
    block = 64 * 2**20

    def call() -> int:
        values = torch.ones(block // 4)
        return values.numel()

    grown, found = memory.growth(call)
    assert found == block // 4
    if grown is not None and memory.forget_peak():
        assert 0.95 * block < grown < 1.5 * block
        again, _ = memory.growth(call)  # what was freed is not mistaken for held
        assert again is not None
        assert 0.95 * block < again < 1.5 * block
        kept = torch.ones(block // 4)
        small, _ = memory.growth(lambda: torch.ones(2**18))
        assert kept.numel()
        assert small is not None
        assert small < block / 4


def test_a_container_limits_what_is_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    everything = memory.available()
    assert everything is not None
    assert everything > 2**20
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 300\n")
    assert memory.available() > 2**20
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory.available() == 5000 - 1000 + 300


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(body: str) -> str:
        lines = ["import json, os, signal, sys, time", "given = json.load(sys.stdin)", body]
        (tmp_path / "measured_program.py").write_text("\n".join(lines))
        return "measured_program"

    return write


def test_answers_come_while_the_process_runs(program) -> None:
    name = program("for n in range(given['n']):\n    print(json.dumps({'n': n}), flush=True)")
    assert [answer["n"] for answer in stream(name, {"n": 3})] == [0, 1, 2]


def test_a_failing_process_says_why_after_its_answers(program) -> None:
    answers = stream(program("print('{}', flush=True)\nraise ValueError('no luck')"), {})
    assert next(answers) == {}
    with pytest.raises(RuntimeError, match="the measuring process failed: ValueError: no luck"):
        next(answers)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_process_that_the_system_ended(program) -> None:
    answers = stream(program("os.kill(os.getpid(), signal.SIGKILL)"), {})
    with pytest.raises(RuntimeError, match="as it does when memory runs out"):
        next(answers)


def test_a_process_that_takes_too_long_is_ended(program) -> None:
    with pytest.raises(RuntimeError, match="took more than 0.5 s"):
        list(stream(program("time.sleep(60)"), {}, timeout=0.5))


def test_a_process_nobody_listens_to_is_ended(program, tmp_path: Path) -> None:
    body = "print(json.dumps({'pid': os.getpid()}), flush=True)\ntime.sleep(60)"
    answers = stream(program(body), {})
    pid = next(answers)["pid"]
    answers.close()
    assert not Path(f"/proc/{pid}").exists()
