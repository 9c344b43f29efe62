"""The ways exact attention is run: empty, in blocks, compiled, on meta tensors, in 16 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ops.softmax_calls import FORMS, operands, tensors
from regard.core.budgets import budget, relative_error
from regard.ops.softmax import softmax_attention
from regard.ops.softmax.reference import softmax_reference


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("sizes", [{"B": 0}, {"T": 0}, {"S": 0}, {"T": 0, "S": 0}])
@pytest.mark.parametrize("masked", [False, True])
def test_empty_calls(impl: str, sizes: dict[str, int], masked: bool) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(**sizes))
    mask = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool) if masked else None
    for causal in (False, True):
        out = softmax_attention(q, k, v, causal=causal, key_mask=mask, impl=impl)
        assert out.shape == (*q.shape[:3], 3)
        assert (out == 0).all()
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
        assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("block_size", [1, 2, 5, 64])
def test_block_size_changes_only_rounding(block_size: int) -> None:
    q, k, v = tensors(T=9, S=11)
    options = operands(7, q, k)
    expected = softmax_attention(q, k, v, **options)
    out = softmax_attention(q, k, v, **options, block_size=block_size)
    assert relative_error(out, expected) < 1e-14


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.entries = max(self.entries, *sizes, 0)
        return result


@pytest.mark.parametrize("impl", ["native", "eager"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_no_matrix_of_all_scores(impl: str, masked: bool, causal: bool) -> None:
    n = 2048
    q, k, v = tensors(B=1, H=2, Hk=1, T=n, S=n, dtype=torch.float32)
    mask = torch.rand(1, n) < 0.9 if masked else None
    with Largest() as largest:
        softmax_attention(q, k, v, causal=causal, key_mask=mask, impl=impl)
    assert 0 < largest.entries <= 4 * n * n / 4


@pytest.mark.parametrize("name", ["native", "eager"])
def test_compiles_whole_and_exports(name: str) -> None:
    q, k, v = tensors(T=5, S=9, dtype=torch.float32)
    options: dict[str, Any] = {"causal": True, "impl": name, "key_mask": torch.rand(2, 9) < 0.7}
    if name == "eager":
        options = operands(4, q, k) | options
    expected = softmax_attention(q, k, v, **options)

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return softmax_attention(q, k, v, **options)

    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = compiled(*leaves)
    assert relative_error(out, expected) < 1e-6
    out.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)
    torch._dynamo.reset()
    exported = torch.export.export(Module(), (q, k, v)).module()
    assert relative_error(exported(q, k, v), expected) < 1e-6


@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_operators_are_registered_soundly(masked: bool) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(Dv=4, dtype=torch.float32))
    mask = torch.rand(2, 1, 7, 7) < 0.7 if masked else None
    options = (mask, not masked, 0.3)
    torch.library.opcheck(torch.ops.regard.softmax_fused_fwd.default, (q, k, v, *options))
    q, k, v = q.detach(), k.detach(), v.detach()
    out, lse = torch.ops.regard.softmax_fused_fwd(q, k, v, *options)
    saved = (torch.randn_like(out), q, k, v, mask, out, lse, *options[1:])
    torch.library.opcheck(torch.ops.regard.softmax_fused_bwd.default, saved)


def test_auto_compiles_with_a_state() -> None:
    q, k, v = tensors(dtype=torch.float32)
    _, state = softmax_attention(q, k, v, causal=True, return_state=True)
    expected = softmax_attention(q, k, v, causal=True, state=state.fork())

    def step(q: Tensor, k: Tensor, v: Tensor, old_k: Tensor, old_v: Tensor) -> Tensor:
        _, state = softmax_attention(old_k[:, [0, 0, 1, 1]], old_k, old_v, return_state=True)
        return softmax_attention(q, k, v, causal=True, state=state)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(q, k, v, state.k, state.v), expected) < 1e-6
    torch._dynamo.reset()


@pytest.mark.parametrize("impl", FORMS)
def test_meta_tensors_inference_mode_and_strides(impl: str) -> None:
    q, k, v = tensors(T=6, S=6, Dv=4)
    meta = softmax_attention(*(x.to("meta") for x in (q, k, v)), causal=True, impl=impl)
    assert meta.shape == (2, 4, 6, 4)
    assert meta.device.type == "meta"
    expected = softmax_attention(q, k, v, causal=True, impl=impl)
    with torch.inference_mode():
        out, state = softmax_attention(q, k, v, causal=True, return_state=True, impl=impl)
        assert torch.equal(out, expected)
        softmax_attention(q, k, v, causal=True, state=state, impl=impl)
    strided = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    copies = [x.clone() for x in strided]
    assert relative_error(softmax_attention(*strided, causal=True, impl=impl), expected) < 1e-14
    assert all(torch.equal(a, b) for a, b in zip(strided, copies, strict=True))


@pytest.mark.parametrize("impl", ["auto", "native", "eager"])
def test_autocast_casts_and_then_steps_aside(impl: str) -> None:
    q, k, v = tensors(dtype=torch.float32)
    expected = softmax_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = softmax_attention(q, k.bfloat16(), v, impl=impl)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


def test_float16_on_a_cpu_is_computed_in_float32() -> None:
    q, k, v = tensors(dtype=torch.float16)
    out = softmax_attention(q * 200, k * 200, v)  # the products overflow float16
    expected = softmax_reference((q * 200).double(), (k * 200).double(), v.double())
    assert out.dtype == torch.float16
    assert relative_error(out, expected) < budget(torch.float16)


def test_a_tensor_scale_has_its_gradient_in_the_fused_kernel_too() -> None:
    q, k, v = tensors()
    scale = torch.rand(4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: softmax_attention(q, k, v, causal=True, scale=s, impl="native"), scale
    )
