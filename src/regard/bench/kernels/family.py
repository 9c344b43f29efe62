"""The linear family in the kernel benchmarks: operands, work, and what must come out, as data.

Its rows name no form: `impl="auto"` is what a user gets, and every row says which form ran. They
are judged against the eager form in float64, called with the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.core.state import FixedState

if TYPE_CHECKING:
    from regard.bench.kernels.case import Case

MECHANISMS = (
    "linear", "lightning", "delta", "gated_delta", "hedgehog", "rat", "inline", "relu_linear",
    "mesa",
)  # fmt: skip
DECAY = -0.05  # the most of a step
SOLVED = ("mesa",)  # every query by iterations of its own
GATED = ("log_decay", "beta", "gate")  # operands with heads on axis 1 and tokens on axis 2

# Vector operations of one token and one element of its state, where every one of them can be a
# multiplication and an addition: what a recurrence cannot do without. A decay is one more.
OPERATIONS = {
    "linear": 2, "lightning": 3, "delta": 3, "gated_delta": 4, "hedgehog": 2, "inline": 2,
    "relu_linear": 2,
}  # fmt: skip
# Of one feature of Hedgehog's, as it is written: range reduction, polynomial, sum and division.
EXPONENTIAL = 13


def operands(case: Case, tokens: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the mechanism needs beside q, k and v; gates in `dtype`, the same numbers in any."""
    made = torch.Generator().manual_seed(19)
    heads = case.heads if case.kv_heads is None else case.kv_heads

    def uniform() -> Tensor:
        return torch.rand(1, heads, tokens, generator=made)

    found: dict[str, Tensor] = {}
    if case.mechanism in ("lightning", "gated_delta", "mesa"):
        found["log_decay"] = DECAY * uniform()
    if case.mechanism in ("delta", "gated_delta", "mesa"):
        found["beta"] = uniform()
    if case.mechanism == "hedgehog":
        for name, count in (("map_q", case.heads), ("map_k", heads)):
            found[name] = torch.randn(count, case.dim, case.dim, generator=made) / case.dim**0.5
    if case.mechanism == "rat":
        shape = (1, heads, tokens, case.dim)
        found["gate"] = (torch.randn(shape, generator=made) + 2.0).sigmoid()
    return {name: x.to(device=device, dtype=dtype) for name, x in found.items()}


def step(case: Case, given: dict[str, Any]) -> dict[str, Any]:
    """From the arguments of n + 1 tokens to those of the last one, the others in a state."""
    cut = lambda part: {  # noqa: E731
        name: x[:, :, part] if name in ("q", "k", "v", *GATED) else x for name, x in given.items()
    }
    before, last = cut(slice(0, -1)), cut(slice(-1, None))
    with torch.no_grad():
        _, state = case.card.op(**before, **case.options, impl="eager", return_state=True)
    return {**last, "state": state, "return_state": True}


def one_head(given: Mapping[str, Any], head: int) -> dict[str, Any]:
    """The arguments for one head; heads are independent."""
    found = dict(given)
    for name in ("q", "k", "v", *GATED):
        if name in found:
            found[name] = found[name][:, head : head + 1]
    for name in ("map_q", "map_k"):
        if found.get(name) is not None:
            found[name] = found[name][head : head + 1]
    if isinstance(found.get("state"), FixedState):
        state = found["state"]
        cut = {
            name: x[:, head : head + 1] if x.dim() > 1 else x  # a count is of all heads
            for name, x in state.tensors.items()
        }
        found["state"] = FixedState(state.mechanism, state.length, cut)
    return found


def exact_rows(
    case: Case, given: Mapping[str, Any], options: Mapping[str, Any],
    blocks: tuple[tuple[int, int], ...], head: int,
) -> Tensor:  # fmt: skip
    """The eager form in the dtype of the arguments, float64, at some queries of one head."""
    own = one_head(given, head)
    if case.mechanism in SOLVED and case.causal and case.rows == case.length:
        parts = []
        for start, stop in blocks:  # the others need not be solved: the last query sees all keys
            part = {n: x[:, :, :stop] if n in ("k", "v", *GATED) else x for n, x in own.items()}
            part["q"] = own["q"][:, :, start:stop]
            parts.append(case.card.op(**part, **options, impl="eager"))
        return torch.cat(parts, 2)
    out = case.card.op(**own, **options, impl="eager")
    out = out[0] if isinstance(out, tuple) else out
    return torch.cat([out[:, :, start:stop] for start, stop in blocks], 2)


def together(
    exact: Mapping[str, Any], rounded: Mapping[str, Any], head: int
) -> dict[str, Any] | None:
    """One head of two calls as a batch, which the eager form walks once; None with a state."""
    if "state" in exact:
        return None
    found, other = one_head(exact, head), one_head(rounded, head)
    for name in ("q", "k", "v", *GATED):
        if name in found:
            found[name] = torch.cat([found[name], other[name]])
    return found


def work(case: Case) -> float | None:
    """Multiplications and additions: two for each vector operation that is needed.

    Not causal: one product to form the state and one to read it. Hedgehog's include its maps of
    queries and keys. None for a mechanism whose work is not one recurrence.
    """
    if case.mechanism not in OPERATIONS:
        return None
    width = 2 * case.dim if case.mechanism == "hedgehog" else case.dim
    each = OPERATIONS[case.mechanism] if case.causal else 2
    operations = each * width * case.dim
    if case.mechanism == "hedgehog":
        operations += 2 * case.dim * case.dim + 2 * EXPONENTIAL * width
    return 2.0 * operations * case.heads * case.length


# -- a processor ---------------------------------------------------------------------------------

HEADS = 4
LENGTHS = (1024, 4096, 16384)
OF_FLOOR = (0.7, 0.85)
GROWTH = 4.4  # of time, from 4k tokens to 16k
DECODE = {"us": 20.0, "us in grad mode": 30.0}
LONG, MEMORY = 65536, 12.0  # tokens of one head; of a forward and backward, in sizes of q
MEASURED_LONG = ("lightning", "gated_delta", "linear")
TRANSFORMERS = 5.0  # times as fast as its gated delta rule in torch
# SDPA's time over ours, at least: mechanism and options -> at 1k, 4k and 16k: must, stretch.
Targets = tuple[tuple[float, ...], tuple[float, ...] | None]
FASTER: dict[tuple[str, tuple[tuple[str, Any], ...]], Targets] = {
    ("lightning", ()): ((8, 25, 90), (11, 33, 115)),
    ("gated_delta", ()): ((5.5, 17, 60), (7.5, 23, 80)),
    ("hedgehog", ()): ((3.5, 10, 36), None),
    ("rat", (("chunk_length", 16),)): ((4, 8, 9), None),
    ("rat", (("chunk_length", 64),)): ((5, 12, 20), None),
    ("inline", ()): ((14, 40, 150), None),
    ("relu_linear", ()): ((14, 40, 150), None),
}
NOT_CAUSAL = ("inline", "relu_linear")
BOUND, GRADIENT_BOUND = 1e-5, 3e-5  # of float32


def on_processor(make: Callable[..., Case], impl: str, wanted: bool, quick: bool) -> Iterator[Case]:
    """Rows of a CPU; `make` is `Case`, `wanted` says whether anything is asked of the form."""
    for (mechanism, options), (musts, stretches) in FASTER.items():
        base: Case | None = None
        for i, length in enumerate(LENGTHS[:1] if quick else LENGTHS):
            must, more = musts[i], None if stretches is None else stretches[i]
            targets = [_target("SDPA/forward", must)]
            targets += [_target("SDPA/forward", more, "stretch")] if more is not None else []
            if mechanism in OPERATIONS and mechanism not in NOT_CAUSAL:
                for share, level in zip(OF_FLOOR, ("must", "stretch"), strict=True):
                    targets.append(_target("of peak", share, level))
            if mechanism == "gated_delta":
                targets.append(_target("transformers/forward", TRANSFORMERS))
            if length == LENGTHS[2] and mechanism != "rat":  # RAT's attention grows faster
                targets.append(_target("forward/base", most=GROWTH))
            case = make(
                "linear family", mechanism=mechanism, impl=impl, heads=HEADS, length=length,
                causal=mechanism not in NOT_CAUSAL, options=dict(options),
                bound=BOUND, gradient_bound=GRADIENT_BOUND,
                targets=tuple(targets) if wanted else (),
                against=base if length == LENGTHS[2] else None,
            )  # fmt: skip
            yield case
            base = replace(case, targets=()) if length == LENGTHS[1] else base
            if length != LENGTHS[2] and not quick:
                target = _target("SDPA/both", 2 / 3 * must)
                yield replace(
                    case, section="linear family, gradients", work="gradients",
                    targets=(target,) if wanted else (),
                )  # fmt: skip
    for mechanism in () if quick else MEASURED_LONG:
        target = _target("memory of both/q", most=MEMORY)
        yield make(
            "linear family, memory", mechanism=mechanism, impl=impl, work="gradients",
            length=LONG, bound=BOUND, gradient_bound=GRADIENT_BOUND,
            targets=(target,) if wanted else (),
        )  # fmt: skip
    for mechanism in ("lightning", "gated_delta"):
        asked = tuple(_target(name, most=most) for name, most in DECODE.items())
        yield make(
            "linear family, decode", mechanism=mechanism, impl=impl, work="decode", heads=8,
            length=64, bound=BOUND, targets=asked if wanted else (),
        )  # fmt: skip


def _target(
    quantity: str, least: float | None = None, level: Any = "must", *, most: float | None = None
) -> Any:
    from regard.bench.kernels.case import Target

    return Target(quantity, most=most, least=least, level=level)


# -- a GPU ---------------------------------------------------------------------------------------

K1, K4, K16, K64 = 1024, 4096, 16384, 65536
SMALL_MS = 0.1  # of a forward call of a short sequence
ON_GPU: dict[tuple[str, int, int], tuple[tuple[str, float | None, float | None, str], ...]] = {
    # mechanism, D, length -> quantity, at least, at most, level
    ("lightning", 64, K16): (
        ("flash/forward", 9, None, "must"), ("flash/forward", 25, None, "stretch"),
    ),
    ("lightning", 64, K64): (
        ("flash/forward", 46, None, "must"), ("forward/base", None, GROWTH, "must"),
        ("forward/read", None, 2.5, "stretch"),
    ),
    ("lightning", 64, K4): (),
    ("lightning", 128, K16): (),
    ("lightning", 128, K64): (),
    ("gated_delta", 64, K16): (("ms", None, 0.54, "must"), ("forward/fla", None, 1.0, "must")),
    ("gated_delta", 64, K64): (
        ("ms", None, 1.73, "must"), ("forward/fla", None, 1.0, "must"),
        ("forward/base", None, GROWTH, "must"),
    ),
    ("gated_delta", 128, K16): (),
    ("gated_delta", 128, K64): (),
}  # fmt: skip
# Hedgehog over lightning of the same D, with maps that are learnt and with features of q and k as
# they come.
HEDGEHOG_OVER = 2.2
# Milliseconds of flash-linear-attention's MesaNet, 30 iterations, on one H100; ours makes them
# too, and stops early by default.
MESA = {(64, K16): 1.14, (64, K64): 4.4, (128, K4): 1.07, (128, K16): 4.0}
GRADIENTS_ON_GPU = {
    ("lightning", 64, K64): (("ms of both", None, 2.2, "must"),),
    ("lightning", 64, K16): (),
    ("gated_delta", 64, K16): (),
    ("hedgehog", 64, K16): (),
    ("hedgehog", 128, K16): (),
    ("mesa", 64, K4): (),
}
GRADIENT_16 = 5e-3  # of 16-bit inputs, or what rounding them does if that is more


def _on_gpu(plain: Case, mechanism: str, D: int, length: int, bounds: Any) -> Case:
    targets = tuple(_target(name, least, level, most=most) for name, least, most, level in bounds)
    return replace(
        plain, section="linear family", mechanism=mechanism, dim=D, length=length,
        targets=targets, gradient_bound=GRADIENT_16,
    )  # fmt: skip


def on_gpu(plain: Case) -> Iterator[Case]:
    """Rows of a GPU: `plain` has the form, dtype and heads."""
    for (mechanism, D, length), bounds in ON_GPU.items():
        case = _on_gpu(plain, mechanism, D, length, bounds)
        if any(name == "forward/base" for name, *_ in bounds):
            case = replace(case, against=_on_gpu(plain, mechanism, D, K16, ()))
        yield case
    for D in (64, 128):
        for length in (K16, K64):
            most = (("forward/base", None, HEDGEHOG_OVER, "must"),)
            case = _on_gpu(plain, "hedgehog", D, length, most)
            case = replace(case, against=_on_gpu(plain, "lightning", D, length, ()))
            yield case
            yield replace(case, extra=("identity_maps",))
    for (D, length), theirs in MESA.items():
        asked = (("published/forward", 1, None, "must"), ("forward/fla", None, 1.0, "must"))
        case = replace(_on_gpu(plain, "mesa", D, length, asked), published=theirs)
        yield case
        yield replace(case, options={"tol": 0.0, "max_iters": 30})
    for (mechanism, D, length), bounds in GRADIENTS_ON_GPU.items():
        yield replace(
            _on_gpu(plain, mechanism, D, length, bounds), work="gradients",
            section="linear family, gradients",
        )  # fmt: skip
    for mechanism in ("lightning", "gated_delta", "hedgehog"):
        small = (("call ms", None, SMALL_MS, "must"),)
        yield _on_gpu(plain, mechanism, 64, K1, small)
    for mechanism in ("lightning", "gated_delta"):
        case = _on_gpu(plain, mechanism, 64, 64, ())
        yield replace(case, section="linear family, decode", work="decode")


def checked_on_gpu(plain: Case, dtypes: tuple[str, ...]) -> Iterator[tuple[Case, tuple[str, ...]]]:
    """Calls that are compared whole, with all gradients."""
    learnt = {
        "lightning": ("log_decay",), "gated_delta": ("log_decay", "beta"),
        "hedgehog": ("map_q", "map_k"),
    }  # fmt: skip
    for mechanism in ("gated_delta", "lightning", "hedgehog", "linear", "mesa"):
        for dtype in dtypes:
            for D in (64, 128):
                wide, slow = dtype == "float32", mechanism == "mesa"
                case = replace(
                    plain, mechanism=mechanism, dtype=dtype, dim=D, extra=(),
                    bound=3e-5 if slow else BOUND,
                    gradient_bound=(1e-4 if slow else GRADIENT_BOUND) if wide else GRADIENT_16,
                    options={"tol": 1e-6} if wide and slow else {},
                )  # fmt: skip
                yield case, learnt.get(mechanism, ())
