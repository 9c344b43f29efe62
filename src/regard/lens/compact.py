"""Attention weights made small: on a coarser grid of patches, and in one byte each."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

LEVELS = 255


def coarse_grid(grid: tuple[int, int], factor: int) -> tuple[int, int]:
    """Rows and columns of blocks of `factor` x `factor` patches, the last ones perhaps smaller.

    >>> coarse_grid((14, 9), 4)
    (4, 3)
    """
    return -(-grid[0] // factor), -(-grid[1] // factor)


def coarse_weights(
    weights: Float[Tensor, "*m t t"], grid: tuple[int, int], prefix: int = 1, factor: int = 2
) -> Float[Tensor, "*m s s"]:
    """Weights between blocks of patches: mean over the queries of a block, sum over its keys.

    Rows that sum to one still do. Prefix tokens stay as they are; a factor of 1 changes nothing.

    Raises:
        ValueError: weights that do not fit the grid, a factor below 1.

    >>> coarse_weights(torch.full((4, 4), 0.25), (2, 2), 0, 2)
    tensor([[1.]])
    """
    tokens = prefix + grid[0] * grid[1]
    if weights.ndim < 2 or weights.shape[-2:] != (tokens, tokens):
        raise ValueError(
            f"coarse_weights: weights must be [..., {tokens}, {tokens}] (grid {grid[0]} x "
            f"{grid[1]}, {prefix} prefix tokens), got {tuple(weights.shape)}"
        )
    if factor < 1:
        raise ValueError(f"coarse_weights: factor must be at least 1, got {factor}")
    if factor == 1:
        return weights
    columns = coarse_grid(grid, factor)[1]
    row, column = torch.arange(grid[0]) // factor, torch.arange(grid[1]) // factor
    block = (row[:, None] * columns + column).flatten() + prefix
    place = torch.cat([torch.arange(prefix), block]).to(weights.device)
    members = torch.nn.functional.one_hot(place).to(weights.dtype)  # [T, S]
    return (members / members.sum(0)).mT @ weights @ members


def as_bytes(
    weights: Float[Tensor, "*m s"],
) -> tuple[UInt8[NDArray[np.uint8], "*m s"], Float[NDArray[np.float32], "*m"]]:
    """Each row as bytes b and its largest weight m: weights are m (b / 255)^2.

    The square lets small weights keep digits. Precision: within m / 255 of a row's weights, and
    m / 65025 / 4 near zero.

    >>> codes, most = as_bytes(torch.tensor([[0.0, 0.25, 1.0]]))
    >>> codes.tolist(), most.tolist()
    ([[0, 128, 255]], [1.0])
    """
    most = weights.amax(-1)
    share = weights / most[..., None].clamp_min(torch.finfo(weights.dtype).tiny)
    codes = (share.clamp(0, 1).sqrt() * LEVELS).round().to(torch.uint8)
    return codes.cpu().numpy(), most.float().cpu().numpy()


def from_bytes(
    codes: UInt8[NDArray[np.uint8], "*m s"], most: Float[NDArray[np.float32], "*m"]
) -> NDArray[np.float32]:
    """The weights that `as_bytes` was given, to its precision.

    >>> from_bytes(np.array([255, 0], np.uint8), np.float32(0.5)).tolist()
    [0.5, 0.0]
    """
    share = np.square(codes.astype(np.float32) / np.float32(LEVELS))
    return share * np.asarray(most, np.float32)[..., None]
