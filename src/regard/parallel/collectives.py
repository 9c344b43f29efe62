"""The two collectives that everything here is made of, as any torch since 2.11 names them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any  # torch.distributed.ProcessGroup, or None for all ranks


def place(op: str, group: Group) -> tuple[int, int]:
    """The rank of this process in the group, and how many there are."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"{op}: torch.distributed is not initialised; start the processes with torchrun and "
            "call torch.distributed.init_process_group first"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"{op}: group must contain this process, got one that does not")
    return rank, dist.get_world_size(group)


def gather(tensors: Sequence[Tensor], group: Group) -> list[list[Tensor]]:
    """`gather(tensors, group)[p][i]` is tensor i of rank p: one collective for all of them.

    They have the same shapes on every rank, one dtype and one device.
    """
    size = dist.get_world_size(group)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    found = flat.new_empty(size * flat.numel())
    _named("all_gather_single", "all_gather_into_tensor")(found, flat, group=group)
    counts = [math.prod(tensor.shape) for tensor in tensors]
    return [
        [part.view(like.shape) for part, like in zip(row.split(counts), tensors, strict=True)]
        for row in found.view(size, -1)
    ]


def sum_and_scatter(x: Tensor, group: Group) -> Tensor:
    """x [ranks * n, ...] on every rank -> the sum over ranks of this rank's n rows."""
    size = dist.get_world_size(group)
    x = x.contiguous()
    found = x.new_empty(x.shape[0] // size, *x.shape[1:])
    _named("reduce_scatter_single", "reduce_scatter_tensor")(found, x, group=group)
    return found


def lengths(length: int, like: Tensor, group: Group) -> list[int]:
    """The number that each rank brings, on the host: a GPU waits for it."""
    own = torch.tensor([length], dtype=torch.int64, device=like.device)
    return [int(row[0]) for row in gather([own], group)]


def _named(name: str, before: str) -> Callable[..., Any]:
    return getattr(dist, name, None) or getattr(dist, before)
