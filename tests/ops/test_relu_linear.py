"""What is particular to clamped ReLU linear attention; the general laws are the contract's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ops.samples import megabytes_over_inputs, tensors
from regard.core.budgets import budget, relative_error
from regard.ops.relu_linear import relu_linear_attention
from regard.ops.relu_linear.reference import relu_linear_attention_reference

LENGTHS = (1, 2, 63, 64, 65, 200, 1000)


def explicit(q: Tensor, k: Tensor, minimum: float, temperature: float) -> tuple[Tensor, Tensor]:
    """The weights [.., T, S] and their sum before the division."""
    weights = q.relu() @ k.relu().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    total = weights.sum(3, keepdim=True)
    return temperature * weights / total.clamp(min=minimum), total


def test_equals_explicit_weights_on_both_sides_of_the_clamp():
    q, k, v = tensors(T=40, S=30, D=8)
    weights, total = explicit(q, k, 40.0, 0.7)
    assert (total < 40).any()
    assert (total > 40).any()
    sums = 0.7 * (total / 40).clamp(max=1.0)
    assert (weights.sum(3, keepdim=True) - sums).abs().max() < 1e-12
    out = relu_linear_attention(q, k, v, minimum=40.0, temperature=0.7)
    assert relative_error(out, weights @ v.repeat_interleave(2, 1)) < 1e-12


def test_without_a_minimum_rows_sum_to_one():
    q, k, _ = tensors(S=9, D=8)
    ones = torch.ones(2, 2, 9, 1, dtype=torch.float64)
    out = relu_linear_attention(q, k, ones, minimum=0.0, temperature=1.0)
    seen = explicit(q, k, 1e-30, 1.0)[1] > 0
    assert (out[seen] - 1).abs().max() < 1e-12
    tiny = relu_linear_attention(q, k, ones, minimum=1e-9, temperature=1.0)
    assert (tiny[seen] - 1).abs().max() < 1e-12
    dead = relu_linear_attention(-q.abs(), k, ones, minimum=0.0)
    assert not dead.any()


def test_below_the_clamp_the_output_grows_with_the_query():
    q, k, v = tensors(D=4)
    out = relu_linear_attention(q, k, v, minimum=1e4)
    assert relative_error(relu_linear_attention(3 * q, k, v, minimum=1e4), 3 * out) < 1e-14
    above = relu_linear_attention(q, k, v, minimum=0.0)
    assert relative_error(relu_linear_attention(3 * q, k, v, minimum=0.0), above) < 1e-14


@pytest.mark.parametrize("T", LENGTHS)
def test_all_forms_and_any_cut_agree(T):
    q, k, v = tensors(B=1, H=2, Hk=1, T=T, S=T, D=6)
    whole = relu_linear_attention(q, k, v, causal=True, minimum=60.0)
    if T <= 200:
        expected = relu_linear_attention_reference(q, k, v, causal=True, minimum=60.0)
        assert relative_error(whole, expected) < budget(torch.float64)
    for chunk in (16, 64, 1024):
        options = {"causal": True, "minimum": 60.0, "chunk_size": chunk}
        assert relative_error(relu_linear_attention(q, k, v, **options), whole) < 1e-11
    for cut in {0, 1, T // 3, T - 1, T}:
        parts, state = [], None
        for part in (slice(None, cut), slice(cut, None)):
            piece = [x[:, :, part] for x in (q, k, v)]
            out, state = relu_linear_attention(
                *piece, causal=True, minimum=60.0, state=state, return_state=True
            )
            parts.append(out)
        assert relative_error(torch.cat(parts, 2), whole) < 1e-11


def test_packed_equals_separate():
    q, k, v = tensors(B=1, T=9, S=9)
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    for causal in (False, True):
        out = relu_linear_attention(q, k, v, causal=causal, minimum=3.0, cu_seqlens=ends)
        for i, j in ((0, 4), (4, 9)):
            piece = [x[:, :, i:j] for x in (q, k, v)]
            one = relu_linear_attention(*piece, causal=causal, minimum=3.0)
            assert relative_error(out[:, :, i:j], one) < 1e-11


def test_gradients_with_a_temperature_per_head():
    q, k, v = (x.requires_grad_() for x in tensors(B=1, T=4, S=5, D=3))
    temperature = torch.tensor([0.2, 0.5, 0.7, 1.1], dtype=torch.float64, requires_grad=True)
    for causal in (False, True):
        for minimum in (0.0, 1.0, 100.0):

            def run(q, k, v, temperature, causal=causal, minimum=minimum):
                return relu_linear_attention(
                    q, k, v, temperature=temperature, causal=causal, minimum=minimum
                )

            assert torch.autograd.gradcheck(run, (q, k, v, temperature))
    out = relu_linear_attention(q, k, v, temperature=temperature)
    (found,) = torch.autograd.grad(out.sum(), temperature)
    expected = (out / temperature[:, None, None]).sum((0, 2, 3))
    assert relative_error(found, expected) < 1e-12


def test_a_temperature_is_one_number_or_one_per_head():
    q, k, v = tensors()
    out = relu_linear_attention(q, k, v, temperature=0.5)
    for same in (torch.tensor(0.5), torch.full((4,), 0.5)):
        assert torch.equal(relu_linear_attention(q, k, v, temperature=same), out)
    assert torch.equal(relu_linear_attention(q, k, v), relu_linear_attention(
        q, k, v, temperature=q.shape[3] ** -0.5))  # fmt: skip
    wrong = [
        ({"temperature": torch.ones(3)}, r"temperature must be of shape \[\] or \[4\]"),
        ({"temperature": "warm"}, "temperature must be a number"),
        ({"minimum": -1.0}, "minimum must be a finite number of at least 0.0"),
        ({"minimum": None}, "minimum must be a number"),
    ]
    for options, message in wrong:
        with pytest.raises((ValueError, TypeError), match=f"relu_linear_attention: .*{message}"):
            relu_linear_attention(q, k, v, **options)


def entropy(weights: Tensor) -> Tensor:
    """Of rows that sum to 1, in nats, averaged."""
    return -(weights * weights.clamp(min=1e-30).log()).sum(3).mean()


def test_rows_spread_wider_than_those_of_softmax():
    """What the paper observes, and why it concentrates the result afterwards."""
    q, k, _ = tensors(B=2, H=4, Hk=4, T=196, S=196, D=32)
    weights, _ = explicit(q, k, 1e-30, 1.0)
    softmax = (q @ k.mT * 32**-0.5).softmax(3)
    assert entropy(weights) > entropy(softmax) + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "causal=True"])
def test_memory_of_a_long_training_step(options):
    """Gradients of q, k and v included, under twelve times the size of q."""
    grown = megabytes_over_inputs(
        "regard.ops:relu_linear_attention", 65536, backward=True, options=options
    )
    assert grown < 12 * 16
