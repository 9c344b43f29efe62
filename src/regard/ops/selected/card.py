"""The card of attention to the most important blocks."""

from __future__ import annotations

from regard.core.card import Card, Case, Paper
from regard.core.patterns import Pattern
from regard.ops.selected import block_topk_attention
from regard.ops.selected.reference import block_topk_attention_reference

card = Card(
    name="selected",
    paper=Paper(
        title="SSA: Sparse Sparse Attention by Aligning Full and Sparse Attention Outputs in "
        "Feature Space",
        arxiv="2511.20102",
        year=2025,
        code="https://github.com/zhenyi4/ssa",
        licence="MIT",
    ),
    op=block_topk_attention,
    reference=block_topk_attention_reference,
    patterns=(Pattern.CAUSAL_SELF,),
    cases=(
        Case("default", {"block": 3, "count": 2}),
        Case("small blocks", {"block": 1, "count": 3}),
    ),
    cost="O(T S D / block + T count block (D + Dv))",
    memory="linear",
    state="cache",
    laws_except={
        "grouped_queries": "the query heads of a key head choose blocks together, so a key head "
        "given several times is several choices"
    },
)
