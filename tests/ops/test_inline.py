"""What is particular to InLine attention; the general laws are the contract's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ops.samples import megabytes_over_inputs, tensors
from regard.core.budgets import budget, relative_error
from regard.core.state import FixedState
from regard.ops.inline import FEATURE_MAPS, inline_attention
from regard.ops.inline.reference import inline_attention_reference, inline_weights_reference

LENGTHS = (1, 2, 63, 64, 65, 200, 1000)


def causal_weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[.., T, T], row by row from the definition: means over the keys seen so far."""
    T, rows = q.shape[2], []
    for i in range(T):
        scores = scale * q[:, :, i : i + 1] @ k[:, :, : i + 1].mT / (i + 1)
        row = scores - scores.mean(3, keepdim=True) + 1 / (i + 1)
        rows.append(torch.nn.functional.pad(row, (0, T - i - 1)))
    return torch.cat(rows, 2)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_linear_form_equals_explicit_weights(feature_map):
    q, k, v = tensors(T=7, S=11)
    weights = inline_weights_reference(q, k, feature_map=feature_map)
    assert (weights.sum(3) - 1).abs().max() < 1e-12
    out = inline_attention(q, k, v, feature_map=feature_map)
    assert relative_error(out, weights @ v.repeat_interleave(2, 1)) < 1e-12
    assert weights.min() < 0 or feature_map != "identity"


def test_causal_form_equals_explicit_weights():
    q, k, v = tensors(H=2, Hk=2, T=23, S=23)
    weights = causal_weights(q, k, 0.4)
    assert (weights.sum(3) - 1).abs().max() < 1e-12
    out = inline_attention(q, k, v, causal=True, scale=0.4)
    assert relative_error(out, weights @ v) < 1e-12


def test_is_the_mean_corrected_by_the_covariance():
    q, k, v = tensors(H=2, Hk=2)
    k_off, v_off = (x - x.mean(2, keepdim=True) for x in (k, v))
    expected = v.mean(2, keepdim=True) + 0.3 * q @ (k_off.mT @ v_off) / k.shape[2]
    assert relative_error(inline_attention(q, k, v, scale=0.3), expected) < 1e-12


def test_rows_tell_queries_apart():
    """A division by the sum makes one row of q and 2 q; the subtraction does not."""
    q, k, _ = tensors(H=1, Hk=1, S=9, Dv=9)
    q, k, identity = q.relu(), k.relu(), torch.eye(9).double().expand(2, 1, 9, 9)

    def divided(q: Tensor) -> Tensor:
        weights = q @ k.mT
        return weights / weights.sum(3, keepdim=True)

    q = q[:, :, q.sum((0, 1, 3)) > 0]
    assert (divided(q) - divided(2 * q)).nan_to_num().abs().max() < 1e-7
    rows = inline_attention(torch.cat([q, 2 * q], 2), k, identity)
    one, two = rows.chunk(2, 2)
    assert (one - two).abs().amax((0, 1, 3)).min() > 1e-3


def test_rows_are_equal_only_along_what_all_centred_keys_miss():
    q, k, _ = tensors(B=1, H=1, Hk=1, T=1, S=4, D=5)  # 4 centred keys span 3 of 5 dimensions
    centred = k - k.mean(2, keepdim=True)
    missed = torch.linalg.svd(centred[0, 0])[2][3:]
    seen = centred[0, 0, 0] / centred[0, 0, 0].norm()
    identity = torch.eye(4).double()[None, None]
    row = inline_attention(q, k, identity)
    for direction in missed:
        assert (inline_attention(q + 3 * direction, k, identity) - row).abs().max() < 1e-12
    assert (inline_attention(q + 3 * seen, k, identity) - row).abs().max() > 1e-3


def test_permutations_and_trivial_queries_and_keys():
    q, k, v = tensors(H=2, Hk=2)
    order = torch.randperm(9)
    out = inline_attention(q, k, v)
    moved = inline_attention(q[:, :, order], k[:, :, order], v[:, :, order])
    assert relative_error(moved, out[:, :, order]) < 1e-12
    mean = v.mean(2, keepdim=True).expand(-1, -1, 9, -1)
    still = inline_attention(torch.zeros_like(q), k, v)
    assert torch.equal(still, still[:, :, :1].expand_as(still))
    assert relative_error(still, mean) < 1e-15
    assert relative_error(inline_attention(q, k[:, :, :1].expand_as(k), v), mean) < 1e-14


@pytest.mark.parametrize("T", LENGTHS)
def test_all_forms_and_any_cut_agree(T):
    q, k, v = tensors(B=1, H=2, Hk=1, T=T, S=T)
    whole = inline_attention(q, k, v, causal=True)
    if T <= 200:
        expected = inline_attention_reference(q, k, v, causal=True)
        assert relative_error(whole, expected) < budget(torch.float64)
    for chunk in (16, 64, 1024):
        other = inline_attention(q, k, v, causal=True, chunk_size=chunk)
        assert relative_error(other, whole) < 1e-11
    with torch.no_grad():
        for cut in {0, 1, T // 3, T - 1, T}:
            parts, state = [], None
            for part in (slice(None, cut), slice(cut, None)):
                piece = [x[:, :, part] for x in (q, k, v)]
                out, state = inline_attention(*piece, causal=True, state=state, return_state=True)
                parts.append(out)
            assert relative_error(torch.cat(parts, 2), whole) < 1e-11
            everything = inline_attention(q, k[:, :, :0], v[:, :, :0], state=state)
            assert relative_error(everything, inline_attention(q, k, v)) < 1e-11


def test_keys_that_come_in_pieces_without_causal():
    q, k, v = tensors(T=5, S=12)
    mask = torch.rand(2, 12) < 0.7
    state = None
    for part in (slice(0, 3), slice(3, 4), slice(4, 12)):
        out, state = inline_attention(
            q, k[:, :, part], v[:, :, part], key_mask=mask[:, part], state=state, return_state=True
        )
    assert relative_error(out, inline_attention(q, k, v, key_mask=mask)) < 1e-11
    assert torch.equal(state["count"], mask.sum(1))
    real = mask[0]
    assert relative_error(state["k_mean"][0], k[0][:, real].mean(1)) < 1e-12


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_have_a_state_each(causal):
    q, k, v = tensors(B=1, T=9, S=9)
    ends = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    options = {"causal": causal, "return_state": True}
    out, state = inline_attention(q, k, v, cu_seqlens=ends, **options)
    again, after = inline_attention(q, k, v, cu_seqlens=ends, state=state, **options)
    assert state["S"].shape[0] == after["S"].shape[0] == 3
    for row, (i, j) in enumerate(((0, 4), (4, 4), (4, 9))):
        piece = [x[:, :, i:j] for x in (q, k, v)]
        one, own = inline_attention(*piece, **options)
        assert relative_error(out[:, :, i:j], one) < 1e-11
        assert relative_error(state["S"][row : row + 1], own["S"]) < 1e-11
        two, _ = inline_attention(*piece, state=own, **options)
        assert relative_error(again[:, :, i:j], two) < 1e-11


def test_an_offset_of_all_keys_costs_few_digits():
    q, k, v = tensors(B=1, H=1, Hk=1, T=300, S=300, D=16, Dv=16)
    k = (k + 1000.0).float().double()
    single = [x.float() for x in (q, k, v)]
    for causal in (False, True):
        expected = inline_attention(q, k, v, causal=causal)
        error = relative_error(inline_attention(*single, causal=causal), expected)
        assert error < 1e-4
    # The released form subtracts one large sum from another.
    q_, k_, v_ = single
    k_mean, v_mean = k_.mean(2, keepdim=True), v_.mean(2, keepdim=True)
    plain = 0.25 / 300 * q_ @ (k_.mT @ v_) + (1 - 0.25 * q_ @ k_mean.mT) * v_mean
    expected = inline_attention(q, k, v)
    assert relative_error(plain, expected) > 3 * relative_error(inline_attention(*single), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_overflow_in_16_bits(dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (5 * torch.randn(1, 1, 16384, 32, generator=generator) for _ in range(3))
    out = inline_attention(q.to(dtype), k.to(dtype), v.to(dtype))
    assert out.isfinite().all()
    exact = inline_attention(*(x.to(dtype).double() for x in (q, k, v)))
    assert relative_error(out, exact) < budget(dtype)


def test_gradients_of_scale_and_a_kernel():
    q, k, v = (x.requires_grad_() for x in tensors(B=1, T=4, S=5, D=3))
    scale = torch.tensor([0.2, 0.5, 0.7, 1.1], dtype=torch.float64, requires_grad=True)
    for causal in (False, True):
        for feature_map in ("identity", "leaky_relu", "exp"):

            def run(q, k, v, scale, causal=causal, feature_map=feature_map):
                return inline_attention(
                    q, k, v, scale=scale, causal=causal, feature_map=feature_map
                )

            assert torch.autograd.gradcheck(run, (q, k, v, scale))


def test_what_does_not_fit_is_named():
    q, k, v = tensors()
    _, state = inline_attention(q, k, v, return_state=True)
    other = FixedState("inline", 3, {"S": state["S"]})
    wrong = [
        ({"feature_map": "rleu"}, "feature_map must be one of .*did you mean 'relu'"),
        ({"state": FixedState("linear", 3, {})}, "state must be a state of inline_attention"),
        ({"state": other}, "state must be one that holds S, k_mean, v_mean, count"),
        ({"state": state.select(torch.tensor([0]))}, r"state\['S'\] must be float64"),
        ({"chunk_size": 0}, "chunk_size must be an int of at least 1"),
        ({"causal": 1}, "causal must be True or False"),
        ({"impl": "reference", "chunk_size": 4}, "it has no chunks"),
    ]
    for options, message in wrong:
        with pytest.raises((ValueError, TypeError), match=f"inline_attention: .*{message}"):
            inline_attention(q, k, v, **options)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "causal=True"])
def test_memory_of_a_long_training_step(options):
    """Gradients of q, k and v included, under twelve times the size of q."""
    grown = megabytes_over_inputs(
        "regard.ops:inline_attention", 65536, backward=True, options=options
    )
    assert grown < 12 * 16
