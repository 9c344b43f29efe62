"""Kernels of other libraries that compute the same or a neighbour, where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from regard.bench.kernels.case import Case

# flash-linear-attention: the same Parallax; and MesaNet, the neighbour with a state of fixed size.
PARALLAX, MESA = "fla Parallax", "fla MesaNet"
NAMES = (PARALLAX, MESA)
ITERATIONS = 30  # of MesaNet, its authors' number


def contestants(case: Case, given: Mapping[str, Any], kind: str) -> dict[str, Callable[[], Any]]:
    """Forward calls by name, "fla Parallax forward"; empty where nothing fits or is installed."""
    if kind != "cuda" or case.extra or not case.causal or case.work != "forward":
        return {}
    if importlib.util.find_spec("fla") is None:
        return {}
    # Its layout is [B, T, H, D].
    q, k, v = (given[name].transpose(1, 2).contiguous() for name in "qkv")
    if case.mechanism == "parallax":
        r = given["r"].transpose(1, 2).contiguous()
        parallax = importlib.import_module("fla.ops.parallax").parallel_parallax
        return {f"{PARALLAX} forward": lambda: parallax(q, r, k, v, scale=case.dim**-0.5)}
    plain = case.keys == "normal" and case.ridge == 1.0 and not case.options
    if case.mechanism != "local_linear" or not plain:
        return {}
    mesa = importlib.import_module("fla.ops.mesa_net").chunk_mesa_net
    unit = [torch.nn.functional.normalize(x.float(), dim=-1).to(x.dtype) for x in (q, k)]
    gates = _gates(q)

    def forward() -> Tensor:
        with torch.no_grad():
            return mesa(*unit, v, **gates, max_CG_iteration=ITERATIONS)[0]

    return {f"{MESA} forward": forward}


def _gates(q: Tensor) -> dict[str, Tensor]:
    """A decay of .95, a step of .9 and a ridge of 1, for every head."""
    batch, length, heads, dim = q.shape
    like = {"device": q.device, "dtype": torch.float32}
    return {
        "g": torch.full((batch, length, heads), 0.95, **like).log(),
        "beta": torch.full((batch, length, heads), 0.9, **like),
        "lamb": torch.ones(heads, dim, **like),
    }
