"""What is particular to lightning attention; the general laws are the contract's."""

from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from regard.core.budgets import budget, relative_error
from regard.core.state import FixedState
from regard.explain import explain
from regard.ops.lightning import (
    alibi_slopes,
    bidirectional_lightning_attention,
    constant_log_decay,
    lightning_attention,
)
from regard.ops.lightning.left_product import left_product
from regard.ops.lightning.reference import (
    bidirectional_lightning_attention_reference,
    lightning_attention_reference,
)
from regard.ops.linear.recurrent import recurrent

GOLDEN = Path(__file__).parents[1] / "golden/lightning_attention"


def inputs(T: int, S: int, *, dtype=torch.float64, B=2, H=3, Hk=3, D=8, Dv=12, seed=0):
    make = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(B, heads, length, width, generator=make, dtype=torch.float64)
        for heads, length, width in ((H, T, D), (Hk, S, D), (Hk, S, Dv))
    )
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def decays(S: int, heads: int = 3, B: int = 2) -> Tensor:
    """Mild, strong and total forgetting, mixed."""
    make = torch.Generator().manual_seed(1)
    steps = -torch.rand(B, heads, S, generator=make, dtype=torch.float64)
    kind = torch.rand(B, heads, S, generator=make)
    steps[kind < 0.1] = -40.0
    steps[kind < 0.04] = -torch.inf
    return steps.requires_grad_()


def gradients(out: Tensor, *tensors: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out).sin()
    return list(torch.autograd.grad((out * weight).sum(), tensors))


@pytest.mark.parametrize("T", [1, 5, 64, 65, 200])
def test_chunks_the_left_product_and_the_recurrence_agree(T):
    q, k, v = inputs(T, T)
    decay = constant_log_decay(-alibi_slopes(3), k)
    start = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    state = FixedState("lightning", 9, {"S": start})
    call = {"causal": True, "log_decay": decay, "state": state, "return_state": True}
    expected, last = lightning_attention_reference(q, k, v, **call)
    walked, end = recurrent(q, k, v, decay, start)
    assert relative_error(walked, expected) < budget(torch.float64)
    assert relative_error(end, last["S"]) < budget(torch.float64)
    for chunk in (1, 16, 64, 100, T):
        for version in (1, 2):
            out, after = lightning_attention(q, k, v, version=version, chunk_size=chunk, **call)
            assert relative_error(out, expected) < budget(torch.float64)
            assert relative_error(after["S"], last["S"]) < budget(torch.float64)


def test_float32_over_512_tokens():
    tensors = [x.detach() for x in inputs(512, 512, dtype=torch.float32)]
    decay = constant_log_decay(-alibi_slopes(3), tensors[1])
    expected = lightning_attention_reference(*tensors, causal=True, log_decay=decay)
    for version, chunk in [(2, 1), *product((1, 2), (16, 64, 100, 512))]:
        out = lightning_attention(
            *tensors, causal=True, log_decay=decay, version=version, chunk_size=chunk
        )
        assert (out - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("heads", [None, 1, 2, 4])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("T", "S"), [(150, 150), (4, 9), (9, 4), (0, 3), (3, 0)])
def test_gradients_with_decays_of_every_kind(heads, version, T, S):
    """One decay for all, for every key head, or for every query head of a group."""
    q, k, v = inputs(T, S, H=4, Hk=2)
    decay = decays(S, heads) if heads else None
    mask = torch.rand(2, S, generator=torch.Generator().manual_seed(2)) < 0.8
    call = {"causal": True, "log_decay": decay, "key_mask": mask, "return_state": True}
    tensors = [q, k, v] + ([decay] if heads else [])
    found = []
    for op in (lightning_attention, lightning_attention_reference):
        options = {"version": version, "chunk_size": 64} if op is lightning_attention else {}
        out, state = op(q, k, v, **call, **options)
        both = torch.cat([out.flatten(), state["S"].flatten()])
        found.append(
            [both, *gradients(both + 0.0 * sum(x[..., :0].sum() for x in tensors), *tensors)]
        )
        assert state["S"].shape[1] == (4 if heads == 4 else 2)
    for x, y in zip(*found, strict=True):
        assert (x - y).abs().max() <= 1e-10 * (1 + y.abs().max()) if x.numel() else True


def test_gradcheck_with_the_state_of_both_ends():
    q, k, v = inputs(5, 5, B=1, H=2, Hk=2, D=2, Dv=3)
    start = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    steps = torch.tensor([-0.3, -0.01], dtype=torch.float64, requires_grad=True)

    def call(q, k, v, start, steps, version):
        out, state = lightning_attention(
            q, k, v, causal=True, log_decay=constant_log_decay(steps, k), version=version,
            chunk_size=2, state=FixedState("lightning", 1, {"S": start}), return_state=True,
        )  # fmt: skip
        return out, state["S"]

    for version in (1, 2):
        assert torch.autograd.gradcheck(
            lambda *x, version=version: call(*x, version), (q, k, v, start, steps)
        )


@pytest.mark.parametrize("name", ["fwd_bwd_decay", "fwd_bwd_no_decay"])
@pytest.mark.parametrize("version", [1, 2])
def test_equals_the_kernels_of_the_authors(name, version):
    path = GOLDEN / name
    tolerance = json.loads(path.with_suffix(".json").read_text())["tolerance"]
    data = load_file(path.with_suffix(".safetensors"))
    q, k, v = (data[f"in.{x}"].requires_grad_() for x in "qkv")
    decay = constant_log_decay(-data["in.slope"].flatten(), k) if "in.slope" in data else None
    out, state = lightning_attention(
        q, k, v, causal=True, log_decay=decay, version=version, return_state=True
    )
    assert relative_error(out, data["out.o"]) < tolerance["out"]
    assert relative_error(state["S"], data["out.final_state_fp64_recurrence"]) < tolerance["out"]
    got = torch.autograd.grad(out, (q, k, v), data["in.grad_out"])
    for gradient, x in zip(got, "qkv", strict=True):
        assert relative_error(gradient, data[f"grad.{x}"]) < tolerance["grad"]


def test_equals_flash_linear_attention_on_packed_sequences_with_states():
    about = json.loads((GOLDEN / "fla_varlen.json").read_text())
    data, tolerance = load_file(GOLDEN / "fla_varlen.safetensors"), about["tolerance"]
    given = {x: data[f"in.{x}"].requires_grad_() for x in ("q", "k", "v", "initial_state")}
    q, k, v = (given[x].transpose(1, 2) for x in "qkv")
    out, state = lightning_attention(
        q, k, v, causal=True, scale=about["config"]["scale"],
        log_decay=constant_log_decay(data["out.g_gamma"], k),
        cu_seqlens=data["in.cu_seqlens"].int(),
        state=FixedState("lightning", 1, {"S": given["initial_state"]}), return_state=True,
    )  # fmt: skip
    assert relative_error(out.transpose(1, 2), data["out.o"]) < tolerance["out"]
    assert relative_error(state["S"], data["out.final_state"]) < tolerance["out"]
    loss = (out.transpose(1, 2) * data["in.grad_out"]).sum()
    loss = loss + (state["S"] * data["in.grad_final_state"]).sum()
    for name, gradient in zip(given, torch.autograd.grad(loss, [*given.values()]), strict=True):
        assert relative_error(gradient, data[f"grad.{name}"]) < tolerance["grad"]


@pytest.mark.parametrize("at", [0, 1, 31, 64, 129, 130])
def test_a_state_continues_at_any_split_and_token_by_token(at):
    tensors = [x.detach() for x in inputs(130, 130, dtype=torch.float32)]
    decay = constant_log_decay(-alibi_slopes(3), tensors[1])
    whole = lightning_attention(*tensors, causal=True, log_decay=decay)
    parts, state = [], None
    steps = [at, *[1] * 3, 130 - at - 3] if at < 127 else [at, 130 - at]
    for piece in zip(*(x.split(steps, 2) for x in (*tensors, decay)), strict=True):
        out, state = lightning_attention(
            *piece[:3], causal=True, log_decay=piece[3], state=state, return_state=True
        )
        parts.append(out)
    assert (torch.cat(parts, 2) - whole).abs().max() < 1e-5 * whole.abs().max()


def test_without_decay_and_with_a_decay_that_leaves_the_own_token_only():
    q, k, v = inputs(50, 50)
    expected = torch.einsum("bhtd,bhtde->bhte", q, (k[..., None] * v[..., None, :]).cumsum(2))
    for decay in (None, torch.zeros(2, 3, 50)):
        out = lightning_attention(q, k, v, causal=True, log_decay=decay)
        assert relative_error(out, expected) < budget(torch.float64)
    own = (q * k).sum(3, keepdim=True) * v
    strong = torch.full((2, 3, 50), -50.0)
    assert relative_error(lightning_attention(q, k, v, causal=True, log_decay=strong), own) < 1e-15


@pytest.mark.parametrize(("D", "Dv"), [(16, 16), (24, 8), (192, 40), (1, 3)])
@pytest.mark.parametrize("version", [1, 2])
def test_any_head_size(D, Dv, version):
    q, k, v = inputs(70, 70, B=1, D=D, Dv=Dv)
    decay = constant_log_decay(-alibi_slopes(3), k)
    call = {"causal": True, "log_decay": decay}
    out = lightning_attention(q, k, v, version=version, **call)
    assert relative_error(out, lightning_attention_reference(q, k, v, **call)) < 1e-10


@pytest.mark.parametrize("version", [1, 2])
def test_a_later_token_changes_no_bit(version):
    results = []
    for junk in (0.25, 1e30):
        q, k, v = inputs(40, 40, dtype=torch.float32)
        decay = decays(40).detach().float().requires_grad_()
        with torch.no_grad():
            k[:, :, 21:], v[:, :, 21:], decay[:, :, 21:] = junk, -junk, -3.0 * junk
        out = lightning_attention(
            q, k, v, causal=True, log_decay=decay, version=version, chunk_size=8
        )[:, :, :21]
        found = [x[:, :, :21] for x in gradients(out, q, k, v, decay)]
        results.append([out, *found])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("slope", [1e-5 * 0.0039, 0.7])
def test_bfloat16_over_16k_tokens(slope):
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 16384, 32, generator=make).bfloat16() for _ in range(3))
    decay = constant_log_decay(torch.tensor([-slope]), k)
    out = lightning_attention(q, k, v, causal=True, log_decay=decay)
    exact = lightning_attention(*(x.double() for x in (q, k, v)), causal=True, log_decay=decay)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, exact) < 4e-3  # the rounding of the output alone


def test_what_is_kept_for_the_backward_are_the_inputs():
    q, k, v = inputs(1024, 1024, dtype=torch.float32, B=1, H=2, Hk=2, D=64, Dv=64)
    decay, stores = constant_log_decay(-alibi_slopes(2), k), {}

    def pack(x: Tensor) -> Tensor:
        stores[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        lightning_attention(q, k, v, causal=True, log_decay=decay)
    assert sum(stores.values()) <= 1.1 * sum(x.nbytes for x in (q, k, v))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_both_directions_equal_the_matrix_of_weights(heads):
    q, k, v = inputs(70, 70, H=4, Hk=2)
    decay = decays(70, heads)
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(2)) < 0.8
    call = {"log_decay": decay, "scale": 0.3}
    for extra in ({}, {"key_mask": mask}):
        out = bidirectional_lightning_attention(q, k, v, **call, **extra, chunk_size=16)
        expected = bidirectional_lightning_attention_reference(q, k, v, **call, **extra)
        assert relative_error(out, expected) < budget(torch.float64)
        found, wanted = (gradients(x, q, k, v, decay) for x in (out, expected))
        for x, y in zip(found, wanted, strict=True):
            assert relative_error(x, y) < budget(torch.float64, "gradient")
    same = bidirectional_lightning_attention(q, k, v, **call, impl="reference")
    assert torch.equal(same, bidirectional_lightning_attention_reference(q, k, v, **call))


def test_both_directions_of_a_constant_decay_are_powers_of_the_distance():
    q, k, v = inputs(20, 20, B=1, H=2, Hk=2)
    slopes = alibi_slopes(2)
    at = torch.arange(20)
    powers = (-slopes.view(2, 1, 1) * (at[:, None] - at).abs()).exp()
    expected = (q @ k.mT * powers) @ v
    out = bidirectional_lightning_attention(q, k, v, log_decay=constant_log_decay(-slopes, k))
    assert relative_error(out, expected) < budget(torch.float64)
    plain = bidirectional_lightning_attention(q, k, v)
    assert relative_error(plain, lightning_attention(q, k, v)) < budget(torch.float64)


def test_both_directions_of_packed_and_of_short_inputs():
    q, k, v = inputs(12, 12, B=1)
    decay, ends = decays(12, B=1), [0, 5, 5, 6, 12]
    packed = bidirectional_lightning_attention(
        q, k, v, log_decay=decay, cu_seqlens=torch.tensor(ends, dtype=torch.int32)
    )
    for i, j in pairwise(ends):
        piece = [x[:, :, i:j] for x in (q, k, v)]
        alone = bidirectional_lightning_attention(*piece, log_decay=decay[:, :, i:j])
        assert torch.equal(packed[:, :, i:j], alone)
    half = bidirectional_lightning_attention(*(x.bfloat16() for x in (q, k, v)), log_decay=decay)
    assert half.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="^bidirectional_lightning_attention: k must be of q's"):
        bidirectional_lightning_attention(q[:, :, 1:], k, v)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "version must be 1 or 2, got 3"),
        ({"version": True}, "version must be 1 or 2, got True"),
        ({"version": 1, "causal": False}, "version must be 2 without causal, got 1"),
        ({"log_decay": torch.zeros(2, 2, 6)}, r"log_decay must be of shape \[2, 1 or 3, 6\]"),
        ({"log_decay": torch.zeros(2, 3, 6, 8)}, r"log_decay must be of shape \[2, 1 or 3, 6\]"),
        ({"state": FixedState("linear", 1, {})}, "state must be a state of lightning_attention"),
    ],
)
def test_errors_name_the_argument(changes, message):
    q, k, v = inputs(6, 6)
    with pytest.raises(ValueError, match=f"^lightning_attention: {message}"):
        lightning_attention(q, k, v, **{"causal": True} | changes)


def test_explain_names_the_form():
    q, k, v = inputs(6, 6)
    assert explain(lightning_attention, q, k, v, causal=True, version=1).form == "left_product"
    assert explain(lightning_attention, q, k, v, causal=True, impl="eager").form == "chunked"
    one = [x[:, :, :1] for x in (q, k, v)]
    assert explain(lightning_attention, *one, causal=True, impl="eager").form == "recurrent"
    with pytest.raises(ValueError, match="impl='native' cannot serve this call"):
        lightning_attention(q, k, v, causal=True, version=1, impl="native")


def test_registration():
    q, k, v = inputs(5, 5)
    a = decays(5)
    state = torch.zeros(2, 3, 8, 12, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.regard.lightning_left_fwd, (q, k, v, a, state, 2))
    made = torch.randn(2, 3, 5, 12).double(), torch.randn_like(state).detach()
    plain = [x.detach() for x in (q, k, v, a, state)]
    torch.library.opcheck(torch.ops.regard.lightning_left_bwd, (*made, *plain, 2, True))
    assert left_product(q, k, v, a, state)[0].shape == (2, 3, 5, 12)
