"""Mechanisms and layers that the tests of the mixers share."""

from __future__ import annotations

import torch

import regard
from regard.core import budgets
from regard.core.card import Card, Operand, Paper
from regard.core.checks import name_of
from regard.core.patterns import Pattern
from regard.core.precision import compute_dtype
from regard.core.state import FixedState
from regard.mixers import Attention

DIM, HEADS = 16, 4
# Everything that a layer can have around self-attention.
FULL = {"kv_heads": 2, "qk_norm": True, "rope": True, "short_conv": 3, "output_gate": True}


def toy_attention(
    q, k, v, *, gate, strength, log_decay, offset,
    causal=False, key_mask=None, state=None, return_state=False,
):  # fmt: skip
    """S_t = exp(a_t) S_(t-1) + b_t (k_t + c) v_t^T,  o_t = g_t q_t^T S_t."""
    assert causal
    assert q.shape[2] == k.shape[2]
    group, dtype = q.shape[1] // k.shape[1], q.dtype
    wide = compute_dtype(dtype)
    q, k, v, offset = (tensor.to(wide) for tensor in (q, k, v, offset))
    S = q.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]) if state is None else state["S"]
    outputs = [q.new_zeros(*q.shape[:2], 0, v.shape[3])]
    for t in range(q.shape[2]):
        key = (k[:, :, t] + offset) * strength[:, :, t, None]
        new = S * log_decay[:, t, :, None, None].exp() + key[..., None] * v[:, :, t, None]
        if key_mask is not None:
            new = torch.where(key_mask[:, t, None, None, None], new, S)
        S = new
        read = torch.einsum("bhd,bhde->bhe", q[:, :, t], S.repeat_interleave(group, 1))
        outputs.append((read * gate[:, :, t, None])[:, :, None])
    out = torch.cat(outputs, 2).to(dtype)
    length = (0 if state is None else state.length) + q.shape[2]
    return (out, FixedState("toy", length, {"S": S})) if return_state else out


def bare_attention(q, k, v, *, causal=False):
    """Softmax attention that takes nothing else."""
    return regard.ops.softmax_attention(q, k, v, causal=causal)


def planned_attention(q, k, v, *, plan, causal=False):
    """Wants what no generic layer can make."""
    return v


PAPER = Paper("A toy")
TOY = Card(
    "toy", PAPER, toy_attention, toy_attention, patterns=(Pattern.CAUSAL_SELF,), state="fixed",
    operands=(
        Operand("gate", "b h t", "query", "unit"),
        Operand("strength", "b hk s", "key", "positive"),
        Operand("log_decay", "b s hk", "key", "log_decay"),
        Operand("offset", "hk d", "head", "free"),
    ),
)  # fmt: skip
BARE = Card("bare", PAPER, bare_attention, bare_attention)
PLANNED = Card(
    "planned", PAPER, planned_attention, planned_attention,
    operands=(Operand("plan", "b h t", "plan", "index"),),
)  # fmt: skip


def makeable(card: Card) -> bool:
    """Whether a generic layer can make the operands of this mechanism."""
    return all(operand.source != "plan" and operand.domain != "index" for operand in card.operands)


CARDS = [card for card in map(regard.mechanisms.__getitem__, regard.mechanisms) if makeable(card)]
CARDS.append(TOY)


def having(*arguments: str, patterns: tuple[Pattern, ...] = ()) -> list[Card]:
    """The mechanisms whose op has these arguments and that serve these patterns."""
    return [
        card
        for card in CARDS
        if all(map(card.accepts, arguments)) and set(patterns) <= set(card.patterns)
    ]


def by_name(card: Card) -> str:
    return card.name


def build(card: Card, dtype: torch.dtype = torch.float64, **settings) -> Attention:
    """A layer in which nothing is at a special value."""
    torch.manual_seed(0)
    settings = {"options": dict(card.cases[0].options), **settings}
    layer = Attention(DIM, HEADS, mechanism=card, **settings)
    return jolt(layer).to(dtype)


def jolt(layer):
    """Gains, biases and head parameters moved away from where they start."""
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def tokens(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, DIM, generator=generator, dtype=torch.float64).to(dtype)


def check_close(card: Card, actual, expected, quantity="value", dtype=None) -> None:
    """Within the budget of the dtype, or of what the card claims."""
    dtype = dtype or actual.dtype
    allowed = budgets.budget(dtype, quantity)
    claim = card.budgets.get(name_of(dtype))
    if claim is not None:
        allowed *= max(1.0, claim[0] / budgets.budget(dtype, "value"))
    error = budgets.relative_error(actual, expected)
    assert error <= allowed, f"relative error {error:.3g}, budget {allowed:.3g}"
