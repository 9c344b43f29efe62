"""The card of block-sparse attention."""

from __future__ import annotations

from regard.core.card import Card, Case, Operand, Paper
from regard.ops.block_sparse import block_sparse_attention
from regard.ops.block_sparse.reference import block_sparse_reference

card = Card(
    name="block_sparse",
    paper=Paper(
        title="PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation",
        arxiv="2512.04025",
        year=2025,
        code="https://github.com/ziplab/Pyramid-Sparse-Attention",
        licence="Apache-2.0",
    ),
    op=block_sparse_attention,
    reference=block_sparse_reference,
    # Blocks of one token: then a plan can be cut, joined and padded with the tokens it is about.
    cases=(Case("tokens", {"block_q": 1, "block_k": 1}),),
    operands=(Operand("levels", "b h t s", "plan", "flag"),),
    cost="O(density T S (D + Dv))",
    memory="quadratic",  # this case's plan is T x S itself; larger blocks are linear
)
