"""The forms of softmax attention, the fastest first."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.decay import DecaySums
from regard.core.dispatch import Form
from regard.ops.softmax import blockwise, native, sdpa, triton
from regard.ops.softmax.call import Call, Problem
from regard.ops.softmax.reference import softmax_reference


def _serves_everything(call: Call) -> str | None:
    return None


def _refuse_reference(call: Call) -> str | None:
    return None if call.block_size is None else "the reference has no blocks to size"


def _refuse_tiles(call: Call) -> str | None:
    reason = native.refuse(call)
    if reason is None and not native.faster(call) and sdpa.refuse(call) is None:
        return "torch's kernel is faster here"
    return reason


def _run_reference(problem: Problem) -> tuple[Tensor, Tensor]:
    sees = problem.sees
    return softmax_reference(  # type: ignore[return-value]
        problem.q,
        problem.k,
        problem.v,
        causal=sees.causal,
        scale=problem.scale,
        key_mask=sees.key_mask,
        key_bias=sees.key_bias,
        bias=sees.bias,
        log_decay=None if sees.decay is None else _steps(sees.decay),
        softcap=problem.softcap,
        sinks=problem.sinks,
        window=sees.window,
        return_aux=True,
    )


def _steps(decay: DecaySums) -> Tensor:
    """The log decays whose running sums these are: a cache keeps only the sums."""
    sums, first = decay
    forgets = first == torch.arange(sums.shape[2], device=sums.device)
    return torch.where(forgets, -torch.inf, torch.nn.functional.pad(sums.diff(dim=2), (1, 0)))


def _refuse_triton(call: Call) -> str | None:
    if sdpa.refuse(call) is None:
        return "torch's kernel serves this call"
    return triton.refuse_unverified(call)


FORMS = (
    Form("triton", "triton", _refuse_triton, triton.attend),
    Form("triton", "triton unverified", triton.refuse, triton.attend, auto=False),
    Form("native", "tiles", _refuse_tiles, native.attend),
    Form("native", "torch_sdpa", sdpa.refuse, sdpa.attend),
    Form("eager", "blockwise", _serves_everything, blockwise.attend),
    Form("reference", "reference", _refuse_reference, _run_reference, auto=False),
)
