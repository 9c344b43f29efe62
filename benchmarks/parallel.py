"""One sequence over several devices: is it equal to one device, how much faster is it.

Run: python benchmarks/parallel.py [--seconds 90] [--out FILE]
     python benchmarks/parallel.py --dry-run         (two processes of a CPU, checks only)
     torchrun --nproc-per-node 2 benchmarks/parallel.py      (the same, its processes started so)
Two GPUs over NCCL where there are two, else two processes of this CPU over gloo. Writes
results/parallel_DEVICE.json. The exit code is 1 if any result is wrong.

Checks of an op come first: outputs and gradients against the same op on one device in float64.
Then its times: the whole sequence on one device, the others idle, and the same
sequence over all of them; the slowest device counts; the bytes that each receives from the others
are counted where they are sent. What the seconds do not suffice for is left out and listed.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

import regard
from regard import ops, parallel
from regard.bench.kernels.result import facts
from regard.core.state import write_atomically
from regard.ops.lightning import alibi_slopes, constant_log_decay
from regard.parallel import scan

RESULTS = Path(__file__).parent / "results"
HEADS, DIM = 16, 64
LENGTHS = {"cuda": (2**16, 2**17, 2**18, 2**19), "cpu": (2**12, 2**13, 2**14)}
DTYPE = {"cuda": "bfloat16", "cpu": "float32"}
ROUNDS = 7
# Relative error of a whole tensor against float64; the same op on one device has the same.
BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2}
OPS = ("lightning", "linear", "gated_delta")


def operands(name: str, k: Tensor, seed: int) -> dict[str, Tensor]:
    """A constant decay for each head of lightning, gates of every token for the delta rule."""
    made = torch.Generator(k.device).manual_seed(seed)
    if name == "lightning":
        return {"log_decay": constant_log_decay(-alibi_slopes(k.shape[1]).to(k.device), k)}
    if name == "linear":
        return {}
    gates = torch.rand(2, *k.shape[:3], generator=made, device=k.device)
    return {"beta": gates[0], "log_decay": -0.05 * gates[1]}


def drawn(length: int, heads: int, dtype: torch.dtype, device: str, seed: int) -> list[Tensor]:
    made = torch.Generator(device).manual_seed(seed)
    shape = (3, 1, heads, length, DIM)
    return [x.to(dtype) for x in torch.randn(shape, generator=made, device=device)]


def attention(name: str, module: Any) -> Callable[..., Any]:
    return getattr(module, f"{name}_attention")


class Counter:
    """Counts the bytes that this process receives while states are scanned."""

    def __init__(self) -> None:
        self.bytes, self._gather = 0, scan.gather

    def __enter__(self) -> Counter:
        def counting(tensors: Any, group: Any) -> Any:
            others = dist.get_world_size(group) - 1
            self.bytes += others * sum(x.numel() * x.element_size() for x in tensors)
            return self._gather(tensors, group)

        scan.gather = counting
        return self

    def __exit__(self, *raised: Any) -> None:
        scan.gather = self._gather


def errors(name: str, dtype: torch.dtype, impl: str, rank: int, size: int, device: str) -> dict:
    """Of this rank's output and gradients, against float64 on one device."""
    length, heads = (1000, 4) if device == "cpu" else (4000, 4)
    whole = drawn(length, heads, dtype, device, 3)
    given = operands(name, whole[1], 5)
    weight = drawn(length, heads, dtype, device, 4)[0]

    wide = [x.double().requires_grad_() for x in whole]
    exact = attention(name, ops)(*wide, causal=True, **{n: x.double() for n, x in given.items()})
    wanted = [exact, *torch.autograd.grad((exact * weight.double()).sum(), wide)]

    own = [parallel.share(x, rank, size).clone().requires_grad_() for x in whole]
    parts = {n: parallel.share(x, rank, size) for n, x in given.items()}
    out = attention(name, parallel)(*own, causal=True, impl=impl, **parts)
    loss = (out * parallel.share(weight, rank, size)).sum()
    found = [out, *torch.autograd.grad(loss, own)]
    return {
        n: float((a.detach().double() - b).norm() / b.norm())
        for n, a, b in zip(
            ("output", "dq", "dk", "dv"),
            found, [parallel.share(x.detach(), rank, size) for x in wanted], strict=True,
        )
    }  # fmt: skip


def seconds(call: Callable[[], Any], device: str, together: bool) -> float:
    """The median; with `together` all ranks start at once."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    taken = []
    for _ in range(ROUNDS + 1):
        wait()
        if together:
            dist.barrier()
            wait()
        start = time.perf_counter()
        call()
        wait()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def passes(run: Callable[..., Tensor], tensors: list[Tensor]) -> dict[str, Callable[[], Any]]:
    leaves = [x.detach().requires_grad_() for x in tensors]

    def forward() -> Tensor:
        with torch.no_grad():
            return run(*tensors)

    def both() -> None:
        out = run(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return {"forward": forward, "forward and backward": both}


def slowest(value: float, device: str) -> float:
    """The largest of all ranks, on each."""
    found = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def timed(name: str, length: int, impl: str, rank: int, size: int, device: str) -> list[dict]:
    """Rows of one length: one device, all devices, bytes."""
    dtype = getattr(torch, DTYPE[device])
    alone: dict[str, float] = {}
    if rank == 0:
        whole = drawn(length, HEADS, dtype, device, 1)
        given = operands(name, whole[1], 2)
        calls = passes(lambda *x: attention(name, ops)(*x, causal=True, impl=impl, **given), whole)
        alone = {work: seconds(call, device, False) for work, call in calls.items()}
        del whole, given, calls
        if device == "cuda":
            torch.cuda.empty_cache()
    start, stop = parallel.span(length, rank, size)
    part = drawn(stop - start, HEADS, dtype, device, 10 + rank)
    given = operands(name, part[1], 20 + rank)
    calls = passes(lambda *x: attention(name, parallel)(*x, causal=True, impl=impl, **given), part)
    rows = []
    for work, call in calls.items():
        with Counter() as counter:
            call()
        one = slowest(alone.get(work, 0.0), device)
        many = slowest(seconds(call, device, True), device)
        rows.append(
            {"op": name, "impl": impl, "work": work, "length": length, "ranks": size,
             "milliseconds": {"one": 1e3 * one, "all": 1e3 * many},
             "gain": one / many, "bytes": counter.bytes}
        )  # fmt: skip
    if device == "cuda":
        torch.cuda.empty_cache()
    return rows


def forms(name: str, device: str) -> list[str]:
    """Which `impl` can serve, the one that is taken by itself first."""
    q, k, v = (x.requires_grad_() for x in drawn(512, 2, getattr(torch, DTYPE[device]), device, 0))
    told = regard.explain(attention(name, ops), q, k, v, causal=True, **operands(name, k, 0))
    return [impl for impl in dict.fromkeys(("triton", *told.available)) if impl in told.available
            and impl != "reference"][:2]  # fmt: skip


def check(
    name: str, impl: str, dtype: str, rank: int, size: int, device: str, found: dict[str, Any],
    tell: Callable[[str], None],
) -> None:  # fmt: skip
    """One op in one form: adds to what was found."""
    try:
        mine = errors(name, getattr(torch, dtype), impl, rank, size, device)
    except ValueError as refused:  # by metadata, so on every rank
        tell(f"left out: {name}, {impl}, {dtype}: {refused}")
        return
    worst = {quantity: slowest(e, device) for quantity, e in mine.items()}
    right = all(e <= BOUNDS[dtype] for e in worst.values())
    found["checks"].append(
        {"op": name, "impl": impl, "dtype": dtype, "errors": worst, "right": right}
    )
    words = ", ".join(f"{n} {e:.1e}" for n, e in worst.items())
    tell(f"{'right' if right else 'WRONG'}: {name}, {impl}, {dtype}: {words}")
    if not right:
        found["wrong"].append(f"{name}, {impl}, {dtype}: {words}")


def work(rank: int, size: int, address: str, options: argparse.Namespace) -> None:
    """One process."""
    begun, device = time.perf_counter(), options.device
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=address, rank=rank, world_size=size,
        device_id=torch.device(device, rank) if device == "cuda" else None,
    )  # fmt: skip
    found: dict[str, Any] = {**facts(device), "ranks": size, "heads": HEADS, "dim": DIM}
    found |= {"dtype": DTYPE[device], "checks": [], "rows": [], "left_out": [], "wrong": []}

    def tell(words: str) -> None:
        if rank == 0:
            print(f"{time.perf_counter() - begun:6.1f} s  {words}", flush=True)

    for name in options.ops:
        impls = forms(name, device)
        if options.impl is not None:
            impls = [impl for impl in impls if impl == options.impl]
        for impl in impls:
            for dtype in options.dtypes:
                check(name, impl, dtype, rank, size, device, found, tell)
        if options.dry_run or not impls:
            continue
        for length in LENGTHS[device]:
            if slowest(time.perf_counter() - begun, device) > options.seconds:
                found["left_out"].append(f"{name}, {length} tokens")
                continue
            rows = timed(name, length, impls[0], rank, size, device)
            found["rows"] += rows
            for row in rows:
                one, many = row["milliseconds"].values()
                tell(f"{name}, {impls[0]}, {length} tokens, {row['work']}: {one:.2f} ms on one, "
                     f"{many:.2f} on {size}, gain {row['gain']:.2f}, {row['bytes']} bytes "
                     "received")  # fmt: skip
    found["seconds"] = time.perf_counter() - begun
    if rank == 0:
        for words in found["left_out"]:
            print(f"left out, no time: {words}")
        if options.out is not None:
            write_atomically(options.out, (json.dumps(found, indent=1) + "\n").encode())
    dist.barrier()
    dist.destroy_process_group()
    if found["wrong"]:
        raise SystemExit(1)


def main(arguments: list[str] | None = None) -> int:
    """Starts the processes, unless torchrun did; 1 if any result is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    gpus = torch.cuda.device_count()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpus > 1 else "cpu")
    parser.add_argument("--ranks", type=int, help="how many; all GPUs, or two processes")
    parser.add_argument("--seconds", type=float, default=70.0, help="after which no row begins")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, help="only these")
    parser.add_argument("--impl", help="only this form; all that can serve")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(BOUNDS), default=tuple(BOUNDS))
    parser.add_argument("--dry-run", action="store_true", help="a CPU, checks only")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args(arguments)
    if options.dry_run:
        options.device = "cpu"
    elif options.out is None:
        options.out = RESULTS / f"parallel_{options.device}.json"
    if "RANK" in os.environ:  # torchrun
        work(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://", options)
        return 0
    size = options.ranks or (gpus if options.device == "cuda" else 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    try:
        torch.multiprocessing.spawn(work, (size, address, options), nprocs=size)
    except torch.multiprocessing.ProcessExitedException as failed:
        return failed.exit_code or 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
