"""What is particular to linear attention and its engine; the general laws are the contract's."""

from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from regard.core.budgets import budget, relative_error
from regard.core.state import FixedState, load_state
from regard.explain import explain
from regard.ops.linear import linear_attention
from regard.ops.linear.chunked import chunked
from regard.ops.linear.engine import attend, encode, read
from regard.ops.linear.features import elu
from regard.ops.linear.recurrent import recurrent
from regard.ops.linear.reference import linear_attention_reference

GOLDEN = Path(__file__).parents[1] / "golden"
OPTIONS = {
    "default": {},
    "identity": {"feature_map": "identity", "normalise": False},
    "numerator": {"normalise": False},
}


def inputs(T: int, S: int, *, dtype=torch.float64, B=2, H=4, Hk=2, D=5, Dv=3, seed=0):
    make = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(B, heads, length, width, generator=make, dtype=torch.float64)
        for heads, length, width in ((H, T, D), (Hk, S, D), (Hk, S, Dv))
    )
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def decays(S: int, *, heads=2, B=2, seed=1) -> Tensor:
    """Mild, strong and total forgetting, mixed."""
    make = torch.Generator().manual_seed(seed)
    steps = -torch.rand(B, heads, S, generator=make, dtype=torch.float64)
    kind = torch.rand(B, heads, S, generator=make)
    steps[kind < 0.1] = -40.0
    steps[kind < 0.04] = -torch.inf
    return steps.requires_grad_()


def masks(S: int, B=2) -> Tensor:
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(2)) < 0.8
    mask[:, -1:] = True  # at least one key, and a last row that is more than that key
    return mask


def gradients(out: Tensor, *tensors: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out).sin()
    return list(torch.autograd.grad((out * weight).sum(), tensors, allow_unused=True))


def quadratic(q, k, v, log_decay, key_mask, *, causal, normalise, feature_map) -> Tensor:
    """The whole matrix of weights, which no form holds: products of decays, one by one."""
    phi = (lambda x: torch.nn.functional.elu(x) + 1) if feature_map == "elu" else (lambda x: x)
    group, (B, Hk, S, _), T = q.shape[1] // k.shape[1], k.shape, q.shape[2]
    factors = torch.where(key_mask[:, None], log_decay.exp(), 1.0).expand(B, Hk, S)
    weights = phi(q) @ phi(k).repeat_interleave(group, 1).mT
    mask = key_mask[:, None, None].expand_as(weights).clone()
    products = torch.ones(B, Hk, T, S, dtype=q.dtype)
    for i, j in product(range(T), range(S)):
        last = i + S - T if causal else S - 1
        mask[:, :, i, j] &= j <= last
        if j <= last:
            products[:, :, i, j] = factors[:, :, j + 1 : last + 1].prod(-1)
    weights = torch.where(mask, weights * products.repeat_interleave(group, 1), 0.0)
    out = weights @ v.repeat_interleave(group, 1)
    if not normalise:
        return out
    total = weights.sum(-1, keepdim=True)
    return torch.where(total == 0, 0.0, out / total.masked_fill(total == 0, 1.0))


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "S"), [(12, 12), (5, 12), (12, 5)])
def test_equals_the_matrix_of_weights(case, causal, T, S):
    options = {"feature_map": "elu", "normalise": True} | OPTIONS[case] | {"causal": causal}
    q, k, v = inputs(T, S)
    a, mask = decays(S), masks(S)
    expected = quadratic(q, k, v, a, mask, **options)
    for impl in ("eager", "reference"):
        out = linear_attention(q, k, v, log_decay=a, key_mask=mask, impl=impl, **options)
        assert relative_error(out, expected) < budget(torch.float64)
    at = torch.autograd.grad(out.sin().sum(), (q, k, v), retain_graph=True)
    for x, y in zip(at, torch.autograd.grad(expected.sin().sum(), (q, k, v)), strict=True):
        assert relative_error(x, y) < budget(torch.float64, "gradient")


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("decay", [None, "per head", "shared"])
def test_recurrent_chunked_and_reference_agree(case, T, decay):
    tensors = inputs(T, T)
    options = OPTIONS[case] | {"causal": True, "key_mask": masks(T)}
    if decay:
        options["log_decay"] = decays(T, heads=2 if decay == "per head" else 1)
        tensors.append(options["log_decay"])
    expected = linear_attention_reference(*tensors[:3], **options)
    wanted = gradients(expected, *tensors)
    for chunk in (1, 7, 64, 1000):
        out = linear_attention(*tensors[:3], **options, chunk_size=chunk)
        assert relative_error(out, expected) < budget(torch.float64)
        for x, y in zip(gradients(out, *tensors), wanted, strict=True):
            assert (x - y).abs().max() <= 1e-11 * (1 + y.abs().max())


@pytest.mark.parametrize("decay", [False, True])
def test_engine_walks_agree_on_features_of_any_width(decay):
    q, k, v = inputs(70, 70, D=9, Dv=4)
    state = torch.randn(2, 2, 9, 4, dtype=torch.float64, requires_grad=True)
    a = decays(70) if decay else None
    tensors = [q, k, v, state] + ([a] if decay else [])
    one, two = recurrent(q, k, v, a, state), chunked(q, k, v, a, state, 16)
    for x, y in zip(one, two, strict=True):
        assert relative_error(x, y) < budget(torch.float64)
    got, wanted = (
        gradients(torch.cat([o.flatten(), s.flatten()]), *tensors) for o, s in (two, one)
    )
    for x, y in zip(got, wanted, strict=True):
        assert relative_error(x, y) < budget(torch.float64, "gradient")
    assert relative_error(encode(k, v, a, state), one[1]) < budget(torch.float64)
    assert relative_error(read(q[:, :, -1:], one[1]), one[0][:, :, -1:]) < budget(torch.float64)
    empty = attend(q[:, :, :0], k[:, :, :0], v[:, :, :0], None, state, walk=chunked)
    assert empty[0].shape == (2, 4, 0, 4)
    assert torch.equal(empty[1], state)


@pytest.mark.parametrize("decay", [False, True])
def test_gradcheck_of_the_registered_pair(decay):
    q, k, v = inputs(5, 5, B=1, H=2, Hk=1, D=2, Dv=2)
    state = torch.randn(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    a = -torch.rand(1, 1, 5, dtype=torch.float64) if decay else None
    a = a.requires_grad_() if decay else None
    assert torch.autograd.gradcheck(lambda *x: chunked(*x, 2), (q, k, v, a, state))


@pytest.mark.parametrize("name", ["fwd_bwd_decay", "fwd_bwd_no_decay"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_kernels_of_lightning_attention(name, dtype):
    """The unnormalised identity map with a constant decay, forward and backward."""
    path = GOLDEN / "lightning_attention" / name
    tolerance = json.loads(path.with_suffix(".json").read_text())["tolerance"]
    data = {key: x.to(dtype) for key, x in load_file(path.with_suffix(".safetensors")).items()}
    q, k, v = (data[f"in.{x}"].requires_grad_() for x in "qkv")
    a = -data["in.slope"].view(1, -1, 1).expand(q.shape[:3]) if "in.slope" in data else None
    options = {"feature_map": "identity", "normalise": False, "causal": True, "log_decay": a}
    out, state = linear_attention(q, k, v, **options, return_state=True)
    assert relative_error(out, data["out.o"]) < tolerance["out"]
    assert relative_error(state["S"], data["out.final_state_fp64_recurrence"]) < tolerance["out"]
    got = torch.autograd.grad(out, (q, k, v), data["in.grad_out"])
    for gradient, x in zip(got, "qkv", strict=True):
        assert relative_error(gradient, data[f"grad.{x}"]) < tolerance["grad"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("step", [0.0, -40.0, -1e30, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_decays_are_exact_and_finite(causal, step, dtype):
    q, k, v = inputs(150, 150, dtype=dtype)
    a = torch.full((2, 2, 150), step, dtype=dtype, requires_grad=True)
    out = linear_attention(q, k, v, causal=causal, log_decay=a)
    expected = linear_attention_reference(
        *(x.double() for x in (q, k, v)), causal=causal, log_decay=a.double()
    )
    assert relative_error(out, expected) < budget(dtype)
    got = gradients(out, q, k, v, a)
    assert all(x.isfinite().all() for x in got)
    if step < -1000:  # every query sees its own key, or the last one, alone
        own = v if causal else v[:, :, -1:].expand_as(v)
        assert torch.allclose(out, own.repeat_interleave(2, 1), rtol=1e-6, atol=0)
        assert got[3].abs().max() == 0


def test_a_forget_leaves_no_bit_of_the_past():
    """Also of a past that has overflowed: it is cut off, not multiplied by 0."""
    results = []
    for junk in (0.5, 1e30):
        q, k, v = inputs(40, 40, dtype=torch.float32)
        with torch.no_grad():
            k[:, :, 3], v[:, :, 3] = junk, junk
        a = torch.full((2, 2, 40), -0.1)
        a[:, :, 20] = -torch.inf
        for chunk in (8, 64):
            out = linear_attention(q, k, v, causal=True, log_decay=a, chunk_size=chunk)
            last = linear_attention(q[:, :, -1:], k, v, log_decay=a)
            late = torch.autograd.grad(out[:, :, 20:].sum(), (q, k, v))
            results.append([out[:, :, 20:], last, *(x[:, :, 20:] for x in late)])
    for one, two in zip(results[:2], results[2:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("chunk", [8, 64])
@pytest.mark.parametrize("decay", [False, True])
def test_a_later_key_changes_no_bit(case, chunk, decay):
    results = []
    for junk in (0.25, 1e30):
        q, k, v = inputs(40, 40, dtype=torch.float32)
        a = decays(40).detach().float().requires_grad_()
        with torch.no_grad():
            k[:, :, 21:], v[:, :, 21:] = junk, -junk
            a[:, :, 21:] = -3.0 * junk
        options = OPTIONS[case] | ({"log_decay": a} if decay else {})
        out = linear_attention(q, k, v, causal=True, chunk_size=chunk, **options)[:, :, :21]
        wanted = (q, k, v, a) if decay else (q, k, v)
        results.append([out, *(x[:, :, :21] for x in gradients(out, *wanted))])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
@pytest.mark.parametrize("causal", [False, True])
def test_masked_keys_reach_nothing(causal, junk, impl):
    q, k, v = inputs(20, 20)
    a = decays(20)
    mask = masks(20)
    mask[1, :6] = False  # rows without any key where causal
    options = {"causal": causal, "key_mask": mask, "impl": impl}
    clean = linear_attention(q, k, v, log_decay=a, **options)
    wanted = gradients(clean, q, k, v, a)
    with torch.no_grad():
        for x in (k, v):
            x.masked_fill_(~mask[:, None, :, None], junk)
        a.masked_fill_(~mask[:, None], junk)
    out = linear_attention(q, k, v, log_decay=a, **options)
    assert torch.equal(out, clean)
    for x, y in zip(gradients(out, q, k, v, a), wanted, strict=True):
        assert torch.equal(x, y)
    if causal:
        assert not out[1, :, :6].any()
        assert not wanted[0][1, :, :6].any()


@pytest.mark.parametrize("causal", [False, True])
def test_a_state_continues_with_masks_and_decays(causal):
    q, k, v = inputs(30, 30)
    a, mask = decays(30), masks(30)
    whole, last = linear_attention(
        q, k, v, causal=True, log_decay=a, key_mask=mask, return_state=True
    )
    for at in (0, 1, 13, 29, 30):
        options = {"log_decay": a[:, :, :at], "key_mask": mask[:, :at]}
        first, state = linear_attention(
            q[:, :, :at], k[:, :, :at], v[:, :, :at], causal=True, return_state=True, **options
        )
        assert state.length == at
        rest = {"log_decay": a[:, :, at:], "key_mask": mask[:, at:], "state": state}
        tensors = (q[:, :, at:], k[:, :, at:], v[:, :, at:])
        second, end = linear_attention(*tensors, causal=causal, return_state=True, **rest)
        expected = whole if causal else linear_attention(q, k, v, log_decay=a, key_mask=mask)
        assert relative_error(second, expected[:, :, at:]) < budget(torch.float64)
        assert relative_error(first, whole[:, :, :at]) < budget(torch.float64)
        for name in ("S", "z"):
            assert relative_error(end[name], last[name]) < budget(torch.float64)
        if causal:
            bare = linear_attention(*tensors, causal=True, impl="reference", **rest)
            assert relative_error(second, bare) < budget(torch.float64)


def test_a_query_at_the_last_old_token_reads_the_state_and_earlier_ones_cannot():
    q, k, v = inputs(8, 8)
    whole, _ = linear_attention(q, k, v, causal=True, return_state=True)
    _, state = linear_attention(
        q[:, :, :5], k[:, :, :5], v[:, :, :5], causal=True, return_state=True
    )
    out = linear_attention(q[:, :, 4:], k[:, :, 5:], v[:, :, 5:], causal=True, state=state)
    assert relative_error(out, whole[:, :, 4:]) < budget(torch.float64)
    with pytest.raises(ValueError, match="q must be of at most 4 tokens"):
        linear_attention(q[:, :, 3:], k[:, :, 5:], v[:, :, 5:], causal=True, state=state)


def test_a_state_is_saved_selected_and_loaded(tmp_path):
    q, k, v = inputs(9, 9, dtype=torch.bfloat16)
    _, state = linear_attention(q, k, v, causal=True, return_state=True)
    assert {name: x.dtype for name, x in state.tensors.items()} == dict.fromkeys(
        ("S", "z"), torch.float32
    )
    state.save(tmp_path / "state")
    again = load_state(tmp_path / "state").select(torch.tensor([1, 1]))
    out = linear_attention(q, k, v, causal=True, state=again)
    assert torch.equal(out[1], linear_attention(q, k, v, causal=True, state=state)[1])


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_equals_separate(causal, decay):
    q, k, v = inputs(20, 24, B=1)
    a, mask = (decays(24, B=1) if decay else None), masks(24, B=1)
    ends_q, ends_k = [0, 3, 3, 15, 20], [0, 6, 8, 8, 24]
    out = linear_attention(
        q, k, v, causal=causal, log_decay=a, key_mask=mask,
        cu_seqlens=torch.tensor(ends_q, dtype=torch.int32),
        cu_seqlens_k=torch.tensor(ends_k, dtype=torch.int32),
    )  # fmt: skip
    rows = [
        linear_attention(
            q[:, :, t0:t1], k[:, :, s0:s1], v[:, :, s0:s1], causal=causal,
            log_decay=a[:, :, s0:s1] if decay else None, key_mask=mask[:, s0:s1],
        )
        for t0, t1, s0, s1 in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)
    ]  # fmt: skip
    assert torch.equal(out, torch.cat(rows, 2))


def test_scale_multiplies_the_numerator_and_cancels_in_the_mean():
    q, k, v = inputs(6, 6)
    scale = torch.tensor([0.5, 1.0, 2.0, -3.0], dtype=torch.float64, requires_grad=True)
    plain = {causal: linear_attention(q, k, v, causal=causal) for causal in (False, True)}
    for causal, expected in plain.items():
        for given in (2.0, scale):
            out = linear_attention(q, k, v, causal=causal, scale=given)
            assert torch.equal(out, expected)
        assert not torch.autograd.grad(out.square().sum(), scale)[0].any()
        bare = linear_attention(q, k, v, causal=causal, normalise=False)
        out = linear_attention(q, k, v, causal=causal, normalise=False, scale=scale)
        assert relative_error(out, bare * scale[:, None, None]) < budget(torch.float64)
        tenth = {"causal": causal, "normalise": False, "scale": 0.1}  # no number in float32
        for impl in ("eager", "reference"):
            out = linear_attention(q, k, v, **tenth, impl=impl)
            assert relative_error(out, 0.1 * bare) < budget(torch.float64)
    out = linear_attention(q, k, v, causal=True, normalise=False, scale=scale)
    (gradient,) = torch.autograd.grad(out.sum(), scale)
    assert relative_error(gradient, bare.sum((0, 2, 3))) < budget(torch.float64, "gradient")


def test_the_feature_map_is_positive_and_right_at_zero():
    x = torch.tensor([-80.0, -20.0, -1.0, 0.0, 2.0], requires_grad=True)
    features = elu(x)
    assert (features > 0).all()
    assert torch.allclose(features, torch.nn.functional.elu(x) + 1, atol=1e-7)
    (gradient,) = torch.autograd.grad(features.sum(), x)
    assert torch.allclose(gradient, torch.tensor([0.0, 2.061e-9, 0.36788, 1.0, 1.0]), atol=1e-5)


def test_bfloat16_computes_in_float32_over_a_long_sequence():
    tensors = [x.detach() for x in inputs(3000, 3000, dtype=torch.bfloat16, B=1)]
    exact = [x.double() for x in tensors]
    for options in (*OPTIONS.values(), {"log_decay": torch.full((1, 1, 3000), -1e-3)}):
        out = linear_attention(*tensors, causal=True, **options)
        expected = linear_attention(*exact, causal=True, **options)
        assert out.dtype == torch.bfloat16
        assert relative_error(out, expected) < 3e-3  # the rounding of the output alone


@pytest.mark.parametrize("options", [{}, {"log_decay": True}, {"causal": False}])
def test_what_a_call_keeps_for_its_backward_grows_with_its_length(options):
    def kept(T: int) -> int:
        q, k, v = inputs(T, T, dtype=torch.float32, B=1, H=1, Hk=1, D=32, Dv=32)
        call = {"causal": True} | options
        if "log_decay" in options:
            call["log_decay"] = torch.full((1, 1, T), -0.1, requires_grad=True)
        stores: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            stores[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            linear_attention(q, k, v, **call).sum().backward()
        return sum(stores.values())

    size = 4 * 32 * 1024
    assert kept(1024) < 4.5 * size  # features, values, output
    assert kept(4096) < 6 * 4 * size
    assert kept(8192) < 2.1 * kept(4096)  # up to 1024 tokens go in one piece


def test_a_second_derivative_raises():
    q, k, v = inputs(6, 6)
    out = linear_attention(q, k, v, causal=True, feature_map="identity", normalise=False)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(gradient.sum(), v)
    out = linear_attention(q, k, v, causal=True, impl="reference")
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    assert torch.autograd.grad(gradient.sum(), v)[0].isfinite().all()


@pytest.mark.parametrize("decay", [False, True])
def test_registration(decay):
    q, k, v = inputs(5, 5)
    a = decays(5) if decay else None
    state = torch.zeros(2, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.regard.linear_fwd, (q, k, v, a, state, 2))
    plain = [x.detach() for x in (q, k, v, *([a] if decay else []), state)]
    plain.insert(3, None) if not decay else None
    made = torch.randn(2, 4, 5, 3, dtype=torch.float64), torch.randn_like(state).detach()
    torch.library.opcheck(torch.ops.regard.linear_bwd, (*made, *plain, 2, decay))
    torch.library.opcheck(torch.ops.regard.linear_elu_fwd, (q,))
    torch.library.opcheck(torch.ops.regard.linear_elu_bwd, (q.detach(), k.detach()[:, :1]))
    torch.library.opcheck(torch.ops.regard.linear_mean_fwd, (q,))
    weight = torch.ones(2, 4, 5, 1, dtype=torch.float64)
    torch.library.opcheck(torch.ops.regard.linear_mean_bwd, (q.detach(), q.detach(), weight))


def test_vmap_equals_a_loop():
    q, k, v = (torch.stack([x.detach(), 2 * x.detach()], 1) for x in inputs(9, 9))
    a = decays(9).detach()
    mapped = torch.vmap(
        lambda q, k, v, a: linear_attention(q, k, v, causal=True, log_decay=a, chunk_size=4),
        in_dims=(1, 1, 1, None),
        out_dims=1,
    )
    looped = [
        linear_attention(q[:, i], k[:, i], v[:, i], causal=True, log_decay=a) for i in range(2)
    ]
    assert relative_error(mapped(q, k, v, a), torch.stack(looped, 1)) < budget(torch.float64)


def test_a_compiled_graph_does_not_grow_with_the_length():
    sizes = []

    def count(graph, example):
        sizes.append(len(graph.graph.nodes))
        return graph

    for T in (300, 3000):
        torch._dynamo.reset()
        tensors = [x.detach() for x in inputs(T, T, dtype=torch.float32, B=1)]
        f = torch.compile(linear_attention, fullgraph=True, backend=count, dynamic=False)
        out = f(*tensors, causal=True)
        assert torch.equal(out, linear_attention(*tensors, causal=True))
    assert len(sizes) == 2
    assert sizes[0] == sizes[1]


def test_an_exported_program_serves_other_lengths():
    class Module(torch.nn.Module):
        def forward(self, q, k, v, log_decay):
            return linear_attention(q, k, v, causal=True, log_decay=log_decay)

    tensors = [x.detach() for x in (*inputs(70, 70), decays(70))]
    length = torch.export.Dim("length", min=3)
    program = torch.export.export(
        Module(), tuple(tensors), dynamic_shapes=[{2: length}] * 4
    ).module()
    others = [x.detach() for x in (*inputs(130, 130), decays(130))]
    expected = linear_attention(*others[:3], causal=True, log_decay=others[3])
    assert torch.equal(program(*others), expected)


def test_explain_names_the_form():
    q, k, v = inputs(9, 9)
    assert explain(linear_attention, q, k, v).form == "tiled"
    masked = explain(linear_attention, q, k, v, key_mask=torch.ones(2, 9) > 0)
    assert masked.form == "encode_read"
    assert explain(linear_attention, q, k, v, causal=True).form == "chunked"
    one = explain(linear_attention, q[:, :, :1], k, v, causal=True)
    assert (one.form, one.available) == ("recurrent", ("eager", "reference"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"feature_map": "relu"}, ValueError, "feature_map must be one of 'elu', 'identity'"),
        ({"feature_map": "elo"}, ValueError, "did you mean 'elu'"),
        ({"feature_map": "identity"}, ValueError, "normalise must be False with feature_map="),
        ({"normalise": 1}, TypeError, "normalise must be True or False"),
        ({"causal": "yes"}, TypeError, "causal must be True or False"),
        ({"return_state": None}, TypeError, "return_state must be True or False"),
        ({"scale": float("nan")}, ValueError, "scale must be a finite number"),
        ({"scale": torch.ones(3)}, ValueError, r"scale must be of shape \[\] or \[4\]"),
        ({"log_decay": torch.zeros(2, 4, 6)}, ValueError, "log_decay must be of shape"),
        ({"log_decay": torch.zeros(2, 2, 6).int()}, TypeError, "log_decay must be a floating"),
        ({"key_mask": torch.ones(2, 6)}, TypeError, "key_mask must be a bool tensor"),
        ({"key_mask": torch.ones(2, 5) > 0}, ValueError, r"key_mask must be of shape \[2, 6\]"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be an int of at least 1"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size must be an int"),
        ({"impl": "reference", "chunk_size": 2}, ValueError, "reference: it has no chunks"),
        ({"impl": "native"}, ValueError, "impl='native' cannot serve this call"),
        ({"state": torch.zeros(2)}, TypeError, "state must be None or a FixedState"),
        ({"state": FixedState("other", 1, {})}, ValueError, "a state of linear_attention"),
        (
            {"state": FixedState("linear", 1, {"S": torch.zeros(2, 2, 5, 3)})},
            ValueError,
            "state must be one of a call with normalise=True, got one that holds S",
        ),
        (
            {
                "state": FixedState(
                    "linear", 1, {"S": torch.zeros(2, 2, 5, 4), "z": torch.zeros(2, 2, 5)}
                )
            },
            ValueError,
            r"state\['S'\] must be float64 \[2, 2, 5, 3\] on cpu",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)},
            ValueError,
            "q must be of batch size 1 with packed sequences",
        ),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    q, k, v = inputs(6, 6)
    with pytest.raises(error, match=f"^linear_attention: .*{message}"):
        linear_attention(q, k, v, **changes)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_pack_carries_one_state_for_each_sequence(causal, impl):
    q, k, v = inputs(20, 20, B=1)
    ends = [0, 7, 7, 20]
    options = {"causal": causal, "impl": impl, "return_state": True}
    starts = FixedState("linear", 3, {"S": torch.rand(3, 2, 5, 3).double(),
                                      "z": torch.rand(3, 2, 5).double()})  # fmt: skip
    pack = {"cu_seqlens": torch.tensor(ends, dtype=torch.int32)} | options
    for state in (None, starts):
        out, after = linear_attention(q, k, v, state=state, **pack)
        for row, (i, j) in enumerate(pairwise(ends)):
            own = None if state is None else state.select(torch.tensor([row]))
            parts = (x[:, :, i:j] for x in (q, k, v))
            expected, end = linear_attention(*parts, state=own, **options)
            assert torch.equal(out[:, :, i:j], expected)
            for name in ("S", "z"):
                assert torch.equal(after[name][row : row + 1], end[name])
    with pytest.raises(ValueError, match=r"state\['S'\] must be float64 \[3, 2, 5, 3\]"):
        linear_attention(q, k, v, state=starts.select(torch.tensor([0])), **pack)
