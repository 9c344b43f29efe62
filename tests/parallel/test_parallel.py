"""Sequences over two and three processes of gloo: equal to one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel import ranks as processes
from regard import parallel
from regard.parallel.shares import share, share_boundaries, span

HERE = Path(__file__).parent
RANKS = 3
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found: errors by case and by the size of the group."""
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join(sys.path)
    started = []
    for rank in range(RANKS):
        with (folder / f"{rank}.txt").open("w") as said:
            started.append(
                subprocess.Popen(
                    [sys.executable, str(HERE / "ranks.py"), str(rank), str(folder)],
                    env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                    stdout=said, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
    deadline = time.monotonic() + 120
    try:  # where one fails the others would wait for it
        while any(process.poll() is None for process in started):
            if any(process.poll() for process in started) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for process in started:
            process.kill()
            process.wait()
    said = "\n".join((folder / f"{rank}.txt").read_text() for rank in range(RANKS))
    assert not any(process.returncode for process in started), said
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("size", processes.SIZES)
@pytest.mark.parametrize("name", processes.CASES)
def test_equal_to_one_process(told: list[dict[str, Any]], name: str, size: int) -> None:
    bound = BOUNDS[processes.CASES[name].dtype]
    for rank in range(size):
        found = told[rank][name][str(size)]
        assert found["output"] <= bound
        assert {k: e for k, e in found.items() if not e <= bound} == {}


def test_a_group_of_one_is_the_op(told: list[dict[str, Any]]) -> None:
    assert set(told[0]["alone"].values()) == {0.0}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tokens", "q must be of as many tokens as k with causal=True, 3, got float32 Tensor"),
        ("packed, all to all", "cu_seqlens must be None without causal=True, got a tensor"),
        ("packed state", "return_state must be False with packed sequences, got True"),
        ("share", "of the 12 that cu_seqlens has, got 4 tokens"),
        ("boundaries", "cu_seqlens must be non-decreasing from 0 to the length 8"),
        ("option", "feature_map must be one of"),
        ("state", "TypeError: parallel.delta_attention: state must be None or a FixedState"),
    ],
)
def test_refused_before_anything_is_sent(told: list[dict[str, Any]], name: str, words: str) -> None:
    assert any(words in told[rank]["refused"][name] for rank in (0, 1))
    assert all("nothing" not in told[rank]["refused"][name] for rank in (0, 1))


def test_bytes_are_those_of_the_docstrings(told: list[dict[str, Any]]) -> None:
    B, Hk, D, Dv = processes.B, processes.HK, processes.D, processes.DV
    for size in processes.SIZES:
        wanted = {
            "linear": [B * Hk * (D * Dv + D + 1), B * Hk * (D * Dv + D)],
            "delta": [B * Hk * D * (D + Dv), B * Hk * D * Dv],
        }
        for rank in range(size):
            found = told[rank]["traffic"][str(size)]
            assert found == {name: [(size - 1) * n for n in each] for name, each in wanted.items()}


def test_shares_are_a_partition() -> None:
    for length in (0, 1, 2, 7, 30):
        for size in (1, 2, 3, 8):
            spans = [span(length, rank, size) for rank in range(size)]
            assert [stop for _, stop in spans[:-1]] == [start for start, _ in spans[1:]]
            assert (spans[0][0], spans[-1][1]) == (0, length)
            whole = torch.arange(length)
            assert torch.equal(
                torch.cat([share(whole, r, size, axis=0) for r in range(size)]), whole
            )
    with pytest.raises(ValueError, match="rank must be below size=2, got 2"):
        span(4, 2, 2)


def test_boundaries_of_gathered_keys() -> None:
    cu = torch.tensor([0, 2, 2, 6, 9], dtype=torch.int32)
    found = [share_boundaries(cu, rank, 3) for rank in range(3)]
    assert [a.tolist() for a, _ in found] == [[0, 2, 2, 3, 3], [0, 0, 0, 3, 3], [0, 0, 0, 0, 3]]
    assert [b.tolist() for _, b in found] == [[0, 2, 2, 3, 3], [0, 2, 2, 6, 6], [0, 2, 2, 6, 9]]
    assert all(x.dtype == torch.int32 for pair in found for x in pair)


def test_without_processes_it_says_what_to_start() -> None:
    q = torch.ones(1, 1, 2, 2)
    with pytest.raises(RuntimeError, match=r"linear_attention: torch.distributed is not init.*run"):
        parallel.linear_attention(q, q, q, causal=True)
    with pytest.raises(RuntimeError, match="gather_sequence: torch.distributed"):
        parallel.gather_sequence(q)
