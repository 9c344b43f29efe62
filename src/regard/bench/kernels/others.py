"""Kernels of other libraries that compute the same or a neighbour, where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from regard.bench.kernels import sparse
from regard.bench.kernels.case import Case

# flash-linear-attention: the same Parallax; MesaNet, the neighbour with a state of fixed size; and
# FLA, the same mechanism of the linear family. EAGER is our own chunked form in torch, READ a copy
# that reads and writes as many bytes as q, k, v and the output have.
PARALLAX, MESA, FLA = "fla Parallax", "fla MesaNet", "fla"
TRANSFORMERS, EAGER, READ, FLEX = "transformers", "eager", "read", "Flex"
NAMES = (PARALLAX, MESA, FLA, TRANSFORMERS, EAGER, READ, FLEX)
ITERATIONS = 30  # of MesaNet, its authors' number


def contestants(case: Case, given: Mapping[str, Any], kind: str) -> dict[str, Callable[[], Any]]:
    """Calls by name, "fla Parallax forward"; empty where nothing fits or is installed."""
    if case.fixed_state:
        return family_contestants(case, given, kind)
    if case.mechanism in sparse.MECHANISMS:
        return _flex(case, given) if kind == "cuda" and not case.extra else {}
    if kind != "cuda" or case.extra or not case.causal or case.work != "forward":
        return {}
    if not _installed("fla"):
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

    return {f"{MESA} forward": _mesa(mesa, unit, v, gates)}


def _mesa(mesa: Any, unit: list[Tensor], v: Tensor, gates: dict[str, Tensor]) -> Callable[[], Any]:
    def forward() -> Tensor:
        with torch.no_grad():
            return mesa(*unit, v, **gates, max_CG_iteration=ITERATIONS)[0]

    return forward


def _flex(case: Case, given: Mapping[str, Any]) -> dict[str, Callable[[], Any]]:
    """torch's FlexAttention, compiled, on the same blocks."""
    run = sparse.flex(case, given)
    if run is None:
        return {}
    q, k, v = (given[name] for name in "qkv")

    return _passes(FLEX, case, run, q, k, v)


def family_contestants(
    case: Case, given: Mapping[str, Any], kind: str
) -> dict[str, Callable[[], Any]]:
    """What computes the same as a mechanism with a state of fixed size, and what bounds it."""
    found: dict[str, Callable[[], Any]] = {}

    def eager() -> Any:
        with torch.no_grad():
            return case.card.op(**given, **case.options, impl="eager")

    if case.impl not in ("eager", "triton"):
        found[f"{EAGER} forward"] = eager
    if kind == "cuda":
        source = torch.cat([given["q"], given["k"]])
        target = torch.empty_like(source)
        found[f"{READ} forward"] = lambda: target.copy_(source)
    # Their layout is [B, T, H, D].
    q, k, v = (given[name].transpose(1, 2).contiguous() for name in "qkv")
    gates = {n: given[n].transpose(1, 2).contiguous() for n in ("log_decay", "beta") if n in given}
    if case.mechanism == "gated_delta" and kind == "cpu" and _installed("transformers"):
        name = "transformers.models.qwen3_next.modeling_qwen3_next"
        rule = importlib.import_module(name).torch_chunk_gated_delta_rule
        args = (q, k, v, gates["log_decay"], gates["beta"])

        def theirs() -> Any:
            with torch.no_grad():
                return rule(*args, use_qk_l2norm_in_kernel=True)[0]

        found[f"{TRANSFORMERS} forward"] = theirs
    if kind == "cuda" and _installed("fla"):
        found |= _fla(case, q, k, v, gates)
    return found


def _fla(
    case: Case, q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor]
) -> dict[str, Callable[[], Any]]:
    """flash-linear-attention; its gated backward refuses on some versions of Triton."""
    if case.mechanism == "mesa":
        mesa = importlib.import_module("fla.ops.mesa_net").chunk_mesa_net
        unit = [torch.nn.functional.normalize(x.float(), dim=-1).to(x.dtype) for x in (q, k)]
        lamb = torch.ones(q.shape[2], q.shape[3], device=q.device)
        own = {"g": gates["log_decay"], "beta": gates["beta"], "lamb": lamb}
        return {f"{FLA} forward": _mesa(mesa, unit, v, own)}
    if case.mechanism == "lightning":
        rule = importlib.import_module("fla.ops.lightning_attn").chunk_lightning_attn

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return rule(q, k, v, layer_idx=0, num_layers=12)[0]

    elif case.mechanism == "gated_delta":
        rule = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            own = {"g": gates["log_decay"], "beta": gates["beta"].to(q.dtype)}
            return rule(q, k, v, **own, use_qk_l2norm_in_kernel=True)[0]

    else:
        return {}

    return _passes(FLA, case, run, q, k, v)


def _passes(
    name: str, case: Case, run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor
) -> dict[str, Callable[[], Any]]:
    """Their forward, and where the case has gradients a forward and backward."""

    def forward() -> Any:
        with torch.no_grad():
            return run(q, k, v)

    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]

    def both() -> Any:
        out = run(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    calls = {f"{name} forward": forward}
    return {**calls, f"{name} both": both} if case.work == "gradients" else calls


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _gates(q: Tensor) -> dict[str, Tensor]:
    """A decay of .95, a step of .9 and a ridge of 1, for every head."""
    batch, length, heads, dim = q.shape
    like = {"device": q.device, "dtype": torch.float32}
    return {
        "g": torch.full((batch, length, heads), 0.95, **like).log(),
        "beta": torch.full((batch, length, heads), 0.9, **like),
        "lamb": torch.ones(heads, dim, **like),
    }
