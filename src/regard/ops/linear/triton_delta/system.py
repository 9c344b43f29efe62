"""The triangular system of a chunk, inverted, and what the chunk does to the state.

What the tokens of a chunk write solves (I + A) U = beta (V - G K S), with A_tj = beta_t w_tj
(k_t . k_j) for j < t, w and G decays between tokens and since the chunk began. With X the
inverse, computed by forward substitution over blocks of 16 in float32, the state S [F, E] after
the chunk is

    S' = (g I - P) S + N,   P = L^T X (beta G K),   N = L^T X (beta V),   L: K decayed to the end.

So a step from chunk to chunk is one product, and P serves the gradient too: its transpose takes
the gradient of S' to that of S.
"""

# Triton rewrites what is between "def" and its end; a type checker takes it for Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.ops.linear.triton_delta.tile import (
    CHUNK,
    between,
    entering,
    keys_at,
    overflowed,
    rows_at,
    square_at,
    sums_at,
    triangle,
    usable,
)


@triton.jit
def _piece(
    k,
    beta,
    facts,
    plane,
    tokens,
    kt,
    bt,
    T,
    F: tl.constexpr,
    FP: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    NORMALISE: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Sixteen tokens: keys, their factor, their strength times that factor, sums of decays."""
    keys, unit = keys_at(k, facts, plane, tokens, kt, T, F, FP, NORMALISE, OPERAND)
    strength = tl.load(beta + tokens.to(tl.int64) * bt, mask=tokens < T, other=0.0)
    high, low, cuts = sums_at(facts, plane, tokens, HAS_DECAY)
    return keys, unit, strength.to(tl.float32) * unit, high, low, cuts


@triton.jit
def _pairs(
    keys_t,
    strong,
    high_t,
    low_t,
    cuts_t,
    keys_j,
    unit,
    high_j,
    low_j,
    cuts_j,
    HAS_DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block [t, j] of A, all of its j before all of its t."""
    product = tl.dot(keys_t, tl.trans(keys_j), input_precision=PRECISION)
    inside, seen = between(
        high_t[:, None], low_t[:, None], cuts_t[:, None],
        high_j[None, :], low_j[None, :], cuts_j[None, :],
        tl.full([16, 16], 1, tl.int1), HAS_DECAY,
    )  # fmt: skip
    return tl.where(seen, product * (strong[:, None] * unit[None, :] * inside), 0.0)


@triton.jit
def _own_pairs(
    keys, unit, strong, high, low, cuts, HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr
):
    """A block of A on the diagonal, transposed: [j, t] for j < t."""
    product = tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
    j = tl.arange(0, 16)[:, None]
    t = tl.arange(0, 16)[None, :]
    inside, seen = between(
        high[None, :], low[None, :], cuts[None, :], high[:, None], low[:, None], cuts[:, None],
        j < t, HAS_DECAY,
    )  # fmt: skip
    return tl.where(seen, product * (unit[:, None] * strong[None, :] * inside), 0.0)


@triton.jit
def _substitute(pairs, x, row):
    """x with its row `row`, until now that of the identity, of the inverse of I + pairs^T."""
    t = tl.arange(0, 16)
    weights = tl.sum(tl.where(t[None, :] == row, pairs, 0.0), 1)
    earlier = tl.sum(tl.where((weights == 0.0)[:, None], 0.0, weights[:, None] * x), 0)
    return tl.where(t[:, None] == row, x - earlier[None, :], x)


@triton.jit
def _product(x, y, PRECISION: tl.constexpr):
    return tl.dot(x, usable(y), input_precision=PRECISION)


@triton.jit
def _put(inverse, x, block_row: tl.constexpr, block_column: tl.constexpr, CLEAN: tl.constexpr):
    t = block_row * 16 + tl.arange(0, 16)[:, None]
    j = block_column * 16 + tl.arange(0, 16)[None, :]
    if CLEAN:
        x = usable(x)
    tl.store(inverse + t * CHUNK + j, x.to(inverse.dtype.element_ty))


@triton.jit
def _put_own(inverse, x, bad, block: tl.constexpr, CLEAN: tl.constexpr):
    """A block on the diagonal; what a token writes that depends on lost numbers is NaN."""
    own = tl.arange(0, 16)[:, None] == tl.arange(0, 16)[None, :]
    lost = own & (tl.max(bad, 1) > 0)[:, None]
    _put(inverse, tl.where(lost, float("nan"), x), block, block, CLEAN)


@triton.jit(do_not_specialize=["T", "chunks"])
def inverse_kernel(
    k,
    v,
    beta,
    facts,
    inverse,
    kb,
    kh,
    kt,
    vb,
    vh,
    vt,
    bb,
    bh,
    bt,
    T,
    chunks,
    plane,
    HK: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    NORMALISE: tl.constexpr,
    CLEAN: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """inverse [N, chunks, C, C]; its blocks above the diagonal stay unwritten.

    CLEAN puts 0 where numbers have overflowed, for gradients; without it a token whose row has
    overflowed is marked by NaN. For one warp: substitution is a chain of small sums, which
    several warps would have to wait for together.
    """
    chunk = tl.program_id(0) % chunks
    n = tl.program_id(0) // chunks
    b = (n // HK).to(tl.int64)
    h = (n % HK).to(tl.int64)
    k += b * kb + h * kh
    beta += b * bb + h * bh
    facts += n.to(tl.int64) * (chunks * CHUNK)
    row = n.to(tl.int64) * chunks + chunk
    own = inverse + row * (CHUNK * CHUNK)
    first = chunk * CHUNK + tl.arange(0, 16)
    k0, u0, s0, h0, l0, c0 = _piece(
        k, beta, facts, plane, first, kt, bt, T, F, FP, HAS_DECAY, NORMALISE, OPERAND
    )
    k1, u1, s1, h1, l1, c1 = _piece(
        k, beta, facts, plane, first + 16, kt, bt, T, F, FP, HAS_DECAY, NORMALISE, OPERAND
    )
    k2, u2, s2, h2, l2, c2 = _piece(
        k, beta, facts, plane, first + 32, kt, bt, T, F, FP, HAS_DECAY, NORMALISE, OPERAND
    )
    k3, u3, s3, h3, l3, c3 = _piece(
        k, beta, facts, plane, first + 48, kt, bt, T, F, FP, HAS_DECAY, NORMALISE, OPERAND
    )
    p0 = _own_pairs(k0, u0, s0, h0, l0, c0, HAS_DECAY, PRECISION)
    p1 = _own_pairs(k1, u1, s1, h1, l1, c1, HAS_DECAY, PRECISION)
    p2 = _own_pairs(k2, u2, s2, h2, l2, c2, HAS_DECAY, PRECISION)
    p3 = _own_pairs(k3, u3, s3, h3, l3, c3, HAS_DECAY, PRECISION)
    one = tl.where(tl.arange(0, 16)[:, None] == tl.arange(0, 16)[None, :], 1.0, 0.0)
    x0 = one
    x1 = one
    x2 = one
    x3 = one
    for i in range(1, 16):
        x0 = _substitute(p0, x0, i)
        x1 = _substitute(p1, x1, i)
        x2 = _substitute(p2, x2, i)
        x3 = _substitute(p3, x3, i)

    a10 = _pairs(k1, s1, h1, l1, c1, k0, u0, h0, l0, c0, HAS_DECAY, PRECISION)
    z10 = _product(a10, x0, EXACT)
    bad1 = overflowed(x1) | overflowed(z10)
    x10 = -_product(x1, z10, EXACT)

    a32 = _pairs(k3, s3, h3, l3, c3, k2, u2, h2, l2, c2, HAS_DECAY, PRECISION)
    z32 = _product(a32, x2, EXACT)
    bad3 = overflowed(x3) | overflowed(z32)
    x32 = -_product(x3, z32, EXACT)

    a20 = _pairs(k2, s2, h2, l2, c2, k0, u0, h0, l0, c0, HAS_DECAY, PRECISION)
    a21 = _pairs(k2, s2, h2, l2, c2, k1, u1, h1, l1, c1, HAS_DECAY, PRECISION)
    z20 = _product(a20, x0, EXACT) + _product(a21, x10, EXACT)
    z21 = _product(a21, x1, EXACT)
    bad2 = overflowed(x2) | overflowed(z20) | overflowed(z21)
    x20 = -_product(x2, z20, EXACT)
    x21 = -_product(x2, z21, EXACT)

    a30 = _pairs(k3, s3, h3, l3, c3, k0, u0, h0, l0, c0, HAS_DECAY, PRECISION)
    a31 = _pairs(k3, s3, h3, l3, c3, k1, u1, h1, l1, c1, HAS_DECAY, PRECISION)
    z30 = _product(a30, x0, EXACT) + _product(a31, x10, EXACT)
    z31 = _product(a31, x1, EXACT)
    bad3 = bad3 | overflowed(z30) | overflowed(z31)
    x30 = -(_product(x32, z20, EXACT) + _product(x3, z30, EXACT))
    x31 = -(_product(x32, z21, EXACT) + _product(x3, z31, EXACT))

    _put_own(own, x0, overflowed(x0), 0, CLEAN)
    _put(own, x10, 1, 0, CLEAN)
    _put_own(own, x1, bad1, 1, CLEAN)
    _put(own, x20, 2, 0, CLEAN)
    _put(own, x21, 2, 1, CLEAN)
    _put_own(own, x2, bad2, 2, CLEAN)
    _put(own, x30, 3, 0, CLEAN)
    _put(own, x31, 3, 1, CLEAN)
    _put(own, x32, 3, 2, CLEAN)
    _put_own(own, x3, bad3, 3, CLEAN)


@triton.jit(do_not_specialize=["T", "chunks"])
def system_kernel(
    k,
    v,
    beta,
    facts,
    inverse,
    passing,
    gain,
    whole,
    kb,
    kh,
    kt,
    vb,
    vh,
    vt,
    bb,
    bh,
    bt,
    T,
    chunks,
    plane,
    HK: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    NORMALISE: tl.constexpr,
    CLEAN: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """passing = P^T [N, chunks, FP, FP], gain = N^T [N, chunks, EP, FP], whole = g [N, chunks]."""
    chunk = tl.program_id(0) % chunks
    n = tl.program_id(0) // chunks
    b = (n // HK).to(tl.int64)
    h = (n % HK).to(tl.int64)
    k += b * kb + h * kh
    v += b * vb + h * vh
    beta += b * bb + h * bh
    facts += n.to(tl.int64) * (chunks * CHUNK)
    row = n.to(tl.int64) * chunks + chunk
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    x = triangle(inverse, row, OPERAND)
    keys, unit = keys_at(k, facts, plane, tokens, kt, T, F, FP, NORMALISE, OPERAND)
    strength = tl.load(beta + tokens.to(tl.int64) * bt, mask=tokens < T, other=0.0).to(tl.float32)
    high, low, cuts = sums_at(facts, plane, tokens, HAS_DECAY)
    leaving = unit
    if HAS_DECAY:
        high_end, low_end, cuts_end = sums_at(
            facts, plane, chunk * CHUNK + CHUNK - 1 + tl.arange(0, 1), HAS_DECAY
        )
        after, _ = between(
            high_end, low_end, cuts_end, high, low, cuts, tokens == tokens, HAS_DECAY
        )
        leaving = unit * after
        tl.store(whole + row + tl.arange(0, 1), entering(high_end, low_end, cuts_end, HAS_DECAY))
    # Transposed from the start: a product whose left operand is a transposed result is
    # miscompiled for Hopper by Triton 3.4 to 3.7.0.
    factor = strength * unit * entering(high, low, cuts, HAS_DECAY)
    weighed = (keys.to(tl.float32) * factor[:, None]).to(OPERAND)
    w = tl.dot(tl.trans(weighed), tl.trans(x), input_precision=PRECISION)
    w = tl.where((leaving == 0.0)[None, :], 0.0, w * leaving[None, :])
    if CLEAN:
        w = usable(w)
    p = tl.dot(w.to(OPERAND), keys, input_precision=PRECISION)
    if CLEAN:
        p = usable(p)
    tl.store(passing + row * (FP * FP) + square_at(FP, FP), p.to(passing.dtype.element_ty))
    values = rows_at(v, tokens, vt, T, E, EP).to(tl.float32) * strength[:, None]
    u = tl.dot(tl.trans(values.to(OPERAND)), tl.trans(x), input_precision=PRECISION)
    u = tl.where((leaving == 0.0)[None, :], 0.0, u * leaving[None, :])
    if CLEAN:
        u = usable(u)
    new = tl.dot(u.to(OPERAND), keys, input_precision=PRECISION)
    if CLEAN:
        new = usable(new)
    tl.store(gain + row * (EP * FP) + square_at(EP, FP), new.to(gain.dtype.element_ty))
