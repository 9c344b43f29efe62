"""What is measured on a GPU, and what must come out of it: data.

Targets are for one NVIDIA H100: 16-bit inputs, causal, sixteen heads, ratios to torch's flash
kernel in the same process. cuDNN's kernel is timed beside it in every row. Those of the forward of
local linear attention are for the tolerance 1e-2; the default one, which is more exact, is timed
beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from regard.bench.kernels import family, sparse
from regard.bench.kernels.case import Case, Target
from regard.bench.kernels.draw import KINDS, Kind

DIMS = (16, 32, 64, 128)
RIDGES = (0.1, 1.0, 10.0)
DTYPES = ("bfloat16", "float16", "float32")
HEADS = 16
K4, K16, K64, K128 = 4096, 16384, 65536, 131072

# forward/flash at most: (D, length, ridge, keys) -> must, stretch.
FORWARD: dict[tuple[int, int, float, Kind], tuple[float, float | None]] = {
    (64, K16, 1.0, "normal"): (3.6, 2.8),
    (64, K4, 1.0, "normal"): (3.8, 3.0),
    (128, K16, 1.0, "normal"): (4.7, 3.7),
    (128, K4, 1.0, "normal"): (5.5, 4.2),
    (64, K16, 0.1, "normal"): (3.9, 3.2),
    (64, K16, 1.0, "offset"): (6.5, 5.0),
    (16, K16, 1.0, "normal"): (2.0, 1.6),
    (16, K16, 1.0, "sharp"): (2.0, 1.6),
}
# Milliseconds of the authors' kernels (32 iterations, whatever the ridge) on one H100.
PUBLISHED = {(64, K4): 6.13, (64, K16): 74.7, (128, K4): 10.4, (128, K16): 123.0}
FASTER = 8.0  # than those, at least
# Forward and backward at 16k: D -> both/flash at most, by default and with precision="fast".
BOTH = {64: (3.7, 3.3), 128: (4.3, 3.6)}
BACKWARD = 2.5  # backward/forward
DECODE = {64: 1.5, 128: 2.3}
SOFTMAX = {64: 0.70, 128: 0.85}
PARALLAX = {64: 1.2, 128: 1.4}
PRECISE = 1.3  # times the default's time
VARIANT = 1.25  # times the causal call's time per visible pair
MEMORY = (4.0, 3.0)  # times the inputs, at 64k tokens: must, stretch
FIRST_CALL = 15.0  # seconds
DIRECT_UP_TO = 16  # channels that are solved for directly: no tolerance
ROUNDING = 1.5  # times what rounding the inputs does by itself
# Gradients of 16-bit inputs: this, or what rounding the inputs does if that is more.
GRADIENT, GRADIENT_HARD = 5e-3, 1.5e-2
FAST = {"precision": "fast", "tol": 1e-2, "tol_backward": 1e-2}
LOOSE, LOOSE_ERROR, LOOSE_BOUND = {"tol": 1e-2}, 6e-3, 2e-2  # the error where ridge >= 1
ANY = 0.5  # sharp keys in 16 bits: finite, and the residual tells


def timed(impl: str = "triton") -> Iterator[Case]:
    """Every row that is timed, the most important first: what the time does not suffice for is
    left out.
    """
    plain = Case("forward", impl=impl, dtype="bfloat16", heads=HEADS)
    for position, (at, bounds) in enumerate(FORWARD.items()):
        case = _forward(plain, *at, bounds)
        cold = () if position else (Target("first call", most=FIRST_CALL),)
        yield replace(case, targets=(*cold, *case.targets))
    for at in FORWARD:
        if at[0] > DIRECT_UP_TO:
            yield _forward(plain, *at, None)
    yield from _gradients(plain)
    yield from _decodes(plain)
    yield from _relatives(plain)
    must, stretch = MEMORY
    yield replace(
        plain, section="memory", length=K64,
        targets=(
            Target("memory/inputs", most=must),
            Target("memory/inputs", most=stretch, level="stretch"),
        ),
    )  # fmt: skip
    yield from _variants(plain)
    yield from _precise(plain)
    yield from family.on_gpu(plain)
    yield from sparse.on_gpu(plain)
    yield from sparse.policies_on_gpu(plain)
    yield from sparse.long_on_gpu(plain)
    yield from _tolerances(plain)
    for D in (32, 64, 128):
        yield _forward(plain, D, 1024, 1.0, "normal", None)
    for D in (64, 128):
        for ridge in (0.1, 10.0):
            if (D, K16, ridge, "normal") not in FORWARD:
                yield _forward(plain, D, K16, ridge, "normal", None)
        for keys in ("cluster", "smooth", "sharp"):
            yield _forward(plain, D, K16, 1.0, keys, None)
    yield _forward(plain, 32, K16, 1.0, "normal", None)
    for dtype in ("float16", "float32"):
        case = replace(plain, section="other dtypes", length=K4, dtype=dtype)
        yield replace(case, bound=1e-4)
    for length in (1024, K4):
        yield replace(plain, section="eager", impl="eager", length=length)
    yield replace(plain, section="eager", impl="eager", length=1024, work="gradients")


def _forward(
    plain: Case, D: int, length: int, ridge: float, keys: Kind,
    bounds: tuple[float, float | None] | None,
) -> Case:  # fmt: skip
    """With `bounds` at the tolerance that they are for, without at the default one."""
    targets: list[Target] = []
    loose = bounds is not None and D > DIRECT_UP_TO
    if bounds is not None:
        must, stretch = bounds
        targets.append(Target("forward/flash", most=must))
        if stretch is not None:
            targets.append(Target("forward/flash", most=stretch, level="stretch"))
    if loose and ridge >= 1.0:
        targets.append(Target("output", most=LOOSE_ERROR))
    elif keys != "sharp" and not loose:
        targets.append(Target("error/rounding", most=ROUNDING))
    published = PUBLISHED.get((D, length)) if (ridge, keys) == (1.0, "normal") else None
    if published is not None:
        targets.append(Target("published/forward", least=FASTER))
    return replace(
        plain, dim=D, length=length, ridge=ridge, keys=keys, published=published,
        targets=tuple(targets), options=LOOSE if loose else {},
        bound=ANY if keys == "sharp" else LOOSE_BOUND if loose else plain.bound,
    )  # fmt: skip


def _gradients(plain: Case) -> Iterator[Case]:
    for D, (default, fast) in BOTH.items():
        for length in (K16, K4):
            ours = [Target("backward/forward", most=BACKWARD)]
            quick = [Target("both/flash", most=fast)] if length == K16 else []
            if length == K16:
                ours.append(Target("both/flash", most=default))
            case = replace(
                plain, section="gradients", work="gradients", dim=D, length=length,
                gradient_bound=GRADIENT,
            )  # fmt: skip
            yield replace(case, targets=tuple(ours))
            yield replace(case, options=FAST, targets=tuple(quick), bound=2e-2, gradient_bound=5e-2)


def _decodes(plain: Case) -> Iterator[Case]:
    for D, most in DECODE.items():
        for length in (K16, K128):
            yield replace(
                plain, section="decode", work="decode", dim=D, length=length,
                targets=(Target("forward/flash", most=most),),
            )  # fmt: skip


def _relatives(plain: Case) -> Iterator[Case]:
    for mechanism, bounds in (("softmax", SOFTMAX), ("parallax", PARALLAX)):
        for D, most in bounds.items():
            for length in (K16, K4):
                targets = (Target("forward/flash", most=most),) if length == K16 else ()
                yield replace(
                    plain, section="relatives", mechanism=mechanism, dim=D, length=length,
                    targets=targets,
                )  # fmt: skip


def _precise(plain: Case) -> Iterator[Case]:
    for D in (64, 128):
        base = replace(plain, dim=D, length=K16)
        yield replace(
            base, section="precision", options={"precision": "high"}, against=base,
            targets=(Target("forward/base", most=PRECISE),),
        )  # fmt: skip
        yield replace(base, section="precision", options=FAST, against=base, bound=2e-2)


def _tolerances(plain: Case) -> Iterator[Case]:
    for ridge in (0.1, 1.0):
        for tol in (3e-2, 1e-2, 3e-3, 1e-3, 1e-4):
            for precision in ("auto", "high") if ridge == 0.1 else ("auto",):
                yield replace(
                    plain, section="tolerance", length=K4, ridge=ridge, bound=max(1e-2, 2 * tol),
                    options={"tol": tol, "precision": precision},
                )  # fmt: skip


def _variants(plain: Case) -> Iterator[Case]:
    base = replace(plain, length=8192)
    target = (Target("pair/base", most=VARIANT),)
    cases = (
        replace(base, causal=False),
        replace(base, causal=False, queries=2048),
        replace(base, kv_heads=4),
        replace(base, length=4 * 8192, extra=("packed",)),
        replace(base, extra=("key_mask",)),
        replace(base, extra=("log_decay",)),
    )
    for case in cases:
        asked = () if "log_decay" in case.extra else target
        yield replace(case, section="variants", against=base, targets=asked)


def checked(impl: str = "triton", length: int = 1024) -> Iterator[tuple[Case, tuple[str, ...]]]:
    """Calls that are compared whole, with all gradients."""
    plain = Case("check", impl=impl, heads=2, length=length, extra=("log_decay",))
    learn = ("ridge", "log_decay")
    yield from family.checked_on_gpu(plain, DTYPES)
    yield from sparse.checked_on_gpu(plain, DTYPES)
    for dtype in DTYPES:
        for D in DIMS:
            for keys in KINDS:
                for ridge in RIDGES:
                    if dtype == "float16" and (D not in (32, 64) or ridge == 10.0):
                        continue  # the same code as bfloat16
                    case = replace(plain, dtype=dtype, dim=D, keys=keys, ridge=ridge)
                    yield _bounded(case), learn
    for mechanism in ("softmax", "parallax"):
        for dtype in DTYPES:
            for D in (64,) if dtype == "float16" else (32, 64, 128):
                case = replace(plain, mechanism=mechanism, dtype=dtype, dim=D)
                wide = dtype == "float32"
                limit = 1e-5 if wide else GRADIENT
                yield replace(case, bound=1e-5, gradient_bound=limit), ("log_decay",)
    for extra in ((), ("key_mask",)):
        for causal in (True, False):
            case = replace(plain, dim=64, dtype="bfloat16", extra=extra, causal=causal)
            yield _bounded(replace(case, kv_heads=1, queries=length // 2)), ("ridge",)


def judged(impl: str = "triton") -> Iterator[Case]:
    """Long calls whose output is compared, and that are not timed; their kernels are."""
    for length in (K4, K16):
        for D in (64, 128):
            for keys in KINDS:
                for ridge in RIDGES:
                    case = Case(
                        "long", impl=impl, heads=HEADS, dim=D, length=length, keys=keys,
                        ridge=ridge, dtype="bfloat16",
                    )  # fmt: skip
                    yield _bounded(case)


def _bounded(case: Case) -> Case:
    """With the errors that are allowed, and those that are aimed at."""
    if case.dtype == "float32":
        hard = case.ridge == 0.1
        most = {"normal": 1e-5, "sharp": 5e-3}.get(case.keys, 5e-5)
        wrong = most if case.keys == "sharp" else 2e-4 if hard else 5e-5
        targets = (Target("output", most=5e-5 if case.keys != "normal" and hard else 1e-5),)
        if case.keys == "sharp":
            targets = ()
        return replace(
            case, options={"tol": 1e-6}, bound=wrong, gradient_bound=wrong, targets=targets
        )
    if case.keys == "sharp":
        return replace(case, bound=ANY, gradient_bound=2.0)
    hard = case.ridge == 0.1 and case.keys != "normal"
    return replace(
        case, gradient_bound=GRADIENT_HARD if hard else GRADIENT,
        targets=(Target("error/rounding", most=ROUNDING), Target("gradients/bound", most=1.0)),
    )  # fmt: skip


def shrunk(case: Case) -> Case:
    """The case at a size for a processor, in the eager form: for trying the benchmark itself."""
    against = None if case.against is None else shrunk(case.against)
    small = replace(
        case, impl="eager", dim=min(case.dim, 16), length=max(16, case.length // 512), heads=4,
        queries=None if case.queries is None else max(8, case.queries // 512),
        kv_heads=None if case.kv_heads is None else 2, against=against, targets=(),
        bound=max(case.bound, 1e-3), gradient_bound=max(case.gradient_bound, 1e-3),
    )  # fmt: skip
    return small
