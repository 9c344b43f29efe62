"""The card of bi-level routing attention."""

from __future__ import annotations

from regard.core.card import Card, Case, Paper
from regard.core.patterns import Pattern
from regard.ops.routed import region_topk_attention
from regard.ops.routed.reference import region_topk_attention_reference

card = Card(
    name="routed",
    paper=Paper(
        title="BiFormer: Vision Transformer with Bi-Level Routing Attention",
        arxiv="2303.08810",
        year=2023,
        code="https://github.com/rayleizhu/BiFormer",
        licence="MIT",
    ),
    op=region_topk_attention,
    reference=region_topk_attention_reference,
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS),
    cases=(
        Case("default", {"region": 3, "topk": 2}),
        Case("per head", {"region": 2, "topk": 3, "per_head": True}),
    ),
    cost="O(T topk region (D + Dv) + T S D / region^2)",
    memory="linear",
    laws_except={
        "padding": "regions are counted from the first token, masked or not: padding on the left "
        "moves their borders",
    },
)
