"""The card of attention within windows."""

from __future__ import annotations

from regard.core.card import Card, Case, Paper
from regard.core.patterns import Pattern
from regard.ops.window import window_attention
from regard.ops.window.reference import window_attention_reference

card = Card(
    name="window",
    paper=Paper(
        title="FreeSwim: Revisiting Sliding-Window Attention Mechanisms for Training-Free "
        "Ultra-High-Resolution Video Generation",
        arxiv="2511.14712",
        year=2025,
        code="https://github.com/WillWu111/FreeSwim",
    ),
    op=window_attention,
    reference=window_attention_reference,
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    cases=(Case("sequence", {"window": (4, 2)}),),
    cost="O(T w (D + Dv))",
)
