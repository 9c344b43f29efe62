"""Linear attention in which every channel of a key has a decay of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.core.budgets import budget, relative_error
from regard.core.state import FixedState
from regard.ops.linear import encode, linear_attention, read
from regard.ops.linear.chunked import chunked
from regard.ops.linear.chunked_channels import chunked_channels
from regard.ops.linear.recurrent import recurrent
from regard.ops.linear.reference import linear_attention_reference


def inputs(T: int, S: int, *, dtype=torch.float64, B=2, H=4, Hk=2, D=5, Dv=3) -> list[Tensor]:
    """q, k, v and decays: mild, strong and total, mixed within each key."""
    make = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(B, heads, length, width, generator=make, dtype=torch.float64)
        for heads, length, width in ((H, T, D), (Hk, S, D), (Hk, S, Dv))
    )
    steps = -torch.rand(B, Hk, S, D, generator=make, dtype=torch.float64)
    kind = torch.rand(B, Hk, S, D, generator=make)
    steps[kind < 0.1] = -40.0
    steps[kind < 0.04] = -torch.inf
    return [x.to(dtype).requires_grad_() for x in (q, k, v, steps)]


def gradients(out: Tensor, *tensors: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out).sin()
    return list(torch.autograd.grad((out * weight).sum(), tensors, allow_unused=True))


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_equal_the_recurrence(T, chunk):
    q, k, v, a = inputs(T, T)
    state = torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for walk, options in ((recurrent, ()), (chunked_channels, (chunk,))):
        out, after = walk(q, k, v, a, state, *options)
        both = torch.cat([out.flatten(), after.flatten()])
        found.append([both, *gradients(both, q, k, v, a, state)])
    for x, y in zip(*found, strict=True):
        assert (x - y).abs().max() <= 1e-11 * (1 + y.abs().max())


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "S"), [(70, 70), (5, 40), (40, 5), (3, 0), (0, 3)])
def test_equals_the_reference_in_every_pattern(normalise, causal, T, S):
    q, k, v, a = inputs(T, S)
    mask = torch.rand(2, S, generator=torch.Generator().manual_seed(2)) < 0.8
    options = {"causal": causal, "normalise": normalise, "log_decay": a, "key_mask": mask}
    options |= {} if normalise else {"feature_map": "identity"}
    expected, last = linear_attention_reference(q, k, v, **options, return_state=True)
    out, state = linear_attention(q, k, v, **options, return_state=True)
    assert relative_error(out, expected) < budget(torch.float64)
    for name in last.tensors:
        assert relative_error(state[name], last[name]) < budget(torch.float64)
    if T and S:
        for x, y in zip(*(gradients(o, q, k, v, a) for o in (out, expected)), strict=True):
            assert relative_error(x, y) < budget(torch.float64, "gradient")


def test_equal_decays_of_all_channels_are_one_decay():
    q, k, v, _ = inputs(150, 150)
    a = -torch.rand(2, 2, 150, dtype=torch.float64)
    a[:, :, 70] = -torch.inf
    state = torch.randn(2, 2, 5, 3, dtype=torch.float64)
    for x, y in zip(
        chunked_channels(q, k, v, a[..., None].expand(-1, -1, -1, 5), state),
        chunked(q, k, v, a, state),
        strict=True,
    ):
        assert relative_error(x, y) < budget(torch.float64)


def test_gradcheck_and_registration():
    q, k, v, _ = inputs(5, 5, B=1, H=2, Hk=1, D=2, Dv=2)
    a = -torch.rand(1, 1, 5, 2, dtype=torch.float64)
    state = torch.randn(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: chunked_channels(*x, 2), (q, k, v, a.requires_grad_(), state)
    )
    torch.library.opcheck(torch.ops.regard.linear_channels_fwd, (q, k, v, a, state, 2))
    made = torch.randn(1, 2, 5, 2).double(), torch.randn_like(state).detach()
    plain = [x.detach() for x in (q, k, v, a, state)]
    torch.library.opcheck(torch.ops.regard.linear_channels_bwd, (*made, *plain, 2, True))


@pytest.mark.parametrize("step", [0.0, -40.0, -1e30, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_decays_are_exact_and_finite(step, dtype):
    q, k, v, _ = inputs(150, 150, dtype=dtype)
    a = torch.zeros(2, 2, 150, 5, dtype=dtype)
    a[..., :2] = step  # the others forget nothing
    a.requires_grad_()
    out = linear_attention(q, k, v, causal=True, log_decay=a)
    exact = (x.double() for x in (q, k, v))
    expected = linear_attention_reference(*exact, causal=True, log_decay=a.double())
    assert relative_error(out, expected) < budget(dtype)
    got = gradients(out, q, k, v, a)
    wanted = gradients(expected, q, k, v, a)
    assert all(x.isfinite().all() for x in got)
    for x, y in zip(got, wanted, strict=True):
        assert relative_error(x, y) < budget(dtype, "gradient")


@pytest.mark.parametrize("chunk", [8, 64])
def test_a_later_key_changes_no_bit(chunk):
    results = []
    for junk in (0.25, 1e30):
        q, k, v, a = inputs(40, 40, dtype=torch.float32)
        with torch.no_grad():
            k[:, :, 21:], v[:, :, 21:], a[:, :, 21:] = junk, -junk, -3.0 * junk
        out = linear_attention(
            q, k, v, causal=True, log_decay=a, chunk_size=chunk, feature_map="identity",
            normalise=False,
        )[:, :, :21]  # fmt: skip
        results.append([out, *(x[:, :, :21] for x in gradients(out, q, k, v, a))])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_a_forgotten_channel_leaves_no_bit_of_a_past_that_has_overflowed():
    results = []
    for junk in (0.5, 3e38):
        q, k, v, _ = inputs(40, 40, dtype=torch.float32)
        a = torch.full((2, 2, 40, 5), -0.1)
        a[:, :, 20] = -torch.inf
        with torch.no_grad():
            k[:, :, 3], v[:, :, 3] = junk, junk
        for chunk in (8, 16):
            out = linear_attention(
                q, k, v, causal=True, log_decay=a, chunk_size=chunk, feature_map="identity",
                normalise=False,
            )  # fmt: skip
            late = torch.autograd.grad(out[:, :, 20:].sum(), (q, k, v))
            results.append([out[:, :, 20:], *(x[:, :, 20:] for x in late)])
    for one, two in zip(results[:2], results[2:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize("at", [0, 1, 33, 64, 69, 70])
def test_a_state_continues_at_any_split(at):
    q, k, v, a = inputs(70, 70)
    whole = linear_attention(q, k, v, causal=True, log_decay=a)
    first, state = linear_attention(
        q[:, :, :at], k[:, :, :at], v[:, :, :at], causal=True, log_decay=a[:, :, :at],
        return_state=True,
    )  # fmt: skip
    rest = [x[:, :, at:] for x in (q, k, v, a)]
    second = linear_attention(*rest[:3], causal=True, log_decay=rest[3], state=state)
    assert relative_error(torch.cat([first, second], 2), whole) < budget(torch.float64)


@pytest.mark.parametrize("decay", [None, "token", "channel"])
@pytest.mark.parametrize("normalise", [False, True])
def test_a_memory_is_encoded_once_in_parts_and_read_by_any_queries(decay, normalise):
    q, k, v, a = inputs(9, 30)
    mask = torch.rand(2, 30, generator=torch.Generator().manual_seed(2)) < 0.8
    a = {None: None, "token": a[..., 0], "channel": a}[decay]
    options = {"normalise": normalise} | ({} if normalise else {"feature_map": "identity"})
    scale = {} if normalise else {"scale": torch.rand(4, dtype=torch.float64)}
    expected = linear_attention(q, k, v, key_mask=mask, log_decay=a, **options, **scale)
    for impl in ("auto", "reference"):
        memory = None
        for i, j in ((0, 11), (11, 11), (11, 30)):
            steps = None if a is None else a[:, :, i:j]
            part = {"key_mask": mask[:, i:j], "log_decay": steps, "state": memory, "impl": impl}
            memory = encode(k[:, :, i:j], v[:, :, i:j], **part, **options)
        assert memory.length == 30
        out = read(q, memory, **options, **scale, impl=impl)
        assert relative_error(out, expected) < budget(torch.float64)
        one = read(q[:, :, 3:4], memory, **options, **scale)
        assert relative_error(one, expected[:, :, 3:4]) < budget(torch.float64)


def test_packed_memories_have_a_row_each():
    _, k, v, _ = inputs(1, 20, B=1)
    memory = encode(k, v, cu_seqlens=torch.tensor([0, 7, 7, 20], dtype=torch.int32))
    for row, (i, j) in enumerate(((0, 7), (7, 7), (7, 20))):
        alone = encode(k[:, :, i:j], v[:, :, i:j])
        for name in ("S", "z"):
            assert torch.equal(memory[name][row : row + 1], alone[name])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, k, v: encode(k[0], v), ValueError, "linear.encode: k must be 4-dim"),
        (lambda q, k, v: encode(k, None), TypeError, "linear.encode: v must be a torch.Tensor"),
        (lambda q, k, v: encode(k, v, normalise=1), TypeError, "linear.encode: normalise must"),
        (lambda q, k, v: read(q, None), TypeError, "linear.read: state must be a FixedState"),
        (
            lambda q, k, v: read(q, FixedState("delta", 1, {"S": k})),
            ValueError,
            "linear.read: state must be a state of linear attention, got one of delta",
        ),
        (
            lambda q, k, v: read(q, encode(k, v, normalise=False)),
            ValueError,
            "linear.read: state must be one of a call with normalise=True",
        ),
        (
            lambda q, k, v: read(q[..., :3], encode(k, v)),
            ValueError,
            r"linear.read: state\['S'\] must be float64 \[2, 2, 3, 3\]",
        ),
        (
            lambda q, k, v: linear_attention(q, k, v, log_decay=torch.zeros(2, 2, 6, 4)),
            ValueError,
            r"log_decay must be of shape \[2, 1 or 2, 6, 5\]",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message):
    q, k, v, _ = inputs(6, 6)
    with pytest.raises(error, match=message):
        call(q, k, v)
