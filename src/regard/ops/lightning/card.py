"""The card of lightning attention."""

from __future__ import annotations

from regard.core.card import Card, Paper
from regard.ops.lightning import lightning_attention
from regard.ops.lightning.reference import lightning_attention_reference

card = Card(
    name="lightning",
    paper=Paper(
        title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning "
        "Attention",
        arxiv="2405.17381",
        year=2024,
        code="https://github.com/OpenNLPLab/lightning-attention",
        licence="MIT",
    ),
    op=lightning_attention,
    reference=lightning_attention_reference,
    cost="O((T + S) D Dv)",
    state="fixed",
)
