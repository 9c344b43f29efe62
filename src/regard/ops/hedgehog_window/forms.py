"""The forms of `hedgehog_window_attention`."""

from __future__ import annotations

from typing import Any

from regard.core.dispatch import Form
from regard.core.precision import without_autocast
from regard.core.state import FixedState
from regard.ops.hedgehog_window.call import NAME, Call
from regard.ops.hedgehog_window.chunked import chunked
from regard.ops.hedgehog_window.reference import hedgehog_window_reference


def _chunked(call: Call) -> Any:
    with without_autocast(call.q):
        out, tensors = chunked(call)
        out = out.to(call.q.dtype)
    if tensors is None:
        return out
    length = call.state.length if call.state is not None else 0
    return out, FixedState(NAME, length + call.k.shape[2], tensors)


def _reference(call: Call) -> Any:
    with without_autocast(call.q):
        return hedgehog_window_reference(
            **call.arguments(("chunk_size", "cu_seqlens", "cu_seqlens_k"))
        )


def _reference_refuses(call: Call) -> str | None:
    return None if call.chunk_size is None else "it has no chunks, nothing to do with chunk_size"


FORMS = (
    Form("eager", "chunked", lambda call: None, _chunked),
    Form("reference", "reference", _reference_refuses, _reference, auto=False),
)
