"""The card of gated delta-rule attention."""

from __future__ import annotations

from regard.core.card import Card, Operand, Paper
from regard.ops.gated_delta import gated_delta_attention
from regard.ops.gated_delta.reference import gated_delta_attention_reference

card = Card(
    name="gated_delta",
    paper=Paper(
        title="Gated Delta Networks: Improving Mamba2 with Delta Rule",
        arxiv="2412.06464",
        year=2024,
        code="https://github.com/NVlabs/GatedDeltaNet",
    ),
    op=gated_delta_attention,
    reference=gated_delta_attention_reference,
    operands=(
        Operand("beta", "b hk s", "key", "unit"),
        Operand("log_decay", "b hk s", "key", "log_decay"),
    ),
    cost="O((T + S) D Dv)",
    state="fixed",
)
