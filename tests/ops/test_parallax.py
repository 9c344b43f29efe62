"""Parallax against the authors' operator, its limits, and local linear attention."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ops.samples import megabytes_over_inputs
from regard.core.budgets import relative_error
from regard.core.cache import KVCache
from regard.ops.local_linear import local_linear_attention
from regard.ops.parallax import parallax_attention
from regard.ops.parallax.reference import parallax_attention_reference
from regard.ops.softmax import softmax_attention

GOLDEN = Path(__file__).parents[1] / "golden" / "parallax"


def tensors(
    seed: int = 0,
    *,
    B: int = 2,
    H: int = 4,
    Hk: int = 2,
    T: int = 9,
    S: int = 9,
    D: int = 5,
    Dv: int = 3,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, T, D), (B, H, T, D), (B, Hk, S, D), (B, Hk, S, Dv))
    made = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return tuple(made)  # type: ignore[return-value]


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("name", ["op_gqa_causal", "op_window"])
def test_authors_operator(name: str, impl: str):
    data = load_file(GOLDEN / f"{name}.safetensors")
    args = json.loads((GOLDEN / f"{name}.json").read_text())["args"]
    leaves = [data[f"in.{n}"].transpose(1, 2).requires_grad_() for n in "qrkv"]
    window = None if args["window_size"] is None else (args["window_size"] - 1, 0)
    out = parallax_attention(
        *leaves, causal=args["causal"], scale=args["scale"], window=window, impl=impl
    )
    assert torch.allclose(out.transpose(1, 2), data["out.o"], rtol=1e-4, atol=1e-5)
    assert relative_error(out.transpose(1, 2), data["out.o"]) < 1e-5
    found = torch.autograd.grad(out, leaves, data["in.grad_o"].transpose(1, 2))
    for leaf, grad in zip("qrkv", found, strict=True):
        expected = data[f"grad.{leaf}"]
        assert torch.allclose(grad.transpose(1, 2), expected, rtol=1e-4, atol=1e-5), leaf
        assert relative_error(grad.transpose(1, 2), expected) < 1e-5, leaf


@pytest.mark.parametrize("causal", [False, True])
def test_no_probe_is_softmax_attention(causal: bool):
    q, r, k, v = tensors(T=33, S=33, D=16, dtype=torch.float32)
    out = parallax_attention(q, torch.zeros_like(r), k, v, causal=causal)
    assert relative_error(out, softmax_attention(q, k, v, causal=causal)) < 1e-6
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    torchs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert relative_error(out, torchs) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_the_solved_probe_is_local_linear_attention(mode: str, dtype: torch.dtype):
    q, _, k, v = tensors(T=60, S=60, D=16, dtype=dtype)
    options = {"causal": True, "ridge": 0.3, "ridge_mode": mode, "solver": "direct"}
    expected, aux = local_linear_attention(q, k, v, **options, return_aux=True)
    out = parallax_attention(q, aux.slope, k, v, causal=True)
    assert relative_error(out, expected) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(150, 150), (300, 270), (40, 290)])
def test_blocks_equal_reference(lengths: tuple[int, int], causal: bool):
    T, S = lengths
    inputs = [x.requires_grad_() for x in tensors(2, T=T, S=S, D=6)]
    generator = torch.Generator().manual_seed(3)
    uniform = lambda *shape: torch.rand(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    leaves = {"scale": uniform(4), "key_bias": uniform(2, 1, S)}
    leaves["log_decay"] = -0.1 * uniform(2, 4, S)
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    options = {
        "causal": causal, "window": (200, 70), "key_mask": uniform(2, S) < 0.8, **leaves,
    }
    expected = parallax_attention_reference(*inputs, **options)
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    everything = [*inputs, *leaves.values()]
    wanted = torch.autograd.grad(expected, everything, weight)
    for block_size in (None, 33):
        out = parallax_attention(*inputs, **options, block_size=block_size)
        assert relative_error(out, expected) < 1e-12
        found = torch.autograd.grad(out, everything, weight)
        for name, a, b in zip("qrkvsbd", found, wanted, strict=True):
            assert relative_error(a, b) < 1e-10, name


def test_gradcheck():
    leaves = [x.requires_grad_() for x in tensors(B=1, H=2, Hk=1, T=4, S=5, D=3, Dv=2)]
    torch.autograd.gradcheck(lambda *x: parallax_attention(*x, causal=True), leaves)


@pytest.mark.parametrize("index", range(4))
def test_each_gradient_alone(index: int):
    leaves = list(tensors())
    together = [x.clone().requires_grad_() for x in leaves]
    out = parallax_attention(*together, causal=True)
    expected = torch.autograd.grad(out.sin().sum(), together)[index]
    leaves[index].requires_grad_()
    (alone,) = torch.autograd.grad(
        parallax_attention(*leaves, causal=True).sin().sum(), leaves[index]
    )
    assert relative_error(alone, expected) < 1e-13


def test_constant_values_are_preserved():
    q, r, k, _ = tensors(T=40, S=40, D=8, dtype=torch.float32)
    r = 10 * r / r.norm(dim=-1, keepdim=True)  # weights of up to 20, of both signs
    v = torch.full((2, 2, 40, 3), 1.7)
    assert (parallax_attention(q, r, k, v, causal=True) - 1.7).abs().max() < 5e-6
    identity = torch.eye(40, dtype=torch.float64).expand(2, 2, 40, 40)
    weights = parallax_attention(q.double(), r.double(), k.double(), identity, causal=True)
    assert (weights.sum(-1) - 1).abs().max() < 1e-12
    assert weights.min() < 0
    assert (weights.triu(1) == 0).all()


def test_common_offset_costs_nothing():
    q, r, k, v = tensors(B=1, H=1, Hk=1, T=64, S=64, D=16, dtype=torch.float32)
    k = k + 100
    exact = parallax_attention(*(x.double() for x in (q, r, k, v)), causal=True)
    assert relative_error(parallax_attention(q, r, k, v, causal=True), exact) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
def test_peak_memory(backward: bool):
    """At 8192 tokens T x S would take 256 MB."""
    op = "regard.ops.parallax:parallax_attention"
    options = {"tensors": 4, "backward": backward, "options": "causal=True", "again": True}
    assert megabytes_over_inputs(op, 8192, **options) < 100


@pytest.mark.parametrize("window", [None, (3, 0)])
def test_decoding_with_padding(window: tuple[int, int] | None):
    q, r, k, v = tensors(H=4, Hk=1, T=12, S=12, dtype=torch.float32)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :3] = False
    options = {"causal": True, "window": window}
    whole = parallax_attention(q, r, k, v, key_mask=mask, **options)
    state, outs = None, []
    for start, stop in [(0, 5), *((i, i + 1) for i in range(5, 12))]:
        at = slice(start, stop)
        out, state = parallax_attention(
            q[:, :, at], r[:, :, at], k[:, :, at], v[:, :, at], key_mask=mask[:, at],
            state=state, return_state=True, **options,
        )
        outs.append(out)
    assert isinstance(state, KVCache)
    assert relative_error(torch.cat(outs, 2), whole) < 1e-5


def test_a_cache_of_keys_may_come_from_another_mechanism():
    q, r, k, v = tensors(T=12, S=12)
    early, late = (slice(None, 9), slice(9, None))
    _, state = softmax_attention(
        *(x[:, :, early] for x in (q, k, v)), causal=True, return_state=True
    )
    new = [x[:, :, late] for x in (q, k, v)]
    out = local_linear_attention(*new, causal=True, state=state.fork())
    whole = local_linear_attention(q, k, v, causal=True)
    assert relative_error(out, whole[:, :, late]) < 1e-11
    out = parallax_attention(new[0], r[:, :, late], *new[1:], causal=True, state=state)
    whole = parallax_attention(q, r, k, v, causal=True)
    assert relative_error(out, whole[:, :, late]) < 1e-11


def test_vmap_equals_a_loop():
    q, r, k, v = tensors(B=6, T=7, S=8)
    split = lambda x: x.unflatten(0, (3, 2))  # noqa: E731
    leaves = [x.requires_grad_() for x in (split(q), split(r), split(k), v[:2])]
    run = lambda *x: parallax_attention(*x, causal=True)  # noqa: E731
    out = torch.vmap(run, in_dims=(0, 0, 0, None))(*leaves)
    parts = torch.stack([run(*(x[i] for x in leaves[:3]), leaves[3]) for i in range(3)])
    assert relative_error(out, parts) < 1e-12
    found = torch.autograd.grad(out.sin().sum(), leaves)
    wanted = torch.autograd.grad(parts.sin().sum(), leaves)
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": torch.zeros(2, 4, 8, 5)}, r"r must be of shape \[2, 4, 9, 5\]"),
        ({"r": 1.0}, "r must be a torch.Tensor"),
        ({"r": torch.zeros(2, 4, 9, 5, dtype=torch.int32)}, "r must be a floating-point tensor"),
        ({"causal": 1}, "causal must be True or False"),
        ({"block_size": 0}, "block_size must be an int of at least 1"),
        ({"impl": "reference", "return_state": True}, "it keeps no state"),
        ({"impl": "reference", "block_size": 4}, "it has no blocks, nothing to do with block_size"),
    ],
)
def test_refusals(change: dict, message: str):
    q, r, k, v = tensors()
    with pytest.raises((ValueError, TypeError), match=f"parallax_attention: .*{message}"):
        parallax_attention(**{"q": q, "r": r, "k": k, "v": v, **change})
