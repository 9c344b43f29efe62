"""One process of those that test_parallel.py starts: calls every case, tells how wrong it is.

    python ranks.py RANK FOLDER

writes FOLDER/RANK.json: case -> ranks of the group -> quantity -> error. The whole sequence is
computed on every rank, too; all is small.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from regard import ops, parallel
from regard.core.state import FixedState
from regard.parallel import collectives, linear, scan

SIZES = (2, 3)
B, H, HK, T, D, DV = 2, 4, 2, 29, 5, 6
PACK = (0, 3, 3, 4, 10, 15, 15, 26, 29)  # of 29 tokens, with an empty sequence at a rank's end


@dataclass(frozen=True)
class Case:
    """A call: the op, its options, which operands it has, how the tokens are divided."""

    op: str
    options: dict[str, Any] = field(default_factory=dict)
    operands: tuple[str, ...] = ()
    parts: dict[int, tuple[int, ...]] | None = None  # ranks -> lengths of their parts
    state: bool = False
    cu_seqlens: tuple[int, ...] | None = None
    learned: tuple[str, ...] | None = None  # None: everything
    dtype: torch.dtype = torch.float64
    dims: tuple[int, int] = (D, DV)
    queries: int = T  # without causal


CAUSAL = {"causal": True}
LINEAR = Case("linear_attention", CAUSAL)
GATED = Case("gated_delta_attention", CAUSAL, ("beta", "log_decay"))
UNEVEN = {2: (0, 29), 3: (20, 0, 9)}
ALL = ("key_mask", "log_decay", "beta")


def changed(case: Case, **values: Any) -> Case:
    return Case(**{**case.__dict__, **values})


CASES = {
    "linear": LINEAR,
    "linear, decays": changed(LINEAR, operands=("log_decay",)),
    "linear, numerator": changed(
        LINEAR, options={**CAUSAL, "feature_map": "identity", "normalise": False},
        operands=("log_decay", "scale"),
    ),
    "linear, decay by channel": changed(LINEAR, operands=("channels",)),
    "linear, masked": changed(LINEAR, operands=("log_decay", "key_mask"), state=True),
    "linear, state": changed(LINEAR, operands=("log_decay",), state=True),
    "linear, uneven": changed(LINEAR, operands=("log_decay",), state=True, parts=UNEVEN),
    "linear, all to all": changed(
        LINEAR, options={}, operands=("log_decay", "key_mask"), state=True, queries=11
    ),
    "linear, packed": changed(LINEAR, operands=("log_decay", "key_mask"), cu_seqlens=PACK),
    "linear, packed without decay": changed(LINEAR, cu_seqlens=PACK),
    "linear, one pack": changed(LINEAR, operands=("log_decay",), cu_seqlens=(0, T)),
    "linear, cut between ranks": changed(LINEAR, cu_seqlens=(0, 10, 15, 20, T)),
    "linear, q alone": changed(LINEAR, state=True, learned=("q",)),
    "linear, v alone": changed(LINEAR, state=True, learned=("v",)),
    "linear, nothing learned": changed(LINEAR, state=True, learned=()),
    "linear, float32": changed(LINEAR, operands=("log_decay",), dtype=torch.float32),
    "linear, bfloat16": changed(LINEAR, operands=("log_decay",), dtype=torch.bfloat16),
    "linear, impl": changed(LINEAR, options={**CAUSAL, "impl": "reference"}),
    "lightning": changed(LINEAR, op="lightning_attention", operands=("log_decay", "scale")),
    "lightning, decay by query head": changed(
        LINEAR, op="lightning_attention", operands=("by_query",), cu_seqlens=PACK
    ),
    "delta": changed(LINEAR, op="delta_attention", operands=("beta", "key_mask")),
    "delta, state": changed(LINEAR, op="delta_attention", operands=("beta",), state=True),
    "delta, one channel": changed(
        LINEAR, op="delta_attention", operands=("beta",), dims=(1, 2), state=True
    ),
    "gated delta": GATED,
    "gated delta, state": changed(GATED, operands=ALL, state=True),
    "gated delta, uneven": changed(GATED, operands=ALL, state=True, parts=UNEVEN),
    "gated delta, all to all": changed(GATED, options={}, operands=ALL, state=True, queries=4),
    "gated delta, packed": changed(GATED, operands=ALL, cu_seqlens=PACK),
    "gated delta, float32": changed(GATED, dtype=torch.float32),
    "softmax, gathered": changed(LINEAR, op="softmax_attention", operands=("key_mask",)),
    "softmax, all to all": changed(
        LINEAR, op="softmax_attention", options={}, operands=("key_mask",), parts=UNEVEN
    ),
    "softmax, packed": changed(LINEAR, op="softmax_attention", cu_seqlens=PACK),
    "local linear, gathered": changed(LINEAR, op="local_linear_attention", parts=UNEVEN),
    "softmax, bfloat16": changed(LINEAR, op="softmax_attention", dtype=torch.bfloat16),
}  # fmt: skip


def whole(case: Case) -> dict[str, Any]:
    """Arguments of the op in one process."""
    made = torch.Generator().manual_seed(5)
    d, dv = case.dims
    batch = 1 if case.cu_seqlens is not None else B

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64).to(case.dtype)

    queries = case.queries if not case.options.get("causal") else T
    given: dict[str, Any] = {
        "q": drawn(batch, H, queries, d), "k": drawn(batch, HK, T, d), "v": drawn(batch, HK, T, dv)
    }  # fmt: skip
    decay = -drawn(batch, HK, T).abs()
    # Forgotten at a rank's first token, inside, and almost; others only a little.
    decay[:, 0, 10], decay[:, 1, 15], decay[:, 1, 20] = -torch.inf, -torch.inf, -40.0
    decay[:, :, ::3] *= 1e-3
    channels = -drawn(batch, HK, T, d).abs()
    channels[:, 0, 12, 0] = -torch.inf
    mask = torch.rand(batch, T, generator=made) > 0.3
    mask[0, 10] = False
    for name, value in {
        "log_decay": decay,
        "channels": channels,
        "by_query": decay.repeat(1, H // HK, 1),
        "beta": drawn(batch, HK, T).float().sigmoid().to(case.dtype),
        "scale": drawn(H),
        "key_mask": mask,
    }.items():
        if name in case.operands:
            given["log_decay" if name in ("channels", "by_query") else name] = value
    if case.op == "delta_attention" and d == 1:
        given["beta"][:, :, 4:8] = 1.0  # what comes before is gone: the transition is exactly 0
    if "key_mask" in given:
        hidden = ~mask[:, None, :, None]
        given["k"] = given["k"].masked_fill(hidden, torch.nan)
        given["v"] = given["v"].masked_fill(hidden, torch.inf)
    if case.state:
        wide = torch.float64 if case.dtype == torch.float64 else torch.float32
        tensors = {"S": drawn(batch, HK, d, dv).to(wide)}
        if case.op == "linear_attention":
            tensors["z"] = drawn(batch, HK, d).abs().to(wide)
        name = case.op.removesuffix("_attention")
        given["state"] = FixedState(name, 3, tensors)
    return given


def at(name: str) -> int | None:
    """The axis of the tokens."""
    return {"key_mask": 1, "scale": None}.get(name, 2)


def part(case: Case, x: Tensor, name: str, rank: int, size: int) -> Tensor:
    axis = at(name)
    if axis is None:
        return x.clone()
    if name == "q" and not case.options.get("causal"):
        return parallel.share(x, rank, size, axis=axis).clone()
    if case.parts is None:
        return parallel.share(x, rank, size, axis=axis).clone()
    lengths = case.parts[size]
    return x.narrow(axis, sum(lengths[:rank]), lengths[rank]).clone()


def leaves(case: Case, given: dict[str, Any]) -> dict[str, Tensor]:
    """What gradients are asked of, made to ask for them, in place."""
    floating = [n for n, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()]
    names = floating if case.learned is None else list(case.learned)
    found = {name: given[name].requires_grad_() for name in names}
    if "state" in given and case.learned is None:
        tensors = {n: x.clone().requires_grad_() for n, x in given["state"].tensors.items()}
        given["state"] = FixedState(given["state"].mechanism, given["state"].length, tensors)
        found |= {f"state {name}": x for name, x in tensors.items()}
    return found


def cotangent(like: Tensor, seed: int) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=made, dtype=torch.float64).to(like.dtype)


def error(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    found, wanted = found.detach().double(), wanted.detach().double()
    if not wanted.numel():
        return 0.0
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))


def call(case: Case, given: dict[str, Any], rank: int, size: int, group: Any) -> Any:
    """The case over the ranks of a group."""
    options = dict(case.options)
    if case.cu_seqlens is not None:
        options["cu_seqlens"] = torch.tensor(case.cu_seqlens, dtype=torch.int32)
    if hasattr(parallel, case.op):
        op = getattr(parallel, case.op)
        return op(**given, **options, group=group, return_state=case.state)
    causal = bool(options.get("causal"))
    given = dict(given)
    for name in ("k", "v", "key_mask"):
        if name in given:
            given[name] = parallel.gather_sequence(
                given[name], axis=at(name) or 0, group=group, until_own=causal
            )
    if case.cu_seqlens is not None:
        cu, cu_k = parallel.share_boundaries(options["cu_seqlens"], rank, size)
        options |= {"cu_seqlens": cu, "cu_seqlens_k": cu_k}
    return getattr(ops, case.op)(**given, **options)


def compare(case: Case, rank: int, size: int, group: Any) -> dict[str, float]:
    """Errors of output, state and gradients against one process."""
    alone, errors = whole(case), {}
    asked = leaves(case, alone)
    options = dict(case.options)
    if case.cu_seqlens is not None:
        options["cu_seqlens"] = torch.tensor(case.cu_seqlens, dtype=torch.int32)
    if case.state:
        options["return_state"] = True
    found = getattr(ops, case.op)(**alone, **options)
    out, state = found if case.state else (found, None)
    weight = cotangent(out, 1)
    loss = (out * weight).sum()
    for p in range(size):
        for n, x in enumerate(state.tensors.values() if state is not None else ()):
            loss = loss + (x * cotangent(x, 10 * n + p)).sum()
    wanted = dict(zip(asked, torch.autograd.grad(loss, list(asked.values())), strict=True)) if (
        asked
    ) else {}  # fmt: skip

    here = whole(case)
    here = {
        name: part(case, x, name, rank, size) if isinstance(x, Tensor) else x
        for name, x in here.items()
    }
    if rank and "state" in here:
        del here["state"]
    mine = leaves(case, here)
    found = call(case, here, rank, size, group)
    own, last = found if case.state else (found, None)
    errors["output"] = error(own, part(case, out, "q", rank, size))
    loss = (own * part(case, weight, "q", rank, size)).sum()
    if last is not None:
        assert state is not None
        errors["length"] = float(abs(last.length - state.length))
        for n, (name, x) in enumerate(last.tensors.items()):
            errors[f"state {name}"] = error(x, state[name])
            loss = loss + (x * cotangent(x, 10 * n + rank)).sum()
    if not mine:
        errors["requires_grad"] = float(own.requires_grad)
        return errors
    got = dict(zip(mine, torch.autograd.grad(loss, list(mine.values())), strict=True))
    for name, gradient in got.items():
        if name == "scale":
            dist.all_reduce(gradient, group=group)
        expected = wanted[name]
        if not name.startswith("state"):
            expected = part(case, expected, name, rank, size)
        errors[f"d {name}"] = error(gradient, expected)
    return errors


REFUSED: dict[str, Callable[..., Any]] = {
    "tokens": lambda q, group: parallel.linear_attention(q, q[:, :, 1:], q[:, :, 1:], causal=True,
                                                         group=group),
    "packed, all to all": lambda q, group: parallel.linear_attention(
        q, q, q, cu_seqlens=torch.tensor([0, 8], dtype=torch.int32), group=group),
    "packed state": lambda q, group: parallel.linear_attention(
        q, q, q, causal=True, cu_seqlens=torch.tensor([0, 8], dtype=torch.int32),
        return_state=True, group=group),
    "share": lambda q, group: parallel.linear_attention(
        q, q, q, causal=True, cu_seqlens=torch.tensor([0, 12], dtype=torch.int32), group=group),
    "boundaries": lambda q, group: parallel.linear_attention(
        q, q, q, causal=True, cu_seqlens=torch.tensor([0, 9, 8], dtype=torch.int32), group=group),
    "option": lambda q, group: parallel.linear_attention(q, q, q, feature_map="cosine",
                                                         group=group),
    "state": lambda q, group: parallel.delta_attention(q, q, q, beta=q[..., 0], state="x",
                                                       group=group),
}  # fmt: skip


def refusals(group: Any) -> dict[str, str]:
    """What was raised, on both ranks before anything was sent."""
    q, told = torch.ones(1, 2, 4, 4), {}
    for name, refused in REFUSED.items():
        try:
            refused(q, group)
            told[name] = "nothing was raised"
        except (TypeError, ValueError) as raised:
            told[name] = f"{type(raised).__name__}: {raised}"
    return told


@contextmanager
def counted() -> Iterator[list[int]]:
    """Numbers received from other ranks, one entry for each collective."""
    sent: list[int] = []
    gather = collectives.gather

    def counting(tensors: Any, group: Any) -> Any:
        sent.append(sum(x.numel() for x in tensors) * (dist.get_world_size(group) - 1))
        return gather(tensors, group)

    scan.gather = counting
    try:
        yield sent
    finally:
        scan.gather = gather


def traffic(size: int, group: Any) -> dict[str, list[int]]:
    """Of a forward and of its backward."""
    found = {}
    q, k, v = (torch.ones(B, h, 7, d) for h, d in ((H, D), (HK, D), (HK, DV)))
    beta = torch.ones(B, HK, 7) / 2
    calls = {
        "linear": lambda v: parallel.linear_attention(q, k, v, causal=True, group=group),
        "delta": lambda v: parallel.delta_attention(q, k, v, beta=beta, causal=True, group=group),
    }
    for name, run in calls.items():
        with counted() as sent:
            run(v.clone().requires_grad_()).sum().backward()
        found[name] = sent
    return found


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=max(SIZES)
    )
    told: dict[str, Any] = {name: {} for name in CASES}
    told["refused"], told["traffic"] = {}, {}
    alone = dist.new_group([0])
    if rank == 0:
        told["alone"] = compare(CASES["linear, masked"], 0, 1, alone)
    for size in SIZES:
        group = dist.new_group(list(range(size)))
        if rank >= size:
            continue
        for name, case in CASES.items():
            try:
                told[name][size] = compare(case, rank, size, None if size == 3 else group)
            except Exception as broken:
                raise RuntimeError(f"{name}, {size} ranks") from broken
        told["traffic"][size] = traffic(size, group)
        if size == 2:
            told["refused"] = refusals(group)
    assert linear.left_of_decay(None, None, torch.ones(1, 2, 3, 4)).shape == (1, 2, 1, 1)
    (folder / f"{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
