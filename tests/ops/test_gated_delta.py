"""What is particular to the gated delta rule: its decay, and the code of others."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from regard.core.budgets import budget, relative_error
from regard.core.state import FixedState
from regard.explain import explain
from regard.ops.delta import delta_attention
from regard.ops.gated_delta import gated_delta_attention
from regard.ops.gated_delta.reference import gated_delta_attention_reference
from regard.ops.linear.chunked_delta import chunked_delta, encode_delta
from regard.ops.linear.recurrent_delta import recurrent_delta

GOLDEN = Path(__file__).parents[1] / "golden"


def inputs(T: int, *, dtype=torch.float64, B=2, H=4, Hk=2, D=5, Dv=3, seed=0) -> list[Tensor]:
    """q, k, v and beta."""
    make = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(B, heads, T, width, generator=make, dtype=torch.float64)
        for heads, width in ((H, D), (Hk, D), (Hk, Dv))
    )
    beta = torch.rand(B, Hk, T, generator=make, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, beta)]


def decays(T: int, *, B=2, Hk=2) -> Tensor:
    """Mild, strong and total forgetting, mixed."""
    make = torch.Generator().manual_seed(1)
    steps = -torch.rand(B, Hk, T, generator=make, dtype=torch.float64)
    kind = torch.rand(B, Hk, T, generator=make)
    steps[kind < 0.1] = -40.0
    steps[kind < 0.04] = -torch.inf
    return steps.requires_grad_()


def gradients(out: Tensor, *tensors: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out).sin()
    return list(torch.autograd.grad((out * weight).sum(), tensors, retain_graph=True))


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 150])
def test_chunked_and_reference_agree_with_decays_of_every_kind(T):
    q, k, v, beta = inputs(T)
    a = decays(T)
    mask = torch.rand(2, T, generator=torch.Generator().manual_seed(2)) < 0.8
    options = {"beta": beta, "log_decay": a, "causal": True, "key_mask": mask}
    expected = gated_delta_attention_reference(q, k, v, **options)
    wanted = gradients(expected, q, k, v, beta)
    for chunk in (1, 7, 64, 1000):
        out = gated_delta_attention(q, k, v, **options, chunk_size=chunk)
        assert relative_error(out, expected) < budget(torch.float64)
        *got, of_decay = gradients(out, q, k, v, beta, a)
        for x, y in zip(got, wanted, strict=True):
            assert relative_error(x, y) < budget(torch.float64, "gradient")
        assert of_decay.isfinite().all()
        assert not of_decay[a == -torch.inf].any()


@pytest.mark.parametrize("decay", [False, True])
def test_engine_walks_agree_on_keys_of_any_width(decay):
    q, k, v, beta = inputs(70, D=9, Dv=4)
    unit = torch.nn.functional.normalize(k.detach(), dim=-1).requires_grad_()
    state = torch.randn(2, 2, 9, 4, dtype=torch.float64, requires_grad=True)
    a = decays(70).detach().clamp(min=-40.0).requires_grad_() if decay else None
    tensors = [q, unit, v, beta, state] + ([a] if decay else [])
    one = recurrent_delta(q, unit, v, beta, a, state)
    two = chunked_delta(q, unit, v, beta, a, state, 16)
    for x, y in zip(two, one, strict=True):
        assert relative_error(x, y) < budget(torch.float64)
    got, wanted = (
        gradients(torch.cat([o.flatten(), s.flatten()]), *tensors) for o, s in (two, one)
    )
    for x, y in zip(got, wanted, strict=True):
        assert relative_error(x, y) < budget(torch.float64, "gradient")
    alone = encode_delta(unit, v, beta, a, state, 16)
    assert relative_error(alone, one[1]) < budget(torch.float64)
    for x, y in zip(gradients(alone, *tensors[1:]), gradients(one[1], *tensors[1:]), strict=True):
        assert relative_error(x, y) < budget(torch.float64, "gradient")


def test_gradcheck_of_the_registered_pair():
    q, k, v, beta = inputs(5, B=1, H=2, Hk=1, D=2, Dv=2)
    state = torch.randn(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    a = torch.linspace(-0.8, -0.1, 5, dtype=torch.float64)[None, None].requires_grad_()
    for decay in (None, a):
        assert torch.autograd.gradcheck(
            lambda *x: chunked_delta(*x, 2), (q, k, v, beta, decay, state)
        )


def test_equals_the_code_of_qwen3_next():
    """Output, last state and all gradients; it adds 1e-6 under the roots of the norms."""
    path = GOLDEN / "gated_delta" / "qwen3_next"
    tolerance = json.loads(path.with_suffix(".json").read_text())["tolerance"]
    data = load_file(path.with_suffix(".safetensors"))
    names = ("q", "k", "v", "beta", "log_decay")
    given = [data[f"in.{n}"].transpose(1, 2).contiguous().requires_grad_() for n in names]
    start = data["in.state"].requires_grad_()
    q, k, v, beta, a = given
    out, state = gated_delta_attention(
        torch.nn.functional.normalize(q, dim=-1), k, v, beta=beta, log_decay=a, causal=True,
        state=FixedState("gated_delta", 0, {"S": start}), return_state=True,
    )  # fmt: skip
    assert relative_error(out.transpose(1, 2), data["out.o"]) < tolerance["out"]
    assert relative_error(state["S"], data["out.state"]) < tolerance["out"]
    got = torch.autograd.grad(
        (out, state["S"]),
        (*given, start),
        (data["in.grad_out"].transpose(1, 2), data["in.grad_state"]),
    )
    for gradient, name in zip(got, (*names, "state"), strict=True):
        gradient = gradient if name == "state" else gradient.transpose(1, 2)
        assert relative_error(gradient, data[f"grad.{name}"]) < tolerance["grad"], name


def test_equals_the_predictor_of_the_regression_task():
    """W <- W alpha; W <- W + beta (y - W k) k^T with k = x / |x|, on pairs before the query."""
    path = GOLDEN / "regression_tasks" / "ttr_piecewise"
    args = json.loads(path.with_suffix(".json").read_text())["args"]
    data = load_file(path.with_suffix(".safetensors"))
    x, y = data["in.x"][:, None], data["in.y"][:, None]
    unit = x / x.norm(dim=-1, keepdim=True)
    per_key = torch.ones(2, 1, 95, dtype=torch.float64)
    out = gated_delta_attention(
        unit, x[:, :, :-1], y[:, :, :-1], beta=args["delta_beta"] * per_key,
        log_decay=math.log(args["delta_alpha"]) * per_key, causal=True, scale=1.0,
    )  # fmt: skip
    assert relative_error(out[:, 0], data["out.gated_deltanet"]) < 1e-8


def test_without_decay_it_is_the_delta_rule():
    q, k, v, beta = inputs(90)
    zeros = torch.zeros(2, 2, 90, dtype=torch.float64)
    for causal in (False, True):
        out = gated_delta_attention(q, k, v, beta=beta, log_decay=zeros, causal=causal)
        plain = delta_attention(q, k, v, beta=beta, causal=causal)
        assert relative_error(out, plain) < budget(torch.float64)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("step", [0.0, -40.0, -1e30, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_decays_are_exact_and_finite(causal, step, dtype):
    q, k, v, beta = inputs(150, dtype=dtype)
    a = torch.full((2, 2, 150), step, dtype=dtype, requires_grad=True)
    options = {"causal": causal, "beta": beta, "log_decay": a, "scale": 1.0}
    out = gated_delta_attention(q, k, v, **options)
    wide = [x.double() for x in (q, k, v)]
    expected = gated_delta_attention_reference(
        *wide, **(options | {"beta": beta.double(), "log_decay": a.double()})
    )
    assert relative_error(out, expected) < budget(dtype)
    got = gradients(out, q, k, v, beta, a)
    assert all(x.isfinite().all() for x in got)
    if step < -1000:  # every query reads what its own key, or the last one, wrote
        assert got[4].abs().max() == 0
        unit = torch.nn.functional.normalize(k, dim=-1)
        at = slice(None) if causal else slice(-1, None)
        unit, own, strength = (x[:, :, at].repeat_interleave(2, 1) for x in (unit, v, beta))
        alone = (q * unit).sum(-1, keepdim=True) * strength[..., None] * own
        assert relative_error(out, alone) < budget(dtype)


def test_a_forget_leaves_no_bit_of_the_past():
    """Also of a past whose values are enormous."""
    results = []
    for junk in (0.5, 1e30):
        q, k, v, beta = inputs(40, dtype=torch.float32)
        with torch.no_grad():
            k[:, :, 3], v[:, :, 3] = -junk, junk
        a = torch.full((2, 2, 40), -0.1)
        a[:, :, 20] = -torch.inf
        for chunk in (8, 64):
            options = {"beta": beta, "log_decay": a, "chunk_size": chunk}
            out = gated_delta_attention(q, k, v, causal=True, **options)
            last = gated_delta_attention(q[:, :, -1:], k, v, **options)
            late = torch.autograd.grad(out[:, :, 20:].sum(), (q, k, v, beta))
            results.append([out[:, :, 20:], last, *(x[:, :, 20:] for x in late)])
    for one, two in zip(results[:2], results[2:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize("chunk", [8, 64])
def test_a_later_key_changes_no_bit(chunk):
    results = []
    for junk in (0.25, 1e30):
        q, k, v, beta = inputs(40, dtype=torch.float32)
        a = decays(40).detach().float()
        with torch.no_grad():
            k[:, :, 21:], v[:, :, 21:], beta[:, :, 21:] = junk, -junk, 1.0
            a[:, :, 21:] = -3.0 * junk
        a.requires_grad_()
        out = gated_delta_attention(q, k, v, beta=beta, log_decay=a, causal=True, chunk_size=chunk)[
            :, :, :21
        ]
        results.append([out, *(x[:, :, :21] for x in gradients(out, q, k, v, beta, a))])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_masked_keys_advance_no_decay_and_reach_nothing(impl):
    q, k, v, beta = inputs(20)
    a = decays(20)
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(2)) < 0.7
    options = {"causal": True, "key_mask": mask, "impl": impl}
    out = gated_delta_attention(q, k, v, beta=beta, log_decay=a, **options)
    wanted = gradients(out, q, k, v, beta, a)
    with torch.no_grad():
        for x in (k, v):
            x.masked_fill_(~mask[:, None, :, None], torch.nan)
        for x in (beta, a):
            x.masked_fill_(~mask[:, None], torch.nan)
    again = gated_delta_attention(q, k, v, beta=beta, log_decay=a, **options)
    assert torch.equal(again, out)
    for x, y in zip(gradients(again, q, k, v, beta, a), wanted, strict=True):
        assert torch.equal(x, y)
    real = mask[0]  # one row alone, its masked keys left out
    q0, k0, v0, b0, a0 = (x[:1, :, real] for x in (q, k, v, beta, a))
    alone = gated_delta_attention(q0, k0, v0, beta=b0, log_decay=a0, causal=True)
    assert relative_error(out[:1, :, real], alone) < budget(torch.float64)


def test_operands_may_be_wider_than_the_inputs_and_shared_by_heads():
    q, k, v, beta = inputs(30, dtype=torch.bfloat16)
    beta = beta.detach()[:, :1].float().requires_grad_()
    a = (-torch.rand(2, 1, 30)).requires_grad_()
    out = gated_delta_attention(q, k, v, beta=beta, log_decay=a, causal=True)
    assert out.dtype == torch.bfloat16
    wide = [x.double() for x in (q, k, v)]
    expected = gated_delta_attention_reference(
        *wide, beta=beta.double().expand(2, 2, 30), log_decay=a.double().expand(2, 2, 30),
        causal=True,
    )  # fmt: skip
    assert relative_error(out, expected) < 3e-3  # the rounding of the output alone
    found = gradients(out, q, beta, a)
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32, torch.float32]
    assert found[1].shape == found[2].shape == (2, 1, 30)


def test_a_state_of_the_other_rule_is_refused():
    q, k, v, beta = inputs(5)
    _, state = delta_attention(q, k, v, beta=beta, causal=True, return_state=True)
    with pytest.raises(ValueError, match="^gated_delta_attention: state must be a state of gated"):
        gated_delta_attention(q, k, v, beta=beta, log_decay=-beta, state=state)
    with pytest.raises(TypeError, match="^gated_delta_attention: log_decay must be a torch.Tensor"):
        gated_delta_attention(q, k, v, beta=beta, log_decay=None)  # pyright: ignore


def test_the_reference_refuses_a_chunk_size():
    q, k, v, beta = inputs(5)
    options = {"beta": beta, "log_decay": -beta, "impl": "reference"}
    with pytest.raises(ValueError, match="^gated_delta_attention: .*reference: it has no chunks"):
        gated_delta_attention(q, k, v, chunk_size=2, **options)


def test_explain_names_the_form():
    q, k, v, beta = inputs(9)
    options = {"beta": beta, "log_decay": -beta}
    assert explain(gated_delta_attention, q, k, v, **options).form == "encode_read"
    assert explain(gated_delta_attention, q, k, v, causal=True, **options).form == "chunked"
