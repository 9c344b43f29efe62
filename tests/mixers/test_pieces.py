"""The pieces of a layer: positions, rotation, short convolution, norm, operands."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import logsigmoid, silu, softplus

from regard.core.budgets import budget, relative_error
from regard.core.card import Operand
from regard.mixers import RMSNorm, ShortConvolution, UnitNorm, rotate
from regard.mixers.operands import HeadOperand, Operands, TokenOperand
from regard.mixers.positions import positions

CPU = torch.device("cpu")
SIZES = {"h": 4, "hk": 2, "d": 3, "dv": 5}


def offsets(*ends):
    return torch.tensor(ends, dtype=torch.int32)


@pytest.mark.parametrize(
    ("mask", "cu_seqlens", "expected"),
    [
        (None, None, [[0, 1, 2, 3, 4]]),
        ([[0, 0, 1, 1, 1], [1, 0, 1, 0, 1]], None, [[0, 0, 0, 1, 2], [0, 1, 1, 2, 2]]),
        (None, offsets(0, 0, 2, 2, 5, 5), [[0, 1, 0, 1, 2]]),
        ([[0, 1, 1, 0, 1]], offsets(0, 2, 5), [[0, 0, 0, 1, 1]]),
    ],
)
def test_positions(mask, cu_seqlens, expected):
    mask = None if mask is None else torch.tensor(mask).bool()
    assert positions(5, mask, cu_seqlens, CPU).tolist() == expected


def test_positions_leave_bad_offsets_to_the_op():
    for bad in (offsets(0), offsets(0, 3), offsets(0, 9), offsets(3, 5)):
        assert positions(5, None, bad, CPU).shape == (1, 5)
    assert positions(0, None, offsets(0), CPU).shape == (1, 0)


def test_rotation_is_that_of_complex_numbers():
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    at = torch.tensor([[0, 1, 2, 3, 1_000_000], [7, 7, 8, 9, 10]])
    turned = rotate(x, at, 500.0)
    number = torch.complex(x[..., :4], x[..., 4:])
    angle = at[:, None, :, None] * 500.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    expected = number * torch.polar(torch.ones_like(angle), angle)
    assert relative_error(turned, torch.cat([expected.real, expected.imag], 3)) < 1e-12
    single = rotate(x.float(), at, 500.0)  # angles are not rounded
    assert relative_error(single, turned) < 2e-7
    assert rotate(x.bfloat16(), at).dtype == torch.bfloat16


def test_products_depend_on_differences_of_positions_only():
    q, k = torch.randn(2, 1, 1, 6, 8, dtype=torch.float64).unbind(0)
    near, far = torch.arange(6)[None], torch.arange(6)[None] + 1000
    one = rotate(q, near) @ rotate(k, near).mT
    assert relative_error(rotate(q, far) @ rotate(k, far).mT, one) < 1e-12


def convolution_of(size=4, channels=6):
    torch.manual_seed(0)
    return ShortConvolution(channels, size).double()


@pytest.mark.parametrize("size", [1, 2, 4, 9])
def test_convolution_is_torchs(size):
    convolution, x = convolution_of(size), torch.randn(2, 7, 6, dtype=torch.float64)
    weight = convolution.weight.flip(1)[:, None]  # ours begins with the present token
    padded = nn.functional.pad(x.mT, (size - 1, 0))
    expected = silu(nn.functional.conv1d(padded, weight, groups=6)).mT
    y, past = convolution(x)
    assert relative_error(y, expected) < budget(torch.float64)
    assert past.shape == (2, size - 1, 6)
    halved, past = convolution(x.bfloat16())
    assert halved.dtype == past.dtype == torch.bfloat16


def test_convolution_counts_real_tokens_of_its_own_sequence():
    convolution, real = convolution_of(), torch.randn(1, 6, 6, dtype=torch.float64)
    expected, past = convolution(real)
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0]]).bool()
    x = torch.full((1, 11, 6), torch.inf, dtype=torch.float64)
    x[mask] = real[0]
    y, after = convolution(x, key_mask=mask)
    assert not y[~mask].any()
    assert relative_error(y[mask], expected[0]) < budget(torch.float64, "same")
    assert torch.equal(after, past)
    y, _ = convolution(x, key_mask=mask, cu_seqlens=offsets(0, 4, 11))
    pieces = torch.cat([convolution(real[:, :2])[0], convolution(real[:, 2:])[0]], 1)
    assert relative_error(y[mask], pieces[0]) < budget(torch.float64, "same")


def test_convolution_goes_on_from_a_ragged_past():
    convolution, real = convolution_of(), torch.randn(2, 8, 6, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 0, 0]]).bool()
    x = torch.zeros(2, 5, 6, dtype=torch.float64)
    x[mask] = torch.cat([real[0, :5], real[1, :1]])
    _, past = convolution(x, key_mask=mask)
    y, _ = convolution(torch.stack([real[0, 5:], real[1, 1:4]]), past=past)
    for row, start in enumerate((5, 1)):
        expected = convolution(real[row : row + 1])[0][0, start : start + 3]
        assert relative_error(y[row], expected) < budget(torch.float64, "same")
    assert past.untyped_storage().nbytes() == past.numel() * 8  # nothing else is kept alive


def test_norm_is_torchs_in_every_dtype():
    norm, torchs = RMSNorm(8), nn.RMSNorm(8, eps=1e-6)
    torchs.weight.data = norm.weight.data = torch.rand(8)
    x = torch.randn(3, 8)
    assert relative_error(norm(x), torchs(x)) < budget(torch.float32)
    rounded = x.bfloat16()
    assert norm(rounded).dtype == torch.bfloat16
    assert relative_error(norm(rounded), norm(rounded.double())) < budget(torch.bfloat16)


LINKS = {
    "free": lambda x: x,
    "unit": torch.sigmoid,
    "positive": softplus,
    "log_decay": logsigmoid,
}


@pytest.mark.parametrize("domain", LINKS)
@pytest.mark.parametrize("shape", ["b h s d", "b s hk", "b hk s", "b d s hk", "b s"])
def test_operand_of_a_key(shape, domain):
    operand = Operand("x", shape, "key", domain)
    made, keys = TokenOperand(operand, 7, SIZES), torch.randn(2, 6, 7)
    axes = [axis for axis in shape.split() if axis not in "bs"]
    flat = LINKS[domain](keys @ made.weight.mT + made.bias)
    split = flat.view(2, 6, *(SIZES[axis] for axis in axes))
    letters = {"b": "b", "s": "s", "h": "h", "hk": "k", "d": "d"}
    source = "bs" + "".join(letters[axis] for axis in axes)
    target = "".join(letters[axis] for axis in shape.split())
    assert relative_error(made(keys), torch.einsum(f"{source}->{target}", split)) < 1e-6
    assert made.bias.tolist() == [3.0 if domain == "log_decay" else 0.0] * len(made.bias)


def test_operands_of_all_sources():
    declared = (
        Operand("r", "b h t d", "query"),
        Operand("beta", "b hk s", "key", "unit"),
        Operand("strength", "h dv", "head", "positive"),
    )
    made = Operands("op", declared, 7, SIZES)
    queries, keys = torch.randn(2, 3, 7), torch.randn(2, 6, 7)
    given = made(queries, keys)
    shapes = {name: tuple(value.shape) for name, value in given.items()}
    assert shapes == {"r": (2, 4, 3, 3), "beta": (2, 2, 6), "strength": (4, 5)}
    assert isinstance(made["strength"], HeadOperand)
    half = made.bfloat16()(queries.bfloat16(), keys.bfloat16())
    assert half["r"].dtype == torch.bfloat16  # as q
    assert half["beta"].dtype == half["strength"].dtype == torch.float32


@pytest.mark.parametrize(
    "operand",
    [
        Operand("plan", "b h t", "plan"),
        Operand("index", "b h t", "query", "index"),
        Operand("bias", "b h t s", "query"),
        Operand("swapped", "b h s", "query"),
        Operand("batched", "b h", "head"),
        Operand("batchless", "h t", "query"),
        Operand("twice", "b h h t", "query"),
    ],
    ids=lambda operand: operand.name,
)
def test_operands_that_no_generic_layer_makes(operand):
    with pytest.raises(ValueError, match="op: mechanism must be one whose operands"):
        Operands("op", (operand,), 7, SIZES)


def test_unit_norm_is_of_length_one():
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    expected = x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    assert relative_error(UnitNorm()(x), expected) < 1e-14
    assert not UnitNorm()(torch.zeros(2, 4)).any()
    half = x.bfloat16()
    assert UnitNorm()(half).dtype == torch.bfloat16
    assert relative_error(UnitNorm()(half), UnitNorm()(half.double())) < budget(torch.bfloat16)


def test_a_convolution_with_a_bias():
    plain, biased = ShortConvolution(4, 3).double(), ShortConvolution(4, 3, bias=True).double()
    assert set(biased.state_dict()) == {"weight", "bias"}
    assert not biased.bias.any()
    biased.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    assert torch.equal(biased(x)[0], plain(x)[0])
    with torch.no_grad():
        biased.bias.copy_(torch.arange(4))
        biased.weight.zero_()
    rows = silu(torch.arange(4, dtype=torch.float64)).expand(2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1]]).bool()
    assert relative_error(biased(x, key_mask=mask)[0][mask], rows[mask]) < 1e-14
    assert not biased(x, key_mask=mask)[0][~mask].any()


def test_a_probe_is_a_query_without_a_bias():
    probe = TokenOperand(Operand("r", "b h t d", "query", "free"), 6, SIZES, norm=True)
    assert set(probe.state_dict()) == {"weight", "norm.weight"}
    vectors = probe(torch.randn(2, 5, 6))
    assert vectors.shape == (2, 4, 5, 3)
    assert relative_error(vectors.square().mean(-1), torch.ones(2, 4, 5)) < 1e-3
    free = TokenOperand(Operand("c", "b h t", "query", "free"), 6, SIZES, norm=True)
    assert set(free.state_dict()) == {"weight", "bias"}
    gate = Operand("log_decay", "b hk s", "key", "log_decay")
    assert TokenOperand(gate, 6, SIZES).bias.tolist() == [3.0, 3.0]
    assert TokenOperand(gate, 6, SIZES, start=0.0).bias.tolist() == [0.0, 0.0]
