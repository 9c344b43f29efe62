"""The card of PAROAttention."""

from __future__ import annotations

from regard.core.card import Card, Case, Operand, Paper
from regard.core.patterns import Pattern
from regard.ops.paro import axis_order_attention
from regard.ops.paro.reference import axis_order_attention_reference

card = Card(
    name="paro",
    paper=Paper(
        title="PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized "
        "Attention in Visual Generation Models",
        arxiv="2506.16054",
        year=2025,
        code="https://github.com/thu-nics/PAROAttention",
    ),
    op=axis_order_attention,
    reference=axis_order_attention_reference,
    patterns=(Pattern.NONCAUSAL_SELF,),
    # A plan belongs to a grid, which fixes the length. Blocks of one token: a mask as fine as can
    # be. Codes are drawn from 0 and 1, two of the six orders of three axes.
    cases=(
        Case("video", {"grid": (2, 3, 2), "block": 1}, {"T": 12, "S": 12}),
        Case("image and text", {"grid": (2, 5), "text": 2, "block": 1}, {"T": 12, "S": 12}),
    ),
    operands=(Operand("codes", "h", "plan", "flag"), Operand("kept", "b h t s", "plan", "flag")),
    cost="O(density T^2 (D + Dv))",
    memory="quadratic",  # these cases' masks are T x T themselves; larger blocks are linear
)
