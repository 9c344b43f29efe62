"""Packed sequences: what is refused, and that packed equals separate in value and gradient."""

from __future__ import annotations

import re

import pytest
import torch

from regard.core.checks import Sizes
from regard.core.packed import Span, check_packed, run_packed, spans


def ends(*values):
    return torch.tensor(values, dtype=torch.int32)


def sizes(B=1, T=6, S=6):
    return Sizes(B, 2, 2, T, S, 4, 4)


def test_good_metadata_is_accepted():
    check_packed("op", None, None, sizes(B=3, T=2))
    check_packed("op", ends(0, 2, 6), None, sizes())
    check_packed("op", ends(0, 2, 6), ends(0, 1, 4), sizes(S=4))
    check_packed("op", ends(0), None, sizes(T=0, S=0))


@pytest.mark.parametrize(
    ("kind", "q", "k", "shape", "state", "text"),
    [
        (ValueError, None, ends(0, 6), {}, None, "cu_seqlens_k must be given together with"),
        (TypeError, ends(0, 6).long(), None, {}, None, "cu_seqlens must be an int32 tensor"),
        (TypeError, [0, 6], None, {}, None, "cu_seqlens must be an int32 tensor"),
        (TypeError, ends(0, 6)[None], None, {}, None, "cu_seqlens must be an int32 tensor"),
        (TypeError, ends(), None, {}, None, "cu_seqlens must be an int32 tensor"),
        (TypeError, ends(0, 6), ends(0, 6).float(), {}, None, "cu_seqlens_k must be an int32"),
        (ValueError, ends(0, 6), ends(0, 1, 6), {}, None, "cu_seqlens_k must be of cu_seqlens' "),
        (ValueError, ends(0, 6), None, {"S": 4}, None, "cu_seqlens_k must be given when T != S"),
        (ValueError, ends(0, 6), None, {"B": 2}, None, "q must be of batch size 1 with packed"),
        (ValueError, ends(0, 6), None, {}, object(), "state must be None with packed sequences"),
    ],
)
def test_bad_metadata_is_refused(kind, q, k, shape, state, text):
    with pytest.raises(kind, match=f"op: {text}"):
        check_packed("op", q, k, sizes(**shape), state)


def test_spans():
    assert spans("op", ends(0, 2, 2, 6), None, sizes()) == [
        Span(0, 2, 0, 2), Span(2, 2, 2, 2), Span(2, 6, 2, 6),
    ]  # fmt: skip
    assert spans("op", ends(0, 6), ends(0, 4), sizes(S=4)) == [Span(0, 6, 0, 4)]
    assert spans("op", ends(0), None, sizes(T=0, S=0)) == []


@pytest.mark.parametrize("bad", [(1, 6), (0, 5), (0, 7), (0, 4, 2, 6), (0,)])
def test_boundaries_must_rise_from_zero_to_the_length(bad):
    shown = re.escape(str(list(bad)))
    text = f"^op: cu_seqlens must be non-decreasing from 0 to the length 6, got {shown}$"
    with pytest.raises(ValueError, match=text):
        spans("op", ends(*bad), None, sizes())


def test_boundaries_of_keys_are_held_to_the_length_of_keys():
    with pytest.raises(
        ValueError, match="cu_seqlens_k must be non-decreasing from 0 to the length 4"
    ):
        spans("op", ends(0, 6), ends(0, 6), sizes(S=4))


def test_many_boundaries_are_shown_short():
    with pytest.raises(ValueError, match=r"got \[0, 1, 2, 3, 4, 5, 6, 7, …, 99\]"):
        spans("op", ends(*range(100)), None, sizes())


def attend(q, k, v, key_bias=None, gate=None):
    scores = q @ k.mT if key_bias is None else q @ k.mT + key_bias[:, :, None]
    out = scores.softmax(-1) @ v
    return out if gate is None else out * gate


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def test_packed_equals_separate_with_gradients():
    q, k, v = random(1, 2, 7, 4), random(1, 2, 9, 4, seed=1), random(1, 2, 9, 3, seed=2)
    bias, gate = random(1, 2, 9, seed=3), random(1, 2, 7, 1, seed=4)
    cut = spans("op", ends(0, 3, 3, 7), ends(0, 4, 6, 9), Sizes(1, 2, 2, 7, 9, 4, 3))
    sides = {"gate": (gate, 2)}, {"key_bias": (bias, 2)}
    out = run_packed(attend, cut, q, k, v, *sides)
    first = attend(q[:, :, :3], k[:, :, :4], v[:, :, :4], bias[:, :, :4], gate[:, :, :3])
    last = attend(q[:, :, 3:], k[:, :, 6:], v[:, :, 6:], bias[:, :, 6:], gate[:, :, 3:])
    separate = torch.cat([first, last], 2)
    assert torch.equal(out, separate)
    inputs, weight = (q, k, v, bias, gate), torch.randn_like(out)
    for one, other in zip(
        torch.autograd.grad((out * weight).sum(), inputs),
        torch.autograd.grad((separate * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_absent_operands_and_several_results():
    q = random(1, 2, 6, 4)

    def one(q, k, v, key_bias):
        assert key_bias is None
        return attend(q, k, v), (q @ k.mT).logsumexp(-1)

    cut = spans("op", ends(0, 2, 6), None, sizes())
    out, lse = run_packed(one, cut, q, q, q, {}, {"key_bias": (None, 2)})
    assert (out.shape, lse.shape) == ((1, 2, 6, 4), (1, 2, 6))
    assert torch.equal(lse[:, :, :2], (q[:, :, :2] @ q[:, :, :2].mT).logsumexp(-1))


def test_no_sequences_at_all():
    q, v = torch.zeros(1, 2, 0, 4), torch.zeros(1, 2, 0, 3)
    assert run_packed(attend, [], q, q, v, {}, {}).shape == (1, 2, 0, 3)
