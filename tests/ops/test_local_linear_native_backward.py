"""The backward in plain C, on every instruction set that runs here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from ops.samples import tensors
from regard.core.budgets import budget, relative_error
from regard.native.loader import limited_to
from regard.ops import local_linear_attention, parallax_attention, softmax_attention
from regard.ops.local_linear import native

ISAS = regard.native.instruction_sets()
here = pytest.mark.skipif(not ISAS, reason="no native library")
SIZES: dict[str, Any] = {"B": 1, "T": 50, "S": 100, "D": 16, "Dv": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "absolute ridge": {"ridge_mode": "absolute"},
    "no intercept": {"intercept": False},
    "both": {"ridge_mode": "absolute", "intercept": False},
    "window": {"window": (20, -1)},
    "not causal": {"causal": False},
    "window of both sides": {"causal": False, "window": (9, 4)},
    "gaussian": {"kernel": "gaussian", "ridge_mode": "absolute"},
}
OPERANDS = ("ridge", "scale", "key_bias", "log_decay")


def sample(
    heads: int, *, per_token: bool = False, seed: int = 1, **sizes: int
) -> dict[str, Tensor]:
    """q, k, v and every operand that has a gradient, as leaves in float32."""
    sizes = {**SIZES, **sizes}
    q, k, v = tensors(seed, **sizes, dtype=torch.float32)
    B, H, T, S = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    generator = torch.Generator().manual_seed(seed)
    decay = -0.1 * torch.rand(B, heads, S, generator=generator)
    decay[:, :, S // 4] = -torch.inf
    leaves = {
        "q": q, "k": k, "v": v,
        "ridge": 0.3 + torch.rand((B, H, T) if per_token else (H,), generator=generator),
        "scale": 0.2 + 0.1 * torch.rand(H, generator=generator),
        "key_bias": torch.randn(B, heads, S, generator=generator),
        "log_decay": decay,
    }  # fmt: skip
    return {name: x.requires_grad_() for name, x in leaves.items()}


def gradients(
    op: Callable[..., Tensor], leaves: dict[str, Tensor], upstream: Tensor, **options: Any
) -> dict[str, Tensor]:
    out = op(**leaves, **options)
    found = torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype))
    return dict(zip(leaves, found, strict=True))


def exact(
    op: Callable[..., Tensor], leaves: dict[str, Tensor], upstream: Tensor, **options: Any
) -> dict[str, Tensor]:
    """Autograd through the reference in float64."""
    wide = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    return gradients(op, wide, upstream, **options, impl="reference")


def hold(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        # Those of one number per head are small sums of large terms.
        least = budget(torch.float32, "gradient") if name in OPERANDS else 1e-5
        assert relative_error(found[name], gradient) < least, name


def upstream_of(leaves: dict[str, Tensor]) -> Tensor:
    q, v = leaves["q"], leaves["v"]
    upstream = torch.randn(*q.shape[:3], v.shape[3], generator=torch.Generator().manual_seed(2))
    upstream[:, :, 3] = 0
    return upstream


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize("case", OPTIONS)
def test_equals_autograd(isa: str, solver: str, case: str):
    options: dict[str, Any] = {"causal": True, **OPTIONS[case]}
    leaves = sample(heads=2)
    if case == "gaussian":
        leaves["scale"] = leaves["scale"].detach().mul(0.2).requires_grad_()
    upstream = upstream_of(leaves)
    with limited_to(isa):
        tight = {"solver": solver, "tol": 1e-6, "tol_backward": 1e-7, "impl": "native"}
        found = gradients(local_linear_attention, leaves, upstream, **options, **tight)
    hold(found, exact(local_linear_attention, leaves, upstream, **options))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("heads", [1, 4])
def test_heads_of_operands_and_ridges_of_tokens(isa: str, heads: int):
    more_queries_than_keys, odd = {"T": 50, "S": 30}, {"D": 5, "Dv": 19, "T": 7}
    for sizes, mode in ((more_queries_than_keys, "relative"), (odd, "absolute")):
        leaves = sample(heads, per_token=True, **sizes)
        upstream = upstream_of(leaves)
        options = {"causal": True, "ridge_mode": mode}
        with limited_to(isa):
            tight = {"tol": 1e-6, "tol_backward": 1e-7, "impl": "native"}
            found = gradients(local_linear_attention, leaves, upstream, **options, **tight)
        hold(found, exact(local_linear_attention, leaves, upstream, **options))


@pytest.mark.parametrize("isa", ISAS)
def test_masked_keys(isa: str):
    leaves = sample(heads=4)
    upstream = upstream_of(leaves)
    mask = torch.rand(1, 100, generator=torch.Generator().manual_seed(3)) > 0.3
    expected = exact(local_linear_attention, leaves, upstream, causal=True, key_mask=mask)
    for name, junk in (("k", torch.nan), ("v", torch.inf)):
        leaf = leaves[name].detach()
        leaves[name] = leaf.masked_fill(~mask[:, None, :, None], junk).requires_grad_()
    options = {"causal": True, "key_mask": mask, "tol_backward": 1e-7, "impl": "native"}
    with limited_to(isa):
        found = gradients(local_linear_attention, leaves, upstream, **options)
    hold(found, expected)
    assert not found["k"][:, :, ~mask[0]].any()


@pytest.mark.parametrize("isa", ISAS)
def test_other_probes(isa: str):
    leaves = sample(heads=4)
    upstream = upstream_of(leaves)
    leaves.pop("ridge")
    with limited_to(isa):
        # What torch's own kernel refuses, a bias on keys, comes here.
        found = gradients(softmax_attention, leaves, upstream, causal=True, impl="native")
        hold(found, exact(softmax_attention, leaves, upstream, causal=True))
        leaves["r"] = (0.3 * leaves["q"].detach().flip(3)).requires_grad_()
        found = gradients(parallax_attention, leaves, upstream, causal=True, impl="native")
        hold(found, exact(parallax_attention, leaves, upstream, causal=True))


@here
def test_the_official_gradient():
    """What it leaves out, the eager form leaves out."""
    leaves = sample(heads=2)
    upstream = upstream_of(leaves)
    options = {"causal": True, "grad": "official", "tol_backward": 1e-7}
    found = gradients(local_linear_attention, leaves, upstream, **options, impl="native")
    wide = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    hold(found, gradients(local_linear_attention, wide, upstream, **options, impl="eager"))


@here
def test_any_subset_of_gradients():
    leaves = sample(heads=2)
    upstream = upstream_of(leaves)
    whole = gradients(local_linear_attention, leaves, upstream, causal=True, impl="native")
    for names in (["q"], ["k"], ["v"], ["ridge"], ["scale"], ["key_bias"], ["k", "log_decay"]):
        some = {n: x if n in names else x.detach() for n, x in leaves.items()}
        out = local_linear_attention(**some, causal=True, impl="native")
        found = torch.autograd.grad(out, [some[name] for name in names], upstream)
        for name, gradient in zip(names, found, strict=True):
            # Alone, v takes the g of the forward as it is.
            least = 1e-4 if names == ["v"] else 1e-7
            assert relative_error(gradient, whole[name]) < least, name


@here
def test_small_heads_keep_their_factors(monkeypatch: pytest.MonkeyPatch):
    """Only for a backward, and with the same gradients as if they were made again."""
    leaves = sample(heads=2)
    upstream = upstream_of(leaves)
    options = {"causal": True, "solver": "direct", "impl": "native"}
    again, calls = {}, []
    kept = native.local_linear_native_kept_fwd
    for most in (0, native.MOST_KEPT_CHANNELS):
        monkeypatch.setattr(native, "MOST_KEPT_CHANNELS", most)
        monkeypatch.setattr(
            native, "local_linear_native_kept_fwd", lambda *x: calls.append(1) or kept(*x)
        )
        found = gradients(local_linear_attention, leaves, upstream, **options)
        again = again or found
    assert len(calls) == 1
    assert all(relative_error(found[name], again[name]) < 1e-5 for name in ("q", "k", "v"))
    with torch.no_grad():
        local_linear_attention(**leaves, **options)
    assert len(calls) == 1


@here
def test_threads_change_nothing():
    leaves = sample(heads=4, T=700, S=700, D=32)
    upstream = upstream_of(leaves)
    results = []
    for threads in (1, 3):
        try:
            torch.set_num_threads(threads)
            results.append(
                gradients(local_linear_attention, leaves, upstream, causal=True, impl="native")
            )
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(results[0][name], results[1][name]) for name in leaves)


@pytest.mark.parametrize("isa", ISAS)
def test_hard_rows_are_solved_again(isa: str):
    """In float64; gradients that come from other rows keep every bit."""
    q, k, v = tensors(T=60, S=60, D=16, dtype=torch.float32)
    options: dict[str, Any] = {"ridge": 0.05, "solver": "cg", "max_iters": 14, "tol": 1e-4}
    results = []
    for factor in (1.0, 1e3):
        q = q.clone()
        q[:, :, 10:20] *= factor
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with limited_to(isa):
            out = local_linear_attention(*leaves, **options, impl="native")
        easy = torch.autograd.grad(out[:, :, 20:].sin().sum(), leaves, retain_graph=True)
        results.append([easy[0][:, :, 20:], *easy[1:]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    found = torch.autograd.grad(out.square().sum(), leaves)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    reference = local_linear_attention(*wide, ridge=0.05, impl="reference")
    expected = torch.autograd.grad(reference.square().sum(), wide)
    for gradient, right in zip(found, expected, strict=True):
        assert relative_error(gradient, right) < 1e-3


@here
def test_sixteen_bits_and_strides():
    leaves = sample(heads=1)
    upstream = upstream_of(leaves)
    for name in ("q", "k", "v"):
        x = leaves[name].detach().bfloat16().transpose(1, 2).contiguous().transpose(1, 2)
        leaves[name] = x.requires_grad_()
    upstream = upstream.transpose(2, 3).contiguous().transpose(2, 3)
    found = gradients(local_linear_attention, leaves, upstream, causal=True, impl="native")
    expected = exact(local_linear_attention, leaves, upstream, causal=True)
    for name, gradient in expected.items():
        assert found[name].dtype == leaves[name].dtype
        assert relative_error(found[name], gradient) < budget(torch.bfloat16, "gradient"), name
