"""The card of Hedgehog."""

from __future__ import annotations

from regard.core.card import Card, Case, Paper
from regard.ops.hedgehog import hedgehog_attention
from regard.ops.hedgehog.reference import hedgehog_attention_reference

card = Card(
    name="hedgehog",
    paper=Paper(
        title="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
        arxiv="2402.04347",
        year=2024,
        code="https://github.com/HazyResearch/lolcats",
        licence="Apache-2.0",
    ),
    op=hedgehog_attention,
    reference=hedgehog_attention_reference,
    cases=(
        Case(),
        Case("exp", {"activation": "exp"}),
        Case("relu", {"activation": "relu"}),
    ),
    cost="O((T + S) F Dv)",
    state="fixed",
    tune={"activation": ("softmax_dim", "exp_dim")},
)
