"""The card of exact softmax attention."""

from __future__ import annotations

from regard.core.card import Card, Case, Paper
from regard.ops.softmax import softmax_attention
from regard.ops.softmax.reference import softmax_reference

card = Card(
    name="softmax",
    paper=Paper(
        "Attention Is All You Need",
        arxiv="1706.03762",
        year=2017,
        code="https://github.com/tensorflow/tensor2tensor",
        licence="Apache-2.0",
    ),
    op=softmax_attention,
    reference=softmax_reference,
    cases=(Case("default"), Case("softcap", {"softcap": 5.0})),
    cost="O(T S D)",
    memory="linear",
    state="cache",
    tune={"scale": (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)},
)
