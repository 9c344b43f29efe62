"""The card of RAT."""

from __future__ import annotations

from regard.core.card import Card, Case, Operand, Paper
from regard.core.patterns import Pattern
from regard.ops.rat import rat_attention
from regard.ops.rat.reference import rat_attention_reference

EQUAL = {"D": 8, "Dv": 8}  # one gate moves the channels of keys and of values

card = Card(
    name="rat",
    paper=Paper(
        "RAT: Bridging RNN Efficiency and Attention Accuracy via Chunk-based Sequence Modeling",
        arxiv="2507.04416",
        year=2025,
        code="https://github.com/CLAIRE-Labo/RAT",
        licence="MIT",
    ),
    op=rat_attention,
    reference=rat_attention_reference,
    patterns=(Pattern.CAUSAL_SELF,),
    cases=(
        Case("default", {"chunk_length": 4}, EQUAL),
        Case("rope", {"chunk_length": 3, "rope": 100.0}, EQUAL),
        Case("one chunk", {"chunk_length": None}, EQUAL),
    ),
    operands=(Operand("gate", "b hk s d", "key", "unit"),),
    cost="O(T D + T S D / chunk_length)",
    memory="linear",
    state="fixed",
)
