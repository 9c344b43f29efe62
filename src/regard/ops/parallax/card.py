"""The card of Parallax."""

from __future__ import annotations

from regard.core.card import Card, Case, Operand, Paper
from regard.ops.parallax import parallax_attention
from regard.ops.parallax.reference import parallax_attention_reference

card = Card(
    name="parallax",
    paper=Paper(
        title="Parallax: Parameterized Local Linear Attention for Language Modeling",
        arxiv="2605.29157",
        year=2026,
        code="https://github.com/Yifei-Zuo/Parallax",
        licence="MIT",
    ),
    op=parallax_attention,
    reference=parallax_attention_reference,
    cases=(
        Case("default"),
        Case("wide", {"scale": 0.2}),
        Case("wide_heads", dims={"D": 96}),  # its kernels on a GPU have tiles of their own
    ),
    operands=(Operand("r", "b h t d", "query", "free"),),
    cost="O(T S D)",
    memory="linear",
    state="cache",
)
