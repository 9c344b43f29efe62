"""The delta rules under the names, the layout and the defaults of published models."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from regard.core.budgets import budget, relative_error
from regard.core.state import FixedState
from regard.explain import explain
from regard.ops.delta import chunk_delta_rule, delta_attention, fused_recurrent_delta_rule
from regard.ops.gated_delta import (
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
    gated_delta_attention,
)

GOLDEN = Path(__file__).parents[1] / "golden/gated_delta/qwen3_next"
BOTH = [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule]


def inputs(T: int, dtype=torch.float64, B=2) -> list[Tensor]:
    """query, key, value, g, beta in the layout [B, T, H, D], and a state."""
    make = torch.Generator().manual_seed(0)
    q, k, v, g, beta, state = (
        torch.randn(*shape, generator=make, dtype=torch.float64)
        for shape in ((B, T, 3, 8), (B, T, 3, 8), (B, T, 3, 6), (B, T, 3), (B, T, 3), (B, 3, 8, 6))
    )
    tensors = q, k, v, -g.abs(), beta.sigmoid(), state
    return [x.to(dtype).requires_grad_() for x in tensors]


@pytest.mark.parametrize("name", ["chunk", "fused_recurrent"])
def test_equals_what_transformers_computed(name):
    about = json.loads(GOLDEN.with_suffix(".json").read_text())
    data, tolerance = load_file(GOLDEN.with_suffix(".safetensors")), about["tolerance"]
    op = dict(zip(("chunk", "fused_recurrent"), BOTH, strict=True))[name]
    names = ("q", "k", "v", "log_decay", "beta", "state")
    given = {x: data[f"in.{x}"].requires_grad_() for x in names}
    *tensors, start = given.values()
    out, state = op(
        *tensors, initial_state=start, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    assert relative_error(out, data["out.o"]) < tolerance["out"]
    assert relative_error(state, data["out.state"]) < tolerance["out"]
    loss = (out * data["in.grad_out"]).sum() + (state * data["in.grad_state"]).sum()
    for x, gradient in zip(given, torch.autograd.grad(loss, [*given.values()]), strict=True):
        assert relative_error(gradient, data[f"grad.{x}"]) < tolerance["grad"]


@pytest.mark.parametrize("op", BOTH)
def test_is_the_op_in_another_layout(op):
    q, k, v, g, beta, start = inputs(70)
    out, state = op(q, k, v, g, beta, initial_state=start, output_final_state=True)
    mine = [x.transpose(1, 2) for x in (q, k, v)]
    expected, after = gated_delta_attention(
        *mine, log_decay=g.transpose(1, 2), beta=beta.transpose(1, 2), causal=True,
        normalise_keys=False, return_state=True, state=_state(start),
    )  # fmt: skip
    assert torch.equal(out, expected.transpose(1, 2))
    assert torch.equal(state, after["S"])
    assert op(q, k, v, g, beta)[1] is None
    scaled = op(q, k, v, g, beta, scale=1.0)[0]
    assert relative_error(scaled, 8**0.5 * op(q, k, v, g, beta)[0]) < budget(torch.float64)


def _state(tensor: Tensor, mechanism: str = "gated_delta"):
    return FixedState(mechanism, 1, {"S": tensor})


def test_a_prompt_and_steps_with_a_plain_tensor_as_state():
    q, k, v, g, beta, _ = (x.detach() for x in inputs(9))
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    whole, last = chunk_gated_delta_rule(q, k, v, g, beta, **options)
    out, state = chunk_gated_delta_rule(*(x[:, :6] for x in (q, k, v, g, beta)), **options)
    rows = [out]
    for t in range(6, 9):
        step = (x[:, t : t + 1] for x in (q, k, v, g, beta))
        out, state = fused_recurrent_gated_delta_rule(*step, initial_state=state, **options)
        rows.append(out)
    assert relative_error(torch.cat(rows, 1), whole) < budget(torch.float64)
    assert relative_error(state, last) < budget(torch.float64)


def test_packed_sequences_have_a_state_each():
    q, k, v, g, beta, _ = inputs(20, B=1)
    start = torch.randn(3, 3, 8, 6, dtype=torch.float64)
    ends = torch.tensor([0, 7, 7, 20], dtype=torch.int32)
    out, state = chunk_gated_delta_rule(
        q, k, v, g, beta, initial_state=start, output_final_state=True, cu_seqlens=ends
    )
    for row, (i, j) in enumerate(((0, 7), (7, 7), (7, 20))):
        piece = (x[:, i:j] for x in (q, k, v, g, beta))
        alone, after = chunk_gated_delta_rule(
            *piece, initial_state=start[row : row + 1], output_final_state=True
        )
        assert torch.equal(out[:, i:j], alone)
        assert torch.equal(state[row : row + 1], after)


@pytest.mark.parametrize("op", [chunk_delta_rule, fused_recurrent_delta_rule])
@pytest.mark.parametrize("normalise", [False, True])
def test_the_delta_rule_is_the_gated_one_without_a_gate(op, normalise):
    q, k, v, g, beta, start = inputs(70)
    k = k if normalise else k / k.norm(dim=-1, keepdim=True)  # or the state explodes
    options = {"initial_state": start, "output_final_state": True}
    options["use_qk_l2norm_in_kernel"] = normalise
    out, state = op(q, k, v, beta, **options)
    expected, after = chunk_gated_delta_rule(q, k, v, 0.0 * g, beta, **options)
    assert relative_error(out, expected) < budget(torch.float64)
    assert relative_error(state, after) < budget(torch.float64)
    mine = [x.transpose(1, 2) for x in (q, k, v)]
    if not normalise:
        same = delta_attention(
            *mine, beta=beta.transpose(1, 2), causal=True, normalise_keys=False,
            state=_state(start, "delta"),
        )  # fmt: skip
        assert torch.equal(out, same.transpose(1, 2))


def test_errors_name_the_argument_in_their_words():
    q, k, v, g, beta, start = inputs(5)
    for arguments, message in (
        ((q[0], k, v, g, beta), "query must be a tensor of 4 axes"),
        ((q, k, v, None, beta), "g must be a tensor of 3 axes"),
        ((q, k, v, g, beta[..., None]), "beta must be a tensor of 3 axes"),
    ):
        with pytest.raises(TypeError, match=f"^chunk_gated_delta_rule: {message}"):
            chunk_gated_delta_rule(*arguments)
    with pytest.raises(TypeError, match="use_qk_l2norm_in_kernel must be True or False"):
        chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=1)
    with pytest.raises(ValueError, match=r"state\['S'\] must be float64 \[2, 3, 8, 6\]"):
        chunk_gated_delta_rule(q, k, v, g, beta, initial_state=start[:, :2])


def test_the_default_chunk_size_asks_for_no_form():
    q, k, v, g, beta, _ = inputs(5)
    mine = [x.transpose(1, 2) for x in (q, k, v, g, beta)]
    plain = explain(gated_delta_attention, *mine[:3], log_decay=mine[3], beta=mine[4], causal=True)
    assert explain(chunk_gated_delta_rule, q, k, v, g, beta).form == plain.form
    assert explain(chunk_gated_delta_rule, q, k, v, g, beta, 32).form == "chunked"


if importlib.util.find_spec("transformers") is not None:  # not a dependency of the tests

    @pytest.mark.parametrize("T", [1, 5, 64, 130])
    @pytest.mark.parametrize("normalise", [False, True])
    @pytest.mark.parametrize("starts", [False, True])
    def test_equals_the_torch_code_of_transformers(T, normalise, starts):
        from transformers.models.qwen3_next import modeling_qwen3_next as theirs

        q, k, v, g, beta, start = inputs(T, torch.float32)
        if not normalise:
            k = torch.nn.functional.normalize(k, dim=-1)
        options = {
            "initial_state": start if starts else None,
            "output_final_state": True,
            "use_qk_l2norm_in_kernel": normalise,
        }
        tensors = [q, k, v, g, beta] + ([start] if starts else [])
        expected, last = theirs.torch_recurrent_gated_delta_rule(q, k, v, g, beta, **options)
        in_chunks = theirs.torch_chunk_gated_delta_rule(q, k, v, g, beta, **options)
        assert relative_error(in_chunks[0], expected) < 1e-5
        loss = expected.sin().sum() + last.sin().sum()
        wanted = torch.autograd.grad(loss, tensors, retain_graph=True)
        for op in BOTH:
            out, state = op(q, k, v, g, beta, **options)
            assert relative_error(out, expected) < 1e-5
            assert relative_error(state, last) < 1e-5
            loss = out.sin().sum() + state.sin().sum()
            for x, y in zip(
                torch.autograd.grad(loss, tensors, retain_graph=True), wanted, strict=True
            ):
                assert relative_error(x, y) < 1e-4
