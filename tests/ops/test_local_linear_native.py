"""The native form of local linear attention, on every instruction set that this machine runs."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from ops.samples import KINDS, of_kind, tensors
from regard.core.budgets import budget, relative_error
from regard.native import function, instruction_sets, limited_to
from regard.ops.local_linear import local_linear_attention
from regard.ops.local_linear.native.library import Call
from regard.ops.parallax import parallax_attention
from regard.ops.softmax import softmax_attention
from regard.ops.softmax.call import Call as SoftmaxCall
from regard.ops.softmax.call import resolve
from regard.ops.softmax.native import attend

ISAS = instruction_sets()
INF, NAN = float("inf"), float("nan")
PATTERNS = ("noncausal", "causal", "cross", "causal_cross")

pytestmark = pytest.mark.skipif(not ISAS, reason="no native library here")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest):
    with limited_to(request.param):
        yield request.param


def of_pattern(pattern: str, n: int, D: int = 24, Dv: int = 10) -> tuple[tuple[Tensor, ...], bool]:
    """q, k, v in float32 and `causal`; cross-attention has other lengths of keys."""
    S = n if pattern in ("noncausal", "causal") else n + 13 if pattern == "cross" else n + n // 2
    q, k, v = tensors(B=1, H=2, Hk=1, T=n, S=S, D=D, Dv=Dv, dtype=torch.float32)
    return (q, k, v), pattern in ("causal", "causal_cross")


def both(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Any, Any]:
    """Answers with aux of the native and of the eager form."""
    native, eager = (
        local_linear_attention(q, k, v, **options, return_aux=True, impl=impl)
        for impl in ("native", "eager")
    )
    return native, eager


def agree(native: Any, eager: Any, tolerance: float) -> None:
    (out, aux), (expected, wanted) = native, eager
    assert out.dtype == expected.dtype
    assert relative_error(out, expected) < tolerance
    assert relative_error(aux.slope, wanted.slope) < tolerance
    empty = wanted.lse == -INF
    assert torch.equal(aux.lse == -INF, empty)
    assert relative_error(aux.lse.masked_fill(empty, 0), wanted.lse.masked_fill(empty, 0)) < 1e-6
    assert aux.iterations.dtype == torch.int32
    # A last digit may decide for a step more or less; for two where convergence is no steady one.
    steps = (aux.iterations - wanted.iterations).abs()
    assert (steps > 1).float().mean() < 0.05


# -- equal to the eager form -----------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("n", [1, 47, 48, 49, 200, 1000])
def test_equals_eager(isa: str, n: int, pattern: str):
    qkv, causal = of_pattern(pattern, n)
    agree(*both(*qkv, causal=causal, ridge=0.5, solver="cg", tol=3e-5), 1e-4)


@pytest.mark.parametrize("solver", ["direct", "cg"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("D", [1, 8, 17, 32, 70])
def test_solvers_to_more_digits(isa: str, D: int, pattern: str, solver: str):
    qkv, causal = of_pattern(pattern, 60, D)
    agree(*both(*qkv, causal=causal, ridge=0.5, solver=solver, tol=1e-6), 2e-5)


def operands(name: str, q: Tensor, k: Tensor) -> dict[str, Any]:
    """Options with one operand of each kind: on B = 2, H = 4, Hk = 2."""
    B, H, T, S = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    mask = normal(B, S) > -0.5
    mask[0, 0] = False
    decay = -normal(B, H, S).exp() / 5
    decay[:, :, S // 3] = -INF
    return {
        "key_mask": {"key_mask": mask},
        "no keys": {"key_mask": torch.zeros(B, S, dtype=torch.bool)},
        "bias of all": {"key_bias": normal(B, 1, S)},
        "bias of key heads": {"key_bias": normal(B, 2, S), "key_mask": mask},
        "bias of heads": {"key_bias": normal(B, H, S)},
        "a hiding bias": {"key_bias": torch.where(normal(B, 1, S) > 0, 0.0, -INF)},
        "decay of all": {"log_decay": decay[:, :1]},
        "decay of heads": {"log_decay": decay, "key_mask": mask},
        "steep decay": {"log_decay": decay[:, :2] * 1e7},
        "window": {"window": (9, 4)},
        "left window": {"window": (20, -1), "key_mask": mask},
        "ridge of heads": {"ridge": normal(H).exp()},
        "ridge of tokens": {"ridge": 9 * normal(B, 2, T).exp(), "ridge_mode": "absolute"},
        "scale of heads": {"scale": normal(H).exp() / 3},
        "through the origin": {"intercept": False},
        "gaussian": {"kernel": "gaussian", "scale": 0.2, "ridge_mode": "absolute"},
    }[name]


OPERANDS = (
    "key_mask", "no keys", "bias of all", "bias of key heads", "bias of heads", "a hiding bias",
    "decay of all", "decay of heads", "steep decay", "window", "left window", "ridge of heads",
    "ridge of tokens", "scale of heads", "through the origin", "gaussian",
)  # fmt: skip


@pytest.mark.parametrize("solver", ["direct", "cg"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", OPERANDS)
def test_operands(isa: str, name: str, causal: bool, solver: str):
    q, k, v = tensors(T=70, S=77, D=12, Dv=5, dtype=torch.float32)
    options = {"ridge": 0.5, **operands(name, q, k), "causal": causal, "tol": 1e-6}
    native, eager = both(q, k, v, **options, solver=solver)
    assert relative_error(native[0], eager[0]) < 5e-5
    empty = eager[1].lse == -INF
    assert torch.equal(native[1].lse == -INF, empty)
    assert native[0][empty].eq(0).all()


@pytest.mark.parametrize("name", ["key_mask", "bias of heads", "decay of heads", "window"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_other_probes(isa: str, name: str, causal: bool):
    q, k, v = tensors(T=70, S=77, D=12, Dv=5, dtype=torch.float32)
    options = {**operands(name, q, k), "causal": causal}
    probe = torch.randn(q.shape, generator=torch.Generator().manual_seed(3))
    given = [parallax_attention(q, probe, k, v, **options, impl=i) for i in ("native", "eager")]
    assert relative_error(*given) < 3e-6
    unset = dict.fromkeys(
        ("key_mask", "key_bias", "bias", "log_decay", "softcap", "sinks", "window", "cu_seqlens",
         "cu_seqlens_k", "block_size", "state", "scale")
    )  # fmt: skip
    call = SoftmaxCall(q, k, v, return_state=False, return_aux=False, **{**unset, **options})
    expected = softmax_attention(q, k, v, **options, impl="eager")
    assert relative_error(attend(resolve(call))[0], expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(isa: str, dtype: torch.dtype):
    q, k, v = tensors(T=60, S=60, D=16, Dv=12, dtype=dtype)
    (out, aux), (expected, wanted) = both(q, k, v, causal=True, tol=1e-6)
    assert out.dtype == dtype
    assert aux.slope.dtype == torch.float32
    assert relative_error(aux.slope, wanted.slope) < 1e-5
    assert relative_error(out, expected) < 1e-3  # a last digit of the outputs
    wide = local_linear_attention(*(x.float() for x in (q, k, v)), causal=True, tol=1e-6)
    assert torch.equal(out, wide.to(dtype))


def test_strides(isa: str):
    q, k, v = tensors(T=50, S=50, D=16, Dv=16, dtype=torch.float32)
    expected = local_linear_attention(q, k, v, causal=True, impl="native")
    for axes in ((1, 2), (2, 3)):
        strided = [x.transpose(*axes).contiguous().transpose(*axes) for x in (q, k, v)]
        assert torch.equal(
            local_linear_attention(*strided, causal=True, impl="native"), expected
        )
    one = k[:1].expand(2, -1, -1, -1)
    out = local_linear_attention(q, one, v, causal=True, impl="native")
    assert torch.equal(
        out, local_linear_attention(q, one.contiguous(), v, causal=True, impl="native")
    )


# -- accuracy --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("D", [16, 64])
@pytest.mark.parametrize("ridge", [0.1, 1.0])
def test_accuracy(isa: str, kind: str, D: int, ridge: float):
    """At default settings to 1e-4 of float64; and never much worse than the eager form."""
    qkv = of_kind(kind, 200, D)
    expected = local_linear_attention(*(x.double() for x in qkv), causal=True, ridge=ridge)
    found = {
        impl: relative_error(
            local_linear_attention(*qkv, causal=True, ridge=ridge, impl=impl), expected
        )
        for impl in ("native", "eager")
    }
    assert found["native"] < max(1e-4, 1.2 * found["eager"])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{"solver": "cg", "tol": 1e-6}, {"solver": "direct"}], ids=str)
def test_a_common_offset_costs_nothing(isa: str, options: dict[str, Any], causal: bool):
    for seed in range(3):
        q, k, v = of_kind("offset", 200, 64, seed)
        options = {"causal": causal, "ridge": 0.1, **options}
        expected = local_linear_attention(q.double(), k.double(), v.double(), **options)
        out = local_linear_attention(q, k, v, **options, impl="native")
        assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize("solver", ["direct", "cg"])
def test_sharp_keys(isa: str, solver: str):
    """Large, anisotropic keys: finite and as good as float32 scores allow."""
    spectrum = 2 * torch.logspace(0.5, -1.5, 32)
    q, k, v = tensors(B=1, H=1, Hk=1, T=300, S=300, D=32, Dv=8, dtype=torch.float32)
    q, k = q * spectrum, k * spectrum
    options = {"causal": True, "ridge": 0.1, "solver": solver}
    out = local_linear_attention(q, k, v, **options, impl="native")
    expected = local_linear_attention(q.double(), k.double(), v.double(), **options)
    assert relative_error(out, expected) < 1e-3


@pytest.mark.parametrize("solver", ["direct", "cg"])
def test_scores_that_outgrow_the_first_block(isa: str, solver: str):
    """Later keys are up to 2^300 times heavier: the weights that were stored are rescaled."""
    q, k, v = tensors(B=1, H=1, Hk=1, T=400, S=400, D=8, Dv=4, dtype=torch.float32)
    bias = (torch.arange(400.0) // 25 * 13)[None, None]
    options = {"causal": True, "ridge": 0.5, "solver": solver, "key_bias": bias, "tol": 1e-6}
    native, eager = both(q, k, v, **options)
    assert relative_error(native[0], eager[0]) < 1e-5
    assert relative_error(native[1].lse, eager[1].lse) < 1e-6
    plain = softmax_attention(q, k, v, causal=True, key_bias=bias, impl="native")
    wide = softmax_attention(*(x.double() for x in (q, k, v)), causal=True, key_bias=bias.double())
    assert relative_error(plain, wide) < budget(torch.float32)


def test_rows_that_cannot_be_solved_are_solved_again(isa: str):
    q, k, v = tensors(T=40, S=40, D=6, dtype=torch.float32)
    options = {"causal": True, "ridge": 1e-4, "solver": "cg", "max_iters": 3}
    native, _ = both(q, k, v, **options)
    expected = local_linear_attention(q, k, v, causal=True, ridge=1e-4, solver="direct", tol=1e-6)
    assert relative_error(native[0], expected) < 1e-4
    assert native[1].iterations.eq(0).any()


# -- a row minds only itself -----------------------------------------------------------------


@pytest.mark.parametrize("solver", ["direct", "cg"])
@pytest.mark.parametrize("junk", [1e30, -1e38])
@pytest.mark.parametrize("window", [None, (30, 3)])
def test_the_future_changes_not_one_bit(
    isa: str, solver: str, junk: float, window: tuple[int, int] | None
):
    n, cut = 230, 150
    causal = window is None
    reach = 0 if window is None else window[1]
    results = []
    for changed in (False, True):
        q, k, v = tensors(B=1, T=n, S=n, D=12, dtype=torch.float32)
        if changed:
            k[:, :, cut:] = junk
            k[:, :, cut + 7 :] *= -1
            v[:, :, cut:] = junk
        out, aux = local_linear_attention(
            q, k, v, causal=causal, window=window, solver=solver, return_aux=True, impl="native"
        )
        results.append((out[:, :, : cut - reach], aux.slope[:, :, : cut - reach]))
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("solver", ["direct", "cg"])
@pytest.mark.parametrize("causal", [False, True])
def test_masked_keys_are_never_read(isa: str, causal: bool, solver: str):
    q, k, v = tensors(T=110, S=110, D=12, dtype=torch.float32)
    mask = torch.ones(2, 110, dtype=torch.bool)
    mask[0, :60] = False
    mask[1, 100:] = False
    options = {"causal": causal, "key_mask": mask, "solver": solver, "impl": "native"}
    expected = local_linear_attention(q, k, v, **options)
    for junk in (NAN, INF, 1e38):
        dirty = [torch.where(mask[:, None, :, None], x, junk) for x in (k, v)]
        assert torch.equal(local_linear_attention(q, *dirty, **options), expected)
    # Left padding changes no bit: masked keys are left out before anything is summed.
    options = {"causal": causal, "solver": solver, "impl": "native"}
    short = local_linear_attention(q[:1, :, 60:], k[:1, :, 60:], v[:1, :, 60:], **options)
    assert torch.equal(short, expected[:1, :, 60:])


@pytest.mark.parametrize("solver", ["direct", "cg"])
def test_neighbours_threads_and_places_change_not_one_bit(isa: str, solver: str):
    q, k, v = tensors(B=3, H=4, Hk=2, T=101, S=120, D=16, dtype=torch.float32)
    options = {"ridge": 0.3, "solver": solver, "impl": "native"}
    whole = local_linear_attention(q, k, v, **options)
    assert torch.equal(local_linear_attention(q[1:2], k[1:2], v[1:2], **options), whole[1:2])
    one_head = local_linear_attention(q[:, 2:], k[:, 1:], v[:, 1:], **options)
    assert torch.equal(one_head, whole[:, 2:])
    order = torch.randperm(101, generator=torch.Generator().manual_seed(1))
    assert torch.equal(local_linear_attention(q[:, :, order], k, v, **options), whole[:, :, order])
    some = local_linear_attention(q[:, :, 7:60], k, v, **options)
    assert torch.equal(some, whole[:, :, 7:60])
    # Beside other rows a tile may be cut by the mask, or not: the same bits.
    late = local_linear_attention(q, k, v, causal=True, **options)
    assert torch.equal(
        local_linear_attention(q[:, :, -30:], k, v, causal=True, **options), late[:, :, -30:]
    )


def test_threads_change_not_one_bit(isa: str):
    q, k, v = tensors(B=2, H=3, Hk=3, T=500, S=500, D=40, dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(local_linear_attention(q, k, v, causal=True, impl="native"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_query_that_is_no_number_stays_alone(isa: str):
    q, k, v = tensors(B=1, H=1, Hk=1, T=50, S=50, D=8, dtype=torch.float32)
    expected = local_linear_attention(q, k, v, impl="native")
    q[0, 0, 20, 3] = NAN
    q[0, 0, 30, 5] = INF
    out = local_linear_attention(q, k, v, impl="native")
    others = [i for i in range(50) if i not in (20, 30)]
    assert torch.equal(out[:, :, others], expected[:, :, others])
    assert out[:, :, [20, 30]].isnan().all()


# -- the form --------------------------------------------------------------------------------


def test_it_is_chosen_on_a_cpu_and_says_why_not():
    q, k, v = tensors(T=20, S=20, dtype=torch.float32)
    chosen = regard.explain(local_linear_attention, q, k, v)
    assert chosen.form == "native"
    assert "computes in float32" in str(
        regard.explain(local_linear_attention, *(x.double() for x in (q, k, v)))
    )
    with pytest.raises(ValueError, match="whole covariances"):
        local_linear_attention(q, k, v, covariance_block=1, impl="native")


def test_python_and_c_agree_about_a_call(isa: str):
    size = function("test", "local_linear_call_size", isa)
    size.restype = ctypes.c_int64
    assert size() == ctypes.sizeof(Call)


@pytest.mark.slow
def test_no_memory_is_an_error_and_no_crash():
    code = (
        "import resource, torch\n"
        "from regard.ops import local_linear_attention\n"
        "k = torch.zeros(1, 1, 1, 1).expand(1, 1, 1 << 27, 16)\n"
        "q = torch.zeros(1, 1, 20, 16)\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30),) * 2)\n"
        "try:\n"
        "    local_linear_attention(q, k, k, impl='native')\n"
        "except MemoryError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        "local_linear_attention: no memory for the work space of the native kernel"
    )
