"""Where each Triton form was run on the device itself against float64: data, not code."""

from __future__ import annotations

from typing import NamedTuple

import torch

from regard.gpu.availability import capability

HALVES = ("bfloat16", "float16")
ALL = (*HALVES, "float32")


class Verified(NamedTuple):
    """One run that passed: which form, on what, for which dtypes and head sizes D and Dv.

    Sizes between those that were run are padded up to them inside, so that the largest counts.
    """

    form: str
    capability: str
    dtypes: tuple[str, ...]
    largest: int


VERIFIED: tuple[Verified, ...] = (
    # docs/gpu.md: the contract suite; docs/performance_notes.md: accuracy by kind of keys.
    Verified("local_linear", "sm_90", HALVES, 128),
    # The contract suite, random calls, and errors of long calls beside their times.
    Verified("linear", "sm_90", ("bfloat16",), 128),
    Verified("linear", "sm_90", ("float16",), 64),
    # Maps of two blocks, by the width of one: errors and gradients against float64 on the device.
    Verified("linear_twofold", "sm_90", ("bfloat16",), 128),
    Verified("linear_delta", "sm_90", ("bfloat16",), 128),
    Verified("linear_delta", "sm_90", ("float16",), 64),
    # The contract suite; docs/performance_notes.md: errors beside what rounding the inputs does.
    Verified("mesa", "sm_90", ("bfloat16",), 128),
    # The contract suite; levels, lists and windows at 700 and 2,000 tokens, gradients included.
    Verified("block_sparse", "sm_90", ALL, 128),
)


def unverified(form: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why `auto` does not take a form, although it could run; None where it was verified.

    >>> unverified("local_linear", torch.device("cpu"), torch.float32, 64)
    'local_linear was not verified on interpreter with float32, head size 64'
    """
    here, name = capability(device), str(dtype).removeprefix("torch.")
    for row in VERIFIED:
        known = row.form == form and row.capability == here and name in row.dtypes
        if known and head_size <= row.largest:
            return None
    return f"{form} was not verified on {here} with {name}, head size {head_size}"
