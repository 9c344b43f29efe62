"""The third pass of the backward, over the queries of each key: dk, dv and the sums of dS.

    dk_j = sum_i scale dS_ij q_i - p_ij (gamma_ij - b_ij) g_i - p_ij (1 - a_ij) u_i
    dv_j = sum_i p_ij (1 - a_ij) e_i

One program has a tile of keys and walks over all queries of its group that see it, head after
head, in a fixed order: nothing is added by two programs. Keys are the rows of a tile here, so
that weights stay in registers as the first operand of the products they go into.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.gpu.inside import head_of, power_of_two
from regard.ops.local_linear.triton.forward import LN2, LOG2E
from regard.ops.local_linear.triton.tile import (
    queries_seeing,
    visible,
)
from regard.ops.local_linear.triton.walk import row_decay, tile_of


@triton.jit
def _step(
    i0, dk, dv, column,
    k, v, key, of_key, key_high, key_low, before_last, last_high, last_low,
    q_rows, e_rows, u_rows, row_data, stride,
    factor, lift, of_scores, of_values, high, low, first, T, S, left, right,
    M: tl.constexpr, N: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    OPERAND: tl.constexpr, CAUSAL: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, SLOPE: tl.constexpr,
    SOLVED: tl.constexpr, OF_KEYS: tl.constexpr, OF_VALUES: tl.constexpr,
    COLUMN: tl.constexpr,
):
    """Adds a tile of queries; pointers are those of its head."""
    i = i0 + tl.arange(0, M)
    e = tile_of(e_rows, i0, M, DVP, False)
    if SLOPE:  # queries and slopes as one operand: both products are made at once
        q = tile_of(q_rows, 2 * i0, 2 * M, DP, False)
        product = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        product, one = tl.split(tl.permute(tl.reshape(product, (N, 2, M)), (0, 2, 1)))
    else:
        q = tile_of(q_rows, i0, M, DP, False)
        product = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    s = product * factor
    shift = lift - tl.load(row_data + 3 * stride + i)
    if HAS_BIAS:
        s += of_key
    if HAS_DECAY:
        row_high, row_low, row_first = row_decay(high, low, first, i, T, S, HAS_DECAY, CAUSAL)
        if MASKED:
            s += (row_high[None, :] - key_high) + (row_low[None, :] - key_low)
        else:  # these queries stand after the last key of the tile: differences of one sign
            s += before_last
            shift += (row_high - last_high) + (row_low - last_low)
    else:
        row_first = i
    p = tl.exp2(s + shift[None, :])
    shown = key[:, None] >= 0
    if MASKED:  # 0 times a later key's product may be no 0
        shown = visible(
            (i + (S - T))[None, :], key[:, None], row_first[None, :], S, left, right,
            HAS_LEFT, HAS_RIGHT, HAS_DECAY,
        )
        p = tl.where(shown, p, 0.0)
    signed = p
    if SLOPE:
        signed = p * (one + tl.load(row_data + i)[None, :])
        if MASKED:
            signed = tl.where(shown, signed, 0.0)
    if OF_VALUES:
        dv = tl.dot((signed * of_values).to(OPERAND), e, dv, input_precision=PRECISION)
    if OF_KEYS:
        rest = tl.dot(v, tl.trans(e), input_precision=PRECISION)
        if SOLVED:
            u = tile_of(u_rows, i0, M, DP, False)
            rest = tl.dot(k, tl.trans(u), rest, input_precision=PRECISION)
            dk = tl.dot(signed.to(OPERAND), u, dk, input_precision=PRECISION)
        rest += tl.load(row_data + stride + i)[None, :]
        if MASKED:
            rest = tl.where(shown, rest, 0.0)
        ds = signed * rest
        if SLOPE:
            ds += p * tl.load(row_data + 2 * stride + i)[None, :]
        if COLUMN:
            column += tl.sum(ds, 1)
        weight = (ds * of_scores).to(OPERAND)
        if SLOPE:
            pairs = tl.permute(tl.join(weight, (p * rest).to(OPERAND)), (0, 2, 1))
            weight = tl.reshape(pairs, (N, 2 * M))
        dk = tl.dot(weight, q, dk, input_precision=PRECISION)
    return dk, dv, column


@triton.jit(do_not_specialize=["T", "S", "left", "right", "pairs", "row_tiles"])
def keys_kernel(
    keys, values, sigma, scale, bias, high, low, first,
    q_rows, e_rows, u_rows, row_data, bounds,
    grad_k, grad_v, grad_column,
    scale_b, scale_h, T, S, length, row_length, left, right, pairs, row_tiles,
    H: tl.constexpr, HK: tl.constexpr, BIAS_HEADS: tl.constexpr, DECAY_HEADS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr, OPERAND: tl.constexpr,
    SLOPE: tl.constexpr, SOLVED: tl.constexpr, OF_KEYS: tl.constexpr, OF_VALUES: tl.constexpr,
    COLUMN: tl.constexpr, LIFT: tl.constexpr, CAUSAL: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of keys and values [B, Hk, S, .], and the sums of dS of each key [B, H, S].

    `bounds` [2, B H, row_tiles] are those of the second pass, whose tiles have TILE rows. Weights
    are multiplied by 2^LIFT, so that most are normal numbers in float16. With SLOPE q_rows has M
    rows of queries and M of slopes in turns.
    """
    SHARE: tl.constexpr = 2 * DP if SLOPE else DP
    GROUP: tl.constexpr = H // HK
    key_pairs = pairs // GROUP
    key_pair = tl.program_id(0) % key_pairs
    j0 = tl.program_id(0) // key_pairs * N  # the first keys are seen by the most queries
    j = j0 + tl.arange(0, N)
    k = tile_of(keys + key_pair.to(tl.int64) * length * DP, j0, N, DP, False)
    v = tile_of(values + key_pair.to(tl.int64) * length * DVP, j0, N, DVP, False)
    sigma_k, sigma_v = tl.load(sigma + key_pair * 2), tl.load(sigma + key_pair * 2 + 1)
    stride = tl.cast(pairs, tl.int64) * row_length

    dk = tl.zeros([N, DP], tl.float32)
    dv = tl.zeros([N, DVP], tl.float32)
    start, middle, stop = queries_seeing(
        j0, T, S, left, right, M, N, HAS_LEFT, HAS_RIGHT
    )
    # Short floats have a short range: sums are divided by a bound of what can come together.
    most_of_values = 0.0
    most = 0.0
    for member in tl.range(0, GROUP):
        of_head = bounds + (key_pair * GROUP + member) * row_tiles
        for tile in tl.range(start // TILE, tl.cdiv(stop, TILE), 256):
            tiles = tile + tl.arange(0, 256)
            there = tiles < tl.cdiv(stop, TILE)
            found = tl.load(of_head + tiles, mask=there, other=0.0)
            most_of_values = tl.maximum(most_of_values, tl.max(found, 0))
            found = tl.load(of_head + pairs * row_tiles + tiles, mask=there, other=0.0)
            most = tl.maximum(most, tl.max(found, 0))
    lift = LIFT - tl.log2(power_of_two(most))
    of_values = power_of_two(most) / power_of_two(most_of_values)
    for member in tl.range(0, GROUP):
        pair = key_pair * GROUP + member
        row = pair.to(tl.int64) * row_length
        factor = tl.load(scale + pair // H * scale_b + pair % H * scale_h) * LOG2E * sigma_k
        of_scores = factor * LN2
        of_head = head_of(pair, H, DECAY_HEADS).to(tl.int64) * length
        high_of_head = high
        low_of_head = low
        first_of_head = first
        of_key, key_high, key_low = 0.0, 0.0, 0.0
        before_last, last_high, last_low = 0.0, 0.0, 0.0
        whole = middle
        if HAS_BIAS:
            of_bias = head_of(pair, H, BIAS_HEADS).to(tl.int64) * length
            of_key = tl.load(bias + of_bias + j)[:, None]
        if HAS_DECAY:
            high_of_head = high + of_head
            low_of_head = low + of_head
            first_of_head = first + of_head
            key_high = tl.load(high_of_head + j)[:, None]
            key_low = tl.load(low_of_head + j)[:, None]
            last = tl.minimum(j0 + N, S) - 1
            last_high = tl.load(high_of_head + last)
            last_low = tl.load(low_of_head + last)
            before_last = (last_high - key_high) + (last_low - key_low)
            forgets = tl.load(first_of_head + S - 1) > j0
            whole = tl.where(forgets, stop, middle)
        column = tl.zeros([N], tl.float32)
        # By tiles, so that rows are known to be aligned: else loads are many and products wait.
        cut = tl.cdiv(whole, M)
        for tile in tl.range(start // M, cut):
            dk, dv, column = _step(
                tile * M, dk, dv, column, k, v, j, of_key, key_high, key_low,
                before_last, last_high, last_low,
                q_rows + row * SHARE, e_rows + row * DVP, u_rows + row * DP,
                row_data + row, stride, factor, lift, of_scores, of_values,
                high_of_head, low_of_head, first_of_head,
                T, S, left, right, M, N, DP, DVP, OPERAND, CAUSAL, HAS_LEFT, HAS_RIGHT,
                HAS_BIAS, HAS_DECAY, True, PRECISION, SLOPE, SOLVED, OF_KEYS, OF_VALUES, COLUMN,
            )
        for tile in tl.range(cut, tl.cdiv(stop, M)):
            dk, dv, column = _step(
                tile * M, dk, dv, column, k, v, j, of_key, key_high, key_low,
                before_last, last_high, last_low,
                q_rows + row * SHARE, e_rows + row * DVP, u_rows + row * DP,
                row_data + row, stride, factor, lift, of_scores, of_values,
                high_of_head, low_of_head, first_of_head,
                T, S, left, right, M, N, DP, DVP, OPERAND, CAUSAL, HAS_LEFT, HAS_RIGHT,
                HAS_BIAS, HAS_DECAY, False, PRECISION, SLOPE, SOLVED, OF_KEYS, OF_VALUES, COLUMN,
            )
        if COLUMN:
            column = column * (tl.exp2(-lift) * sigma_v)
            tl.store(grad_column + pair.to(tl.int64) * S + j, column, mask=j < S)

    rows = key_pair.to(tl.int64) * S + j
    if OF_KEYS:  # sums of dk sigma_k / sigma_v
        dk *= tl.exp2(-lift) * sigma_v / sigma_k
        _put(grad_k, rows, j < S, dk, D, DP)
    if OF_VALUES:
        _put(grad_v, rows, j < S, dv * (tl.exp2(-lift) / of_values), DV, DVP)


@triton.jit
def _put(target, rows, there, values, D: tl.constexpr, DP: tl.constexpr):
    channels = tl.arange(0, DP)
    values = values.to(target.dtype.element_ty)
    mask = there[:, None] & (channels < D)[None, :]
    tl.store(target + (rows * D)[:, None] + channels[None, :], values, mask=mask)
