"""Registered operators: a tiny one through every door that torch has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regard.core.library import define


def scaled_square(x, scale):
    """Through numpy, as a compiled form works on memory that torch does not see."""
    return torch.from_numpy(scale * np.square(x.detach().numpy()))


def scaled_square_bwd(gradient, x, scale):
    return torch.from_numpy(2 * scale * x.detach().numpy() * gradient.detach().numpy())


def like(x, *_):
    return torch.empty_like(x)


def keep(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.scale = inputs[1]


def backward(ctx, gradient):
    return bwd(gradient.contiguous(), ctx.saved_tensors[0], ctx.scale), None


def over_batch(info, in_dims, x, scale):
    return fwd(x, scale), in_dims[0]


FWD = "(Tensor x, float scale) -> Tensor"
BWD = "(Tensor gradient, Tensor x, float scale) -> Tensor"
bwd = define("test_scaled_square_bwd", BWD, scaled_square_bwd, like)
fwd = define(
    "test_scaled_square_fwd", FWD, scaled_square, like,
    backward=backward, setup_context=keep, vmap=over_batch,
)  # fmt: skip


def sample(**options):
    return torch.randn(3, 4, dtype=torch.float64, **options)


def test_opcheck():
    torch.library.opcheck(fwd.default, (sample(requires_grad=True), 0.5))
    torch.library.opcheck(fwd.default, (sample(), 0.5))
    torch.library.opcheck(bwd.default, (sample(), sample(), 0.5))


def test_value_gradient_meta_and_vmap():
    x = sample(requires_grad=True)
    assert torch.equal(fwd(x, 0.5), 0.5 * x * x)
    assert torch.autograd.gradcheck(lambda t: fwd(t, 0.5), x)
    assert fwd(x.to("meta"), 0.5).shape == x.shape
    assert torch.equal(torch.vmap(lambda t: fwd(t, 0.5))(x.detach()), 0.5 * x.detach() ** 2)


def test_compile_and_export():
    x = sample(requires_grad=True)
    compiled = torch.compile(lambda t: fwd(t, 0.5).sin(), fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(found, (0.5 * x * x).cos() * x)

    class Module(torch.nn.Module):
        def forward(self, t):
            return fwd(t, 0.5)

    program = torch.export.export(Module(), (x.detach(),))
    assert torch.equal(program.module()(x.detach()), fwd(x.detach(), 0.5))


def test_a_second_derivative_raises_instead_of_being_left_out():
    x = sample(requires_grad=True)
    (first,) = torch.autograd.grad(fwd(x, 0.5).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="test_scaled_square_bwd has no derivative"):
        first.sum().backward()


def test_defining_the_same_op_again_is_the_same_op():
    assert define("test_scaled_square_bwd", BWD, scaled_square_bwd, like) is bwd
    with pytest.raises(ValueError, match="regard::test_scaled_square_bwd is already defined, by "):
        define("test_scaled_square_bwd", BWD, scaled_square, like)
    with pytest.raises(ValueError, match="already defined"):
        define("test_scaled_square_bwd", FWD, scaled_square_bwd, like)


def add_one(x):
    x.numpy()[...] += 1


def count(steps):
    return float(steps)


def test_ops_that_write_or_take_no_tensor():
    write = define("test_add_one", "(Tensor(a!) x) -> ()", add_one, lambda x: None)
    x = torch.zeros(2)
    write(x)
    assert x.tolist() == [1.0, 1.0]
    steps = define("test_count", "(int steps) -> float", count, count)
    assert steps(3) == 3.0
