"""Attention to chosen blocks and within windows in the kernel benchmarks: plans, work, targets.

The plan of a row is random: every block of queries has the same number of blocks of keys, drawn
by itself. Where a policy makes it, that is timed too, by itself and with the attention. Rows are
judged against the eager form in float64, query by query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.ops.block_sparse import BlockPlan
from regard.ops.selected import block_topk
from regard.sparse import attend, sparsify

if TYPE_CHECKING:
    from regard.bench.kernels.case import Case

MECHANISMS = ("block_sparse", "window", "selected")
BLOCK, SMALL_BLOCK = 128, 64


def operands(case: Case, device: str) -> dict[str, Tensor]:
    """The plan of a case: bools, `case.density` of the blocks that can be seen."""
    if case.mechanism != "block_sparse":
        return {}
    if case.policy is not None:
        q, k, _ = case.drawn(device)
        return {
            "levels": plan_of(case, q.to(case.torch_dtype), k.to(case.torch_dtype)).for_attention()
        }
    nq, nk = (-(-n // case.options[name]) for n, name in _sides(case))
    return {"levels": _levels(case.heads, nq, nk, case.density or 1.0, case.causal, device)}


@lru_cache(maxsize=2)
def _levels(heads: int, nq: int, nk: int, density: float, causal: bool, device: str) -> Tensor:
    made = torch.Generator(device).manual_seed(23)
    scores = torch.rand(1, heads, nq, nk, generator=made, device=device)
    most = torch.full((nq, 1), float(nk), device=device)
    if causal:
        most = torch.arange(nk - nq + 1, nk + 1, device=device).view(nq, 1)
        columns = torch.arange(nk, device=device)
        scores = scores.masked_fill(columns >= most, 2.0)
        scores = scores.masked_fill(columns == most - 1, -1.0)  # its own
    wanted = (most * density).ceil().clamp(min=1)
    return scores.argsort(-1).argsort(-1) < wanted  # bools, as `attend` passes such a plan


def forget() -> None:
    """Lets go of the plans that were drawn last."""
    _levels.cache_clear()


def plan_of(case: Case, q: Tensor, k: Tensor) -> BlockPlan:
    """What the policy of a case makes of q and k."""
    made = torch.Generator(q.device).manual_seed(29)
    return sparsify(
        q, k, density=case.density or 1.0, policy=case.policy or "", block=case.options["block_q"],
        causal=case.causal, generator=made,
    )  # fmt: skip


def policies(case: Case, given: Mapping[str, Any]) -> dict[str, Callable[[], Any]]:
    """Making a plan, and making it and attending by it; empty where the plan is given."""
    q, k, v = (given[name] for name in "qkv")
    if case.mechanism == "selected":
        options = dict(case.options)
        return {"plan": lambda: block_topk(q, k, **options)}
    if case.policy is None:
        return {}

    def planned() -> Tensor:
        plan = plan_of(case, q, k)
        return attend(plan, q, k, v, causal=case.causal, impl=case.impl)

    return {"plan": lambda: plan_of(case, q, k), "planned": planned}


def _sides(case: Case) -> tuple[tuple[int, str], ...]:
    return (case.rows, "block_q"), (case.length, "block_k")


def work(case: Case) -> float:
    """Multiplications and additions of a forward: 4 D for every pair that is attended to."""
    if case.mechanism == "block_sparse":
        return 4.0 * case.dim * case.pairs * (case.density or 1.0)
    if case.mechanism == "selected":  # early queries see fewer keys
        pairs = case.heads * case.rows * case.options["block"] * case.options["count"]
        return 4.0 * case.dim * min(case.pairs, pairs)
    width = case.options["window"][0] + 1
    seen = case.pairs / case.heads - (case.length - width) * (case.length - width + 1) / 2
    return 4.0 * case.dim * case.heads * seen


def exact_rows(
    case: Case, given: Mapping[str, Any], options: Mapping[str, Any],
    blocks: tuple[tuple[int, int], ...], head: int,
) -> Tensor:  # fmt: skip
    """The eager form in the dtype of the arguments, float64, at some queries of one head."""
    group = case.heads // (case.kv_heads or case.heads)
    parts = []
    for start, stop in blocks:
        seen = stop + case.length - case.rows if case.causal else case.length
        part: dict[str, Any] = {"q": given["q"][:1, head : head + 1, start:stop]}
        for name in ("k", "v"):
            part[name] = given[name][:1, head // group : head // group + 1, :seen]
        own = dict(options)
        if "levels" in given:  # every query a block of its own
            rows = torch.arange(start, stop, device=given["levels"].device) // own["block_q"]
            levels = given["levels"][:1, head : head + 1, rows]
            part["levels"] = levels[..., : -(-seen // own["block_k"])]
            own["block_q"] = 1
        parts.append(case.card.op(**part, **own, causal=case.causal, impl="eager"))
    return torch.cat(parts, 2)


def flex(case: Case, given: Mapping[str, Any]) -> Callable[..., Tensor] | None:
    """torch's compiled FlexAttention on the same blocks or window; None for what it cannot do."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    length, device = case.length, given["q"].device
    if case.rows != length or case.policy is not None:  # pooled levels are no blocks of its
        return None
    if case.mechanism == "window":
        width = case.options["window"][0]
        mask = create_block_mask(
            lambda b, h, i, j: (i >= j) & (i - j <= width), None, None, length, length, device
        )
    elif case.causal or case.options["block_k"] != BLOCK or case.options["block_q"] != BLOCK:
        return None
    else:
        levels = given["levels"]
        count = levels.sum(-1, dtype=torch.int32)
        order = levels.to(torch.int8).argsort(dim=-1, descending=True, stable=True).int()
        nothing = torch.zeros_like(count)
        mask = BlockMask.from_kv_blocks(nothing, order, count, order, BLOCK_SIZE=BLOCK)
    torch._dynamo.reset()  # every row has a shape, or a mask, of its own
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


# -- a processor ---------------------------------------------------------------------------------

K4, K16 = 4096, 16384
DENSITIES = (0.1, 0.2, 0.3)
# SDPA's time over ours, at least, at these densities: must, stretch (4k tokens have none).
FASTER = {K4: ((7.0, 3.8, 2.5), None), K16: ((8.0, 4.2, 2.8), (10.5, 5.6, 3.6))}
EAGER_FASTER = {SMALL_BLOCK: (5.0, 2.3, 1.4), BLOCK: (5.0, 2.7, 1.7)}  # by block, at 16k tokens
CAUSAL, GRADIENTS = 0.75, 0.7  # of 1 / density: of a causal call; of a forward and backward
WINDOW, WINDOW_FASTER = 256, 6.0  # at 4k tokens, forward and both
BOUND, GRADIENT_BOUND = 1e-5, 3e-5  # of float32
THREADS = 1.7  # times as fast as one thread, two


def on_processor(make: Callable[..., Case], impl: str, wanted: bool, quick: bool) -> Iterator[Case]:
    """Rows of a CPU; `make` is `Case`, `wanted` says whether anything is asked of the form."""
    for length in (K4,) if quick else (K4, K16):
        musts, stretches = FASTER[length]
        for block in (BLOCK,) if quick else (SMALL_BLOCK, BLOCK):
            for i, density in enumerate(DENSITIES):
                case = _on_blocks(make, impl, length, block, density)
                targets = [_faster("SDPA/forward", musts[i])]
                if stretches is not None:
                    targets.append(_faster("SDPA/forward", stretches[i], "stretch"))
                yield replace(case, targets=tuple(targets) if wanted else ())
                if quick or i != 1:
                    continue
                least = _faster("SDPA/forward", CAUSAL / density)
                yield replace(case, causal=True, targets=(least,) if wanted else ())
                least = _faster("SDPA/both", GRADIENTS / density)
                yield replace(
                    case, section="chosen blocks, gradients", work="gradients",
                    targets=(least,) if wanted else (),
                )  # fmt: skip
    if wanted and not quick:
        for block, musts in EAGER_FASTER.items():
            for density, least in zip(DENSITIES, musts, strict=True):
                case = _on_blocks(make, "eager", K16, block, density)
                yield replace(case, targets=(_faster("SDPA/forward", least),))
    targets = [_faster(f"SDPA/{work}", WINDOW_FASTER) for work in ("forward", "both")]
    yield make(
        "windows", mechanism="window", impl=impl, work="gradients", length=K4,
        options={"window": (WINDOW - 1, 0)}, bound=BOUND, gradient_bound=GRADIENT_BOUND,
        targets=tuple(targets) if wanted else (),
    )  # fmt: skip


def _on_blocks(
    make: Callable[..., Case], impl: str, length: int, block: int, density: float
) -> Case:
    return make(
        "chosen blocks", mechanism="block_sparse", impl=impl, length=length, causal=False,
        density=density, options={"block_q": block, "block_k": block}, bound=BOUND,
        gradient_bound=GRADIENT_BOUND,
    )  # fmt: skip


def lower_sets(make: Callable[..., Case], sets: Iterable[str]) -> Iterator[Case]:
    """The native form on these instruction sets; torch's attention keeps the best one."""
    for name in sets:
        for density in DENSITIES[:2]:
            case = _on_blocks(make, "native", K4, SMALL_BLOCK, density)
            yield replace(case, section="chosen blocks, lower sets", isa=name)


def threaded(make: Callable[..., Case], impl: str) -> Iterator[Case]:
    """A call that a second thread should make faster."""
    yield make(
        "threads", mechanism="block_sparse", impl=impl, length=K16, causal=False, density=0.2,
        options={"block_q": BLOCK, "block_k": BLOCK}, bound=BOUND,
        targets=(_faster("threads", THREADS),),
    )  # fmt: skip


def _faster(quantity: str, least: float, level: Any = "must") -> Any:
    from regard.bench.kernels.case import Target

    return Target(quantity, least=round(least, 4), level=level)


# -- a GPU ---------------------------------------------------------------------------------------

K64 = 65536
SMALL_BLOCK_ROOM = 1.3
WINDOW_MS = (0.13, 1.44)  # forward, forward and backward


def on_gpu(plain: Case) -> Iterator[Case]:
    """Rows of a GPU: `plain` has the form, dtype and heads."""
    for dim in (64, 128):
        for length in (K16, K64):
            for block in (BLOCK, SMALL_BLOCK):
                for density in DENSITIES if length == K16 else DENSITIES[:1]:
                    yield _blocks(plain, dim, length, block, density)
    yield replace(_blocks(plain, 64, K16, BLOCK, 0.2), causal=True, targets=())
    forward, both = WINDOW_MS
    yield replace(
        plain, section="windows", mechanism="window", work="gradients", length=K16,
        options={"window": (WINDOW - 1, 0)}, gradient_bound=GRADIENT_16,
        targets=(
            _target("ms", forward), _target("ms of both", both), _target("forward/Flex", 1.0),
        ),
    )  # fmt: skip


GRADIENT_16 = 5e-3


# Of SSA: blocks of 64 keys, sixteen for every query.
TOPK = {"block": 64, "count": 16}


def policies_on_gpu(plain: Case) -> Iterator[Case]:
    """Rows in which q and k decide: the plan, the attention, and both."""
    base = _blocks(plain, 64, K16, BLOCK, 0.2)
    for policy in ("pyramid", "binary"):
        yield replace(base, section="policies", work="forward", policy=policy, targets=())
    yield replace(
        plain, section="policies", mechanism="selected", impl="auto", length=K16, options=TOPK
    )


def long_on_gpu(plain: Case) -> Iterator[Case]:
    """The longest rows, which take their time."""
    for dim in (64, 128):
        for block in (BLOCK, SMALL_BLOCK):
            for density in DENSITIES[1:]:
                yield _blocks(plain, dim, K64, block, density)


def _blocks(plain: Case, dim: int, length: int, block: int, density: float) -> Case:
    room = SMALL_BLOCK_ROOM if block == SMALL_BLOCK else 1.0
    targets = [
        _target("forward/flash", round(room * (0.85 * density + 0.01), 4)),
        _target("both/flash", round(room * (density + 0.03), 4)),
    ]
    if block == BLOCK:
        targets.append(_target("forward/Flex", 1.0))
    return replace(
        plain, section="chosen blocks", mechanism="block_sparse", work="gradients", dim=dim,
        length=length, causal=False, density=density, gradient_bound=GRADIENT_16,
        options={"block_q": block, "block_k": block}, targets=tuple(targets),
    )  # fmt: skip


def _target(quantity: str, most: float) -> Any:
    from regard.bench.kernels.case import Target

    return Target(quantity, most=most)


def checked_on_gpu(plain: Case, dtypes: tuple[str, ...]) -> Iterator[tuple[Case, tuple[str, ...]]]:
    """Calls that are compared whole, with all gradients."""
    every = [(block, causal) for block in (BLOCK, SMALL_BLOCK) for causal in (True, False)]
    for dtype in dtypes:
        for dim in (64,) if dtype == "float16" else (64, 128):
            wide = dtype == "float32"
            case = replace(
                plain, dtype=dtype, dim=dim, extra=(), bound=1e-5,
                gradient_bound=1e-4 if wide else GRADIENT_16,
            )  # fmt: skip
            window = {"window": (WINDOW - 1, 0)}
            yield replace(case, mechanism="window", options=window), ()
            for block, causal in every if dtype == "bfloat16" else (every[0], every[3]):
                blocks = {"block_q": block, "block_k": block}
                yield (
                    replace(
                        case, mechanism="block_sparse", options=blocks, density=0.4, causal=causal
                    ),
                    (),
                )
