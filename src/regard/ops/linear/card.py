"""The card of linear attention."""

from __future__ import annotations

from regard.core.card import Card, Case, Paper
from regard.ops.linear import linear_attention
from regard.ops.linear.reference import linear_attention_reference

card = Card(
    name="linear",
    paper=Paper(
        title="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        arxiv="2006.16236",
        year=2020,
        code="https://github.com/idiap/fast-transformers",
        licence="MIT",
    ),
    op=linear_attention,
    reference=linear_attention_reference,
    cases=(
        Case(),
        Case("identity", {"feature_map": "identity", "normalise": False}),
    ),
    cost="O((T + S) D Dv)",
    state="fixed",
    # The scale cancels and nothing else is free: without training there is one linear attention.
    tune={"feature_map": ("elu",)},
)
