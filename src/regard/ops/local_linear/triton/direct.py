"""The direct solve of small heads: in the place of the mean pass and of conjugate gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.gpu import compiled, interpreting
from regard.ops.local_linear.layout import Inputs
from regard.ops.local_linear.registered import Options
from regard.ops.local_linear.triton import direct_kernels as kernels
from regard.ops.local_linear.triton.table import Config

WIDEST = 16  # channels: at 32 there are 528 pairs, more than eight steps of CG cost
PROGRAMS = 2048  # whose rows' matrices lie in memory at once: 84 MB
EXACT = {True: 1e-4, False: 1e-6}  # residual at which the solve in registers stops
ROWS, WARPS = 8, 1  # of a program of the solve: one warp waits for nobody
CONFIG = Config(64, 64, 4, 4)
INTERPRETED = Config(32, 32, 4, 1)


def serves(inputs: Inputs, options: Options) -> str | None:
    """Why a call is not solved directly, from metadata; None where it is."""
    if not options.direct:
        return "conjugate gradients were asked for"
    if inputs.q.shape[3] > WIDEST:
        return f"a head size of {inputs.q.shape[3]} has too many pairs of channels"
    if inputs.q.dtype == torch.float32 and not interpreting():
        return "the covariance of float32 inputs loses digits to the mean"
    return None


def fit(
    launcher: Any,
    high: bool,
    weights: dict[str, Any],
    mean: Tensor,
    slope: Tensor,
    iterations: Tensor,
    residual: Tensor,
    failed: Tensor,
    config: Config | None = None,
) -> None:
    """Writes top, total, lse (of `weights`, as the mean pass takes them), mean key and g.

    `high` gives the weights 22 bits, not 11.
    """
    inputs, prepared, common = launcher.inputs, launcher.prepared, dict(launcher.common)
    config = config or (INTERPRETED if interpreting() else CONFIG)
    B, H, T, _ = launcher.sizes
    keys = prepared.keys
    heads, length, device = keys.shape[0], prepared.length, keys.device
    wide = torch.empty(heads, length, 128, dtype=keys.dtype, device=device)
    rest = torch.empty(heads, length, 32, dtype=keys.dtype, device=device)
    overflow = prepared.overflow.clone()
    features: Any = kernels.features_kernel
    gather: Any = kernels.gather_kernel
    solve: Any = kernels.solve_kernel
    features[(length // 64, heads)](
        keys, wide, rest, overflow, length, HALF=prepared.half, ROWS=64, **compiled(4)
    )
    tiles, pairs = -(-T // config.rows), B * H
    count = tiles * pairs
    at_once = min(count, PROGRAMS)
    scratch = torch.empty(at_once * config.rows, 160, dtype=torch.float32, device=device)
    shared = {name: common[name] for name in (
        "q", "sigma", "qb", "qh", "qt", "T", "S", "right", "pairs", "H", "HK", "D", "HALF",
        "HAS_RIGHT",
    )}  # fmt: skip
    del common["DP"]
    weights = {name: x for name, x in weights.items() if name not in ("overflow", "failed")}
    ridge = inputs.ridge
    for skip in range(0, count, at_once):
        programs = min(at_once, count - skip)
        here = {"scratch": scratch, "tiles": tiles, "together": pairs, "skip": skip}
        gather[(programs,)](
            **common, **weights, **here, wide=wide, rest=rest, M=config.rows, N=config.keys,
            HIGH=high, DESCRIPTOR=False,
            **compiled(config.warps, config.stages, config.registers),
        )  # fmt: skip
        solve[(programs * (config.rows // ROWS),)](
            **shared, **here, centre=prepared.centre, overflow=overflow, ridge=ridge,
            ridge_b=_step(ridge, 0), ridge_h=_step(ridge, 1), ridge_t=_step(ridge, 2),
            total_in=weights["total_out"], lse_in=weights["lse_out"], mean=mean, slope=slope,
            iterations=iterations, residual=residual, failed=failed,
            tol=EXACT[prepared.half], limit=4 * WIDEST, M=config.rows, ROWS=ROWS,
            ABSOLUTE=inputs.absolute, INTERCEPT=inputs.intercept, **compiled(WARPS),
        )  # fmt: skip


def _step(x: Tensor, axis: int) -> int:
    """The stride of an axis that may be broadcast."""
    return 0 if x.shape[axis] == 1 else x.stride(axis)
