"""The layer of InLine and its local residual."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad

from golden_files import parts, settings
from regard.core.budgets import budget, relative_error
from regard.mixers import InLineAttention, LocalResidual2d


def layer_of(dim=12, heads=3, dtype=torch.float64, **options) -> InLineAttention:
    torch.manual_seed(0)
    return InLineAttention(dim, heads, **options).to(dtype)


@pytest.mark.parametrize(
    ("name", "options"),
    [("attn_swin_identity", {"grid": (5, 5)}), ("attn_deit_cls", {"prefix_tokens": 1})],
)
def test_is_the_layer_of_the_authors(name, options):
    data, config = parts(f"inline_attention/{name}"), settings(f"inline_attention/{name}")
    layer = InLineAttention(
        config["dim"], config["num_heads"], qkv_bias=config["qkv_bias"],
        feature_map=config.get("kernel_func", "identity"), **options,
    )  # fmt: skip
    layer.load_state_dict(data["state"])
    x = data["in"]["x"].requires_grad_()
    y = layer(x)
    assert relative_error(y, data["out"]["y"]) < budget(torch.float32)
    y.backward(data["in"]["grad_out"])
    found = {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    for name, expected in data["grad"].items():
        assert relative_error(found[name], expected) < budget(torch.float32, "gradient"), name


@pytest.mark.parametrize(("h", "w"), [(5, 5), (4, 7), (1, 3), (6, 1)])
def test_the_residual_is_nine_shifted_sums(h, w):
    torch.manual_seed(0)
    residual = LocalResidual2d(8, heads=2).double()
    image, context = torch.randn(3, 8, h, w).double(), torch.randn(3, 8).double()
    kernels = residual.kernels(context)
    padded, expected = pad(image, (1, 1, 1, 1)), torch.zeros_like(image)
    for row in range(3):
        for column in range(3):
            part = padded[:, :, row : row + h, column : column + w]
            expected += kernels[:, :, row, column, None, None] * part
    assert (residual(image, context) - expected).abs().max() < 1e-12
    single = residual.float()(image.float(), context.float())
    assert (single - expected).abs().max() < 1e-6
    # Entries 9 c to 9 c + 8 of what is predicted are the rows of channel c's kernel.
    flat = torch.nn.Sequential.forward(residual.double(), context[..., None])
    assert torch.equal(flat[1, 9 * 5 + 3 * 2 + 1, 0], kernels[1, 5, 2, 1])


def test_images_have_kernels_of_their_own():
    residual = LocalResidual2d(8, heads=2).double()
    image, context = torch.randn(2, 8, 4, 5).double(), torch.randn(2, 8).double()
    both = residual(image, context)
    for row in range(2):
        one = residual(image[row : row + 1], context[row : row + 1])
        assert relative_error(both[row : row + 1], one) < 1e-14
    assert residual(image[:0], context[:0]).shape == (0, 8, 4, 5)


def test_only_the_residual_knows_places():
    x, order = torch.randn(2, 12, 12).double(), torch.randperm(12)
    for residual in (False, True):
        layer = layer_of(grid=(3, 4), residual=residual)
        same = relative_error(layer(x[:, order]), layer(x)[:, order]) < 1e-12
        assert same != residual


def test_a_prefix_takes_part_and_has_no_residual():
    layer = layer_of(prefix_tokens=2, grid=(2, 3))
    x = torch.randn(2, 8, 12).double()
    plain = layer_of(prefix_tokens=2, grid=(2, 3), residual=False)
    plain.load_state_dict(layer.state_dict(), strict=False)
    assert relative_error(layer(x)[:, :2], plain(x)[:, :2]) < 1e-14
    assert relative_error(layer(x)[:, 2:], plain(x)[:, 2:]) > 1e-3
    other = x.clone()
    other[:, 0] += 1.0
    assert (layer(other)[:, 5] - layer(x)[:, 5]).abs().max() > 1e-4
    tokens = layer(torch.cat([x, x[:, :4]], 1), grid=(5, 2))
    assert tokens.shape == (2, 12, 12)


def test_16_bits_and_compiled():
    layer = layer_of(dtype=torch.bfloat16)
    x = torch.randn(2, 16, 12)
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert relative_error(y, layer.double()(x.bfloat16().double())) < 5e-2
    torch._dynamo.reset()
    single, x = layer.float(), x.float()
    compiled = torch.compile(single, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), single(x)) < budget(torch.float32)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({"heads": 5}, None, "dim must be a multiple of heads, 5, got 12"),
        ({"grid": (0, 3)}, None, r"grid must be \(height, width\), two ints of at least 1"),
        ({"feature_map": "gelu"}, None, "feature_map must be one of"),
        ({"prefix_tokens": -1}, None, "prefix_tokens must be an int of at least 0"),
        ({}, (2, 12, 12), "grid must be given where the tokens are no square, got 12 tokens"),
        ({"grid": (3, 4)}, (2, 13, 12), "grid must be of 13 tokens in all"),
        ({"prefix_tokens": 3}, (2, 2, 12), "x must be of at least 3 tokens"),
        ({}, (2, 9, 10), r"x must be of shape \[batch, tokens, 12\]"),
    ],
)
def test_what_does_not_fit_is_named(settings, shape, message):
    with pytest.raises((ValueError, TypeError), match=f"InLineAttention: {message}"):
        layer_of(**settings)(torch.zeros(*shape, dtype=torch.float64))


def test_a_residual_names_what_does_not_fit():
    residual = LocalResidual2d(8, 2)
    with pytest.raises(ValueError, match="LocalResidual2d: image must be of shape"):
        residual(torch.zeros(1, 7, 3, 3), torch.zeros(1, 8))
    with pytest.raises(ValueError, match=r"LocalResidual2d: context must be of shape \[2, 8\]"):
        residual(torch.zeros(2, 8, 3, 3), torch.zeros(1, 8))
