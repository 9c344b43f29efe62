"""The card of InLine attention."""

from __future__ import annotations

from regard.core.card import Card, Case, Paper
from regard.ops.inline import inline_attention
from regard.ops.inline.reference import inline_attention_reference

card = Card(
    name="inline",
    paper=Paper(
        title="Bridging the Divide: Reconsidering Softmax and Linear Attention",
        arxiv="2412.06590",
        year=2024,
        code="https://github.com/LeapLabTHU/InLine",
    ),
    op=inline_attention,
    reference=inline_attention_reference,
    cases=(
        Case(),
        Case("exp", {"feature_map": "exp"}),
    ),
    cost="O((T + S) D Dv)",
    state="fixed",
    tune={"scale": (0.25, 0.5, 1.0, 2.0)},
)
