"""What is measured on a CPU, and what must come out of it: data.

Targets are ratios to torch's attention of the same shape in the same process, one thread. Those
of the native form were measured on one machine of each kind, with a quarter of slack; a ratio
does not carry over between instruction sets, the share of the multiply-and-add peak does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from regard.bench.kernels import family, sparse
from regard.bench.kernels.case import Case, Target
from regard.bench.kernels.draw import KINDS, Kind

DIMS = (16, 32, 64, 128)
RIDGES = (0.1, 1.0, 10.0)
LENGTH = 4096
WIDE, NARROW = "avx512", "avx2"  # columns of the tables below

# forward/SDPA at most, by impl, instruction set and ridge, for D = 16, 32, 64, 128.
FORWARD = {
    ("native", WIDE, 1.0): (2.2, 3.0, 3.5, 4.5),
    ("native", WIDE, 0.1): (2.2, 4.0, 4.5, 6.0),
    ("native", NARROW, 1.0): (3.5, 5.3, 6.8, 8.4),
    ("native", NARROW, 0.1): (3.5, 6.3, 8.6, 11.7),
    ("eager", WIDE, 1.0): (7.0, 6.5, 6.0, 6.5),
    ("eager", NARROW, 1.0): (9.0, 9.5, 10.5, 12.0),
}
# Of the forward and backward of the native form: D -> quantity -> at most.
GRADIENTS = {
    ("native", WIDE): {
        16: {"backward/SDPA": 0.8},
        64: {"backward/SDPA": 2.0, "both/SDPA": 2.5, "both/forward": 2.7},
    },
    ("native", NARROW): {
        16: {"backward/SDPA": 1.1},
        64: {"backward/SDPA": 3.7, "both/SDPA": 4.5, "both/forward": 3.1},
    },
    ("eager", WIDE): {D: {"both/forward": 3.5} for D in DIMS},
    ("eager", NARROW): {D: {"both/forward": 3.5} for D in DIMS},
}
DECODE = {
    ("native", WIDE): {4096: 6.5, 65536: 3.0},
    ("native", NARROW): {4096: 2.5, 65536: 2.5},
}
OF_PEAK = 0.7  # of the multiply-and-add peak, at least
# Gain from a second thread, at least, by (heads, tokens) of a call.
THREADS = {
    "native": {(1, 4096): 1.7, (4, 2048): 1.7, (1, 2048): 1.5},
    "eager": {(1, 4096): 1.3, (4, 4096): 1.6, (8, 4096): 1.6},
}

# Float32 outputs at the default tolerance. Keys of norm 10 lose digits before any solve.
BOUNDS: dict[tuple[Kind, float], float] = {
    ("sharp", 0.1): 1e-3,
    ("sharp", 1.0): 3e-4,
    ("cluster", 0.1): 3e-4,
}
BOUND = 1e-4


def bound(keys: Kind, ridge: float) -> float:
    """The error that a float32 output may have."""
    return BOUNDS.get((keys, ridge), BOUND)


def column(instruction_set: str) -> str:
    """The column of the tables for an instruction set.

    >>> column("avx512"), column("neon")
    ('avx512', 'avx2')
    """
    return WIDE if instruction_set.lower().startswith("avx512") else NARROW


def timed(impls: Iterable[str], instruction_set: str, quick: bool = False) -> Iterator[Case]:
    """Every row that is timed; `quick` is a subset for a minute."""
    at, impls = column(instruction_set), list(impls)
    for impl in impls:
        yield from _forwards(impl, at, quick)
        yield from _gradients(impl, at, quick)
        yield from _decodes(impl, at, quick)
        if not quick:
            yield from _others(impl)
            yield from _tolerances(impl)
        yield from _relatives(impl, quick)
    native = "native" in impls  # what is taken by itself then
    own = "auto" if native else impls[-1]
    yield from family.on_processor(Case, own, native, quick)
    yield from sparse.on_processor(Case, own, native, quick)


def _forwards(impl: str, at: str, quick: bool) -> Iterator[Case]:
    for position, D in enumerate(DIMS):
        for ridge in (1.0,) if quick else RIDGES:
            if quick and D not in (16, 64):
                continue
            targets = []
            most = FORWARD.get((impl, at, ridge), (None,) * len(DIMS))[position]
            if most is not None:
                targets.append(Target("forward/SDPA", most=most))
            if impl == "native":
                targets.append(Target("of peak", least=OF_PEAK))
            yield Case(
                "forward", impl=impl, dim=D, length=LENGTH, ridge=ridge,
                bound=bound("normal", ridge), targets=tuple(targets),
            )  # fmt: skip


def _gradients(impl: str, at: str, quick: bool) -> Iterator[Case]:
    for D in (64,) if quick else DIMS:
        wanted = GRADIENTS.get((impl, at), {}).get(D, {})
        targets = tuple(Target(name, most=most) for name, most in wanted.items())
        yield Case("gradients", impl=impl, work="gradients", dim=D, length=LENGTH, targets=targets)


def _decodes(impl: str, at: str, quick: bool) -> Iterator[Case]:
    for length in (4096,) if quick else (4096, 16384, 65536):
        for ridge in (1.0,) if quick else (0.1, 1.0):
            most = DECODE.get((impl, at), {}).get(length)
            wanted = most is not None and ridge == 1.0
            yield Case(
                "decode", impl=impl, work="decode", length=length, ridge=ridge,
                targets=(Target("forward/SDPA", most=most),) if wanted else (),
            )  # fmt: skip


def _others(impl: str) -> Iterator[Case]:
    for keys in ("cluster", "sharp"):
        for D in DIMS:
            yield Case(
                "other keys", impl=impl, dim=D, length=LENGTH, keys=keys, bound=bound(keys, 1.0)
            )
    for D in (16, 64):
        for length in (64, 256, 512, 1024):
            yield Case("lengths", impl=impl, dim=D, length=length)
    for length in (2048, 8192, 16384):
        yield Case("lengths", impl=impl, length=length)
    for D in DIMS:
        yield Case("not causal", impl=impl, dim=D, length=LENGTH, causal=False)
    yield Case("other dtypes", impl=impl, length=LENGTH, dtype="bfloat16")
    yield Case("other heads", impl=impl, dim=64, length=1024, heads=4, kv_heads=1)


def _tolerances(impl: str) -> Iterator[Case]:
    for ridge in (0.1, 1.0):
        for tol in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
            yield Case(
                "tolerance", impl=impl, length=2048, ridge=ridge,
                options={"tol": tol, "solver": "cg"}, bound=max(bound("normal", ridge), tol),
            )  # fmt: skip


def _relatives(impl: str, quick: bool) -> Iterator[Case]:
    """Softmax and Parallax by the same engine."""
    for mechanism in ("softmax", "parallax"):
        for D in (64,) if quick else DIMS:
            held = mechanism == "parallax" and impl == "eager" and D == 64
            yield Case(
                "relatives", mechanism=mechanism, impl=impl, dim=D, length=LENGTH, bound=1e-5,
                targets=(Target("forward/SDPA", most=2.2),) if held else (),
            )  # fmt: skip


def lower_sets(sets: Iterable[str]) -> Iterator[Case]:
    """The native form on each instruction set below the best: against that set's own peak."""
    for name in list(sets)[1:]:
        for D in DIMS:
            yield Case(
                "instruction sets", impl="native", dim=D, length=2048, isa=name,
                targets=(Target("of peak", least=OF_PEAK),),
            )  # fmt: skip
    yield from sparse.lower_sets(Case, list(sets)[1:])


def threaded(impls: Iterable[str]) -> Iterator[Case]:
    """Calls that a second thread should make faster."""
    for impl in impls:
        for (heads, length), gain in THREADS[impl].items():
            yield Case(
                "threads", impl=impl, length=length, heads=heads,
                targets=(Target("threads", least=gain),),
            )  # fmt: skip
        if impl == "native":
            yield from sparse.threaded(Case, impl)


def checked(
    impls: Iterable[str], sets: Iterable[str], quick: bool = False
) -> Iterator[tuple[Case, tuple[str, ...]]]:
    """Short calls that are compared whole, with all gradients, and what is learnt in each."""
    for impl in impls:
        for isa in list(sets) if impl == "native" else [None]:
            few = quick or (impl == "native" and isa != next(iter(sets), None))
            for D in (16, 64) if few else (*DIMS, 40):
                for keys in ("normal", "sharp") if few else KINDS:
                    for ridge in (1.0,) if few else RIDGES:
                        yield _check(impl, isa, D, keys, ridge)
            for mechanism in ("softmax", "parallax"):
                yield (
                    Case(
                        "check", mechanism=mechanism, impl=impl, dim=24, length=97, heads=2,
                        extra=("log_decay",), bound=1e-5, gradient_bound=1e-5, isa=isa,
                    ),
                    ("log_decay",),
                )  # fmt: skip


# What float32 can hold at tol 1e-6: the digits that a small ridge and long keys cost, at least
# twice the error of torch's own float32 products. Gradients of ridge and decay are small sums of
# large terms.
_HELD = {0.1: 2e-4, 1.0: 3e-5, 10.0: 1e-5}
_HELD_SHARP = {0.1: 4e-3, 1.0: 5e-4, 10.0: 5e-5}


def _check(
    impl: str, isa: str | None, D: int, keys: Kind, ridge: float
) -> tuple[Case, tuple[str, ...]]:
    most = _HELD_SHARP[ridge] if keys == "sharp" else _HELD[ridge] * (2 if D > 64 else 1)
    targets = (Target("gradients", most=1e-5),) if keys == "normal" and ridge >= 1 else ()
    case = Case(
        "check", impl=impl, dim=D, length=129, heads=2, keys=keys, ridge=ridge, isa=isa,
        options={"tol": 1e-6}, extra=("log_decay",), bound=most, gradient_bound=most,
        targets=targets,
    )  # fmt: skip
    return case, ("ridge", "log_decay")
