"""Local linear attention: a local affine fit around every query, instead of a local average.

The files beside it, which are also the engine of Parallax (g given) and of softmax (g = 0):

- `reference.py`: the equations; `card.py`: what the rest of the library knows about them
- `call.py`, `forms.py`: one call, its checks, its cache, and which form serves it
- `registered.py`: what every compiled form is to torch; a new form registers there
- `blockwise.py`, `backward.py`, `probe.py`: the eager form, forward and backward, on `layout.py`
  and `tiles.py` (blocks of queries against tiles of keys) and `gemm.py` (their products)
- `solve.py`, `cg.py`, `covariance.py`, `diagonal.py`: its solvers
- `native/`: the form in plain C, for CPUs; `triton/`: the form in Triton, for GPUs
- `kernel.py`: the Gaussian kernel; `analysis.py`: weights and slopes to look at; `flash.py`: the
  authors' signature
"""

from __future__ import annotations

from typing import Any, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.core import checks
from regard.core.cache import KVCache
from regard.core.precision import cast_for_autocast
from regard.ops.local_linear import forms
from regard.ops.local_linear.analysis import local_linear_slope, local_linear_weights
from regard.ops.local_linear.flash import flash_lla
from regard.ops.local_linear.forms import LocalLinearAux

__all__ = [
    "LocalLinearAux",
    "flash_lla",
    "local_linear_attention",
    "local_linear_slope",
    "local_linear_weights",
]


def local_linear_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    causal: bool = False,
    ridge: float | Float[Tensor, ""] | Float[Tensor, " h"] | Float[Tensor, "b heads t"] = 1.0,
    ridge_mode: Literal["relative", "absolute"] = "relative",
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    kernel: Literal["dot", "gaussian"] = "dot",
    key_mask: Bool[Tensor, "b s"] | None = None,
    key_bias: Float[Tensor, "b heads s"] | None = None,
    log_decay: Float[Tensor, "b heads s"] | None = None,
    intercept: bool = True,
    covariance_block: int | None = None,
    window: tuple[int, int] | None = None,
    cu_seqlens: Int[Tensor, " sequences+1"] | None = None,
    cu_seqlens_k: Int[Tensor, " sequences+1"] | None = None,
    solver: Literal["auto", "direct", "cg"] = "auto",
    tol: float | None = None,
    tol_backward: float | None = None,
    max_iters: int | None = None,
    block_size: int | None = None,
    state: KVCache | None = None,
    return_state: bool = False,
    return_aux: bool = False,
    grad: Literal["exact", "official"] = "exact",
    precision: Literal["auto", "high", "fast"] = "auto",
    impl: str = "auto",
) -> Any:
    """Attention as local regression: fits v ~ b + W (k - q) around each query and returns b.

    With scores s_ij = scale q_i . k_j (plus key_bias and decay) and p = softmax(s_i) over the
    keys that query i sees,

        kbar = sum_j p_j k_j,    C = sum_j p_j (k_j - kbar)(k_j - kbar)^T,
        g = (C + lambda I)^-1 (kbar - q_i),
        o_i = sum_j p_j (1 - g . (k_j - kbar)) v_j.

    Softmax attention is the local average (g = 0, or lambda to infinity); here the trend of the
    values around the query is taken into account. The signed weights p_j (1 - ...) sum to 1, so
    constant values are returned exactly, and values that are affine in the keys nearly so.

    Arguments:
        q: queries [B, H, T, D].
        k, v: keys [B, Hk, S, D] and values [B, Hk, S, Dv]; H is a multiple of Hk.
        causal: query i sees keys j <= i + S - T: aligned at the end, so that the last query
            sees all keys (torch's attention aligns at the start). With more queries than keys
            the first rows see nothing.
        ridge: lambda > 0: a number or a tensor [], one per head [H], or one per query token
            [B, 1 | Hk | H, T]. Tensors of any floating dtype; differentiable.
        ridge_mode: "relative": lambda is added to the covariance of the normalised weights.
            "absolute": to that of the weights exp(s), so that it counts less where there is
            more evidence: lambda_i = lambda exp(-lse_i).
        scale: None is D ** -0.5; a number or a tensor [], or one per head [H], differentiable.
        kernel: "dot": scores scale q . k. "gaussian": -scale |q - k|^2 / 2, so that scale is
            1 / bandwidth^2; an absolute ridge is then added to the covariance of the weights
            exp(-scale |q - k|^2 / 2), which are at most 1.
        key_mask: True = real key. Masked keys count for nothing, whatever they contain.
        key_bias: added to the scores of a key.
        log_decay: <= 0; key j is seen by query i with the extra score
            sum_{l=j+1..i} log_decay_l; -inf forgets everything before. Without `causal`
            every query stands at the last key.
        intercept: False fits v ~ W k through the origin and returns W q: kbar is 0 above, q
            takes the place of q - kbar, and the weights are p_j (W's part only). With
            scale = 0, an absolute ridge and a decay this is MesaNet.
        covariance_block: keep only diagonal blocks of this size of the second moment around
            q, as the authors' option of that name does; see Limits.
        window: (left, right) keys seen beside the query's own position; -1 is unbounded.
        cu_seqlens, cu_seqlens_k: boundaries of packed sequences, int32 with B = 1.
        solver: "direct" builds every query's covariance and factors it: T S D^2 work, any
            ridge. "cg" makes conjugate gradient steps: T S D work each, more of them the
            smaller the ridge. "auto" takes "direct" up to a ridge that depends on the head
            size: in float32 3 up to D = 16, 0.1 to 32 (0.03 in the native form), 0.003 to 64,
            0.001 to 128 (a tensor counts as 1, an absolute ridge as a thousandth of itself), in
            float64 more often, with 16-bit inputs less. For up to 4 rows (T x group: decoding)
            the eager form takes "direct" up to S D = 2^17 (2^18 where the ridge would) and "cg"
            beyond. It looks at metadata and that number only.
        tol: relative residual at which a query's iterations stop. None: 1e-12 for float64, 1e-4
            for float32, 3e-4 for float16 and 1.5e-3 for bfloat16 inputs, whose rounding then is
            most of the error. With 0 every query makes
            `max_iters` iterations, nothing is solved again and nothing is synchronised.
        tol_backward: the same for the solves of the backward. None: tol / 100.
        max_iters: iterations at most, before a query is solved directly. None: 2 D + 8.
        block_size: queries per tile; changes results by rounding only.
        state, return_state: continue from (whichever op it comes from), and return, a
            `KVCache`; operands of the call describe its new keys only.
        return_aux: also return a `LocalLinearAux`.
        grad: "official" leaves a term out of the gradient, as the authors' backward does: it
            holds lambda times the normaliser of the weights constant.
        precision: of the operands of products in forms that round them to 16 bits; a hint that
            all others exceed. "auto": as Precision says; "high": two 16-bit parts wherever the
            solve amplifies rounding; "fast": one part, and a tol of 1e-2.
        impl: "native" (plain C on CPUs, not for float64 inputs; refuses block_size), "eager"
            (blockwise, everything), or "reference" (dense, differentiable twice; refuses solver,
            tol, tol_backward, max_iters, block_size and precision, which it does not have), or
            "triton" (a GPU, heads of up to 128 channels, no float64 and no block_size). "auto"
            takes triton on devices where it was verified (`regard.gpu.VERIFIED`: an H100),
            native on CPUs, else eager.

    Returns:
        Output [B, H, T, Dv] in q's dtype; rows that see no key are 0. With return_state and
        return_aux: (out, state), (out, aux) or (out, state, aux).

    Precision:
        Computes in float32 for 16-bit inputs (on CPUs an error of at most 1.45 times that of
        rounding them to bfloat16, 1.6 times to float16, measured for ridges from 0.1 and up to
        128 channels), in float64 for float64. At the default tolerance
        float32 outputs are within about 5e-5 of float64 with "cg"; within 1e-5 at ridges from 0.1
        with "direct", which refines its solution once, and with "cg" at tol <= 1e-6: both then
        also take off what the rounding of mean keys leaves in covariances and weights. Keys are
        centred first, so a common offset of the keys costs nothing; scores of several hundred do
        (1e-3 at worst, keys of norm 10, ridge 0.1).
        On a GPU products of 16-bit inputs have float16 operands (1.02 to 1.17 times the error of
        rounding the inputs to bfloat16, measured from 1k to 16k tokens). Over few keys that
        rounding does not average out: with an absolute ridge, without an intercept or with
        D <= 16, calls of which no query sees more than 256 keys by position, and float16 calls
        up to 128, are computed as float32 inputs are, default tolerances included.
        A query that is not solved (tol not reached, a pivot below half the ridge, or a g so
        large that float32 rounding would reach 1e-3 of a weight) is solved again in float64.
        Each query decides on its own: results do not depend on the rest of the batch.

    Cost:
        "direct": O(T S D^2). "cg": two products of size T x S x D per iteration, about 5
        iterations at ridge 10, 8 at 1 and D / 4 at 0.1. Memory O((T + S) D): the weights of one
        block of queries are held, no T x S tensor. On a CPU with AVX-512 the native form takes
        1.9, 2.4, 2.8 and 3.4 times as long as torch's attention at D = 16, 32, 64 and 128 (4096
        causal tokens, ridge 1, one thread), the eager form about 5 times; there its float32
        products go to oneDNN. The backward recomputes the weights, refines g and makes a second
        solve: about twice the forward.

    Source:
        Zuo et al., "Local Linear Attention: An Optimal Interpolation of Linear and Softmax
        Attention For Test-Time Regression", arXiv 2510.01450, in a centred form that is equal
        to the paper's. Matches the authors' fp32 operator to 1e-9 when that runs in float64.
        Gradients are exact to tol_backward; the authors' backward holds the normaliser of the
        ridge constant and differs by about 10%.

    Limits:
        With covariance_block below D the weights are divided by 1 - m . rho, which is positive
        only for one block: outputs near its zeros are arbitrarily large. It needs the direct
        solver, an intercept and exact gradients.
        Differentiable once (impl="reference": any number of times); torch.vmap works,
        torch.func.grad does not. Aux carries no gradients.
        An absolute ridge vanishes as exp(-lse): where the fit is singular even to float64 (lse
        above 30 or so with fewer keys than D in sight) the query gets the local average;
        `aux.residual` of 1 shows it. So does a query whose ridge, in a tensor, is negative or
        not finite: values are not looked at before.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or domain.

    >>> import torch
    >>> k = torch.linspace(-1, 1, 9, dtype=torch.float64)[None, None, :, None]
    >>> q = torch.tensor([1.5], dtype=torch.float64)[None, None, :, None]
    >>> out = local_linear_attention(q, k, 3 * k + 2, ridge=1e-6)  # beyond the last key
    >>> round(out.item(), 3)
    6.5
    """
    q, k, v = cast_for_autocast(q, k, v)
    op = forms.OP
    sizes = checks.check_qkv(op, q, k, v)
    for name, flag in (("return_state", return_state), ("return_aux", return_aux)):
        checks.check_flag(op, name, flag)
    for name, count in (("max_iters", max_iters), ("block_size", block_size)):
        if count is not None:
            checks.check_integer(op, name, count)
    for name, value in (("tol", tol), ("tol_backward", tol_backward)):
        if value is not None:
            checks.check_number(op, name, value, least=0.0)
    checks.check_state(op, state, KVCache)
    settings = {
        "solver": None if solver == "auto" else solver, "tol": tol, "tol_backward": tol_backward,
        "max_iters": max_iters, "block_size": block_size,
        "precision": None if precision == "auto" else precision,
    }
    given = tuple(name for name, value in settings.items() if value is not None)
    tol = forms.TOLERANCE[q.dtype] if tol is None else tol
    tol_backward = forms.backward_tolerance(tol) if tol_backward is None else tol_backward
    call = forms.Call(
        q, k, v, causal, ridge, ridge_mode, scale, key_mask, key_bias, log_decay, window,
        tol, tol_backward, solver, kernel, intercept, covariance_block, grad,
        max_iters or 0, block_size or 0, state is not None or return_state,
        precision=precision, given=given,
    )
    forms.check(op, sizes, call)
    answer, after = forms.attend(
        op, forms.FORMS, call, sizes, cu_seqlens, cu_seqlens_k, state, return_state, impl
    )
    out, *aux = answer
    results: list[Any] = [out]
    if return_state:
        results.append(after)
    if return_aux:
        results.append(LocalLinearAux(*(x.detach() for x in aux)))
    return results[0] if len(results) == 1 else tuple(results)
