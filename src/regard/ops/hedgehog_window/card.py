"""The card of Hedgehog with a softmax window."""

from __future__ import annotations

from regard.core.card import Card, Case, Paper
from regard.core.patterns import Pattern
from regard.ops.hedgehog_window import hedgehog_window_attention
from regard.ops.hedgehog_window.reference import hedgehog_window_reference

card = Card(
    name="hedgehog_window",
    paper=Paper(
        title="LoLCATs: On Low-Rank Linearizing of Large Language Models",
        arxiv="2410.10254",
        year=2024,
        code="https://github.com/HazyResearch/lolcats",
        licence="Apache-2.0",
    ),
    op=hedgehog_window_attention,
    reference=hedgehog_window_reference,
    patterns=(Pattern.CAUSAL_SELF,),
    cases=(
        Case("sliding", {"window_length": 4, "affine": True}),
        Case("terraced", {"window_length": 3, "layout": "terraced"}),
        Case(),
    ),
    cost="O(T (w (D + F + Dv) + F Dv))",
    state="fixed",
    tune={"window_length": (16, 64), "gamma": (0.1, 0.5)},
)
