"""Triton forms say why they cannot run, and nothing is imported to find out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest
import torch

from regard import gpu
from regard.gpu import verified

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gpu.refusal(GPU, torch.float32) == (
        "triton is not installed (pip install 'regard[triton]')"
    )


@pytest.mark.parametrize(("version", "old"), [("3.3.1", True), ("3.4.0", False), ("4.0", False)])
def test_old_triton(monkeypatch: pytest.MonkeyPatch, version: str, old: bool) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    reason = gpu.refusal(GPU, torch.float32)
    assert reason == (f"triton {version} is older than 3.4" if old else None)


@pytest.mark.requires("triton")
def test_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not gpu.interpreting()
    assert gpu.refusal(CPU, torch.float32) == "Triton needs a GPU, and the tensors are on cpu"
    assert gpu.refusal(GPU, torch.bfloat16) is None
    assert "not float64" in (gpu.refusal(GPU, torch.float64) or "")


def test_what_was_not_verified_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    row = verified.Verified("toy", "sm_90", ("bfloat16",), 128)
    monkeypatch.setattr(verified, "VERIFIED", (row,))
    monkeypatch.setattr(verified, "capability", lambda device: f"sm_{90 + 10 * device.index}")
    assert gpu.unverified("toy", GPU, torch.bfloat16, 128) is None
    assert gpu.unverified("toy", GPU, torch.bfloat16, 16) is None
    for form, index, dtype, D in (
        ("toys", 0, torch.bfloat16, 64), ("toy", 1, torch.bfloat16, 64),
        ("toy", 0, torch.float16, 64), ("toy", 0, torch.bfloat16, 256),
    ):  # fmt: skip
        reason = gpu.unverified(form, torch.device("cuda", index), dtype, D)
        assert reason is not None
        assert f"sm_{90 + 10 * index}" in reason
        assert str(dtype)[6:] in reason
        assert str(D) in reason


def test_the_table_names_what_exists() -> None:
    for row in gpu.VERIFIED:
        assert set(row.dtypes) <= set(verified.ALL)
        assert row.largest > 0


def test_the_refusal_is_a_constant_to_a_compiler() -> None:
    def choose(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if gpu.refusal(x.device, x.dtype) else x - 1

    compiled = torch.compile(choose, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(2)).tolist() == [1.0, 1.0]


def test_nothing_is_imported() -> None:
    child = (
        "import sys, torch, regard.ops.local_linear, regard.gpu\n"
        "regard.gpu.refusal(torch.device('cuda'), torch.float32)\n"
        "assert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", child], check=True)


def test_options_of_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = {"enable_fp_fusion": True}
    assert fused == gpu.FUSED
    whole = {"num_warps": 8, "num_stages": 3, "maxnreg": 168, **fused}
    assert gpu.compiled(8, 3, 168) == whole
    assert "maxnreg" not in gpu.compiled(8, 3)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert gpu.compiled(8, 3, 168) == {"num_warps": 8, "num_stages": 2, **fused}


def test_precision_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert (gpu.precision(half=False), gpu.precision(half=True)) == ("tf32x3", "ieee")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert gpu.precision(half=False) == "ieee"
