"""What is particular to the delta rule; the general laws are the contract's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from regard.core.budgets import budget, relative_error
from regard.core.state import FixedState
from regard.explain import explain
from regard.ops.delta import delta_attention
from regard.ops.delta.reference import delta_attention_reference
from regard.ops.linear.features import unit

GOLDEN = Path(__file__).parents[1] / "golden"


def inputs(T: int, S: int, *, dtype=torch.float64, B=2, H=4, Hk=2, D=5, Dv=3) -> list[Tensor]:
    """q, k, v and beta."""
    make = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(B, heads, length, width, generator=make, dtype=torch.float64)
        for heads, length, width in ((H, T, D), (Hk, S, D), (Hk, S, Dv))
    )
    beta = torch.rand(B, Hk, S, generator=make, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, beta)]


def gradients(out: Tensor, *tensors: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out).sin()
    return list(torch.autograd.grad((out * weight).sum(), tensors))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (70, 70), (130, 130), (3, 90), (90, 66), (5, 0)])
def test_all_forms_agree_at_every_chunk_size(causal, T, S):
    q, k, v, beta = inputs(T, S)
    expected = delta_attention_reference(q, k, v, beta=beta, causal=causal, scale=0.3)
    wanted = gradients(expected, q, k, v, beta) if S else []
    for chunk in (None, 1, 7, 32, 1000):
        out = delta_attention(q, k, v, beta=beta, causal=causal, scale=0.3, chunk_size=chunk)
        assert relative_error(out, expected) < budget(torch.float64)
        for x, y in zip(gradients(out, q, k, v, beta) if S else [], wanted, strict=True):
            assert relative_error(x, y) < budget(torch.float64, "gradient")


def test_equals_the_product_of_householder_like_matrices():
    """S_t = sum_j beta_j [prod_{l = j + 1 .. t} (I - beta_l k_l k_l^T)] k_j v_j^T, in no form."""
    q, k, v, beta = (x.detach() for x in inputs(9, 9, B=1, H=1, Hk=1))
    u, eye = torch.nn.functional.normalize(k[0, 0], dim=-1), torch.eye(5, dtype=torch.float64)
    for t in range(9):
        state = torch.zeros(5, 3, dtype=torch.float64)
        for j in range(t + 1):
            term = beta[0, 0, j] * torch.outer(u[j], v[0, 0, j])
            for i in range(j + 1, t + 1):
                term = (eye - beta[0, 0, i] * torch.outer(u[i], u[i])) @ term
            state += term
        out = delta_attention(q, k, v, beta=beta, causal=True, scale=1.0)
        assert relative_error(out[0, 0, t], q[0, 0, t] @ state) < budget(torch.float64)


def test_equals_the_predictor_of_the_regression_task():
    """W <- W + beta (y - W k) k^T with k = x / |x|, on pairs before the query."""
    path = GOLDEN / "regression_tasks" / "ttr_piecewise"
    args = json.loads(path.with_suffix(".json").read_text())["args"]
    data = load_file(path.with_suffix(".safetensors"))
    x, y = data["in.x"][:, None], data["in.y"][:, None]
    beta = torch.full((2, 1, 95), args["delta_beta"], dtype=torch.float64)
    out = delta_attention(unit(x), x[:, :, :-1], y[:, :, :-1], beta=beta, causal=True, scale=1.0)
    assert relative_error(out[:, 0], data["out.deltanet"]) < 1e-8


def test_a_value_is_overwritten_where_linear_attention_would_add():
    keys = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 1, 0]][None, None]
    v = torch.randn(1, 1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(1, 1, 5, dtype=torch.float64)
    out = delta_attention(torch.eye(4).double()[None, None], keys, v, beta=ones, scale=1.0)
    assert relative_error(out[0, 0, :3], v[0, 0, [4, 3, 2]]) < budget(torch.float64)
    assert not out[0, 0, 3].any()


def test_beta_of_two_counts_parity():
    """A reflection flips what the state holds for a key: beyond any beta in (0, 1)."""
    bits = torch.randint(2, (1, 1, 200), generator=torch.Generator().manual_seed(0))
    k = torch.ones(1, 1, 201, 1)
    v = torch.zeros(1, 1, 201, 1)
    v[:, :, 0] = 1.0  # the first token writes 1 into an empty state
    beta = torch.cat([torch.ones(1, 1, 1), 2.0 * bits], 2)
    out = delta_attention(k, k, v, beta=beta, causal=True, scale=1.0)
    parity = bits.cumsum(2) % 2
    assert torch.equal(out[:, :, 1:, 0], 1.0 - 2.0 * parity)


def test_keys_of_any_size_are_normalised():
    q, k, v, beta = inputs(40, 40, dtype=torch.float32)
    expected = delta_attention(q, k, v, beta=beta, causal=True)
    wanted = gradients(expected, k)[0]
    for size in (2.0**-120, 2.0**-60, 2.0**60, 2.0**120):
        scaled = (k.detach() * size).requires_grad_()
        out = delta_attention(q, scaled, v, beta=beta, causal=True)
        assert relative_error(out, expected) < budget(torch.float32)
        if size > 2.0**-100:  # a gradient of 1 / |k| would not fit into float32
            found = gradients(out, scaled)[0].double() * size
            assert relative_error(found, wanted) < budget(torch.float32, "gradient")
    zeros = torch.zeros_like(k, requires_grad=True)
    out = delta_attention(q, zeros, v, beta=beta, causal=True)
    assert not out.any()
    assert gradients(out, zeros)[0].isfinite().all()


def test_keys_that_come_normalised_are_used_as_they_are():
    q, k, v, beta = inputs(50, 50)
    plain = delta_attention(q, k, v, beta=beta, causal=True)
    given = delta_attention(q, unit(k), v, beta=beta, causal=True, normalise_keys=False)
    assert relative_error(given, plain) < budget(torch.float64)
    longer = delta_attention(q, 0.5 * unit(k), v, beta=beta, causal=True, normalise_keys=False)
    expected = delta_attention_reference(
        q, 0.5 * unit(k), v, beta=beta, causal=True, normalise_keys=False
    )
    assert relative_error(longer, expected) < budget(torch.float64)
    assert relative_error(longer, plain) > 0.1


@pytest.mark.parametrize("limit", [1.0, 2.0])
def test_float32_keeps_its_digits_over_a_long_sequence(limit):
    q, k, v, beta = (x.detach() for x in inputs(3000, 3000, dtype=torch.float32, B=1, D=16))
    beta = beta * limit
    out = delta_attention(q, k, v, beta=beta, causal=True)
    wide = [x.double() for x in (q, k, v)]
    expected = delta_attention(*wide, beta=beta.double(), causal=True)
    assert relative_error(out, expected) < budget(torch.float32)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("chunk", [8, 64])
def test_a_later_key_changes_no_bit(chunk, normalise):
    """Not even where it makes the state overflow."""
    results = []
    for junk in (0.25, 3.0, 1e4, 1e30):
        q, k, v, beta = inputs(40, 40, dtype=torch.float32)
        with torch.no_grad():
            k.copy_(unit(k))
            k[:, :, 21:], v[:, :, 21:], beta[:, :, 21:] = -junk, junk, 0.5
        options = {"causal": True, "chunk_size": chunk, "normalise_keys": normalise}
        whole = delta_attention(q, k, v, beta=beta, **options)
        assert normalise or junk < 1e4 or whole[:, :, -1].isnan().all()
        out = whole[:, :, :21]
        results.append([out, *(x[:, :, :21] for x in gradients(out, q, k, v, beta))])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_a_state_continues_with_masks():
    q, k, v, beta = inputs(30, 30)
    mask = torch.rand(2, 30, generator=torch.Generator().manual_seed(2)) < 0.8
    whole, last = delta_attention(q, k, v, beta=beta, causal=True, key_mask=mask, return_state=True)
    for at in (0, 1, 13, 29, 30):
        options = {"beta": beta[:, :, :at], "key_mask": mask[:, :at], "causal": True}
        first, state = delta_attention(
            q[:, :, :at], k[:, :, :at], v[:, :, :at], return_state=True, **options
        )
        options = {"beta": beta[:, :, at:], "key_mask": mask[:, at:], "causal": True}
        tensors = (q[:, :, at:], k[:, :, at:], v[:, :, at:])
        second, end = delta_attention(*tensors, state=state, return_state=True, **options)
        assert relative_error(torch.cat([first, second], 2), whole) < budget(torch.float64)
        assert relative_error(end["S"], last["S"]) < budget(torch.float64)
        assert (state.length, end.length) == (at, 30)
        bare = delta_attention(*tensors, state=state, impl="reference", **options)
        assert relative_error(second, bare) < budget(torch.float64)


def test_a_query_at_the_last_old_token_reads_the_state_and_earlier_ones_cannot():
    q, k, v, beta = inputs(8, 8)
    whole = delta_attention(q, k, v, beta=beta, causal=True)
    _, state = delta_attention(
        q[:, :, :5], k[:, :, :5], v[:, :, :5], beta=beta[:, :, :5], return_state=True
    )
    new = {"beta": beta[:, :, 5:], "causal": True, "state": state}
    out = delta_attention(q[:, :, 4:], k[:, :, 5:], v[:, :, 5:], **new)
    assert relative_error(out, whole[:, :, 4:]) < budget(torch.float64)
    with pytest.raises(ValueError, match="q must be of at most 4 tokens"):
        delta_attention(q[:, :, 3:], k[:, :, 5:], v[:, :, 5:], **new)


def test_what_a_call_keeps_for_its_backward_grows_with_its_length():
    def kept(T: int) -> int:
        q, k, v, beta = inputs(T, T, dtype=torch.float32, B=1, H=1, Hk=1, D=32, Dv=32)
        stores: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            stores[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            delta_attention(q, k, v, beta=beta, causal=True).sum().backward()
        return sum(stores.values())

    size = 4 * 32 * 1024
    assert kept(1024) < 6 * size  # q, three stages of normalised keys, values
    assert kept(4096) < 6 * 4 * size
    assert kept(8192) < 2.1 * kept(4096)  # up to 1024 tokens go in one piece


def test_a_second_derivative_raises():
    q, k, v, beta = inputs(6, 6)
    out = delta_attention(q, k, v, beta=beta, causal=True)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(gradient.sum(), v)
    out = delta_attention(q, k, v, beta=beta, causal=True, impl="reference")
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    assert torch.autograd.grad(gradient.sum(), v)[0].isfinite().all()


@pytest.mark.parametrize("decay", [False, True])
def test_registration(decay):
    q, k, v, beta = inputs(5, 5)
    a = (-beta.detach()).requires_grad_() if decay else None
    state = torch.zeros(2, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.regard.linear_delta_fwd, (q, k, v, beta, a, state, 2))
    plain = [None if x is None else x.detach() for x in (q, k, v, beta, a, state)]
    made = torch.randn(2, 4, 5, 3, dtype=torch.float64), torch.randn(2, 2, 5, 3).double()
    torch.library.opcheck(torch.ops.regard.linear_delta_bwd, (*made, *plain, 2, decay))


def test_vmap_equals_a_loop():
    q, k, v, beta = (torch.stack([x.detach(), x.detach() / 2], 1) for x in inputs(9, 9))
    mapped = torch.vmap(
        lambda q, k, v, beta: delta_attention(q, k, v, beta=beta, causal=True, chunk_size=4),
        in_dims=1,
        out_dims=1,
    )(q, k, v, beta)
    looped = [
        delta_attention(q[:, i], k[:, i], v[:, i], beta=beta[:, i], causal=True) for i in range(2)
    ]
    assert relative_error(mapped, torch.stack(looped, 1)) < budget(torch.float64)


def test_explain_names_the_form():
    q, k, v, beta = inputs(9, 9)
    assert explain(delta_attention, q, k, v, beta=beta).form == "encode_read"
    assert explain(delta_attention, q, k, v, beta=beta, causal=True).form == "chunked"
    one = explain(delta_attention, q[:, :, :1], k, v, beta=beta, causal=True)
    assert (one.form, one.available) == ("recurrent", ("eager", "reference"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"beta": None}, TypeError, "beta must be a torch.Tensor"),
        ({"beta": 0.5}, TypeError, "beta must be a torch.Tensor"),
        ({"beta": torch.ones(2, 4, 6)}, ValueError, "beta must be of shape"),
        ({"beta": torch.ones(2, 2, 6).int()}, TypeError, "beta must be a floating-point"),
        ({"normalise_keys": 1}, TypeError, "normalise_keys must be True or False"),
        ({"causal": None}, TypeError, "causal must be True or False"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be an int of at least 1"),
        ({"impl": "reference", "chunk_size": 2}, ValueError, "reference: it has no chunks"),
        ({"impl": "native"}, ValueError, "impl='native' cannot serve this call"),
        ({"state": FixedState("linear", 1, {})}, ValueError, "a state of delta_attention"),
        (
            {"state": FixedState("delta", 1, {"z": torch.zeros(2)})},
            ValueError,
            "state must be one that holds S, got one that holds z",
        ),
        (
            {"state": FixedState("delta", 1, {"S": torch.zeros(2, 2, 5, 3)})},
            ValueError,
            r"state\['S'\] must be float64 \[2, 2, 5, 3\] on cpu",
        ),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    q, k, v, beta = inputs(6, 6)
    with pytest.raises(error, match=f"^delta_attention: .*{message}"):
        delta_attention(q, k, v, **{"beta": beta, **changes})


def test_a_pack_carries_one_state_for_each_sequence():
    q, k, v, beta = inputs(9, 9, B=1)
    options = {"causal": True, "return_state": True}
    start = FixedState("delta", 3, {"S": torch.rand(2, 2, 5, 3).double()})
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    out, after = delta_attention(q, k, v, beta=beta, cu_seqlens=ends, state=start, **options)
    for row, (i, j) in enumerate(((0, 4), (4, 9))):
        tensors, own = (x[:, :, i:j] for x in (q, k, v)), start.select(torch.tensor([row]))
        expected, end = delta_attention(*tensors, beta=beta[:, :, i:j], state=own, **options)
        assert torch.equal(out[:, :, i:j], expected)
        assert torch.equal(after["S"][row : row + 1], end["S"])
