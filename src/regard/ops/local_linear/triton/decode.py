"""Decoding: few queries per key head, one pass over a cache that is read as it lies.

Which kernels run, with which splits, follows from sizes of one sequence only, so that a row's
bits do not depend on the batch around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.gpu import compiled, precision
from regard.ops.local_linear.blockwise import Result, empty_result
from regard.ops.local_linear.layout import Inputs
from regard.ops.local_linear.registered import Options

# Every query of every head has covariances of its own: with more queries, conjugate gradients
# over tiles of them cost less. Averages have none: as many rows of a key head as one tile holds.
MOST_QUERIES = 8
MOST_ROWS = 64
FEWEST_KEYS = 256  # of a split
MOST_SPLITS = 128
MERGED = 8192  # sums, of all splits, that one program merges


@dataclass(frozen=True)
class Cut:
    """How the pass over the keys is cut: keys per tile, warps, stages; parts 2: C and Cv apart.

    `programs` is how many a sequence is split into: what an H100 holds at once.
    """

    keys: int
    warps: int
    stages: int
    programs: int = 256
    parts: int = 1
    lazy: bool = True
    registers: int | None = None  # at most, per thread


def cut_of(D: int, Dv: int, half: bool, solved: bool) -> Cut:
    """Of the pass over the keys, by padded head sizes."""
    wide = max(D, Dv)
    if not solved:
        return Cut(64, 4, 3) if half else Cut(32, 8, 2 if wide <= 64 else 1)
    if half:
        return Cut(64, 4, 4) if wide <= 64 else Cut(64, 8, 3, programs=128)
    if Dv != D:
        return Cut(16, 8, 1, programs=128)
    return Cut(32, 8, 2 if wide <= 64 else 1, programs=128, parts=2)


def serves(inputs: Inputs) -> str | None:
    """Why these kernels do not take a call, from metadata; None where they do."""
    T, D, Dv = inputs.q.shape[2], inputs.q.shape[3], inputs.v.shape[3]
    rows = T * inputs.group
    if inputs.average or inputs.probe is not None:
        if rows > MOST_ROWS:
            return f"{rows} queries share a key head, more than {MOST_ROWS}"
    elif T > MOST_QUERIES:
        return f"there are {T} queries, more than {MOST_QUERIES}"
    if max(D, Dv) > 128:
        return f"a head size of {max(D, Dv)} is above 128"
    if inputs.covariance_block or inputs.wide:
        return "covariance blocks and float64 are for the eager form"
    return None


def half_operands(inputs: Inputs) -> bool:
    """Whether products round to 16 bits.

    An absolute ridge may be a thousandth of what rounding leaves in a covariance.
    """
    return inputs.q.dtype != torch.float32 and not inputs.absolute


def splits_of(T: int, S: int, reach: tuple[int, int], most: int) -> tuple[int, int]:
    """How many splits, at `most`, the keys of a row are cut into, and how many keys each has."""
    left, right = reach
    span = S if left < 0 or right < 0 else min(S, left + 1 + right + T)
    splits = max(1, min(most, MOST_SPLITS, span // FEWEST_KEYS))
    chunk = -(-span // splits)
    chunk = -(-chunk // 128) * 128
    return max(1, -(-span // chunk)), chunk


def padded(size: int) -> int:
    """The power of two that kernels pad a head size to."""
    return max(16, 1 << (size - 1).bit_length())


def decode(
    inputs: Inputs, options: Options, cut: Cut | None = None, splits: int = 0
) -> tuple[Result, Tensor]:
    """The results of the registered op for a call that `serves` takes, and which rows failed.

    `cut` and `splits` are for measurements; they change results by rounding only.
    """
    result = _room(inputs)
    new = {"dtype": torch.int8, "device": result.lse.device}
    if inputs.q.numel() == 0 or inputs.k.shape[2] == 0:
        return result, torch.zeros(result.lse.shape, **new)
    if inputs.average or inputs.probe is not None:
        _Pass(inputs, cut, splits).average(result)
        return result, torch.zeros(result.lse.shape, **new)
    failed = torch.empty(result.lse.shape, **new)
    _Pass(inputs, cut, splits).solve(result, failed, options)
    return result, failed


def _room(inputs: Inputs) -> Result:
    """Memory for the results, set where no kernel does it."""
    if inputs.q.numel() == 0 or inputs.k.shape[2] == 0:
        result = empty_result(inputs)
        if inputs.probe is not None:
            result.slope.copy_(inputs.probe)
        return result
    q = inputs.q
    rows, fresh = q.shape[:3], {"device": q.device, "dtype": torch.float32}
    out = torch.empty(*rows, inputs.v.shape[3], device=q.device, dtype=q.dtype)
    lse = torch.empty(rows, **fresh)
    if inputs.average or inputs.probe is not None:
        slope = torch.zeros(q.shape, **fresh)
        if inputs.probe is not None:
            slope.copy_(inputs.probe)
        steps = torch.zeros(rows, device=q.device, dtype=torch.int32)
        return Result(out, slope, lse, steps, torch.zeros(rows, **fresh))
    steps = torch.empty(rows, device=q.device, dtype=torch.int32)
    return Result(out, torch.empty(q.shape, **fresh), lse, steps, torch.empty(rows, **fresh))


class _Pass:
    """One call on its way through the kernels: operands as they lie, and how they are cut."""

    def __init__(self, inputs: Inputs, cut: Cut | None, splits: int) -> None:
        self.inputs = inputs
        self.q, self.k, self.v = (_near(x) for x in (inputs.q, inputs.k, inputs.v))
        B, H, T, D = self.q.shape
        S, Dv = self.k.shape[2], self.v.shape[3]
        self.DP, self.DVP = padded(D), padded(Dv)
        self.half = half_operands(inputs)
        self.solved = not inputs.average and inputs.probe is None
        # As Triton 3.6 compiles 64 channels of keys and 16 of values, an H100 finds wrong results.
        if self.half and self.solved and self.DP >= 64:
            self.DVP = max(self.DVP, 64)
        self.cut = cut or cut_of(self.DP, self.DVP, self.half, self.solved)
        members = T * inputs.group
        self.M = min(64, max(16, 1 << (members - 1).bit_length()))
        self.tiles = -(-members // self.M)
        walks = H * T * self.cut.parts if self.solved else inputs.k.shape[1] * self.tiles
        left, right = reach = inputs.visibility.reach
        self.splits, self.chunk = splits_of(T, S, reach, self.cut.programs // walks)
        if splits:
            self.splits, self.chunk = splits, -(-S // splits)
        self.rows = B * H * T
        self.sizes = {
            "H": H, "T": T, "S": S, "GROUP": inputs.group, "LEFT": left, "RIGHT": right,
            "SPLITS": self.splits, "D": D, "DV": Dv, "DP": self.DP, "DVP": self.DVP,
            "CAUSAL": inputs.causal,
        }
        self.operands = self._operands()

    def _operands(self) -> tuple[dict[str, Any], dict[str, Any]]:
        inputs, H = self.inputs, self.q.shape[1]
        mask, bias, decay = inputs.key_mask, inputs.key_bias, inputs.decay
        sums, first = (None, None) if decay is None else decay
        if sums is not None and first is not None and sums.stride() != first.stride():
            sums, first = sums.contiguous(), first.contiguous()
        return {
            "Q": self.q, "K": self.k, **_strides("q", self.q, 3), **_strides("k", self.k, 3),
            "MASK": None if mask is None else mask.view(torch.int8),
            "mask_batch": 0 if mask is None else mask.stride(0),
            "mask_key": 0 if mask is None else mask.stride(1), "HAS_MASK": mask is not None,
            "FIRST": first, "HAS_DECAY": decay is not None, **_shared("decay", sums, H),
            "SCALE": inputs.scale, **_strides("scale", inputs.scale, 2),
        }, {
            "V": self.v, **_strides("v", self.v, 3), "SUMS": sums,
            "BIAS": bias, "HAS_BIAS": bias is not None, **_shared("bias", bias, H),
        }

    def _gather(self, kernel: Any, programs: int, width: int, facts: int, **extra: Any) -> Any:
        """The pass over the keys: partial sums, and the facts of each row and split."""
        cut, fresh = self.cut, {"device": self.q.device, "dtype": torch.float32}
        partial = torch.empty(self.rows * self.splits, width, **fresh)
        stats = torch.empty(self.rows * self.splits, facts, **fresh)
        kernel[(programs * self.splits,)](
            PARTIAL=partial, STATS=stats, CHUNK=self.chunk, N=cut.keys, STAGES=cut.stages,
            PRECISION=precision(self.half),
            **self.sizes, **self.operands[0], **self.operands[1], **extra,
            **compiled(cut.warps, cut.stages, cut.registers),
        )  # fmt: skip
        return partial, stats

    def solve(self, result: Result, failed: Tensor, options: Options) -> None:
        """Covariances, their merge, and conjugate gradients on them."""
        from regard.ops.local_linear.triton import decode_kernels as kernels

        inputs, cut, solver = self.inputs, self.cut, options.solver(self.q.shape[3])
        size = (self.DP + self.DVP) * (self.DP + 1)
        partial, stats = self._gather(
            kernels.gather, self.rows * cut.parts, size, 2, INTERCEPT=inputs.intercept,
            HALF=self.half, LAZY=cut.lazy, PARTS=cut.parts,
            RANKS=cut.warps * 32 * (8 if self.half else 4),
        )
        SP, merged = 1 << (self.splits - 1).bit_length(), partial
        if self.splits > 1:
            merged = torch.empty(self.rows, size, device=self.q.device, dtype=torch.float32)
            merge: Any = kernels.merge
            piece = MERGED // SP
            merge[(self.rows, -(-size // piece))](
                partial, stats, merged, self.splits, size, SP=SP, E=piece, **compiled(4)
            )
        row_bias = inputs.row_bias
        solve: Any = kernels.solve
        solve[(self.rows,)](
            MERGED=merged, STATS=stats, RIDGE=inputs.ridge, **_strides("ridge", inputs.ridge, 3),
            ROW_BIAS=row_bias, HAS_ROW_BIAS=row_bias is not None, **_strides("bias", row_bias, 3),
            OUT=result.out, SLOPE=result.slope, LSE=result.lse, ITERATIONS=result.iterations,
            RESIDUAL=result.residual, FAILED=failed, TOL=float(solver.tol),
            MAX_ITERS=solver.max_iters, SP=SP, INTERCEPT=inputs.intercept,
            ABSOLUTE=inputs.absolute, HALF=self.half, **self.sizes, **self.operands[0],
            **compiled(4 if self.DP <= 64 else 8),
        )  # fmt: skip

    def average(self, result: Result) -> None:
        """Softmax attention, or weights tilted by a given g."""
        from regard.ops.local_linear.triton import average_kernels as kernels

        inputs = self.inputs
        g = None if inputs.probe is None else _near(inputs.probe)
        given = g is not None
        partial, stats = self._gather(
            kernels.gather_average,
            self.q.shape[0] * self.k.shape[1] * self.tiles, self.DVP * (1 + given), 3,
            G=g, **_strides("g", g, 3), TILES=self.tiles, M=self.M, GIVEN=given,
            SPLIT_G=g is not None and self.half and g.dtype != self.q.dtype,
        )  # fmt: skip
        row_bias, sizes = inputs.row_bias, self.sizes
        finish: Any = kernels.finish
        finish[(self.rows,)](
            partial, stats, row_bias, result.out, result.lse, sizes["H"], sizes["T"],
            sizes["GROUP"], self.splits, *_strides("bias", row_bias, 3).values(),
            DV=sizes["DV"], DVP=self.DVP, SP=1 << (self.splits - 1).bit_length(), GIVEN=given,
            HAS_ROW_BIAS=row_bias is not None, **compiled(4),
        )  # fmt: skip


_AXES = {2: ("batch", "head"), 3: ("batch", "head", "token")}


def _strides(name: str, x: Tensor | None, axes: int) -> dict[str, int]:
    """Strides of leading axes that may broadcast, by the names that kernels have for them."""
    return {
        f"{name}_{axis}": 0 if x is None or x.shape[i] == 1 else x.stride(i)
        for i, axis in enumerate(_AXES[axes])
    }


def _shared(name: str, x: Tensor | None, heads: int) -> dict[str, int]:
    """Strides of a key-side operand [B, 1 | Hk | H, S], and query heads per head of it."""
    batch, head, key = (0, 0, 0) if x is None else x.stride()
    share = 1 if x is None else heads // x.shape[1]
    named = {"batch": batch, "head": head, "key": key, "share": share}
    return {f"{name}_{axis}": value for axis, value in named.items()}


def _near(x: Tensor) -> Tensor:
    """With its channels side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
