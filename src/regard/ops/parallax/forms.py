"""The forms of Parallax: the engine of local linear attention with a given probe, the reference."""

from __future__ import annotations

import torch

from regard.core.dispatch import Form
from regard.ops.local_linear import native, triton
from regard.ops.local_linear.forms import Answer, Call, run_eager
from regard.ops.parallax.reference import parallax_attention_reference

OP = "parallax_attention"


def _reference(call: Call) -> Answer:
    out = parallax_attention_reference(
        call.q, call.probe, call.k, call.v, causal=call.causal, scale=call.scale,  # type: ignore[arg-type]
        key_mask=call.key_mask, key_bias=call.key_bias, log_decay=call.log_decay,
        window=call.window,
    )
    rows = torch.zeros_like(out[..., 0])  # what a solver would tell: nothing here
    return out, rows, torch.zeros_like(call.q), rows, rows


def _reference_refuses(call: Call) -> str | None:
    if call.block_size:
        return "it has no blocks, nothing to do with block_size"
    return "it keeps no state" if call.stateful else None


FORMS = (
    *triton.FORMS,
    Form("native", "native", native.refuse, native.serve),
    Form("eager", "blockwise", lambda call: None, run_eager),
    Form("reference", "reference", _reference_refuses, _reference, auto=False),
)
