"""Feature maps formed inside the kernels, row by row, and their derivatives.

A map makes one block of features of a row, or two of the same width: phi(z) = [a(z), b(z)]. The
two are kept apart: what is a product over features is the sum of two products. So the two
blocks are never stored, nor is anything twice as wide as z. The numbers are those of `table`.
"""

# Triton rewrites what is between "def" and its end; a type checker takes it for Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# In 16 bits: its product with a bfloat16 is exact, however large, so that fusing the product with
# a difference changes nothing. Features have then lost 5e-6 of their logarithm.
SHORT_LOG2E: tl.constexpr = tl.constexpr(1.44268798828125)
FLOOR: tl.constexpr = tl.constexpr(1e-12)  # of features that must not vanish
LIMIT: tl.constexpr = tl.constexpr(60.0)  # of an exponent


@triton.jit
def _exponential(x):
    """e^x without a scaling of small results: what is below the normal numbers is 0."""
    return tl.exp2(x * LOG2E)


@triton.jit
def _largest(x, there):
    return tl.max(tl.where(there, x, float("-inf")), 1)[:, None]


@triton.jit
def _share(x, there):
    """x over its sum along each row."""
    return x * (1.0 / tl.sum(tl.where(there, x, 0.0), 1))[:, None]


@triton.jit
def _features(x, there, MAP: tl.constexpr, TWO: tl.constexpr):
    """Both blocks of rows x [M, DP], before the floor; `there` [1, DP] is where x has channels."""
    a = x
    b = x
    if MAP == 1:
        a = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif MAP == 2:
        a = tl.maximum(x, 0.0)
    elif MAP == 3:
        a = _share(_exponential(x - _largest(x, there)), there)
        if TWO:
            b = _share(_exponential(-x - _largest(-x, there)), there)
    elif MAP == 4:
        a = _exponential(x - _largest(x, there))
        if TWO:
            b = _exponential(-x - _largest(-x, there))
    elif MAP == 5:
        x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
        a = _exponential(x)
        b = _exponential(-x)
    elif MAP == 6:
        most = _largest(tl.abs(x), there)
        a = _exponential(2.0 * (x - most))
        b = _exponential(-2.0 * (x + most))
        share = (1.0 / tl.sum(tl.where(there, a + b, 0.0), 1))[:, None]
        a = a * share
        b = b * share
    elif MAP == 7:
        x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
        if TWO:
            most = _largest(tl.abs(x), there)
            b = _exponential(-x - most)
        else:
            most = _largest(x, there)
        a = _exponential(x - most)
    return a, b


@triton.jit
def features(
    x, rows, MAP: tl.constexpr, TWO: tl.constexpr, FLOORED: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr,
):  # fmt: skip
    """Features of rows x [M, DP] in float32, both blocks; 0 where `rows` [M] says so."""
    there = (tl.arange(0, DP) < D)[None, :]
    a, b = _features(x, there, MAP, TWO)
    if FLOORED:
        a = tl.maximum(a, FLOOR)
        b = tl.maximum(b, FLOOR)
    if MAP != 0 or FLOORED:
        kept = rows[:, None] & there
        a = tl.where(kept, a, 0.0)
        b = tl.where(kept, b, 0.0)
    return a, b


@triton.jit
def _softmax(
    x, rows, FLOORED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SHORT: tl.constexpr
):
    """Softmax of rows x [M, DP], with its floor; 0 where `rows` [M] says so."""
    if D != DP:
        there = (tl.arange(0, DP) < D)[None, :]
        x = tl.where(there, x, float("-inf"))
    if SHORT:
        a = tl.exp2(x * SHORT_LOG2E - (tl.max(x, 1) * SHORT_LOG2E)[:, None])
    else:
        a = tl.exp2((x - tl.max(x, 1)[:, None]) * LOG2E)
    a = a * tl.where(rows, 1.0 / tl.sum(a, 1), 0.0)[:, None]
    if FLOORED:
        a = tl.maximum(a, tl.where(rows, FLOOR, 0.0)[:, None])
        if D != DP:
            a = tl.where(there, a, 0.0)
    return a


@triton.jit
def both(
    x, rows, MAP: tl.constexpr, FLOORED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SHORT: tl.constexpr,
):  # fmt: skip
    """`features` of a map of two blocks; x is finite in other rows, too. SHORT: it is bfloat16.

    For softmax with a third of the instructions: less is done per feature, more per row.
    """
    if MAP == 3:
        a = _softmax(x, rows, FLOORED, D, DP, SHORT)
        b = _softmax(-x, rows, FLOORED, D, DP, SHORT)
    else:
        a, b = features(x, rows, MAP, True, FLOORED, D, DP)
    return a, b


@triton.jit
def _through_largest(gradient, at):
    """The gradient of exponents whose largest, at `at`, was subtracted: shared by equals."""
    at = at.to(tl.float32)
    count = tl.maximum(tl.sum(at, 1), 1.0)
    return gradient - at * (tl.sum(gradient, 1) / count)[:, None]


@triton.jit
def chain(
    x, da, db, MAP: tl.constexpr, TWO: tl.constexpr, FLOORED: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr,
):  # fmt: skip
    """The gradient of x [M, DP] from those of its features; all in float32."""
    there = (tl.arange(0, DP) < D)[None, :]
    dx = da
    if MAP != 0:
        a, b = _features(x, there, MAP, TWO)
        live = there
        other = there
        if FLOORED:  # nothing passes where the floor is
            live = there & (a > FLOOR)
            other = there & (b > FLOOR)
        if MAP == 1:
            dx = tl.where(live, da * tl.minimum(a, 1.0), 0.0)
        elif MAP == 2:
            dx = tl.where(live & (x > 0), da, 0.0)
        else:
            a = tl.where(there, a, 0.0)
            weighed = tl.where(live, a * da, 0.0)
            opposite = weighed * 0.0
            if TWO:
                b = tl.where(there, b, 0.0)
                opposite = tl.where(other, b * db, 0.0)
            if MAP == 3:
                dx = weighed - a * tl.sum(weighed, 1)[:, None]
                if TWO:
                    dx -= opposite - b * tl.sum(opposite, 1)[:, None]
            elif MAP == 4:
                dx = _through_largest(weighed, there & (a == 1.0))
                if TWO:
                    dx -= _through_largest(opposite, there & (b == 1.0))
            elif MAP == 5:
                dx = tl.where(tl.abs(x) < LIMIT, weighed - opposite, 0.0)
            elif MAP == 6:
                shared = tl.sum(weighed + opposite, 1)[:, None]
                dx = 2.0 * (weighed - a * shared - opposite + b * shared)
            elif MAP == 7:
                at_a = (there & (a == 1.0)).to(tl.float32)
                at_b = at_a * 0.0
                if TWO:
                    at_b = (there & (b == 1.0)).to(tl.float32)
                count = tl.maximum(tl.sum(at_a + at_b, 1), 1.0)
                through = (tl.sum(weighed + opposite, 1) / count)[:, None]
                dx = weighed - opposite - through * (at_a - at_b)
    return dx
