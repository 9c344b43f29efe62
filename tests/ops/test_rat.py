"""What is particular to RAT; the general laws are the contract's."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

import regard
from ops.samples import tensors
from regard.core.budgets import budget, relative_error
from regard.core.state import FixedState
from regard.ops.rat import rat_attention, scan
from regard.ops.rat.attend import Inputs
from regard.ops.rat.registered import attend_eager, scan_eager

LENGTHS = (1, 2, 4, 8, 24)


def inputs(T: int, *, dtype=torch.float64, B=2, H=4, Hk=4, D=8, seed=0) -> tuple[Tensor, ...]:
    """q, k, v and a gate."""
    q, k, v = tensors(seed, B=B, H=H, Hk=Hk, T=T, S=T, D=D, Dv=D, dtype=dtype)
    gate = torch.rand(k.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return q, k, v, gate.to(dtype)


def turned(x: Tensor, position: int, base: float) -> Tensor:
    """Channel by channel, as the paper's code turns a key."""
    half, y = len(x) // 2, x.clone()
    for c in range(half):
        angle = position * base ** (-c / half)
        y[c] = x[c] * math.cos(angle) - x[c + half] * math.sin(angle)
        y[c + half] = x[c + half] * math.cos(angle) + x[c] * math.sin(angle)
    return y


def by_hand(q: Tensor, k: Tensor, v: Tensor, g: Tensor, L: int, base: float) -> Tensor:
    """Explicit loops over rows, heads, tokens and chunks."""
    (B, H, T, D), out = q.shape, torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            keys, values = torch.zeros(T, D).double(), torch.zeros(T, D).double()
            for t in range(T):
                old_k, old_v = (keys[t - 1], values[t - 1]) if t % L else (0.0, 0.0)
                keys[t] = g[b, h, t] * old_k + (1 - g[b, h, t]) * k[b, h, t]
                values[t] = g[b, h, t] * old_v + (1 - g[b, h, t]) * v[b, h, t]
            for t in range(T):
                chunk = t // L
                seen = [*((j, j * L + L - 1) for j in range(chunk)), (chunk, t)]
                query = turned(q[b, h, t], chunk, base)
                scores = torch.stack([query @ turned(keys[at], j, base) for j, at in seen])
                weights = (scores / math.sqrt(D)).softmax(0)
                out[b, h, t] = sum(w * values[at] for w, (_, at) in zip(weights, seen, strict=True))
    return out


@pytest.mark.parametrize("L", LENGTHS)
def test_is_what_explicit_loops_give(L):
    given = inputs(24)
    expected = by_hand(*given, L, 10000.0)
    for impl in ("reference", "eager"):
        out = rat_attention(*given, chunk_length=L, rope=True, impl=impl)
        assert (out - expected).abs().max() < 1e-10
    single = [x.float() for x in given]
    out = rat_attention(*single, chunk_length=L, rope=True)
    assert (out - expected).abs().max() < 2e-6


def test_a_ragged_length_is_the_beginning_of_a_full_one():
    given = inputs(29)
    full = [pad(x, (0, 0, 0, 3), value=0.5) for x in given]
    out = rat_attention(*given, chunk_length=8, rope=True)
    torch.testing.assert_close(out, rat_attention(*full, chunk_length=8, rope=True)[:, :, :29])


@pytest.mark.parametrize("chunk_length", [24, 1000, None])
def test_one_chunk_is_a_gated_recurrence_whatever_the_queries_are(chunk_length):
    q, k, v, gate = inputs(24)
    expected, h = [], torch.zeros_like(v[:, :, 0])
    for t in range(24):
        h = gate[:, :, t] * h + (1 - gate[:, :, t]) * v[:, :, t]
        expected.append(h)
    expected = torch.stack(expected, 2)
    for queries, keys in ((q, k), (5 * k, -q)):
        out = rat_attention(queries, keys, v, gate, chunk_length=chunk_length)
        assert relative_error(out, expected) < 1e-14


def test_chunks_of_one_token_without_a_past_are_attention():
    q, k, v, gate = inputs(24)
    rotate = regard.mixers.rotate
    at = torch.arange(24)[None]
    for closed in (gate * 0, torch.full_like(gate, -30.0).sigmoid()):
        out = rat_attention(q, k, v, closed, chunk_length=1, rope=True)
        expected = scaled_dot_product_attention(rotate(q, at), rotate(k, at), v, is_causal=True)
        assert relative_error(out, expected) < 1e-6


@pytest.mark.parametrize("rope", [False, 50.0])
@pytest.mark.parametrize("impl", ["auto", "eager", "reference"])
def test_decodes_from_any_token(impl, rope):
    """The first chunk included, in steps of one and of several."""
    T, L = 23, 4
    given = inputs(T, Hk=2, dtype=torch.float32)
    settings = {"chunk_length": L, "rope": rope}
    whole = rat_attention(*given, **settings)
    for first in (0, 1, L - 1, L, L + 3):
        for width in (1, 3):
            ends = [0, first, *range(first + width, T, width), T]
            outputs, state = [], None
            for start, stop in pairwise(ends):
                out, state = rat_attention(
                    *(x[:, :, start:stop] for x in given), **settings, impl=impl, state=state,
                    return_state=True,
                )  # fmt: skip
                outputs.append(out)
            assert (torch.cat(outputs, 2) - whole).abs().max() < 1e-5
            assert state is not None
            assert state["ends_k"].shape[2] == (T - 1) // L


def test_a_state_without_its_tail_of_a_row():
    """Rows of different real lengths, cut where their chunks are open to different degrees."""
    T, L = 19, 4
    given = inputs(T, B=3, Hk=2, dtype=torch.float32)
    mask = torch.rand(3, T, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[0, :7], mask[1] = False, True
    settings = {"chunk_length": L, "rope": True}
    whole = rat_attention(*given, **settings, key_mask=mask)
    for row in range(3):
        real = mask[row]
        alone = rat_attention(*(x[row : row + 1, :, real] for x in given), **settings)
        assert relative_error(whole[row : row + 1, :, real], alone) < budget(torch.float32)
    for cuts in ((5, 11), (1, 2, 3, 18), (8, 8, 16)):
        outputs, state = [], None
        for start, stop in zip((0, *cuts), (*cuts, T), strict=True):
            out, state = rat_attention(
                *(x[:, :, start:stop] for x in given), **settings,
                key_mask=mask[:, start:stop], state=state, return_state=True,
            )  # fmt: skip
            outputs.append(out)
        assert relative_error(torch.cat(outputs, 2), whole) < budget(torch.float32)
        assert state["count"].tolist() == mask.sum(1).tolist()


def test_gradcheck_of_the_scan_and_of_the_whole():
    q, k, v, gate = (x.requires_grad_() for x in inputs(12, B=1, H=2, Hk=2, D=4))
    carry = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: scan_eager(*x, 4), (k, gate, carry))

    def whole(*given: Tensor) -> Tensor:
        return rat_attention(*given, chunk_length=4, rope=True)

    assert torch.autograd.gradcheck(whole, (q, k, v, gate))


@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_the_future_changes_no_bit_and_the_present_does(impl):
    given = inputs(20, dtype=torch.float32)
    settings = {"chunk_length": 4, "rope": True, "impl": impl}
    out = rat_attention(*given, **settings)
    for t in (0, 6, 11, 19):
        changed = [x.clone() for x in given]
        for x in changed[1:3]:
            x[:, :, t] += 1
        other = rat_attention(*changed, **settings)
        assert torch.equal(other[:, :, :t], out[:, :, :t])
        assert (other[:, :, t] != out[:, :, t]).any()
        assert (other[:, :, t:] != out[:, :, t:]).any((0, 1, 3)).all()


def test_a_state_is_small():
    """A 15th of the keys and values that softmax attention keeps, at L = 16."""
    for dtype, least in ((torch.float32, 15), (torch.bfloat16, 15)):
        given = inputs(4096, B=1, H=2, Hk=2, dtype=dtype)
        _, state = rat_attention(*given, return_state=True)
        held = sum(x.numel() * x.element_size() for x in state.tensors.values())
        keys = given[1].numel() * given[1].element_size()
        assert 2 * keys / held > least


def test_gates_at_their_ends_are_exact():
    """1 keeps the past bit for bit, 0 forgets it, whatever is written."""
    q, k, v, gate = inputs(16, dtype=torch.float32)
    gate[:, :, 1:] = 1.0
    for impl in ("auto", "eager"):
        out = rat_attention(q, k, v, gate, chunk_length=16, impl=impl)
        assert torch.equal(out, out[:, :, :1].expand_as(out))
        out = rat_attention(q, k, v, gate * 0, chunk_length=16, impl=impl)
        assert torch.equal(out, v)


def test_extreme_scores():
    """A key that outweighs all others by far, in a chunk end and in the running key."""
    q, k, v, gate = inputs(32, dtype=torch.float32)
    k[:, :, 3] *= 1e4
    expected = rat_attention(*(x.double() for x in (q, k, v, gate)), chunk_length=4)
    for impl in ("auto", "eager"):
        given = [x.clone().requires_grad_() for x in (q, k, v, gate)]
        out = rat_attention(*given, chunk_length=4, impl=impl)
        assert relative_error(out, expected) < 1e-4  # scores of 1e4 have 1e-3 of rounding
        out.sum().backward()
        assert all(x.grad.isfinite().all() for x in given)


def test_vmap():
    given = [torch.stack([x, 2 * x]) if n < 3 else x for n, x in enumerate(inputs(10, Hk=2))]

    def one(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return rat_attention(q, k, v, gate, chunk_length=4, rope=True)

    mapped = torch.vmap(one, (0, 0, 0, None))(*given)
    for n in range(2):
        torch.testing.assert_close(mapped[n], one(*(x[n] for x in given[:3]), given[3]))


def test_the_operators_say_what_they_take():
    """The one thing that only they can be asked: rows that share a table of places."""
    q, k, v, _ = inputs(6, Hk=2)
    past, place = k[:, :, :0], torch.tensor([[-1, 0, 1, 2, 3, 5]], dtype=torch.int32)
    given = q, k, v, past, past, None, place, None, None, 0.5, 2, 5
    out, lse = attend_eager(*given)
    every = Inputs(*given[:6], place.expand(2, -1), *given[7:])
    assert torch.equal(out, attend_eager(*vars(every).values())[0])
    assert not out[:, :, 0].any()
    assert lse[:, :, 0].isposinf().all()
    torch.testing.assert_close(out[:, :, 1], v.repeat_interleave(2, 1)[:, :, 0])


def test_the_scan_of_nothing():
    nothing = torch.zeros(1, 2, 0, 4)
    assert scan.forward(nothing, nothing, torch.ones(1, 2, 4), 3).shape == nothing.shape


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"causal": False}, "rat_attention: causal must be True: RAT is a recurrence"),
        ({"chunk_length": 0}, "rat_attention: chunk_length must be an int of at least 1, got 0"),
        ({"chunk_length": 2.0}, "rat_attention: chunk_length must be an int"),
        ({"rope": 0.5}, "rat_attention: rope must be a finite number above 1"),
        ({"gate": torch.rand(2, 4, 6)}, "rat_attention: gate must be of shape [2, 4, 6, 8]"),
        ({"gate": 0.5}, "rat_attention: gate must be a torch.Tensor"),
        ({"v": torch.rand(2, 4, 6, 3)}, "rat_attention: v must be of k's head size 8"),
        ({"impl": "triton"}, "rat_attention: impl='triton' cannot serve this call"),
        (
            {"state": FixedState("rat(chunk_length=8, rope=None)", 3)},
            "rat_attention: state must be one of rat(chunk_length=16, rope=None), got one of "
            "rat(chunk_length=8, rope=None)",
        ),
        (
            {"state": FixedState("rat(chunk_length=16, rope=None)", 3)},
            "rat_attention: state must be one that holds v, ends_k, ends_v, k",
        ),
    ],
)
def test_a_wrong_argument_is_named(changed, message):
    q, k, v, gate = inputs(6, dtype=torch.float32)
    with pytest.raises((TypeError, ValueError)) as caught:
        rat_attention(**{"q": q, "k": k, "v": v, "gate": gate, **changed})
    assert message in str(caught.value)


def test_an_odd_head_has_no_angles():
    given = inputs(6, D=5)
    with pytest.raises(ValueError, match="rope must be False where the head size is odd, here 5"):
        rat_attention(*given, rope=True)


def test_which_form_runs():
    given = inputs(6, dtype=torch.float32)
    wide = [x.double() for x in given]
    assert regard.explain(rat_attention, *wide).form == "blocks"
    if regard.native.instruction_sets():
        assert regard.explain(rat_attention, *given).form == "tiles"
    one = [x[:, :, :1] for x in given]
    assert regard.explain(rat_attention, *one).form == "step"
    mask = torch.ones(2, 1, dtype=torch.bool)
    assert "without masked tokens" in str(regard.explain(rat_attention, *one, key_mask=mask))
