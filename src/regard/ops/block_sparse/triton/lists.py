"""From a plan to lists of blocks, on the device: no size of it is asked by the host.

The list of a block of queries names the blocks of keys that it attends to (or, transposed, that of
a block of keys the blocks of queries that attend to it), as 16 block + level, in eight parts one
after another, in the order of the plan within each:

    0..3   level 1, 2, 4, 8: blocks of which every query sees every row
    4..7   level 1, 2, 4, 8: the others, where position or the end of a sequence cuts something off

`ends` [lists, 8] has where each part ends, counted from the beginning of its list. A level that
there is not, an index outside of the blocks and what no query of the block sees are left out.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.ops.block_sparse.triton.tile import positions_of


@triton.jit
def _parts(
    level, i, j, T, S, left, right,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The part in which blocks i of queries and j of keys stand; 8 is none."""
    wide = tl.maximum(level, 1)
    known = (level == 1) | (level == 2) | (level == 4) | (level == 8)
    known = known & (BLOCK_K % wide == 0)
    part = (level > 1).to(tl.int32) + (level > 2).to(tl.int32) + (level > 4).to(tl.int32)
    first = j * BLOCK_K
    end = tl.minimum(first + BLOCK_K, S)
    low, high = positions_of(i, T, S, BLOCK_Q)
    clear = (i + 1) * BLOCK_Q <= T if TRANSPOSED else first + BLOCK_K <= S
    if HAS_RIGHT:
        known = known & (tl.minimum(first + wide, end) - 1 <= high + right)
        clear = clear & (end - 1 <= low + right)
    if HAS_LEFT:
        known = known & (first + (end - 1 - first) // wide * wide >= low - left)
        clear = clear & (first >= high - left)
    part += tl.where(clear, 0, 4)
    return tl.where(known, part, 8)


@triton.jit
def _blocks(
    plan, codes, row, x, begin, stop, sr, sx, blocks, nq,
    MAP: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The other block and the level of entries x of a list; level 0 where there is none."""
    inside = x < stop
    if MAP:
        other = x
        level = tl.load(plan + row * sr + x.to(tl.int64) * sx, mask=inside, other=0).to(tl.int32)
    elif TRANSPOSED:  # codes of one key block: key * nq + query
        code = tl.load(codes + x, mask=inside, other=0)
        other = (code % nq).to(tl.int32)
        level = inside.to(tl.int32)
    else:  # sorted indices
        found = tl.load(plan + row * sr + x.to(tl.int64) * sx, mask=inside, other=-1)
        before = tl.load(
            plan + row * sr + (x.to(tl.int64) - 1) * sx, mask=inside & (x > begin), other=-1
        )
        new = (found >= 0) & (found < blocks) & (found != before)
        other = tl.where(new, found, 0).to(tl.int32)
        level = new.to(tl.int32)
    return other, level


@triton.jit
def _entries(
    plan, codes, row, x, begin, stop, sr, sx, blocks, nq, T, S, left, right,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, MAP: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The other block, the level and the part of entries x of a list."""
    other, level = _blocks(plan, codes, row, x, begin, stop, sr, sx, blocks, nq, MAP, TRANSPOSED)
    own = (row + other * 0).to(tl.int32)
    query = other if TRANSPOSED else own
    key = own if TRANSPOSED else other
    part = _parts(level, query, key, T, S, left, right, BLOCK_Q, BLOCK_K, HAS_LEFT, HAS_RIGHT,
                  TRANSPOSED)  # fmt: skip
    return other, level, part


@triton.jit
def _ones(part):
    """1 in the byte of its part, so that one sum counts all eight; of 128 entries at most."""
    one = tl.full([1], 1, tl.int64) << (8 * (part & 7)).to(tl.int64)
    return tl.where(part < 8, one, 0)


@triton.jit
def _list(
    program, plan, codes, offsets, entries, ends, pooled,
    sp, sr, sx, T, S, left, right, rows, width, blocks, nq,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, MAP: tl.constexpr, TRANSPOSED: tl.constexpr, POOLED: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One list: of row `program % rows` of head `program // rows` of the plan."""
    head = (program // rows).to(tl.int64)
    row = (program % rows).to(tl.int64)
    plan += head * sp
    begin = 0
    stop = width
    if not MAP and TRANSPOSED:
        codes += head * width
        entries += head * width
        begin = tl.load(offsets + head * (rows + 1) + row).to(tl.int32)
        stop = tl.load(offsets + head * (rows + 1) + row + 1).to(tl.int32)
        entries += begin
    else:
        entries += (head * rows + row) * width
    parts = tl.arange(0, 8)
    counts = tl.zeros([8], tl.int32)
    fields = (8 * parts).to(tl.int64)
    for start in tl.range(begin, stop, CHUNK):
        x = start + tl.arange(0, CHUNK)
        other, level, part = _entries(
            plan, codes, row, x, begin, stop, sr, sx, blocks, nq, T, S, left, right,
            BLOCK_Q, BLOCK_K, HAS_LEFT, HAS_RIGHT, MAP, TRANSPOSED,
        )  # fmt: skip
        counts += ((tl.sum(_ones(part), 0) >> fields) & 255).to(tl.int32)
    upto = tl.cumsum(counts, 0)
    tl.store(ends + program.to(tl.int64) * 8 + parts, upto)
    if POOLED:
        tl.store(pooled + program, tl.sum(tl.where((parts % 4) > 0, counts, 0), 0))
    at = upto - counts
    for start in tl.range(begin, stop, CHUNK):
        x = start + tl.arange(0, CHUNK)
        other, level, part = _entries(
            plan, codes, row, x, begin, stop, sr, sx, blocks, nq, T, S, left, right,
            BLOCK_Q, BLOCK_K, HAS_LEFT, HAS_RIGHT, MAP, TRANSPOSED,
        )  # fmt: skip
        running = tl.cumsum(_ones(part), 0)
        before = ((running >> (8 * part).to(tl.int64)) & 255).to(tl.int32) - 1
        of_part = tl.sum(tl.where(part[:, None] == parts[None, :], at[None, :], 0), 1)
        tl.store(entries + of_part + before, other * 16 + level, mask=part < 8)
        at += ((tl.sum(_ones(part), 0) >> fields) & 255).to(tl.int32)


@triton.jit(do_not_specialize=["T", "S", "left", "right", "lists", "width", "wide", "blocks", "nq"])
def lists_kernel(
    plan, codes, offsets, entries, ends, pooled, turned, turned_ends,
    sp, sr, sx, T, S, left, right, lists, width, wide, blocks, nq,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, MAP: tl.constexpr, BOTH: tl.constexpr, POOLED: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One list: the first `lists` programs those of queries, others, with BOTH, those of keys.

    Entries of a map or of sorted indices stand at [., rows, width]; those of a transposed list of
    indices where its codes are, [offsets[row], offsets[row + 1]) of [., wide]. `pooled`, of a list
    of queries: how many blocks it has that are not of level 1.
    """
    program = tl.program_id(0)
    if program < lists:
        _list(
            program, plan, codes, offsets, entries, ends, pooled,
            sp, sr, sx, T, S, left, right, nq, width, blocks, nq,
            BLOCK_Q, BLOCK_K, HAS_LEFT, HAS_RIGHT, MAP, False, POOLED, CHUNK,
        )  # fmt: skip
    elif BOTH:
        _list(
            program - lists, plan, codes, offsets, turned, turned_ends, pooled,
            sp, sx, sr, T, S, left, right, blocks, wide, blocks, nq,
            BLOCK_Q, BLOCK_K, HAS_LEFT, HAS_RIGHT, MAP, True, False, CHUNK,
        )  # fmt: skip
