"""Every check accepts what the documentation says, and names what came when it does not."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from regard.core import checks
from regard.core.cache import KVCache
from regard.core.state import FixedState


def qkv(B=2, H=4, Hk=2, T=3, S=5, D=8, Dv=6, dtype=torch.float32, device="cpu"):
    shapes = ((B, H, T, D), (B, Hk, S, D), (B, Hk, S, Dv))
    return [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]


SIZES = checks.Sizes(2, 4, 2, 3, 5, 8, 6)
LIKE = torch.zeros(1)


def refused(kind, text, check, *arguments, **options):
    with pytest.raises(kind) as caught:
        check("op", *arguments, **options)
    assert str(caught.value) == text


def test_sizes_are_read_off_the_tensors():
    sizes = checks.check_qkv("op", *qkv())
    assert sizes == SIZES
    assert sizes.group == 2


@pytest.mark.parametrize("dtype", checks.FLOATS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_float_dtype_and_the_meta_device_are_accepted(dtype, device):
    assert checks.check_qkv("op", *qkv(dtype=dtype, device=device)) == SIZES


@pytest.mark.parametrize("empty", [{"B": 0}, {"T": 0}, {"S": 0}])
def test_an_empty_batch_or_length_is_a_legal_size(empty):
    assert checks.check_qkv("op", *qkv(**empty)).H == 4


@pytest.mark.parametrize(
    ("kind", "change", "text"),
    [
        (
            ValueError,
            lambda q, k, v: (q[0], k, v),
            "op: q must be 4-dimensional [batch, heads, length, channels], "
            "got float32 Tensor[4, 3, 8] on cpu",
        ),
        (TypeError, lambda q, k, v: (q, None, v), "op: k must be a torch.Tensor, got None"),
        (
            TypeError,
            lambda q, k, v: (q.int(), k, v),
            "op: q must be of dtype float64, float32, bfloat16, float16, "
            "got int32 Tensor[2, 4, 3, 8] on cpu",
        ),
        (
            TypeError,
            lambda q, k, v: (q, k.half(), v),
            "op: k must be of q's dtype float32, got float16 Tensor[2, 2, 5, 8] on cpu",
        ),
        (
            ValueError,
            lambda q, k, v: (q, k, v.to("meta")),
            "op: v must be on q's device cpu, got float32 Tensor[2, 2, 5, 6] on meta",
        ),
        (
            ValueError,
            lambda q, k, v: (q, k[:1], v),
            "op: k must be of q's batch size 2, got float32 Tensor[1, 2, 5, 8] on cpu",
        ),
        (
            ValueError,
            lambda q, k, v: (q, k[..., :7], v),
            "op: k must be of q's head size 8, got float32 Tensor[2, 2, 5, 7] on cpu",
        ),
        (
            ValueError,
            lambda q, k, v: (q, k, v[:, :, :4]),
            "op: v must be [B, 2, 5, Dv] like k, got float32 Tensor[2, 2, 4, 6] on cpu",
        ),
        (
            ValueError,
            lambda q, k, v: (q[:, :3], k, v),
            "op: q must be of a number of heads that is a multiple of k's 2, "
            "got float32 Tensor[2, 3, 3, 8] on cpu",
        ),
        (
            ValueError,
            lambda q, k, v: (q, k, v[..., :0]),
            "op: v must be of at least one head and one channel, "
            "got float32 Tensor[2, 2, 5, 0] on cpu",
        ),
        (
            ValueError,
            lambda q, k, v: (q, k[:, :0], v[:, :0]),
            "op: k must be of at least one head and one channel, "
            "got float32 Tensor[2, 0, 5, 8] on cpu",
        ),
    ],
)
def test_a_bad_q_k_or_v_is_named_and_shown(kind, change, text):
    refused(kind, text, checks.check_qkv, *change(*qkv()))


def test_key_mask():
    good = torch.ones(2, 5, dtype=torch.bool)
    for mask in (None, good):
        checks.check_key_mask("op", mask, SIZES, LIKE)
    checks.check_key_mask("op", good.to("meta"), SIZES, LIKE.to("meta"))
    text = "op: key_mask must be a bool tensor (True = real key), got float32 Tensor[2, 5] on cpu"
    refused(TypeError, text, checks.check_key_mask, good.float(), SIZES, LIKE)
    text = "op: key_mask must be of shape [2, 5], got bool Tensor[5, 2] on cpu"
    refused(ValueError, text, checks.check_key_mask, good.T, SIZES, LIKE)
    text = "op: key_mask must be on q's device meta, got bool Tensor[2, 5] on cpu"
    refused(ValueError, text, checks.check_key_mask, good, SIZES, LIKE.to("meta"))
    text = "op: key_mask must be a torch.Tensor, got [True, False]"
    refused(TypeError, text, checks.check_key_mask, [True, False], SIZES, LIKE)


def test_float_operand_names_each_size_it_would_take_once():
    shape = (2, (1, 2, 2, 4), 5)
    for heads in (1, 2, 4):
        checks.check_float_operand("op", "key_bias", torch.zeros(2, heads, 5), shape, LIKE)
    checks.check_float_operand("op", "key_bias", None, shape, LIKE)
    text = "op: key_bias must be of shape [2, 1 or 2 or 4, 5], got float32 Tensor[2, 3, 5] on cpu"
    bias = torch.zeros(2, 3, 5)
    refused(ValueError, text, checks.check_float_operand, "key_bias", bias, shape, LIKE)
    text = "op: key_bias must be of shape [2, 1 or 2 or 4, 5], got float32 Tensor[5] on cpu"
    refused(ValueError, text, checks.check_float_operand, "key_bias", bias[0, 0], shape, LIKE)
    text = "op: key_bias must be a floating-point tensor, got int64 Tensor[2, 3, 5] on cpu"
    refused(TypeError, text, checks.check_float_operand, "key_bias", bias.long(), shape, LIKE)


def test_scale():
    for scale in (None, 0.5, 2, torch.ones(4), torch.tensor(0.5)):
        checks.check_scale("op", scale, SIZES, LIKE)
    text = "op: scale must be of shape [] or [4], got float32 Tensor[2] on cpu"
    refused(ValueError, text, checks.check_scale, torch.ones(2), SIZES, LIKE)
    refused(
        TypeError, "op: scale must be a number, got 'big'", checks.check_scale, "big", SIZES, LIKE
    )
    text = "op: scale must be a finite number, got nan"
    refused(ValueError, text, checks.check_scale, math.nan, SIZES, LIKE)


@pytest.mark.parametrize("value", [1, 0.5, Fraction(1, 3), np.float32(2), 10**400])
def test_numbers(value):
    checks.check_number("op", "ridge", value, above=0)
    checks.check_number("op", "ridge", value, least=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_is_finite(value):
    text = f"op: ridge must be a finite number, got {value}"
    refused(ValueError, text, checks.check_number, "ridge", value)


def test_limits_of_numbers_are_named():
    number = checks.check_number
    text = "op: ridge must be a finite number above 0, got 0"
    refused(ValueError, text, number, "ridge", 0, above=0)
    text = "op: tol must be a finite number of at least 0, got -1.5"
    refused(ValueError, text, number, "tol", -1.5, least=0)
    text = "op: tol must be a number of at least 0, got '1'"
    refused(TypeError, text, number, "tol", "1", least=0)
    refused(TypeError, "op: tol must be a number, got True", number, "tol", True)
    text = "op: tol must be a number, got float32 Tensor[1] on cpu"
    refused(TypeError, text, number, "tol", LIKE)


def test_integers():
    checks.check_integer("op", "block_size", 1)
    checks.check_integer("op", "block_size", 0, least=0)
    for value in (True, 2.0, "2", None):
        text = f"op: block_size must be an int of at least 1, got {value!r}"
        refused(TypeError, text, checks.check_integer, "block_size", value)
    text = "op: block_size must be an int of at least 1, got 0"
    refused(ValueError, text, checks.check_integer, "block_size", 0)


def test_flags():
    checks.check_flag("op", "causal", True)
    for value in (1, None, "yes"):
        text = f"op: causal must be True or False, got {value!r}"
        refused(TypeError, text, checks.check_flag, "causal", value)


def test_a_misspelt_choice_is_answered_with_the_nearest():
    choices = ("auto", "eager", "native")
    checks.check_choice("op", "impl", "eager", choices)
    listed = "op: impl must be one of 'auto', 'eager', 'native', got "
    text = listed + "'eagre'; did you mean 'eager'?"
    refused(ValueError, text, checks.check_choice, "impl", "eagre", choices)
    for value in ("zzz", None, 3, ["eager"]):
        refused(ValueError, listed + repr(value), checks.check_choice, "impl", value, choices)
    tensor = torch.zeros(2)
    text = listed + "float32 Tensor[2] on cpu"
    refused(ValueError, text, checks.check_choice, "impl", tensor, choices)
    refused(
        ValueError, listed + "array([0., 0.])", checks.check_choice, "impl", np.zeros(2), choices
    )


def test_windows():
    for window in (None, (-1, -1), (0, 0), (128, 0)):
        checks.check_window("op", window)
    accepted = "op: window must be a pair (left, right) of ints, -1 for unbounded, got "
    for window in ([1, 2], (1,), 4):
        refused(TypeError, accepted + repr(window), checks.check_window, window)
    for window in ((-2, 0), (1.0, 0), (True, 0), (0, None)):
        refused(ValueError, accepted + repr(window), checks.check_window, window)


def test_a_state_is_of_the_kind_the_op_returns():
    checks.check_state("op", None, KVCache)
    checks.check_state("op", FixedState("op", 0), FixedState)
    text = "op: state must be None or a KVCache, got FixedState"
    refused(TypeError, text, checks.check_state, FixedState("op", 0), KVCache)


def test_what_came_is_shown_on_one_short_line():
    assert checks.describe(torch.zeros(0, dtype=torch.bfloat16)) == "bfloat16 Tensor[0] on cpu"
    shown = checks.describe([torch.zeros(40, 40)])
    assert "\n" not in shown
    assert len(shown) <= 80
    assert shown.startswith("list [tensor(")


def test_checks_hold_in_a_traced_call_with_a_changing_number():
    def op(q, k, v, scale, length):
        checks.check_qkv("op", q, k, v)
        checks.check_scale("op", scale, checks.check_qkv("op", q, k, v), q)
        checks.check_integer("op", "length", length)
        return q * scale + length

    compiled = torch.compile(op, fullgraph=True, backend="eager", dynamic=True)
    for scale, length in ((0.5, 1), (0.25, 2), (3.0, 7)):
        q, k, v = qkv()
        assert torch.equal(compiled(q, k, v, scale, length), op(q, k, v, scale, length))
