"""Sparse and local attention beside dense attention, with the cost of making plans: one CPU thread.

Run: python benchmarks/sparse.py [--out benchmarks/results/sparse_cpu.json] [NAME ...]

Every row is CPU time of this process, the least of some calls, as a ratio to torch's
scaled_dot_product_attention of the same causality on the same q, k and v, measured between those
calls. "plan" is the share of the whole that the choice takes, "least" what is asked of the ratio.
The rows of "engine" are those of `benchmarks/cpu.py` for attention to chosen blocks (plans at
random): judged against float64 there and here, with what a call adds to memory. That the other
outputs are right is what `tests/contract` holds. "threads" is by the wall, on an idle machine.

HaloNet's layer is measured beside timm's computation, written out here, and beside timm's own
layer where timm is installed; "error" is the largest difference.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from regard import native, ops
from regard.bench.kernels import sparse as cases
from regard.bench.kernels.case import Case
from regard.bench.kernels.measure import Bench
from regard.bench.kernels.rows import Left, Row
from regard.bench.kernels.threads import scaling
from regard.mixers import HaloAttention
from regard.ops.block_sparse import BlockPlan
from regard.ops.hierarchical_sparse import chunk_scores, fixed_chunks, select_tokens
from regard.ops.paro import axis_order_attention, int8_scores, quantise_rows

DIM = 64
PSA = {1: 0.1, 2: 0.15, 4: 0.15, 8: 0.35, 0: 1.0}


def seconds(*calls: Callable[[], Any], repeats: int = 5) -> list[float]:
    """The least CPU time of each call, taken in turn."""
    best = [float("inf")] * len(calls)
    for _ in range(repeats):
        for number, call in enumerate(calls):
            start = time.process_time()
            call()
            best[number] = min(best[number], time.process_time() - start)
    return best


def row(
    dense: float, whole: float, plan: float = 0.0, least: float | None = None, **more: Any
) -> dict[str, Any]:
    """One row of the table."""
    found = {"dense_ms": 1e3 * dense, "ms": 1e3 * whole, "times": dense / whole}
    found |= {"plan": plan / whole} if plan else {}
    found |= {"least": least} if least else {}
    return {name: round(value, 4) for name, value in found.items()} | more


def good(values: dict[str, Any]) -> bool:
    """Whether a row is as fast as it must be."""
    return values["times"] >= values["least"]


def qkv(heads: int, tokens: int, key_heads: int | None = None) -> list[Tensor]:
    """Normal q, k and v."""
    torch.manual_seed(0)
    return [torch.randn(1, n, tokens, DIM) for n in (heads, key_heads or heads, key_heads or heads)]


def engine() -> dict[str, Any]:
    """Chosen blocks and windows, native and eager, and on lower instruction sets: no policy."""
    found, sets = {}, native.instruction_sets()
    bench = Bench(
        peak=(lambda isa: native.fma_peak(0.02, isa)) if sets else None,
        within=native.limited_to, rounds=3, attempts=2,
    )  # fmt: skip

    def programme() -> Iterator[Case]:
        yield from cases.on_processor(Case, "auto", bool(sets), False)
        yield from cases.lower_sets(Case, sets[1:])

    for case in programme():
        measured = bench.row(case)
        if not isinstance(measured, Row):
            print(f"{case.name}: left out, {measured.reason}", file=sys.stderr)
            continue
        numbers, seconds = measured.numbers, measured.seconds
        for work in ("forward", "both") if case.work == "gradients" else ("forward",):
            name = case.name.replace(", gradients", "") + (", with backward" * (work == "both"))
            if name in found:  # a forward that has a row of its own
                continue
            least = {t.quantity: t.least for t in reversed(case.targets)}.get(f"SDPA/{work}")
            more = {
                "form": measured.form,
                "error": float(f"{max(v.error for v in measured.verdicts):.1e}"),
                "added_mb": round((measured.peak_bytes or 0) / 2**20, 1),
            }
            if work == "forward" and "of peak" in numbers:
                more["of_peak"] = round(numbers["of peak"], 2)
            found[name] = row(
                seconds[f"SDPA {work}"], seconds[work], least=least, **more,
                **({"noisy": True} if measured.noisy else {}),
            )  # fmt: skip
    return found


def threads() -> dict[str, Any]:
    """What a second thread gains: wall time, only while the machine is idle."""
    found = {}
    for case in cases.threaded(Case, "native"):
        gain = scaling(case)
        if isinstance(gain, Left):
            print(f"{case.name}: left out, {gain.reason}", file=sys.stderr)
        else:
            one, two = (1e-3 * gain["milliseconds"][n] for n in ("one", "two"))
            least = gain["targets"][0]["least"] if gain["targets"] else None
            found[gain["name"]] = row(one, two, least=least, median=round(gain["median_gain"], 3))
    return found


def pyramid() -> dict[str, Any]:
    """Pyramid sparse attention: estimate, levels, attention."""
    found = {}
    for tokens in (8192, 16384):
        q, k, v = qkv(1, tokens)
        levels = ops.pyramid_levels(q, k, ratios=PSA)
        dense, plan, attend = seconds(
            lambda q=q, k=k, v=v: sdpa(q, k, v),
            lambda q=q, k=k: ops.pyramid_levels(q, k, ratios=PSA),
            lambda q=q, k=k, v=v, levels=levels: ops.pyramid_attention(q, k, v, levels),
        )
        density = BlockPlan(levels, tokens, tokens, 128, 128).density()
        found[f"{tokens} tokens"] = row(
            dense, plan + attend, plan, least=3.3, density=round(density, 4)
        )
    return found


def hierarchical() -> dict[str, Any]:
    """DHSA: a budget of 2048 tokens per 256 queries; the later version with blocks."""
    q, k, v = qkv(1, 16384)
    ends = fixed_chunks(16384, 64, q.device)

    def choose() -> Tensor:
        scores = chunk_scores(q, k, ends, block=256)
        return select_tokens(
            scores, ends, queries=16384, keys=16384, block=256, budget=2048, local=256
        )

    def tokens() -> Tensor:
        return ops.hierarchical_sparse_attention(
            q, k, v, block=256, budget=2048, chunk=64, causal=True
        )

    mask = ops.block_mask(q, k, kind="vertical_slash", density=0.125)
    dense, plan, whole, plan2, attend2 = seconds(
        lambda: sdpa(q, k, v, is_causal=True), choose, tokens,
        lambda: ops.block_mask(q, k, kind="vertical_slash", density=0.125),
        lambda: ops.block_sparse_attention(q, k, v, mask, block_q=128, block_k=32, causal=True),
    )  # fmt: skip
    return {
        "2048 tokens, causal": row(dense, whole, plan, least=3.0),
        "vertical and slash, density 0.125, causal": row(dense, plan2 + attend2, plan2),
    }


def selected() -> dict[str, Any]:
    """SSA: 16 query heads choose together for one key head."""
    found = {}
    for tokens, block in ((8192, 16), (16384, 16), (16384, 64)):
        q, k, v = qkv(16, tokens, 1)
        dense, plan, whole = seconds(
            lambda q=q, k=k, v=v: sdpa(q, k, v, is_causal=True, enable_gqa=True),
            lambda q=q, k=k, block=block: ops.block_topk(q, k, block=block, count=16),
            lambda q=q, k=k, v=v, block=block: ops.block_topk_attention(
                q, k, v, block=block, count=16
            ),
            repeats=2,
        )
        found[f"{tokens} tokens, 16 blocks of {block}, causal"] = row(
            dense, whole, plan, least=3.0 if (tokens, block) == (16384, 64) else None
        )
    return found


def paro() -> dict[str, Any]:
    """PAROAttention: axes permuted per head, a quarter of the blocks of 64; and int8 scores."""
    q, k, v = qkv(2, 16384)
    kept = torch.rand(1, 2, 256, 256) < 0.25
    codes = torch.tensor([2, 5])
    dense, whole = seconds(
        lambda: sdpa(q, k, v),
        lambda: axis_order_attention(q, k, v, codes, kept, grid=(16, 32, 32)),
        repeats=3,
    )
    found = {"16384 tokens, density 0.25, with permutations": row(dense, whole)}
    rows, keys, out = torch.randn(128, DIM), torch.randn(4096, DIM), torch.empty(128, 4096)
    rounded = (*quantise_rows(rows, 32), *quantise_rows(keys, 64))
    single, integer = seconds(
        lambda: torch.mm(rows, keys.T, out=out), lambda: int8_scores(*rounded), repeats=20
    )
    found["int8 scores with their scales, 128 x 4096, beside float32 scores"] = row(
        single, integer, least=1.5
    )
    return found


def routed() -> dict[str, Any]:
    """BiFormer: 112 x 112 tokens, 7 x 7 regions, 4 of them."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 49, 256, 32)
    flat = [x.flatten(2, 3) for x in (q, k, v)]
    dense, plan, whole = seconds(
        lambda: sdpa(*flat),
        lambda: ops.region_route(q, k, 4),
        lambda: ops.routed_attention(q, k, v, ops.region_route(q, k, 4)),
    )
    return {"112 x 112, 4 of 49 regions": row(dense, whole, plan, least=6.0)}


def windows() -> dict[str, Any]:
    """FreeSwim's inward windows of 4 frames, and a causal window of a sequence."""
    found = {}
    q, k, v = qkv(1, 4 * 64 * 64)
    for half, density in ((9, 0.088), (15, 0.235)):
        dense, whole = seconds(
            lambda: sdpa(q, k, v),
            lambda half=half: ops.inward_window_attention(q, k, v, (4, 64, 64), half),
        )
        found[f"inward, 4 x 64 x 64, half {half}"] = row(
            dense, whole, least=7.0 if half == 9 else None, density=density
        )
    q, k, v = qkv(8, 4096)
    dense, whole = seconds(
        lambda: sdpa(q, k, v, is_causal=True),
        lambda: ops.window_attention(q, k, v, window=(255, 0), causal=True),
    )
    found["256 of 4096, 8 heads, causal"] = row(dense, whole, least=6.0)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    dense, whole = seconds(
        lambda: sdpa(q, k, v, is_causal=True).sum().backward(),
        lambda: ops.window_attention(q, k, v, window=(255, 0), causal=True).sum().backward(),
    )
    found["256 of 4096, 8 heads, causal, with backward"] = row(dense, whole, least=6.0)
    return found


class CopiedWindows(nn.Module):
    """What timm's HaloAttn computes, as it does: every window copied, all scores at once.

    It shares the weights of ours. Windows are cut out of the padded keys and values; the
    displacements of a row or column of queries are read off products with a table by giving its
    rows one place less than they have.
    """

    def __init__(self, ours: HaloAttention) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        ours, block, halo = self.ours, self.ours.block, self.ours.halo
        heads, window = ours.heads, block + 2 * halo
        batch, (rows, columns) = x.shape[0], (n // block for n in x.shape[2:])
        q = ours.q(x).reshape(batch * heads, -1, rows, block, columns, block)
        q = q.permute(0, 2, 4, 3, 5, 1).reshape(batch * heads, rows * columns, block**2, -1)
        kv = pad(ours.kv(x), [halo] * 4).unfold(2, window, block).unfold(3, window, block)
        kv = kv.reshape(batch * heads, -1, rows * columns, window**2).permute(0, 2, 3, 1)
        k, v = kv.split([ours.head_dim, ours.dim_out // heads], -1)
        pixels = q.unflatten(2, (block, block))
        tables = ours.pos_embed
        near = self.displaced(pixels, tables.width_rel, window)[:, :, :, :, None]
        far = self.displaced(pixels.transpose(2, 3), tables.height_rel, window)
        near = near + far.transpose(2, 3)[..., None]
        scores = q @ k.transpose(2, 3) * ours.head_dim**-0.5 + near.flatten(4).flatten(2, 3)
        y = scores.softmax(-1) @ v
        y = y.reshape(batch * heads, rows, columns, block, block, -1).permute(0, 5, 1, 3, 2, 4)
        return y.reshape(batch, -1, *x.shape[2:])

    @staticmethod
    def displaced(q: Tensor, table: Tensor, window: int) -> Tensor:
        """[..., i, j] = q_i . table[window - 1 + j - i]."""
        lines, places = q.shape[-2], 2 * window - 1
        flat = pad(q @ table.T, [0, 1]).flatten(-2)
        flat = pad(flat, [0, places - lines]).unflatten(-1, (lines + 1, places))
        return flat[..., :lines, window - 1 :]


def halo() -> dict[str, Any]:
    """HaloNet's layer beside timm's computation with the same weights."""
    found = {}
    for side in (56, 112):
        torch.manual_seed(0)
        ours = HaloAttention(64, heads=4, block=8, halo=3)
        others: dict[str, nn.Module] = {"timm's computation": CopiedWindows(ours)}
        try:
            from timm.layers.halo_attn import HaloAttn
        except (ImportError, RuntimeError):
            pass
        else:
            others["timm's layer"] = HaloAttn(64, num_heads=4, block_size=8, halo_size=3)
            others["timm's layer"].load_state_dict(ours.state_dict())
        x = torch.randn(1, 64, side, side, requires_grad=True)

        def both(layer: nn.Module, x: Tensor = x) -> None:
            layer(x).sum().backward()

        for name, theirs in others.items():
            with torch.no_grad():
                error = float(f"{(ours(x) - theirs(x)).abs().max():.1e}")
                a, b = seconds(lambda x=x: theirs(x), lambda x=x: ours(x), repeats=10)  # noqa: B023
            c, d = seconds(lambda: both(theirs), lambda: both(ours))  # noqa: B023
            found[f"{side} x {side}, beside {name}"] = row(a, b, least=1.5, error=error)
            found[f"{side} x {side}, beside {name}, with backward"] = row(c, d)
    return found


PARTS = (engine, threads, pyramid, hierarchical, selected, paro, routed, windows, halo)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts; all by default")
    parser.add_argument("--out", type=Path, help="the file of results, brought up to date")
    given = parser.parse_args()
    known = {part.__name__: part for part in PARTS}
    if unknown := sorted(set(given.names) - set(known)):
        parser.error(f"no part is called {', '.join(unknown)}: there are {', '.join(known)}")
    torch.set_num_threads(1)
    kept = json.loads(given.out.read_text()) if given.out and given.out.exists() else {}
    kept["conditions"] = {
        "torch": torch.__version__, "threads": 1, "dtype": "float32", "dim": DIM,
        "time": "CPU time of the process, the least of some calls taken in turn",
        "capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    for name in given.names or known:
        with torch.set_grad_enabled(name in ("engine", "windows", "halo")):
            found = known[name]()
        kept[name] = found or kept.get(name, {})  # threads: nothing while others work
        for case, values in found.items():
            met = "" if "least" not in values else ", met" if good(values) else ", MISSED"
            print(f"{name}, {case}: {values}{met}", flush=True)
        if given.out:
            given.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
