"""The card of delta-rule attention."""

from __future__ import annotations

from regard.core.card import Card, Operand, Paper
from regard.ops.delta import delta_attention
from regard.ops.delta.reference import delta_attention_reference

card = Card(
    name="delta",
    paper=Paper(
        title="Linear Transformers Are Secretly Fast Weight Programmers",
        arxiv="2102.11174",
        year=2021,
        code="https://github.com/IDSIA/lmtool-fwp",
        licence="Apache-2.0",
    ),
    op=delta_attention,
    reference=delta_attention_reference,
    operands=(Operand("beta", "b hk s", "key", "unit"),),
    cost="O((T + S) D Dv)",
    state="fixed",
)
