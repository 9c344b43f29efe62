"""Exact attention, one length after another: decoding, states, packed sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import pad

import regard
from ops.softmax_calls import FORMS, operands, tensors
from regard.core.budgets import budget, relative_error
from regard.core.cache import KVCache
from regard.core.state import load_state
from regard.ops.softmax import softmax_attention


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("splits", [(1, 6), (4, 2, 1), (0, 7), (3, 0, 4)])
def test_decoding_equals_the_parallel_call(impl: str, splits: tuple[int, ...]) -> None:
    q, k, v = tensors()
    given = operands(5, q, k)
    keys = ("key_mask", "key_bias", "log_decay")
    whole = {n: given[n] for n in ("softcap", "sinks", "scale")} | {"causal": True}
    cut: dict[str, Any] = {n: given[n] for n in keys}
    if impl == "native":
        whole, cut = {"causal": True, "window": (3, 0)}, {"key_mask": given["key_mask"]}
    expected = softmax_attention(q, k, v, **whole, **cut, impl=impl)
    state, outputs, start = None, [], 0
    for length in splits:
        now = slice(start, start + length)
        out, state = softmax_attention(
            q[:, :, now], k[:, :, now], v[:, :, now], **whole,
            **{n: x[:, now] if n == "key_mask" else x[:, :, now] for n, x in cut.items()},
            state=state, return_state=True, impl=impl,
        )  # fmt: skip
        outputs.append(out)
        start += length
    assert state is not None
    assert state.length == 7
    assert relative_error(torch.cat(outputs, 2), expected) < budget(torch.float64, "same")


def test_operands_may_begin_in_the_middle_and_bias_covers_all_keys() -> None:
    q, k, v = tensors()
    decay, bias = -torch.rand(2, 1, 3).double(), torch.randn(7, 7).double()
    _, state = softmax_attention(
        q[:, :, :4], k[:, :, :4], v[:, :, :4], causal=True, return_state=True
    )
    late = softmax_attention(
        q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], causal=True, log_decay=decay, bias=bias[4:],
        state=state,
    )  # fmt: skip
    decay = pad(decay, (4, 0))
    whole = softmax_attention(q, k, v, causal=True, log_decay=decay, bias=bias)
    assert relative_error(late, whole[:, :, 4:]) < 1e-13


def test_states_fork_crop_select_and_survive_a_file(tmp_path: Any) -> None:
    q, k, v = tensors()
    decay = -torch.rand(2, 4, 7).double()

    def step(state: KVCache | None, now: slice, rows: Any = slice(None)) -> Any:
        return softmax_attention(
            q[rows, :, now], k[rows, :, now], v[rows, :, now], causal=True,
            log_decay=decay[rows, :, now], state=state, return_state=True,
        )  # fmt: skip

    whole = softmax_attention(q, k, v, causal=True, log_decay=decay)
    _, state = step(None, slice(0, 5))
    same = budget(torch.float64, "same")
    state.save(tmp_path / "state.safetensors")
    restored = load_state(tmp_path / "state.safetensors")
    for candidate in (state.fork(), restored):
        assert relative_error(step(candidate, slice(5, 7))[0], whole[:, :, 5:]) < same
    assert relative_error(step(state.crop(3), slice(3, 7))[0], whole[:, :, 3:]) < same
    swapped, _ = step(state.select(torch.tensor([1, 0])), slice(5, 7), [1, 0])
    assert relative_error(swapped, whole[[1, 0], :, 5:]) < same
    step(state, slice(5, 7))
    with pytest.raises(ValueError, match="softmax_attention: this state .* already continued"):
        step(state, slice(5, 7))


def test_asking_which_form_runs_leaves_the_state_alone() -> None:
    q, k, v = tensors()
    _, state = softmax_attention(q, k, v, return_state=True)
    explained = regard.explain(softmax_attention, q, k, v, state=state)
    assert explained.form == "torch_sdpa"
    softmax_attention(q, k, v, state=state)


def test_gradients_flow_through_the_state() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    whole = softmax_attention(q, k, v, causal=True)
    want = torch.autograd.grad(whole.square().sum(), (q, k, v))
    first, state = softmax_attention(
        q[:, :, :4], k[:, :, :4], v[:, :, :4], causal=True, return_state=True
    )
    last = softmax_attention(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], causal=True, state=state)
    got = torch.autograd.grad(torch.cat([first, last], 2).square().sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < budget(torch.float64, "gradient")


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_equals_separate(impl: str, causal: bool) -> None:
    q, k, v = tensors(B=1, T=9, S=12, Dv=4)
    ends_q, ends_k = torch.tensor([0, 4, 4, 6, 9]), torch.tensor([0, 6, 8, 8, 12])
    options: dict[str, Any] = {"causal": causal, "impl": impl}
    keys: dict[str, Any] = {"key_mask": torch.rand(1, 12) < 0.8}
    if impl != "native":
        options |= {"return_aux": True, "sinks": torch.randn(4).double()}
        keys |= {"key_bias": torch.randn(1, 1, 12), "log_decay": -torch.rand(1, 2, 12)}
    result = softmax_attention(
        q, k, v, **options, **keys, cu_seqlens=ends_q.int(), cu_seqlens_k=ends_k.int()
    )
    packed = result if impl == "native" else torch.cat([result[0], result[1].lse[..., None]], 3)
    for n in range(4):
        t, s = (slice(int(e[n]), int(e[n + 1])) for e in (ends_q, ends_k))
        own = {n: x[:, s] if n == "key_mask" else x[:, :, s] for n, x in keys.items()}
        one = softmax_attention(q[:, :, t], k[:, :, s], v[:, :, s], **options, **own)
        one = one if impl == "native" else torch.cat([one[0], one[1].lse[..., None]], 3)
        assert torch.equal(packed[:, :, t], one)


def test_no_sequences_at_all_are_a_packed_call_too() -> None:
    q, k, v = tensors(B=1, T=0, S=0)
    out, aux = softmax_attention(
        q, k, v, cu_seqlens=torch.zeros(1, dtype=torch.int32), return_aux=True
    )
    assert out.shape == (1, 4, 0, 3)
    assert aux.lse.shape == (1, 4, 0)
