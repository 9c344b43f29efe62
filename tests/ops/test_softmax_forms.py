"""Which form of exact attention serves a call, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import regard
from ops.softmax_calls import INF, operands, tensors
from regard.core.cache import KVCache
from regard.ops.softmax import SoftmaxAux, softmax_attention
from regard.ops.softmax.card import card
from regard.ops.softmax.reference import softmax_reference


def test_auto_takes_the_fused_kernel_only_where_it_is_exact() -> None:
    q, k, v = tensors()
    assert regard.explain(softmax_attention, q, k, v, causal=True).form == "torch_sdpa"
    every = operands(1, q, k)
    for name in ("key_bias", "bias", "log_decay", "softcap", "sinks"):
        explained = regard.explain(softmax_attention, q, k, v, **{name: every[name]})
        assert explained.form == "blockwise", name
        assert explained.reasons["torch_sdpa"]
    assert regard.explain(softmax_attention, q, k, v, return_aux=True).form == "blockwise"
    assert regard.explain(softmax_attention, q, k, v, block_size=2).form == "blockwise"


def test_return_order() -> None:
    q, k, v = tensors()
    out = softmax_attention(q, k, v, impl="eager")
    both, state, aux = softmax_attention(q, k, v, return_state=True, return_aux=True, impl="eager")
    assert torch.equal(out, both)
    assert isinstance(state, KVCache)
    assert isinstance(aux, SoftmaxAux)
    assert softmax_attention(q, k, v, return_aux=True)[1].lse.dtype == torch.float64
    assert card.op is softmax_attention
    assert card.reference is softmax_reference


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": "q"}, TypeError, "q must be a torch.Tensor"),
    ({"k": torch.zeros(2, 2, 7, 5).double()}, ValueError, "k must be of q's head size 4"),
    ({"v": torch.zeros(2, 2, 6, 3).double()}, ValueError, r"v must be \[B, 2, 7, Dv\]"),
    ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
    ({"scale": "a"}, TypeError, "scale must be a number"),
    ({"scale": INF}, ValueError, "scale must be a finite number"),
    ({"scale": torch.ones(3)}, ValueError, r"scale must be of shape \[\] or \[4\]"),
    ({"key_mask": torch.ones(2, 7)}, TypeError, "key_mask must be a bool tensor"),
    ({"key_mask": torch.ones(2, 8).bool()}, ValueError, r"key_mask must be of shape \[2, 7\]"),
    ({"key_bias": torch.ones(2, 3, 7)}, ValueError, r"key_bias must be .*\[2, 1 or 2 or 4, 7\]"),
    ({"log_decay": torch.ones(2, 7)}, ValueError, "log_decay must be of shape"),
    ({"log_decay": torch.ones(2, 1, 7).int()}, TypeError, "log_decay must be a floating-point"),
    ({"bias": torch.ones(7, 6)}, ValueError, r"bias must be of shape \[1 or 7, 1 or 7\]"),
    ({"bias": torch.ones(1, 1, 1, 7, 7)}, ValueError, "bias must be broadcastable to"),
    ({"bias": torch.ones(7, 7).bool()}, TypeError, "bias must be a floating-point tensor"),
    ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor"),
    ({"softcap": 0.0}, ValueError, "softcap must be a finite number above 0"),
    ({"sinks": torch.ones(2)}, ValueError, r"sinks must be of shape \[4\]"),
    ({"window": 3}, TypeError, r"window must be a pair \(left, right\)"),
    ({"window": (-2, 0)}, ValueError, r"window must be a pair \(left, right\)"),
    ({"cu_seqlens": torch.zeros(2)}, TypeError, "cu_seqlens must be an int32 tensor"),
    ({"cu_seqlens_k": torch.zeros(2).int()}, ValueError, "cu_seqlens_k must be given together"),
    ({"cu_seqlens": torch.tensor([0, 7]).int()}, ValueError, "q must be of batch size 1"),
    ({"block_size": 0}, ValueError, "block_size must be an int of at least 1"),
    ({"state": 3}, TypeError, "state must be None or a KVCache"),
    ({"return_state": None}, TypeError, "return_state must be True or False"),
    ({"return_aux": "yes"}, TypeError, "return_aux must be True or False"),
    ({"impl": "eagre"}, ValueError, "impl must be one of .* did you mean 'eager'"),
    ({"impl": "triton"}, ValueError, "impl='triton' cannot serve this call"),
    ({"impl": "native", "softcap": 1.0}, ValueError, "torch's kernel has no softcap"),
    ({"impl": "reference", "block_size": 1}, ValueError, "no blocks to size"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), BAD)
def test_a_bad_argument_is_named(wrong: dict[str, Any], kind: type, message: str) -> None:
    arguments: dict[str, Any] = dict(zip("qkv", tensors(), strict=True)) | wrong
    q, k, v = (arguments.pop(name) for name in "qkv")
    with pytest.raises(kind, match=f"^softmax_attention: .*{message}"):
        softmax_attention(q, k, v, **arguments)


def test_options_that_exclude_packing() -> None:
    q, k, v = tensors(B=1)
    ends = torch.tensor([0, 3, 7], dtype=torch.int32)
    _, state = softmax_attention(q, k, v, return_state=True)
    for options in ({"return_state": True}, {"bias": torch.zeros(7, 7)}, {"state": state}):
        with pytest.raises(ValueError, match=f"softmax_attention: {next(iter(options))} must be"):
            softmax_attention(q, k, v, cu_seqlens=ends, **options)
    with pytest.raises(ValueError, match="cu_seqlens must be non-decreasing from 0"):
        softmax_attention(q, k, v, cu_seqlens=ends - 1)
    with pytest.raises(ValueError, match="cu_seqlens_k must be given when T != S"):
        softmax_attention(q[:, :, :3], k, v, cu_seqlens=ends)


def test_a_state_of_another_shape_is_refused() -> None:
    q, k, v = tensors()
    _, state = softmax_attention(q, k, v, return_state=True)
    with pytest.raises(ValueError, match="softmax_attention: k must be the state's"):
        softmax_attention(q[:1], k[:1], v[:1], state=state)
